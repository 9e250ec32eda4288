"""Which block of a model goes to which device: pure decisions from bytes and budgets.

Blocks stay in running order, so that hidden states cross from one device to the next once. What is kept on the CPU or
the disk beside an accelerator is computed on the accelerator all the same (accelerate moves a module's weights there
for the moment, and its keys and values stay there), and is counted so. Nothing here looks at a machine or a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kani_nb.hardware.placement import SLOW, STRATEGIES
from kani_nb.hardware.plans import Budget, Share

#: Bytes of a disk that nobody named: what is offloaded is read from the checkpoint's own files, which are there.
_ANY = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What one part of a device map takes.

    Attributes:
        name: the module, `model.layers.0`.
        weight_bytes: on the device that computes it.
        kv_bytes: its layers' cache, at the context that is planned for.
        offloaded_bytes: of weights where it is kept aside, which may be quantized no more.
        streamed_bytes: of its largest module, which comes to the computing device for a moment when it is kept aside.
        follows: the block whose device it must share (a tied head); empty for none.
    """

    name: str
    weight_bytes: int
    kv_bytes: int = 0
    offloaded_bytes: int = 0
    streamed_bytes: int = 0
    follows: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where everything goes.

    Attributes:
        device_map: block to device; empty where there is no way.
        shares: what each device that is used then holds, in the order of the budgets.
        fits: no device holds more than it may.
        is_offloaded: something is kept aside, on the CPU or the disk.
        missing_bytes: how much more memory would do, where it does not fit.
    """

    device_map: dict[str, str] = field(default_factory=dict)
    shares: tuple[Share, ...] = ()
    fits: bool = False
    is_offloaded: bool = False
    missing_bytes: int = 0


def place(
    blocks: Sequence[BlockCost],
    budgets: Sequence[Budget],
    working_bytes: int,
    device_map: str | Mapping[str, str] = "auto",
    *,
    allow_offload: bool = False,
) -> Placement:
    """The blocks on the devices.

    `auto` takes the one accelerator with most memory where that suffices, and else spreads over all of them;
    `balanced` spreads over all, so that the fullest is as empty as can be; `sequential` fills one after the other.
    Without an accelerator the CPU takes their place. What then does not fit goes to the CPU and to the disk where
    `allow_offload` says so.

    Args:
        blocks: in running order.
        budgets: the devices; the disk needs none.
        working_bytes: what computing takes on each device that computes.
        device_map: a strategy, the name of a device, or a dict from block to device, taken as it is.
        allow_offload: keep what does not fit aside.

    Returns:
        A placement; where nothing fits, one with `missing_bytes` and the shares of the attempt.
    """
    if not isinstance(device_map, str):
        return _as_told(blocks, budgets, working_bytes, device_map)
    joined, followers = _joined(blocks)
    if device_map in STRATEGIES:
        computing = [each for each in budgets if each.kind not in SLOW] or [
            each for each in budgets if each.name == "cpu"
        ]
    else:
        computing = [each for each in budgets if each.name == device_map]
    found = _computed(joined, computing, working_bytes, device_map)
    if not found.fits and allow_offload and computing:
        found = _offloaded(joined, computing, _aside(budgets, computing), working_bytes) or found
    return replace(found, device_map=_with_followers(found.device_map, blocks, followers))


def _computed(blocks: Sequence[BlockCost], computing: Sequence[Budget], working_bytes: int, strategy: str) -> Placement:
    """Everything on devices that compute, or the attempt that shows how much is missing."""
    if not computing:
        return Placement()
    largest = max(computing, key=lambda each: each.usable_bytes)
    if strategy not in ("balanced", "sequential"):
        single = dict.fromkeys((each.name for each in blocks), largest.name)
        alone = _measured(blocks, [largest], working_bytes, single)
        if alone.fits or len(computing) == 1:
            return alone
    caps = [each.usable_bytes for each in computing]
    if (in_order := _filled(blocks, caps, working_bytes)) is None:
        return _overfull(blocks, computing, working_bytes)
    if strategy != "sequential":
        in_order = _balanced(blocks, caps, working_bytes)
    chosen = {block.name: computing[at].name for block, at in zip(blocks, in_order, strict=True)}
    return _measured(blocks, computing, working_bytes, chosen)


def _filled(blocks: Sequence[BlockCost], caps: Sequence[int], working_bytes: int) -> list[int] | None:
    """For each block the device it goes to when they are filled in order; None where the last one overflows.

    A device that cannot take the next block is left, even if it is empty: blocks never go back. For devices in a fixed
    order, what this cannot place, no other contiguous placement can.
    """
    at, held, found = 0, working_bytes, []
    for block in blocks:
        size = block.weight_bytes + block.kv_bytes
        while held + size > caps[at]:
            at, held = at + 1, working_bytes
            if at == len(caps):
                return None
        held += size
        found.append(at)
    return found


def _balanced(blocks: Sequence[BlockCost], caps: Sequence[int], working_bytes: int) -> list[int]:
    """The filling whose fullest device holds least, by bisection; `caps` themselves must suffice."""
    low, high = 0, max(caps)
    while low < high:
        middle = (low + high) // 2
        if _filled(blocks, [min(middle, cap) for cap in caps], working_bytes) is None:
            low = middle + 1
        else:
            high = middle
    found = _filled(blocks, [min(high, cap) for cap in caps], working_bytes)
    assert found is not None, "the caps themselves suffice"
    return found


def _overfull(blocks: Sequence[BlockCost], computing: Sequence[Budget], working_bytes: int) -> Placement:
    """What is missing where not even all devices together suffice: the least by which all would have to be larger."""
    needed = sum(block.weight_bytes + block.kv_bytes for block in blocks)
    low, high = 0, needed + working_bytes
    while low < high:
        middle = (low + high) // 2
        if _filled(blocks, [each.usable_bytes + middle for each in computing], working_bytes) is None:
            low = middle + 1
        else:
            high = middle
    filled = _filled(blocks, [each.usable_bytes + high for each in computing], working_bytes)
    assert filled is not None, "one device could hold it all"
    chosen = {block.name: computing[at].name for block, at in zip(blocks, filled, strict=True)}
    return replace(_measured(blocks, computing, working_bytes, chosen), device_map={})


def _offloaded(
    blocks: Sequence[BlockCost], computing: Sequence[Budget], aside: Sequence[Budget], working_bytes: int
) -> Placement | None:
    """As many blocks as can be on the devices that compute, in running order, and the rest kept aside.

    One device also holds the cache of the blocks kept aside, and the largest of their modules for a moment. Of several
    accelerators accelerate takes any (the first of a set), so each of them must have room for it.
    """
    fewest = 0 if computing[0].name == "cpu" else 1  # without anything on it, an accelerator would not compute
    for kept in range(len(blocks) - 1, fewest - 1, -1):
        rest = blocks[kept:]
        extra = sum(block.kv_bytes for block in rest) + max(block.streamed_bytes for block in rest)
        caps = [each.usable_bytes - extra for each in computing]
        filled = _filled(blocks[:kept], caps, working_bytes)
        stored = _stored(rest, [each.usable_bytes for each in aside])
        if filled is None or stored is None:
            continue
        chosen = {block.name: computing[at].name for block, at in zip(blocks[:kept], filled, strict=True)}
        chosen |= {block.name: aside[at].name for block, at in zip(rest, stored, strict=True)}
        found = _measured(blocks, [*computing, *aside], working_bytes, chosen)
        if found.fits:
            return found
    return None


def _stored(blocks: Sequence[BlockCost], caps: Sequence[int]) -> list[int] | None:
    """The same filling for blocks that are only kept."""
    kept = [BlockCost(name=block.name, weight_bytes=block.offloaded_bytes) for block in blocks]
    return _filled(kept, caps, 0)


def _aside(budgets: Sequence[Budget], computing: Sequence[Budget]) -> list[Budget]:
    """Where what does not fit can be kept: main memory unless it computes, then the disk."""
    found = [each for each in budgets if each.name == "cpu" and each not in computing]
    disk = [each for each in budgets if each.name == "disk"]
    return found + (disk or [Budget(name="disk", description="the disk", total_bytes=_ANY, usable_bytes=_ANY)])


def _measured(
    blocks: Sequence[BlockCost], budgets: Sequence[Budget], working_bytes: int, chosen: Mapping[str, str]
) -> Placement:
    """What each device holds under a complete map, and whether that is too much."""
    used = [each for each in budgets if each.name in chosen.values()]
    accelerators = [each.name for each in used if each.kind not in SLOW]
    # An accelerator computes everything; without one the CPU does, also what lies on the disk.
    main = next((chosen[block.name] for block in blocks if chosen[block.name] in accelerators), "cpu")
    computing = set(accelerators) or {"cpu"}
    if main not in (each.name for each in used):
        used += [each for each in budgets if each.name == main]
    weights = {each.name: 0 for each in used}
    kv = dict.fromkeys(weights, 0)
    working = {name: working_bytes if name in computing else 0 for name in weights}
    streamed = 0
    for block in blocks:
        device = chosen[block.name]
        if device in computing:
            weights[device] += block.weight_bytes
            kv[device] += block.kv_bytes
        else:
            weights[device] += block.offloaded_bytes
            kv[main] = kv.get(main, 0) + block.kv_bytes
            streamed = max(streamed, block.streamed_bytes)
    if main in working:
        working[main] += streamed
    shares = tuple(
        Share(device=name, weight_bytes=weights[name], kv_bytes=kv[name], working_bytes=working[name])
        for name in weights
    )
    caps = {each.name: each.usable_bytes for each in used}
    missing = sum(max(0, share.peak_bytes - caps[share.device]) for share in shares)
    return Placement(
        device_map=dict(chosen),
        shares=shares,
        fits=missing == 0,
        is_offloaded=any(device not in computing for device in chosen.values()),
        missing_bytes=missing,
    )


def _as_told(
    blocks: Sequence[BlockCost], budgets: Sequence[Budget], working_bytes: int, device_map: Mapping[str, str]
) -> Placement:
    """The user's own map, measured; its devices are known."""
    aside = [each for each in budgets if each.name == "disk"] or _aside((), ())
    return _measured(blocks, [*(each for each in budgets if each.name != "disk"), *aside], working_bytes, device_map)


def _joined(blocks: Sequence[BlockCost]) -> tuple[list[BlockCost], dict[str, str]]:
    """The blocks without those that follow another, whose bytes are counted there; and who follows whom."""
    names = {block.name for block in blocks}
    followers = {block.name: block.follows for block in blocks if block.follows in names}
    together: dict[str, list[BlockCost]] = {}
    for block in blocks:
        together.setdefault(followers.get(block.name, block.name), []).append(block)
    leaders = [block for block in blocks if block.name not in followers]
    return [_sum(block, together[block.name]) for block in leaders], followers


def _sum(leader: BlockCost, all_of_them: Sequence[BlockCost]) -> BlockCost:
    if len(all_of_them) == 1:
        return leader
    return replace(
        leader,
        weight_bytes=sum(each.weight_bytes for each in all_of_them),
        kv_bytes=sum(each.kv_bytes for each in all_of_them),
        offloaded_bytes=sum(each.offloaded_bytes for each in all_of_them),
        streamed_bytes=max(each.streamed_bytes for each in all_of_them),
    )


def _with_followers(
    device_map: Mapping[str, str], blocks: Sequence[BlockCost], followers: Mapping[str, str]
) -> dict[str, str]:
    """The map with all blocks in it again, in running order."""
    return {block.name: device_map[followers.get(block.name, block.name)] for block in blocks} if device_map else {}
