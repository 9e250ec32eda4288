"""`%%chat`, whose body is the prompt, and `%chat VERB`, which looks after the conversation."""

from __future__ import annotations

import argparse
import keyword
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from kani_nb._interrupts import InterruptGuard
from kani_nb._runtime import Runtime, runtime
from kani_nb.config import split_options
from kani_nb.errors import ConfigError, ConversationBusyError, PromptError, StoreError
from kani_nb.generation_params import GenerationParams
from kani_nb.notebook.chat_cell import OpenStream, is_blank, prompt_of, run_answer
from kani_nb.notebook.chat_tools import add_tool_options, tools_named, type_named
from kani_nb.notebook.chat_verbs import chat_verbs
from kani_nb.notebook.interpolation import interpolate
from kani_nb.notebook.secrets import refuse_secrets
from kani_nb.notebook.settings import KaniNB
from kani_nb.notebook.shell import can_ask, cell_ref, ends_source, front_end
from kani_nb.notebook.short_errors import short_errors
from kani_nb.notebook.stats import figure_of, metrics_of
from kani_nb.notebook.tables import print_text
from kani_nb.options import GENERATION_OPTIONS, LineParser

if TYPE_CHECKING:
    from kani_nb.conversation.session import ChatReply, ChatSession, Prompt
    from kani_nb.figures.bundle import FigureBundle
    from kani_nb.notebook.stop_bus import StopBus
    from kani_nb.notebook.stream_view import StreamView

_EXAMPLES = r"""Examples:
  %%chat                                    the prompt is what stands below, word for word
  What is the capital of {{country}}?       {{expr}} is the value of a Python expression; \{{ is literal

  %%chat --max-new-tokens 50 --temperature 0.7 --seed 1
  %%chat --system "Answer in one word."     from this turn on
  %%chat --to poems                         in the conversation of that name, for this cell
  %%chat --engine second --into reply       by another loaded engine; the answer is in reply.text too
  %%chat --tools weather,convert            the model may call these functions of the notebook
  %%chat -a plot.png -a {{fig}}             files, addresses and the notebook's own pictures before the prompt
  %%chat --schema Recipe --into recipe      the answer as an object of that type

Running the cell again replaces its turn; --append adds another. %chat help lists the verbs.
"""


def chat_parser() -> LineParser:
    """The parser of `%%chat`'s own line."""
    parser = LineParser(
        prog="%%chat",
        usage="%(prog)s [OPTIONS], and the prompt on the lines below",
        add_help=False,
        description="Send the lines below to the model.",
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--append", action="store_true", help="add a turn even if this cell has one")
    parser.add_argument(
        "--attach",
        "-a",
        action="append",
        metavar="FILE|URL|{{expr}}",
        help="an image, sound, video or text that goes with the prompt (may be given again)",
    )
    parser.add_argument("--engine", "--as", dest="engine", metavar="NAME", help="let this loaded engine answer")
    parser.add_argument("--to", metavar="CONVERSATION", help="in this conversation, which is started if there is none")
    parser.add_argument("--system", metavar="TEXT", help="set the conversation's system prompt")
    parser.add_argument("--into", metavar="VARIABLE", help="assign the reply to a variable")
    parser.add_argument("--tools", metavar="F,G", help="functions of this notebook that the model may call")
    add_tool_options(parser)
    parser.add_argument("--schema", metavar="TYPE", help="the answer is an object of this type, which --into gets")
    parser.add_argument(
        "--logprobs",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="each token's probability and N others, in the reply (also runtime().chat.reply)",
    )
    parser.add_argument("--quiet", action="store_true", help="show nothing")
    parser.add_argument("--help", "-h", action="store_true", help="show this")
    for option in GENERATION_OPTIONS:
        option.add_to(parser)
    return parser


@magics_class
class ChatMagics(Magics):
    """The magics about conversations.

    Args:
        shell: the running shell.
        settings: `%config KaniNB`.
        bus: sees the Stop button's clicks while a cell runs.
    """

    def __init__(self, shell: Any, settings: KaniNB, bus: StopBus) -> None:
        super().__init__(shell)
        self._settings = settings
        self._bus = bus
        self.verbs = chat_verbs(shell, self.answer, bus)

    @no_var_expand
    @line_cell_magic
    @short_errors
    def chat(self, line: str, cell: str | None = None) -> None:
        r"""Ask the model (%%chat), or look after the conversation (%chat VERB).

        The lines below %%chat are the prompt, word for word; {{expr}} alone is replaced by the value of a Python
        expression, and \{{ writes two braces. The answer streams below the cell; the stop icon ends it and keeps what
        was said. Running the cell again replaces its turn.

            %%chat --max-new-tokens 50
            What is the capital of {{country}}?

            %chat undo
            %chat history

        %%chat --help lists the options, %chat help the verbs.
        """
        refuse_secrets(line)
        if cell is None:
            with InterruptGuard():
                self.verbs.dispatch(line)
        else:
            self._ask(line, cell)

    def _ask(self, line: str, cell: str) -> None:
        from kani_nb.notebook.attachments import parts_of, with_expressions_quoted

        parser = chat_parser()
        args = parser.parse_line(with_expressions_quoted(line))
        if args.help:
            print_text(parser.format_help() + "\n" + _EXAMPLES)
            return
        _check(args)
        params = split_options(vars(args), "generation")
        if args.logprobs is not None:
            params["logprobs"] = args.logprobs
        GenerationParams.from_kwargs(params)  # a bad value is refused before anything is changed
        rt = runtime()
        rt.need_engine(args.engine)
        prompt = interpolate(prompt_of(cell), self.shell.user_ns)
        if is_blank(prompt) and not args.attach:
            raise PromptError(
                "the prompt is empty", why="nothing stands below %%chat", fix="write what you want to ask"
            )
        if args.attach:
            words = (prompt,) if isinstance(prompt, str) else prompt
            prompt = (*parts_of(args.attach, self.shell.user_ns, rt.loop), *(each for each in words if each))
        tools = None
        if args.tools is not None:
            tools = tools_named(args.tools, self.shell.user_ns, args.approve, args.max_steps)
        schema = type_named(args.schema, self.shell.user_ns) if args.schema is not None else None
        ref = cell_ref(self.shell)
        # Nobody runs a cell again in a terminal: what is typed there twice was meant twice.
        append = args.append or not front_end(self.shell).has_kernel
        with _chosen(rt, args.to, args.engine) as session, _system(session, args.system):
            reply = self.answer(
                session,
                lambda: session.stream(prompt, cell=ref, append=append, tools=tools, schema=schema, **params),
                prompt,
                is_quiet=args.quiet,
            )
        if args.into and schema is not None and reply.value is None:
            print_text(f"{args.into} is not set: the answer was stopped before it was whole")
        elif args.into:
            self.shell.user_ns[args.into] = reply if schema is None else reply.value

    def answer(
        self, session: ChatSession, open_stream: OpenStream, prompt: Prompt, *, is_quiet: bool = False
    ) -> ChatReply:
        """Run one round of `session` in this cell, shown as it comes, and its figure when it is done.

        Raises:
            Interrupted: an interrupt ended it; what was said is kept.
            KaniNbError: it failed, and nothing was kept.
        """
        rt = runtime()

        def make_view() -> StreamView | None:
            return None if is_quiet else self._view(session, prompt, rt.engine_name)

        return run_answer(rt.loop, session, open_stream, make_view, can_ask=can_ask(self.shell))

    def _view(self, session: ChatSession, prompt: Prompt, model: str) -> StreamView:
        from kani_nb.notebook.stream_view import StreamView
        from kani_nb.notebook.strip import LiveStrip, can_show_strip

        strip = LiveStrip(session.stop, self._bus) if can_show_strip(self.shell) else None

        def figure() -> FigureBundle | None:
            return figure_of(self.shell, metrics_of(session)) if self._settings.plot == "always" else None

        is_above = isinstance(prompt, str) and ends_source(self.shell, prompt)
        return StreamView(prompt, model=model, strip=strip, figure=figure, is_prompt_above=is_above)


def _check(args: argparse.Namespace) -> None:
    if args.words:
        raise ConfigError(
            f"{' '.join(args.words)[:60]!r} stands on the line of %%chat",
            why="that line is for options",
            fix=f"--tools {args.tools},{args.words[0]}" if args.tools else "write the prompt on the lines below it",
        )
    if args.into is not None and (not args.into.isidentifier() or keyword.iskeyword(args.into)):
        raise ConfigError(f"--into {args.into!r} is not a variable's name", fix="%%chat --into reply")


@contextmanager
def _chosen(rt: Runtime, conversation: str | None, engine: str | None) -> Iterator[ChatSession]:
    """The conversation to ask, with this engine as the current one; both are for this cell only."""
    engine_before = rt.engine_name
    chat_before = rt.current_chat
    if engine is not None:
        rt.use(engine)
    try:
        if conversation is None:
            yield rt.chat
        else:
            known = {*rt.chats, *(each.name for each in rt.list_chats())}
            yield rt.open_chat(conversation) if conversation in known else rt.new_chat(conversation)
    finally:
        if engine is not None and engine_before in rt.engines:
            rt.use(engine_before)
        if conversation is not None:
            rt.set_chat(chat_before)


@contextmanager
def _system(session: ChatSession, text: str | None) -> Iterator[None]:
    """Another system prompt from here on, if one is given; the former one again where no turn came of it."""
    if text is None:
        yield
        return
    before, turns = session.system, len(session.conversation.turns)
    try:
        session.set_system(text or None)
        yield
    finally:
        if len(session.conversation.turns) == turns:
            # What failed is what the person should read; in memory the former prompt is back in any case.
            with suppress(StoreError, ConversationBusyError):
                session.set_system(before)
