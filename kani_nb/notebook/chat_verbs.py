"""What stands behind `%chat VERB`: look at the conversation, go back, try again, keep it, find it again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb._runtime import runtime
from kani_nb.config import split_options
from kani_nb.errors import ConfigError, ConversationError, PromptError
from kani_nb.generation_params import GenerationParams
from kani_nb.notebook.chat_tools import tools_verb
from kani_nb.notebook.interpolation import interpolate
from kani_nb.notebook.shell import front_end
from kani_nb.notebook.tables import one_line, print_text, text_table
from kani_nb.notebook.verbs import Verb, VerbTable, required, unquoted, whole_number
from kani_nb.options import GENERATION_OPTIONS, LineParser

if TYPE_CHECKING:
    from kani_nb.conversation.session import ChatReply, ChatSession, Prompt
    from kani_nb.conversation.tree import Conversation, Turn
    from kani_nb.notebook.stop_bus import StopBus

Answer = Callable[..., "ChatReply"]

_WIDE = 60


def chat_verbs(shell: Any, answer: Answer, bus: StopBus) -> VerbTable:
    """The verbs of `%chat`. `answer(session, open_stream, prompt)` runs a round in this cell."""
    looks, changes, keeps = _Looks(shell, bus), _Changes(shell, answer), _Keeps(shell)
    return VerbTable(
        "%chat",
        [
            Verb("panel", "a pane of this conversation: ask, stop, edit, switch by clicking", looks.panel),
            Verb("history", "the turns of this conversation", looks.history),
            Verb("show", "all of it, as it was answered", looks.show),
            Verb("undo [N]", "take back the last turns; they stay as a branch", changes.undo),
            Verb(
                "retry [K] [OPTIONS]",
                "another answer to turn K, or to the last one",
                changes.retry,
                True,
                details=_options,
            ),
            Verb("edit K [OPTIONS] TEXT", "ask TEXT in the place of turn K", changes.edit, True, details=_options),
            Verb("branches", "the ends of all branches", looks.branches),
            Verb("switch N", "go on with branch N", changes.switch),
            Verb("clear", "start over; what was said stays as a branch", changes.clear),
            Verb("system [TEXT|--clear]", "show, set or remove the system prompt", changes.system, takes_text=True),
            tools_verb(shell),
            Verb("stop", "end the answers that are running", changes.stop),
            Verb("new [NAME]", "start another conversation", keeps.new),
            Verb("list [--all]", "the conversations of this notebook, or of all", keeps.list),
            Verb("open NAME", "go on with that conversation", keeps.open),
            Verb("resume [NAME]", "go on with the one from before the kernel was restarted", keeps.resume),
            Verb("rename NAME", "call this conversation NAME", keeps.rename),
            Verb("delete NAME", "delete a conversation for good", keeps.delete),
            Verb("save FILE [--format F] [--overwrite]", "write it to a file", keeps.save, True, details=_formats),
            Verb("load FILE [--format F]", "read one from a file", keeps.load, True, details=_formats),
        ],
        examples=["%chat undo 2", "%chat retry --seed 7", "%chat system Answer in one word.", "%chat save talk.md"],
        hint="prompts go below %%chat, with two percent signs",
    )


def _options() -> str:
    return _generation_parser("").format_help().partition("\n\n")[2].rstrip()


def _formats() -> str:
    return "F is json, openai, sharegpt or markdown; without it the suffix of FILE says, or its content."


def _generation_parser(prog: str) -> LineParser:
    parser = LineParser(prog=prog, add_help=False)
    for option in GENERATION_OPTIONS:
        option.add_to(parser)
    return parser


class _Looks:
    """Verbs that change nothing."""

    def __init__(self, shell: Any, bus: StopBus) -> None:
        self._shell = shell
        self._bus = bus

    def panel(self, _rest: str) -> None:
        from kani_nb.notebook.panels.showing import need_place_for_panel

        need_place_for_panel(self._shell, "%%chat --help")
        from kani_nb.notebook.panels.chat_panel import show_chat_panel

        show_chat_panel(self._bus)

    def history(self, _rest: str) -> None:
        session = runtime().chat
        conversation = session.conversation
        others = len(conversation.branches()) - 1
        print_text(
            f"{conversation.name}: {_plural(len(session.turns), 'turn')}"
            + (f", {_plural(others, 'other branch', 'other branches')} (%chat branches)" if others > 0 else "")
        )
        if conversation.system:
            print_text(f"system: {one_line(conversation.system, 2 * _WIDE)}")
        rows = [
            (str(number), one_line(turn.prompt.text, _WIDE), _said(turn))
            for number, turn in enumerate(session.turns, 1)
        ]
        if rows:
            print_text(text_table(("turn", "you", "answer"), rows))

    def show(self, _rest: str) -> None:
        session = runtime().chat
        if not session.turns:
            print_text(f"{session.conversation.name} has no turns yet.")
        for turn in session.turns:
            _show_turn(turn)

    def branches(self, _rest: str) -> None:
        conversation = runtime().chat.conversation
        here = {turn.id for turn in conversation.path()}
        rows = [
            (
                "*" if conversation.head is not None and leaf.id in here else "",
                str(number),
                str(len(conversation.path(leaf.id))),
                one_line(leaf.prompt.text, _WIDE),
                _said(leaf),
            )
            for number, leaf in enumerate(conversation.branches(), 1)
        ]
        print_text(
            text_table(("", "branch", "turns", "last asked", "answered"), rows) if rows else "There are none yet."
        )


class _Changes:
    """Verbs that change the current conversation."""

    def __init__(self, shell: Any, answer: Answer) -> None:
        self._shell = shell
        self._answer = answer

    def undo(self, rest: str) -> None:
        session = runtime().chat
        count = whole_number(rest, "%chat undo [N]", 1)
        assert count is not None
        if not session.turns:
            raise ConversationError("there is nothing to undo", why="this conversation has no turns")
        undone = session.undo(count)
        print_text(f"{_plural(undone, 'turn')} taken back; {_plural(len(session.turns), 'turn')} left.")

    def retry(self, rest: str) -> None:
        parser = _generation_parser("%chat retry")
        parser.add_argument("number", nargs="?")
        args = parser.parse_line(rest)
        number = whole_number(args.number or "", "%chat retry [K]")
        params = split_options(vars(args), "generation")
        GenerationParams.from_kwargs(params)
        session = self._ready()
        prompt = session.conversation.turn_at(number).prompt
        self._answer(session, lambda: session.stream_retry(number, **params), _as_prompt(prompt.content))

    def edit(self, rest: str) -> None:
        usage = "%chat edit K [OPTIONS] TEXT"
        first, _, text = required(rest, usage).partition(" ")
        number = whole_number(first, usage)
        assert number is not None
        words, text = _leading_options(text.strip())
        params = split_options(vars(_generation_parser("%chat edit").parse_line(words)), "generation")
        GenerationParams.from_kwargs(params)
        if not text:
            raise PromptError("the new text is empty", fix=usage)
        prompt = interpolate(text, self._shell.user_ns)
        session = self._ready()
        session.conversation.turn_at(number)
        self._answer(session, lambda: session.stream_edit(number, prompt, **params), prompt)

    def switch(self, rest: str) -> None:
        usage = "%chat switch N"
        number = whole_number(required(rest, usage), usage)
        assert number is not None
        session = runtime().chat
        session.switch(number)
        print_text(f"On branch {number}, with {_plural(len(session.turns), 'turn')}.")

    def clear(self, _rest: str) -> None:
        session = runtime().chat
        if session.turns:
            session.undo(len(session.turns))
        print_text(f"{session.conversation.name} starts over; %chat branches lists what was said.")

    def system(self, rest: str) -> None:
        session = runtime().chat
        if rest:
            session.set_system(None if rest == "--clear" else rest)
        print_text(f"system: {session.system}" if session.system else "There is no system prompt.")

    def stop(self, _rest: str) -> None:
        print_text("Stopping." if runtime().stop() else "Nothing is being answered.")

    def _ready(self) -> ChatSession:
        rt = runtime()
        rt.need_engine()
        return rt.chat


class _Keeps:
    """Verbs about conversations as a whole."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def new(self, rest: str) -> None:
        self._say_current(runtime().new_chat(unquoted(rest) or None))

    def list(self, rest: str) -> None:
        if rest not in ("", "--all"):
            raise ConfigError(f"{rest[:60]!r} cannot be listed", fix="%chat list, or %chat list --all")
        rt = runtime()
        everywhere = rest == "--all"
        current = rt.chat.conversation.id if rt.chats else None
        saved = rt.list_chats(everywhere=everywhere)
        rows = [
            (
                "*" if each.id == current else "",
                each.name,
                str(each.turns),
                _when(each.updated_at),
                *_place(each, everywhere),
            )
            for each in saved
        ]
        for name, session in rt.chats.items():
            if session.conversation.id not in {each.id for each in saved}:
                mark = "*" if session.conversation.id == current else ""
                where = ("",) if everywhere else ()
                rows.append((mark, name, str(len(session.conversation.turns)), "not saved yet", *where))
        headers = ("", "name", "turns", "last used", *(("notebook",) if everywhere else ()))
        print_text(text_table(headers, rows) if rows else "There are no conversations yet.")
        self._say_where()

    def open(self, rest: str) -> None:
        self._say_current(runtime().open_chat(unquoted(required(rest, "%chat open NAME"))))

    def resume(self, rest: str) -> None:
        session = runtime().resume(unquoted(rest) or None)
        self._say_current(session)
        if session.turns and session.turns[-1].interrupted:
            print_text("Its last answer was cut off; %chat retry asks again.")
        self._say_where()

    def rename(self, rest: str) -> None:
        rt = runtime()
        name = unquoted(required(rest, "%chat rename NAME"))
        rt.rename_chat(rt.chat, name)
        self._say_current(rt.chat)

    def delete(self, rest: str) -> None:
        name = unquoted(required(rest, "%chat delete NAME"))
        runtime().delete_chat(name)
        print_text(f"{name} is deleted.")

    def save(self, rest: str) -> None:
        from kani_nb.conversation.formats import write

        parser = _file_parser("%chat save")
        parser.add_argument("--overwrite", action="store_true")
        args = parser.parse_line(required(rest, "%chat save FILE [--format F] [--overwrite]"))
        path = Path(args.file).expanduser()
        conversation = runtime().chat.conversation
        if not args.overwrite:
            _refuse_foreign(path, conversation)
        print_text(f"Saved to {write(conversation, path, args.format)}.")

    def load(self, rest: str) -> None:
        from kani_nb.conversation.formats import read

        args = _file_parser("%chat load").parse_line(required(rest, "%chat load FILE [--format F]"))
        rt = runtime()
        conversation = replace(read(args.file, args.format), notebook=rt.notebook)
        known = {each.id for each in rt.list_chats(everywhere=True)}
        if conversation.id in known | {chat.conversation.id for chat in rt.chats.values()}:
            conversation = conversation.copied()  # what is here may have gone on since it was saved
        taken = {each.name for each in rt.list_chats()} | set(rt.chats)
        name = conversation.name
        number = 2
        while conversation.name in taken:
            conversation = conversation.renamed(f"{name} ({number})")
            number += 1
        self._say_current(rt.adopt_chat(conversation))

    def _say_current(self, session: ChatSession) -> None:
        print_text(f"{session.conversation.name}, {_plural(len(session.turns), 'turn')}.")

    def _say_where(self) -> None:
        """Where conversations are, in notebooks whose path cannot be known: there they are found by name only."""
        rt = runtime()
        if rt.notebook or rt.store is None:
            return
        line = f"This notebook's path is not known: conversations are found by name. They are kept in {rt.store.path}"
        if front_end(self._shell).kind == "colab":
            line += "; to keep them after this runtime, mount a drive and set KANI_NB_HOME to a folder on it"
        print_text(line + ".")


def _show_turn(turn: Turn) -> None:
    from kani_nb.notebook.surface import Surface, SurfaceKind
    from kani_nb.notebook.turn_text import text_of_turn

    bundle = text_of_turn(turn).to_bundle()
    surface = Surface()
    if surface.kind is SurfaceKind.TERMINAL:
        surface.write(bundle["text/plain"] + "\n\n")
        return
    record = {"version": 1, "state": "shown", "model": turn.model, "turn": turn.id, "metrics": turn.metrics}
    surface.show(bundle, {"kani_nb": record}, is_final=True)


def _as_prompt(content: Any) -> Prompt:
    return content if content is not None else ""


def _said(turn: Turn) -> str:
    text = one_line(turn.answer.text if turn.answer is not None else "", _WIDE)
    return f"{text} [interrupted]" if turn.interrupted else text


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _when(seconds_: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds_))


def _place(summary: Any, everywhere: bool) -> Sequence[str]:
    return (summary.notebook or "(not known)",) if everywhere else ()


def _file_parser(prog: str) -> LineParser:
    parser = LineParser(prog=prog, add_help=False)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--format")
    return parser


def _refuse_foreign(path: Path, conversation: Conversation) -> None:
    """Refuse to write over anything but an earlier export of `conversation`; notebooks are what is being worked in.

    Raises:
        ConversationError: it would.
    """
    from kani_nb.conversation.formats import holds

    fix = "choose another name, or add --overwrite"
    if path.suffix.lower() == ".ipynb":
        raise ConversationError(f"{path} is a notebook's name", why="a conversation is no notebook", fix=fix)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        is_its_own = holds(path, conversation)
    except ConversationError:
        raise ConversationError(f"{path} is there already", why="it is no conversation", fix=fix) from None
    if not is_its_own:
        raise ConversationError(
            f"{path} is there already", why=f"it holds another conversation than {conversation.name!r}", fix=fix
        )


_OPTION = re.compile(r"""--[^\s=]*(=?)(?:[^\s"']|"[^"]*"|'[^']*')*""")
_VALUE = re.compile(r"""\s+(?:[^\s"']|"[^"]*"|'[^']*')+""")


def _leading_options(text: str) -> tuple[str, str]:
    """The options that `text` begins with, and the text behind them as it was typed; `--` ends the options."""
    switches = {
        f"--{no}{option.flag[2:]}" for option in GENERATION_OPTIONS if option.type is bool for no in ("", "no-")
    }
    at = 0
    while (option := _OPTION.match(text, at)) is not None:
        if option[0] == "--":
            return text[:at], text[option.end() :].strip()
        at = option.end()
        value = None if option[1] or option[0] in switches else _VALUE.match(text, at)
        at = value.end() if value is not None else at
        at += len(text[at:]) - len(text[at:].lstrip())
    return text[:at], text[at:].strip()
