"""`%load_ext kani_nb` and `%unload_ext kani_nb`: put into a shell what belongs there, and take out exactly that.

Loads in milliseconds: no model, and none of the heavy libraries. What is loaded (engines, conversations) belongs to the
process's Runtime, and outlives unloading and reloading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from IPython.core.magic import Magics
from traitlets import TraitError

from kani_nb._runtime import runtime
from kani_nb.notebook.bare_cell import install as install_bare_cell
from kani_nb.notebook.completion import install as install_completion
from kani_nb.notebook.magics_chat import ChatMagics
from kani_nb.notebook.magics_engine import EngineMagics
from kani_nb.notebook.magics_kani import KaniMagics
from kani_nb.notebook.names import grammars
from kani_nb.notebook.settings import KaniNB
from kani_nb.notebook.shell import notebook_path
from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.tables import print_text

_MISSING = object()


def load(shell: Any) -> None:
    """Register the magics, the preferences and the completion in `shell`. A second call does nothing."""
    if _settings_of(shell) is not None:
        return
    settings = _make_settings(shell)
    bus = StopBus(shell)
    chat, engine, kani = ChatMagics(shell, settings, bus), EngineMagics(shell, settings), KaniMagics(shell, bus)
    settings.undo.callback(bus.uninstall)
    settings.undo.callback(lambda: runtime().close_shown())
    settings.undo.callback(_register_magics(shell, (chat, engine, kani)))
    settings.undo.callback(install_bare_cell(shell))
    settings.undo.callback(
        install_completion(shell, grammars(chat.verbs, engine.verbs, kani.verbs, lambda: shell.user_ns))
    )
    shell.configurables.append(settings)
    path = notebook_path(shell)
    if path:
        runtime().notebook = path


def unload(shell: Any) -> None:
    """Take out what `load` put in, and put back what it replaced: panels end, engines and conversations stay."""
    settings = _settings_of(shell)
    if settings is not None:
        shell.configurables.remove(settings)
        settings.undo.close()


def _make_settings(shell: Any) -> KaniNB:
    """The preferences, as configured; the defaults where that has an impossible value.

    IPython keeps a value that `%config` refused, and it must not keep the extension from loading.
    """
    try:
        return KaniNB(parent=shell)
    except TraitError as error:
        print_text(f"kani_nb: the preferences are ignored, since one of them cannot be: {error}")
        return KaniNB()


def _settings_of(shell: Any) -> KaniNB | None:
    return next((each for each in shell.configurables if isinstance(each, KaniNB)), None)


def _register_magics(shell: Any, owners: Sequence[Magics]) -> Callable[[], None]:
    """Register these magics; the result puts back whatever had their names."""
    manager = shell.magics_manager
    tables = [manager.registry, *manager.magics.values()]
    before = [dict(table) for table in tables]
    shell.register_magics(*owners)
    ours = [
        {name: value for name, value in table.items() if old.get(name, _MISSING) is not value}
        for table, old in zip(tables, before, strict=True)
    ]

    def undo() -> None:
        # Magics put themselves there when they are made.
        shell.configurables[:] = [each for each in shell.configurables if not any(each is owner for owner in owners)]
        for table, old, added in zip(tables, before, ours, strict=True):
            for name, value in added.items():
                if table.get(name) is not value:
                    continue  # replaced by somebody since: theirs
                if name in old:
                    table[name] = old[name]
                else:
                    del table[name]

    return undo
