"""What a turn looks like while it runs and when it is done, on each kind of surface."""

from __future__ import annotations

import dataclasses
import json
import threading
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.conversation.tools import ToolStep
from kani_nb.conversation.tree import Turn
from kani_nb.engines.base import Completion, PrefillProgress, ReasoningDelta, TextDelta, ToolCallDelta
from kani_nb.errors import GenerationError
from kani_nb.figures.bundle import FigureBundle
from kani_nb.messages import ChatMessage, FunctionCall, ImagePart, ToolCall
from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.render import markdown_to_html
from kani_nb.notebook.stat_line import stat_line
from kani_nb.notebook.stream_view import StreamView
from kani_nb.notebook.surface import SurfaceKind
from tests.notebook_view.screen import Clock, Screen


class Notice(str):
    __slots__ = ()


@dataclass
class Reply:
    text: str
    metrics: GenerationMetrics
    turn: Turn = field(default_factory=lambda: Turn("t1", None, ()))
    number: int = 1
    notices: tuple[str, ...] = ()


METRICS = GenerationMetrics("smollm2", completion_tokens=3, tokens_per_s=30.0, finish_reason="stop")


def view_on(screen, clock, prompt="hi", **options):
    return StreamView(prompt, model="smollm2", display=screen, clock=clock, **options)


def test_the_display_opens_at_once_and_is_updated_in_place(screen, clock):
    view = view_on(screen, clock)
    assert (screen.opened, len(screen.frames)) == (1, 1)
    assert "waiting for the engine" in screen.last["text/plain"]
    view.feed(TextDelta("Hello **you**"))
    clock.now += 0.2
    view.pump()
    view.finish(Reply("Hello **you**", METRICS))
    assert (screen.opened, len(screen.frames)) == (1, 3)


def test_the_last_frame_is_exact(screen, clock):
    view = view_on(screen, clock, "What is <b>?")
    answer = "It is **bold**\n\n```python\nx = 1\n```"
    view.feed(TextDelta(answer[:5]))
    view.finish(Reply(answer, METRICS, notices=("dropped 2 turns",)))
    bundle, metadata = screen.frames[-1][1:]
    assert set(bundle) == {"text/html", "text/plain"}
    assert markdown_to_html(answer) in bundle["text/html"]
    assert "What is &lt;b&gt;?" in bundle["text/html"]
    assert 'aria-busy="false"' in bundle["text/html"]
    for words in ("What is <b>?", answer, "dropped 2 turns", stat_line(METRICS)):
        assert words in bundle["text/plain"]
    record = metadata["kani_nb"]
    assert (record["state"], record["turn"], record["metrics"]) == ("done", "t1", METRICS.to_dict())


def test_prefill_and_thinking_are_shown_until_the_first_text(screen, clock):
    view = view_on(screen, clock)
    steps = [
        (PrefillProgress(128, 1034, 900), "reading the prompt 128/1,034 tokens, 900 cached"),
        (ReasoningDelta("hm"), "thinking"),
        (TextDelta("So"), "smollm2: So"),
    ]
    for event, words in steps:
        view.feed(event)
        clock.now += 1
        view.pump()
        assert words in screen.last["text/plain"]
    assert "reading" not in screen.last["text/plain"]
    assert "<details><summary>Reasoning</summary>" in screen.last["text/html"]


def test_waiting_counts_the_seconds(screen, clock):
    view = view_on(screen, clock)
    clock.now += 3.1
    view.pump()
    assert "waiting for the engine, 3 s" in screen.last["text/plain"]


def test_nothing_new_draws_nothing(screen, clock):
    view = view_on(screen, clock)
    view.feed(TextDelta("a"))
    for _ in range(100):
        clock.now += 0.03
        view.pump()
    assert len(screen.frames) == 2


def test_frames_come_at_most_ten_times_a_second_and_within_the_byte_budget(screen, clock):
    view = view_on(screen, clock)
    text = ""
    for number in range(2000):  # 20 KB at 50 tokens a second
        piece = f"word{number:05d} "
        text += piece
        view.feed(TextDelta(piece))
        clock.now += 0.02
        view.pump()
    times = [at for at, _, _ in screen.frames]
    duration = times[-1] - times[0]
    assert len(times) > 1.4 * duration
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.099
    assert screen.bytes / duration < 60_000
    early = [at for at in times if at < times[0] + 4]
    assert len(early) > 16  # short answers stay lively
    view.finish(Reply(text, METRICS))
    assert text in screen.last["text/plain"]


def test_frames_are_rarer_where_drawing_is_slow(screen):
    class SlowClock(Clock):
        def __call__(self):
            self.now += 0.01  # each look at the clock: the drawing took at least this long
            return self.now

    slow = SlowClock()
    screen.clock = slow
    view = StreamView("hi", display=screen, clock=slow)
    for _ in range(200):
        view.feed(TextDelta("x "))
        view.pump()
    duration = screen.frames[-1][0] - screen.frames[0][0]
    assert len(screen.frames) < 2.5 * duration


def test_a_long_prompt_is_sent_whole_only_once(screen, clock):
    prompt = "p" * 200_000
    view = view_on(screen, clock, prompt)
    view.feed(TextDelta("a"))
    clock.now += 1
    view.pump()
    assert all(len(bundle["text/html"]) < 8_000 for _, bundle, _ in screen.frames)
    view.finish(Reply("a", METRICS))
    assert prompt in screen.last["text/plain"]
    assert prompt in screen.last["text/html"]


def test_an_error_keeps_the_partial_answer_and_leaves_the_reason_to_the_cell(screen, clock):
    view = view_on(screen, clock)
    view.feed(TextDelta("half an ans"))
    view.finish(error=GenerationError("the device is gone <b>", why="x"))
    assert "half an ans" in screen.last["text/plain"]
    assert "not added to the conversation" in screen.last["text/html"]
    assert "the device is gone" not in screen.last["text/html"]
    assert screen.frames[-1][2]["kani_nb"]["state"] == "error"


def test_finishing_twice_or_pumping_afterwards_changes_nothing(screen, clock):
    view = view_on(screen, clock)
    view.finish(Reply("a", METRICS))
    count = len(screen.frames)
    view.feed(TextDelta("late"))
    clock.now += 5
    view.pump()
    view.finish()
    assert len(screen.frames) == count


def test_notices_tool_calls_and_a_fed_reply_are_understood(screen, clock):
    view = view_on(screen, clock)
    for event in (
        Notice("dropped the first turn"),
        ToolCallDelta(0, name="get_weather"),
        ToolCallDelta(0, arguments='{"city": "<b>"}'),
        "plain text of a foreign engine",
        Completion(ChatMessage.assistant("plain text of a foreign engine")),
    ):
        view.feed(event)
    clock.now += 1
    view.pump()
    assert "[dropped the first turn]" in screen.last["text/plain"]
    assert '[get_weather(city="<b>")]' in screen.last["text/plain"]
    call = ToolCall("c1", FunctionCall("get_weather", '{"city": "<b>"}'))
    view.feed(ToolStep(call, ChatMessage.function("get_weather", "<i>rain</i>\nand wind", "c1")))
    view.feed("It rains.")
    said = (
        ChatMessage.assistant("plain text of a foreign engine", tool_calls=(call,)),
        ChatMessage.function("get_weather", "<i>rain</i>\nand wind", "c1"),
        ChatMessage.assistant("It rains."),
    )
    clock.now += 1
    view.pump()
    running = screen.last
    view.feed(Reply("It rains.", METRICS, Turn("t1", None, said)))
    view.finish()
    for bundle in (running, screen.last):
        text = bundle["text/plain"]
        step = '[get_weather(city="<b>") → <i>rain</i> and wind]'
        assert text.index("plain text of a foreign engine") < text.index(step) < text.index("smollm2: It rains.")
        assert (
            "<summary>get_weather(city=&quot;&lt;b&gt;&quot;) → &lt;i&gt;rain&lt;/i&gt; and wind</summary>"
            in bundle["text/html"]
        )
    assert screen.frames[-1][2]["kani_nb"]["turn"] == "t1"


def test_media_in_a_prompt_are_named(screen, clock):
    view_on(screen, clock, ("Look: ", ImagePart(b"1234", "image/png")))
    assert "Look: [image/png, 4 bytes]" in screen.last["text/plain"]


def test_feeding_from_many_threads_loses_nothing(screen, clock):
    view = view_on(screen, clock)
    threads = [threading.Thread(target=lambda: [view.feed(TextDelta("x")) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        view.pump()
    view.finish()
    assert view.text == "x" * 2000


@given(st.text(), st.text(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_plain_text_holds_prompt_and_answer_verbatim(prompt, answer, is_fed):
    clock = Clock()
    screen = Screen(clock)
    view = StreamView(prompt, model="m", display=screen, clock=clock)
    view.feed(TextDelta(answer))
    view.finish(None if is_fed else Reply(answer, METRICS))
    shown = screen.last["text/plain"]
    for text in (prompt, answer):
        commands = {chr(0x1B), *map(chr, range(0x80, 0xA0))}
        assert "".join("\ufffd" if each in commands else each for each in text) in shown


def test_lone_surrogates_can_be_sent(screen, clock):
    view = view_on(screen, clock, "a\ud800b")
    view.feed(TextDelta("c\udfffd\x00"))
    view.finish()
    for text in screen.last.values():
        text.encode()


def test_a_terminal_gets_the_text_as_it_comes_and_the_stat_line_last(capsys):
    view = StreamView("hi", kind=SurfaceKind.TERMINAL)
    view.feed(TextDelta("Hello "))
    view.pump()
    assert capsys.readouterr().out == "Hello "
    view.feed(TextDelta("you\x1b]52;c;cHduZWQ=\x07"))
    view.pump()
    view.finish(Reply("Hello you", METRICS, notices=("dropped",)))
    printed = capsys.readouterr().out
    assert printed == f"you\u241b]52;c;cHduZWQ=\u2407\n[dropped]\n[{stat_line(METRICS)}]\n"


def test_a_capture_gets_one_output_the_last(clock):
    screen = Screen(clock)
    view = StreamView("hi", display=screen, clock=clock, kind=SurfaceKind.FINAL)
    for _ in range(5):
        view.feed(TextDelta("a"))
        clock.now += 1
        view.pump()
    assert screen.frames == []
    view.finish(Reply("aaaaa", METRICS))
    assert (screen.opened, len(screen.frames)) == (1, 1)


@dataclass
class Strip:
    """Records what takes its place."""

    is_open: bool = False
    below: list[dict] = field(default_factory=list)

    def open(self):
        self.is_open = True

    def update(self, *_):
        pass

    def close(self, bundle):
        self.is_open = False
        self.below.append(bundle)


FIGURE = FigureBundle({"application/vnd.plotly.v1+json": {}, "image/svg+xml": "<svg/>", "text/plain": "numbers"})


def test_the_figure_takes_the_strips_place(screen, clock):
    strip = Strip()
    view = view_on(screen, clock, strip=strip, figure=lambda: FIGURE)
    view.finish(Reply("a", METRICS))
    assert strip.below == [FIGURE.data]
    assert stat_line(METRICS) in screen.last["text/plain"]
    assert screen.opened == 1


def test_after_a_stop_the_figure_needs_no_script(screen, clock):
    strip = Strip()
    view = view_on(screen, clock, strip=strip, figure=lambda: FIGURE)
    view.finish(Reply("a", dataclasses.replace(METRICS, finish_reason="cancelled")))
    assert [set(bundle) for bundle in strip.below] == [{"image/svg+xml", "text/plain"}]


@pytest.mark.parametrize("figure", [None, lambda: None])
def test_without_a_figure_the_numbers_take_the_strips_place(screen, clock, figure):
    strip = Strip()
    view = view_on(screen, clock, strip=strip, figure=figure)
    view.finish(Reply("a", METRICS))
    assert [bundle["text/plain"] for bundle in strip.below] == [stat_line(METRICS)]
    assert stat_line(METRICS) not in screen.last["text/plain"]


def test_after_an_error_there_is_no_figure(screen, clock):
    strip = Strip()
    view = view_on(screen, clock, strip=strip, figure=lambda: FIGURE)
    view.finish(error=GenerationError("gone"))
    assert "not added" in strip.below[0]["text/html"]


def test_without_a_strip_the_figure_is_one_more_output(clock):
    shown = []
    view = StreamView(
        "hi", display=lambda bundle, **_: shown.append(bundle), figure=lambda: FIGURE, kind=SurfaceKind.FINAL
    )
    view.finish(Reply("a", METRICS))
    assert shown[1:] == [FIGURE.data]


def test_a_prompt_that_the_cell_shows_is_marked_for_the_front_end(screen, clock):
    view_on(screen, clock, is_prompt_above=True)
    assert "kani-nb-above" in screen.last["text/html"].split("</style>")[1]
    assert screen.last["text/plain"].startswith("You: hi")


def test_a_prompt_that_was_refused_is_not_saved_again_however_long_it_is():
    clock = Clock()
    screen = Screen(clock)
    view = StreamView("word " * 40_000, display=screen, clock=clock, kind=SurfaceKind.LIVE)
    view.finish(error=GenerationError("too long"))
    assert len(json.dumps(screen.last)) < 20_000
    assert "198,000 more characters" in screen.last["text/plain"]
