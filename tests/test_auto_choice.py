"""`%load_engine auto`: what is taken on which machine, and that it says why."""

from __future__ import annotations

import pytest

from kani_nb._amounts import in_words as memory
from kani_nb.auto_choice import LEAST_CEILING_TOKENS_PER_S, auto_shape, choose_auto
from kani_nb.config import EngineConfig, parse_config
from kani_nb.engines.auto_models import AUTO_MODELS
from kani_nb.errors import DoesNotFitError, ModelUnavailableError
from kani_nb.hardware.budgets import budgets_of
from kani_nb.hardware.plans import Budget
from kani_nb.plan_text import disk
from kani_nb.quantization import Quantization

GIB = 2**30
ORDER = [model.name for model in AUTO_MODELS]


def cpu(gib: float, gb_per_s: float = 31.0) -> tuple[Budget, ...]:
    """A machine without a GPU; 31 GB/s were measured on two threads of a server CPU."""
    usable = int(gib * GIB)
    return (
        Budget(
            name="cpu",
            description="a CPU",
            total_bytes=usable,
            usable_bytes=usable,
            bandwidth_bytes_per_s=gb_per_s * 1e9,
            cpu_features=("avx2", "avx512f", "avx512_bf16"),
        ),
    )


@pytest.mark.parametrize("model", AUTO_MODELS, ids=lambda model: model.name)
def test_the_sizes_that_ship_give_the_published_number_of_parameters(model):
    shape = auto_shape(model.name)
    assert shape.parameters == pytest.approx(model.alias.parameters, rel=0.005)
    assert shape.context_tokens == model.context_tokens
    assert model.alias.licence == "Apache-2.0"


@pytest.mark.parametrize(
    ("budgets", "name", "scheme"),
    [
        (cpu(1), "qwen2.5-0.5b", "cpu-int8"),
        (cpu(64, 27), "qwen2.5-1.5b", "cpu-int4"),
        (cpu(64, 300), "qwen2.5-14b", "cpu-int8"),
        (cpu(0.4), "smollm2", "cpu-int8"),
        (budgets_of("1660"), "qwen3-4b", "int8"),
        (budgets_of("3060"), "qwen2.5-14b", "nf4"),
        (budgets_of("T4"), "qwen2.5-14b", "nf4"),
        (budgets_of("3090"), "qwen2.5-32b", "nf4"),
        (budgets_of("2x3090"), "qwen2.5-32b", "int8"),
        (budgets_of("A100-80"), "qwen2.5-32b", "none"),
        (budgets_of("8xH100"), "qwen2.5-32b", "none"),
    ],
    ids=lambda each: (
        each if isinstance(each, str) else f"{len(each)}x{each[0].description}-{each[0].usable_bytes >> 20}"
    ),
)
def test_each_machine_gets_the_largest_that_fits_and_is_quick(budgets, name, scheme):
    choice = choose_auto(budgets)
    assert (choice.config.model, choice.config.quantization.scheme) == (name, scheme)
    row = choice.plan.row(choice.config.quantization.label)
    assert row.fits
    assert row.peak_bytes <= sum(each.usable_bytes for each in budgets)
    assert row.ceiling_tokens_per_s >= LEAST_CEILING_TOKENS_PER_S


def test_the_same_machine_always_gets_the_same():
    assert choose_auto(budgets_of("T4")) == choose_auto(budgets_of("T4"))


def test_more_memory_and_more_bandwidth_never_give_a_smaller_model():
    taken = [ORDER.index(choose_auto(cpu(gib, 400)).config.model) for gib in (0.4, 1, 4, 16, 64)]
    assert taken == sorted(taken)
    taken = [ORDER.index(choose_auto(cpu(64, speed)).config.model) for speed in (5, 31, 100, 400)]
    assert taken == sorted(taken)


def test_the_sentence_names_the_numbers_and_what_was_left_out():
    choice = choose_auto(budgets_of("T4"))
    row = choice.plan.row(choice.config.quantization.label)
    assert f"takes {memory(row.peak_bytes)} of 14.2 GiB on cuda:0" in choice.why
    assert f"is a download of {disk(row.disk_bytes)}" in choice.why
    assert "The next larger, qwen2.5-32b, takes more than 14.2 GiB." in choice.why
    assert "The next larger, qwen3-4b, fits, and would give at most" in choose_auto(cpu(64)).why
    assert "is on this disk" in choose_auto(budgets_of("T4"), cached={"qwen2.5-14b"}).why


def test_the_context_is_the_most_that_fits():
    config = choose_auto(budgets_of("3060")).config
    assert config.max_context_size % 1024 == 0
    assert 4096 <= config.max_context_size < 32768
    assert choose_auto(budgets_of("A100-80")).config.max_context_size is None


def test_offline_only_what_is_here_or_in_the_package_index_is_taken():
    budgets = budgets_of("3090")
    assert choose_auto(budgets, is_offline=True).config.model == "smollm2"
    choice = choose_auto(budgets, is_offline=True, cached={"qwen2.5-1.5b", "smollm2"})
    assert choice.config.model == "qwen2.5-1.5b"
    assert "qwen3-4b, is not on this disk, and the Hub cannot be asked" in choice.why
    with pytest.raises(ModelUnavailableError, match="no model of the short list can be had from here"):
        choose_auto(budgets, is_offline=True, asked=EngineConfig("auto", local_only=True))


def test_a_download_must_fit_on_the_disk_unless_it_is_there_already():
    budgets = budgets_of("3090")
    choice = choose_auto(budgets, free_disk_bytes=10 * 10**9)
    assert choice.config.model == "qwen3-4b"
    assert "qwen2.5-14b, is a download of 29.5 GB, and 10.0 GB of disk are free" in choice.why
    assert choose_auto(budgets, free_disk_bytes=0, cached={"qwen2.5-32b"}).config.model == "qwen2.5-32b"


def test_a_machine_too_slow_for_all_of_them_gets_the_smallest_and_is_told():
    choice = choose_auto(cpu(64, 1.5))
    assert choice.config.model == "smollm2"
    assert "the smallest that can be had, and none would keep pace with a reader here" in choice.why
    kept = choose_auto(cpu(64, 5), is_offline=True, cached={"qwen3-4b"}, asked=EngineConfig("auto", local_only=True))
    assert kept.config.model == "qwen3-4b"


def test_where_nothing_fits_it_is_refused_with_the_numbers():
    with pytest.raises(DoesNotFitError) as refused:
        choose_auto(cpu(0.05))
    assert "the smallest, smollm2, takes more than 51 MiB" in str(refused.value)


def test_what_was_asked_for_beside_the_model_is_kept():
    asked = parse_config("auto --quant nf4 --double-quant --max-context-size 2048 --max-new-tokens 99 --threads 3")
    config = choose_auto(cpu(16, 400), asked=asked).config
    assert config.quantization == Quantization("nf4", double_quant=True)
    assert (config.max_context_size, config.threads, config.generation.max_new_tokens) == (2048, 3, 99)
    assert config.model in ORDER


def test_the_smallest_are_not_taken_in_four_bits_unless_asked_for():
    for gib in (0.4, 0.6, 0.8):
        assert choose_auto(cpu(gib)).config.quantization.scheme in ("none", "int8", "cpu-int8")
    asked = EngineConfig("auto", quantization=Quantization("nf4"))
    assert choose_auto(cpu(0.6), asked=asked).config.quantization.scheme == "nf4"
