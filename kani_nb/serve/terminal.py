"""A chat in a plain terminal, through the same session as a notebook's, and the progress of a download on one line."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._runtime import Runtime, runtime
from kani_nb._waiting import Call, do_nothing
from kani_nb.config import EngineConfig, config_from_args
from kani_nb.conversation.session import ChatReply, Notice
from kani_nb.engines.base import LoadProgress, TextDelta
from kani_nb.serve.shell_words import for_shell

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_PROMPT = "\nYou: "
#: Conversations of terminals are listed apart from those of notebooks whose path is not known.
NOTEBOOK = "(terminal)"


def harmless(text: str) -> str:
    """`text` without what could command a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


class ProgressLine:
    """The latest step of something long: one line that is overwritten, or lines where there is no terminal."""

    def __init__(self) -> None:
        self._is_live = sys.stderr.isatty()
        self._stage = ""

    def progress(self, event: LoadProgress) -> None:
        """Show one step; called on any thread."""
        percent = "" if event.fraction is None else f" {event.fraction:.0%}"
        text = harmless(f"{event.stage}{percent} {event.detail}".rstrip())
        is_new, self._stage = event.stage != self._stage, event.stage
        if self._is_live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        elif is_new:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the line empty."""
        self.clear()

    def clear(self) -> None:
        """Leave the line empty, for what is printed next."""
        if self._is_live and self._stage:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


class TerminalChat:
    """One conversation at a prompt.

    Args:
        config: the engine to load.
        system: the system prompt.
    """

    def __init__(self, config: EngineConfig, system: str | None = None) -> None:
        self._config = config
        self._system = system
        self._runtime: Runtime = runtime()

    @classmethod
    def from_args(cls, given: Mapping[str, Any]) -> Self:
        """From a parsed command line.

        Raises:
            ConfigError: a value outside its range.
        """
        return cls(config_from_args(given), given.get("system"))

    def run(self, prompt: str | None = None) -> int:
        """Load the engine, then answer `prompt`, or whatever is typed until the input ends. Returns the exit code.

        Raises:
            KaniNbError: the engine could not be loaded, or the one prompt not be answered.
            KeyboardInterrupt: pressed while loading, or at the empty prompt.
        """
        with ProgressLine() as line, InterruptGuard() as guard:
            Call(self._runtime.loop, self._runtime.load(self._config, progress=line.progress), guard).result()
        self._runtime.notebook = NOTEBOOK
        self._runtime.new_chat(system=self._system)
        try:
            if prompt is not None:
                self._answer(prompt)
            else:
                self._converse()
        finally:
            self._runtime.close()
        return 0

    def _converse(self) -> None:
        from kani_nb.errors import KaniNbError

        print(f"{self._runtime.engine_name} listens. Ctrl-C ends an answer, Ctrl-D the chat.")
        while True:
            try:
                prompt = input(_PROMPT)
            except EOFError:
                print()
                return
            if not prompt.strip():
                continue
            try:
                self._answer(prompt)
            except Interrupted:
                print("\n[stopped; what was said is kept]")
            except KaniNbError as error:
                print(for_shell(str(error)), file=sys.stderr)

    def _answer(self, prompt: str) -> None:
        """Print one answer as it comes, and its numbers. An interrupt ends it, and what was said is kept."""
        session = self._runtime.chat

        async def consume() -> ChatReply | None:
            reply = None
            async with aclosing(session.stream(prompt)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, ChatReply):
                        reply = event
                    elif isinstance(event, Notice):
                        print(f"[{harmless(event)}]", file=sys.stderr)
                    elif isinstance(event, TextDelta):
                        print(harmless(event), end="", flush=True)
            return reply

        with InterruptGuard() as guard:
            call = Call(self._runtime.loop, consume(), guard, pump=do_nothing, ask_to_end=session.interrupt)
            reply = call.result()
            print()
            if call.was_interrupted:
                raise Interrupted
        if reply is not None:
            metrics = reply.metrics
            speed = "" if metrics.tokens_per_s is None else f", {metrics.tokens_per_s:,.1f} tok/s"
            first = "" if metrics.ttft_s is None else f", first text after {metrics.ttft_s:.2f} s"
            print(f"[{metrics.completion_tokens} tokens{speed}{first}]", file=sys.stderr)
