"""`kani-nb`: what can be done without a notebook - try the quickstart, fetch a model, look at the machine, chat.

Parses, calls, and turns expected errors into one paragraph and exit code 1 (2 for a wrong command line). What they do
stands in the modules they call.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import kani_nb
from kani_nb._arguments import in_plain_words
from kani_nb._secrets import holds_secret, without_secrets
from kani_nb.compare import add_arguments
from kani_nb.errors import ConfigError, KaniNbError, did_you_mean
from kani_nb.options import LOAD_OPTIONS
from kani_nb.planning import add_plan_options
from kani_nb.serve.shell_words import for_shell

#: What a shell shows for a process that an interrupt ended.
_INTERRUPTED = 130
#: And for one whose output nobody reads any more.
_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """Refuses in plain words, and offers what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Say it, and end with 2."""
        super().error(in_plain_words(message))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it; an option that is not known is answered with its near misses."""
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            parser = self._of_command(getattr(found, "command", None))
            flag = next((word.split("=", 1)[0] for word in extra if word.startswith("-")), "")
            flags = [each for action in parser._actions for each in action.option_strings if each.startswith("--")]
            guess = did_you_mean(flag, flags) if flag else ""
            if flag:
                parser.error(f"unknown option {flag!r}; {guess or f'{parser.prog} --help lists them'}")
            parser.error(f"{' '.join(extra)!r} cannot stand here; quote a text of several words")
        return found

    def _of_command(self, command: str | None) -> argparse.ArgumentParser:
        choices = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        found: argparse.ArgumentParser = choices[0][command] if choices and command in choices[0] else self
        return found


_NO_SECRETS = (
    "a token does not belong on a command line: it stays in the shell's history, and other users can see it\n"
    "→ set HF_TOKEN in the environment, or KANI_NB_API_KEY for a server of your own"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets `run`."""
    parser = _Parser(prog="kani-nb", description="Chat with language models you run yourself, and see what it costs.")
    parser.add_argument("--version", action="version", version=f"kani-nb {kani_nb.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    quickstart = commands.add_parser("quickstart", help="run the first notebook here, and show what it says")
    quickstart.set_defaults(run=_quickstart)

    prefetch = commands.add_parser("prefetch", help="download a model, so that loading it needs no network")
    prefetch.add_argument("model", help="alias (smollm2) or org/model")
    prefetch.add_argument("--revision", help="branch, tag or commit of the repository")
    prefetch.set_defaults(run=_prefetch)

    plan = commands.add_parser("plan", help="what a model would take under each scheme, before it is downloaded")
    plan.add_argument("model", help="alias (smollm2), org/model, folder or FILE.gguf")
    add_plan_options(plan)
    plan.add_argument("--json", action="store_true", help="end with the same as one line of JSON")
    plan.set_defaults(run=_plan)

    convert = commands.add_parser("convert-gptq", help="make an old GPTQ file (llama7b-4bit-128g.pt) a model's folder")
    convert.add_argument("file", help="the checkpoint: FILE.pt or FILE.safetensors")
    convert.add_argument(
        "--model", metavar="FOLDER", required=True, help="the model it was made from: config.json and tokenizer"
    )
    convert.add_argument("--out", metavar="FOLDER", required=True, help="where to write; new or empty")
    convert.add_argument("--group-size", type=int, default=128, metavar="N", help="as it was made; -1 for no groups")
    convert.add_argument("--bits", type=int, default=4, metavar="N", help="of each weight (default: 4)")
    convert.set_defaults(run=_convert_gptq)

    doctor = commands.add_parser(
        "doctor", help="what is installed, seen and decided here, and what to do about problems"
    )
    doctor.add_argument("--json", action="store_true", help="end with the same as one line of JSON")
    doctor.set_defaults(run=_doctor)

    engines = commands.add_parser("engines", help="the engines that there are, as a Markdown table")
    engines.set_defaults(run=_engines)

    compare = commands.add_parser("compare", help="measure a model's memory, speed and quality under several schemes")
    compare.add_argument("model", help="alias (smollm2), org/model or a folder")
    add_arguments(compare)
    compare.add_argument("--json", action="store_true", help="end with the same as one line of JSON")
    compare.set_defaults(run=_compare)

    chat = commands.add_parser("chat", help="chat in this terminal; Ctrl-C ends an answer, Ctrl-D the chat")
    chat.add_argument("model", nargs="?", default="smollm2", help="as in %%load_engine (default: smollm2)")
    chat.add_argument("-p", "--prompt", help="ask only this, and exit")
    chat.add_argument("--system", metavar="TEXT", help="the system prompt")
    for option in LOAD_OPTIONS:
        option.add_to(chat)
    chat.set_defaults(run=_chat)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (those of the process by default) name, and return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if holds_secret(" ".join(words)):
        print(f"kani-nb: {_NO_SECRETS}", file=sys.stderr)
        return 2
    try:
        args = build_parser().parse_args(words)
        run: Callable[[argparse.Namespace], int] = args.run
        code = run(args)
        sys.stdout.flush()
    except KaniNbError as error:
        print(f"kani-nb: {for_shell(without_secrets(str(error)))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:
        # Python flushes once more at its end, and would then tell of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print("kani-nb: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _quickstart(_args: argparse.Namespace) -> int:
    from kani_nb.serve.quickstart import run_quickstart

    run_quickstart()
    return 0


def _prefetch(args: argparse.Namespace) -> int:
    from kani_nb.engines.sources import prefetch
    from kani_nb.serve.terminal import ProgressLine

    with ProgressLine() as line:
        source = prefetch(args.model, line.progress, revision=args.revision)
    print(f"{args.model} is on this disk: {source.origin}, {source.size_bytes / 2**20:,.0f} MiB, in {source.folder}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from kani_nb.plan_text import plan_text
    from kani_nb.planning import plan_model, request_from_args
    from kani_nb.serve.terminal import ProgressLine, harmless

    request = request_from_args(vars(args))
    with ProgressLine() as line:
        plan = plan_model(**request.arguments, progress=line.progress)
    print(harmless(for_shell(plan_text(plan))))
    if args.json:
        print(json.dumps(plan.to_dict()))
    return 0


def _convert_gptq(args: argparse.Namespace) -> int:
    from kani_nb.engines.gptq_checkpoint import convert_gptq_checkpoint
    from kani_nb.hardware.gptq_check import needs_of

    made = convert_gptq_checkpoint(args.file, args.model, args.out, args.group_size, args.bits)
    print(f"{made.folder} is a model of {made.bits}-bit weights, {made.weight_bytes / 2**20:,.0f} MiB")
    for note in (made.note, str(needs_of("gptq") or "")):
        if note:
            print(note)
    print(f"in a notebook: %load_engine {shlex.quote(str(made.folder))}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from kani_nb.doctor import report

    found = report()
    print(for_shell(found.to_text()))
    if args.json:
        print(json.dumps(found.to_dict()))
    return 0


def _engines(_args: argparse.Namespace) -> int:
    from kani_nb.engines.kinds import markdown_table

    print(markdown_table())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from kani_nb.serve.terminal_compare import run_compare

    found = run_compare(vars(args))
    if args.json:
        print(json.dumps(found.to_dict()))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from kani_nb.serve.terminal import TerminalChat

    return TerminalChat.from_args(vars(args)).run(args.prompt)


if __name__ == "__main__":
    sys.exit(main())
