"""A turn that is over, as the words of an output: what was asked, said, called and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.render import markdown_to_html
from kani_nb.notebook.stat_line import stat_line
from kani_nb.notebook.thumbnails import prompt_html
from kani_nb.notebook.transcript import TurnText, prompt_text, step_texts

if TYPE_CHECKING:
    from kani_nb.conversation.session import Prompt
    from kani_nb.conversation.tree import Turn


def prompt_of_turn(turn: Turn) -> Prompt:
    """What was asked, as it can be asked again."""
    content = turn.prompt.content
    return content if isinstance(content, str) else tuple(content or ())


def text_of_turn(turn: Turn) -> TurnText:
    """The whole turn in words, its answer as safe HTML too."""
    prompt = prompt_of_turn(turn)
    text = turn.answer.text if turn.answer is not None else ""
    return TurnText(
        prompt=prompt_text(prompt),
        prompt_html=prompt_html(prompt),
        answer=text,
        answer_html=markdown_to_html(text),
        model=turn.model or "Assistant",
        reasoning="\n\n".join(filter(None, (each.reasoning for each in turn.messages))),
        steps=step_texts(turn.messages),
        notes=("interrupted",) if turn.interrupted and not turn.metrics else (),
        stat=stat_line(GenerationMetrics.from_dict(turn.metrics)) if turn.metrics else "",
    )
