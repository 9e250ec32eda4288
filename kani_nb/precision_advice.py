"""Which precision to choose, and why: what was measured, with where it was measured, and what a plan says for here.

The figures are one small model's on one processor, and are said to be that; `%engine compare MODEL` measures another
model on the machine at hand. Nothing here measures or loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from kani_nb import plan_text
from kani_nb.hardware.plans import Plan
from kani_nb.hardware.recommending import KL_NATS


@dataclass(frozen=True, slots=True)
class Measured:
    """One scheme on SmolLM2-135M-Instruct on a CPU.

    Attributes:
        divergence: mean KL divergence of the next token's distribution from float32's, in nats; those that the planner
            recommends by.
        agreement: how often the likeliest next token is float32's; None where it was not counted.
        speeds: tokens per second over bfloat16's with one and with two threads; None where it was not timed.
    """

    scheme: str
    divergence: float
    agreement: float | None
    speeds: tuple[float | None, float | None]


MEASURED = (
    Measured("float32", 0.0, 1.0, (0.91, 0.71)),
    Measured("bfloat16", KL_NATS["none"], 0.963, (1.0, 1.0)),
    Measured("cpu-int8", KL_NATS["cpu-int8"], 0.944, (1.78, 1.90)),
    Measured("int8", KL_NATS["int8"], 0.910, (0.77, 0.68)),
    Measured("gptq", KL_NATS["gptq"], 0.733, (None, 1.8)),
    Measured("cpu-int4", KL_NATS["cpu-int4"], 0.747, (2.2, None)),
    Measured("nf4", KL_NATS["nf4"], 0.714, (1.53, 1.40)),
    Measured("nf4 + double quant", KL_NATS["nf4"], 0.719, (None, 1.45)),
    Measured("fp4", KL_NATS["fp4"], 0.641, (1.52, 1.40)),
)
_HEADERS = ("scheme", "KL (nats)", "same token", "speed, 1 thread", "2 threads")


#: What the figures say; those of divergence are put in, so that the two cannot drift apart.
_SENTENCES = (
    (
        "16 bits are the reference: bfloat16 is {none} nats from float32, agrees with it on 96 % of the tokens, and"
        " takes half the memory. Where it fits and is fast enough, quantizing gains nothing."
    ),
    (
        "On a CPU take cpu-int8: 1.8 to 1.9 times as fast as bfloat16, {cpu_int8} nats away, and nothing to "
        "install. cpu-int4 is the fastest (2.2 times), at {cpu_int4} nats."
    ),
    (
        "bitsandbytes' int8 is further away ({int8} nats) than cpu-int8, and slower than bfloat16 on a CPU (0.7 to "
        "0.8 times): it is for GPUs whose memory is short."
    ),
    (
        "For 4 bits on a GPU take nf4, with --double-quant: fp4 is as large and further away ({fp4} against {nf4} "
        "nats), and double quantization costs nothing that was measurable. gptq is closer ({gptq} nats), and takes "
        "a minute or more to make, once."
    ),
    (
        "Fewer bits were always further away. That 4-bit GPTQ answers better than 8 bits, as older guides say, was "
        "not so here: {gptq} against {int8} nats."
    ),
)
_SOURCES = (
    (
        "Measured on SmolLM2-135M-Instruct over 643 tokens of prose, code and dialogue (kani-nb compare smollm2), on "
        "two cores of an AMD EPYC with AVX-512 BF16; torch 2.13 (gptq: 2.15), transformers 5.23, bitsandbytes 0.50. "
        "The speeds are those of a machine with nothing else to do."
    ),
    (
        "Its weights had been rounded to 4 bits (Q4_1) once before, so that a second 4-bit grid costs it more than an "
        "original; and groups of 32, which are cpu-int4's default, find that very grid again (0.003 nats): its figure "
        "here is that of groups of 64, which cut across it."
    ),
    "Not measured: any GPU, and any other model. %engine compare MODEL measures yours, on this machine.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to say, in parts, for HTML and for text.

    Attributes:
        title: the question that it answers.
        verdict: what a plan says for one model and this machine; empty without one.
        line: the `%load_engine` line of that.
        sentences: what was measured.
        headers, rows: the figures.
        sources: where they come from, and what was not measured.
    """

    title: str
    verdict: str
    line: str
    sentences: tuple[str, ...]
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...]

    def to_text(self) -> str:
        """All of it as plain text."""
        grid = plan_text.columns([self.headers, *self.rows], numbers=range(1, len(self.headers)))
        lines = [self.title, "", *([self.verdict] if self.verdict else [])]
        lines += [f"  {self.line}", ""] if self.line else []
        return "\n".join([*lines, *(f"- {each}" for each in self.sentences), "", grid, "", *self.sources])


def advice(plan: Plan | None = None) -> Advice:
    """What was measured; with `plan` also which scheme to take for its model on its devices."""
    return Advice(
        title="Which precision to choose" if plan is None else f"Which precision to choose for {plan.model}",
        verdict="" if plan is None else _verdict(plan),
        line=plan.best.line if plan is not None and plan.best is not None else "",
        sentences=tuple(each.format(**_nats()) for each in _SENTENCES),
        headers=_HEADERS,
        rows=tuple(_row(each) for each in sorted(MEASURED, key=lambda each: each.divergence)),
        sources=_SOURCES,
    )


def _nats() -> dict[str, str]:
    return {name.replace("-", "_"): f"{nats:.2g}" for name, nats in KL_NATS.items()}


def _verdict(plan: Plan) -> str:
    """The recommendation, and what the schemes with more bits lack."""
    said = plan_text.verdict(plan)
    best = plan.best
    if best is None:
        return said
    wider = [row for row in plan.rows if row.weight_bytes > best.weight_bytes]
    short = [plan_text.row_in_words(row) for row in wider if not row.fits]
    fitting = [plan_text.row_in_words(row) for row in wider if row.fits]
    if short:
        said += (
            f"; {', '.join(short)} {'does' if len(short) == 1 else 'do'} not fit with {plan.context_tokens:,} tokens"
        )
    if fitting:
        said += f"; {', '.join(fitting)} would fit too"
    return said


def _row(each: Measured) -> tuple[str, ...]:
    agreement = "" if each.agreement is None else f"{each.agreement:.1%}"
    speeds = ("" if speed is None else f"{speed:.2f}x" for speed in each.speeds)
    return (each.scheme, f"{each.divergence:.4f}", agreement, *speeds)
