"""Which row of a plan to take, and what that is worth in words.

Quality and speed are those that were measured on one small model; they order the schemes, and say little about how far
apart they are on a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kani_nb.hardware.plans import PlanRow
from kani_nb.hardware.schemes import gguf_schemes

#: Mean KL divergence from float32, in nats per token, of SmolLM2-135M-Instruct over the 643 tokens of
#: `kani-nb compare smollm2 --schemes none,cpu-int8,int8,nf4,nf4+dq,fp4,cpu-int4+g64` (gptq: `pytest -m gptq`).
#: A model of that size loses more than a large one. Its weights lay on a grid of groups of 32 before, which cpu-int4's
#: default finds again (0.003); so the figure of groups of 64 stands for it.
KL_NATS = {
    "none": 0.0012, "cpu-int8": 0.0058, "int8": 0.0205, "cpu-int4": 0.195, "gptq": 0.258, "nf4": 0.273, "fp4": 0.444,
}  # fmt: skip
#: Tokens per second on a CPU, times bfloat16, of the same model: one thread of a server CPU with AVX512-BF16.
CPU_SPEEDS = {"none": 1.0, "cpu-int8": 1.8, "cpu-int4": 2.2, "nf4": 1.5, "fp4": 1.5, "gptq": 1.8, "int8": 0.77}
#: bitsandbytes' general 4-bit product on a CPU without AVX512-BF16: 14.6 tokens per second where that has 30.
_SLOW_4BIT = 0.5
#: Nats that count as nearly the original's answers, and the share more that is not worth a slower scheme: choices.
_NEARLY_THE_SAME, _AS_GOOD = 0.025, 1.25


def recommend(
    rows: Sequence[PlanRow], kind: str, cpu_speeds: Mapping[str, float] | None = None, *, has_fast_4bit: bool = True
) -> tuple[int | None, str]:
    """The index of the row to take, and why, in one clause; `(None, "")` where none fits.

    On a GPU the best answers of what fits with headroom: full precision is also the fastest there. On a CPU the
    fastest of those whose answers are as good: within 0.02 nats of the original, or within a quarter of the best that
    fits. GPTQ is never recommended for a checkpoint that would first have to be made into one, nor a type of GGUF
    files, which would have to be found. Where nothing has headroom, what fits without is taken by the same rule.

    Args:
        rows: of one plan.
        kind: of the device that computes.
        cpu_speeds: times bfloat16, by scheme, where their products were measured on this CPU.
        has_fast_4bit: this CPU has what bitsandbytes' fast 4-bit product needs.
    """
    able = [at for at, row in enumerate(rows) if row.fits and row.settings.scheme in KL_NATS]
    able = [at for at in able if rows[at].settings.scheme != "gptq" or len(rows) == 1]
    roomy = [at for at in able if rows[at].has_headroom]
    foreign = {each.name for each in gguf_schemes()}  # a file that has it must be found first
    others = [at for at, row in enumerate(rows) if row.fits and (len(rows) == 1 or row.settings.scheme not in foreign)]
    chosen_from = roomy or able or others
    if not chosen_from:
        return None, ""
    is_roomy = any(rows[at].has_headroom for at in chosen_from)
    tight = "" if is_roomy else "; it is tight: less than a tenth is left over"
    if len(rows) == 1:
        return 0, f"it is the only one that was planned, and it fits{tight}"
    if kind != "cpu":
        best = min(chosen_from, key=lambda at: (_kl(rows[at]), -rows[at].weight_bytes))
        return best, f"recommended: {_quality(rows[best])}{tight}"
    speeds = {**CPU_SPEEDS, **({} if has_fast_4bit else {"nf4": _SLOW_4BIT, "fp4": _SLOW_4BIT}), **(cpu_speeds or {})}
    limit = max(_NEARLY_THE_SAME, _AS_GOOD * min(_kl(rows[at]) for at in chosen_from))
    good = [at for at in chosen_from if _kl(rows[at]) <= limit]
    best = min(good, key=lambda at: (-speeds.get(rows[at].settings.scheme, 1.0), _kl(rows[at]), rows[at].weight_bytes))
    scheme = rows[best].settings.scheme
    fast = ""
    if scheme in (cpu_speeds or {}):
        fast = f", its products {speeds[scheme]:.1f} times as fast as bfloat16's (measured on this CPU)"
    elif scheme != "none" and scheme in speeds:
        fast = f", at {speeds[scheme]:.1f} times the speed of bfloat16 (measured on a server CPU)"
    return best, f"recommended: {_quality(rows[best])}{fast}{tight}"


def _kl(row: PlanRow) -> float:
    return KL_NATS.get(row.settings.scheme, float("inf"))


def _quality(row: PlanRow) -> str:
    if row.settings.is_none:
        return "it fits as it is, and nothing answers better"
    kl = _kl(row)
    if row.settings.scheme not in KL_NATS:
        return "it fits, and what its answers are worth was not measured (%engine compare does that)"
    worth = "nearly the original's answers" if kl <= _NEARLY_THE_SAME else "the best answers of what fits"
    return f"{worth} (KL divergence {kl:.2g} nats from full precision, measured on a model of 135 M parameters)"
