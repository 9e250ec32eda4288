"""Tokens are shaded by how sure the model was, and say so in words; what they hold is never markup."""

import math

from kani_nb.engines.base import TokenLogprob
from kani_nb.notebook.token_shades import summary, tokens_html


def token(text, probability, *others):
    return TokenLogprob(text, math.log(probability), tuple((each, math.log(share)) for each, share in others))


def test_the_less_sure_the_darker_and_each_says_its_probability_and_what_else_was_likely():
    markup = tokens_html([token("Paris", 0.97), token(" or", 0.5, (" or", 0.5), (" and", 0.25)), token("x", 0.0001)])
    assert '<span class="kani-nb-t" tabindex="0" title="97 %">Paris</span>' in markup
    assert "kani-nb-p2" in markup
    assert "50 %; likeliest: &#x27; or&#x27; 50 %, &#x27; and&#x27; 25 %" in markup
    assert 'kani-nb-p4" tabindex="0" title="under 0.1 %">x</span>' in markup


def test_all_together_are_said_in_a_line():
    assert summary([token("a", 0.25), token("b", 1.0)]) == "2 tokens, 50 % sure of one on average, least of 'a'"


def test_no_tokens_are_nothing():
    assert tokens_html([]) == ""


def test_a_notebook_keeps_the_first_ones():
    markup = tokens_html([token("x", 0.5)] * 1000)
    assert markup.count("kani-nb-t ") == 400
    assert "the first 400 tokens" in markup


def test_hostile_tokens_are_words():
    hostile = '"><script>alert(1)</script>\n\x00\ud800'
    markup = tokens_html([token(hostile, 0.5, (hostile, 0.2))])
    body = markup.partition("</style>")[2]
    assert "<script" not in body
    assert "\x00" not in body and "\ud800" not in body
    assert body.count("<span") == body.count("</span>") == 1
