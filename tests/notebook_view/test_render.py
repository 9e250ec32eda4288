"""What a model writes reaches a trusted output as words, never as markup of its own."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.notebook.render import GrowingMarkdown, markdown_to_html

#: By name; the front end's own tests and the browser's read them too.
ATTACKS = json.loads((Path(__file__).parents[1] / "hostile_answers.json").read_text(encoding="utf-8"))

ALLOWED = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "hr", "br"),
    *("code", "em", "strong", "s", "a", "span", "table", "thead", "tbody", "tr", "th", "td"),
}
ALLOWED_ATTRIBUTES = {"href", "rel", "target", "start", "class"}


class Inspector(HTMLParser):
    """Collects what a browser would make of the markup, and the text it would show."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.text: list[str] = []
        self.classes: list[str] = []
        self.math: list[str] = []
        self._in_math = 0

    def handle_starttag(self, tag, attrs):
        if tag not in ALLOWED:
            self.faults.append(f"<{tag}>")
        for name, value in attrs:
            if name not in ALLOWED_ATTRIBUTES:
                self.faults.append(f"{tag} {name}={value}")
            if name == "href" and not (value or "").lower().startswith(("http://", "https://", "mailto:", "#")):
                self.faults.append(f"href={value}")
            if name == "class":
                self.classes += (value or "").split()
        if tag == "a" and dict(attrs).get("rel") != "noopener noreferrer nofollow":
            self.faults.append("a link that tells where it was clicked")
        if tag == "span" and "mathjax_process" in (dict(attrs).get("class") or ""):
            self._in_math += 1

    def handle_endtag(self, tag):
        if tag == "span":
            self._in_math = 0

    def handle_data(self, data):
        self.text.append(data)
        if self._in_math:
            self.math.append(data)

    def handle_comment(self, data):
        self.faults.append("comment")

    def handle_decl(self, decl):
        self.faults.append("declaration")

    def unknown_decl(self, data):
        self.faults.append("declaration")

    def handle_pi(self, data):
        self.faults.append("processing instruction")


def inspect(markup: str) -> Inspector:
    inspector = Inspector()
    inspector.feed(markup)
    inspector.close()
    return inspector


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_no_attack_gets_through_as_markup(attack):
    for text in (attack, f"Sure!\n\n{attack}\n\nDone.", f"- item {attack}\n", f"*{attack}*"):
        seen = inspect(markdown_to_html(text))
        assert seen.faults == []
        assert not any(name.startswith("jp-") for name in seen.classes)
        for formula in seen.math:
            assert not any(command in formula for command in ("href", "style", "class", "def"))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_no_attack_gets_through_half_written(attack):
    text = f"Sure!\n\n{attack}\n\nDone."
    growing = GrowingMarkdown()
    for end in range(len(text) + 1):
        assert inspect(growing.render(text[:end])).faults == []


def test_an_image_is_shown_as_words_with_its_address():
    markup = markdown_to_html("![a cat](https://evil.example/cat.png)")
    assert "<img" not in markup
    assert "a cat https://evil.example/cat.png" in markup


def test_good_markdown_is_rendered():
    markup = markdown_to_html(
        "# T\n\n**b** *i* ~~s~~ `c` [l](https://a.example)\n\n1. x\n"
        "\n|a|b|\n|-|:-:|\n|1|2|\n\n```python\nx = 'y'  # z\n```"
    )
    for piece in (
        *(
            "<h1>T</h1>",
            "<strong>b</strong>",
            "<em>i</em>",
            "<s>s</s>",
            "<code>c</code>",
            "<ol>",
            '<td class="kani-nb-center">2',
        ),
        *('href="https://a.example"', 'target="_blank"', 'class="language-python"', '<span class="c"># z</span>'),
    ):
        assert piece in markup


def test_tex_reaches_mathjax_whole_and_prices_do_not():
    seen = inspect(markdown_to_html(r"Euler: \(e^{i\pi}_1 * 2 * x_2\), and it costs $5 and $10, or $x_1$."))
    assert seen.math == [r"\(e^{i\pi}_1 * 2 * x_2\)", r"\(x_1\)"]
    assert "costs $5 and $10" in "".join(seen.text)


def test_tex_that_reaches_beyond_its_formula_stays_readable_source():
    seen = inspect(markdown_to_html(r"$$\newcommand{\x}{1}$$"))
    assert seen.math == []
    assert r"$$\newcommand{\x}{1}$$" in "".join(seen.text)


def test_an_open_fence_is_closed_for_the_frame():
    markup = GrowingMarkdown().render("Look:\n\n```python\nprint(1)\n")
    assert markup.endswith("</code></pre>\n")


MARKDOWN = st.lists(
    st.sampled_from(
        [
            *(
                "a",
                "b c",
                "\n",
                "\n\n",
                "\n\n\n",
                "    ",
                "  ",
                "\t",
                "- ",
                "* ",
                "1. ",
                "2) ",
                "> ",
                "# ",
                "#",
                "##",
                "---",
                "===",
                "=",
            ),
            *(
                "```",
                "```py",
                "~~~",
                "`",
                "``",
                "|",
                "|-|",
                "a|b\n",
                "-|-\n",
                ":-:|-",
                "*",
                "**",
                "_",
                "~~",
                "[",
                "](",
                ")",
                "![",
                "<",
                ">",
            ),
            *(
                "&amp;",
                "&#0;",
                "\\",
                "\\(",
                "\\)",
                "$",
                "$$",
                "\r",
                "\r\n",
                "\x00",
                "\ud800",
                "é",
                "[1]: x\n",
                "<b>",
                "http://x.y",
                "0",
            ),
        ]
    ),
    max_size=40,
).map("".join)


@given(st.one_of(st.text(), MARKDOWN))
@settings(max_examples=300, deadline=None)
def test_any_text_is_rendered_and_harmless(text):
    assert inspect(markdown_to_html(text)).faults == []


@given(MARKDOWN, st.lists(st.integers(0, 120), max_size=12))
@settings(max_examples=600, deadline=None)
def test_a_growing_text_looks_as_if_rendered_whole_at_every_step(text, cuts):
    growing = GrowingMarkdown()
    for end in sorted({*(min(cut, len(text)) for cut in cuts), len(text)}):
        assert growing.render(text[:end]) == markdown_to_html(text[:end])


def test_a_text_that_does_not_continue_the_last_one_is_rendered_anew():
    growing = GrowingMarkdown()
    growing.render("one\n\ntwo\n\nthree\n\nfour")
    assert growing.render("other\n\ntext") == markdown_to_html("other\n\ntext")


def test_a_long_answer_is_parsed_only_at_its_end():
    block = "## Part\n\nSome **words** and `code`.\n\n- a\n- b\n\n```python\nx = 1\n```\n\n"
    text = block * 200
    parsed: list[int] = []
    growing = GrowingMarkdown()
    growing.render(text)

    from kani_nb.notebook import render

    parser = render._parser()
    original = parser.parse
    parser.parse = lambda source, env=None: (parsed.append(len(source)), original(source, env))[1]
    try:
        for end in range(0, len(block), 7):
            growing.render(text + block[:end])
    finally:
        del parser.parse
    assert parsed
    assert max(parsed) < 2 * len(block)
