"""Conversations as files: nothing that was said is lost, and errors are short."""

import json
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kani_nb.conversation.formats import conversation_of, read, write
from kani_nb.conversation.tree import CellRef, Conversation, Turn, new_id
from kani_nb.errors import ConversationError
from kani_nb.messages import (
    AudioPart,
    ChatMessage,
    FunctionCall,
    ImagePart,
    ReasoningPart,
    TextPart,
    ToolCall,
    VideoPart,
)

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

nasty = st.sampled_from(
    [
        "```python\n## User\n```",
        "## Assistant\n\nnot a heading",
        '<!-- kani_nb {"role": "user"} -->',
        '<!-- \\kani_nb {"role": "user"} -->\n',
        "\n\n",
        "\r\n\r",
        "-->",
        "\x00\x0b\x1c\u2028",
        " {{x}} $y$ ",
        "---\n",
    ]
)
texts = st.lists(st.one_of(nasty, st.text()), max_size=4).map("".join)
plain = st.lists(st.tuples(texts, texts), max_size=4).map(
    lambda rounds: [
        message for asked, said in rounds for message in (ChatMessage.user(asked), ChatMessage.assistant(said))
    ]
)
calls = ToolCall("c1", FunctionCall("weather", '{"city": "-->"}'))
rich = st.lists(
    st.one_of(
        texts.map(ChatMessage.user),
        texts.map(ChatMessage.assistant),
        texts.map(lambda text: ChatMessage.function("weather", text, "c1")),
        texts.map(lambda text: ChatMessage.assistant(text, tool_calls=(calls,))),
        st.just(ChatMessage.assistant(None, tool_calls=(calls,))),
        st.binary().map(lambda data: ChatMessage.user((TextPart("see"), ImagePart(data, "image/png")))),
        st.binary().map(lambda data: ChatMessage.user((TextPart("hear"), AudioPart(data, "audio/wav")))),
        texts.map(lambda text: ChatMessage.assistant((ReasoningPart("hm " + text), TextPart(text)))),
    ),
    max_size=6,
)
systems = st.one_of(st.none(), texts)


def made(messages, system=None, name="talk"):
    return conversation_of(messages, name).with_system(system)


def branched():
    conversation = Conversation.new("trip", "notes/trip.ipynb", "be brief")
    for text, parent in (("a", None), ("b", "head"), ("c", None), ("d", "head")):
        parent = conversation.head if parent else None
        messages = (ChatMessage.user(text), ChatMessage.assistant(text * 2, extra={"k": [1, None]}))
        turn = Turn(new_id(), parent, messages, CellRef("cell", "e"), 12.5, text == "b", "echo", {"ttft_s": 0.1})
        conversation = conversation.with_turn(turn)
    return conversation


def test_our_own_json_keeps_everything_branches_included(tmp_path):
    conversation = branched()
    path = write(conversation, tmp_path / "trip.json")
    again = read(path)
    assert again == conversation
    assert list(again.turns) == list(conversation.turns)
    assert len(again.branches()) == 2


@quick
@given(messages=rich, system=systems)
def test_our_own_json_round_trips(tmp_path, messages, system):
    conversation = made(messages, system)
    assert read(write(conversation, tmp_path / "x.json")) == conversation


@quick
@given(messages=rich, system=systems)
def test_openai_round_trips(tmp_path, messages, system):
    conversation = made(messages, system)
    for name in ("openai", "openai-jsonl"):
        again = read(write(conversation, tmp_path / "x.json", name))
        assert again.history == conversation.history
        assert again.system == conversation.system
        assert [len(turn.messages) for turn in again.path()] == [len(turn.messages) for turn in conversation.path()]


@quick
@given(messages=plain, system=systems)
def test_sharegpt_round_trips(tmp_path, messages, system):
    conversation = made(messages, system)
    again = read(write(conversation, tmp_path / "x.json", "sharegpt"))
    assert (again.history, again.system) == (conversation.history, system)


@quick
@given(messages=rich, system=systems, name=st.text())
def test_markdown_round_trips(tmp_path, messages, system, name):
    conversation = made(messages, system, name)
    again = read(write(conversation, tmp_path / "x.md"))
    assert again.history == conversation.history
    assert again.system == conversation.system
    assert again.name == (name or "x")


def test_markdown_reads_well_and_marks_what_was_interrupted(tmp_path):
    conversation = branched()
    conversation = conversation.moved_to(conversation.branch(1).id)
    text = write(conversation, tmp_path / "trip.md").read_text()
    visible = [line for line in text.splitlines() if line and not line.startswith("<!--")]
    assert visible == [
        "# trip", "## System", "be brief", "## User", "a", "## Assistant", "aa",
        "## User", "b", "## Assistant (interrupted)", "bb",
    ]  # fmt: skip
    assert [turn.interrupted for turn in read(tmp_path / "trip.md").path()] == [False, True]


@pytest.mark.parametrize("name", ["x.json", "x.md"])
def test_lone_surrogates_and_nul_survive(tmp_path, name):
    conversation = made([ChatMessage.user("a\ud800b\x00c"), ChatMessage.assistant("\udfff")])
    assert read(write(conversation, tmp_path / name)).history == conversation.history


def test_files_of_others_are_read(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(
        json.dumps(
            [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "tool", "tool_call_id": "1", "content": "42"},
                {"role": "assistant", "content": "42!"},
            ]
        )
    )
    conversation = read(path)
    assert (conversation.name, conversation.system, len(conversation.path())) == ("other", "be brief", 1)
    assert conversation.path()[0].answer.text == "42!"
    path.write_text(json.dumps([{"id": 1, "conversations": [{"from": "human", "value": "q"}]}]))
    assert read(path).path()[0].answer is None


def test_sharegpt_refuses_what_it_cannot_hold(tmp_path):
    conversation = made([ChatMessage.user(("look", ImagePart(b"1", "image/png")))])
    with pytest.raises(ConversationError, match="text only"):
        write(conversation, tmp_path / "x.json", "sharegpt")
    with pytest.raises(ConversationError, match="cannot hold video"):
        write(made([ChatMessage.user((VideoPart(b"1", "video/mp4"),))]), tmp_path / "x.json", "openai")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "not valid JSON"),
        ("hello", "not valid JSON"),
        ("[]", "no messages"),
        ("[1]", "no messages"),
        ('{"a": 1}', "neither"),
        ('{"messages": 5}', "its parts are not those of messages"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 5}]}', "its parts are not"),
        ('{"conversations": [{"from": "nobody", "value": "x"}]}', "unknown speaker"),
        ('{"format": "kani_nb conversation", "version": 1}', "has no 'turns'"),
        ('{"format": "kani_nb conversation", "version": 9}', "upgrade"),
        ("<!-- kani_nb {} -->", "begin"),
        ("<!-- kani_nb {broken -->", "begin"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_in_one_paragraph(tmp_path, content, why):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConversationError, match=why) as caught:
        read(path)
    assert len(str(caught.value)) < 600


def test_unknown_formats_and_missing_files_are_named(tmp_path):
    with pytest.raises(ConversationError, match=r"suffix of 'x\.docx' names no format"):
        write(branched(), tmp_path / "x.docx")
    with pytest.raises(ConversationError, match="did you mean openai"):
        write(branched(), tmp_path / "x.json", "opnai")
    with pytest.raises(ConversationError, match="no file"):
        read(tmp_path / "missing.json")
    with pytest.raises(ConversationError, match="cannot write"):
        write(branched(), tmp_path / "nowhere" / "x.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConversationError, match="not text"):
        read(tmp_path / "binary.json")


def test_writing_replaces_the_file_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o640)
    write(branched(), path)
    assert read(path).name == "trip"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
