"""Answers of a given type: asked for in words, held to its schema where the engine can, and checked in any case.

The type is anything pydantic knows: a model, a dataclass, a TypedDict, `list[int]`. What does not fit is told to the
model, which tries again a few times; nothing of that stays in the conversation.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kani_nb.engines.json_constraint import why_not_held
from kani_nb.errors import ConfigError, SchemaError
from kani_nb.messages import ChatMessage

#: How often a model may try again.
RETRIES = 2


@dataclass(frozen=True, slots=True)
class AnswerRejected:
    """An answer did not fit, and the model tries again: what was shown of it is no part of the turn."""

    complaint: str


class Structure:
    """A type that an answer must have.

    Args:
        of: the type.
        retries: how often the model may try again.

    Raises:
        ConfigError: pydantic cannot describe it.
    """

    def __init__(self, of: Any, retries: int = RETRIES) -> None:
        from pydantic import PydanticUserError, TypeAdapter
        from pydantic.errors import PydanticInvalidForJsonSchema
        from pydantic_core import SchemaError as CoreSchemaError

        if isinstance(of, str):
            raise ConfigError(f"{of!r} cannot be an answer's type", why="it is a name", fix="pass the type itself")
        self.name = getattr(of, "__name__", None) or str(of)
        self.retries = retries
        why = "it is a function" if inspect.isroutine(of) else ""
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(of)
            self.schema: dict[str, Any] = _closed(self._adapter.json_schema())
        except (PydanticUserError, PydanticInvalidForJsonSchema, CoreSchemaError, TypeError, NameError) as error:
            why = why or str(error).splitlines()[0][:200]
        if why:
            raise ConfigError(
                f"{self.name} cannot be an answer's type",
                why=why,
                fix="class Answer(pydantic.BaseModel): ..., then --schema Answer",
            )

    @property
    def can_be_held_to(self) -> bool:
        """Whether an answer can be held to the schema while it is written; else it is only checked."""
        return why_not_held(self.schema_text) == ""

    @property
    def schema_text(self) -> str:
        """The JSON schema, as JSON."""
        return json.dumps(self.schema, ensure_ascii=False)

    def asked_for(self, pending: Sequence[ChatMessage]) -> list[ChatMessage]:
        """`pending` with the schema at the end of its first message, the user's."""
        instruction = f"\n\nAnswer with nothing but JSON that fits this JSON schema:\n{self.schema_text}"
        first, *rest = pending
        content = f"{first.content}{instruction}" if isinstance(first.content, str) else (*first.parts, instruction)
        return [first.copy_with(content=content), *rest]

    def read(self, text: str) -> Any:
        """The object that `text` describes.

        Raises:
            SchemaError: it is no JSON, or does not fit; the message is for the model to read.
        """
        from pydantic import ValidationError

        try:
            return self._adapter.validate_json(_json_of(text))
        except ValidationError as error:
            wrong = "; ".join(_complaint(each) for each in error.errors(include_url=False)[:5])
            raise SchemaError(f"the answer does not fit {self.name}", why=wrong) from None

    def cut_short(self, tokens: int | None) -> SchemaError:
        """What is said of an answer that the token limit ended."""
        where = f" at {tokens:,} tokens" if tokens else ""
        return SchemaError(
            f"the answer was cut{where}, before it was a whole {self.name}",
            why="that is the limit, and the model would say the same again",
            fix="a larger --max-new-tokens; nothing was added to the conversation",
        )

    def given_up(self, last: SchemaError) -> SchemaError:
        """What is said when no try fitted."""
        tries = self.retries + 1
        return SchemaError(
            f"no answer fitted {self.name} in {tries} tries",
            why=f"the last one: {last.why}",
            fix="a simpler type, a larger --max-new-tokens, or a larger model; nothing was added to the conversation",
        )


def _closed(schema: Any) -> Any:
    """The schema, its objects without further properties unless it says otherwise: models add some of their own."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def structure_of(given: Any) -> Structure | None:
    """`given` as a `Structure`; None where no type was asked for."""
    return given if isinstance(given, Structure) or given is None else Structure(given)


def told(complaint: SchemaError) -> ChatMessage:
    """What the model is told of an answer that did not fit."""
    return ChatMessage.user(f"{complaint.what}: {complaint.why}\nAnswer again, with nothing but JSON that fits.")


def _json_of(text: str) -> str:
    """The JSON in an answer: all of it, the inside of a code block, or from the first brace to the last."""
    stripped = text.strip()
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", stripped, re.DOTALL)
    if fenced is not None:
        return fenced[1].strip()
    begins = [at for at in (stripped.find("{"), stripped.find("[")) if at >= 0]
    if stripped[:1] in ("{", "[") or not begins:
        return stripped
    first = min(begins)
    return stripped[first : stripped.rfind("}" if stripped[first] == "{" else "]") + 1]


def _complaint(error: Any) -> str:
    where = ".".join(str(each) for each in error["loc"])
    return f"{where}: {error['msg']}" if where else str(error["msg"])
