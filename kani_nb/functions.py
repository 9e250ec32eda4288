"""Functions that a model may call: `@ai_function` on a plain typed Python function.

The JSON schema and the validation of arguments come from pydantic, the descriptions from the docstring. Nothing here
calls a function for a model: when, where and whether one runs is decided in `conversation.tools`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from kani_nb.errors import ArgumentsError, ConfigError
from kani_nb.messages import ChatMessage, ChatRole, MessagePart

#: Seconds that a call may take unless the function says otherwise.
DEFAULT_TIMEOUT_S = 60.0


#: What OpenAI's API takes, and with it the templates of most models.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_WRAP = "wrap it in a function of your own, whose parameters have names and types"


class AIParam:
    """What a parameter is for, where the docstring does not say: `Annotated[str, AIParam("a city's name")]`."""

    def __init__(self, desc: str, *, title: str | None = None) -> None:
        self.desc = desc
        self.title = title

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Callable[[Any], dict[str, Any]]) -> Any:
        """The parameter's schema with the description in it."""
        described = {**handler(core_schema), "description": self.desc}
        return described | {"title": self.title} if self.title else described


class AIFunction:
    """A Python function, sync or async, that a model may call. Calling it yourself calls the function.

    Args:
        inner: the function. Every parameter must be one that can be passed by name.
        name: what the model calls it; the function's own name by default.
        desc: what it does; the docstring's text before its parameters by default.
        after: who speaks after the result: the model (`assistant`), or the person (`user`).
        auto_retry: tell the model what was wrong, so that it can try again; otherwise the error ends the round.
        json_schema: of the parameters, instead of the one made from the type hints.
        auto_truncate: most characters of a result that are given to the model.
        enabled: whether the model is told of it.
        read_only: it changes nothing, so that nobody has to be asked before it runs.
        timeout_s: most seconds of one call.

    Raises:
        ConfigError: the function's parameters cannot be described to a model.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        after: ChatRole = ChatRole.ASSISTANT,
        name: str | None = None,
        desc: str | None = None,
        auto_retry: bool = True,
        json_schema: dict[str, Any] | None = None,
        auto_truncate: int | None = None,
        enabled: bool = True,
        *,
        read_only: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        functools.update_wrapper(self, inner)
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s is {timeout_s!r}", why="a call needs time")
        summary, described = _docstring(inner)
        self.inner = inner
        self.name = name or str(getattr(inner, "__name__", ""))
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name or inner!r} cannot be a function's name for a model",
                why="it must be of at most 64 letters, digits, _ and -",
                fix="def it, or give it one: ai_function(f, name='...')",
            )
        self.desc = desc if desc is not None else summary
        self.after = ChatRole(after)
        self.auto_retry = auto_retry
        self.auto_truncate = auto_truncate
        self.enabled = enabled
        self.read_only = read_only
        self.timeout_s = timeout_s
        self._validate = _validator(inner, self.name, needs_types=json_schema is None)
        self.json_schema = json_schema or _parameters(self._validate, described, self.name)

    @property
    def is_async(self) -> bool:
        """Whether calling it gives a coroutine."""
        return inspect.iscoroutinefunction(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives; nothing is validated."""
        return self.inner(*args, **kwargs)

    def create_json_schema(self, include_desc: bool = False) -> dict[str, Any]:
        """The JSON schema of the parameters (kani's name for it), with the function's description if asked for."""
        return {**self.json_schema, "description": self.desc} if include_desc else dict(self.json_schema)

    def to_tool(self) -> dict[str, Any]:
        """The function as OpenAI's API and chat templates are told of it."""
        described = {"name": self.name, "description": self.desc, "parameters": self.json_schema}
        return {"type": "function", "function": described}

    def read_arguments(self, arguments: str) -> dict[str, Any]:
        """The arguments that a model wrote as JSON, validated and converted to the parameters' types.

        Raises:
            ArgumentsError: it is no JSON object, or does not fit the parameters.
        """
        from pydantic import ValidationError

        try:
            given = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ArgumentsError(f"the arguments of {self.name} are not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ArgumentsError(f"the arguments of {self.name} must be a JSON object, not {type(given).__name__}")
        try:
            read: dict[str, Any] = self._validate(**given)
        except ValidationError as error:
            wrong = "; ".join(_complaint(each) for each in error.errors(include_url=False)[:5])
            raise ArgumentsError(f"the arguments of {self.name} do not fit: {wrong}") from None
        except Exception as error:  # of a validator that the person wrote
            raise ArgumentsError(f"the arguments of {self.name} do not fit: {type(error).__name__}: {error}") from error
        return read

    def __repr__(self) -> str:
        """The name and the parameters."""
        return f"AIFunction({self.name}{inspect.signature(self.inner)})"


@overload
def ai_function(func: Callable[..., Any]) -> AIFunction: ...
@overload
def ai_function(
    func: None = None,
    *,
    after: ChatRole = ChatRole.ASSISTANT,
    name: str | None = None,
    desc: str | None = None,
    auto_retry: bool = True,
    json_schema: dict[str, Any] | None = None,
    auto_truncate: int | None = None,
    enabled: bool = True,
    read_only: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Callable[[Callable[..., Any]], AIFunction]: ...
def ai_function(func: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Let models call a function, with or without options: see `AIFunction` for them.

    @ai_function(read_only=True)
    def population(city: str) -> int:
        "How many people live in a city."

    Raises:
        ConfigError: the function's parameters cannot be described to a model.
    """
    if func is not None:
        return AIFunction(func, **options)
    return lambda inner: AIFunction(inner, **options)


def tool_schemas(functions: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The enabled `functions` as OpenAI's API and chat templates are told of them.

    Takes ours, kani's (`name`, `desc`, `create_json_schema`), plain functions, and dicts that are such records already.

    Raises:
        ConfigError: something else.
    """
    described = []
    for each in functions or ():
        if isinstance(each, Mapping):
            described.append(dict(each))
        elif getattr(each, "enabled", True):
            described.append(as_ai_function(each).to_tool())
    return described


def as_ai_function(function: Any) -> AIFunction:
    """`function` as an `AIFunction`: one already, one of kani's, or any callable with type hints.

    Raises:
        ConfigError: it cannot be called.
    """
    if isinstance(function, AIFunction):
        return function
    if callable(getattr(function, "create_json_schema", None)) and callable(getattr(function, "inner", None)):
        return AIFunction(
            function.inner,
            function.after.value,
            function.name,
            function.desc,
            function.auto_retry,
            function.create_json_schema(),
            function.auto_truncate,
        )
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"{function!r} is not a function",
            fix="pass functions with type hints, or what @kani_nb.ai_function made of them",
        )
    return AIFunction(function)


def result_text(result: Any) -> str | tuple[MessagePart | str, ...]:
    """What a model is told of a function's result: text as it is, records as JSON, anything else as `str` says it."""
    from pydantic import BaseModel
    from pydantic_core import to_json

    if isinstance(result, ChatMessage):
        return result.content or ""
    if isinstance(result, str):
        return result
    if isinstance(result, MessagePart):
        return (result,)
    if isinstance(result, list | tuple) and any(isinstance(each, MessagePart) for each in result):
        return tuple(each if isinstance(each, MessagePart) else str(each) for each in result)
    if isinstance(result, BaseModel | dict | list | tuple | set | frozenset) or result is None:
        return to_json(result, fallback=str, inf_nan_mode="strings").decode()
    return str(result)


def _validator(inner: Callable[..., Any], name: str, *, needs_types: bool) -> Callable[..., dict[str, Any]]:
    """A function that takes what `inner` takes, by name, and gives it back converted."""
    from pydantic import ConfigDict, validate_call
    from pydantic.errors import PydanticUserError

    try:
        signature = inspect.signature(inner)
    except ValueError as error:
        raise ConfigError(f"{name} cannot be described to a model", why=str(error), fix=_WRAP) from None
    for each in signature.parameters.values():
        if needs_types and each.annotation is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD:
            fix = "pass it of an object: --tools thing.method" if each.name == "self" else f"{each.name}: str, or so"
            raise ConfigError(f"{name} has the parameter {each.name!r} without a type", fix=fix)
        if each.kind in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL, each.VAR_KEYWORD):
            raise ConfigError(
                f"{name} has the parameter {each}", why="a model passes each argument by its name", fix=_WRAP
            )

    def given(**arguments: Any) -> dict[str, Any]:
        return arguments

    functools.update_wrapper(given, inner)
    try:
        return validate_call(config=ConfigDict(arbitrary_types_allowed=False))(given)
    except (PydanticUserError, NameError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name}{signature} cannot be described to a model", why=reason) from error


def _parameters(validate: Callable[..., Any], described: Mapping[str, str], name: str) -> dict[str, Any]:
    """The JSON schema of a function's parameters, with the docstring's descriptions where no other is given."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    raw: Any = getattr(validate, "raw_function", validate)
    try:
        schema = TypeAdapter(raw).json_schema()
    except PydanticUserError as error:
        raise ConfigError(f"{name} cannot be described to a model", why=str(error).splitlines()[0]) from error
    properties = schema.setdefault("properties", {})
    for parameter, record in properties.items():
        record.pop("title", None)
        if parameter in described and "$ref" not in record:
            record.setdefault("description", described[parameter])
    schema.setdefault("required", [])
    return schema


def _docstring(inner: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """What the docstring says of the function, and of each parameter; in Google's, NumPy's or Sphinx's style."""
    from docstring_parser import ParseError, parse

    text = inspect.getdoc(inner) or ""
    try:
        read = parse(text)
    except ParseError:
        return text, {}
    summary = "\n\n".join(filter(None, (read.short_description, read.long_description)))
    return summary, {each.arg_name: each.description for each in read.params if each.description}


def _complaint(error: Mapping[str, Any]) -> str:
    """One of pydantic's complaints, for a model to read."""
    where = ".".join(str(each) for each in error["loc"])
    return f"{where}: {error['msg']}" if where else str(error["msg"])
