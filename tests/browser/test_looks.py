"""How a conversation looks, light and dark, wide and narrow: pictures for people, and what can be measured of them.

The pictures are in tests/artifacts, where nothing is committed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.front_end import Chromium, OpenNotebook
from tests.browser.jupyter import JupyterServer

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

ANSWER = r"""## A second heading

Some **bold** and *slanted* words, `inline code`, a [link](https://example.org), and a formula $e^{i\pi} + 1 = 0$.

1. first
2. second
   - nested

> A quotation.

```python
def greet(name: str) -> str:
    return f"hello {name}"  # a comment that goes on and on, beyond the right edge of a narrow page, and then some more
```

| scheme | bytes | speed |
|:--|--:|:-:|
| bf16 | 269,000,000 | 1.0 |
| int8 | 135,000,000 | 2.1 |

Averyveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryveryverylongwordwithoutanyplacetobreakit.
"""
CELLS = [
    "%load_ext kani_nb\n%load_engine smollm2",
    "%%chat --no-sample --max-new-tokens 40\nWhat is the capital of France?",
    "%%chat --no-sample --max-new-tokens 60\nTell me three facts about that city.",
    f"import kani_nb\n%load_engine echo --as echo\nkani_nb.runtime().engine.reply = {ANSWER!r}",
    "%%chat\nShow me everything, {{1 + 1}} times.",
    "%config KaniNB.plot = 'never'\nkani_nb.runtime().engine.reply = None",
    "%%chat\nShort, and without a figure.",
    "kani_nb.runtime().engine.fail_after = 3",
    "%%chat\nThis one fails in the middle of it.",
]
FAILS = len(CELLS) - 1

# Text of ours that stands out too little from what is behind it, and whatever of ours sticks out.
MEASURE = """() => {
  const channels = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, below) => { const a = top[3] ?? 1; return below.map((v, i) => top[i] * a + v * (1 - a)) };
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const layer = channels(getComputedStyle(at).backgroundColor);
      layers.push(layer);
      if ((layer[3] ?? 1) === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const faint = {};
  const outside = [];
  for (const root of document.querySelectorAll('.kani-nb')) {
    if (root.scrollWidth > root.clientWidth + 1) outside.push(root.innerText.slice(0, 60));
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || !node.offsetParent || node.closest('mjx-container')) continue;
      const back = behind(node);
      const front = over(channels(getComputedStyle(node).color), back);
      const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
      const ratio = (high + 0.05) / (low + 0.05);
      if (ratio < 4.5) faint[`${node.localName}.${node.className} ${node.innerText.slice(0, 30)}`] = ratio.toFixed(2);
    }
  }
  return {faint, outside};
}"""


def show_theme(notebook: OpenNotebook, theme: str) -> None:
    notebook.page.evaluate(
        "(theme) => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme.title()}"
    )
    notebook.page.wait_for_function(
        "(isLight) => document.body.dataset.jpThemeLight === String(isLight)", arg=theme == "light"
    )


def picture_of_cells(notebook: OpenNotebook, path: Path) -> None:
    """All cells in one tall picture: the page is made as tall as they are."""
    width = notebook.page.viewport_size["width"]
    height = notebook.page.evaluate(
        """() => {
            const cells = kn.panel().content.widgets.map((cell) => cell.node.getBoundingClientRect());
            return cells.at(-1).bottom - cells[0].top;
        }"""
    )
    notebook.page.set_viewport_size({"width": width, "height": min(int(height) + 200, 6000)})
    notebook.page.evaluate("kn.panel().content.widgets[0].node.scrollIntoView()")
    notebook.page.wait_for_timeout(300)  # the figures at their new size: plotly does not say when
    notebook.page.screenshot(path=str(path))


def test_a_conversation_is_legible_in_both_themes_and_widths(
    server: JupyterServer, browser: Chromium, artifacts: Path, smollm2
):
    server.write("looks.ipynb", CELLS)
    notebook = browser.open(server, "looks.ipynb")
    if server.kind == "lab":
        notebook.page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
    notebook.run(*range(FAILS))
    notebook.run(FAILS, fails=True)
    notebook.cell(4).locator("mjx-container").first.wait_for()
    # The prompt is not said twice where the cell shows it, and is where the cell does not.
    assert not notebook.cell(1).locator(".kani-nb-user").is_visible()
    assert "everything, 2 times" in notebook.shown(4)
    # Something stands in the strip's place, each time.
    for index in (1, 2, 4, 6, FAILS):
        boxes = [output.bounding_box() for output in notebook.cell(index).locator(".jp-OutputArea-output").all()]
        assert len(boxes) >= 2 and all(box["height"] > 10 for box in boxes), (index, boxes)
    assert "tok" in notebook.shown(6)
    assert notebook.shown(FAILS).count("GenerationError") == 1

    widgets = notebook.add("from ipywidgets.widgets.widget import _instances; len(_instances)")

    def left_widgets() -> str:
        notebook.run(widgets)
        return notebook.shown(widgets).split()[-1]

    notebook.wait_for(lambda: left_widgets() == "0")

    measured = {}
    for theme in ("light", "dark"):
        show_theme(notebook, theme)
        for width in (1280, 600):
            notebook.page.set_viewport_size({"width": width, "height": 900})
            picture_of_cells(notebook, artifacts / f"{server.kind}-{theme}-{width}.png")
            for box in (figure.bounding_box() for figure in notebook.page.locator(".jp-RenderedPlotly").all()):
                assert box["height"] > 150
            measured[theme, width] = notebook.page.evaluate(MEASURE)
    assert measured == {key: {"faint": {}, "outside": []} for key in measured}
    show_theme(notebook, "light")
    browser.assert_quiet()
