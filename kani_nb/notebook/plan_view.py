"""`%engine plan` and `%engine explain`: what a model would take here, and which precision to choose, before loading it.

Reads the line, asks `kani_nb.planning` off the main thread, and shows what it says as a table, a figure and text. The
numbers are the planner's.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from kani_nb import plan_text
from kani_nb._amounts import in_words
from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._runtime import Runtime, runtime
from kani_nb._waiting import Call
from kani_nb.errors import ConfigError, KaniNbError
from kani_nb.hardware.plans import Plan
from kani_nb.notebook import html_tables
from kani_nb.notebook.shell import front_end
from kani_nb.notebook.surface import Surface, SurfaceKind
from kani_nb.notebook.transcript import plain
from kani_nb.options import LineParser
from kani_nb.planning import PlanRequest, add_plan_options, plan_model, request_from_args

if TYPE_CHECKING:
    from kani_nb.engines.base import LoadProgress
    from kani_nb.precision_advice import Advice

T = TypeVar("T")

_EXAMPLES = """\
Examples:
  %engine plan qwen3-4b                          on this machine, under every scheme
  %engine plan qwen3-4b --card 2x3090            on two cards that are not here
  %engine plan qwen3-4b --context 32768 --schemes none,nf4+dq
"""


def plan_parser(prog: str = "%engine plan") -> LineParser:
    """The parser of what follows the verb."""
    parser = LineParser(prog=prog, usage="%(prog)s [MODEL] [OPTIONS]", add_help=False)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="alias, org/model, folder or FILE.gguf")
    add_plan_options(parser)
    return parser


def plan_details() -> str:
    """The options, for the verb's own help."""
    return plan_parser().format_help() + "\n" + _EXAMPLES


def run_plan(shell: Any, rest: str, *, draws: bool = True, surface: Surface | None = None) -> None:
    """Plan the model that `rest` names (the loaded one by default), and show it.

    Args:
        shell: the running shell.
        rest: the line after the verb.
        draws: whether figures may be drawn.
        surface: where to show it; the running cell's output by default.

    Raises:
        KaniNbError: the model, a card or a scheme cannot be found.
    """
    rt = runtime()
    request = _request(rt, plan_parser().parse_line(rest), "%engine plan")
    surface = surface or Surface()
    plan = _blocking(surface, request.model, lambda **on: plan_model(**request.arguments, **on))
    plan = with_loaded(plan, rt)
    bundle = plan_bundle(plan)
    if surface.kind is SurfaceKind.TERMINAL:
        surface.write(bundle["text/plain"] + "\n")
        return
    surface.show(bundle, {"kani_nb": {"version": 1, "plan": plan.to_dict()}}, is_final=True)
    place = front_end(shell)
    if draws and place.has_kernel and plan.rows:
        from kani_nb.figures.plan import plan_figure

        surface.show_below(plan_figure(plan, for_colab=place.kind == "colab").data)


def run_explain(shell: Any, rest: str) -> None:
    """Say which precision to choose for the model that `rest` names (the loaded one by default), and why.

    Raises:
        KaniNbError: as `run_plan`.
    """
    from kani_nb.precision_advice import advice

    rt = runtime()
    args = plan_parser("%engine explain").parse_line(rest)
    surface = Surface()
    plan: Plan | None = None
    if args.model is not None or _loaded(rt) is not None:
        request = _request(rt, args, "%engine explain")
        plan = _blocking(surface, request.model, lambda **on: plan_model(**request.arguments, **on))
    said = advice(plan)
    if surface.kind is SurfaceKind.TERMINAL:
        surface.write(said.to_text() + "\n")
        return
    surface.show({"text/html": _advice_html(said), "text/plain": plain(said.to_text())}, is_final=True)


def _request(rt: Runtime, args: argparse.Namespace, verb: str) -> PlanRequest:
    """What to plan; without a model the loaded one, as it was loaded."""
    if args.model is not None:
        return request_from_args(vars(args))
    config = _loaded(rt)
    if config is None:
        raise ConfigError("no model was named, and none is loaded", fix=f"{verb} smollm2")
    request = request_from_args({**vars(args), "model": config.model})
    context = request.context if request.context is not None else config.max_context_size
    return replace(request, revision=request.revision or config.revision, context=context)


def _loaded(rt: Runtime) -> Any:
    return rt.config_of(rt.engine_name) if rt.engine is not None else None


def with_loaded(plan: Plan, rt: Runtime) -> Plan:
    """`plan`, with a note of what the loaded engines hold of the same devices: it is not free now."""
    held = []
    for name, engine in rt.engines.items():
        memory = engine.memory()
        if memory is None or not any(each.name in memory.placement and each.usable_bytes for each in plan.budgets):
            continue
        count = in_words(memory.weight_bytes + memory.kv_bytes)
        held.append(f"{name} is loaded and holds {count} of {memory.device}, which is counted as taken")
    return replace(plan, notes=(*plan.notes, *held)) if held else plan


def _blocking(surface: Surface, subject: str, work: Callable[..., T]) -> T:
    """What `work` returns, run in a thread while this one shows its progress; an interrupt ends it."""
    shown = _Waiting(surface, subject)
    cancelled = threading.Event()
    with InterruptGuard() as guard:
        call: Call[T] | None = None
        try:
            running = asyncio.to_thread(work, progress=shown.progress, cancelled=cancelled)
            call = Call(runtime().loop, running, guard, pump=shown.pump, ask_to_end=cancelled.set)
            return call.result()
        except (Interrupted, CancelledError, KaniNbError):
            shown.clear()
            if call is not None and call.was_interrupted:
                raise Interrupted(f"interrupted; {subject} was not planned") from None
            raise


class _Waiting:
    """One line that says what is being read, where that takes long enough to be seen."""

    def __init__(self, surface: Surface, subject: str) -> None:
        self._surface = surface
        self._subject = subject
        self._latest = ""
        self._drawn = ""

    def progress(self, event: LoadProgress) -> None:
        """Take one step; on any thread."""
        self._latest = f"{event.stage} {event.detail}".strip()

    def pump(self) -> None:
        """Draw it, when there is something new."""
        said = self._latest
        if said == self._drawn or not self._surface.is_live:
            return
        self._drawn = said
        self._show(f"{self._subject}: {said}")

    def clear(self) -> None:
        """Leave nothing that seems to go on, where the error stands below."""
        if self._drawn:
            self._show(f"{self._subject} was not planned")

    def _show(self, words: str) -> None:
        markup = html_tables.framed(html_tables.text(words, "kani-nb-stat"), "Planning a model")
        self._surface.show({"text/html": markup, "text/plain": plain(words)})


def plan_bundle(plan: Plan) -> dict[str, str]:
    """`text/html` and `text/plain` of a plan."""
    return {"text/html": plan_html(plan), "text/plain": plain(plan_text.plan_text(plan))}


def plan_html(plan: Plan) -> str:
    """The plan as static HTML: its table, the recommended line, and notes."""
    grid = plan_text.plan_table(plan)
    out = [index for index, row in enumerate(plan.rows) if not row.fits]
    parts = [
        html_tables.text(plan_text.title(plan), "kani-nb-who"),
        html_tables.text(plan_text.places(plan.budgets), "kani-nb-stat"),
    ]
    if grid.rows:
        parts += [
            html_tables.table(grid.headers, grid.rows, numbers=grid.numbers, marked=grid.recommended, dimmed=out),
            html_tables.text(grid.legend, "kani-nb-stat"),
        ]
    parts += [
        html_tables.text(plan_text.verdict(plan)),
        html_tables.line_to_copy(plan.best.line if plan.best is not None else ""),
        html_tables.notes(plan_text.notes(plan)),
    ]
    return html_tables.framed("".join(parts), f"Plan of {plan.model}")


def _advice_html(said: Advice) -> str:
    parts = [html_tables.text(said.title, "kani-nb-who")]
    parts += [html_tables.text(said.verdict)] if said.verdict else []
    parts += [html_tables.line_to_copy(said.line), html_tables.notes(said.sentences)]
    parts.append(html_tables.table(said.headers, said.rows, numbers=range(1, len(said.headers))))
    parts += [html_tables.text(each, "kani-nb-stat") for each in said.sources]
    return html_tables.framed("".join(parts), said.title)
