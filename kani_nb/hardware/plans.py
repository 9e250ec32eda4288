"""The records of a plan: what a model would take under each scheme, where it would go, and whether it fits.

Made by `hardware.planner`, shown by the magics, the command line and the panels. Bytes and seconds inside; nothing here
computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kani_nb.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be used of one device.

    Attributes:
        name: `cuda:0`, `mps`, `cpu`, `disk`.
        description: the product's name.
        total_bytes: its memory.
        usable_bytes: what of that a model may take.
        bandwidth_bytes_per_s: how fast its memory is read; None where that is not known.
        compute_capability: of a CUDA device.
        cpu_features: flags of a CPU that schemes look at.
        is_here: it is a device of this machine, and not one that was only named.
    """

    name: str
    description: str
    total_bytes: int
    usable_bytes: int
    bandwidth_bytes_per_s: float | None = None
    compute_capability: tuple[int, int] | None = None
    cpu_features: tuple[str, ...] = ()
    is_here: bool = True

    @property
    def kind(self) -> str:
        """`cuda`, `mps`, `cpu` or `disk`."""
        return self.name.partition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one device would hold."""

    device: str
    weight_bytes: int
    kv_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it at once."""
        return self.weight_bytes + self.kv_bytes + self.working_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One scheme.

    Attributes:
        label: what the table calls it, `nf4 + double quant`.
        settings: the scheme and its settings.
        dtype: of what is not quantized; after what the devices cannot do has been replaced.
        weight_bytes: of weights and scales, once loaded.
        scale_bytes: of that, scales and other statistics of the quantization.
        kv_bytes_per_token: of all layers together, while no window is full.
        context_tokens: what the KV cache and the working memory were counted for.
        kv_bytes: of that context.
        working_bytes: what a prompt's computation takes for a moment.
        peak_bytes: weights, KV cache and working memory.
        recommended_bytes: the memory to have, with headroom for fragmentation and the driver.
        host_bytes: main memory needed while loading.
        disk_bytes: of the checkpoint, to download and keep.
        shares: by device, in the order they are filled.
        device_map: the map it would take, blocks to devices; one entry `""` for a single device.
        can_run: the devices can compute it, whatever its size.
        fits: within the budgets, nothing offloaded that was not put aside by hand.
        has_headroom: it would fit with a tenth less memory, too.
        most_context_tokens: the longest context that fits, at most the model's window; 0 where none does.
        why_not: one sentence when it does not fit or cannot run.
        notes: what was decided on the way, for example that bfloat16 became float16.
        ceiling_tokens_per_s: bandwidth over the bytes that one token reads; None where the bandwidth is not known.
        line: the `%load_engine` line for it.
    """

    label: str
    settings: Quantization
    dtype: str
    weight_bytes: int
    scale_bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    kv_bytes: int
    working_bytes: int
    peak_bytes: int
    recommended_bytes: int
    host_bytes: int
    disk_bytes: int
    shares: tuple[Share, ...] = ()
    device_map: dict[str, str] = field(default_factory=dict)
    can_run: bool = True
    fits: bool = False
    has_headroom: bool = False
    most_context_tokens: int = 0
    why_not: str = ""
    notes: tuple[str, ...] = ()
    ceiling_tokens_per_s: float | None = None
    line: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `scheme` is the scheme's name."""
        return {
            "scheme": self.settings.scheme,
            "label": self.label,
            "settings": self.settings.given,
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "scale_bytes": self.scale_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "context_tokens": self.context_tokens,
            "kv_bytes": self.kv_bytes,
            "working_bytes": self.working_bytes,
            "peak_bytes": self.peak_bytes,
            "recommended_bytes": self.recommended_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "devices": {share.device: share.peak_bytes for share in self.shares},
            "device_map": self.device_map,
            "can_run": self.can_run,
            "fits": self.fits,
            "has_headroom": self.has_headroom,
            "most_context_tokens": self.most_context_tokens,
            "why_not": self.why_not,
            "notes": list(self.notes),
            "ceiling_tokens_per_s": self.ceiling_tokens_per_s,
            "line": self.line,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A model under several schemes on one set of devices.

    Attributes:
        context_tokens: what the KV cache was counted for.
        budgets: the devices it was made for, in the order they are filled.
        rows: one for each scheme, the largest first.
        recommended: index of the row to take; None where none fits.
        notes: what concerns the whole plan.
    """

    model: str
    architecture: str
    parameters: int
    context_tokens: int
    budgets: tuple[Budget, ...]
    rows: tuple[PlanRow, ...]
    recommended: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> PlanRow | None:
        """The recommended row."""
        return self.rows[self.recommended] if self.recommended is not None else None

    @property
    def kind(self) -> str:
        """`cuda`, `mps` or `cpu`: the kind of the device that is filled first."""
        return self.budgets[0].kind if self.budgets else ""

    @property
    def usable_bytes(self) -> int:
        """What can hold the model without offloading: all devices of that kind together."""
        return sum(each.usable_bytes for each in self.budgets if each.kind == self.kind)

    def row(self, label: str) -> PlanRow | None:
        """The row of that label or scheme."""
        return next((each for each in self.rows if label in (each.label, each.settings.scheme)), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: `{"model", "context", "schemes": [...], "recommended", ...}`."""
        best = self.best
        return {
            "model": self.model,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "context": self.context_tokens,
            "devices": {each.name: each.usable_bytes for each in self.budgets},
            "schemes": [row.to_dict() for row in self.rows],
            "recommended": best.label if best is not None else None,
            "notes": list(self.notes),
        }
