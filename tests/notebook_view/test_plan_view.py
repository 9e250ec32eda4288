"""`%engine plan` and `%engine explain`: what a plan looks like, as HTML and as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from kani_nb import plan_text
from kani_nb._amounts import in_words
from kani_nb.auto_choice import auto_shape
from kani_nb.errors import ConfigError, KaniNbError
from kani_nb.figures.bundle import PLOTLY_MIME
from kani_nb.hardware.budgets import budgets_of
from kani_nb.hardware.planner import make_plan
from kani_nb.hardware.recommending import KL_NATS
from kani_nb.notebook.plan_view import plan_bundle, plan_parser, run_explain, run_plan
from kani_nb.notebook.surface import Surface, SurfaceKind
from kani_nb.precision_advice import MEASURED, advice

HOSTILE = "<img src=x onerror=alert(1)>$x$\x1b[31m\x00"


@pytest.fixture(scope="module")
def plan():
    """A real plan: 4 B parameters on a T4."""
    return make_plan(auto_shape("qwen3-4b"), name="qwen3-4b", budgets=budgets_of("T4"), context_tokens=8192)


@pytest.fixture(scope="module")
def too_large():
    """14 B parameters on two cards of 6 GB."""
    return make_plan(
        auto_shape("qwen2.5-14b"), name="qwen2.5-14b", budgets=budgets_of("2x1660"), quantizations=["none"]
    )


class Cells(HTMLParser):
    """The rows of the first table, and every attribute that could run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on") or name in ("href", "src")]
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data


def test_the_table_has_the_plans_numbers_and_marks_one_row_in_words(plan):
    bundle = plan_bundle(plan)
    cells = Cells(bundle["text/html"])
    assert [row[1] for row in cells.rows[1:]] == [row.label for row in plan.rows]
    assert cells.rows[0][1:8] == ["scheme", "fits", "weights", "KV cache", "working", "total", "to have"]
    marked = [row for row in cells.rows if row[0] == plan_text.MARK]
    assert [row[1] for row in marked] == [plan.best.label]
    total = float(marked[0][6])
    assert total == pytest.approx(plan.best.peak_bytes / 2**30, abs=0.006)
    assert float(marked[0][3]) + float(marked[0][4]) + float(marked[0][5]) == pytest.approx(total, abs=0.016)
    assert "is recommended: " in bundle["text/html"]


def test_the_line_to_load_it_stands_there_to_be_copied(plan):
    bundle = plan_bundle(plan)
    assert f'<pre class="kani-nb-line">{plan.best.line}</pre>' in bundle["text/html"]
    assert f"  {plan.best.line}\n" in bundle["text/plain"]


def test_text_and_html_say_the_same(plan):
    bundle = plan_bundle(plan)
    shown = re.sub(r"<style>.*?</style>", "", bundle["text/html"])
    for sentence in (plan_text.title(plan), plan_text.verdict(plan), *plan_text.notes(plan)):
        assert sentence in bundle["text/plain"]
        assert sentence.replace('"', "&quot;").replace("'", "&#x27;").replace(">", "&gt;") in shown


def test_a_fall_back_and_the_download_are_said(plan):
    said = "\n".join(plan_text.notes(plan))
    assert "float16" in said
    assert "7.5" in said
    assert "takes 8.0 GB on the disk, and as much to download" in said
    assert "fp16" in plan_text.plan_text(plan)


def test_where_nothing_fits_it_is_said_with_both_numbers_and_what_to_do(too_large):
    said = plan_text.plan_text(too_large)
    takes = in_words(too_large.rows[0].peak_bytes)
    assert f"none of them fits: unquantized fp16 takes the least, {takes}, and 10.8 GiB are usable" in said
    assert "--allow-offload" in said
    assert "%load_engine" not in said
    assert "cuda:0 to cuda:1 (GTX 1660): 5.4 GiB of 6.0 GiB usable each" in said


def test_a_small_model_is_counted_in_mib():
    small = make_plan(auto_shape("smollm2"), name="smollm2", budgets=budgets_of("T4"), quantizations=["none"])
    table = plan_text.plan_table(small)
    assert table.legend.startswith("memory in MiB")
    assert table.rows[0][table.headers.index("weights")] == "257"


def test_a_hostile_name_stays_text(plan):
    hostile = replace(
        plan,
        model=HOSTILE,
        notes=(HOSTILE,),
        rows=tuple(replace(row, label=HOSTILE, line=HOSTILE, why_not=HOSTILE, notes=(HOSTILE,)) for row in plan.rows),
        budgets=tuple(replace(each, description=HOSTILE) for each in plan.budgets),
    )
    cells = Cells(plan_bundle(hostile)["text/html"])
    assert cells.handlers == []
    assert cells.tags <= {"style", "div", "table", "thead", "tbody", "tr", "th", "td", "pre", "ul", "li"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("m --context 0", "--context is 0"),
        ("m --kv-bits 3", "--kv-bits is 3: it must be one of 4, 8"),
        ("m --kontext 5", "did you mean --context"),
        ("m --schemes nf5", "there is no quantization scheme 'nf5'"),
        ("m --schemes int8+dq", "only nf4 and fp4 have it"),
        ("m --schemes nf4+fast", "'fast' in the scheme 'nf4+fast' is no setting"),
        ("m --dtype fp7", "dtype is 'fp7'"),
        ("m --card RTX3091", "did you mean RTX 3090"),
        ("m --card T4 --max-memory 0=1GiB", "--card and --max-memory were both given"),
        ("echo", "echo cannot be planned: the engine echo holds no weights here"),
        ("no-such-model", "there is no model 'no-such-model'"),
        ("", "no model was named, and none is loaded"),
    ],
)
def test_what_cannot_be_planned_is_one_short_paragraph(clean_runtime, line, said):
    with pytest.raises(KaniNbError, match=re.escape(said)) as refused:
        run_plan(None, line)
    assert len(str(refused.value).splitlines()) <= 2


def test_the_help_lists_the_options():
    said = plan_parser().format_help()
    assert all(option in said for option in ("--context", "--card", "--schemes", "--dtype", "--kv-bits", "--revision"))


def test_the_advice_names_what_was_measured_and_what_was_not(plan):
    said = advice(plan).to_text()
    assert f"{plan_text.row_in_words(plan.best)} is recommended" in said
    assert plan.best.line in said
    assert "Measured on SmolLM2-135M-Instruct" in said
    assert "Not measured: any GPU" in said
    assert "%load_engine" not in advice().to_text()


def test_every_scheme_that_is_recommended_has_its_row_and_fewer_bits_are_further_away():
    assert {each.scheme for each in MEASURED} >= {name for name in KL_NATS if name != "none"}
    kl = {each.scheme: each.divergence for each in MEASURED}
    eight, four = (kl["cpu-int8"], kl["int8"]), (kl["gptq"], kl["cpu-int4"], kl["nf4"], kl["fp4"])
    assert kl["float32"] < kl["bfloat16"] < min(eight) < max(eight) < min(four)
    said = advice().to_text()
    assert f"{KL_NATS['gptq']:.2g} against {KL_NATS['int8']:.2g} nats" in said


def test_explain_without_a_model_needs_none(clean_runtime, capsys):
    run_explain(None, "")
    assert "Which precision to choose" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean --schemes"):
        run_explain(None, "--scemes nf4")


class Handle:
    def __init__(self, outputs):
        self._outputs = outputs

    def update(self, bundle, **options):
        self._outputs[0] = (bundle, options)


def show(line, clean_runtime, **options):
    """The outputs of a cell in a notebook, the last state of each."""
    outputs = []

    def display(bundle, **more):
        outputs.append((bundle, more))
        return Handle(outputs)

    shell = SimpleNamespace(kernel=object(), user_ns={})
    run_plan(shell, line, surface=Surface(SurfaceKind.LIVE, display), **options)
    return outputs


def test_in_a_notebook_the_table_stands_above_the_figure_and_carries_the_numbers(clean_runtime, smollm2):
    (table, options), (figure, _) = show("smollm2 --card T4 --schemes none,nf4 --context 1000", clean_runtime)
    assert set(table) == {"text/html", "text/plain"}
    record = options["metadata"]["kani_nb"]["plan"]
    assert (record["model"], record["context"]) == ("smollm2", 1000)
    assert [each["scheme"] for each in record["schemes"]] == ["none", "nf4"]
    json.dumps(record, allow_nan=False)
    assert {PLOTLY_MIME, "image/svg+xml", "text/plain"} == set(figure)
    assert len(show("smollm2 --card T4 --schemes none", clean_runtime, draws=False)) == 1


def test_an_error_leaves_no_line_that_seems_to_go_on(clean_runtime, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    outputs = []

    def display(bundle, **more):
        outputs.append((bundle, more))
        return Handle(outputs)

    with pytest.raises(KaniNbError, match="org/model"):
        run_plan(None, "org/model", surface=Surface(SurfaceKind.LIVE, display))
    # Nothing was drawn where it failed at once.
    assert [bundle["text/plain"] for bundle, _ in outputs] in ([], ["org/model was not planned"])
