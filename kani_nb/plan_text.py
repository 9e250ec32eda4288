"""A plan in words: its table, what is recommended and why, and what else to know. For terminals and beside the HTML.

Pure functions of a `Plan`, which both the command line and the notebook show; nothing here computes bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from kani_nb._amounts import in_words
from kani_nb.hardware.plans import Budget, Plan, PlanRow

_MIB, _GIB = 2**20, 2**30
#: Beside the recommended row, in every form of the table: nothing is said by colour alone.
MARK = "\N{RIGHTWARDS ARROW}"
#: How the planner begins the note that says why a row is the recommended one.
_REASON = "recommended: "
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
#: More devices than this are not named.
_MOST_NAMED = 2


@dataclass(frozen=True, slots=True)
class PlanTable:
    """The plan as cells of text.

    Attributes:
        headers: one for each column; the first is the mark's and has none.
        rows: as many cells each.
        numbers: which columns hold numbers, and line up at the right.
        legend: what the columns say, in one line.
        recommended: index of the row to take, or None.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int]
    legend: str
    recommended: int | None


def plan_table(plan: Plan) -> PlanTable:
    """One row for each scheme, all amounts of memory in one unit."""
    is_small = max((row.recommended_bytes for row in plan.rows), default=0) < _GIB
    unit, divisor, digits = ("MiB", _MIB, 0) if is_small else ("GiB", _GIB, 2)

    def amount(count: int) -> str:
        return f"{count / divisor:,.{digits}f}"

    def cells(index: int, row: PlanRow) -> tuple[str, ...]:
        return (
            MARK if index == plan.recommended else "",
            row.label,
            _SHORT.get(row.dtype, row.dtype),
            _fits(row),
            amount(row.weight_bytes),
            amount(row.kv_bytes),
            amount(row.working_bytes),
            amount(row.peak_bytes),
            amount(row.recommended_bytes),
            "" if row.ceiling_tokens_per_s is None else f"≤ {speed(row.ceiling_tokens_per_s).split()[0]}",
        )

    headers = ("", "scheme", "rest in", "fits", "weights", "KV cache", "working", "total", "to have", "tok/s")
    rows = tuple(cells(index, row) for index, row in enumerate(plan.rows))
    # What every row says alike is said once, below.
    dtypes = {row.dtype for row in plan.rows}
    shown = [at for at in range(len(headers)) if at != 2 or len(dtypes) > 1]
    shown = [at for at in shown if at < 2 or any(row[at] for row in rows)]
    legend = [f"memory in {unit}"]
    if len(dtypes) == 1:
        legend.append(f"what is not quantized is in {_SHORT.get(*dtypes, *dtypes)}")
    else:
        legend.append("rest in: what is not quantized")
    if any(row.ceiling_tokens_per_s is not None for row in plan.rows):
        legend.append("tok/s at most: bandwidth over the bytes that a token reads")
    return PlanTable(
        headers=tuple(headers[at] for at in shown),
        rows=tuple(tuple(row[at] for at in shown) for row in rows),
        numbers=frozenset(index for index, at in enumerate(shown) if at >= 4),
        legend="; ".join(legend),
        recommended=plan.recommended,
    )


def _fits(row: PlanRow) -> str:
    if not row.fits:
        return "no"
    return "yes" if len(row.shares) < 2 else f"on {len(row.shares)}"


def title(plan: Plan) -> str:
    """The model, its size and the context in one line."""
    return (
        f"{plan.model}: {plan.architecture}, {count_of_parameters(plan.parameters)} parameters, "
        f"{plan.context_tokens:,} tokens of context"
    )


def count_of_parameters(parameters: int) -> str:
    """`135 M`, `7.6 B`."""
    if parameters >= 10**9:
        return f"{parameters / 10**9:.{1 if parameters < 10**11 else 0}f} B"
    return f"{parameters / 10**6:.0f} M" if parameters >= 10**6 else f"{parameters:,}"


def places(budgets: Sequence[Budget]) -> str:
    """The devices that were planned for, equal ones together."""
    said = []
    for (description, total, usable), group in groupby(
        budgets, lambda each: (each.description, each.total_bytes, each.usable_bytes)
    ):
        names = [each.name for each in group]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        each = "" if len(names) == 1 else " each"
        told = f" ({description})" if description and description != name else ""
        said.append(f"{name}{told}: {in_words(usable)} of {in_words(total)} usable{each}")
    return "; ".join(said)


def verdict(plan: Plan) -> str:
    """Which row to take, in a sentence; or that none fits, how much is missing, and what could be done."""
    best = plan.best
    if best is not None:
        usable = sum(each.usable_bytes for each in plan.budgets if each.name in {share.device for share in best.shares})
        of = f" of {in_words(usable)} usable" if usable else ""
        where = " + ".join(share.device for share in best.shares[:_MOST_NAMED])
        on = f" on {where}" if where and len(best.shares) <= _MOST_NAMED else ""
        why = next((note.removeprefix(_REASON) for note in best.notes if note.startswith(_REASON)), "")
        takes = f"{in_words(best.peak_bytes)}{of}{on}"
        return f"{MARK} {row_in_words(best)} is recommended: {f'{why}; it takes ' if why else ''}{takes}"
    if not plan.rows:
        return f"{MARK} no scheme can be planned for {plan.model}"
    able = [row for row in plan.rows if row.can_run]
    if not able:
        return f"{MARK} none of them runs there: {plan.rows[0].why_not}"
    least = min(able, key=lambda row: row.peak_bytes)
    return (
        f"{MARK} none of them fits: {row_in_words(least)} takes the least, {in_words(least.peak_bytes)}, and "
        f"{in_words(plan.usable_bytes)} are usable. A shorter --context, a smaller model or another --card fits "
        "sooner; --allow-offload runs the rest from main memory or the disk, slowly"
    )


def row_in_words(row: PlanRow) -> str:
    """The scheme for a sentence, where the name `none` would be misread."""
    rest = _SHORT.get(row.dtype, row.dtype)
    return f"unquantized {rest}" if row.settings.is_none else row.label


def notes(plan: Plan) -> list[str]:
    """What else to know, a sentence each: what was decided and why, what does not fit and why, what loading takes."""
    said = list(plan.notes)
    said += _by_text(plan, [(row, note) for row in plan.rows for note in row.notes if not note.startswith(_REASON)])
    # That a row takes more than all devices have is seen in the table.
    unclear = [row for row in plan.rows if row.why_not and row.peak_bytes <= plan.usable_bytes]
    said += _by_text(plan, [(row, row.why_not) for row in unclear])
    row = plan.best or (plan.rows[0] if plan.rows else None)
    if row is not None and row.disk_bytes:
        said.append(
            f"The checkpoint takes {disk(row.disk_bytes)} on the disk, and as much to download where it is not; "
            f"loading it as {row_in_words(row)} takes up to {in_words(row.host_bytes)} of main memory"
        )
    return said


def _by_text(plan: Plan, said: Sequence[tuple[PlanRow, str]]) -> list[str]:
    """`nf4, fp4: why`, where several rows have the same to say; without their names where all have."""
    rows: dict[str, list[PlanRow]] = {}
    for row, text in said:
        rows.setdefault(text, []).append(row)
    return [
        text
        if len(saying) == len(plan.rows) > 1 or text.startswith(saying[0].label)
        else f"{', '.join(row_in_words(row) for row in saying)}: {text}"
        for text, saying in rows.items()
    ]


def disk(count: int) -> str:
    """Bytes of a disk or a download, in the decimal units that those are sold in."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def speed(tokens_per_s: float) -> str:
    """`118 tok/s`, with the digits that matter."""
    return f"{tokens_per_s:,.{0 if tokens_per_s >= 10 else 1}f} tok/s"


def columns(lines: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Cells as lines of text that line up; those of `numbers` at the right."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))] if lines else []
    return "\n".join(
        "  ".join(
            word.rjust(widths[at]) if at in numbers else word.ljust(widths[at]) for at, word in enumerate(line)
        ).rstrip()
        for line in lines
    )


def plan_text(plan: Plan) -> str:
    """The whole plan as plain text."""
    table = plan_table(plan)
    lines = [title(plan), places(plan.budgets), ""]
    if table.rows:
        lines += [columns([table.headers, *table.rows], table.numbers), table.legend, ""]
    lines.append(verdict(plan))
    if plan.best is not None and plan.best.line:
        lines.append(f"  {plan.best.line}")
    lines += [f"- {each}" for each in notes(plan)]
    return "\n".join(lines)
