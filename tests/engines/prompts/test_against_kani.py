"""Our pipelines against kani's: the same steps over the same messages give the same, whatever both are.

Left out are kani's known defects, which `test_pipeline` tests what ours does for:
- `merge_consecutive(sep="")` calls a joiner that is not there;
- `conversation_fmt` writes "None" for a message without content;
- `function_call_fmt` adds its prefix and suffix where no call was written;
- `ensure_bound_function_calls` drops results when it only measures;
- a joiner sees the first message with its new role, and without its call's id;
- the list of parts that was passed in is changed by `wrap` and `merge_consecutive`.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kani_nb import ChatMessage, ChatRole
from kani_nb.engines.prompts import LLAMA2_PIPELINE, LLAMA3_PIPELINE, MISTRAL_V3_PIPELINE, PromptPipeline
from kani_nb.errors import PromptError
from kani_nb.functions import ai_function
from kani_nb.messages import FunctionCall, ReasoningPart, TextPart, ToolCall

kani = pytest.importorskip("kani", reason="kani is what ours is compared with: pip install 'kani-nb[test]'")

# -- messages ---------------------------------------------------------------------------------------------------------

texts = st.text(max_size=12) | st.sampled_from(["", "", " ", "None", "a\nb", "👩‍👩‍👧‍👦", "<s>[INST]", "{}", "42"])
parts = texts | st.builds(TextPart, texts) | st.builds(ReasoningPart, texts)
contents = texts | st.lists(parts, max_size=4).map(tuple)
arguments = st.dictionaries(st.text(max_size=4), st.none() | st.integers() | texts, max_size=2).map(json.dumps)
ids = st.sampled_from(["a", "b", "c", "0123-4567-89ab"])
calls = st.lists(st.builds(ToolCall, ids, st.builds(FunctionCall, st.sampled_from(["f", "g"]), arguments)), max_size=3)
kinds_of_message = [
    st.builds(ChatMessage.system, contents),
    st.builds(ChatMessage.user, contents, name=st.none() | texts),
    st.builds(ChatMessage.assistant, contents),
    st.builds(ChatMessage.assistant, st.none() | contents, tool_calls=calls.map(tuple)),
    st.builds(ChatMessage.function, st.sampled_from(["f", "g"]), contents, st.none() | ids),
]


@st.composite
def conversations(draw):
    """Messages of some kinds, so that equal ones often follow each other; or calls followed by their results."""
    kinds = draw(st.lists(st.sampled_from(kinds_of_message), min_size=1, max_size=5))
    drawn = draw(st.lists(st.one_of(kinds), max_size=8))
    if draw(st.booleans()):
        return drawn
    made = []
    for message in drawn:
        if message.role is not ChatRole.FUNCTION:
            made.append(message)
            made += [
                ChatMessage.function(
                    call.function.name, draw(contents), draw(st.sampled_from([call.id, call.id, None]))
                )
                for call in message.tool_calls or ()
            ]
    return made


def to_kani(message):
    content = message.content
    if isinstance(content, tuple):
        made = {TextPart: kani.parts.TextPart, ReasoningPart: kani.parts.ReasoningPart}
        content = [each if isinstance(each, str) else made[type(each)](content=each.content) for each in content]
    calls = None
    if message.tool_calls is not None:
        calls = [
            kani.ToolCall(id=call.id, type=call.type, function=kani.FunctionCall(**vars_of(call.function)))
            for call in message.tool_calls
        ]
    return kani.ChatMessage(
        role=kani.ChatRole(message.role.value),
        content=content,
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=calls,
    )


def vars_of(call):
    return {"name": call.name, "arguments": call.arguments}


def plain(made):
    """What either package made, in the words of neither."""
    if isinstance(made, list):
        return [plain(each) for each in made]
    if not isinstance(made, ChatMessage | kani.ChatMessage):
        return made
    content = made.content
    if isinstance(content, list | tuple):
        content = [each if isinstance(each, str) else (type(each).__name__, each.content) for each in content]
    calls = made.tool_calls and [(call.id, call.type, vars_of(call.function)) for call in made.tool_calls]
    return (made.role.value, content, made.name, made.tool_call_id, None if made.tool_calls is None else list(calls))


# -- steps: each is (method, arguments, keywords), with roles by name, and functions that both packages understand -----

roles = st.sampled_from([role.value for role in ChatRole])


def has_calls(msg):
    return bool(msg.tool_calls)


def is_long(msg):
    return len(text(msg)) > 3


def text(msg):
    return msg.text or ""  # kani's is None for no content


def joined(msgs):
    return "+".join(text(each) for each in msgs)


def joined_parts(msgs):
    return [part for each in msgs for part in ["·", *each.parts]]


def keep(msg):
    return msg


def drop_empty(msg):
    return msg if text(msg) else None


def numbered(msg, ctx):
    where = f"{ctx.idx}/{len(ctx.messages)} {ctx.is_last} {ctx.is_last_of_type} {len(ctx.functions)} "
    return msg.copy_with(text=where + text(msg))


def backwards(msgs, functions):
    return msgs[::-1]


def as_json(call):
    return json.dumps([call.id, call.function.name, call.function.arguments])


def shorter(call_id):
    return call_id.replace("-", "")[:9]


filters = st.fixed_dictionaries(
    {},
    optional={
        "role": roles | st.lists(roles, min_size=1, max_size=3, unique=True).map(tuple),
        "predicate": st.sampled_from([has_calls, is_long]),
    },
)
one_role = st.fixed_dictionaries({"role": roles}, optional={"predicate": st.sampled_from([has_calls, is_long])})
affixes = st.none() | st.sampled_from(["", "<", "[INST] ", "\n"])
joins = st.one_of(
    st.sampled_from([" ", "\n", "--"]).map(lambda sep: {"sep": sep}),
    st.sampled_from([joined, joined_parts]).map(lambda joiner: {"joiner": joiner}),
)


def step(method, *args, **keywords):
    """`method` with drawn arguments and keywords, those of the dicts in `also` spread."""
    also = keywords.pop("also", [])

    def put(drawn):
        positional, named, spread = drawn
        return method, positional, {**named, **{name: value for each in spread for name, value in each.items()}}

    return st.tuples(st.tuples(*args), st.fixed_dictionaries(keywords), st.tuples(*also)).map(put)


kinds_of_step = [
    step("translate_role", to=roles, also=[filters]),
    step("wrap", prefix=affixes, suffix=affixes, also=[filters]),
    step("merge_consecutive", also=[one_role, joins]),
    step("merge_consecutive", out_role=roles, also=[filters, joins]),
    step("function_call_fmt", st.just(as_json), prefix=st.sampled_from(["\n", ""]), sep=st.sampled_from(["", ","])),
    step("remove", also=[filters]),
    step("ensure_start", also=[filters]),
    step("ensure_bound_function_calls", st.none() | st.just(shorter)),
    step("apply", st.sampled_from([keep, drop_empty, numbered]), also=[filters]),
    step("macro_apply", st.just(backwards)),
]
steps = st.one_of(kinds_of_step)
text_options = st.fixed_dictionaries(
    {},
    optional={
        f"{name}": st.sampled_from(["", "<s>", " [/INST]", "\n"])
        for name in [
            *("prefix", "sep", "suffix", "generation_suffix", "assistant_suffix_if_last"),
            *(f"{role}_{end}" for role in ("user", "assistant", "system", "function") for end in ("prefix", "suffix")),
        ]
    },
)
dict_options = st.fixed_dictionaries(
    {},
    optional={
        "system_role": st.just("developer"),
        "function_role": st.just("function"),
        "content_transform": st.just(lambda msg: text(msg).upper()),
        "additional_keys": st.just(lambda msg: {"id": msg.tool_call_id}),
    },
)
terminals = st.one_of(
    st.just(None),
    step("conversation_fmt", also=[text_options]),
    step("conversation_dict", also=[dict_options]),
)


def build(pipeline, role_of, described):
    for method, args, keywords in described:
        named = dict(keywords)
        for key in ("role", "to", "out_role"):
            if key in named:
                named[key] = role_of(named[key]) if isinstance(named[key], str) else tuple(map(role_of, named[key]))
        pipeline = getattr(pipeline, method)(*args, **named)
    return pipeline


def run(pipeline, given, **how):
    try:
        return plain(pipeline.execute(given, ["a function"], **how))
    except (PromptError, kani.exceptions.PromptError):
        return PromptError


def without_nothing(talk):
    """As `conversation_fmt` needs them in kani: with a text where there is no content."""
    return [each.copy_with(content="") if each.content is None else each for each in talk]


def compare(talk, described, **how):
    ours = build(PromptPipeline(), ChatRole, described)
    theirs = build(kani.PromptPipeline(), kani.ChatRole, described)
    assert run(ours, talk, **how) == run(theirs, [to_kani(each) for each in talk], **how)


@pytest.mark.parametrize("kind", kinds_of_step, ids=[str(number) for number in range(len(kinds_of_step))])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), talk=conversations())
def test_each_step_makes_the_same_of_any_conversation(kind, data, talk):
    compare(talk, [data.draw(kind)])


@settings(max_examples=300, deadline=None)
@given(conversations(), st.lists(steps, max_size=5), terminals, st.booleans())
def test_the_same_steps_make_the_same_of_any_conversation(talk, described, terminal, for_measurement):
    if terminal is not None:
        described = [*described, terminal]
        if terminal[0] == "conversation_fmt":
            talk = without_nothing(talk)
    assume(not for_measurement or all(each[0] != "ensure_bound_function_calls" for each in described))
    compare(talk, described, for_measurement=for_measurement)


@settings(max_examples=200, deadline=None)
@given(conversations(), st.lists(steps, max_size=5), terminals)
def test_no_pipeline_changes_its_input_or_itself(talk, described, terminal):
    before = copy.deepcopy(talk)
    pipeline = build(PromptPipeline(), ChatRole, [*described, *([terminal] if terminal is not None else [])])
    first = run(pipeline, talk)
    assert talk == before
    assert run(pipeline, talk) == first
    assert talk == before


@pytest.mark.parametrize("name", ["LLAMA2_PIPELINE", "LLAMA3_PIPELINE", "MISTRAL_V3_PIPELINE"])
@settings(max_examples=100, deadline=None)
@given(talk=conversations(), with_tools=st.booleans())
def test_the_ready_pipelines_write_what_kanis_write(name, talk, with_tools):
    ours = {"LLAMA2_PIPELINE": LLAMA2_PIPELINE, "LLAMA3_PIPELINE": LLAMA3_PIPELINE}.get(name, MISTRAL_V3_PIPELINE)
    module = name.removesuffix("_PIPELINE").removesuffix("_V3").lower()
    theirs = getattr(importlib.import_module(f"kani.model_specific.{module}"), name)
    talk = without_nothing(talk)

    def age(name: str) -> int:
        """How old somebody is."""
        return 41

    our_functions = [ai_function(age)] if with_tools else []
    # The schemas of parameters are each package's own; what is compared is where and how they are written.
    their_functions = [kani.AIFunction(age, json_schema=each.json_schema) for each in our_functions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = []
        for pipeline, given, functions in (
            (ours, talk, our_functions),
            (theirs, [to_kani(each) for each in talk], their_functions),
        ):
            try:
                written.append(pipeline(given, functions))
            except (PromptError, kani.exceptions.PromptError):
                written.append(PromptError)
    assert written[0] == written[1]


def test_kanis_defects_are_still_there():
    """Where one is repaired there, the comparison above can take its case in."""
    user = kani.ChatMessage.user
    with pytest.raises(TypeError):
        kani.PromptPipeline().merge_consecutive(role=kani.ChatRole.USER, sep="")([user("a"), user("b")])
    nothing = kani.ChatMessage.assistant(None, tool_calls=[kani.ToolCall.from_function("f")])
    assert kani.PromptPipeline().conversation_fmt()([nothing]) == "None"
    assert kani.PromptPipeline().function_call_fmt(lambda call: None, prefix="[")([nothing])[0].content == "["
    orphan = kani.ChatMessage.function("f", "1", "gone")
    assert kani.PromptPipeline().ensure_bound_function_calls().execute([orphan], for_measurement=True) == []
    with_parts = user(["a"])
    kani.PromptPipeline().wrap(prefix="<")([with_parts])
    assert with_parts.content == ["<", "a"]
