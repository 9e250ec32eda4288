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

        self.name = getattr(of, "__name__", None) or str(of)
        self.retries = retries
        why = "it is a function" if inspect.isroutine(of) else ""
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(of)
            self.schema: dict[str, Any] = self._adapter.json_schema()
        except (PydanticUserError, PydanticInvalidForJsonSchema, TypeError, NameError) as error:
            why = why or str(error).splitlines()[0][:200]
        if why:
            raise ConfigError(
                f"{self.name} cannot be an answer's type",
                why=why,
                fix="class Answer(pydantic.BaseModel): ..., then --schema Answer",
            )

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

    def given_up(self, last: SchemaError) -> SchemaError:
        """What is said when no try fitted."""
        tries = self.retries + 1
        return SchemaError(
            f"no answer fitted {self.name} in {tries} tries",
            why=f"the last one: {last.why}",
            fix="a simpler type, a larger --max-new-tokens, or a larger model; nothing was added to the conversation",
        )


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
    if stripped[:1] in ("{", "[") or "{" not in stripped:
        return stripped
    return stripped[stripped.find("{") : stripped.rfind("}") + 1]


def _complaint(error: Any) -> str:
    where = ".".join(str(each) for each in error["loc"])
    return f"{where}: {error['msg']}" if where else str(error["msg"])
