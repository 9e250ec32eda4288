"""Memory, time and distance of schemes in three forms, from the same numbers."""

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
from kani_nb.figures.comparison import comparison_figure, summary_line
from kani_nb.metrics.comparison import ComparedRow, Comparison, Environment
from kani_nb.quantization import Quantization

MIB = 2**20
HOSTILE = "</text><script>alert(1)</script>\x00\ud800%{y}<a href='javascript:alert(1)'>\"&"
HERE = Environment(versions={"torch": "2.13.0"}, machine="cpu (a processor)", cpus=2, threads=1)


def row(label: str, **changes) -> ComparedRow:
    values = {
        "label": label,
        "settings": Quantization("int8"),
        "weight_bytes": 156 * MIB,
        "peak_bytes": 320 * MIB,
        "tpot_runs_s": (0.030, 0.036, 0.033),
        "ttft_runs_s": (0.1, 0.1, 0.1),
        "kl_nats": 0.0194,
        "top1_agreement": 0.885,
        "perplexity": 7.2,
    }
    return ComparedRow(**{**values, **changes})


def comparison(*rows: ComparedRow, **changes) -> Comparison:
    return Comparison(**{"model": "smollm2", "environment": HERE, "rows": rows, **changes})


FOUR = comparison(
    row("none", weight_bytes=257 * MIB, tpot_runs_s=(0.040, 0.044), kl_nats=0.001),
    row("int8"),
    row("nf4", weight_bytes=111 * MIB, peak_bytes=190 * MIB, tpot_runs_s=(0.025,), kl_nats=0.282),
    ComparedRow(label="gptq", settings=Quantization("gptq"), reason="gptqmodel is not installed"),
)


def svg_of(bundle) -> ET.Element:
    return ET.fromstring(bundle.data["image/svg+xml"])


def widths_of(bundle, colour: str) -> list[float]:
    return [float(each.get("width")) for each in svg_of(bundle).iter() if each.get("fill") == colour and each.get("x")]


def test_the_figure_is_one_bundle_of_three_forms():
    bundle = comparison_figure(FOUR)
    assert set(bundle.data) == {PLOTLY_MIME, "image/svg+xml", "text/plain"}
    assert len(json.dumps(bundle.data[PLOTLY_MIME], allow_nan=False)) < 10_000
    assert len(bundle.data["image/svg+xml"]) < 10_000


def test_only_what_was_measured_is_drawn():
    spec = comparison_figure(FOUR).data[PLOTLY_MIME]
    assert spec["layout"]["yaxis"]["ticktext"] == ["none", "int8", "nf4"]
    assert "gptq" not in comparison_figure(FOUR).data["image/svg+xml"]


def test_bars_of_the_svg_are_as_long_as_their_numbers():
    times = widths_of(comparison_figure(FOUR), "#c26fa0")
    assert times[0] / times[2] == pytest.approx(42 / 25, rel=0.01)
    distances = widths_of(comparison_figure(FOUR), "#2f86c8")
    assert distances[2] / distances[1] == pytest.approx(0.282 / 0.0194, rel=0.01)


def test_memory_is_the_weights_and_what_the_peak_adds():
    weights, beyond = comparison_figure(FOUR).data[PLOTLY_MIME]["data"][:2]
    assert weights["x"] == [257, 156, 111]
    assert beyond["x"] == [63, 164, 79]


def test_the_ends_of_the_error_bars_are_the_slowest_and_the_fastest_run():
    time = next(each for each in comparison_figure(FOUR).data[PLOTLY_MIME]["data"] if each.get("name") == "per token")
    assert time["x"][1] == 33
    assert (time["x"][1] - time["error_x"]["arrayminus"][1], time["x"][1] + time["error_x"]["array"][1]) == (30, 36)


def test_plotly_accepts_the_figure_as_it_is():
    import plotly.graph_objects as go

    spec = comparison_figure(FOUR).data[PLOTLY_MIME]
    figure = go.Figure(data=spec["data"], layout=spec["layout"])
    bars = [trace.name for trace in figure.data if trace.type == "bar"]
    assert bars == ["weights", "more at the peak", "per token", "KL"]
    numbers = [trace.text for trace in figure.data if trace.type == "scatter"]
    assert [each[1].strip() for each in numbers] == ["156 + 164", "33.0", "0.0194"]
    assert figure.layout.xaxis3.title.text == "KL divergence, nats"


def test_rows_of_one_name_stay_rows_of_their_own():
    spec = comparison_figure(comparison(row("int8"), row("int8"))).data[PLOTLY_MIME]
    assert spec["data"][0]["y"] == [0, 1]


def test_the_text_names_the_smallest_the_fastest_and_the_closest():
    assert summary_line(FOUR) == (
        "3 of 4 schemes of smollm2 measured · smallest nf4 (111 MiB of weights) · fastest nf4 (25.0 ms per token)"
        " · closest none (KL 0.001)"
    )


def test_hostile_names_stay_text():
    bundle = comparison_figure(comparison(row(HOSTILE), model=HOSTILE))
    tags = {element.tag.split("}")[1] for element in svg_of(bundle).iter()}
    assert tags <= {"svg", "g", "path", "rect", "text"}
    assert "<script" not in json.dumps(bundle.data[PLOTLY_MIME])
    assert "<a " not in json.dumps(bundle.data[PLOTLY_MIME])
    assert "\x00" not in json.dumps(bundle.data[PLOTLY_MIME])


def test_colab_gets_html_that_loads_plotly_from_its_cdn():
    bundle = comparison_figure(FOUR, for_colab=True)
    assert PLOTLY_MIME not in bundle.data
    assert "cdn" in bundle.data["text/html"]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="without a measured row"):
        comparison_figure(comparison(FOUR.rows[3]))


def test_drawing_loads_neither_plotly_nor_torch():
    code = (
        "import sys; from kani_nb.figures.comparison import comparison_figure as f\n"
        "from kani_nb.metrics.comparison import *; from kani_nb.quantization import Quantization as Q\n"
        "e = Environment(versions={}, machine='', cpus=1, threads=1)\n"
        "f(Comparison(model='x', environment=e, rows=(ComparedRow(label='a', settings=Q()),)))\n"
        "print({'plotly', 'torch'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"


numbers = st.none() | st.floats(0, 1e6) | st.just(float("inf"))


@given(
    st.lists(
        st.builds(
            ComparedRow,
            label=st.text(max_size=40),
            settings=st.just(Quantization()),
            weight_bytes=st.none() | st.integers(0, 2**45),
            peak_bytes=st.none() | st.integers(-(2**30), 2**45),
            tpot_runs_s=st.lists(st.floats(1e-6, 1e4), max_size=4).map(tuple),
            kl_nats=numbers,
            top1_agreement=st.none() | st.floats(0, 1),
            perplexity=numbers,
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_rows_make_well_formed_figures_and_records(rows):
    compared = comparison(*rows)
    bundle = comparison_figure(compared)
    svg_of(bundle)
    json.dumps(bundle.data, allow_nan=False)
    json.dumps(compared.to_dict(), allow_nan=False)
    assert len(compared.to_text().splitlines()) >= len(rows)
