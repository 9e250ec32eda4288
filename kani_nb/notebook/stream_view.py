"""The output of one `%%chat` cell while it is being answered, and what it is when it is done.

One display of safe HTML and plain text, updated in place from the main thread at a rate that the answer's size and
the cost of drawing it allow; its last frame is exact, and is what the notebook saves. In a terminal the text is
printed as it comes. Never `clear_output` (it flickers), never `text/markdown` (front ends do not sanitise it).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kani_nb.conversation.structured import AnswerRejected
from kani_nb.conversation.tools import ToolStep
from kani_nb.engines.base import BaseCompletion
from kani_nb.messages import MessagePart
from kani_nb.notebook.render import GrowingMarkdown, markdown_to_html
from kani_nb.notebook.round_so_far import RoundSoFar
from kani_nb.notebook.stat_line import stat_line
from kani_nb.notebook.surface import Surface, SurfaceKind
from kani_nb.notebook.thumbnails import prompt_html
from kani_nb.notebook.token_shades import tokens_html
from kani_nb.notebook.transcript import TurnText, prompt_text, shortened, step_texts

if TYPE_CHECKING:
    from kani_nb.figures.bundle import FigureBundle
    from kani_nb.notebook.strip import LiveStrip

#: What a running answer may send: far below the 1 MB/s from which a Jupyter server drops messages, browsers in mind.
_BYTES_PER_S = 40_000
_FASTEST_S = 1 / 10
_SLOWEST_S = 1 / 1.5
#: Drawing shares the interpreter with the generation: it gets at most one part in this many.
_COST_SHARE = 50
_LONGEST_PROMPT_IN_FRAMES = 2_000
_UNFINISHED = "not finished; this turn was not added to the conversation"
_KEPT = "not finished; the answer so far is kept in the conversation"


class StreamView:
    """One turn on the screen. The display opens at once; `pump` and `finish` belong to the main thread.

    Args:
        prompt: the user's words, or parts with media.
        model: who answers, as a heading.
        display: as `IPython.display.display`; by default the running shell decides.
        clock: seconds that only grow.
        strip: shown below the answer while it runs, and closed with it.
        figure: what to show below a finished answer; it takes the strip's place.
        is_prompt_above: the prompt can be read in the cell itself, so a front end that shows cells need not repeat it.
    """

    def __init__(
        self,
        prompt: str | Sequence[MessagePart | str],
        *,
        model: str = "",
        display: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        strip: LiveStrip | None = None,
        figure: Callable[[], FigureBundle | None] | None = None,
        is_prompt_above: bool = False,
        kind: SurfaceKind | None = None,
    ) -> None:
        self._parts = prompt
        self._prompt = prompt_text(prompt)
        self._figure = figure
        self._is_prompt_above = is_prompt_above
        self._model = model or "Assistant"
        self._clock = clock
        self._strip = strip
        self._surface = Surface(kind, display)
        self._arrived: deque[Any] = deque()
        self._so_far = RoundSoFar(clock)
        self._reply: Any = None
        self._growing = GrowingMarkdown()
        self._printed = 0
        self._drawn: tuple[object, ...] | None = None
        self._next_at = 0.0
        self._is_finished = False
        if self._surface.is_live:
            self._draw()
            if strip is not None:
                strip.open()

    def feed(self, event: Any) -> None:
        """Take one event of `ChatSession.stream`. Safe from any thread; it is looked at in the next `pump`."""
        self._arrived.append(event)

    def pump(self) -> None:
        """Show what has arrived, if it is time to. To be called about every 30 ms; costs next to nothing when idle."""
        if self._is_finished:
            return
        self._take_arrived()
        if self._surface.kind is SurfaceKind.TERMINAL:
            self._print_new()
            return
        if not self._surface.is_live:
            return
        if self._strip is not None:
            self._strip.update(self._status() or "answering", self._so_far.tokens, self._so_far.first_at)
        if self._clock() >= self._next_at and self._drawn != self._state():
            self._draw()

    def finish(self, reply: Any = None, error: BaseException | None = None) -> None:
        """Draw the last frame: the whole answer of `reply`, or what came before `error`. Safe to call twice.

        Args:
            reply: the `ChatReply`; without one, that which was fed, or else the text so far.
            error: why there is none, or only the part that it carries; the cell that raises it says so itself.
        """
        if self._is_finished:
            return
        self._take_arrived()
        self._is_finished = True
        kept = getattr(error, "reply", None)
        self._reply = reply = next((each for each in (reply, self._reply, kept) if each is not None), None)
        metrics = getattr(reply, "metrics", None)
        text = self.text if reply is None else reply.text
        notices = self._so_far.notes if reply is None else [str(each) for each in reply.notices]
        stat = "" if metrics is None else stat_line(metrics)
        # What went wrong is said by the cell's own error, below.
        error_text = "" if error is None else _UNFINISHED if kept is None else _KEPT
        if self._surface.kind is SurfaceKind.TERMINAL:
            self._print_new()
            lines = [f"[{each}]\n" for each in (*notices, error_text, stat) if each]
            self._surface.write("".join(["\n" * bool(self._printed), *lines]))
            return
        turn = TurnText(
            # A prompt that was refused stands in the cell; a saved notebook need not hold it again, however long it is.
            prompt=self._prompt if error is None else shortened(self._prompt, _LONGEST_PROMPT_IN_FRAMES),
            prompt_html=prompt_html(self._parts) if error is None else "",
            answer=text,
            answer_html=markdown_to_html(text),
            model=self._model,
            reasoning="".join(self._so_far.reasoning),
            steps=self._so_far.steps if reply is None else step_texts(reply.turn.messages),
            notes=notices,
            error=error_text,
            stat=stat,
            tokens_html=tokens_html(getattr(reply, "logprobs", ())),
            is_prompt_above=self._is_prompt_above,
        )
        figure = self._figure() if self._figure is not None and reply is not None and error is None else None
        # Who ended the answer wants to go on at once.
        is_cut = metrics is not None and metrics.finish_reason in ("cancelled", "interrupted")
        below = None if figure is None else figure.still if is_cut else figure.data
        strip = self._strip if self._strip is not None and self._strip.is_open else None
        if strip is not None and below is None:
            # An output without content would leave a gap: the numbers take the place of the strip.
            below = turn.end_bundle()
            turn = replace(turn, error="", stat="")
        self._surface.show(turn.to_bundle(), self._metadata("error" if error else "done"), is_final=True)
        if strip is not None:
            strip.close(below)
        elif below is not None:
            self._surface.show_below(below)

    @property
    def text(self) -> str:
        """The answer's text so far, as far as `pump` has seen it."""
        return self._so_far.text

    def _take_arrived(self) -> None:
        while self._arrived:
            self._take(self._arrived.popleft())

    def _take(self, event: Any) -> None:
        ends_text = isinstance(event, (ToolStep, AnswerRejected))
        if ends_text and self._surface.kind is SurfaceKind.TERMINAL:
            self._print_new()
        is_progress = self._so_far.take(event)
        if ends_text:
            self._begin_again(self._so_far.notes[-1] if isinstance(event, AnswerRejected) else self._so_far.ended.line)
        elif not is_progress and not isinstance(event, BaseCompletion):
            self._reply = event

    def _begin_again(self, why: str) -> None:
        """What was said before belonged to a call, or was no answer."""
        self._growing = GrowingMarkdown()
        if self._surface.kind is SurfaceKind.TERMINAL:
            self._surface.write("\n" * bool(self._printed) + f"[{why}]\n")
        self._printed = 0

    def _status(self) -> str:
        """What is happening before the first text, in words."""
        return self._so_far.status(waited_s=int(self._clock() - self._so_far.started_at))

    def _state(self) -> tuple[object, ...]:
        """Changes whenever a frame would."""
        so_far = self._so_far
        return (len(so_far.pieces), len(so_far.reasoning), so_far.stage, self._status())

    def _draw(self) -> None:
        started = self._clock()
        text = self.text
        prefill = self._so_far.prefill
        is_reading = prefill is not None and not text and prefill.total_tokens > 0
        turn = TurnText(
            prompt=shortened(self._prompt, _LONGEST_PROMPT_IN_FRAMES),
            answer=text,
            answer_html=self._growing.render(text),
            model=self._model,
            reasoning="".join(self._so_far.reasoning),
            status=self._status(),
            progress=min(1.0, prefill.done_tokens / prefill.total_tokens) if prefill and is_reading else None,
            steps=self._so_far.steps,
            notes=tuple(self._so_far.notes),
            is_prompt_above=self._is_prompt_above,
        )
        bundle = turn.to_bundle(is_running=True)
        self._surface.show(bundle, self._metadata("running"))
        self._drawn = self._state()
        ended = self._clock()
        weight = sum(len(each.encode("utf-8", "replace")) for each in bundle.values())
        wanted = max(weight / _BYTES_PER_S, (ended - started) * _COST_SHARE)
        self._next_at = ended + min(max(wanted, _FASTEST_S), _SLOWEST_S)

    def _metadata(self, state: str) -> dict[str, Any]:
        record: dict[str, Any] = {"version": 1, "state": state, "model": self._model}
        if self._reply is not None and state != "running":
            turn = getattr(self._reply, "turn", None)
            record["turn"] = getattr(turn, "id", None)
            record["number"] = getattr(self._reply, "number", None)
            record["metrics"] = self._reply.metrics.to_dict()
        return {"kani_nb": record}

    def _print_new(self) -> None:
        text = self.text
        if len(text) > self._printed:
            self._surface.write(text[self._printed :])
            self._printed = len(text)
