"""What a model may call in a round, who decides whether it may, and where it is run; as records.

How one call is run is `tool_calls`; the loop of call, result and answer is `running_turn`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from kani_nb.engines.worker import run_in_thread
from kani_nb.errors import ConfigError
from kani_nb.functions import AIFunction, as_ai_function
from kani_nb.messages import ChatMessage, ToolCall

#: Rounds of calls after which the model must answer without any.
MAX_STEPS = 8
#: Rounds of calls in a row that all failed, after which it must.
MAX_FAILURES = 3


class Approval(StrEnum):
    """Who decides whether a function that changes something may run; read-only ones always may."""

    ALWAYS = "always"
    ASK = "ask"
    NEVER = "never"


class CannotAskError(Exception):
    """There is nobody who could be asked; the text says why."""


#: How a question for approval ends. A host that has buttons shows them in its place.
APPROVAL_CHOICES = "[y]es, [n]o, [a]lways: "


class Host(Protocol):
    """Where functions run, and where the person is asked."""

    async def run(self, call: Callable[[], Any]) -> Any:
        """What `call` gives. Cancelling ends it where that can be done, and else leaves it to end by itself."""

    async def ask(self, question: str) -> str:
        """The person's answer.

        Raises:
            CannotAskError: nobody can be asked.
        """


class WorkerHost:
    """Runs each function in a thread of its own, and asks nobody."""

    async def run(self, call: Callable[[], Any]) -> Any:
        """See `Host.run`; a thread cannot be ended from outside, so a cancelled call goes on unseen."""
        return await run_in_thread(lambda _: call(), name="kani-nb-tool")

    async def ask(self, question: str) -> str:
        """See `Host.ask`."""
        raise CannotAskError("nobody can be asked outside of a %%chat cell")


@dataclass(frozen=True, slots=True)
class Tools:
    """What a model may call in a round.

    Args:
        functions: `AIFunction`s, or plain functions with type hints.
        approve: `always`, `ask` (the default) or `never`: whether functions that are not marked read-only may run.
        max_steps: rounds of calls before the model must answer without any.
        look_up: finds the same functions again where they were named: one that was defined anew is then the new one.

    Raises:
        ConfigError: two functions of one name, something that is no function, or a bad value.
    """

    functions: tuple[AIFunction, ...]
    approve: Approval = Approval.ASK
    max_steps: int = MAX_STEPS
    look_up: Callable[[], Tools] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check each value once, here."""
        functions = tuple(as_ai_function(each) for each in self.functions)
        names = [each.name for each in functions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two tools are called {twice!r}", fix="@ai_function(name=...) renames one")
        if self.approve not in list(Approval):
            raise ConfigError(f"approve is {self.approve!r}", why=f"it must be {', '.join(Approval)}")
        if not _is_count(self.max_steps):
            raise ConfigError(f"max_steps is {self.max_steps!r}", why="it must be a whole number of at least 1")
        object.__setattr__(self, "functions", functions)
        object.__setattr__(self, "approve", Approval(self.approve))

    def as_they_are_now(self) -> Tools:
        """The functions that have these names now; those that had them, where a name is gone."""
        if self.look_up is None:
            return self
        try:
            return self.look_up()
        except ConfigError:
            return self

    @property
    def names(self) -> list[str]:
        """What the model calls them."""
        return [each.name for each in self.functions]

    @property
    def enabled(self) -> tuple[AIFunction, ...]:
        """Those that the model is told of."""
        return tuple(each for each in self.functions if each.enabled)


def tools_of(given: Tools | Sequence[Any] | Callable[..., Any] | None) -> Tools | None:
    """`given` as `Tools`; None where nothing was said, which is not the same as an empty list.

    Raises:
        ConfigError: as `Tools`.
    """
    if isinstance(given, Tools) or given is None:
        return given
    return Tools((as_ai_function(given),) if callable(given) else tuple(given))


@dataclass(frozen=True, slots=True)
class ToolStep:
    """One call that has ended, whatever came of it.

    Attributes:
        call: what the model asked for.
        result: what it is told.
        duration_s: that the function took; 0 where it was not run.
        ends_round: the person speaks next, not the model.
        may_retry: the model may call again after this failure.
    """

    call: ToolCall
    result: ChatMessage
    duration_s: float = 0.0
    ends_round: bool = False
    may_retry: bool = True

    @property
    def is_error(self) -> bool:
        """Whether there is no result."""
        return bool(self.result.is_tool_call_error)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
