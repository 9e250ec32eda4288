"""What fits before anything is loaded: published models on named cards, what is recommended, and what is refused."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.config import parse_config
from kani_nb.errors import ConfigError, DoesNotFitError
from kani_nb.hardware import plan_rows
from kani_nb.hardware.planner import budgets_of, default_context, make_plan, plan_row, refusal
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.recommending import recommend
from kani_nb.hardware.schemes import find_scheme
from kani_nb.quantization import Quantization
from tests.hardware.published import published, seconds_of_reading

_GIB = 2**30


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """Where llama.cpp is installed, plans have rows for types of GGUF files too."""
    monkeypatch.setattr("kani_nb.hardware.planner.missing_packages", lambda scheme: ("llama_cpp",))


NF4, INT8 = Quantization("nf4"), Quantization("int8")


def cpu(usable, *features, bandwidth=None):
    return Budget(
        name="cpu",
        description="a CPU",
        total_bytes=usable,
        usable_bytes=usable,
        cpu_features=features,
        bandwidth_bytes_per_s=bandwidth,
    )


@pytest.mark.parametrize(
    ("model", "parameters", "kv_per_token"),
    [
        ("llama-7B", 6_738_415_616, 2 * 32 * 4096 * 2),
        ("llama-3-70B", 70_553_706_496, 2 * 80 * 8 * 128 * 2),  # grouped queries: 8 of 64 heads are kept
        ("mixtral-8x7B", 46_702_792_704, 2 * 32 * 8 * 128 * 2),
        ("qwen3-30B-A3B", 30_532_122_624, 2 * 48 * 4 * 128 * 2),
        ("gemma-3-27B", 27_009_346_304, 2 * 62 * 16 * 128 * 2),
    ],
)
def test_a_published_model_is_counted_as_published(model, parameters, kv_per_token):
    plan = make_plan(published(model), budgets=budgets_of("h200"), quantizations=["none"])
    row = plan.row("none")
    assert plan.parameters == parameters
    assert row.weight_bytes == pytest.approx(2 * parameters, rel=1e-4)
    assert row.kv_bytes_per_token == kv_per_token
    assert row.peak_bytes == row.weight_bytes + row.kv_bytes + row.working_bytes
    assert (plan.context_tokens, default_context(published(model))) == (2048, 2048)
    assert "since none were asked for" in plan.notes[0]


def test_a_plan_of_65_billion_parameters_takes_less_than_two_seconds_of_computing():
    seconds_of_reading("llama-7B")  # imports what has to be imported
    seconds_of_reading("llama-65B")
    started = time.process_time()
    plan = make_plan(published("llama-65B"), budgets=budgets_of("2x3090"))
    assert time.process_time() - started + seconds_of_reading("llama-65B") < 2
    assert len(plan.rows) == 6


def test_layers_with_a_window_keep_no_more_than_it():
    gemma, tokens = published("gemma-3-27B"), 32768
    row = plan_row(gemma, Quantization(), budgets=budgets_of("h100"), context_tokens=tokens)
    per_layer = 2 * 16 * 128 * 2
    assert row.kv_bytes == pytest.approx((10 * tokens + 52 * 1024) * per_layer, rel=0.001)
    plan = make_plan(gemma, budgets=budgets_of("h100"), context_tokens=tokens, quantizations=["none"])
    assert "52 of 62 layers keep no more than 1,024 tokens" in plan.notes
    assert plan.context_tokens == tokens


def test_a_quantized_cache_takes_a_third_of_a_plain_one():
    arguments = {"budgets": budgets_of("h100"), "context_tokens": 8192}
    plain = plan_row(published("llama-3-70B"), NF4, **arguments)
    four_bits = plan_row(published("llama-3-70B"), NF4, kv_bits=4, **arguments)
    assert 0.2 < four_bits.kv_bytes / plain.kv_bytes < 0.35
    assert four_bits.weight_bytes == plain.weight_bytes
    assert four_bits.ceiling_tokens_per_s > plain.ceiling_tokens_per_s
    said = make_plan(published("llama-3-70B"), kv_bits=4, quantizations=["nf4"], **arguments).notes
    assert any(note.startswith("the KV cache is counted in 4 bits, all but its last 128 tokens") for note in said)
    windowed = make_plan(published("gemma-3-27B"), kv_bits=4, quantizations=["nf4"], **arguments)
    assert windowed.best.kv_bytes == plan_row(published("gemma-3-27B"), NF4, **arguments).kv_bytes
    assert any(note.startswith("the KV cache cannot be quantized") for note in windowed.notes)


def test_a_mixture_of_experts_is_held_whole_and_read_in_part():
    h100 = budgets_of("2xh100")
    mixture = make_plan(published("mixtral-8x7B"), budgets=h100, quantizations=["none", "nf4"])
    assert any("all 8 experts of a layer are held, and each token reads 2" in note for note in mixture.notes)
    none = mixture.row("none")
    # 12.9 of 46.7 billion are active, says its paper (arXiv 2401.04088).
    active = h100[0].bandwidth_bytes_per_s / none.ceiling_tokens_per_s - none.kv_bytes
    assert active / 2 == pytest.approx(12.9e9, rel=0.02)
    # bitsandbytes has no product for experts in one tensor: they stay, and it is said.
    assert mixture.row("nf4").weight_bytes > 0.95 * none.weight_bytes
    assert "nf4 leaves the experts as they are, 84.0 GiB of them" in mixture.row("nf4").notes
    qwen = plan_row(published("qwen3-30B-A3B"), Quantization(), budgets=h100, context_tokens=1)
    active = h100[0].bandwidth_bytes_per_s / qwen.ceiling_tokens_per_s
    assert active / 2 == pytest.approx(3.3e9 - 151936 * 2048, rel=0.1)  # 3.3 billion, its table of inputs among them


def test_on_a_t4_bfloat16_becomes_float16_and_the_plan_says_so():
    row = plan_row(published("llama-3-70B"), NF4, budgets=budgets_of("4xt4"))
    assert row.dtype == "float16"
    assert any("7.5 has no bfloat16" in note for note in row.notes)
    ampere = plan_row(published("llama-3-70B"), NF4, budgets=budgets_of("2x3090"))
    assert ampere.dtype == "bfloat16"
    assert not any("bfloat16" in note for note in ampere.notes)


def test_the_best_answers_that_fit_with_headroom_are_recommended():
    llama = published("llama-7B")
    chosen = {card: make_plan(llama, budgets=budgets_of(card)).best for card in ("3090", "3080", "3050", "1660")}
    assert {card: row.label for card, row in chosen.items()} == {
        "3090": "none",
        "3080": "int8",
        "3050": "nf4",
        "1660": "nf4 + double quant",
    }
    assert all(row.has_headroom for card, row in chosen.items())
    assert "KL divergence 0.27 nats" in chosen["3050"].notes[-1]
    # A V100 has no int8 (7.0); the next best is taken.
    volta = make_plan(llama, budgets=[replace(budgets_of("v100-16")[0], usable_bytes=12 * _GIB)])
    assert "needs compute capability 7.5" in volta.row("int8").why_not
    assert volta.best.settings.scheme == "nf4"


def test_what_fits_without_headroom_is_recommended_last_and_called_tight():
    llama = published("llama-7B")
    needed = plan_row(llama, INT8, budgets=budgets_of("3090")).peak_bytes
    card = replace(budgets_of("3090")[0], usable_bytes=needed)
    only = make_plan(llama, budgets=[card], quantizations=["int8"])
    assert only.best.fits
    assert not only.best.has_headroom
    assert "it is tight" in only.best.notes[-1]
    assert make_plan(llama, budgets=[card]).best.label == "nf4"
    assert make_plan(llama, budgets=[replace(card, usable_bytes=needed - 1)], quantizations=["int8"]).best is None
    assert only.best.recommended_bytes == pytest.approx(1.1 * needed + _GIB / 2, abs=2)


def test_on_a_cpu_the_fastest_of_the_good_ones_is_recommended():
    llama, fast = published("llama-7B"), ("avx2", "avx512f", "avx512_bf16")
    roomy = make_plan(llama, budgets=[cpu(64 * _GIB, *fast, bandwidth=30e9)])
    assert roomy.best.label == "cpu-int8"
    assert "1.8 times the speed of bfloat16 (measured on a server CPU)" in roomy.best.notes[-1]
    assert {row.settings.scheme for row in roomy.rows} == {"none", "int8", "nf4", "fp4", "cpu-int8", "cpu-int4", "gptq"}
    assert roomy.row("none").dtype == "float32"  # float16 weights on a CPU
    assert make_plan(llama, budgets=[cpu(7 * _GIB, *fast)]).best.label == "cpu-int4"
    measured = make_plan(llama, budgets=[cpu(64 * _GIB, *fast)], cpu_speeds={"cpu-int8": 0.5, "int8": 0.7})
    assert measured.best.label == "none"
    small = make_plan(llama, budgets=[cpu(7 * _GIB, *fast)], cpu_speeds={"nf4": 3.5, "cpu-int4": 2.0})
    assert small.best.label == "cpu-int4"  # nf4 would be faster, and its answers are too much worse
    assert "measured on this CPU" in small.best.notes[-1]
    old = make_plan(llama, budgets=[cpu(64 * _GIB, "avx2")])
    assert "slow here: this CPU has no avx512_bf16" in old.row("nf4").notes
    assert roomy.row("nf4").notes.count("slow here: this CPU has no avx512_bf16") == 0


def test_nothing_is_recommended_where_nothing_fits():
    plan = make_plan(published("llama-3-70B"), budgets=budgets_of("t4"))
    assert plan.best is None
    assert all(row.why_not.startswith("it needs") for row in plan.rows)
    assert all(row.device_map == {} for row in plan.rows)
    assert plan.to_dict()["recommended"] is None
    assert recommend([], "cuda") == (None, "")


def test_gptq_is_planned_and_never_recommended_for_a_plain_checkpoint():
    plan = make_plan(published("llama-7B"), budgets=budgets_of("1660"), quantizations=["gptq", "fp4"])
    assert plan.row("gptq").fits
    assert plan.best.label == "fp4"


def test_schemes_of_llama_cpp_are_planned_only_where_its_engine_is():
    from importlib.metadata import entry_points

    labels = {row.settings.scheme for row in make_plan(published("llama-7B"), budgets=budgets_of("3090")).rows}
    has_engine = any(each.name == "llamacpp" for each in entry_points(group="kani_nb.engines"))
    assert has_engine or "q4_k_m" not in labels
    asked = plan_row(published("llama-7B"), Quantization("q4_k_m"), budgets=budgets_of("3090"))
    assert asked.weight_bytes == pytest.approx(6_738_415_616 * 4.85 / 8, rel=0.01)
    assert asked.line == ""  # it is a kind of files, and nothing that a checkpoint is made into
    assert "load a .gguf file of llama-7B that has q4_k_m" in asked.notes


def test_a_model_is_spread_over_the_cards_with_the_cache_of_the_layers_that_are_there():
    row = plan_row(published("llama-65B"), NF4, budgets=budgets_of("2x3090"))
    assert row.fits
    first, second = row.shares
    assert row.kv_bytes == first.kv_bytes + second.kv_bytes
    layers = [place for block, place in row.device_map.items() if ".layers." in block]
    assert first.kv_bytes == layers.count("cuda:0") * row.kv_bytes // 80
    assert max(first.peak_bytes, second.peak_bytes) < 1.05 * min(first.peak_bytes, second.peak_bytes)
    assert set(row.device_map) == set(published("llama-65B").blocks)
    assert row.ceiling_tokens_per_s == pytest.approx(
        plan_row(published("llama-65B"), NF4, budgets=budgets_of("a100-80")).ceiling_tokens_per_s * 936 / 2039, rel=0.01
    )
    alone = plan_row(published("llama-7B"), NF4, budgets=budgets_of("2x3090"))
    assert alone.device_map == {"": "cuda:0"}
    halves = plan_row(published("llama-7B"), NF4, budgets=budgets_of("2x3090"), device_map="balanced")
    assert len(halves.shares) == 2


def test_nothing_is_offloaded_unless_it_is_allowed_and_then_it_is_counted_unquantized():
    llama, devices = published("llama-3-70B"), budgets_of("3090, cpu=256GiB")
    refused = plan_row(llama, NF4, budgets=devices)
    assert (refused.fits, refused.device_map) == (False, {})
    allowed = plan_row(llama, NF4, budgets=devices, allow_offload=True)
    assert not allowed.fits
    assert set(allowed.device_map.values()) == {"cuda:0", "cpu"}
    card, memory = allowed.shares
    assert card.peak_bytes <= devices[0].usable_bytes
    assert "fits only with" in allowed.why_not
    assert "of the weights kept on cpu" in allowed.why_not
    moved = [tensor for tensor in llama.tensors if allowed.device_map.get(tensor.block) == "cpu"]
    assert memory.weight_bytes == pytest.approx(2 * sum(tensor.elements for tensor in moved), rel=0.001)
    assert memory.kv_bytes == 0
    assert allowed.ceiling_tokens_per_s is None  # nobody knows how fast that memory is
    slow = replace(devices[1], bandwidth_bytes_per_s=30e9)
    known = plan_row(llama, NF4, budgets=[devices[0], slow], allow_offload=True)
    assert known.ceiling_tokens_per_s == pytest.approx(30e9 / memory.weight_bytes, rel=0.2)
    assert make_plan(llama, budgets=devices, allow_offload=True).best is None


def test_only_what_can_be_kept_aside_is_offloaded():
    llama, small = published("llama-7B"), [cpu(12 * _GIB, "avx2")]
    plain = plan_row(llama, Quantization(), budgets=small, dtype="bfloat16", allow_offload=True)
    assert set(plain.device_map.values()) == {"cpu", "disk"}
    assert plain.shares[0].peak_bytes <= small[0].usable_bytes
    # On a CPU bitsandbytes would leave the whole model unquantized, and torch's packed weights cannot be moved.
    for scheme in ("int8", "cpu-int8"):
        row = plan_row(llama, Quantization(scheme), budgets=[cpu(4 * _GIB, "avx2")], allow_offload=True)
        assert row.device_map == {}
        assert f"{scheme} cannot be kept aside on the disk" in row.notes


def test_a_map_of_the_users_own_is_kept_and_measured_even_where_it_cuts_a_layer():
    llama, devices = published("llama-7B"), budgets_of("2x3090, cpu=64GiB")
    told = {"": 0, "model.layers.31.mlp": 1, "lm_head": "cpu"}
    row = plan_row(llama, Quantization(), budgets=devices, device_map=told)
    # Spelled out, since something is kept aside: the layers, one of them in its parts, and the rest.
    apart = {"model.layers.31.mlp": "cuda:1", "lm_head": "cpu"}
    assert row.device_map == dict.fromkeys(row.device_map, "cuda:0") | apart
    assert "" not in row.device_map
    assert len(row.device_map) > 34
    near = plan_row(llama, Quantization(), budgets=devices, device_map={"": 0, "model.layers.31.mlp": 1})
    assert near.device_map == {"": "cuda:0", "model.layers.31.mlp": "cuda:1"}
    assert row.fits  # what is on the CPU was put there by hand
    held = {share.device: share for share in row.shares}
    assert held["cuda:1"].weight_bytes == 3 * 4096 * 11008 * 2
    assert held["cpu"].weight_bytes == 4096 * 32000 * 2
    assert (held["cuda:1"].kv_bytes, held["cuda:0"].kv_bytes) == (0, row.kv_bytes)
    assert (
        sum(share.weight_bytes for share in row.shares) == plan_row(llama, Quantization(), budgets=devices).weight_bytes
    )
    assert parse_config(row.line).device_map == json.dumps({"": "cuda:0", **apart})


def test_a_tied_head_stays_with_its_embedding():
    gemma = published("gemma-3-27B")
    row = plan_row(gemma, NF4, budgets=budgets_of("2x3090"), device_map="balanced")
    assert row.fits
    assert row.device_map["lm_head"] == row.device_map["model.embed_tokens"] == "cuda:0"
    told = plan_row(gemma, NF4, budgets=budgets_of("2x3090"), device_map={"model": 1, "lm_head": 0})
    assert {share.device: share.weight_bytes for share in told.shares}.get("cuda:0", 0) == 0


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 0, "model.layer.0": 1}, r"names 'model.layer.0', which is no module.*\n→ did you mean model.layers.0"),
        ({"model.layers": 0}, r"has no place for model.embed_tokens, .*lm_head"),
        ("cuda:5", r"there is no cuda:5 here"),
    ],
)
def test_a_map_that_does_not_belong_to_the_model_is_refused(device_map, message):
    with pytest.raises(ConfigError, match=message):
        plan_row(published("llama-7B"), NF4, budgets=budgets_of("3090"), device_map=device_map)


def test_a_setting_that_the_scheme_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="double_quant=True was given with the scheme int8"):
        plan_row(published("llama-7B"), Quantization("int8", double_quant=True), budgets=budgets_of("3090"))


@pytest.mark.parametrize(
    ("own", "label", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq", 4.16),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 4.16),
    ],
)
def test_a_checkpoint_that_is_quantized_already_has_one_row_of_its_own(own, label, bits):
    shape = replace(published("llama-7B"), prequantized=own)
    plan = make_plan(shape, budgets=budgets_of("3090"), quantizations=["none", "int8"])
    (row,) = plan.rows
    assert row.label.startswith(label)
    assert "(the checkpoint's own)" in row.label
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert row.weight_bytes == pytest.approx(linear * bits / 8 + 2 * 2 * 32000 * 4096, rel=0.01)
    assert plan.recommended == 0
    assert row.line == "%load_engine llama-7B"
    assert row.ceiling_tokens_per_s > 0
    assert any("quantized already" in note for note in plan.notes)


def test_a_checkpoint_without_a_dtype_is_counted_by_the_size_of_its_files():
    shape = replace(published("llama-7B"), checkpoint_dtype=None)
    assert plan_row(shape, Quantization(), budgets=budgets_of("h100")).weight_bytes == pytest.approx(
        4 * 6.738e9, rel=0.01
    )
    half = plan_row(shape, Quantization(), budgets=budgets_of("h100"), file_bytes=13_476_839_424)
    assert (half.dtype, half.disk_bytes) == ("float16", 13_476_839_424)
    assert half.weight_bytes == pytest.approx(2 * 6.738e9, rel=0.01)


def test_where_llama_cpp_is_installed_files_of_its_types_are_planned_and_never_recommended(monkeypatch):
    monkeypatch.setattr("kani_nb.hardware.planner.missing_packages", lambda scheme: ())
    monkeypatch.setattr("kani_nb.hardware.precision.missing_packages", lambda scheme: "")
    plan = make_plan(published("llama-7B"), budgets=[cpu(30 * _GIB)])
    names = [row.settings.scheme for row in plan.rows]
    assert {"q4_k_m", "q8_0"} <= set(names)
    assert plan.best is not None
    assert plan.best.line
    small = make_plan(published("llama-65B"), budgets=[cpu(32 * _GIB)])
    assert "q2_k" in {row.settings.scheme for row in small.rows if row.fits} <= {"q2_k", "q3_k_m"}
    assert small.best is None


def test_the_line_of_a_row_loads_what_was_planned():
    llama = published("llama-7B")
    for row in make_plan(llama, name="org/llama", budgets=budgets_of("3090")).rows:
        config = parse_config(row.line)
        assert (config.model, config.quantization, config.max_context_size) == ("org/llama", row.settings, None)
    asked = plan_row(
        llama, NF4, name="x", budgets=budgets_of("3090, cpu=9GiB"), context_tokens=512, dtype="float16",
        device_map="cuda", allow_offload=True,
    )  # fmt: skip
    config = parse_config(asked.line)
    assert (config.max_context_size, config.dtype, config.device) == (512, "float16", "cuda:0")
    assert config.allow_offload
    assert plan_row(replace(llama, name=""), NF4, budgets=budgets_of("3090")).line == ""


def test_a_plan_is_plain_json():
    made = json.loads(json.dumps(make_plan(published("llama-7B"), budgets=budgets_of("2x3070")).to_dict()))
    assert made["recommended"] == "int8"
    row = next(each for each in made["schemes"] if each["scheme"] == "int8")
    assert row["fits"]
    assert set(row["devices"]) == {"cuda:0", "cuda:1"}
    assert {"weight_bytes", "kv_bytes_per_token", "peak_bytes", "most_context_tokens", "line"} <= set(row)


@settings(max_examples=25)
@given(st.integers(4 * _GIB, 40 * _GIB), st.sampled_from(["none", "int8", "nf4"]))
def test_the_longest_context_that_fits_fits_and_one_token_more_does_not(usable, scheme):
    llama = replace(published("llama-7B"), context_tokens=65536)
    card = [replace(budgets_of("a100-80")[0], usable_bytes=usable)]
    row = plan_row(llama, Quantization(scheme), budgets=card)
    most = row.most_context_tokens
    assert row.fits == (most >= 2048)
    if most:
        assert plan_row(llama, Quantization(scheme), budgets=card, context_tokens=most).fits
    if most < 65536:
        assert not plan_row(llama, Quantization(scheme), budgets=card, context_tokens=most + 1).fits


def test_a_refusal_has_the_numbers_and_two_remedies():
    llama, devices = published("llama-7B"), budgets_of("3060, cpu=64GiB")
    row = plan_row(llama, Quantization(), budgets=devices)
    error = refusal(llama, row, budgets=devices, name="org/llama")
    assert isinstance(error, DoesNotFitError)
    text = str(error)
    assert "org/llama in float16 does not fit: it needs 13." in text
    assert "and cuda:0 has 11.3 GiB for it" in text
    assert "12.6 GiB of weights, 1.0 GiB of KV cache at 2,048 tokens" in text
    assert "→ %load_engine org/llama --quant=int8 takes 7." in text
    assert "; or --allow-offload keeps" in text


def test_a_refusal_offers_a_shorter_context_where_that_helps():
    llama, devices = published("llama-7B"), budgets_of("3080")
    arguments = {"budgets": devices, "context_tokens": 8192}
    row = plan_row(llama, INT8, **arguments)
    assert not row.fits
    text = str(refusal(llama, row, **arguments))
    assert "--quant=nf4 --max-context-size=8192 takes" in text
    assert f"; or --max-context-size {row.most_context_tokens} fits" in text


def test_a_refusal_where_nothing_helps_says_what_else_could_be_done():
    shape = replace(published("llama-7B"), prequantized={"quant_method": "bitsandbytes", "load_in_8bit": True})
    devices = [replace(budgets_of("1660")[0], usable_bytes=_GIB // 8)]
    row = plan_row(shape, Quantization(), budgets=devices, allow_offload=True)
    text = str(refusal(shape, row, budgets=devices, allow_offload=True))
    assert "→ take a smaller model; or free what else holds memory (%unload_engine)" in text


def test_a_scheme_of_the_cpu_alone_is_planned_there_beside_a_card():
    devices = [*budgets_of("3090"), cpu(64 * _GIB, "avx2")]
    row = plan_row(published("llama-7B"), Quantization("cpu-int8"), budgets=devices)
    assert row.device_map == {"": "cpu"}
    labels = {each.label for each in make_plan(published("llama-7B"), budgets=devices).rows}
    assert not labels & {"cpu-int8", "cpu-int4"}
    assert find_scheme("cpu-int8").devices == {"cpu"}


def test_too_little_main_memory_for_loading_is_said_and_not_refused():
    devices = [*budgets_of("3090"), cpu(_GIB // 2)]
    row = plan_row(published("llama-7B"), NF4, budgets=devices)
    assert row.fits
    assert any(note.startswith("loading takes") and "512 MiB of it may be used" in note for note in row.notes)


def test_without_any_device_nothing_fits_and_the_size_is_still_told():
    row = plan_row(published("llama-7B"), NF4, budgets=[])
    assert row.why_not == "there is no device to compute on"
    assert row.weight_bytes == plan_row(published("llama-7B"), NF4, budgets=budgets_of("3090")).weight_bytes
    assert plan_rows.HEADROOM == 0.1
