"""The chat pane: a conversation to look at and go on with, in a cell of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from kani_nb._runtime import Runtime, runtime
from kani_nb.conversation.session import ChatSession
from kani_nb.engines.attachments import part_of
from kani_nb.errors import KaniNbError
from kani_nb.notebook.panels.chat_control import ChatControl
from kani_nb.notebook.panels.chat_twin import ChatTwin
from kani_nb.notebook.panels.latest import Latest
from kani_nb.notebook.panels.showing import ShownPanel, keep_shown
from kani_nb.notebook.secrets import error_words
from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.transcript import plain

_STATIC = Path(__file__).parents[2] / "static"
#: The static output follows after so long: a front end draws it anew as a whole, and typesets its formulas.
_TWIN_AFTER_S = 0.5


class ChatPanel(anywidget.AnyWidget):
    """A conversation with everything that `%chat` can do to it. Display it, or use it from code.

    What is shown is in the traits: `history` and `recent` are the turns, `running` the answer on its way, `around` what
    stands around them. Deltas of the running answer come as messages.

    Args:
        session: the conversation at first; the runtime's current one by default.
        rt: whose conversations these are; the process's own runtime by default.
        bus: sees Stop while a cell runs; without one the front end interrupts the kernel.
    """

    shown: ShownPanel | None = None
    _esm = (_STATIC / "chat_pane.js").read_text(encoding="utf-8")
    door = traitlets.Unicode().tag(sync=True)
    history = traitlets.List().tag(sync=True)
    recent = traitlets.List().tag(sync=True)
    running = traitlets.Dict().tag(sync=True)
    around = traitlets.Dict().tag(sync=True)
    problem = traitlets.Dict().tag(sync=True)
    notices = traitlets.List().tag(sync=True)

    def __init__(
        self, session: ChatSession | None = None, *, rt: Runtime | None = None, bus: StopBus | None = None
    ) -> None:
        super().__init__()
        self._is_closed = False
        self._twin, self._twins = ChatTwin(), Latest("kani-nb-pane-twin", pause_s=_TWIN_AFTER_S)
        self._bus = bus
        self._comm_id = str(getattr(self.comm, "comm_id", ""))
        if bus is not None and self._comm_id:
            bus.register(self._comm_id, self._receive)
            self.door = self._comm_id
        self._control = ChatControl(rt or runtime(), self._show, self._send_delta, session)
        self.on_msg(lambda _widget, content, buffers: self._do(content, buffers or ()))

    @property
    def session(self) -> ChatSession:
        """The conversation that is shown."""
        return self._control.session

    @property
    def is_answering(self) -> bool:
        """Whether an answer that was asked for here is on its way."""
        return self._control.is_answering

    def ask(self, text: str) -> None:
        """Send what a person would have written; the answer comes into the pane.

        Raises:
            NoEngineError: none is loaded.
        """
        self._control.ask(text)

    def stop(self) -> bool:
        """End the running answer at its next token; whether there was one."""
        return self._control.stop()

    def close(self) -> None:
        """Take the pane away; the conversation stays."""
        self._is_closed = True
        if self._bus is not None:
            self._bus.unregister(self._comm_id)
        self._control.close()
        self._twins.close()
        super().close()

    def twin(self) -> dict[str, str]:
        """The conversation as a static output."""
        return self._twin.draw(self.session)

    def wait(self, timeout_s: float = 30.0) -> bool:
        """Block until the static output below the pane is that of the conversation; whether that came in time."""
        return self._twins.wait(timeout_s)

    def _show(self, changes: dict[str, Any]) -> None:
        if self._is_closed:
            return
        with self.hold_sync():
            for name, value in changes.items():
                setattr(self, name, value)
        if self.shown is not None and "recent" in changes:
            self._twins.submit(self._update_twin)

    def _update_twin(self) -> None:
        if self.shown is not None:
            self.shown.update(self.twin())

    def _send_delta(self, delta: dict[str, Any]) -> None:
        if not self._is_closed:
            self.send(delta)

    def _receive(self, data: Any) -> None:
        """A message seen on its way, on any thread, while a cell runs: only Stop is acted on."""
        content = data.get("content") if data.get("method") == "custom" else None
        if isinstance(content, dict) and content.get("kind") == "stop":
            self._stop()

    def _stop(self) -> None:
        self._control.stop()
        # Not on the thread that looks at messages: it may not send any.
        self._control.loop.call_soon_threadsafe(self._send_delta, {"kind": "ack"})

    def _do(self, content: Any, buffers: Sequence[Any]) -> None:
        if not isinstance(content, dict):
            return
        if content.get("kind") == "stop":
            self._stop()
            return
        answer: dict[str, Any] = {"kind": "done", "id": content.get("id")}
        try:
            answer |= self._done(content, buffers) or {}
        except KaniNbError as error:
            answer |= {"kind": "error", "why": plain(str(error))}
        except Exception as error:  # noqa: BLE001 - whatever a page sends, it is answered
            answer |= {"kind": "error", "why": plain(f"a message of the pane could not be read: {error_words(error)}")}
        self.send(answer)

    def _done(self, content: dict[str, Any], buffers: Sequence[Any]) -> dict[str, Any] | None:
        control, kind = self._control, content.get("kind")
        if kind == "send":
            files = zip(content.get("files", ()), buffers, strict=True)
            parts = tuple(part_of(bytes(each), str(file["name"]), declared=str(file["mime"])) for file, each in files)
            control.ask(str(content["text"]), parts)
        elif kind == "retry":
            control.retry(str(content["turn"]))
        elif kind == "edit":
            control.edit(str(content["turn"]), str(content["text"]))
        elif kind == "answer":
            control.answer(str(content["question"]), str(content["text"]))
        elif kind == "switch":
            control.switch(str(content["turn"]))
        elif kind == "system":
            control.set_system(str(content["text"]))
        elif kind == "params":
            control.set_params(dict(content["params"]))
        elif kind == "new":
            control.new()
        elif kind == "open":
            control.open(str(content["name"]))
        elif kind == "rename":
            control.rename(str(content["name"]))
        elif kind == "list":
            return {"chats": control.list(str(content.get("query", "")))}
        else:
            raise ValueError(f"{kind!r} is nothing that the pane does")
        return None


def show_chat_panel(bus: StopBus | None = None) -> ChatPanel:
    """Put a pane of the current conversation into the running cell."""
    panel = ChatPanel(bus=bus)
    panel.shown = ShownPanel(panel, panel.twin())
    keep_shown("chat panel", panel)
    return panel
