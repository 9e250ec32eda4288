"""The record of a comparison: what each scheme took, how fast it answered, and what it costs in quality.

Made by `kani_nb.compare`, shown by the magics, the command line and the figures. Nothing here measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from kani_nb.quantization import Quantization

_MIB = 2**20
#: Characters of an answer that the table shows.
_ANSWER_SHOWN = 160
#: What "peak" means, by where it was read.
_MEMORY_WORDS = {
    "rss": "Weights are counted, scales included. The peak is what the process's resident memory grew by at most while "
    "it answered, since before the load; what its allocator still had from earlier work is not in it.",
    "cuda": "Weights are counted, scales included. The peak is what the CUDA allocator gave out at most while it "
    "answered, less what it had before the load.",
}
#: More CPUs than there are, wanted by this comparison and others together, from which times are of no use.
_CROWDED_CPUS = 0.1
COLUMNS = (
    "scheme",
    "weights MiB",
    "peak MiB",
    "load s",
    "first text ms",
    "ms per token (min-max)",
    "speed-up",
    "KL nats",
    "top-1",
    "perplexity",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """One scheme, loaded, asked and freed. What could not be measured is None, and `reason` says why nothing was.

    Attributes:
        label: what tables call it.
        settings: the scheme and its settings.
        line: the `%load_engine` line for it.
        reason: why it was not measured; empty where it was.
        fix: what to do about that.
        dtype, device: what the engine says of itself once it is loaded.
        load_s: from files that are there to a model in memory. The first scheme of a library imports it in that time.
        weight_bytes: of weights and scales, before the first forward pass.
        in_use_bytes: how much more memory was in use once it was loaded; `memory_source` says of what.
        peak_bytes: the same while it answered: the highest of all runs.
        left_bytes: how much more was allocated after it was freed than before it was loaded: on the GPU, else from the
            C library; where that does not say, as the next.
        left_resident_bytes: the same of what `memory_source` says. It includes free memory that an allocator keeps;
            below 0, some of an earlier model's came back late.
        memory_source: `cuda` (the allocator) or `rss` (the process's resident memory, libraries included).
        ttft_runs_s: of each run, from the request to the first text; no part of the prompt was cached.
        tpot_runs_s: of each run, the mean time per token after the first one.
        answer_tokens: tokens of one answer.
        answer: the greedy answer.
        kl_nats, top1_agreement, perplexity, positions: see `kani_nb.metrics.divergence.Quality`.
        load_average: of the machine, over the last minute, when the runs began. This comparison is a part of it.
        others_cpus: how many CPUs everything else on the machine kept busy during the runs.
        notes: what else the reader should know.
    """

    label: str
    settings: Quantization
    line: str = ""
    reason: str = ""
    fix: str = ""
    dtype: str = ""
    device: str = ""
    load_s: float | None = None
    weight_bytes: int | None = None
    in_use_bytes: int | None = None
    peak_bytes: int | None = None
    left_bytes: int | None = None
    left_resident_bytes: int | None = None
    memory_source: str = "rss"
    ttft_runs_s: tuple[float, ...] = ()
    tpot_runs_s: tuple[float, ...] = ()
    answer_tokens: int | None = None
    answer: str = ""
    kl_nats: float | None = None
    top1_agreement: float | None = None
    perplexity: float | None = None
    positions: int | None = None
    load_average: float | None = None
    others_cpus: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether it was loaded and answered."""
        return not self.reason

    @property
    def ttft_s(self) -> float | None:
        """Mean over the runs."""
        return fmean(self.ttft_runs_s) if self.ttft_runs_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean over the runs."""
        return fmean(self.tpot_runs_s) if self.tpot_runs_s else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, with the attributes' names as keys, the means, and the least and the most time per token."""
        record = asdict(self) | {
            "scheme": self.settings.scheme,
            "settings": self.settings.given,
            "is_measured": self.is_measured,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "tpot_min_s": min(self.tpot_runs_s, default=None),
            "tpot_max_s": max(self.tpot_runs_s, default=None),
        }
        return {key: _json_safe(value) for key, value in record.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where it was measured.

    Attributes:
        versions: of Python and the libraries that take part.
        machine: the processor's or the card's name.
        cpus: logical CPUs that the process may use.
        threads: CPU threads of every run.
        load_average: of the machine when the comparison began; None where the system has none.
        beside: engines that stayed loaded meanwhile, and where.
    """

    versions: dict[str, str]
    machine: str
    cpus: int
    threads: int
    load_average: float | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Schemes of one model side by side, in the order they were measured, one after the other.

    Attributes:
        reference: what the quality was measured against, in words; empty where nothing was.
        reference_perplexity: of that.
        text_name: which text the quality was measured on.
        text_tokens: its length.
        text_pieces: how many pieces it was read in, each by itself, from its first token.
        notes: what concerns all rows.
    """

    model: str
    environment: Environment
    rows: tuple[ComparedRow, ...] = ()
    runs: int = 3
    max_new_tokens: int = 64
    prompt: str = ""
    reference: str = ""
    reference_perplexity: float | None = None
    text_name: str = ""
    text_tokens: int = 0
    text_pieces: int = 0
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[ComparedRow, ...]:
        """The rows that have figures."""
        return tuple(row for row in self.rows if row.is_measured)

    def row(self, label: str) -> ComparedRow | None:
        """The row of that label or scheme."""
        return next((row for row in self.rows if label in (row.label, row.settings.scheme)), None)

    def speed_up(self, row: ComparedRow) -> float | None:
        """How many times faster a token of `row` is than one of the first row that was measured."""
        first = next((each.tpot_s for each in self.measured if each.tpot_s), None)
        return first / row.tpot_s if first and row.tpot_s else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: `{"model", "environment", "schemes": [...], ...}`."""
        record = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("rows", "environment")
        }
        schemes = [row.to_dict() | {"speed_up": _json_safe(self.speed_up(row))} for row in self.rows]
        values = {key: _json_safe(value) for key, value in record.items()}
        return values | {"environment": asdict(self.environment), "schemes": schemes}

    def to_text(self) -> str:
        """The table, what it was measured with, and how each answer begins."""
        return "\n".join([*self.heading, "", *_columns(self.table), "", *self.remarks, "", *self._answers()])

    @property
    def heading(self) -> list[str]:
        """What was compared, where and how, in a few lines."""
        where = self.environment
        threads = f"{where.threads} of {where.cpus} CPUs" if where.threads != where.cpus else f"{where.cpus} CPUs"
        load = "" if where.load_average is None else f", load average {where.load_average:.1f} at the start"
        versions = " · ".join(f"{name} {version}" for name, version in where.versions.items())
        lines = [
            f"{self.model} on {where.machine}, {threads}{load}",
            versions,
            (
                f"One after the other, each loaded, asked and freed; the mean of {self.runs} greedy "
                f"run{'s' * (self.runs != 1)} of up to {self.max_new_tokens} tokens after a warm-up."
            ),
        ]
        if self.reference:
            pieces = f" in {self.text_pieces} pieces" if self.text_pieces > 1 else ""
            lines.append(
                f"KL and top-1 against {self.reference} (perplexity {_number(self.reference_perplexity)}) "
                f"on {self.text_name}: {self.text_tokens:,} tokens{pieces}."
            )
        return lines

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The cells of the rows, under `COLUMNS`, the headers first."""
        return [COLUMNS, *(self._cells(row) for row in self.rows)]

    @property
    def remarks(self) -> list[str]:
        """What is to be known of single rows and of all: reasons, memory that did not come back, the machine's load."""
        lines = [
            f"{row.label} was not measured: {row.reason}" + (f" → {row.fix}" if row.fix else "")
            for row in self.rows
            if not row.is_measured
        ]
        said = dict.fromkeys(note for row in self.rows for note in row.notes)
        lines += [f"{', '.join(row.label for row in self.rows if note in row.notes)}: {note}" for note in said]
        busy = [
            f"{row.label} {row.load_average:.1f}"
            + (f" ({row.others_cpus:.1f} CPUs by others)" if row.others_cpus is not None else "")
            for row in self.measured
            if row.load_average is not None
        ]
        if busy:
            lines.append(f"Load average when the runs began: {', '.join(busy)}.")
        sources = sorted({row.memory_source for row in self.measured})
        crowded = [row.label for row in self.measured if self._is_crowded(row)]
        if crowded:
            lines.append(
                f"Other programs wanted the same CPUs while {', '.join(crowded)} answered: do not believe the times, "
                "and measure again when the machine is idle."
            )
        left = [
            f"{row.label} {row.left_bytes / _MIB:+,.0f} MiB ({row.left_resident_bytes / _MIB:+,.0f})"
            for row in self.rows
            if row.left_bytes is not None and row.left_resident_bytes is not None
        ]
        if left:
            kept = "resident memory, free pages included" if "rss" in sources else "the same on the GPU"
            lines.append(f"Still allocated after each was freed (in brackets {kept}): {', '.join(left)}.")
        lines += [_MEMORY_WORDS.get(each, each) for each in sources]
        if self.environment.beside:
            lines.append(f"{', '.join(self.environment.beside)} stayed loaded meanwhile, and took memory of its own.")
        return [*lines, *self.notes]

    def _is_crowded(self, row: ComparedRow) -> bool:
        """Whether more was wanted of the CPUs than there is, while it was timed."""
        where = self.environment
        wanted = where.threads + (row.others_cpus or 0.0)
        return row.memory_source == "rss" and wanted > where.cpus + _CROWDED_CPUS

    def _answers(self) -> list[str]:
        lines = [f"Answers to {self.prompt!r} begin:"] if self.measured else []
        return lines + [f"  {row.label}: {beginning(row.answer)}" for row in self.measured]

    def _cells(self, row: ComparedRow) -> tuple[str, ...]:
        if not row.is_measured:
            return (row.label, *("-" for _ in COLUMNS[1:]))
        speed_up = self.speed_up(row)
        return (
            row.label,
            _mib(row.weight_bytes),
            _mib(row.peak_bytes),
            "" if row.load_s is None else f"{row.load_s:.1f}",
            "" if row.ttft_s is None else f"{row.ttft_s * 1000:,.0f}",
            _per_token(row.tpot_runs_s),
            "" if speed_up is None else f"{speed_up:.2f}x",
            "" if row.kl_nats is None else _number(row.kl_nats),
            "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
            _number(row.perplexity),
        )


def beginning(answer: str, most: int = _ANSWER_SHOWN) -> str:
    """The first words of an answer, on one line."""
    words = " ".join(answer[: 4 * most].split())
    return words if len(words) <= most and len(answer) <= 4 * most else f"{words[: most - 1]}…"


def _per_token(runs: Sequence[float]) -> str:
    if not runs:
        return ""
    low, high = min(runs) * 1000, max(runs) * 1000
    return f"{fmean(runs) * 1000:,.1f} ({low:,.1f}-{high:,.1f})"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / _MIB:,.1f}"


def _number(value: float | None) -> str:
    """Three digits that matter; a divergence spans four orders of magnitude."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    return f"{value:.5f}" if abs(value) < 0.001 else f"{value:.4f}" if abs(value) < 1 else f"{value:,.3f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left, and numbers to the right under their headers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        words = [
            word.rjust(width) if column else word.ljust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(words).rstrip())
    return lines


def _json_safe(value: Any) -> Any:
    """`value` without what JSON cannot say: what is not finite becomes None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [_json_safe(each) for each in value]
    if isinstance(value, dict):
        return {key: _json_safe(each) for key, each in value.items()}
    return value
