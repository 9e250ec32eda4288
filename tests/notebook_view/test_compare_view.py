"""A comparison grows row by row in one output, and ends as a table that reads well anywhere."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import replace

import pytest

from kani_nb._interrupts import Interrupted
from kani_nb.engines.base import LoadProgress, TextDelta
from kani_nb.engines.echo import EchoEngine
from kani_nb.errors import ConfigError
from kani_nb.metrics.comparison import ComparedRow, Comparison, Environment
from kani_nb.notebook.compare_view import CompareView, compare_details, compare_parser, run_compare
from kani_nb.notebook.surface import SurfaceKind
from kani_nb.quantization import Quantization

HOSTILE = '<img src=x onerror="alert(1)">\x1b[31m'
NONE = ComparedRow(
    label="none",
    settings=Quantization(),
    weight_bytes=256 * 2**20,
    in_use_bytes=300 * 2**20,
    peak_bytes=310 * 2**20,
    left_bytes=5 * 2**20,
    left_resident_bytes=40 * 2**20,
    load_s=0.5,
    ttft_runs_s=(0.1, 0.1),
    tpot_runs_s=(0.04, 0.05),
    kl_nats=0.0012,
    top1_agreement=0.963,
    perplexity=20.257,
    answer=HOSTILE,
    load_average=1.2,
    others_cpus=0.3,
)
FAILED = ComparedRow(label="nf4", settings=Quantization("nf4"), reason=f"it needs {HOSTILE}", fix="--quant int8")
HERE = Environment(versions={"torch": "2.13.0"}, machine="cpu (a processor)", cpus=2, threads=1, load_average=1.0)
ONE = Comparison(model="smollm2", environment=HERE, rows=(NONE,), runs=2, prompt="What?", reference="float32 weights")
BOTH = replace(ONE, rows=(NONE, FAILED))


WORDS = "word " * 60


def interrupt_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the answer of that number, from 1."""
    answers, stream = [], EchoEngine.stream

    async def interrupting(self, *arguments, **options):
        answers.append(1)
        async for event in stream(self, *arguments, **options):
            if len(answers) == count and isinstance(event, TextDelta):
                count_of_words.append(event)
                if len(count_of_words) == 3:
                    signal.raise_signal(signal.SIGINT)
            yield event

    count_of_words: list[str] = []
    monkeypatch.setattr(EchoEngine, "stream", interrupting)


def tasks_of(runtime) -> set:
    """What still runs on the loop of a runtime, a moment later."""
    return runtime.loop.run_sync(others())


async def others() -> set:
    return asyncio.all_tasks() - {asyncio.current_task()}


def test_rows_stand_there_as_soon_as_they_are_measured(screen, clock):
    view = CompareView("smollm2", display=screen, clock=clock)
    view.progress(LoadProgress("none", "loading", 0.0))
    view.pump()
    assert screen.last["text/plain"].startswith("comparing schemes of smollm2, 0 s: none, loading")
    view.take(ONE)
    view.progress(LoadProgress("nf4", "answering, run 1 of 2", 0.5))
    clock.now += 1
    view.pump()
    assert "nf4, answering, run 1 of 2" in screen.last["text/plain"]
    assert "<td>none</td>" in screen.last["text/html"]
    view.take(BOTH)
    view.finish()
    assert screen.last["text/plain"] == BOTH.to_text().replace("\x1b", "\ufffd")
    assert screen.opened == 1


def test_the_table_has_the_figures_and_says_what_failed_and_why(screen, clock):
    view = CompareView("smollm2", display=screen, clock=clock)
    view.take(BOTH)
    view.finish()
    for form in ("text/html", "text/plain"):
        shown = screen.last[form]
        for words in (
            "256.0",
            "310.0",
            "45.0 (40.0-50.0)",
            "1.00x",
            "0.0012",
            "96.3%",
            "20.257",
            "a processor",
        ):
            assert words in shown
        assert "nf4 was not measured: it needs" in shown
        assert "Load average when the runs began: none 1.2 (0.3 CPUs by others)" in shown
        assert "Still allocated after each was freed (in brackets resident memory, free pages included)" in shown
        assert "none +5 MiB (+40)" in shown
    assert '<tr class="out"><td>nf4</td>' in screen.last["text/html"]


def test_what_a_model_said_stays_text(screen, clock):
    view = CompareView("smollm2", display=screen, clock=clock)
    view.take(BOTH)
    view.finish()
    assert "<img" not in screen.last["text/html"]
    assert "&lt;img" in screen.last["text/html"]
    assert "\x1b" not in screen.last["text/plain"]


def test_the_figures_stand_in_the_metadata_too(screen, clock):
    view = CompareView("smollm2", display=screen, clock=clock)
    view.take(BOTH)
    view.finish()
    record = screen.frames[-1][2]["kani_nb"]
    assert (record["state"], record["compare"]) == ("done", "smollm2")
    assert [row["scheme"] for row in json.loads(json.dumps(record))["comparison"]["schemes"]] == ["none", "nf4"]


def test_an_interrupt_leaves_what_was_measured(screen, clock):
    view = CompareView("smollm2", display=screen, clock=clock)
    view.take(ONE)
    words = view.interrupted(has_ended=True)
    assert words == "interrupted; 1 scheme had been measured, and stands above"
    view.finish(Interrupted(words))
    assert "<td>none</td>" in screen.last["text/html"]
    assert "smollm2 was not compared to the end: interrupted" in screen.last["text/plain"]
    assert screen.frames[-1][2]["kani_nb"]["state"] == "error"


def test_a_comparison_of_nothing_is_one_line(screen, clock):
    view = CompareView("smollm22", display=screen, clock=clock)
    view.finish(ConfigError("no model 'smollm22'", fix="smollm2"))
    assert screen.last["text/plain"] == "smollm22 was not compared to the end: no model 'smollm22'"


def test_a_terminal_gets_text_without_commands(capsys, clock):
    view = CompareView("smollm2", clock=clock, kind=SurfaceKind.TERMINAL)
    view.take(BOTH)
    view.finish()
    printed = capsys.readouterr().out
    assert "none: measured\nnf4: it needs" in printed
    assert "45.0 (40.0-50.0)" in printed
    assert "\x1b" not in printed


def test_the_options_are_in_the_help_and_wrong_ones_are_offered_again():
    for option in ("--schemes", "--sweep", "--runs", "--max-new-tokens", "--prompt", "--text", "--threads", "--dtype"):
        assert option in compare_details()
    with pytest.raises(ConfigError, match=r"unknown option '--shemes'[\s\S]*--schemes"):
        compare_parser().parse_line("smollm2 --shemes none")


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("", "needs something after it"),
        ("smollm2 --schemes nf5", "nf4"),
        ("smollm2 --sweep treshold=3", "did you mean threshold"),
        ("smollm2 --runs 0", "runs is 0"),
        ("smollm2 --text nowhere.txt", "No such file"),
    ],
)
def test_a_wrong_line_is_one_short_error(clean_runtime, rest, said):
    with pytest.raises(ConfigError, match=said):
        run_compare(None, rest)


def test_an_interrupt_ends_between_tokens_and_shows_the_rows_there_are(clean_runtime, monkeypatch, capsys):
    interrupt_at(4, monkeypatch)  # after a warm-up and a run of each row
    with pytest.raises(Interrupted, match="interrupted; 1 scheme had been measured, and stands above"):
        run_compare(None, f"echo:delay=0.005 --schemes none --sweep dtype=float32,bfloat16 --runs 1 --prompt '{WORDS}'")
    printed = capsys.readouterr().out
    assert "none + float32: measured" in printed
    assert "echo:delay=0.005 was not compared to the end: interrupted" in printed
    assert not any(task for task in tasks_of(clean_runtime))


@pytest.mark.parametrize(("others", "is_told"), [(0.9, False), (1.7, True), (None, False)])
def test_times_that_others_have_spoilt_are_marked(others, is_told):
    one = replace(ONE, rows=(replace(NONE, others_cpus=others),))
    told = [remark for remark in one.remarks if "do not believe the times" in remark]
    assert bool(told) == is_told
    if told:
        assert told[0].startswith("Other programs wanted the same CPUs while none answered")
