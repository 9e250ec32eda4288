"""What every step of a prompt pipeline is, which messages it is for, and the checks made when it is built.

No step is defined here, and nothing here knows in which order steps run: see `steps`, `terminal` and `pipeline`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from kani_nb.errors import ConfigError, did_you_mean
from kani_nb.messages import ChatMessage, ChatRole

RoleFilter = ChatRole | str | Collection[ChatRole | str] | None
Predicate = Callable[[ChatMessage], bool]


class PipelineStep(ABC):
    """One step of a pipeline: from messages to messages, or to what the model reads.

    A step of your own goes into `PromptPipeline([...])`. It is given a list that it may change; messages are immutable.
    """

    #: The fluent method that adds it, for error messages.
    name: ClassVar[str] = "a step"
    #: Whether it can only be given `ChatMessage`s.
    needs_messages: ClassVar[bool] = True
    #: Whether nothing can come after it.
    is_terminal: ClassVar[bool] = False

    @abstractmethod
    def execute(self, msgs: list[ChatMessage], functions: list[Any]) -> Any:
        """What the step makes of `msgs`."""

    def measure(self, msgs: list[ChatMessage], functions: list[Any]) -> Any:
        """What it makes of messages that are out of their conversation, to see how long they are."""
        return self.execute(msgs, functions)

    @abstractmethod
    def explain(self) -> str:
        """What the step does, in a sentence without its full stop."""

    def example_cases(self) -> frozenset[str]:
        """Which cases (see `explain.CASES`) an example must have to show the step at work."""
        return frozenset()


@dataclass(frozen=True, kw_only=True)
class FilteredStep(PipelineStep):
    """A step for the messages of some roles, or those that a predicate picks, or both.

    Raises:
        ConfigError: a role that there is not, or a predicate that does not take one message.
    """

    role: RoleFilter = None
    predicate: Predicate | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        object.__setattr__(self, "role", None if self.role is None else checked_roles(self.role))
        check_function(self.predicate, 1, f"{self.name}(predicate=)", optional=True)

    @property
    def roles(self) -> tuple[ChatRole, ...]:
        """The roles of the filter; all of them where it has none."""
        return tuple(ChatRole) if self.role is None else self.role  # type: ignore[return-value]

    def matches(self, message: ChatMessage) -> bool:
        """Whether the step is for `message`."""
        return message.role in self.roles and (self.predicate is None or bool(self.predicate(message)))

    def described(self, noun: str = "messages") -> str:
        """The filter in words: `user or system messages for which the predicate holds`."""
        roles = "" if self.role is None else " or ".join(self.roles) + " "
        return f"{roles}{noun}{' for which the predicate holds' if self.predicate is not None else ''}"

    def example_cases(self) -> frozenset[str]:
        """See `PipelineStep.example_cases`."""
        return frozenset({"function_call"}) if ChatRole.FUNCTION in self.roles else frozenset()


def checked_role(role: Any, where: str = "role") -> ChatRole:
    """`role` as a `ChatRole`.

    Raises:
        ConfigError: there is no such role.
    """
    try:
        return ChatRole(role)
    except ValueError:
        hint = did_you_mean(str(role), list(ChatRole)) or f"roles are {', '.join(ChatRole)}"
        raise ConfigError(f"{where} is {role!r}", why="that is not a role of a message", fix=hint) from None


def checked_roles(roles: Any) -> tuple[ChatRole, ...]:
    """One role or several as a tuple.

    Raises:
        ConfigError: one that there is not, or none at all.
    """
    if isinstance(roles, str):
        return (checked_role(roles),)
    if not isinstance(roles, Collection):
        return (checked_role(roles),)
    found = tuple(dict.fromkeys(checked_role(each) for each in roles))
    if not found:
        raise ConfigError(f"role is {roles!r}", why="the step would match nothing", fix="leave role out to match all")
    return found


def check_text(where: str, *, optional: bool = True, **texts: Any) -> None:
    """Refuse prefixes, suffixes and separators that are no text.

    Raises:
        ConfigError: the first that is not.
    """
    for name, value in texts.items():
        if not (isinstance(value, str) or (optional and value is None)):
            raise ConfigError(f"{where}: {name} is {value!r}", why="it must be text")


def accepts(func: Callable[..., Any], arguments: int) -> bool | None:
    """Whether `func` can be called with so many arguments; None where Python does not know (some builtins)."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True


def check_function(func: Any, arguments: int, where: str, *, optional: bool = False) -> None:
    """Refuse what cannot be called as the step will call it.

    Raises:
        ConfigError: it is no function, or takes another number of arguments.
    """
    if func is None and optional:
        return
    if not callable(func):
        raise ConfigError(f"{where} is {func!r}", why="that is not a function")
    if accepts(func, arguments) is False:
        raise ConfigError(
            f"{where} is {getattr(func, '__name__', repr(func))}{inspect.signature(func)}",
            why=f"it is called with {arguments} argument{'s' if arguments > 1 else ''}, by position",
        )
