"""Cards are found by the names that people and drivers give them, and bandwidth is computed, looked up or measured."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.errors import ConfigError
from kani_nb.hardware.bandwidth import bandwidth_of_properties, device_bandwidth, measured_bandwidth
from kani_nb.hardware.budgets import budgets_here, budgets_of, usable_of_card
from kani_nb.hardware.cards import all_cards, find_card, find_cards, known_card
from kani_nb.hardware.devices import Device, cpu_memory

_GIB = 2**30


@pytest.mark.parametrize(
    ("said", "card"),
    [
        ("3090", "RTX 3090"),
        ("rtx 3090 ti", "RTX 3090 Ti"),
        ("a100-80", "A100-80"),
        ("A100 80GB", "A100-80"),
        ("3060 12GB", "RTX 3060-12"),
        ("2080ti", "RTX 2080 Ti"),
        ("AMD 6900xt", "RX 6900 XT"),
        ("m2 max 96 GB", "M2 Max 96GB"),
        # As drivers say them.
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_card_is_found_by_what_people_and_drivers_call_it(said, card):
    assert find_card(said).name == card


@pytest.mark.parametrize("said", ["NVIDIA GeForce RTX 3080 Laptop GPU", "NVIDIA GeForce RTX 3090 D", "", "GPU"])
def test_another_product_is_not_taken_for_a_card_of_the_table(said):
    assert known_card(said) is None


def test_every_card_is_found_by_its_own_names_and_by_no_other():
    for card in all_cards():
        for name in (card.name, *card.also, card.name.lower(), f"NVIDIA {card.name}"):
            assert find_card(name) is card


def test_the_figures_of_all_cards_are_plausible_and_their_bfloat16_is_that_of_their_generation():
    for card in all_cards():
        assert 4 * _GIB <= card.memory_bytes <= 256 * _GIB
        assert 60e9 <= card.bandwidth_bytes_per_s <= 10e12
        if card.capability is not None:
            assert card.has_bfloat16 == (card.capability[0] >= 8)
    assert find_card("T4").capability == (7, 5)
    assert find_card("RTX 3090").memory_bytes == 24576 * 2**20
    assert find_card("M1 16GB").memory_bytes == 10922 * 2**20


@pytest.mark.parametrize(
    ("said", "cards"),
    [
        ("2x3090", ["RTX 3090"] * 2),
        ("2 x RTX 4090", ["RTX 4090"] * 2),
        ("3090 x2", ["RTX 3090"] * 2),
        ("4\u00d7A100-40", ["A100-40"] * 4),
        ("a100-80, t4", ["A100-80", "T4"]),
        ("2xT4 + L4", ["T4", "T4", "L4"]),
        ("3090", ["RTX 3090"]),
    ],
)
def test_several_cards_are_named_together(said, cards):
    assert [card.name for card in find_cards(said)] == cards


@given(st.integers(1, 64), st.sampled_from(all_cards()), st.sampled_from(["{}x{}", "{} x {}", "{}*{}"]))
def test_any_number_of_any_card_can_be_named(number, card, form):
    assert find_cards(form.format(number, card.name)) == (card,) * number


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("3091", r"no card '3091'.*\n→ did you mean RTX 3090\?"),
        ("2xa1000", r"no card 'a1000'.*\n→ did you mean A100-80 or A100-40\?"),
        ("titan ada", r"no card 'titan ada'.*\n→ did you mean Titan RTX"),
        ("banana", r"no card 'banana'.*\n→ it has T4, L4, .* and \d+ more"),
        ("0x3090", r"0 cards of '3090': it must be 1 to 64"),
        ("999x3090", r"999 cards of '3090'"),
        (" , ", r"no card was named\n→ for example"),
    ],
)
def test_a_name_that_is_no_card_is_refused_with_the_near_misses(said, message):
    with pytest.raises(ConfigError, match=message):
        find_cards(said)


def test_what_a_named_card_leaves_for_a_model_is_less_than_what_torch_sees_of_it():
    # Totals that torch reports, from public issues.
    seen_by_torch = {"T4": 15102 * 2**20, "L40": int(44.40 * _GIB), "B200": int(178.35 * _GIB), "P100": 16280 * 2**20}
    for name, total in seen_by_torch.items():
        assert 0.9 * total < usable_of_card(find_card(name).memory_bytes) < total - 0.4 * _GIB


def test_named_cards_become_budgets_that_are_not_of_this_machine():
    first, second, memory, disk = budgets_of("2x3090, cpu=64GiB, disk=100GB")
    assert (first.name, second.name, first.kind) == ("cuda:0", "cuda:1", "cuda")
    assert first.description == "RTX 3090"
    assert first.compute_capability == (8, 6)
    assert first.bandwidth_bytes_per_s == 936e9
    assert first.usable_bytes < first.total_bytes == 24 * _GIB
    assert (memory.name, memory.total_bytes, memory.usable_bytes) == ("cpu", 64 * _GIB, 63 * _GIB)
    assert (disk.name, disk.usable_bytes) == ("disk", 100 * 10**9)
    assert not any(each.is_here for each in (first, second, memory, disk))
    (apple,) = budgets_of("m1 max 32GB")
    assert (apple.name, apple.usable_bytes) == ("mps", 21845 * 2**20)


def test_what_cannot_be_one_machine_is_refused():
    with pytest.raises(ConfigError, match="joins an Apple chip with others"):
        budgets_of("m1 16GB, 3090")
    with pytest.raises(ConfigError, match=r"gives cuda:0 an amount\n→ name the card"):
        budgets_of("0=10GiB")


def test_the_budgets_of_this_machine_are_within_what_is_free():
    budgets = budgets_here({"cpu": "1GiB"})
    cpu = budgets[-1]
    assert cpu.name == "cpu"
    assert cpu.is_here
    assert cpu.usable_bytes == _GIB
    assert cpu.bandwidth_bytes_per_s is None
    assert 0 < budgets_here()[-1].usable_bytes < cpu_memory()[0] == cpu.total_bytes
    assert [each.name for each in budgets_here("cpu=1GiB, disk=5GB")][-1] == "disk"


def test_a_limit_for_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"max_memory names cuda:9: there is no such device here\n→ there are .*cpu"):
        budgets_here("9=10GiB")


def test_bandwidth_of_a_card_is_its_clock_times_its_bus():
    # What the driver says of an RTX 3090, a T4 and an H100, against their data sheets.
    for clock_khz, width_bits, name in ((9_751_000, 384, "3090"), (5_001_000, 256, "T4"), (2_619_000, 5120, "H100")):
        properties = SimpleNamespace(memory_clock_rate=clock_khz, memory_bus_width=width_bits)
        assert bandwidth_of_properties(properties) == pytest.approx(find_card(name).bandwidth_bytes_per_s, rel=0.01)
    assert bandwidth_of_properties(SimpleNamespace()) is None
    assert bandwidth_of_properties(SimpleNamespace(memory_clock_rate=0, memory_bus_width=384)) is None


def test_bandwidth_of_a_device_without_a_clock_is_that_of_its_name():
    assert device_bandwidth(Device("mps", "Apple M1 Max 32GB", 1, 1)) == 400e9
    assert device_bandwidth(Device("mps", "Apple arm64", 1, 1)) is None


def test_main_memory_is_measured_in_less_than_a_second_and_read_faster_than_a_disk(tmp_path):
    started = time.perf_counter()
    found = measured_bandwidth(caches=tmp_path)
    assert time.perf_counter() - started < 2  # a third of a second on an idle machine
    assert 1e9 < found < 2e12
