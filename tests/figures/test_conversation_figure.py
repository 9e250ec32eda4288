"""One bundle of three forms from the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.figures.bundle import PLOTLY_MIME
from kani_nb.figures.conversation import conversation_figure, summary_line
from kani_nb.figures.svg import nice_ticks
from kani_nb.metrics.recorder import GenerationMetrics

GIB = 2**30
HOSTILE = "</text><script>alert(1)</script>\x00\ud800%{y}<a href='javascript:alert(1)'>\"&"


def turn(number: int, **changes) -> GenerationMetrics:
    values = {
        "model": "smollm2",
        "turn": number,
        "ttft_s": 0.05 + 0.001 * number,
        "tpot_s": 0.03,
        "prompt_tokens": 40 * number,
        "cached_tokens": 40 * (number - 1),
        "peak_bytes": int(0.9 * GIB) + number * 10**6,
        "weight_bytes": int(0.25 * GIB),
        "kv_bytes": number * 5 * 10**6,
        "free_bytes": 2 * GIB,
    }
    return GenerationMetrics(**{**values, **changes})


def svg_of(bundle) -> ET.Element:
    return ET.fromstring(bundle.data["image/svg+xml"])


@pytest.mark.parametrize("count", [1, 2, 30, 1000])
def test_any_number_of_turns_fits(count):
    bundle = conversation_figure([turn(number) for number in range(1, count + 1)])
    assert set(bundle.data) == {PLOTLY_MIME, "image/svg+xml", "text/plain"}
    size = len(json.dumps(bundle.data[PLOTLY_MIME], allow_nan=False))
    assert size < (30_000 if count <= 30 else 60_000)
    assert len(bundle.data["image/svg+xml"]) < (30_000 if count <= 30 else 60_000)
    svg_of(bundle)


def test_thinning_keeps_first_last_and_the_highest_peak():
    turns = [turn(number, peak_bytes=9 * GIB if number == 502 else GIB) for number in range(1, 1001)]
    peak = next(each for each in conversation_figure(turns).data[PLOTLY_MIME]["data"] if each["name"] == "peak")
    assert (peak["x"][0], peak["x"][-1]) == (1, 1000)
    assert peak["y"][peak["x"].index(502)] == 9
    assert len(peak["x"]) <= 121


def test_plotly_accepts_the_figure_as_it_is():
    import plotly.graph_objects as go

    spec = conversation_figure([turn(1), turn(2)]).data[PLOTLY_MIME]
    figure = go.Figure(data=spec["data"], layout=spec["layout"])
    assert [trace.name for trace in figure.data] == [
        *("weights", "KV cache", "peak", "free"),
        *("cached", "computed", "first text", "per token"),
    ]
    assert figure.data[2].customdata[1] == "turn 2 · smollm2"
    assert "template" not in spec["layout"]


def test_what_is_missing_leaves_a_gap():
    bundle = conversation_figure([GenerationMetrics("echo"), turn(2), GenerationMetrics("echo", finish_reason="error")])
    first_text = bundle.data[PLOTLY_MIME]["data"][6]
    assert first_text["y"] == [None, 52.0, None]
    svg_of(bundle)


def test_free_memory_far_beyond_the_rest_does_not_flatten_it():
    def free_of(bundle):
        return next(each for each in bundle.data[PLOTLY_MIME]["data"] if each["name"] == "free")

    assert free_of(conversation_figure([turn(1, free_bytes=2 * GIB)]))["visible"] is True
    assert free_of(conversation_figure([turn(1, free_bytes=139 * GIB)]))["visible"] == "legendonly"


def test_a_hostile_model_name_stays_text():
    bundle = conversation_figure([turn(1, model=HOSTILE, peak_source=HOSTILE)])
    tags = {element.tag.split("}")[1] for element in svg_of(bundle).iter()}
    assert tags <= {"svg", "g", "path", "rect", "circle", "text"}
    assert "<script" not in bundle.data["image/svg+xml"]
    for trace in bundle.data[PLOTLY_MIME]["data"]:
        assert "<script" not in json.dumps(trace)
        assert "<a " not in json.dumps(trace)


def test_colab_gets_html_that_loads_plotly_from_its_cdn():
    bundle = conversation_figure([turn(1, model=HOSTILE)], for_colab=True)
    assert PLOTLY_MIME not in bundle.data
    assert "cdn" in bundle.data["text/html"]
    assert "alert(1)</script>" not in bundle.data["text/html"]
    assert len(bundle.data["text/html"]) < 30_000


def test_the_text_says_the_last_answers_numbers():
    assert summary_line([turn(1), turn(2)]) == (
        "2 answers · peak 0.90 GiB (rss) · free 2.0 GiB · first text 52 ms · 30.0 ms per token"
        " · 40 of 80 prompt tokens cached"
    )


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="without an answer"):
        conversation_figure([])


def test_drawing_loads_no_plotly():
    code = (
        "import sys; from kani_nb.figures.conversation import conversation_figure as f\n"
        "from kani_nb.metrics.recorder import GenerationMetrics as M\n"
        "f([M('x')]); print('plotly' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


@given(st.floats(0, 1e15, allow_nan=False))
def test_ticks_are_few_and_reach_the_highest_value(highest):
    ticks = nice_ticks(highest)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] == 0
    assert ticks[-1] >= highest * 0.999


@given(
    st.lists(
        st.builds(
            GenerationMetrics,
            model=st.text(max_size=20),
            ttft_s=st.none() | st.floats(0, 1e4),
            tpot_s=st.none() | st.floats(0, 1e3),
            prompt_tokens=st.none() | st.integers(0, 10**6),
            cached_tokens=st.none() | st.integers(0, 10**6),
            peak_bytes=st.none() | st.integers(0, 2**45),
            weight_bytes=st.none() | st.integers(0, 2**45),
            kv_bytes=st.none() | st.integers(0, 2**45),
            free_bytes=st.none() | st.integers(0, 2**45),
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_metrics_make_well_formed_figures(metrics):
    bundle = conversation_figure(metrics)
    svg_of(bundle)
    json.dumps(bundle.data, allow_nan=False, ensure_ascii=False).encode("utf-8")
