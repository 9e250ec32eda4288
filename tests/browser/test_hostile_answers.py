"""What a model says does nothing in a trusted notebook: while it streams, when it is done, and when opened again."""

from __future__ import annotations

import json
import re

import pytest

from tests.browser.front_end import Chromium, OpenNotebook
from tests.browser.jupyter import JupyterServer
from tests.browser.panels import HAS_BEGUN
from tests.notebook_view.test_render import ATTACKS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

PREPARE = """
import json, kani_nb
%load_ext kani_nb
%config KaniNB.plot = 'never'
%load_engine echo:delay=0.02
answers = json.load(open('answers.json'))
def say(number):
    kani_nb.runtime().engine.reply = answers[number]
    return f'<img src=x onerror="window.pwned=1"><b>{number}</b>'
"""

# Looks at every answer after every change of the page; MathJax draws with elements of its own.
GUARD = """() => {
  kn.faults = [];
  const bad = 'script,iframe,img,object,embed,form,input,button,link,meta,base,style,svg,video,audio,template,details';
  const look = () => {
    for (const answer of document.querySelectorAll('.kani-nb article, .kn-chat .kn-md, .kn-chat .kn-said')) {
      for (const node of answer.querySelectorAll('*')) {
        if (node.closest('mjx-container') && node.localName !== 'a') continue;
        if (node.closest('.kn-code-tools')) continue;
        if (node.matches(bad)) kn.faults.push(node.outerHTML.slice(0, 200));
        for (const {name, value} of node.attributes) {
          if (name.startsWith('on') || name.startsWith('data-')) kn.faults.push(name);
          if (name === 'href' && !/^(https?:|mailto:|#)/i.test(value)) kn.faults.push(value);
          if (name === 'class' && /(^|\\s)(jp|lm)-/.test(value)) kn.faults.push(value);
        }
      }
    }
  };
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
  look();
}"""


def assert_nothing_ran(notebook: OpenNotebook, browser: Chromium) -> None:
    assert notebook.page.evaluate("[window.pwned ?? 0, window.ran]") == [0, []]
    assert notebook.page.evaluate("kn.faults") == []
    browser.assert_quiet()


def test_the_traps_catch_what_runs(server: JupyterServer, browser: Chromium):
    markup = '<img src=x onerror="window.pwned=1"><img src="https://evil.example/x.png"><script>alert(1)</script>'
    markup = f'<div class="kani-nb"><article>{markup}</article></div>'
    server.write("trap.ipynb", [f"from IPython.display import HTML\nHTML({markup!r})"])
    notebook = browser.open(server, "trap.ipynb")
    notebook.page.evaluate(GUARD)
    notebook.run(0)
    notebook.page.wait_for_function("window.pwned === 1 && window.ran.length")
    assert set(browser.outside) == {"https://evil.example/x.png"}
    assert len(notebook.page.evaluate("kn.faults")) >= 3


def test_no_answer_runs_or_asks_for_anything(server: JupyterServer, browser: Chromium):
    answers = [f"Sure!\n\n{attack}\n\nDone." for attack in ATTACKS.values()]
    (server.root / "answers.json").write_text(json.dumps(answers))
    cells = [f"%%chat --append\n{{{{say({number})}}}}" for number in range(len(answers))]
    server.write("hostile.ipynb", [PREPARE, *cells])
    notebook = browser.open(server, "hostile.ipynb")
    notebook.page.evaluate(GUARD)
    notebook.start_all()
    notebook.wait_until_done("all", timeout_s=180)
    # All were answered, in full, as words.
    for number, answer in enumerate(answers, 1):
        shown = notebook.answer(number)
        assert shown.startswith("Sure!") and shown.rstrip().endswith("Done."), answer
        assert notebook.cell(number).locator(".kani-nb-user").inner_text().count("onerror") == 1
    assert_nothing_ran(notebook, browser)
    print(f"\n{server.kind}: {len(answers)} hostile answers")

    saved = json.dumps(notebook.save())
    assert not re.search(r"widget-view\+json\W+:", saved)
    notebook.close()
    server.stop_kernels()
    again = browser.open(server, "hostile.ipynb")
    again.page.evaluate(GUARD)
    assert again.page.evaluate("[...kn.panel().content.model.cells].every((cell) => cell.trusted)")
    assert again.answer(len(answers)).rstrip().endswith("Done.")
    again.page.wait_for_load_state("networkidle")
    assert_nothing_ran(again, browser)


IN_THE_PANE = """
import time
from kani_nb.notebook.panels.chat_panel import show_chat_panel
panel = show_chat_panel()
for answer in answers:
    kani_nb.runtime().engine.reply = answer
    panel.ask(answer)
    while panel.is_answering:
        time.sleep(0.02)
"""


def test_no_answer_runs_or_asks_for_anything_in_the_pane(server: JupyterServer, browser: Chromium):
    answers = [f"Sure!\n\n{attack}\n\nDone." for attack in ATTACKS.values()]
    (server.root / "answers.json").write_text(json.dumps(answers))
    server.write("pane.ipynb", [PREPARE, IN_THE_PANE, f"kani_nb.runtime().chat.set_system({answers[1]!r})"])
    notebook = browser.open(server, "pane.ipynb")
    page = notebook.page
    page.evaluate(GUARD)
    notebook.run(0)
    notebook.start(1)
    page.wait_for_function(HAS_BEGUN)  # they are drawn while they stream
    notebook.wait_until_done(1, timeout_s=200)
    notebook.run(2)
    count = "document.querySelectorAll('.kn-chat .kn-turn:not(.kn-running)').length"
    page.wait_for_function(f"() => {count} === {len(answers)}")
    page.get_by_role("button", name="Settings").click()
    # Turns are drawn when they come into sight.
    shown = page.evaluate(
        """async () => {
            const shown = [];
            for (const turn of document.querySelectorAll('.kn-chat .kn-turn')) {
              turn.scrollIntoView();
              await new Promise(requestAnimationFrame);
              await new Promise(requestAnimationFrame);
              shown.push(turn.querySelector('.kn-md').innerText);
            }
            return shown;
        }"""
    )
    assert all(each.startswith("Sure!") and each.rstrip().endswith("Done.") for each in shown)
    assert_nothing_ran(notebook, browser)
    print(f"\n{server.kind}: {len(answers)} hostile answers in the pane")
    saved = json.dumps(notebook.save())
    assert "Sure!" in saved
    notebook.close()
    server.stop_kernels()
    again = browser.open(server, "pane.ipynb")
    again.page.evaluate(GUARD)
    assert again.shown(1).count("Sure!") >= 20
    again.page.wait_for_load_state("networkidle")
    assert_nothing_ran(again, browser)
