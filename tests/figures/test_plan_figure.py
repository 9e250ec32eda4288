"""The bars of a plan: the plan's own numbers, in plotly's JSON and in SVG."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.figures.bundle import PLOTLY_MIME
from kani_nb.figures.plan import plan_figure
from kani_nb.hardware.plans import Budget, Plan, PlanRow, Share
from kani_nb.quantization import Quantization

GIB = 2**30
HOSTILE = "</text><script>alert(1)</script>\x00\ud800%{y}<a href='javascript:alert(1)'>\"&"


def row(label: str, gib: float, *, fits: bool = True, scale: float = 0.0) -> PlanRow:
    weights, kv, working = int(gib * GIB), GIB, GIB // 4
    return PlanRow(
        label=label,
        settings=Quantization(label.split()[0]),
        dtype="bfloat16",
        weight_bytes=weights,
        scale_bytes=int(scale * GIB),
        kv_bytes_per_token=512 * 1024,
        context_tokens=2048,
        kv_bytes=kv,
        working_bytes=working,
        peak_bytes=weights + kv + working,
        recommended_bytes=int((weights + kv + working) * 1.1),
        host_bytes=GIB,
        disk_bytes=13 * GIB,
        shares=(Share(device="cuda:0", weight_bytes=weights, kv_bytes=kv, working_bytes=working),) * fits,
        fits=fits,
    )


def plan(*rows: PlanRow, usable_gib: float = 14, recommended: int | None = 1, model: str = "llama-7b") -> Plan:
    total = int(usable_gib * GIB)
    card = Budget(name="cuda:0", description="a card", total_bytes=total, usable_bytes=total)
    memory = Budget(name="cpu", description="a CPU", total_bytes=64 * GIB, usable_bytes=60 * GIB)
    return Plan(
        model=model,
        architecture="LlamaForCausalLM",
        parameters=6_738_000_000,
        context_tokens=2048,
        budgets=(card, memory),
        rows=rows,
        recommended=recommended,
    )


SEVEN_B = plan(row("none", 13, fits=False), row("int8", 6.5), row("nf4", 3.9, scale=0.4))


def svg_of(bundle) -> ET.Element:
    return ET.fromstring(bundle.data["image/svg+xml"])


def test_the_bars_are_the_plans_bytes_and_the_line_is_what_the_cards_have():
    spec = plan_figure(SEVEN_B).data[PLOTLY_MIME]
    traces = {trace["name"]: trace for trace in spec["data"]}
    assert list(traces) == ["weights", "scales", "KV cache", "working", "usable"]
    assert traces["weights"]["x"] == [13, 6.5, 3.5]
    assert traces["scales"]["x"] == [0, 0, 0.4]
    assert traces["usable"]["x"] == [14, 14, 14]
    assert traces["weights"]["y"] == ["none ✗", "→ int8", "nf4"]
    for index, each in enumerate(SEVEN_B.rows):
        bar = sum(traces[name]["x"][index] for name in ("weights", "scales", "KV cache", "working"))
        assert bar * GIB == pytest.approx(each.peak_bytes, rel=1e-4)


def test_plotly_accepts_the_figure_as_it_is():
    import plotly.graph_objects as go

    spec = plan_figure(SEVEN_B).data[PLOTLY_MIME]
    figure = go.Figure(data=spec["data"], layout=spec["layout"])
    assert len(figure.data) == 5
    assert "template" not in spec["layout"]


def test_the_svg_says_what_is_recommended_and_what_does_not_fit_without_colour():
    bundle = plan_figure(SEVEN_B)
    words = [element.text for element in svg_of(bundle).iter() if element.tag.endswith("text")]
    assert {"none ✗", "→ int8", "nf4", "14.25", "7.75"} <= set(words)
    assert bundle.data["text/plain"] == (
        "llama-7b at 2,048 tokens · 14.0 GiB usable (cuda) · recommended: int8, 7.75 GiB"
    )


def test_memory_far_beyond_the_bars_does_not_flatten_them():
    names = [
        trace["name"]
        for trace in plan_figure(replace(SEVEN_B, budgets=plan(usable_gib=141).budgets)).data[PLOTLY_MIME]["data"]
    ]
    assert "usable" not in names


def test_where_none_fits_it_is_said():
    nothing = plan(row("none", 130, fits=False), recommended=None)
    assert plan_figure(nothing).data["text/plain"].endswith("none fits")


def test_a_hostile_name_stays_text():
    bundle = plan_figure(plan(row("none", 1), replace(row("int8", 1), label=HOSTILE), model=HOSTILE))
    tags = {element.tag.split("}")[1] for element in svg_of(bundle).iter()}
    assert tags <= {"svg", "path", "rect", "text"}
    assert "<script" not in json.dumps([bundle.data[PLOTLY_MIME], bundle.data["image/svg+xml"]])
    colab = plan_figure(plan(replace(row("none", 1), label=HOSTILE), recommended=0, model=HOSTILE), for_colab=True)
    assert PLOTLY_MIME not in colab.data
    assert "alert(1)</script>" not in colab.data["text/html"]


def test_a_plan_without_rows_has_no_figure():
    with pytest.raises(ValueError, match="without a row"):
        plan_figure(plan(recommended=None))


def test_drawing_loads_no_plotly():
    code = "import sys, kani_nb.figures.plan; print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@given(
    st.lists(st.tuples(st.text(max_size=40), st.floats(0, 2000), st.booleans()), min_size=1, max_size=9),
    st.floats(0, 5000),
)
@settings(max_examples=30, deadline=None)
def test_any_plan_makes_well_formed_figures(rows, usable):
    drawn = plan(
        *(replace(row("none", gib, fits=fits), label=label) for label, gib, fits in rows),
        usable_gib=usable,
        recommended=0,
    )
    bundle = plan_figure(drawn)
    svg_of(bundle)
    spec = json.loads(json.dumps(bundle.data[PLOTLY_MIME], allow_nan=False))
    assert len(set(spec["data"][0]["y"])) == len(rows)
