"""Chromium and the notebooks opened in it: cells are run by the front end's commands and read as a person sees them.

Whatever would leave the machine is aborted and kept in `Chromium.outside`; what the page complains of in
`Chromium.complaints`. Playwright is imported when a browser is started.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.browser.jupyter import JupyterServer

CHROMIUM = "chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
_LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "data:", "blob:", "about:")
#: What these versions say by themselves, with nothing of ours on the page.
_KNOWN = (
    "reading 'schema'",  # Notebook 7.6 on a notebook that it has just opened
    "null (reading 'kernel')",  # ipywidgets' manager, on any notebook opened without a kernel
    "[yjs#509]",
    "is duplicated.",
    '{"shareKey":"@jupyterlab/docregistry"}',  # Voila 0.5 beside Notebook 7, whose extension it cannot load
)
#: Voila's icon font, without which it shows no icons.
_ICON_FONT = "https://cdn.jsdelivr.net/npm/@fortawesome/fontawesome-free@"

# Runs in every page. `kn.panel()` is the notebook; `kn.run` notes when its cell's command was done.
_PAGE = """
window.ran = [];
for (const name of ['alert', 'confirm', 'prompt']) window[name] = () => { window.ran.push(name) };
window.kn = {
  panel() {
    for (const widget of window.jupyterapp?.shell.widgets('main') ?? [])
      if (widget.context && widget.content?.widgets) return widget;
  },
  status() { return kn.panel()?.sessionContext.session?.kernel?.status },
  done: {},
  async run(index) {
    const notebook = kn.panel().content;
    notebook.deselectAll();
    notebook.activeCellIndex = index;
    kn.done[index] = null;
    await window.jupyterapp.commands.execute('notebook:run-cell');
    kn.done[index] = performance.now();
  },
  text(index) {
    return kn.panel().content.widgets[index].node.querySelector('.kani-nb-md')?.textContent ?? '';
  },
  watch(index) {
    const frames = (kn.frames = []);
    new MutationObserver(() => {
      const text = kn.text(index);
      if (text && frames.at(-1) !== text) frames.push(text);
    }).observe(kn.panel().content.widgets[index].node, {subtree: true, childList: true, characterData: true});
  },
};
addEventListener('click', (event) => {
  if (event.target.closest?.('.kani-strip button')) kn.clicked = performance.now();
}, true);
"""


class Chromium:
    """A headless browser with a profile of its own. A context manager.

    Args:
        profile: an empty folder.
        size: width and height of its pages.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900)) -> None:
        from playwright.sync_api import sync_playwright

        self.outside: list[str] = []
        self.complaints: list[str] = []
        self.dialogs: list[str] = []
        self._playwright = sync_playwright().start()
        self._context = self._playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=shutil.which(CHROMIUM),
            headless=True,
            args=FLAGS,
            viewport={"width": size[0], "height": size[1]},
        )
        self._context.route("**/*", self._look_at_request)
        self._context.add_init_script(_PAGE)
        self._context.on("console", lambda said: said.type == "error" and self._complain(said.page, said.text))
        self._context.on("weberror", lambda fault: self._complain(fault.page, fault.error.stack or str(fault.error)))
        self._context.on("dialog", self._look_at_dialog)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        self._playwright.stop()

    def open(self, server: JupyterServer, name: str, *, has_kernel: bool = True) -> OpenNotebook:
        """Open a notebook; without a kernel only in JupyterLab, as its "Notebook (no kernel)" does."""
        page = self.new_page()
        page.goto(server.url(name) if has_kernel else f"{server.address}/lab?reset&token={server.token}")
        page.wait_for_function("() => window.jupyterapp?.shell")
        if not has_kernel:
            page.evaluate(
                """async (path) => {
                    await jupyterapp.restored;
                    const kernelPreference = {shouldStart: false, canStart: false, shouldReuse: false};
                    await jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook', kernelPreference});
                }""",
                name,
            )
        notebook = OpenNotebook(page, server, name)
        notebook.wait_until_drawn(has_kernel=has_kernel)
        return notebook

    def new_page(self) -> Any:
        """An empty page, watched like all."""
        return self._context.new_page()

    def assert_quiet(self, *, but: str = "\0") -> None:
        """Nothing left the machine, no page complained (`but` of what has those words), no dialog opened."""
        self._context.pages[0].wait_for_timeout(50)  # until what was said last is heard
        complaints = [each for each in self.complaints if but not in each]
        seen = {"requests": self.outside, "console": complaints, "dialogs": self.dialogs}
        assert not any(seen.values()), seen

    def close_pages(self) -> None:
        """Close every page that is open."""
        for page in self._context.pages[1:]:  # the first one keeps the browser alive
            page.close()

    def forget(self) -> None:
        """Start new lists of what was seen."""
        self.outside.clear()
        self.complaints.clear()
        self.dialogs.clear()

    def _complain(self, page: Any, text: str) -> None:
        # A page that is closed while its kernel goes may have said something that is heard only in the next test.
        if (page is None or not page.is_closed()) and not any(known in text for known in _KNOWN):
            self.complaints.append(text[:1500])

    def _look_at_request(self, route: Any) -> None:
        if route.request.url.startswith(_LOCAL):
            route.continue_()
        elif route.request.url.startswith(_ICON_FONT) and "/voila/" in route.request.frame.url:
            route.fulfill(body="", content_type="text/css")
        else:
            self.outside.append(route.request.url)
            route.abort()

    def _look_at_dialog(self, dialog: Any) -> None:
        if dialog.type != "beforeunload":
            self.dialogs.append(f"{dialog.type}: {dialog.message}")
        dialog.accept()


class OpenNotebook:
    """A notebook in a page. Cells are numbered from 0."""

    def __init__(self, page: Any, server: JupyterServer, name: str) -> None:
        self.page = page
        self.server = server
        self.name = name

    def wait_until_drawn(self, *, has_kernel: bool = True) -> None:
        """Wait for the cells, and for a kernel that is ready."""
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_function("() => kn.panel()?.context.isReady", timeout=60_000)
        if has_kernel:
            self.wait_until_idle()

    def wait_until_idle(self, timeout_s: float = 60) -> None:
        """Wait for the kernel."""
        self.page.wait_for_function("() => kn.status() === 'idle'", timeout=timeout_s * 1000)

    def start(self, index: int) -> None:
        """Run a cell, and come back at once."""
        self.page.evaluate("(index) => { kn.run(index) }", index)

    def wait_until_done(self, index: int | str, timeout_s: float = 60) -> float:
        """Wait until that cell's command, or "all", is done; when it was, in ms of the page's clock."""
        done = self.page.wait_for_function("(index) => kn.done[index]", arg=index, timeout=timeout_s * 1000)
        return float(done.json_value())

    def run(self, *indices: int, fails: bool = False) -> None:
        """Run cells, one after the other; each succeeds, or each fails."""
        for index in indices:
            self.start(index)
            self.wait_until_done(index)
            errors = [output for output in self.outputs(index) if output["output_type"] == "error"]
            assert bool(errors) == fails, errors or f"cell {index} did not fail"

    def watch(self, index: int) -> None:
        """Keep every text of a cell's answer that reaches the page, for `frames`."""
        self.page.evaluate("(index) => { kn.watch(index) }", index)

    @property
    def frames(self) -> list[str]:
        """The texts that were seen since `watch`, in order."""
        return list(self.page.evaluate("kn.frames"))

    def press_stop(self, index: int) -> float:
        """Click the Stop button under a running cell; when it was clicked, in ms of the page's clock."""
        self.cell(index).get_by_role("button", name="Stop").click()
        return float(self.page.evaluate("kn.clicked"))

    def start_all(self) -> None:
        """The front end's own Run All."""
        self.page.evaluate(
            """() => { kn.done.all = null;
            jupyterapp.commands.execute('notebook:run-all-cells').then(() => { kn.done.all = performance.now() }) }"""
        )

    def interrupt(self) -> float:
        """The front end's own command; when it was given, in ms of the page's clock."""
        return float(
            self.page.evaluate(
                """async () => { const asked = performance.now();
                await jupyterapp.commands.execute('notebook:interrupt-kernel'); return asked }"""
            )
        )

    def add(self, source: str) -> int:
        """Append a code cell; its number."""
        return int(
            self.page.evaluate(
                """(source) => { const notebook = kn.panel().content.model.sharedModel;
                notebook.insertCell(notebook.cells.length, {cell_type: 'code', source, metadata: {}});
                return notebook.cells.length - 1 }""",
                source,
            )
        )

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """A cell's outputs as the front end holds them."""
        cell = self.page.evaluate("(index) => kn.panel().content.widgets[index].model.toJSON()", index)
        return list(cell["outputs"])

    def answer(self, index: int) -> str:
        """The text of a cell's answer, as it is on the page now."""
        return str(self.page.evaluate("(index) => kn.text(index)", index))

    def cell(self, index: int) -> Any:
        """A cell's element."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def shown(self, index: int) -> str:
        """What a person reads below a cell."""
        return str(self.cell(index).locator(".jp-Cell-outputArea").inner_text())

    def wait_for(self, claim: Callable[[], Any], timeout_s: float = 30) -> None:
        """Wait until `claim()` is true."""
        end = time.monotonic() + timeout_s
        while not claim():
            assert time.monotonic() < end, f"not within {timeout_s} s"
            self.page.wait_for_timeout(30)

    def save(self) -> dict[str, Any]:
        """Save, and read the file."""
        self.page.evaluate("async () => { await kn.panel().context.save() }")
        return dict(json.loads((self.server.root / self.name).read_text(encoding="utf-8")))

    def reload(self) -> None:
        """The browser's reload, without saving; the kernel may still be busy."""
        self.page.reload()
        self.page.wait_for_function("() => window.jupyterapp?.shell", timeout=60_000)
        self.wait_until_drawn(has_kernel=False)
        self.page.wait_for_function("() => kn.status()", timeout=60_000)

    def close(self) -> None:
        """Close the page; the kernel goes on."""
        self.page.close()
