"""What each step of a prompt pipeline does, and what is said where one is misused."""

from __future__ import annotations

import json
import warnings

import pytest

from kani_nb import ChatMessage, ChatRole
from kani_nb.engines.prompts import LLAMA2_PIPELINE, FilteredStep, PipelineStep, PromptPipeline
from kani_nb.errors import ConfigError, PromptError
from kani_nb.functions import ai_function
from kani_nb.messages import FunctionCall, ImagePart, ReasoningPart, TextPart, ToolCall

CALL = ToolCall("call-1", FunctionCall.with_args("age", name="Alma"))
OTHER = ToolCall("call-2", FunctionCall.with_args("age", name="Berta"))
PICTURE = ImagePart(b"\x89PNG", "image/png")
TALK = [
    ChatMessage.system("Be brief."),
    ChatMessage.user("How old is she?", extra={"cell": {"id": 7}}),
    ChatMessage.assistant(None, tool_calls=[CALL]),
    ChatMessage.function("age", "41", CALL.id),
    ChatMessage.assistant([ReasoningPart("41, it says"), "She is 41."]),
    ChatMessage.user(["And in this ", PICTURE, TextPart("picture?")]),
]


def said(messages):
    return [(str(each.role), each.text) for each in messages]


# -- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, []),
        ({"role": ChatRole.USER}, [0, 2, 3, 4]),
        ({"role": "user"}, [0, 2, 3, 4]),
        ({"role": [ChatRole.USER, "system"]}, [2, 3, 4]),
        ({"role": {ChatRole.FUNCTION}}, [0, 1, 2, 4, 5]),
        ({"predicate": lambda msg: msg.tool_calls}, [0, 1, 3, 4, 5]),
        ({"role": "user", "predicate": lambda msg: "old" in msg.text}, [0, 2, 3, 4, 5]),
    ],
)
def test_a_step_is_for_the_messages_of_its_roles_that_its_predicate_picks(filters, kept):
    assert PromptPipeline().remove(**filters)(TALK) == [TALK[index] for index in kept]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_pipeline_without_steps_gives_copies():
    made = PromptPipeline()(TALK)
    assert made == TALK
    assert made is not TALK
    made[1].extra["cell"] = None
    assert TALK[1].extra == {"cell": {"id": 7}}


def test_roles_are_translated_with_one_warning_where_there_are_any():
    pipeline = PromptPipeline().translate_role(role="function", to="user", warn="no functions here")
    with pytest.warns(UserWarning, match="no functions here") as warned:
        made = pipeline([*TALK, *TALK[2:4]])
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert [str(each.role) for each in made].count("user") == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(TALK[:2])


def test_wrapping_keeps_parts_and_makes_text_of_nothing():
    made = PromptPipeline().wrap(prefix="<", suffix=">")(TALK)
    assert made[0].content == "<Be brief.>"
    assert made[2].content == "<>"
    assert made[5].content == ("<", "And in this ", PICTURE, TextPart("picture?"), ">")


def test_consecutive_messages_are_merged_with_their_parts_and_calls():
    first = ChatMessage.assistant(None, tool_calls=[CALL], name="crab")
    second = ChatMessage.assistant(["look: ", PICTURE], tool_calls=[OTHER])
    made = PromptPipeline().merge_consecutive(role="assistant", sep=" | ")([*TALK[:2], first, second, TALK[1]])
    assert len(made) == 4
    assert made[2].content == (" | ", "look: ", PICTURE)
    assert made[2].tool_calls == (CALL, OTHER)
    assert made[2].name == "crab"


def test_an_empty_separator_merges_without_one():
    # kani calls a joiner that is not there: TypeError.
    made = PromptPipeline().merge_consecutive(role="user", sep="")([ChatMessage.user("a"), ChatMessage.user("b")])
    assert said(made) == [("user", "ab")]
    made = PromptPipeline().merge_consecutive(role="user", sep="")([ChatMessage.user(["a"]), ChatMessage.user("b")])
    assert made[0].content == ("a", "b")


def test_messages_of_several_roles_are_merged_into_one_of_the_given_role():
    pipeline = PromptPipeline().merge_consecutive(role=("user", "system"), out_role="user", sep="\n")
    assert said(pipeline(TALK[:2])) == [("user", "Be brief.\nHow old is she?")]
    assert said(pipeline(TALK[:1])) == [("system", "Be brief.")], "one alone is not merged"


def test_a_joiner_sees_the_messages_as_they_were_and_may_give_parts():
    seen = []

    def join(messages):
        seen.extend(messages)
        return [*messages[0].parts, PICTURE]

    pipeline = PromptPipeline().merge_consecutive(role=("user", "system"), out_role="assistant", joiner=join)
    made = pipeline(TALK[:2])
    # kani gives the first of them its new role before the joiner sees it.
    assert seen == TALK[:2]
    assert made == [ChatMessage.assistant(["Be brief.", PICTURE])]


def test_tool_calls_are_appended_as_the_function_writes_them():
    asking = ChatMessage.assistant("Wait.", tool_calls=[CALL, OTHER])
    pipeline = PromptPipeline().function_call_fmt(lambda call: call.id, prefix=" [", sep=", ", suffix="]")
    assert said(pipeline([asking, TALK[2], TALK[1]])) == [
        ("assistant", "Wait. [call-1, call-2]"),
        ("assistant", " [call-1]"),
        ("user", "How old is she?"),
    ]


def test_calls_that_are_not_written_leave_the_message_as_it_is():
    # kani adds the prefix and the suffix all the same.
    pipeline = PromptPipeline().function_call_fmt(lambda call: None, prefix=" [", suffix="]")
    assert pipeline([TALK[2]]) == [TALK[2]]


def test_a_prompt_starts_with_the_first_message_that_matches():
    pipeline = PromptPipeline().ensure_start(role="user")
    assert pipeline(TALK[2:]) == TALK[5:]
    assert pipeline(TALK[2:5]) == []
    assert pipeline.execute(TALK[2:5], for_measurement=True) == TALK[2:5]


def test_results_are_bound_to_their_calls():
    asking = ChatMessage.assistant(None, tool_calls=[CALL])
    nameless = ChatMessage.function("age", "41")
    made = PromptPipeline().ensure_bound_function_calls(lambda call_id: call_id.upper())([asking, nameless])
    assert made[0].tool_calls[0].id == "CALL-1"
    assert made[1].tool_call_id == "CALL-1"
    assert PromptPipeline().ensure_bound_function_calls()([nameless]) == [nameless], (
        "no call at all: it is left as it is"
    )


def test_results_without_their_call_are_dropped_but_measured():
    orphan = ChatMessage.function("age", "41", "call-9")
    pipeline = PromptPipeline().ensure_bound_function_calls(str.upper)
    assert pipeline([orphan, TALK[1]]) == [TALK[1]]
    # kani drops it here too, so that it seems to take no room.
    measured = pipeline.execute([orphan], for_measurement=True)
    assert measured == [ChatMessage.function("age", "41", "CALL-9")]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([ChatMessage.assistant(None, tool_calls=[CALL]), ChatMessage.user("?")], r"a user message .* age \(call-1\)"),
        (
            [ChatMessage.assistant(None, tool_calls=[CALL, OTHER]), ChatMessage.function("age", "41")],
            r"no tool_call_id: it could belong to age \(call-1\), age \(call-2\)",
        ),
    ],
)
def test_calls_and_results_that_cannot_be_bound_are_refused(messages, what):
    with pytest.raises(PromptError, match=what):
        PromptPipeline().ensure_bound_function_calls()(messages)


def test_a_function_is_applied_with_or_without_the_context():
    seen = []

    def number(msg, ctx):
        seen.append((ctx.idx, ctx.is_last, ctx.is_last_of_type, len(ctx.messages), ctx.functions, ctx.msg is msg))
        return msg.copy_with(text=f"{ctx.idx}: {msg.text}")

    made = PromptPipeline().apply(number, role="user")(TALK, ["f"])
    assert seen == [(1, False, False, 6, ("f",), True), (5, True, True, 6, ("f",), True)]
    assert made[1].text == "1: How old is she?"
    assert PromptPipeline().apply(lambda msg: None, role="user")(TALK) == [TALK[0], *TALK[2:5]]
    assert PromptPipeline().apply(lambda msg: msg.text)(TALK)[:2] == ["Be brief.", "How old is she?"]


def test_a_message_that_stands_twice_is_the_last_of_its_role_once():
    # By identity, as in kani, the same object would be the last of its role twice here.
    lasts = []
    same = ChatMessage.user("again")
    PromptPipeline().apply(lambda msg, ctx: lasts.append(ctx.is_last_of_type))([same, same])
    assert lasts == [False, True]


def test_a_function_is_applied_to_the_whole_list():
    pipeline = PromptPipeline().macro_apply(lambda msgs, functions: (*msgs[:1], ChatMessage.user(str(functions))))
    assert said(pipeline.remove(role="system")(TALK, ["f"])) == [("user", "['f']")]
    assert PromptPipeline().macro_apply(lambda msgs, functions: len(msgs))(TALK) == len(TALK)


def test_a_conversation_is_written_as_one_string():
    pipeline = PromptPipeline().conversation_fmt(
        prefix="<s>",
        sep="\n",
        suffix="!",
        generation_suffix="A:",
        user_prefix="U:",
        assistant_prefix="A:",
        assistant_suffix="</s>",
        system_prefix="S:",
        function_prefix="F:",
    )
    # A message without content is no text; kani writes "None".
    expected = "<s>S:Be brief.\nU:How old is she?\nA:</s>\nF:41\nA:She is 41.</s>\nU:And in this picture?\nA:!"
    assert pipeline(TALK) == expected


def test_an_answer_that_was_begun_goes_on():
    pipeline = PromptPipeline().conversation_fmt(
        generation_suffix="GO", assistant_prefix="A:", assistant_suffix="</s>", assistant_suffix_if_last=""
    )
    assert pipeline(TALK[4:5]) == "A:She is 41."
    assert pipeline([*TALK[4:5], *TALK[4:5]]) == "A:She is 41.</s>A:She is 41."
    assert pipeline([]) == "GO"


def test_functions_are_written_as_the_users_unless_they_have_their_own():
    assert PromptPipeline().conversation_fmt(user_prefix="U:", user_suffix=";")(TALK[3:4]) == "U:41;"
    assert PromptPipeline().conversation_fmt(user_prefix="U:", function_prefix="")(TALK[3:4]) == "41"


def test_a_conversation_is_written_as_dicts():
    pipeline = PromptPipeline().conversation_dict(
        system_role="developer",
        additional_keys=lambda msg: {"calls": [each.id for each in msg.tool_calls]} if msg.tool_calls else {},
    )
    assert pipeline(TALK)[:4] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "How old is she?"},
        {"role": "assistant", "content": None, "calls": ["call-1"]},
        {"role": "tool", "content": "41"},
    ]
    upper = PromptPipeline().conversation_dict(content_transform=lambda msg: msg.text.upper())
    assert upper(TALK[:1]) == [{"role": "system", "content": "BE BRIEF."}]


def test_extra_is_copied_inside_only_on_request():
    def forget(msg):
        msg.extra.get("cell", {}).clear()
        return msg

    message = ChatMessage.user("hi", extra={"cell": {"id": 7}})
    PromptPipeline().apply(forget).execute([message], deepcopy=True)
    assert message.extra == {"cell": {"id": 7}}


# -- misuse -----------------------------------------------------------------------------------------------------------


def three(a, b, c):
    return a


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda p: p.remove(role="usr"), "did you mean user"),
        (lambda p: p.remove(role=3), "role is 3"),
        (lambda p: p.remove(role=[]), "match nothing"),
        (lambda p: p.remove(predicate="user"), "not a function"),
        (lambda p: p.remove(predicate=three), r"three\(a, b, c\): it is called with 1 argument,"),
        (lambda p: p.translate_role(to="robot"), "'robot'"),
        (lambda p: p.translate_role(to=None), "None"),
        (lambda p: p.wrap(prefix=3), "prefix is 3"),
        (lambda p: p.merge_consecutive(role="user"), "neither of sep and joiner"),
        (lambda p: p.merge_consecutive(role="user", sep="", joiner=len), "both of sep and joiner"),
        (lambda p: p.merge_consecutive(sep=" "), "no out_role"),
        (lambda p: p.merge_consecutive(role=("user", "system"), sep=" "), "no out_role"),
        (lambda p: p.merge_consecutive(role="user", joiner=three), "1 argument,"),
        (lambda p: p.function_call_fmt(None), "not a function"),
        (lambda p: p.function_call_fmt(lambda: "x"), "1 argument,"),
        (lambda p: p.function_call_fmt(str, sep=None), "sep is None"),
        (lambda p: p.ensure_bound_function_calls(three), "1 argument,"),
        (lambda p: p.apply(three), "1 argument,"),
        (lambda p: p.apply(lambda *, msg: msg), "1 argument,"),
        (lambda p: p.macro_apply(lambda msgs: msgs), "2 arguments,"),
        (lambda p: p.conversation_fmt(sep=None), "sep is None"),
        (lambda p: p.conversation_dict(user_role=None), "user_role is None"),
        (lambda p: p.conversation_dict(additional_keys={}), "not a function"),
        (lambda p: p.conversation_fmt().wrap(prefix="x"), "wrap comes after conversation_fmt.*no messages any more"),
        (lambda p: p.conversation_dict().conversation_fmt(), "conversation_fmt comes after conversation_dict"),
        (lambda p: LLAMA2_PIPELINE.remove(), "remove comes after"),
        (lambda p: p.add("wrap"), "not a step"),
    ],
)
def test_misuse_is_refused_where_the_step_is_added(build, what):
    pipeline = PromptPipeline()
    with pytest.raises(ConfigError, match=what):
        build(pipeline)


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        (PromptPipeline().apply(lambda m: m.text).wrap(prefix="x"), r"step 2 \(wrap\) .* str .*step 1 \(apply\)"),
        (PromptPipeline().macro_apply(lambda m, f: "text").conversation_fmt(), "a str instead of messages"),
        (PromptPipeline().macro_apply(lambda m, f: m.reverse()), r"step 1 \(macro_apply\) gave nothing"),
        (PromptPipeline().apply(lambda m: setattr(m, "content", "x")), r"immutable\n.*copy_with"),
        (PromptPipeline().merge_consecutive(role="user", joiner=lambda m: 3), "joiner gave int"),
        (PromptPipeline().merge_consecutive(role="user", joiner=lambda m: [3]), "joiner gave list"),
        (PromptPipeline().function_call_fmt(lambda call: call), "as text, or None"),
        (PromptPipeline().ensure_bound_function_calls(lambda call_id: 9), "id_translator gave 9"),
        (PromptPipeline().conversation_dict(additional_keys=lambda m: None), "additional_keys gave None"),
    ],
)
def test_misuse_that_shows_later_is_told_with_its_step(pipeline, what):
    with pytest.raises(PromptError, match=what):
        pipeline(TALK[:4])


@pytest.mark.parametrize("given", [["hello"], [{"role": "user", "content": "hello"}], [None]])
def test_what_is_no_message_is_refused(given):
    with pytest.raises(PromptError, match=r"the pipeline was given a .* instead of a message"):
        PromptPipeline()(given)


def test_an_error_of_a_function_stays_its_own():
    with pytest.raises(json.JSONDecodeError):
        PromptPipeline().apply(lambda msg: json.loads(msg.text))(TALK)


# -- looking at one ---------------------------------------------------------------------------------------------------


def test_a_pipeline_can_be_looked_into():
    assert len(LLAMA2_PIPELINE) == 5
    assert LLAMA2_PIPELINE[0].prefix == "<<SYS>>\n"
    assert [step.name for step in LLAMA2_PIPELINE[1:3]] == ["translate_role", "merge_consecutive"]
    assert repr(PromptPipeline().wrap().conversation_fmt()) == "PromptPipeline(wrap → conversation_fmt)"
    assert PromptPipeline()


def test_steps_of_ones_own_take_part():
    class Shout(FilteredStep):
        name = "shout"

        def execute(self, msgs, functions):
            return [each.copy_with(text=each.text.upper()) if self.matches(each) else each for each in msgs]

        def explain(self):
            return f"Shout {self.described()}"

    assert isinstance(Shout(), PipelineStep)
    pipeline = PromptPipeline([Shout(role="user")]).conversation_fmt()
    assert pipeline(TALK[:2]) == "Be brief.HOW OLD IS SHE?"


def test_explaining_prints_the_steps_and_an_example_that_shows_them(capsys):
    pipeline = (
        PromptPipeline()
        .translate_role(role="function", to="user", warn="results are the user's")
        .merge_consecutive(role=("user",), sep="\n")
        .conversation_fmt(user_prefix="U:", assistant_suffix_if_last="")
    )
    assert pipeline.explain() is None
    text = capsys.readouterr().out
    assert "Prompt pipeline of 3 steps" in text
    assert "1. Give all function messages the role user." in text
    assert "2. Merge consecutive user messages into one user message, with '\\n' between them." in text
    assert "It warns: results are the user's" in text
    assert "ship_age" in text, "functions are in the example, because a step is for them"
    assert "Not in this example: " in text


def test_explaining_takes_an_example_or_more_cases(capsys):
    pipeline = PromptPipeline().conversation_dict()
    pipeline.explain([ChatMessage.user("only this")])
    assert capsys.readouterr().out.endswith("[{'content': 'only this', 'role': 'user'}]\n")
    pipeline.explain(all_cases=True)
    everything = capsys.readouterr().out
    assert "Not in this example" not in everything
    pipeline.explain(consecutive_user=True)
    assert len(capsys.readouterr().out) < len(everything)
    with pytest.raises(ConfigError, match="did you mean consecutive_user"):
        pipeline.explain(consecutive_users=True)


def test_the_ready_pipelines_say_the_tools_in_their_own_format():
    from kani_nb.engines.prompts import MISTRAL_V3_PIPELINE

    @ai_function
    def age(name: str) -> int:
        """How old somebody is."""
        return 41

    broken = ToolCall("0123-456789", FunctionCall("age", "{not json"))
    talk = [
        ChatMessage.user("How old?"),
        ChatMessage.assistant(None, tool_calls=[broken]),
        ChatMessage.function("age", "forty-one", broken.id),
        ChatMessage.user(["And ", PICTURE, "she?"]),
    ]
    prompt = MISTRAL_V3_PIPELINE(talk, [age])
    assert prompt.count("[AVAILABLE_TOOLS]") == 1
    assert "[/AVAILABLE_TOOLS][INST] And she?[/INST]" in prompt
    assert '[TOOL_CALLS] [{"name": "age", "arguments": "{not json", "id": "012345678"}]</s>' in prompt
    assert '[TOOL_RESULTS] {"content": "forty-one", "call_id": "012345678"}[/TOOL_RESULTS]' in prompt
    assert MISTRAL_V3_PIPELINE([], [age]).startswith("<s>[AVAILABLE_TOOLS] [{")
