"""Text as it can be shown: no half character, nothing of a stop string, and all of it in the end."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.engines.huggingface.prompting import AnswerMemory
from kani_nb.engines.huggingface.text_stream import Detokenizer, StopStrings
from tests.conftest import make_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@functools.cache
def one_tokenizer():
    return make_tokenizer()


@pytest.fixture
def tokenizer():
    return one_tokenizer()


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_pieces_join_to_the_whole_text_and_never_hold_half_a_character(text):
    tokenizer = one_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_never_shown(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer("Hello<|im_end|> there<|im_start|>!")["input_ids"]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == "Hello there!"


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    half = tokenizer("🙂")["input_ids"][:2]
    assert [detokenizer.push(token) for token in half] == ["", ""]
    assert set(detokenizer.finish()) == {"\ufffd"}


@given(
    text=st.text("abc", max_size=40), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_a_stream_is_cut_before_the_first_stop_string_however_it_is_split(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    filtered, shown = StopStrings(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += filtered.push(text[start:end])
        if filtered.is_found:
            break
    shown += "" if filtered.is_found else filtered.finish()
    # The first stop string that is complete wins: the text is read as it comes.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert filtered.is_found is bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)


@settings(max_examples=100, deadline=None)
@given(text=st.text("abcdef the quick", min_size=1, max_size=40), tail=st.text("xyz ", max_size=10), seed=st.randoms())
def test_an_answer_keeps_the_tokens_it_was_generated_in(text, tail, seed):
    tokenizer = one_tokenizer()
    prompt = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    usual = tokenizer(text)["input_ids"]
    # Another way to spell the same text: some tokens taken apart into single bytes.
    apart = [
        piece
        for token in usual
        for piece in (
            [tokenizer.convert_tokens_to_ids(char) for char in tokenizer.convert_ids_to_tokens(token)]
            if seed.random() < 0.5
            else [token]
        )
    ]
    end = tokenizer("<|im_end|>\n<|im_start|>user\n" + tail + "<|im_end|>")["input_ids"]
    memory = AnswerMemory(tokenizer)
    memory.remember(prompt + apart + end[:1])
    restored = memory.restore(prompt + usual + end)
    assert restored == prompt + apart + end
    assert tokenizer.decode(restored) == tokenizer.decode(prompt + usual + end)


def test_plain_text_that_spells_a_control_token_is_not_taken_for_it(tokenizer):
    memory = AnswerMemory(tokenizer)
    control = tokenizer("a<|im_end|>b")["input_ids"]
    spelled = tokenizer("a<|im_end|>b", split_special_tokens=True)["input_ids"]
    assert control != spelled
    memory.remember(control)
    assert memory.restore(spelled) == spelled
