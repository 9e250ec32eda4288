"""What can be completed after each magic: options, verbs, and the names of models, engines and conversations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kani_nb._runtime import runtime
from kani_nb.conversation.tools import Approval
from kani_nb.errors import KaniNbError
from kani_nb.functions import AIFunction
from kani_nb.notebook.completion import GENERATION_FLAGS, LOAD_FLAGS, Grammar, no_names
from kani_nb.notebook.verbs import VerbTable


def grammars(
    chat: VerbTable, engine: VerbTable, kani: VerbTable, namespace: Callable[[], Mapping[str, Any]] = dict
) -> dict[str, Grammar]:
    """The grammar of every magic's line; `namespace` gives the names of the notebook."""

    def functions() -> Sequence[str]:
        return sorted(name for name, value in namespace().items() if _is_own(name) and _may_be_tool(value))

    def types() -> Sequence[str]:
        return sorted(name for name, value in namespace().items() if _is_own(name) and isinstance(value, type))

    tool_flags = {"--approve": lambda: list(Approval), "--max-steps": no_names}
    bare = dict.fromkeys(
        ("--append", "--attach", "-a", "--into", "--quiet", "--system", "--logprobs", "--help"), no_names
    )
    turn_verbs = dict.fromkeys(("retry", "edit"), turns)
    chat_flags = {**GENERATION_FLAGS, **bare, "--engine": engines, "--to": conversations, "--tools": functions}
    chat_flags |= {"--schema": types, **tool_flags}
    return {
        "%load_engine": Grammar({**LOAD_FLAGS, "--as": no_names, "--help": no_names}, first=models, first_is_file=True),
        "%unload_engine": Grammar(first=engines),
        "%%chat": Grammar(chat_flags, file_flags=("--attach", "-a"), list_flags=("--tools",)),
        "%chat": Grammar(
            {
                **GENERATION_FLAGS,
                **tool_flags,
                "--clear": no_names,
                "--all": no_names,
                "--overwrite": no_names,
                "--format": lambda: FORMATS,
            },
            first=lambda: chat.names,
            after={
                **dict.fromkeys(("open", "delete", "resume"), conversations),
                "switch": branches,
                "tools": functions,
                **turn_verbs,
            },
            files_after=("save", "load"),
        ),
        "%engine": Grammar(first=lambda: engine.names, after={"use": engines, "prefetch": models}),
        "%kani": Grammar(first=lambda: kani.names),
    }


def _is_own(name: str) -> bool:
    """Whether the person gave something this name, and not IPython."""
    return not name.startswith("_") and name not in ("In", "Out", "exit", "quit", "open", "get_ipython")


def _may_be_tool(value: Any) -> bool:
    return isinstance(value, AIFunction) or inspect.isfunction(value)


FORMATS = ("json", "openai", "sharegpt", "markdown")


def models() -> Sequence[str]:
    """Aliases, models on this disk, engines of one's own, and `echo`."""
    from kani_nb.engines.hub import cached_models
    from kani_nb.engines.sources_aliases import ALIASES

    cached = [each.name for each in cached_models()]
    return sorted({*ALIASES, *cached, *runtime().engines, "echo"})


def engines() -> Sequence[str]:
    """The engines that are loaded."""
    return sorted(runtime().engines)


def branches() -> Sequence[str]:
    """The numbers of the current conversation's branches."""
    chat = runtime().current_chat
    return [] if chat is None else [str(number + 1) for number in range(len(chat.conversation.branches()))]


def turns() -> Sequence[str]:
    """The numbers of the current branch's turns."""
    chat = runtime().current_chat
    return [] if chat is None else [str(number + 1) for number in range(len(chat.turns))]


def conversations() -> Sequence[str]:
    """The conversations of this notebook."""
    rt = runtime()
    try:
        saved = [each.name for each in rt.list_chats()]
    except KaniNbError:  # a store that cannot be read is told by the verb that needs it
        saved = []
    return sorted({*rt.chats, *saved})
