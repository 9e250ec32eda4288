"""One turn as a notebook output: the prompt, the answer, notes and the stat line, as HTML and as plain text.

Pure: given what is known of a turn, the same bundle. Whatever the user or the model wrote is escaped or goes through
`render`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from kani_nb.messages import ChatMessage, ChatRole, MediaPart, MessagePart, TextPart
from kani_nb.notebook import math
from kani_nb.notebook.render import showable
from kani_nb.notebook.theme import style_tag

#: An escape sequence would command the terminal that shows the plain text; a lone surrogate cannot be sent.
_COMMANDING = re.compile("[\x1b\x80-\x9f\ud800-\udfff]")
#: Characters of a call and of its result that an output holds; the conversation has all of it.
_LONGEST_RESULT = 4_000
#: Characters of an attached text that an output shows; the model gets all of it.
_LONGEST_ATTACHED = 2_000


@dataclass(frozen=True, slots=True)
class StepText:
    """One call of a tool, in words.

    Attributes:
        name: of the function.
        arguments: as the model wrote them.
        result: what the model was told; None while it is not known.
        is_error: there is no result, and that text says why.
        said: what the model said before it called.
    """

    name: str
    arguments: str
    result: str | None = None
    is_error: bool = False
    said: str = ""

    @property
    def line(self) -> str:
        """The call and its result, shortened to a line."""
        called = f"{self.name}({_brief(_arguments_in_words(self.arguments), 120)})"
        if self.result is None:
            return called
        mark = "failed:" if self.is_error else "→"
        return f"{called} {mark} {_brief(self.result.removeprefix(f'{self.name} failed: '), 120)}"


@dataclass(frozen=True, slots=True)
class TurnText:
    """What an output says of one turn.

    Attributes:
        prompt: the user's words.
        prompt_html: the same as safe HTML with its pictures, where it has some (`thumbnails.prompt_html`).
        answer: the answer so far.
        answer_html: the same as safe HTML.
        model: who answers.
        reasoning: the model's reasoning so far, shown folded.
        steps: the tools that were called before the answer, each folded.
        status: what is happening, while the answer is not complete.
        progress: how much of that is done, in [0, 1], where it is known.
        notes: what the round has to say of itself.
        error: that the answer ended early, in one line.
        stat: the stat line.
        tokens_html: the tokens by their probability (`token_shades.tokens_html`), where they were asked for.
        is_prompt_above: a front end that shows the cell's source has the prompt in it already.
    """

    prompt: str
    answer: str
    answer_html: str
    model: str
    prompt_html: str = ""
    reasoning: str = ""
    steps: Sequence[StepText] = ()
    status: str = ""
    progress: float | None = None
    notes: Sequence[str] = ()
    error: str = ""
    stat: str = ""
    tokens_html: str = ""
    is_prompt_above: bool = False

    def to_bundle(self, *, is_running: bool = False) -> dict[str, str]:
        """`text/html` and `text/plain`."""
        sheet = style_tag(with_code="<pre><code class=" in self.answer_html)
        return {"text/html": sheet + self.to_html(is_running=is_running), "text/plain": self.to_text()}

    def end_bundle(self) -> dict[str, str]:
        """The error and the stat line alone, as an output of their own."""
        markup = f'{style_tag()}<div class="kani-nb {math.IGNORE_CLASS}">{self._end_html()}</div>'
        return {"text/html": markup, "text/plain": plain("\n".join(filter(None, (self.error, self.stat))))}

    def to_html(self, *, is_running: bool = False) -> str:
        """The turn as safe HTML, for a page that has the style sheet (`theme.style_tag`)."""
        who = _escape(self.model)
        busy = "true" if is_running else "false"
        head = f'<div class="kani-nb {math.IGNORE_CLASS}" role="log" aria-label="Chat turn" aria-busy="{busy}">'
        user = f'<div class="kani-nb-who">You</div><div dir="auto">{self.prompt_html or _escape(self.prompt)}</div>'
        user_class = "kani-nb-user kani-nb-above" if self.is_prompt_above else "kani-nb-user"
        parts = [
            f'{head}<article class="{user_class}" aria-label="You">{user}</article>',
            f'<article class="kani-nb-answer" aria-label="{who}"><div class="kani-nb-who">{who}</div>',
        ]
        if self.reasoning:
            parts.append(
                f'<details><summary>Reasoning</summary><div dir="auto">{_escape(self.reasoning)}</div></details>'
            )
        parts += [_step_html(step) for step in self.steps]
        if self.answer_html:
            parts.append(f'<div class="kani-nb-md" dir="auto">{self.answer_html}</div>')
        parts.append(f"{self.tokens_html}</article>")
        if self.status:
            bar = "" if self.progress is None else f' <progress max="1" value="{self.progress:.3f}"></progress>'
            parts.append(f'<div class="kani-nb-stat">{_escape(self.status)}{bar}</div>')
        parts += [f'<div class="kani-nb-note">{_escape(note)}</div>' for note in self.notes]
        parts += [self._end_html(), "</div>"]
        return "".join(parts)

    def _end_html(self) -> str:
        error = f'<div class="kani-nb-note kani-nb-error">{_escape(self.error)}</div>' if self.error else ""
        return error + (f'<div class="kani-nb-stat">{_escape(self.stat)}</div>' if self.stat else "")

    def to_text(self) -> str:
        """The turn as text."""
        called = [line for step in self.steps for line in (step.said, f"[{step.line}]") if line]
        lines = [f"You: {self.prompt}", *called, f"{self.model}: {self.answer}"]
        lines += [f"[{each}]" for each in (self.status, *self.notes, self.error, self.stat) if each]
        return plain("\n\n".join(lines))


def step_texts(messages: Sequence[ChatMessage]) -> tuple[StepText, ...]:
    """The calls of a turn with their results, in the order of the calls."""
    steps = []
    for at, message in enumerate(messages):
        # Some servers begin their ids anew in each message: a result belongs to the calls before it.
        after = takewhile(lambda each: each.role is ChatRole.FUNCTION, messages[at + 1 :])
        results = {each.tool_call_id: each for each in after}
        for number, call in enumerate(message.tool_calls or ()):
            result = results.get(call.id)
            steps.append(
                StepText(
                    call.function.name,
                    call.function.arguments,
                    prompt_text(result.parts) if result is not None else None,
                    bool(result.is_tool_call_error) if result is not None else False,
                    message.text if number == 0 else "",
                )
            )
    return tuple(steps)


def _step_html(step: StepText) -> str:
    said = f'<div class="kani-nb-said" dir="auto">{_escape(step.said)}</div>' if step.said else ""
    told = "" if step.result is None else f"<pre>{_escape(shortened(step.result, _LONGEST_RESULT))}</pre>"
    called = f"<pre>{_escape(shortened(step.arguments, _LONGEST_RESULT))}</pre>"
    return f"{said}<details><summary>{_escape(step.line)}</summary>{called}{told}</details>"


def _arguments_in_words(arguments: str) -> str:
    """`city='Paris', days=3`; what is no JSON object as it is."""
    try:
        given = json.loads(arguments)
    except (json.JSONDecodeError, RecursionError):
        return arguments
    if not isinstance(given, dict):
        return arguments
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items())


def _brief(text: str, limit: int) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}…"


def plain(text: str) -> str:
    """`text` verbatim, but for escape characters and lone surrogates, which become U+FFFD."""
    return _COMMANDING.sub("\N{REPLACEMENT CHARACTER}", text)


def prompt_text(prompt: str | Sequence[MessagePart | str]) -> str:
    """A prompt as text, with its media named in place."""
    if isinstance(prompt, str):
        return prompt
    return "".join(part_text(part) for part in prompt)


def part_text(part: MessagePart | str) -> str:
    """One part as text: media are named, and a long text that is attached is shortened."""
    if isinstance(part, MediaPart):
        return f"[{part.mime}, {len(part.data):,} bytes]"
    if isinstance(part, TextPart) and len(part.content) > _LONGEST_ATTACHED:
        return f"{shortened(part.content, _LONGEST_ATTACHED)}\n\n"
    return str(part)


def shortened(text: str, limit: int) -> str:
    """The beginning of a text too long for every frame, and how much more there is."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def _escape(text: str) -> str:
    return html.escape(showable(text))
