"""Answers of a given type: asked for, held to it where the engine can, checked, and tried again."""

import dataclasses

import pydantic
import pytest
from typing_extensions import TypedDict

from kani_nb.conversation.structured import AnswerRejected, Structure
from kani_nb.engines.base import BaseEngine, Completion, TextDelta
from kani_nb.errors import ConfigError, SchemaError
from kani_nb.functions import ai_function
from kani_nb.messages import ChatMessage, FunctionCall, ImagePart, ToolCall


class City(pydantic.BaseModel):
    name: str
    people: int


class Saying(BaseEngine):
    """Gives one answer after the other, and keeps what it was asked."""

    max_context_size = 10_000

    def __init__(self, *answers, holds=False):
        self.answers = list(answers)
        self.asked = []
        self.holds_to_schemas = holds

    def prompt_len(self, messages, functions=None, **kwargs):
        return sum(len(message.text) for message in messages)

    async def stream(self, messages, functions=None, **params):
        self.asked.append((messages, params))
        said = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(said, str):
            yield TextDelta(said)
            yield Completion(ChatMessage.assistant(said))
        else:
            yield Completion(ChatMessage.assistant("", tool_calls=(ToolCall("c", said),)))


PARIS = '{"name": "Paris", "people": 2100000}'


@pytest.mark.parametrize(
    "written",
    [PARIS, f"  {PARIS}\n", f"```json\n{PARIS}\n```", f"Here it is:\n```\n{PARIS}\n```\nDone.", f"It is {PARIS}."],
)
async def test_an_answer_becomes_an_object_however_it_is_wrapped(open_session, written):
    session = open_session(Saying(written))
    reply = await session.ask("a city", schema=City)
    assert reply.value == City(name="Paris", people=2_100_000)
    assert reply.text == written
    assert [each.text for each in session.turns[-1].messages] == ["a city", written]


async def test_the_schema_stands_in_the_prompt_and_not_in_the_conversation(open_session):
    engine = Saying(PARIS)
    session = open_session(engine)
    await session.ask(("look: ", ImagePart(b"x", "image/png"), "a city"), schema=City)
    (messages, params) = engine.asked[0]
    assert '"people"' in messages[-1].text
    assert any(isinstance(part, ImagePart) for part in messages[-1].parts)
    assert "json_schema" not in params
    assert session.turns[-1].prompt.text == "look: a city"


async def test_an_engine_that_can_is_held_to_the_schema(open_session):
    engine = Saying(PARIS, holds=True)
    await open_session(engine).ask("a city", schema=City)
    assert engine.asked[0][1]["json_schema"] == Structure(City).schema_text


async def test_what_does_not_fit_is_told_to_the_model_and_leaves_no_trace(open_session):
    engine = Saying("Paris!", '{"name": "Paris"}', PARIS)
    session = open_session(engine)
    events = [event async for event in session.stream("a city", schema=City)]
    rejected = [each.complaint for each in events if isinstance(each, AnswerRejected)]
    assert len(rejected) == 2
    assert rejected[1] == "the answer does not fit City: people: Field required"
    assert "people: Field required" in engine.asked[2][0][-1].text
    assert events[-1].value.name == "Paris"
    assert [each.text for each in session.turns[-1].messages] == ["a city", PARIS]
    assert events[-1].metrics.steps == 3


async def test_a_type_that_the_model_cannot_give_is_an_error_and_nothing_is_kept(open_session):
    session = open_session(Saying("no idea"))
    with pytest.raises(SchemaError, match="no answer fitted City in 3 tries") as caught:
        await session.ask("a city", schema=City)
    assert "the last one: Invalid JSON" in str(caught.value)
    assert session.turns == ()


async def test_tools_may_be_called_before_the_answer(open_session):
    @ai_function(read_only=True)
    def people(city: str) -> int:
        return 2_100_000

    engine = Saying(FunctionCall("people", '{"city": "Paris"}'), PARIS, holds=True)
    reply = await open_session(engine).ask("a city", schema=City, tools=[people])
    assert reply.value.people == 2_100_000
    # A model that is held to JSON could call nothing.
    assert all("json_schema" not in params for _, params in engine.asked)


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Row(TypedDict):
    name: str


@pytest.mark.parametrize(
    ("of", "written", "value"),
    [
        (Point, '{"x": 1, "y": 2}', Point(1, 2)),
        (Row, '{"name": "a"}', {"name": "a"}),
        (list[int], "[1, 2, 3]", [1, 2, 3]),
        (int, "7", 7),
        (dict[str, float], '{"a": 1.5}', {"a": 1.5}),
    ],
)
async def test_anything_that_pydantic_knows_is_a_type(open_session, of, written, value):
    assert (await open_session(Saying(written)).ask("?", schema=of)).value == value


class Opaque:
    pass


@pytest.mark.parametrize("of", [Opaque, "Nothing", 3, lambda: None])
def test_what_is_no_type_is_refused(of):
    with pytest.raises(ConfigError, match="cannot be an answer's type"):
        Structure(of)
