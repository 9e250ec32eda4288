"""`%config KaniNB`: the few preferences of the notebook, as traits."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

from traitlets import Bool, Enum, observe
from traitlets.config import Configurable

from kani_nb.errors import MissingDependencyError


class KaniNB(Configurable):
    """Preferences of kani_nb in this notebook."""

    plot = Enum(
        ["always", "ask", "never"],
        default_value="always",
        help="""When memory and latency are drawn: 'always' after each answer, 'ask' only by %engine stats,
        'never' not at all (the numbers stay).""",
    ).tag(config=True)
    nested_run = Bool(
        False,
        help="""Let code in cells call asyncio.run() by patching asyncio with nest-asyncio2. kani_nb itself never needs
        it, and it cannot be undone before the kernel restarts.""",
    ).tag(config=True)

    def __init__(self, **options: Any) -> None:
        self.undo = ExitStack()
        super().__init__(**options)

    @observe("nested_run")
    def _patch_asyncio(self, change: Any) -> None:
        if not change["new"]:
            return
        try:
            patch = importlib.import_module("nest_asyncio2")
        except ImportError:
            raise MissingDependencyError(
                "nested_run needs the package nest-asyncio2", fix="%pip install nest-asyncio2"
            ) from None
        patch.apply()
