"""Schemes side by side: real loads of a tiny model, its figures against those found another way, and what fails."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaForCausalLM

import kani_nb._runtime
from kani_nb import EngineConfig, HuggingEngine
from kani_nb._runtime import Runtime
from kani_nb.compare import Sweep, compare, parse_sweep
from kani_nb.compare.cases import expand, read_text
from kani_nb.compare.measuring import LEFTOVER_BYTES, RESIDENT_LEFTOVER_BYTES
from kani_nb.compare.reference import text_pieces
from kani_nb.errors import ConfigError, UnknownModelError
from kani_nb.metrics.passages import PASSAGES
from kani_nb.planning import plan_model, read_schemes
from kani_nb.quantization import Quantization
from kani_nb.serve.cli import main
from kani_nb.serve.terminal import ProgressLine
from tests.conftest import make_tokenizer

pytestmark = pytest.mark.quant

MIB = 2**20
TEXT = "the quick brown fox jumps over the lazy dog\nWhat is the capital of France? Paris."
SHORT = {"runs": 1, "max_new_tokens": 4, "text": TEXT}


@pytest.fixture
def here(clean_runtime):
    return clean_runtime


def config_of(folder, **changes) -> EngineConfig:
    return EngineConfig(str(folder), device="cpu", threads=1, **changes)


def living_models() -> int:
    gc.collect()
    return sum(type(each) is LlamaForCausalLM for each in gc.get_objects())


@pytest.fixture(scope="module")
def seen():
    """How many models were alive whenever the comparison of `compared` said that it begins to load one."""
    return []


@pytest.fixture(scope="module")
def compared(tiny_model, seen):
    """None and int8 on our own text; the steps are in `seen`."""
    with pytest.MonkeyPatch.context() as patch:
        rt = Runtime()
        patch.setattr(kani_nb._runtime, "_RUNTIME", rt)

        def progress(event):
            if event.detail == "loading":
                seen.append((event.stage, living_models()))

        yield asyncio.run(
            compare(config_of(tiny_model), read_schemes("none,int8"), runs=3, max_new_tokens=8, progress=progress)
        )
        rt.close()


@pytest.fixture(scope="module")
def mixed(tiny_model):
    """A scheme that cannot run, and none in two dtypes; memory beyond the bound is kept while the last one answers."""
    kept = []

    def leak(event):
        if (event.stage, event.detail) == ("none + bfloat16", "warming up"):
            kept.append(bytearray(b"x") * (RESIDENT_LEFTOVER_BYTES + 40 * MIB))

    with pytest.MonkeyPatch.context() as patch:
        rt = Runtime()
        patch.setattr(kani_nb._runtime, "_RUNTIME", rt)
        schemes, sweep = read_schemes("q4_k_m,none"), parse_sweep("dtype=float32,bfloat16")
        yield asyncio.run(compare(config_of(tiny_model), schemes, sweep=sweep, **SHORT, progress=leak))
        rt.close()


# What is measured.


def test_every_scheme_is_loaded_asked_and_read(compared):
    assert [row.label for row in compared.rows] == ["none", "int8"]
    for row in compared.rows:
        assert row.is_measured, row.reason
        assert len(row.ttft_runs_s) == len(row.tpot_runs_s) == 3
        assert min(*row.ttft_runs_s, *row.tpot_runs_s, row.load_s) > 0
        assert row.answer
        assert row.answer_tokens == 8
        assert (row.device, row.memory_source) == ("cpu", "rss")
        assert row.positions == compared.text_tokens > 100
    assert compared.row("int8").weight_bytes < compared.row("none").weight_bytes


def test_one_is_freed_before_the_next_is_loaded(compared, seen):
    assert [stage for stage, _ in seen] == ["reference none + float32", "none", "int8"]
    assert [alive for _, alive in seen] == [0, 0, 0]


def test_speed_ups_are_relative_to_the_first_row(compared):
    none, int8 = compared.rows
    assert compared.speed_up(none) == 1
    assert compared.speed_up(int8) == pytest.approx(none.tpot_s / int8.tpot_s)


def test_the_reference_is_the_highest_precision_and_no_distance_from_itself(compared):
    # The tiny model's own weights are float32.
    assert compared.reference == "float32 weights"
    none = compared.row("none")
    assert (none.kl_nats, none.top1_agreement) == (0, 1)
    assert none.perplexity == pytest.approx(compared.reference_perplexity)


async def test_weights_and_divergence_are_those_of_the_engine_alone(compared, tiny_model):
    reference, other = HuggingEngine(str(tiny_model), device="cpu", threads=1), None
    try:
        other = HuggingEngine(str(tiny_model), device="cpu", threads=1, quantization="int8")
        await other.load()
        row = compared.row("int8")
        assert row.weight_bytes == other.memory().weight_bytes
        total, agreeing, positions = 0.0, 0, 0
        for passage in PASSAGES:
            ids = reference.tokenizer(passage)["input_ids"]
            for start in range(0, len(ids), 256):
                piece = ids[start : start + 256]
                known, found = await reference.log_probs(piece), await other.log_probs(piece)
                total += float(torch.nn.functional.kl_div(found, known, reduction="sum", log_target=True))
                agreeing += int((known.argmax(-1) == found.argmax(-1)).sum())
                positions += len(piece)
        assert row.kl_nats == pytest.approx(total / positions, rel=1e-3)
        assert row.kl_nats > 0
        assert row.top1_agreement == pytest.approx(agreeing / positions)
    finally:
        await reference.close()
        await other.close()


def test_perplexity_is_transformers_own(mixed, tiny_model):
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_model)(TEXT)["input_ids"]])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert mixed.row("none + float32").perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert mixed.text_tokens == ids.shape[1]


def test_a_comparison_is_one_line_of_json(compared):
    record = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    assert [each["scheme"] for each in record["schemes"]] == ["none", "int8"]
    int8 = record["schemes"][1]
    assert int8["tpot_min_s"] <= int8["tpot_s"] <= int8["tpot_max_s"]
    assert int8["speed_up"] == pytest.approx(record["schemes"][0]["tpot_s"] / int8["tpot_s"])
    assert {
        "weight_bytes",
        "peak_bytes",
        "left_bytes",
        "left_resident_bytes",
        "kl_nats",
        "top1_agreement",
        "load_average",
    } <= set(int8)
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["environment"]["threads"] == 1


def test_the_table_says_how_it_was_measured(compared):
    text = compared.to_text()
    assert "One after the other, each loaded, asked and freed; the mean of 3 greedy runs of up to 8 tokens" in text
    assert "Load average when the runs began: none" in text
    assert f"torch {torch.__version__}" in text
    assert re.search(rf"on our own text: {compared.text_tokens:,} tokens in \d+ pieces", text)
    assert f"  none: {' '.join(compared.rows[0].answer.split())[:20]}" in text


# What is chosen.


def test_a_sweep_takes_each_value_of_the_schemes_that_have_the_setting(tiny_model):
    cases = expand(config_of(tiny_model), read_schemes("none,int8"), parse_sweep("llm_int8_threshold=3,6,10"))
    assert [case.label for case in cases] == [
        "none",
        "int8 + threshold=3.0",
        "int8 + threshold=6.0",
        "int8 + threshold=10.0",
    ]
    assert [case.config.quantization.llm_int8_threshold for case in cases] == [None, 3, 6, 10]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("double_quant=false,true", Sweep("double_quant", (False, True))),
        ("threshold=0,6", Sweep("llm_int8_threshold", (0.0, 6.0))),
        ("--llm-int8-threshold=3", Sweep("llm_int8_threshold", (3.0,))),
        ("group_size=32,64", Sweep("group_size", (32, 64))),
        ("bnb_4bit_compute_dtype=bf16,fp32", Sweep("compute_dtype", ("bfloat16", "float32"))),
        ("skip_modules=lm_head,q_proj", Sweep("llm_int8_skip_modules", (("lm_head",), ("q_proj",)))),
        ("dtype=bf16,float32", Sweep("dtype", ("bfloat16", "float32"))),
    ],
)
def test_a_sweep_is_read_as_its_option_would_be(text, expected):
    assert parse_sweep(text) == expected


def test_a_value_that_is_the_default_has_a_name_of_its_own(tiny_model):
    cases = expand(config_of(tiny_model), read_schemes("nf4"), parse_sweep("double_quant=false,true"))
    assert [case.label for case in cases] == ["nf4 + double_quant=False", "nf4 + double quant"]


def test_dtypes_can_be_swept(mixed):
    float32, bfloat16 = mixed.measured
    assert (float32.label, bfloat16.label) == ("none + float32", "none + bfloat16")
    assert (float32.dtype, bfloat16.dtype) == ("float32", "bfloat16")
    assert float32.kl_nats == 0 < bfloat16.kl_nats
    assert bfloat16.weight_bytes == pytest.approx(float32.weight_bytes / 2, rel=0.01)


@pytest.mark.parametrize("begins", [True, False])
def test_every_piece_of_a_text_begins_as_the_models_texts_do(begins):
    tokenizer = make_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = text_pieces(SimpleNamespace(tokenizer=tokenizer, max_context_size=8), [TEXT])
    first = [tokenizer.bos_token_id] if begins else []
    assert all(piece[: len(first)] == first and len(piece) <= 8 for piece in pieces)
    assert [token for piece in pieces for token in piece[len(first) :]] == whole


# What goes wrong.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runs": 0}, "runs is 0: it must be a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"text": " \n"}, "the text is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"quantizations": ()}, "there is nothing to compare"),
        ({"quantizations": [Quantization("nf5")]}, r"no quantization scheme 'nf5'[\s\S]*nf4"),
        ({"quantizations": [Quantization("int8", double_quant=True)]}, "double_quant=True was given with .*int8"),
        ({"sweep": Sweep("llm_int8_treshold", (3,))}, r"no setting 'llm_int8_treshold'[\s\S]*mean llm_int8_threshold"),
        ({"sweep": Sweep("double_quant", (True,))}, r"none of none, int8 has double_quant[\s\S]*nf4"),
        ({"sweep": Sweep("llm_int8_threshold", (-1,))}, r"llm_int8_threshold is -1"),
    ],
)
async def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(here, tiny_model, changes, said):
    arguments = {"quantizations": read_schemes("none,int8"), **SHORT, **changes}
    steps = []
    with pytest.raises(ConfigError, match=said):
        await compare(config_of(tiny_model), **arguments, progress=steps.append)
    assert steps == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("llm_int8_threshold", "must name a setting and its values"),
        ("llm_int8_threshold=", "must name a setting and its values"),
        ("threshhold=3", "did you mean threshold"),
        ("llm_int8_threshold=six", "llm_int8_threshold is 'six': it must be a number"),
        ("double_quant=maybe", "double_quant is 'maybe': it must be true or false"),
        ("group_size=1.5", "group_size is '1.5': it must be a whole number"),
        ("dtype=int3", "dtype is 'int3'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_sweep(text)


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin").write_bytes("über".encode("latin-1"))
    (tmp_path / "long").write_bytes(b"a" * (MIB + 1))
    for name, said in (
        ("nowhere", "No such file"),
        ("latin", "not UTF-8"),
        ("long", "at most 1 MiB"),
        ("", "directory"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_text(str(tmp_path / name))


async def test_an_unknown_model_is_one_error_and_no_table(here):
    with pytest.raises(UnknownModelError, match="no model 'smollm22'"):
        await compare(EngineConfig("smollm22"), read_schemes("none,int8"), **SHORT)


def test_a_scheme_that_fails_is_a_row_with_its_reason_and_the_others_go_on(mixed):
    failed, _, first, _ = mixed.rows
    assert not failed.is_measured
    assert failed.reason == "q4_k_m is no scheme of the engine hf: llamacpp runs it"
    assert mixed.speed_up(first) == 1
    assert f"{failed.label} was not measured: {failed.reason}" in mixed.to_text()
    assert json.loads(json.dumps(mixed.to_dict()))["schemes"][0]["is_measured"] is False


def test_memory_that_does_not_come_back_is_told_of(mixed):
    float32, bfloat16 = mixed.measured
    assert float32.left_bytes < LEFTOVER_BYTES < bfloat16.left_bytes
    assert not any("after it was freed" in note for note in float32.notes)
    assert [note for note in bfloat16.notes if "after it was freed, " in note and "something of it is held" in note]


async def test_where_nothing_can_be_measured_the_first_reason_is_raised(here):
    with pytest.raises(ConfigError, match="int8 is no scheme of the engine echo"):
        await compare(EngineConfig("echo"), read_schemes("int8,nf4"), **SHORT)


async def test_where_the_highest_precision_does_not_fit_the_next_is_the_reference(here, tiny_model):
    peaks = [plan_model(str(tiny_model), dtype=dtype).row("none").peak_bytes for dtype in ("float32", "bfloat16")]
    limit = f"cpu={sum(peaks) / 2 / 1024:.0f}KiB"
    found = await compare(config_of(tiny_model, dtype="bfloat16", max_memory=limit), read_schemes("none"), **SHORT)
    assert found.reference == "bfloat16 weights"
    assert "none + float32" in found.notes[0]
    assert found.notes[0].endswith("so the reference is none + bfloat16")
    assert found.rows[0].kl_nats == 0


async def test_a_checkpoint_that_is_quantized_already_is_called_what_it_is(here, tiny_model, tmp_path):
    engine = HuggingEngine(str(tiny_model), quantization="cpu-int8", threads=1)
    await engine.load()
    folder = await engine.save(tmp_path / "saved")
    await engine.close()
    found = await compare(config_of(folder), read_schemes("none"), **SHORT)
    assert [row.label for row in found.rows] == [found.reference] == ["cpu-int8"]


async def test_an_engine_without_probabilities_is_timed_and_not_judged(here):
    began = time.perf_counter()
    found = await compare(EngineConfig("echo:delay=0.01"), read_schemes("none,int8"), **SHORT)
    took = time.perf_counter() - began
    none, int8 = found.rows
    assert none.tpot_s > 0.009, "it slept so long for each token"
    assert none.tpot_s * (SHORT["max_new_tokens"] - 1) < took, "and not longer than all took"
    assert (none.kl_nats, none.perplexity, found.reference) == (None, None, "")
    assert "EchoEngine gives no probabilities" in found.to_text()
    assert "int8 is no scheme of the engine echo" in int8.reason


async def test_cancelling_frees_the_model_and_what_was_measured_has_been_handed_out(here, tiny_model):
    loop, results, steps = asyncio.get_running_loop(), [], []

    def progress(event):
        steps.append(event)
        if event.stage == "none" and event.detail.startswith("answering"):
            loop.call_soon_threadsafe(task.cancel)

    schemes, tokens = read_schemes("q4_k_m,none"), {"max_new_tokens": 400}
    running = compare(config_of(tiny_model), schemes, **SHORT | tokens, progress=progress, on_result=results.append)
    task = asyncio.ensure_future(running)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [row.label for row in results[-1].rows] == ["q4_k_m"]
    assert not any(step.detail.startswith("reading") for step in steps if step.stage == "none")
    here.close()  # waits for the task on the runtime's own loop, which ends by itself
    assert living_models() == 0


# The command line.


def test_the_command_ends_with_one_line_of_json_and_leaves_loaded_engines_alone(here, tiny_model, tmp_path, capsys):
    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    mine = here.load_sync(config_of(tiny_model), name="mine").engine
    words = ["--schemes", "none", "--runs", "1", "--max-new-tokens", "4", "--device", "cpu", "--text", str(text)]
    assert main(["compare", "echo:delay=0.01", *words, "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])
    assert record["schemes"][0]["scheme"] == "none"
    assert record["schemes"][0]["is_measured"]
    assert any(line.startswith("scheme ") for line in lines[:-1])
    assert any("mine on cpu stayed loaded" in line for line in lines[:-1])
    assert record["environment"]["beside"] == ["mine on cpu"]
    assert here.engine is mine
    assert mine.is_loaded


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schemes", "none,nf5"], "nf4"),
        (["--schemes", ","], "--schemes none"),
        (["--sweep", "treshold=3"], "did you mean threshold"),
        (["--runs", "0"], "runs is 0"),
        (["--text", "nowhere.txt"], "No such file"),
    ],
)
def test_a_wrong_command_is_one_paragraph_and_exit_code_2(here, capsys, words, said):
    assert main(["compare", "smollm2", *words]) == 2
    caught = capsys.readouterr()
    assert said in caught.err
    assert len(caught.err.strip().splitlines()) <= 3


def test_ctrl_c_prints_what_there_is_and_ends_with_130(here, capsys, monkeypatch):
    answers = []

    def progress(self, event):
        answers.append(event.detail)
        if (event.stage, event.detail) == ("none + bfloat16", "warming up"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressLine, "progress", progress)
    words = ["--schemes", "none", "--sweep", "dtype=float32,bfloat16", "--runs", "1", "--json"]
    assert main(["compare", "echo:delay=0.005", *words]) == 130
    caught = capsys.readouterr()
    assert "interrupted" in caught.err
    assert "none + float32" in caught.out
    assert "none + bfloat16" not in caught.out
    assert not caught.out.strip().splitlines()[-1].startswith("{")
    assert "answering, run 1 of 1" in answers
