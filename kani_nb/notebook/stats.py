"""What a conversation's answers took, as a figure and as a table. Drawing is `figures`' own; this only shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.shell import front_end
from kani_nb.notebook.stat_line import peak_memory
from kani_nb.notebook.tables import print_text, text_table

if TYPE_CHECKING:
    from kani_nb.conversation.session import ChatSession
    from kani_nb.figures.bundle import FigureBundle


def metrics_of(session: ChatSession) -> list[GenerationMetrics]:
    """What the answers along the current branch took, as far as it was recorded."""
    return [GenerationMetrics.from_dict(turn.metrics) for turn in session.turns if turn.metrics]


def figure_of(shell: Any, metrics: Sequence[GenerationMetrics]) -> FigureBundle | None:
    """Memory and latency over `metrics`; None where there is nothing to draw, or no front end to draw it."""
    place = front_end(shell)
    if not metrics or not place.has_kernel:
        return None
    from kani_nb.figures.conversation import conversation_figure

    return conversation_figure(metrics, for_colab=place.kind == "colab")


def stats_table(metrics: Sequence[GenerationMetrics]) -> str:
    """One row per answer, times in milliseconds and counts in tokens; no column for what no answer has."""
    headers = ("turn", "engine", "first text", "per token", "tok/s", "prompt", "cached", "new", "peak", "ended by")
    rows = [
        (
            str(each.turn or position),
            each.model,
            _milliseconds(each.ttft_s),
            _milliseconds(each.tpot_s),
            "" if each.tokens_per_s is None else f"{each.tokens_per_s:,.1f}",
            _count(each.prompt_tokens),
            _count(each.cached_tokens),
            _count(each.completion_tokens),
            peak_memory(each).removeprefix("peak "),
            each.finish_reason,
        )
        for position, each in enumerate(metrics, 1)
    ]
    shown = [column for column in range(len(headers)) if any(row[column] for row in rows)]
    return text_table([headers[at] for at in shown], [[row[at] for at in shown] for row in rows])


def show_stats(shell: Any, session: ChatSession, *, draws: bool) -> None:
    """The figure of the conversation, where it may be drawn, and its table."""
    metrics = metrics_of(session)
    if not metrics:
        print_text("This conversation has no answers yet.")
        return
    figure = figure_of(shell, metrics) if draws else None
    if figure is not None:
        from IPython.display import display

        display(figure.data, metadata=figure.metadata, raw=True)
    print_text(stats_table(metrics))


def _milliseconds(duration_s: float | None) -> str:
    return "" if duration_s is None else f"{duration_s * 1000:,.{0 if duration_s >= 0.1 else 1}f} ms"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
