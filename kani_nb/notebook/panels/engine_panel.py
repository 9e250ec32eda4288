"""The engine panel: a model, its precision and its place chosen by looking, with a memory plan that follows."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from IPython import get_ipython

from kani_nb._runtime import Runtime, runtime
from kani_nb.config import EngineConfig, parse_config
from kani_nb.errors import ConfigError
from kani_nb.notebook.panels.engine_control import EngineControl
from kani_nb.notebook.panels.engine_form import sections, values_of
from kani_nb.notebook.panels.latest import Latest
from kani_nb.notebook.panels.model_choices import known_choices, list_choices
from kani_nb.notebook.panels.showing import ShownPanel, keep_shown
from kani_nb.notebook.secrets import refuse_secrets
from kani_nb.notebook.theme import style_tag

_STATIC = Path(__file__).parents[2] / "static"


class EnginePanel(anywidget.AnyWidget):
    """Choose, plan, load and unload an engine. Display it, or use it from code.

    The controls are in `values`, which front ends and code set alike; `view` is what follows from them.

    Args:
        config: what the controls say at first: a configuration, a `%load_engine` line, or a model's name.
        rt: whose engines they are; the process's own runtime by default.

    Raises:
        ConfigError: the line cannot be read, or holds a token or a password.

    Attributes:
        values: by the option's name: text, a list of texts, true or false; None is the default.
        view: what is shown, JSON-safe.
    """

    shown: ShownPanel | None = None
    _esm = (_STATIC / "engine_panel.js").read_text(encoding="utf-8")
    values = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    controls = traitlets.Dict().tag(sync=True)

    def __init__(self, config: EngineConfig | str | None = None, *, rt: Runtime | None = None) -> None:
        chosen = config if isinstance(config, EngineConfig) else parse_config(config or "smollm2")
        refuse_secrets(chosen.to_line(), "panel")
        super().__init__(values=values_of(chosen), controls={"sections": sections(), **known_choices()})
        # Sizes of what lies on the disk take their time.
        self._looker = Latest("kani-nb-panel-look")
        self._looker.submit(self._look_around)
        self._control = EngineControl(rt or runtime(), self._show, chosen, get_ipython())
        self.observe(lambda _change: self._take_values(), "values")
        self.on_msg(lambda _widget, content, _buffers: self._do(content))

    @property
    def config(self) -> EngineConfig:
        """What the controls describe.

        Raises:
            ConfigError: one of them cannot be read.
        """
        form = self._control.form
        if form.config is None:
            name, error = next(iter(form.errors.items()))
            raise ConfigError(f"the panel's {name} cannot be used: {error}")
        return form.config

    @config.setter
    def config(self, config: EngineConfig) -> None:
        """Set every control."""
        self.values = values_of(config)

    @property
    def line(self) -> str:
        """The `%load_engine` line that does the same.

        Raises:
            ConfigError: a control cannot be read.
        """
        return self.config.to_line()

    def wait(self, timeout_s: float = 30.0) -> bool:
        """Block until the plan is that of the controls; whether that came in time."""
        return self._control.wait(timeout_s)

    def load(self) -> bool:
        """Begin to load what the controls say; False where they cannot be read or something runs already."""
        return self._control.load()

    def unload(self, name: str) -> bool:
        """Begin to free the engine of that name; False where something runs already."""
        return self._control.unload(name)

    def cancel(self) -> bool:
        """Give up the load that runs; False where none does."""
        return self._control.cancel()

    def close(self) -> None:
        """Take the panel away; what it loaded stays."""
        self._looker.close()
        self._control.close()
        super().close()

    def _take_values(self) -> None:
        self._control.set_values(self.values)
        self.values = self._control.values  # without what may not stay

    def _look_around(self) -> None:
        self.controls = {"sections": sections(), **list_choices()}

    def _show(self, view: dict[str, Any]) -> None:
        self.view = view

    def _do(self, content: Any) -> None:
        """A button was pressed."""
        if not isinstance(content, dict):
            return
        kind, answer = content.get("kind"), {"kind": "done", "id": content.get("id")}
        if kind == "load":
            self.load()
        elif kind == "cancel":
            self.cancel()
        elif kind == "unload":
            self.unload(str(content.get("name")))
        elif kind == "refresh":
            self._control.check_again()
        else:
            answer = {**answer, "kind": "error", "why": f"{kind!r} is nothing that the panel does"}
        self.send(answer)


def show_engine_panel(line: str = "") -> EnginePanel:
    """Put a panel into the running cell, its controls as a `%load_engine` line says.

    Raises:
        ConfigError: an option or a value of the line cannot be used.
    """
    panel = EnginePanel(line.strip() or None)
    panel.shown = ShownPanel(panel, _twin(panel))
    keep_shown("engine panel", panel)
    return panel


def _twin(panel: EnginePanel) -> dict[str, str]:
    """What stands there where the panel does not live."""
    text = f"The engine panel lives while its kernel does: run this cell again to use it.\n{panel.line}"
    first, line = text.split("\n", 1)
    markup = f'<div class="kani-nb"><div class="kani-nb-stat">{escape(first)}</div><code>{escape(line)}</code></div>'
    return {"text/html": style_tag() + markup, "text/plain": text}
