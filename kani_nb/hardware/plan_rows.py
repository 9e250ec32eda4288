"""One row of a plan: a model in one scheme, on the devices that could hold it.

Puts together what the other modules know: what the scheme becomes on these devices, what each block then takes, where
it goes, and what is left over. `hardware.planner` asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kani_nb._amounts import in_words
from kani_nb.config import EngineConfig
from kani_nb.errors import KaniNbError
from kani_nb.hardware.arithmetic import (
    disk_bytes,
    host_bytes,
    kv_bytes,
    kv_bytes_per_token,
    odd_shapes,
    working_bytes,
)
from kani_nb.hardware.budgets import PROCESS_BYTES
from kani_nb.hardware.checkpoint_packages import check_checkpoint_packages
from kani_nb.hardware.checkpoint_schemes import checkpoint_of
from kani_nb.hardware.costing import Costing, cut_as, told_places
from kani_nb.hardware.placement import SLOW, STRATEGIES
from kani_nb.hardware.plans import Budget, PlanRow, Share
from kani_nb.hardware.precision import choose_dtype, slow_cpu_note, why_not
from kani_nb.hardware.prompt_chunks import chunk_size
from kani_nb.hardware.schemes import Scheme, find_scheme
from kani_nb.hardware.shapes import ModelShape
from kani_nb.hardware.spreading import Placement, place
from kani_nb.quantization import Quantization

#: Tokens that the KV cache is counted for where nothing was said: the window of the first LLaMA.
DEFAULT_CONTEXT_TOKENS = 2048
#: Share of the total that should be left over.
HEADROOM = 0.1
#: A context is not searched beyond this where the configuration names none.
_LONGEST_TOKENS = 1 << 20


def default_context(shape: ModelShape) -> int:
    """Tokens that a plan counts when none were asked for: 2,048, or the model's window where that is smaller."""
    return min(shape.context_tokens or DEFAULT_CONTEXT_TOKENS, DEFAULT_CONTEXT_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a row, but for the scheme; the arguments of `planner.make_plan`, the device map checked.

    `line` is what the user asked for, whose `%load_engine` line a row's differs from in its scheme only.
    """

    shape: ModelShape
    name: str
    asked_tokens: int | None
    budgets: tuple[Budget, ...]
    dtype: str
    kv_bits: int | None
    file_bytes: int | None
    device_map: str | dict[str, str]
    allow_offload: bool
    chunk_tokens: int | None = None
    line: EngineConfig | None = None

    @property
    def context_tokens(self) -> int:
        """Tokens that the cache is counted for."""
        return self.asked_tokens or default_context(self.shape)

    @property
    def checkpoint_dtype(self) -> str | None:
        """What the weights are stored in: as the configuration says, or as the size of the files says."""
        if self.shape.checkpoint_dtype is not None or self.file_bytes is None or self.shape.prequantized is not None:
            return self.shape.checkpoint_dtype
        return "float32" if self.file_bytes > 3 * self.shape.parameters else "float16"

    def devices_for(self, scheme: Scheme) -> list[Budget]:
        """The devices that this scheme may be placed on, and after them what can keep the rest."""
        fast = [each for each in self.budgets if each.kind not in SLOW]
        slow = [each for each in self.budgets if each.kind in SLOW]
        if isinstance(self.device_map, dict) or self.device_map not in STRATEGIES:
            return [*fast, *slow]
        able = [each for each in fast if each.kind in scheme.devices]
        return [*able, *slow] if able or "cpu" in scheme.devices else [*fast, *slow]

    def computing(self, devices: Sequence[Budget]) -> list[Budget]:
        """Those of `devices` that compute: what was named, the accelerators, or the CPU."""
        named = list(devices)
        if isinstance(self.device_map, dict):
            named = [each for each in devices if each.name in self.device_map.values()]
        elif self.device_map not in STRATEGIES:
            named = [each for each in devices if each.name == self.device_map]
        return [each for each in named if each.kind not in SLOW] or [each for each in devices if each.name == "cpu"]


def make_row(question: Question, settings: Quantization) -> PlanRow:
    """The row of that scheme.

    Raises:
        ConfigError: the setting is not the scheme's.
    """
    return _Case(question, settings).row()


class _Case:
    """A question and a scheme, with what follows from both."""

    def __init__(self, question: Question, asked: Quantization) -> None:
        self.question = question
        self.notes: list[str] = []
        self.settings, self.scheme = asked, find_scheme(asked.scheme)
        self.scheme.check_settings(asked)
        self.devices = question.devices_for(self.scheme)
        self.computing = question.computing(self.devices)
        self.kind = self.computing[0].kind if self.computing else "cuda"
        capability = min(
            (each.compute_capability for each in self.computing if each.compute_capability is not None), default=None
        )
        if question.shape.prequantized is not None:
            checkpoint = checkpoint_of(question.shape.prequantized)
            self.settings, self.scheme = checkpoint.held(self.kind, capability)
            if checkpoint.note and self.scheme.backend == "torch":
                self.notes.append(checkpoint.note)
        choice = choose_dtype(question.dtype, question.checkpoint_dtype, self.kind, capability, self.scheme)
        self.dtype = choice.dtype
        self.notes += [choice.reason] if choice.reason else []
        self.told: str | dict[str, str] = question.device_map
        shape = question.shape
        if isinstance(question.device_map, dict):
            shape = cut_as(shape, question.device_map)
            self.told = told_places(shape, question.device_map)
        self.costing = Costing(
            shape=shape, settings=self.settings, scheme=self.scheme, dtype=self.dtype, kv_bits=question.kv_bits
        )
        # bitsandbytes would leave all on a CPU unquantized, and other schemes' weights are nothing accelerate moves.
        # Nor can a checkpoint that is quantized already be kept there as bitsandbytes keeps it, unquantized.
        self.can_offload = self.scheme.backend == "torch" or (
            self.scheme.backend == "bitsandbytes" and self.kind != "cpu" and question.shape.prequantized is None
        )
        is_offloading = question.allow_offload or isinstance(self.told, dict)
        self.weights = self.costing.weights()
        self._blocks = self.costing.blocks(self.weights.by_block, question.context_tokens, is_offloading=is_offloading)

    @cached_property
    def obstacle(self) -> str:
        """Why the devices cannot run it, whatever its size."""
        computing = self.computing or [each for each in self.question.budgets if each.kind != "disk"]
        if not computing:
            return "there is no device to compute on"
        own = self.question.shape.prequantized
        if own is not None and any(each.is_here for each in computing):
            try:
                check_checkpoint_packages("it", checkpoint_of(own).method)
            except KaniNbError as lacking:
                return f"{lacking.what}: {lacking.why}; {lacking.fix}"
        return next((why for each in computing if (why := why_not(self.scheme, each))), "")

    def working(self, context_tokens: int) -> int:
        """What computing takes on each device that computes."""
        chunk = self.question.chunk_tokens or chunk_size(
            self.question.shape.parameters, is_gpu=self.kind != "cpu", is_half=self.dtype != "float32"
        )
        chunk = min(chunk, context_tokens)
        return working_bytes(
            self.question.shape, self.settings, self.dtype, chunk, context_tokens, self.kind, self.question.kv_bits
        )

    def placed(self, context_tokens: int, *, room: float = 1.0, allow_offload: bool = False) -> Placement:
        """Where everything goes at that context, when only the share `room` of each device may be used."""
        blocks = self.costing.with_context(self._blocks, context_tokens)
        devices = [replace(each, usable_bytes=int(each.usable_bytes * room)) for each in self.devices]
        return place(blocks, devices, self.working(context_tokens), self.told, allow_offload=allow_offload)

    def most_context_tokens(self) -> int:
        """The longest context that fits, at most the model's window; 0 where none does."""
        low, high = 0, self.question.shape.context_tokens or _LONGEST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits_at(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def _fits_at(self, context_tokens: int) -> bool:
        """Whether that context fits; on a single device no block has to be looked at."""
        if len(self.computing) != 1 or isinstance(self.told, dict):
            return self.placed(context_tokens).fits
        cache = kv_bytes(self.costing.shape, context_tokens, self.dtype, self.question.kv_bits)
        needed = self.weights.total + cache + self.working(context_tokens)
        return needed <= self.computing[0].usable_bytes

    def row(self) -> PlanRow:
        """Everything put together."""
        question, tokens = self.question, self.question.context_tokens
        shape = self.costing.shape
        placement = self.placed(tokens, allow_offload=question.allow_offload and self.can_offload)
        is_as_asked = isinstance(self.told, dict) or not placement.is_offloaded
        can_run = placement.fits and not self.obstacle
        shares = placement.shares or (self._nowhere(tokens),)
        peak_bytes = sum(share.peak_bytes for share in shares)
        cards = sum(share.device.startswith("cuda") for share in shares)
        seconds = self.costing.seconds_per_token(placement.device_map, question.budgets, tokens) if can_run else None
        host = host_bytes(shape, self.settings, self.scheme, self.dtype, self.kind)
        return PlanRow(
            label=_label(self.settings, question),
            settings=self.settings,
            dtype=self.dtype,
            weight_bytes=sum(share.weight_bytes for share in shares),
            scale_bytes=self.weights.scales,
            kv_bytes_per_token=kv_bytes_per_token(shape, self.dtype, question.kv_bits),
            context_tokens=tokens,
            kv_bytes=sum(share.kv_bytes for share in shares),
            working_bytes=sum(share.working_bytes for share in shares),
            peak_bytes=peak_bytes,
            recommended_bytes=int(peak_bytes * (1 + HEADROOM)) + cards * PROCESS_BYTES,
            host_bytes=host,
            disk_bytes=disk_bytes(question.shape, question.file_bytes),
            shares=placement.shares,
            device_map=self._device_map(placement) if can_run else {},
            can_run=not self.obstacle,
            fits=can_run and is_as_asked,
            has_headroom=can_run and is_as_asked and self.placed(tokens, room=1 / (1 + HEADROOM)).fits,
            most_context_tokens=0 if self.obstacle else self.most_context_tokens(),
            why_not=self.obstacle or _lacking(placement, shares, self.computing, is_as_asked),
            notes=(*self.notes, *self._further_notes(self.weights.experts, host)),
            ceiling_tokens_per_s=1 / seconds if seconds else None,
            line=_line(question, self.settings) if self.scheme.engine == "hf" else "",
        )

    def _nowhere(self, tokens: int) -> Share:
        """What it would take where there is no device for it."""
        kv = sum(block.kv_bytes for block in self._blocks)
        return Share(device="", weight_bytes=self.weights.total, kv_bytes=kv, working_bytes=self.working(tokens))

    def _device_map(self, placement: Placement) -> dict[str, str]:
        """As `from_pretrained` takes it: the user's own, one entry for a single device, or block by block.

        A key `""` is spelled out where something is kept aside: transformers does not find the parts it stands for.
        """
        places, told = set(placement.device_map.values()), self.question.device_map
        is_aside = "disk" in places or (len(places) > 1 and not places.isdisjoint(SLOW))
        # A head that is tied is where its embedding is, and from the disk it would not be found.
        is_tied_apart = isinstance(told, dict) and "disk" in set(told.values()) - places
        if isinstance(told, dict) and not (is_aside and "" in told) and not is_tied_apart:
            return dict(told)
        return {"": places.pop()} if len(places) == 1 and not is_aside else placement.device_map

    def _further_notes(self, expert_bytes: int, host: int) -> list[str]:
        notes = [note for each in self.computing[:1] if (note := slow_cpu_note(self.scheme, each))]
        if self.question.allow_offload and not self.can_offload:
            notes.append(
                f"{self.scheme.name} cannot be kept aside on {'the disk' if self.kind == 'cpu' else 'the CPU'}"
            )
        odd = odd_shapes(self.costing.shape, self.settings, self.scheme) if self.kind == "cpu" else []
        if odd and self.scheme.backend == "bitsandbytes":
            notes.append(
                f"{len(odd)} layers have shapes that the fast 4-bit product cannot take; they use the general one"
            )
        if self.scheme.engine != "hf":
            notes.append(f"load a .gguf file of {self.question.name or 'the model'} that has {self.scheme.name}")
        if expert_bytes and self.scheme.backend != "torch":
            notes.append(f"{self.scheme.name} leaves the experts as they are, {in_words(expert_bytes)} of them")
        memory = next((each for each in self.question.budgets if each.name == "cpu" and each.is_here), None)
        if memory is not None and host > memory.usable_bytes and not self.obstacle:
            usable = in_words(memory.usable_bytes)
            notes.append(f"loading takes {in_words(host)} of main memory, and {usable} of it may be used")
        return notes


def _lacking(placement: Placement, shares: Sequence[Share], computing: Sequence[Budget], is_as_asked: bool) -> str:
    """By how much it does not fit, in one sentence; empty where it does."""
    if placement.fits and is_as_asked:
        return ""
    if placement.fits:
        aside = kept_aside(shares, computing)
        places = " and ".join(share.device for share in aside)
        return f"it fits only with {in_words(sum(each.weight_bytes for each in aside))} of the weights kept on {places}"
    needed = sum(share.peak_bytes for share in shares)
    if len(computing) == 1:
        return f"it needs {in_words(needed)}, and {computing[0].name} has {in_words(computing[0].usable_bytes)} for it"
    usable = sum(each.usable_bytes for each in computing)
    return (
        f"it needs {in_words(needed)}, and {len(computing)} devices have {in_words(usable)} for it together: "
        f"{in_words(placement.missing_bytes)} are missing where blocks stay whole"
    )


def kept_aside(shares: Iterable[Share], computing: Sequence[Budget]) -> list[Share]:
    """The shares of devices that only keep weights for those that compute."""
    names = {each.name for each in computing}
    return [share for share in shares if share.device in SLOW and share.device not in names and share.weight_bytes]


def _label(settings: Quantization, question: Question) -> str:
    return settings.label if question.shape.prequantized is None else f"{settings.label} (the checkpoint's own)"


def _line(question: Question, settings: Quantization) -> str:
    """The `%load_engine` line that loads it so."""
    if not question.name.strip():
        return ""
    if question.line is not None:
        scheme = settings if question.shape.prequantized is None else question.line.quantization
        return replace(question.line, quantization=scheme).to_line()
    device, device_map = None, None
    if isinstance(question.device_map, dict):
        device_map = json.dumps(question.device_map)
    elif question.device_map in ("balanced", "sequential"):
        device_map = question.device_map
    elif question.device_map != "auto":
        device = question.device_map
    config = EngineConfig(
        question.name,
        dtype=question.dtype,
        quantization=settings if question.shape.prequantized is None else Quantization(),
        device=device,
        device_map=device_map,
        allow_offload=question.allow_offload,
        max_context_size=question.asked_tokens,
    )
    return config.to_line()
