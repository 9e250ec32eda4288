"""Where a model goes: every block has one place, no device holds more than it may, and what people write is checked."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.errors import ConfigError
from kani_nb.hardware.placement import check_device_map, device_name, device_of, memory_amount, parse_max_memory
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.spreading import BlockCost, place

_GIB = 2**30


def budget(name, usable):
    return Budget(name=name, description=name, total_bytes=usable, usable_bytes=usable)


def model(*sizes, kv=0, is_tied=False):
    """Blocks of these sizes in running order; the last is tied to the first on request."""
    blocks = [
        BlockCost(name=f"b{at}", weight_bytes=size, kv_bytes=kv, offloaded_bytes=2 * size, streamed_bytes=size)
        for at, size in enumerate(sizes)
    ]
    if is_tied:
        blocks.append(BlockCost(name="head", weight_bytes=0, follows="b0"))
    return blocks


models = st.builds(
    lambda sizes, kv, is_tied: model(*sizes, kv=kv, is_tied=is_tied),
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.integers(0, 9),
    st.booleans(),
)
machines = st.builds(
    lambda cards, cpu: [*(budget(f"cuda:{at}", size) for at, size in enumerate(cards)), budget("cpu", cpu)],
    st.lists(st.integers(1, 150), max_size=4),
    st.integers(1, 400),
)


def held(placement):
    return {share.device: share.peak_bytes for share in placement.shares}


@given(models, machines, st.integers(0, 9), st.sampled_from(["auto", "balanced", "sequential"]), st.booleans())
def test_every_block_has_one_place_and_no_device_holds_more_than_it_may(blocks, budgets, working, strategy, offload):
    found = place(blocks, budgets, working, strategy, allow_offload=offload)
    usable = {each.name: each.usable_bytes for each in budgets}
    if not found.fits:
        assert found.missing_bytes > 0
        return
    assert list(found.device_map) == [block.name for block in blocks]
    assert all(size <= usable.get(device, size) for device, size in held(found).items())
    accelerators = {each.name for each in budgets if each.kind == "cuda"}
    places = [found.device_map[block.name] for block in blocks if not block.follows]
    if found.is_offloaded:
        assert offload
    else:
        assert set(places) <= (accelerators or {"cpu"})
        assert sum(share.weight_bytes for share in found.shares) == sum(block.weight_bytes for block in blocks)
    # Every key and value is somewhere, and only devices that compute have any.
    assert sum(share.kv_bytes for share in found.shares) == sum(block.kv_bytes for block in blocks)
    # In running order a device, once left, is not come back to.
    assert len([at for at in range(1, len(places)) if places[at] != places[at - 1]]) == len(set(places)) - 1
    if blocks[-1].follows:
        assert found.device_map["head"] == found.device_map["b0"]


@given(models, machines, st.integers(0, 9))
def test_what_fits_on_one_device_is_not_spread(blocks, budgets, working):
    accelerators = [each for each in budgets if each.kind == "cuda"] or budgets
    needed = sum(block.weight_bytes + block.kv_bytes for block in blocks) + working
    largest = max(accelerators, key=lambda each: each.usable_bytes)
    found = place(blocks, budgets, working, allow_offload=True)
    if needed <= largest.usable_bytes:
        assert set(found.device_map.values()) == {largest.name}
        assert not found.is_offloaded


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_in_running_order_what_cannot_be_placed_could_not_be_placed_otherwise(sizes, cards):
    budgets = [budget(f"cuda:{at}", size) for at, size in enumerate(cards)]
    working = 1

    def is_possible(ends):
        """Whether it fits when device `at` takes the blocks up to `ends[at]`."""
        begin = 0
        for end, card in zip((*ends, len(sizes)), cards, strict=True):
            if end < begin or (end > begin and sum(sizes[begin:end]) + working > card):
                return False
            begin = end
        return begin == len(sizes)

    possible = any(map(is_possible, product(range(len(sizes) + 1), repeat=len(cards) - 1)))
    for strategy in ("sequential", "balanced", "auto"):
        assert place(model(*sizes), budgets, working, strategy).fits == possible


@given(models, machines, st.integers(0, 9))
def test_no_contiguous_placement_leaves_the_fullest_device_emptier_than_balanced(blocks, budgets, working):
    balanced = place(blocks, budgets, working, "balanced")
    in_order = place(blocks, budgets, working, "sequential")
    assert balanced.fits == in_order.fits
    if balanced.fits:
        assert max(held(balanced).values()) <= max(held(in_order).values())


def test_strategies_differ_as_their_names_say():
    blocks = model(10, 10, 10, 10, kv=1)
    cards = [budget("cuda:0", 100), budget("cuda:1", 60)]
    assert set(place(blocks, cards, 2).device_map.values()) == {"cuda:0"}
    assert list(place(blocks, cards, 2, "balanced").device_map.values()) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    small = [budget("cuda:0", 36), budget("cuda:1", 60)]
    assert list(place(blocks, small, 2, "sequential").device_map.values()) == ["cuda:0"] * 3 + ["cuda:1"]
    assert set(place(blocks, cards, 2, "cuda:1").device_map.values()) == {"cuda:1"}
    # The shares hold the cache of the layers that are there, and each device that computes needs room for it.
    shares = place(blocks, cards, 2, "balanced").shares
    assert [(each.weight_bytes, each.kv_bytes, each.working_bytes) for each in shares] == [(20, 2, 2)] * 2


def test_nothing_is_offloaded_unless_it_is_allowed():
    blocks, devices = model(10, 10, 10, 10, kv=1), [budget("cuda:0", 40), budget("cpu", 1000)]
    refused = place(blocks, devices, 2)
    assert (refused.fits, refused.missing_bytes) == (False, 46 - 40)
    offloaded = place(blocks, devices, 2, allow_offload=True)
    assert offloaded.is_offloaded
    assert list(offloaded.device_map.values()) == ["cuda:0", "cuda:0", "cpu", "cpu"]
    # The card computes all: the whole cache is on it, and room for the largest module that comes over.
    card, memory = offloaded.shares
    assert (card.weight_bytes, card.kv_bytes, card.working_bytes) == (20, 4, 2 + 10)
    assert (memory.weight_bytes, memory.kv_bytes, memory.working_bytes) == (40, 0, 0)


def test_what_main_memory_cannot_keep_goes_to_the_disk():
    blocks = model(10, 10, 10, 10)
    found = place(blocks, [budget("cuda:0", 32), budget("cpu", 30)], 2, allow_offload=True)
    assert list(found.device_map.values()) == ["cuda:0", "cuda:0", "cpu", "disk"]
    alone = place(blocks, [budget("cpu", 32)], 2, allow_offload=True)
    assert list(alone.device_map.values()) == ["cpu", "cpu", "disk", "disk"]
    full = place(blocks, [budget("cpu", 32), budget("disk", 10)], 2, allow_offload=True)
    assert not full.fits
    assert place(blocks, [budget("cpu", 5)], 2, allow_offload=True).fits is False


def test_a_map_of_the_users_own_is_taken_as_it_is_and_measured():
    blocks = model(10, 10, 10, kv=1)
    told = {"b0": "cuda:0", "b1": "cpu", "b2": "cuda:0"}
    found = place(blocks, [budget("cuda:0", 40), budget("cpu", 100)], 2, told)
    assert found.device_map == told
    assert found.fits
    assert held(found) == {"cuda:0": 20 + 3 + 2 + 10, "cpu": 20}
    assert not place(blocks, [budget("cuda:0", 30), budget("cpu", 100)], 2, told).fits


@pytest.mark.parametrize(
    ("given_as", "name"),
    [
        (0, "cuda:0"),
        ("1", "cuda:1"),
        ("cuda", "cuda:0"),
        ("CUDA:2", "cuda:2"),
        (torch.device("cuda", 3), "cuda:3"),
        (torch.device("cpu"), "cpu"),
        ("mps:0", "mps"),
        ("disk", "disk"),
    ],
)
def test_a_device_may_be_named_in_every_way_that_torch_and_accelerate_know(given_as, name):
    assert device_name(given_as) == name


@pytest.mark.parametrize("wrong", ["gpu0", "", "cuda:", -1, True, None, "cuda:x"])
def test_what_is_no_device_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"is no device\n→ a GPU's number, cuda:0"):
        device_name(wrong)


@pytest.mark.parametrize(
    ("given_as", "bytes_"),
    [
        ("0=10GiB,cpu=30GiB", {"cuda:0": 10 * _GIB, "cpu": 30 * _GIB}),
        ("cuda:1 = 500 MB", {"cuda:1": 500 * 10**6}),
        ("cpu:1.5GiB", {"cpu": 3 * _GIB // 2}),
        ({0: "10GiB", "cpu": 1000, "disk": "1TB"}, {"cuda:0": 10 * _GIB, "cpu": 1000, "disk": 10**12}),
        ({"mps": "8gib"}, {"mps": 8 * _GIB}),
        ("", {}),
        (None, {}),
    ],
)
def test_max_memory_is_read_from_text_and_from_a_dict(given_as, bytes_):
    assert parse_max_memory(given_as) == bytes_


@given(st.dictionaries(st.sampled_from(["0", "1", "cpu", "mps", "disk"]), st.integers(0, 10**6), max_size=4))
def test_max_memory_in_whole_mebibytes_is_read_exactly(limits):
    text = ",".join(f"{name}={number}MiB" for name, number in limits.items())
    assert parse_max_memory(text) == {device_name(name): number * 2**20 for name, number in limits.items()}


@pytest.mark.parametrize(
    ("given_as", "message"),
    [
        ("0=10", r"max_memory of cuda:0 is '10': it has no unit\n→ 10GiB or 10MiB"),
        ("0=10Gb", r"'10Gb': 'Gb' is bits\n→ 10GB \(units are B, KB"),
        ("0=10Gig", r"'10Gig': 'Gig' is no unit of memory\n→ 10GiB"),
        ("0=10elephants", r"'elephants' is no unit of memory\n→ 10GiB"),
        ("0=lots", r"'lots': it is no amount of memory"),
        ("0=-1GiB", r"'-1GiB': it is no amount of memory"),
        ("10GiB", r"'10GiB' cannot be read: '10GiB' is no DEVICE=AMOUNT\n→ for example 0=10GiB,cpu=30GiB"),
        ("0=1GiB,cuda=2GiB", r"names cuda:0 twice"),
        ("gpu=1GiB", r"'gpu' is no device"),
        ({0: -5}, r"max_memory of cuda:0 is -5: it must be at least 0"),
        ({0: 1.5}, r"max_memory of cuda:0 is 1.5: it has no unit"),
    ],
)
def test_max_memory_that_cannot_be_read_is_refused_in_one_sentence(given_as, message):
    with pytest.raises(ConfigError, match=message):
        parse_max_memory(given_as)


def test_an_amount_of_memory_is_bytes():
    assert memory_amount("2KB", "it") == 2000
    assert memory_amount(7, "it") == 7


MODULES = ["model", "model.embed", "model.layers.0", "model.layers.1", "model.rotary", "lm_head"]
TENSORS = ["model.embed.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight"]


def test_a_device_map_is_read_with_its_devices_names_made_plain():
    checked = check_device_map({"model": 0, "model.layers.1": "1", "lm_head": "cpu"}, MODULES, TENSORS, THERE)
    assert checked == {"model": "cuda:0", "model.layers.1": "cuda:1", "lm_head": "cpu"}
    assert device_of("model.layers.1.mlp.weight", checked) == "cuda:1"
    assert device_of("model.layers.10.mlp.weight", checked) == "cuda:0"
    assert check_device_map({"": "disk"}, MODULES, TENSORS, THERE) == {"": "disk"}
    assert check_device_map({"": 0, "model.layers.0.mlp.weight": 1}, MODULES, TENSORS, THERE)
    for said, read in ((None, "auto"), ("balanced", "balanced"), (1, "cuda:1"), ("cpu", "cpu")):
        assert check_device_map(said, MODULES, TENSORS, THERE) == read


THERE = ["cuda:0", "cuda:1", "cpu"]


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            {"model": 0, "lm_heads": 0},
            r"names 'lm_heads', which is no module of this model\n→ did you mean lm_head\?",
        ),
        ({"": 0, "transformer.h": 1}, r"names 'transformer.h', which is no module of this model\n→ it has model"),
        ({"model": 0}, r"has no place for lm_head\n→ add 'lm_head', or \"\" for all that is not named"),
        ({"model.layers": 0}, r"has no place for model.embed, lm_head\n→ add 'model.embed'"),
        ({"": 7}, r"the device map has 7: there is no cuda:7 here\n→ there are cuda:0, cuda:1, cpu"),
        ({"": 0, "lm_head": "gpu"}, r"has 'gpu' for 'lm_head': that is no device"),
        ({}, r"the device map is empty\n→ "),
        ("blanced", r"has 'blanced': that is no device\n→ did you mean balanced\?"),
        ("cuda:3", r"has 'cuda:3': there is no cuda:3 here\n→ there are auto, balanced, sequential, cuda:0"),
        ("disk", r"there is no disk here"),
    ],
)
def test_a_device_map_with_a_mistake_is_refused_and_the_mistake_named(device_map, message):
    with pytest.raises(ConfigError, match=message):
        check_device_map(device_map, MODULES, TENSORS, THERE)
