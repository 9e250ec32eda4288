"""`kani-nb`: what can be done without a notebook - try the quickstart, fetch a model, look at the machine, chat.

Parses, calls, and turns expected errors into one paragraph and exit code 1 (2 for a wrong command line). What they do
stands in the modules they call.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import kani_nb
from kani_nb.config import LOAD_OPTIONS
from kani_nb.errors import ConfigError, KaniNbError

#: What a shell shows for a process that an interrupt ended.
_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets `run`."""
    parser = argparse.ArgumentParser(
        prog="kani-nb", description="Chat with language models you run yourself, and see what it costs."
    )
    parser.add_argument("--version", action="version", version=f"kani-nb {kani_nb.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    quickstart = commands.add_parser("quickstart", help="run the first notebook here, and show what it says")
    quickstart.set_defaults(run=_quickstart)

    prefetch = commands.add_parser("prefetch", help="download a model, so that loading it needs no network")
    prefetch.add_argument("model", help="alias (smollm2) or org/model")
    prefetch.add_argument("--revision", help="branch, tag or commit of the repository")
    prefetch.set_defaults(run=_prefetch)

    doctor = commands.add_parser(
        "doctor", help="what is installed, seen and decided here, and what to do about problems"
    )
    doctor.add_argument("--json", action="store_true", help="end with the same as one line of JSON")
    doctor.set_defaults(run=_doctor)

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
    parser = build_parser()
    args = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except ConfigError as error:
        print(f"kani-nb: {error}", file=sys.stderr)
        return 2
    except KaniNbError as error:
        print(f"kani-nb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kani-nb: interrupted", file=sys.stderr)
        return _INTERRUPTED


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


def _doctor(args: argparse.Namespace) -> int:
    from kani_nb.doctor import report

    found = report()
    print(found.to_text())
    if args.json:
        print(json.dumps(found.to_dict()))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from kani_nb.serve.terminal import TerminalChat

    return TerminalChat.from_args(vars(args)).run(args.prompt)


if __name__ == "__main__":
    sys.exit(main())
