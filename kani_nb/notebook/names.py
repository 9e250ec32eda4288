"""What can be completed after each magic: options, verbs, and the names of models, engines and conversations."""

from __future__ import annotations

from collections.abc import Sequence

from kani_nb._runtime import runtime
from kani_nb.errors import KaniNbError
from kani_nb.notebook.completion import GENERATION_FLAGS, LOAD_FLAGS, Grammar, no_names
from kani_nb.notebook.verbs import VerbTable


def grammars(chat: VerbTable, engine: VerbTable, kani: VerbTable) -> dict[str, Grammar]:
    """The grammar of every magic's line."""
    bare = dict.fromkeys(("--append", "--attach", "-a", "--into", "--quiet", "--system", "--help"), no_names)
    turn_verbs = dict.fromkeys(("retry", "edit"), turns)
    chat_flags = {**GENERATION_FLAGS, **bare, "--engine": engines, "--to": conversations}
    return {
        "%load_engine": Grammar({**LOAD_FLAGS, "--as": no_names, "--help": no_names}, first=models, first_is_file=True),
        "%unload_engine": Grammar(first=engines),
        "%%chat": Grammar(chat_flags, file_flags=("--attach", "-a")),
        "%chat": Grammar(
            {
                **GENERATION_FLAGS,
                "--clear": no_names,
                "--all": no_names,
                "--overwrite": no_names,
                "--format": lambda: FORMATS,
            },
            first=lambda: chat.names,
            after={**dict.fromkeys(("open", "delete", "resume"), conversations), "switch": branches, **turn_verbs},
            files_after=("save", "load"),
        ),
        "%engine": Grammar(first=lambda: engine.names, after={"use": engines, "prefetch": models}),
        "%kani": Grammar(first=lambda: kani.names),
    }


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
