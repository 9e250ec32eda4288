"""The panels' kernel side under every set of versions, Google Colab's among them, as a page talks to it: by comms."""

import queue
import time

import pytest

from tests.kernels.driver import VERSIONS
from tests.kernels.driver import kernel as start_kernel
from tests.notebook.in_kernels import good

pytestmark = pytest.mark.kernels

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(params=VERSIONS)
def kernel(request, own_home):
    with start_kernel(request.param, env={"KANI_NB_HOME": str(own_home), "OMP_NUM_THREADS": "1"}) as running:
        good(running, "%load_ext kani_nb")
        yield running


class Page:
    """What a front end holds of one widget: its state, and the messages it was sent."""

    def __init__(self, kernel, cell):
        self.kernel = kernel
        self.state, self.heard = {}, []
        states = {}
        outcome = kernel.collect(kernel.send(cell, allow_stdin=True), on_output=lambda each: self._opened(each, states))
        assert outcome.status == "ok", outcome.text
        self.outputs = [each["data"] for each in outcome.outputs if "data" in each]
        self.comm_id = next(each[WIDGET]["model_id"] for each in self.outputs if WIDGET in each)
        self.state = states[self.comm_id]

    @staticmethod
    def _opened(message, states):
        content = message["content"]
        if message["msg_type"] == "comm_open":
            states[content["comm_id"]] = dict(content["data"].get("state", {}))
        elif message["msg_type"] == "comm_msg" and content["data"].get("method") == "update":
            states.setdefault(content["comm_id"], {}).update(content["data"]["state"])

    def send(self, data):
        content = {"comm_id": self.comm_id, "data": data}
        client = self.kernel.client
        client.shell_channel.send(client.session.msg("comm_msg", content))

    def set(self, **state):
        self.send({"method": "update", "state": state, "buffer_paths": []})

    def press(self, kind, **more):
        self.send({"method": "custom", "content": {"kind": kind, "id": "1", **more}})

    def wait_for(self, claim, timeout_s=60):
        ends_at = time.monotonic() + timeout_s
        while not claim(self.state):
            assert time.monotonic() < ends_at, self.state
            try:
                message = self.kernel.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            content = message["content"]
            if message["msg_type"] != "comm_msg" or content["comm_id"] != self.comm_id:
                continue
            data = content["data"]
            if data.get("method") == "update":
                self.state.update(data["state"])
            elif data.get("method") == "custom":
                self.heard.append(data["content"])
        return self.state


def test_an_engine_is_chosen_planned_loaded_and_freed(kernel):
    page = Page(kernel, "%load_engine")
    assert "run this cell again to use it" in page.outputs[1]["text/plain"]
    page.wait_for(lambda state: state["view"]["line"] == "%load_engine smollm2")
    page.set(values={**page.state["values"], "model": "echo:delay=0.01"})
    page.wait_for(lambda state: state["view"]["line"] == "%load_engine echo:delay=0.01")
    page.press("load")
    loaded = page.wait_for(lambda state: state["view"]["engines"] and not state["view"]["busy"])
    assert "loaded in" in loaded["view"]["said"]["text"]
    assert {"kind": "done", "id": "1"} in page.heard
    name = loaded["view"]["engines"][0]["name"]
    good(kernel, "%%chat\nhello from a cell")
    page.press("unload", name=name)
    freed = page.wait_for(lambda state: not state["view"]["engines"] and not state["view"]["busy"])
    assert "freed" in freed["view"]["said"]["text"]
    assert kernel.value("__import__('kani_nb').runtime().engines") == "{}"


def test_a_conversation_is_held_in_the_pane_and_drawn_in_the_dashboard(kernel):
    good(kernel, "%load_engine echo")
    page = Page(kernel, "%chat panel")
    for text in ("one", "one **two**"):
        page.press("send", text=text, files=[])
        page.wait_for(lambda state, text=text: any(turn["answer"] == text for turn in state["recent"]))
    page.wait_for(lambda state: not state["running"])
    shown = Page(kernel, "%engine dashboard")
    assert "image/svg+xml" in shown.outputs[1] or "<svg" in shown.outputs[1]["text/html"]
    good(kernel, "%unload_ext kani_nb")


def test_a_cell_that_is_run_again_leaves_no_panel_behind(kernel):
    for _ in range(3):
        for cell_id, cell in (("one", "%chat panel"), ("two", "%engine panel"), ("three", "%engine dashboard")):
            outcome = kernel.collect(kernel.send(cell, cell_id=cell_id, allow_stdin=True))
            assert outcome.status == "ok", outcome.text
    good(kernel, "rt = __import__('kani_nb').runtime()")
    count = "print(*map(len, (rt.shown, rt._watchers._all, rt._chat_watchers._all, rt.chat._watchers._all)))"
    assert good(kernel, count).text.split() == ["3", "2", "2", "1"]
    good(kernel, "%unload_ext kani_nb")
    assert good(kernel, count).text.split() == ["0", "0", "0", "0"]
