"""Functions and types by the names that they have in the notebook: `%%chat --tools f,g --schema T`, `%chat tools`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kani_nb._runtime import runtime
from kani_nb.conversation.structured import Structure
from kani_nb.conversation.tools import Approval, Tools
from kani_nb.errors import ConfigError, did_you_mean
from kani_nb.functions import AIFunction, as_ai_function
from kani_nb.notebook.tables import one_line, print_text, text_table
from kani_nb.notebook.verbs import Verb
from kani_nb.options import LineParser

if TYPE_CHECKING:
    import argparse

_EXAMPLE = "def f(city: str) -> str: ... in a cell above, then %%chat --tools f"


def add_tool_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--approve` and `--max-steps`."""
    parser.add_argument(
        "--approve",
        choices=[each.value for each in Approval],
        metavar="WHEN",
        help="may functions run that are not marked read-only: always, ask (the default) or never",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="rounds of calls before the model must answer")


def tools_named(names: str, namespace: Mapping[str, Any], approve: str | None, max_steps: int | None) -> Tools:
    """The functions of these names, separated by commas; a name may stand for a list of functions too.

    Raises:
        ConfigError: a name that is not there, with the near misses, or what is no function.
    """
    found: list[AIFunction] = []

    def look_up() -> Tools:
        return tools_named(names, namespace, approve, max_steps)

    for name in filter(None, (each.strip() for each in names.split(","))):
        value = _look_up(name, namespace)
        for each in value if isinstance(value, list | tuple) else (value,):
            try:
                found.append(as_ai_function(each))
            except ConfigError as error:
                raise ConfigError(f"--tools {name}: {error.what}", why=error.why, fix=error.fix) from None
    if not found:
        raise ConfigError("--tools names no function", fix=_EXAMPLE)
    options = {"approve": approve, "max_steps": max_steps, "look_up": look_up}
    return Tools(tuple(found), **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]


def type_named(name: str, namespace: Mapping[str, Any]) -> Structure:
    """The type of this name (or expression, as `list[int]`), for answers.

    Raises:
        ConfigError: there is none, or pydantic cannot describe it.
    """
    example = "class Answer(pydantic.BaseModel): ... in a cell above, then %%chat --schema Answer --into answer"
    if name.replace(".", "").isidentifier() and not hasattr(builtins, name):
        return Structure(_look_up(name, namespace, "type", example))
    try:
        return Structure(eval(name, dict(namespace)))  # noqa: S307 - the person's own code, as in any cell
    except (SyntaxError, NameError, AttributeError, TypeError, KeyError) as error:
        fix = f"quote all of it: --schema {name!r}" if "Literal" in name else example
        raise ConfigError(f"--schema {name!r} is no type", why=str(error), fix=fix) from None


def _look_up(name: str, namespace: Mapping[str, Any], kind: str = "function", example: str = _EXAMPLE) -> Any:
    first, *rest = name.split(".")
    if first not in namespace and kind == "function" and callable(getattr(builtins, first, None)):
        fix = "wrap it in a function of your own, and name that"
        raise ConfigError(f"{name} is Python's own", why="it has no type hints", fix=fix)
    if first not in namespace:
        fits = callable if kind == "function" else _is_type
        callables = [key for key, value in namespace.items() if fits(value) and not key.startswith("_")]
        raise ConfigError(f"there is no {kind} {name!r}", fix=did_you_mean(first, callables) or example)
    value = namespace[first]
    for attribute in rest:
        try:
            value = getattr(value, attribute)
        except AttributeError:
            raise ConfigError(f"there is no {kind} {name!r}", why=f"{first} has no {attribute!r}") from None
    return value


def _is_type(value: Any) -> bool:
    return isinstance(value, type)


def tools_verb(shell: Any) -> Verb:
    """`%chat tools`: what the model may call in every turn of this conversation."""

    def run(rest: str) -> None:
        parser = _parser()
        args = parser.parse_line(rest)
        chat = runtime().chat
        if args.clear:
            chat.tools = None
        elif args.names:
            chat.tools = tools_named(",".join(args.names), shell.user_ns, args.approve, args.max_steps)
        elif chat.tools is not None and (args.approve is not None or args.max_steps is not None):
            approve, steps = args.approve or chat.tools.approve, args.max_steps or chat.tools.max_steps
            chat.tools = replace(chat.tools, approve=Approval(approve), max_steps=steps, look_up=None)
        _show(chat.tools, chat.conversation.name)

    usage = "tools [F,G ...] [--approve WHEN] [--max-steps N] [--clear]"
    return Verb(usage, "what the model may call from now on", run, True)


def _parser() -> LineParser:
    parser = LineParser(prog="%chat tools", add_help=False)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--clear", action="store_true")
    add_tool_options(parser)
    return parser


def _show(tools: Tools | None, conversation: str) -> None:
    if tools is None:
        print_text(f"{conversation}: the model may call nothing. {_EXAMPLE}")
        return
    rows: Sequence[tuple[str, str, str]] = [
        (each.name, one_line(each.desc, 60), "runs" if _runs(each, tools) else str(tools.approve))
        for each in tools.functions
    ]
    print_text(text_table(("function", "what it does", "approval"), rows))
    print_text(f"at most {tools.max_steps} rounds of calls; %chat tools --approve always, --max-steps N, --clear")


def _runs(function: AIFunction, tools: Tools) -> bool:
    return function.read_only or tools.approve is Approval.ALWAYS
