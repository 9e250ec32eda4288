"""`%%chat -a`: files, addresses and the notebook's own values before the prompt; and how they are shown."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import wave
from types import SimpleNamespace

import pytest

from kani_nb.engines.base import TextDelta
from kani_nb.engines.echo import EchoEngine
from kani_nb.messages import AudioPart, ImagePart, TextPart, VideoPart
from kani_nb.notebook import thumbnails
from kani_nb.notebook.attachments import with_expressions_quoted
from kani_nb.notebook.stream_view import StreamView
from kani_nb.notebook.thumbnails import MAX_BYTES, prompt_html, prompt_pictures
from kani_nb.notebook.transcript import TurnText, prompt_text
from kani_nb.options import split_words
from tests.engines.file_server import encoded, make_png, noise_png, serving
from tests.engines.test_attachments import make_wav
from tests.notebook_view.screen import Clock, Screen

PNG = make_png()


@pytest.fixture
def echo(cells, clean_runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "with space.txt").write_text("first line\nsecond")
    cells.good("%load_engine echo")
    return cells


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        server.files = {"/done.png": ("image/png", PNG), "/page": ("text/html", b"<html>")}
        yield server


def sent(runtime):
    return runtime.chat.turns[-1].prompt.content


def test_attachments_stand_before_the_prompt_in_their_order(echo, clean_runtime, web):
    echo.shell.user_ns["sound"] = make_wav()
    echo.good(f"%%chat -a a.png --attach 'with space.txt' -a {web.url}/done.png --attach={{{{sound}}}}\nwhat is it?")
    assert sent(clean_runtime) == (
        ImagePart(PNG, "image/png"),
        TextPart("# with space.txt\n\nfirst line\nsecond\n\n"),
        ImagePart(PNG, "image/png"),
        AudioPart(make_wav(), "audio/wav"),
        "what is it?",
    )
    assert "first line\nsecond\n\nwhat is it?" in clean_runtime.chat.turns[-1].answer.text


def test_a_picture_alone_is_a_prompt(echo, clean_runtime):
    echo.good("%%chat -a a.png\n\n")
    assert sent(clean_runtime) == (ImagePart(PNG, "image/png"),)
    assert "the prompt is empty" in echo.bad("%%chat\n\n")


def test_parts_in_the_prompt_stay_where_they_are(echo, clean_runtime):
    echo.shell.user_ns["p"] = ImagePart(b"x", "image/png")
    echo.good("%%chat -a a.png\nsee {{p}} there")
    assert sent(clean_runtime) == (ImagePart(PNG, "image/png"), "see ", ImagePart(b"x", "image/png"), " there")


class Figure:
    def savefig(self, file, format, **options):
        assert format == "png"
        file.write(PNG)


def test_the_notebooks_own_values_are_taken_for_what_they_are(echo, clean_runtime, tmp_path, web):
    from IPython.display import Audio, Image, Video
    from PIL import Image as Pillow

    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0")
    names = echo.shell.user_ns
    names |= {
        "part": VideoPart(b"v", "video/mp4"),
        "pil": Pillow.new("RGB", (4, 3), "red"),
        "cmyk": Pillow.new("CMYK", (4, 3)),
        "figure": Figure(),
        "shown": Image(data=PNG),
        "named": Image(filename=str(tmp_path / "a.png")),
        "heard": Audio(make_wav()),
        "clip": Video(str(tmp_path / "clip.mp4")),
        "away": Image(url=f"{web.url}/done.png"),
        "content": bytearray(PNG),
        "path": tmp_path / "a.png",
        "text": "a.png",
        "address": f"{web.url}/done.png",
        "many": {"x y": [PNG]},
    }
    expected = {
        "part": VideoPart(b"v", "video/mp4"),
        "heard": AudioPart(make_wav(), "audio/wav"),
        "clip": VideoPart((tmp_path / "clip.mp4").read_bytes(), "video/mp4"),
        "cmyk": None,
    }
    for name in [each for each in names if each in {*expected, "pil", "figure", "shown", "named", "away", "content",
                                                    "path", "text", "address"}]:  # fmt: skip
        echo.good(f"%%chat --append -a {{{{{name}}}}}\nwhat?")
        found = sent(clean_runtime)[0]
        wanted = expected.get(name, ImagePart(PNG, "image/png"))
        if wanted is None or name == "pil":
            assert Pillow.open(io.BytesIO(found.data)).size == (4, 3)
        else:
            assert found == wanted, name
    echo.good("%%chat -a {{ many['x y'][0] }} --quiet\nwhat?")
    assert sent(clean_runtime)[0] == ImagePart(PNG, "image/png")


def test_samples_with_their_rate_are_a_sound(echo, clean_runtime):
    import numpy as np
    from IPython.display import Audio

    echo.shell.user_ns |= {"samples": np.sin(np.arange(1600) / 9).astype("float32"), "Audio": Audio}
    echo.good("%%chat -a {{Audio(samples, rate=16000)}}\nwhat?")
    part = sent(clean_runtime)[0]
    assert part.mime == "audio/wav"
    with wave.open(io.BytesIO(part.data)) as file:
        assert (file.getframerate(), file.getnframes()) == (16000, 1600)


def test_an_expression_is_evaluated_once_and_what_it_gave_is_not_looked_at_again(echo, clean_runtime):
    echo.good("calls = []\ndef f():\n    calls.append(1)\n    return '{{calls}}'")
    assert "there is no such file" in echo.bad("%%chat -a {{f()}}\nx")
    assert echo.shell.user_ns["calls"] == [1]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nothing.png", "nothing.png cannot be attached: there is no such file"),
        (".", "it is a folder"),
        ("''", "-a has nothing after it"),
        ("empty.png", "it is empty"),
        ("page.html", "it is a web page"),
        ("huge.png", "larger than 52,428,800 bytes"),
        ("ftp://host/x.png", "ftp: is not http or https"),
        ("data:image/png;base64,AAAA", "data: addresses cannot be attached"),
        ("{{nobody}}", "{{nobody}} raised NameError"),
        ("{{1/0}}", "raised ZeroDivisionError"),
        ("'{{a b}}'", "is not a Python expression"),
        ("'{{1}} and more'", "is not one expression"),
        ("{{samples}}", "-a {{Audio(samples, rate=16000)}}"),
        ("{{pixels}}", "-a {{Image.fromarray(pixels)}}"),
        ("{{frame}}", "write {{frame}} in the prompt itself"),
        ("{{3}}", "{{3}} cannot be attached: it is a int"),
        ("{{b''}}", "{{b''}} cannot be attached: it is empty"),
        ("{{b'%PDF'}}", "its type is not known"),
        ("{{'two\\nlines'}}", "it is text, and no path or address"),
        ("{{broken}}", "{{broken}} raised OSError: no fonts"),
        ("{{type(figure)}}", "it is a type"),
        ("{{axes}}", "-a {{axes.figure}}"),
    ],
)
def test_what_cannot_be_attached_is_said_shortly_and_nothing_is_sent(echo, clean_runtime, tmp_path, word, said):
    import numpy as np

    class Frame:
        def to_markdown(self):
            return "| a |"

    class Broken:
        def savefig(self, *_, **__):
            raise OSError("no fonts")

    (tmp_path / "empty.png").touch()
    (tmp_path / "page.html").write_text("<html>")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(60 * 1024**2)
    echo.shell.user_ns |= {
        "samples": np.zeros(1600, "float32"),
        "pixels": np.zeros((4, 4, 3), "uint8"),
        "frame": Frame(),
        "broken": Broken(),
        "figure": Figure(),
        "axes": SimpleNamespace(figure=Figure()),
    }
    assert said in echo.bad(f"%%chat -a {word}\nwhat?")
    assert clean_runtime.chat.turns == ()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nothing", "the server answers 404"),
        ("/page", "it is a web page"),
        ("/loop", "it redirects more than 5 times"),
        ("/reset", "the connection failed"),
        ("/short", "the connection failed"),
    ],
)
def test_an_address_that_gives_nothing_is_said_shortly(echo, clean_runtime, web, path, said):
    assert said in echo.bad(f"%%chat -a {web.url}{path}\nwhat?")
    assert clean_runtime.chat.turns == ()


def test_a_fetch_is_interrupted_at_once_and_nothing_is_sent(echo, clean_runtime, web):
    def interrupt():
        if web.reached.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    said = echo.bad(f"%%chat -a {web.url}/silent\nwhat?")
    thread.join()
    assert "interrupted while attachments were read; nothing was sent" in said
    assert clean_runtime.chat.turns == ()
    echo.good("%%chat -a a.png\nand now?")
    assert len(clean_runtime.chat.turns) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-a {{d['x y']}} --quiet", ["-a", "{{d['x y']}}", "--quiet"]),
        ("-a \"{{d['x']}}\"", ["-a", "{{d['x']}}"]),
        ("--attach={{f(1, 2)}}", ["--attach={{f(1, 2)}}"]),
        ("-a {{ {'a': 1}['a'] }} -a b", ["-a", "{{ {'a': 1}['a'] }}", "-a", "b"]),
        ("--stop '{{' --stop }}", ["--stop", "{{", "--stop", "}}"]),
        ("--stop {{ for x }}", ["--stop", "{{", "for", "x", "}}"]),
        ("--system 'plain words'", ["--system", "plain words"]),
    ],
)
def test_an_expression_is_one_word_of_the_line_whatever_quotes_it_has(line, words):
    assert split_words(with_expressions_quoted(line)) == words


def test_a_saved_conversation_keeps_what_was_attached(echo, clean_runtime, tmp_path):
    echo.good("%%chat -a a.png\nwhat?")
    before = sent(clean_runtime)
    echo.good("%chat save talk.json")
    echo.good("%chat new")
    echo.good("%chat load talk.json")
    assert sent(clean_runtime) == before


# -- how it is shown ---------------------------------------------------------------------------------------------------


def turn_html(*parts):
    text = TurnText(prompt_text(parts), "", "", "model", prompt_html=prompt_html(parts))
    return text.to_bundle()["text/html"], text.to_bundle()["text/plain"]


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_small_picture_is_shown_as_it_is_and_named_in_plain_text(name):
    content = encoded(name)
    markup, plain = turn_html(ImagePart(content, "image/wrong"), "what <is> it?")
    (source,) = re.findall(r'<img alt="([^"]*)" title="[^"]*" style="[^"]*" src="([^"]*)">', markup)
    assert source[0] == f"image/wrong, {len(content):,} bytes"
    assert re.fullmatch(rf"data:image/{name.lower()};base64,[A-Za-z0-9+/]+=*", source[1])
    assert "what &lt;is&gt; it?" in markup
    assert f"[image/wrong, {len(content):,} bytes]what <is> it?" in plain


def test_a_large_picture_is_shown_as_a_small_one():
    from PIL import Image

    for content, alpha in ((noise_png(700), False), (make_png(3000, 2000, mode="RGBA") + b"\0" * MAX_BYTES, True)):
        shown = thumbnails._raster(content)
        assert shown is not None
        assert len(shown[0]) <= MAX_BYTES
        image = Image.open(io.BytesIO(shown[0]))
        assert max(image.size) <= thumbnails.MAX_SIDE
        assert shown[1] == ("image/png" if alpha else "image/jpeg")
        assert not image.getexif()


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<script>alert(1)</script>",
        b"\x89PNG\r\n\x1a\n<script>alert(1)</script>",
        b"RIFF\x10\0\0\0WEBP<svg>",
        encoded("TIFF"),
        encoded("BMP"),
        b"",
    ],
)
def test_nothing_but_a_raster_picture_is_shown_whatever_it_calls_itself(content):
    for mime in ("image/png", "image/svg+xml", '"><script>alert(1)</script>'):
        part = ImagePart(content, mime)
        markup, plain = turn_html(part, "what?")
        assert "<img" not in markup
        assert "<script" not in markup.lower()
        assert f"[{mime}, {len(content):,} bytes]what?" in plain


def test_a_type_that_is_markup_stays_inside_the_words_for_the_picture():
    markup, _ = turn_html(ImagePart(PNG, '"><script>alert(1)</script>'), "what?")
    assert "<script" not in markup
    assert markup.count("<img") == 1
    assert "&quot;&gt;&lt;script&gt;" in markup


def test_a_picture_of_too_many_pixels_is_only_named(monkeypatch):
    monkeypatch.setattr(thumbnails, "_MOST_PIXELS", 11)
    assert prompt_html([ImagePart(PNG, "image/png")]) == ""
    monkeypatch.setattr(thumbnails, "_MOST_PIXELS", 12)
    assert prompt_html([ImagePart(PNG, "image/png")])


def test_without_pillow_small_pictures_are_shown_and_large_ones_named(monkeypatch):
    import sys

    large = noise_png(200)
    monkeypatch.setitem(sys.modules, "PIL", None)
    markup = prompt_html([ImagePart(PNG, "image/png"), ImagePart(large, "image/png")])
    assert markup.count("<img") == 1
    assert f"[image/png, {len(large):,} bytes]" in markup


def test_many_pictures_do_not_make_a_notebook_huge():
    picture = ImagePart(make_png() + b"\0" * 60_000, "image/png")
    markup = prompt_html([picture] * 20)
    assert markup.count("<img") == 4
    assert markup.count("[image/png") == 16
    assert len(markup) < 400_000
    assert len(prompt_pictures([picture] * 20)) == 4
    assert prompt_html("text alone") == ""
    assert prompt_html([AudioPart(b"x", "audio/wav"), "text"]) == ""


def test_a_long_text_is_shown_shortened_and_sent_whole(echo, clean_runtime, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 1999 + "end")
    clean_runtime.use(EchoEngine(reply="seen", max_context_size=9000), name="reader")
    echo.good("%%chat -a long.txt\nwhat?")
    assert sent(clean_runtime)[0].content.endswith("word end\n\n")
    assert len(prompt_text(sent(clean_runtime))) < 2200
    assert prompt_text(sent(clean_runtime)).endswith(" more characters)\n\nwhat?")


def test_the_cells_output_shows_the_picture_and_so_does_showing_it_again(echo):
    from IPython.utils.capture import capture_output

    for cell in ("%%chat -a a.png\nwhat?", "%chat show"):
        with capture_output() as caught:
            assert echo.shell.run_cell(cell).success
        (page,) = [each.data["text/html"] for each in caught.outputs if "kani-nb-user" in each.data["text/html"]]
        assert page.count('<img alt="image/png') == 1
        assert f"[image/png, {len(PNG)} bytes]what?" not in page


def test_a_picture_is_drawn_once_when_the_answer_is_complete():
    clock = Clock()
    screen = Screen(clock)
    view = StreamView([ImagePart(PNG, "image/png"), "what?"], display=screen, clock=clock)
    view.feed(TextDelta("seen"))
    clock.now += 5
    view.pump()
    assert len(screen.frames) == 2
    assert "<img" not in screen.last["text/html"]
    assert f"[image/png, {len(PNG)} bytes]" in screen.last["text/html"]
    view.finish()
    assert "<img" in screen.last["text/html"]
    assert f"You: [image/png, {len(PNG)} bytes]what?" in screen.last["text/plain"]
