"""A Stop click reaches a kernel whose cell blocks, and nothing else of the kernel's messages changes."""

from __future__ import annotations

import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.strip import LiveStrip, can_show_strip

ROOT = Path(__file__).parents[2]

SETUP = """
import time
from kani_nb.notebook.stop_bus import StopBus

def new_comm():
    import ipykernel
    if ipykernel.version_info[:2] < (6, 18):
        from ipykernel.comm import Comm
        return Comm(target_name="kani-test")
    from comm import create_comm
    return create_comm(target_name="kani-test")

bus = StopBus(get_ipython())
early, late, order = [], [], []
comm = new_comm()
comm.on_msg(lambda message: late.append(message["content"]["data"]["n"]))
is_available = bus.register(comm.comm_id, lambda data: early.append(data["n"]))

def wait_for_click(limit_s):
    started = time.monotonic()
    while not early and time.monotonic() - started < limit_s:
        bus.pump()
        time.sleep(0.03)
    return time.monotonic() - started
print(is_available, comm.comm_id)
"""


class Kernel:
    """A real kernel of this environment, and what a front end would say to it."""

    def __init__(self) -> None:
        from jupyter_client import KernelManager

        self.manager = KernelManager()
        self.manager.start_kernel(cwd=str(ROOT), extra_arguments=["--IPKernelApp.log_level=50"])
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        self.manager.context.destroy(linger=0)

    def start(self, code: str) -> str:
        return self.client.execute(code)

    def output(self, message_id: str, timeout: float = 30) -> str:
        """What the cell printed, once it is done."""
        text = ""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if message["msg_type"] == "stream":
                text += message["content"]["text"]
            elif message["msg_type"] == "error":
                raise AssertionError("\n".join(message["content"]["traceback"]))
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return text.strip()
        raise AssertionError("the cell did not end")

    def run(self, code: str) -> str:
        return self.output(self.start(code))

    def send(self, comm_id: str, data: dict, subshell_id: str | None = None) -> None:
        message = self.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
        if subshell_id is not None:
            message["header"]["subshell_id"] = subshell_id
        self.client.shell_channel.send(message)

    def new_subshell(self) -> str:
        self.client.control_channel.send(self.client.session.msg("create_subshell_request", {}))
        return self.client.get_control_msg(timeout=10)["content"]["subshell_id"]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    started = Kernel()
    yield started
    started.close()


def prepare(kernel: Kernel) -> str:
    is_available, comm_id = kernel.run(SETUP).split()
    assert is_available == "True"
    return comm_id


def is_busy(kernel: Kernel, message_id: str) -> None:
    """Return when the kernel has begun on the request."""
    while True:
        message = kernel.client.get_iopub_msg(timeout=10)
        if message["parent_header"].get("msg_id") == message_id and message["msg_type"] == "execute_input":
            return


@pytest.mark.kernels
@pytest.mark.parametrize("with_subshell", [False, True], ids=["main shell", "subshell"])
def test_a_click_is_seen_while_a_cell_blocks(kernel, with_subshell):
    comm_id = prepare(kernel)
    supports = int(kernel.run("import ipykernel; print(ipykernel.version_info[0])")) >= 7
    if with_subshell and not supports:
        pytest.skip("this ipykernel has no subshells")
    subshell = kernel.new_subshell() if with_subshell else None
    cell = kernel.start("print(round(wait_for_click(8), 2))")
    is_busy(kernel, cell)
    time.sleep(0.3)
    kernel.send(comm_id, {"n": 1}, subshell)
    assert float(kernel.output(cell)) < 2
    # The message still took its own way, once.
    assert kernel.run("time.sleep(0.2); print(early, late)") == "[1] [1]"


@pytest.mark.kernels
def test_a_handler_that_fails_costs_the_kernel_no_message(kernel):
    comm_id = prepare(kernel)
    kernel.run("bus.register(comm.comm_id, lambda data: early.append(data['n']) or 1 / 0)")
    cell = kernel.start("wait_for_click(8)")
    is_busy(kernel, cell)
    kernel.send(comm_id, {"n": 1})
    kernel.output(cell)
    kernel.send(comm_id, {"n": 2})
    assert kernel.run("time.sleep(0.2); print(early, late)") == "[1, 2] [1, 2]"


@pytest.mark.kernels
def test_queued_cells_and_messages_keep_their_order(kernel):
    comm_id = prepare(kernel)
    kernel.run("comm.on_msg(lambda message: order.append(message['content']['data']['n']))")
    cell = kernel.start("order.append('cell'); wait_for_click(8)")
    is_busy(kernel, cell)
    expected = ["cell"]
    queued = []
    for number in range(8):
        queued.append(kernel.start(f"order.append('queued {number}')"))
        kernel.send(comm_id, {"n": number})
        expected += [f"queued {number}", number]
    kernel.output(queued[-1])
    assert kernel.run("time.sleep(0.2); print(early, order)") == f"{list(range(8))} {expected}"


@pytest.mark.kernels
def test_after_uninstalling_the_kernel_is_as_it_was(kernel):
    comm_id = prepare(kernel)
    restored = kernel.run(
        "bus.uninstall(); time.sleep(0.3); k = get_ipython().kernel\n"
        "stream = k.shell_stream\n"
        "print(not hasattr(k, 'shell_channel_thread_main') or stream._recv_callback == k.shell_channel_thread_main)"
    )
    assert restored == "True"
    kernel.send(comm_id, {"n": 1})
    assert kernel.run("time.sleep(0.2); print(early, late, bus.is_available)") == "[] [1] False"


@pytest.mark.kernels
def test_a_message_with_a_forged_signature_is_not_acted_on(kernel):
    comm_id = prepare(kernel)
    cell = kernel.start("print(wait_for_click(1) >= 1)")
    is_busy(kernel, cell)
    key, kernel.client.session.key = kernel.client.session.key, uuid.uuid4().hex.encode()
    kernel.send(comm_id, {"n": 1})
    kernel.client.session.key = key
    assert kernel.output(cell) == "True"
    assert kernel.run("print(early, late)") == "[] []"


STRIP = """
import time, threading
from IPython import get_ipython
from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.strip import LiveStrip, can_show_strip
bus = StopBus(get_ipython())
stop = threading.Event()
strip = LiveStrip(stop.set, bus, shown_after_s=0, linger_s=0)
print(can_show_strip(get_ipython()))
def answer(limit_s):
    strip.open()
    print("comm", strip._comm_id)
    started, tokens = time.monotonic(), 0
    while not stop.is_set() and time.monotonic() - started < limit_s:
        tokens += 1
        strip.update("answering", tokens, started)
        time.sleep(0.03)
    took = time.monotonic() - started
    strip.update("answering")
    strip.close()
    print(round(took, 2))
"""


@pytest.mark.kernels
def test_the_strips_stop_is_acknowledged_and_leaves_no_widget_behind(kernel):
    assert kernel.run(STRIP) == "True"
    cell = kernel.start("answer(8)")
    messages, comm_id, sent = [], "", False
    while True:
        message = kernel.client.get_iopub_msg(timeout=10)
        if message["parent_header"].get("msg_id") != cell:
            continue
        messages.append(message)
        kind, content = message["msg_type"], message["content"]
        if kind == "comm_open" and "_esm" in content["data"].get("state", {}):
            comm_id = content["comm_id"]
            assert len(content["data"]["state"]["_esm"]) < 5_000
        if kind == "display_data" and not sent:
            sent = True
            kernel.send(comm_id, {"method": "custom", "content": {"kind": "stop"}})
        if kind == "status" and content["execution_state"] == "idle":
            break
    printed = "".join(each["content"]["text"] for each in messages if each["msg_type"] == "stream")
    assert float(printed.split()[-1]) < 2
    customs = [
        each["content"]["data"]["content"]
        for each in messages
        if each["msg_type"] == "comm_msg" and each["content"]["data"].get("method") == "custom"
    ]
    assert customs == [{"kind": "ack"}]
    last = [each for each in messages if each["msg_type"] == "update_display_data"][-1]
    assert set(last["content"]["data"]) == {"text/html", "text/plain"}
    assert any(each["msg_type"] == "comm_close" and each["content"]["comm_id"] == comm_id for each in messages)


def test_without_a_kernel_there_is_no_bus_and_no_strip():
    bus = StopBus(SimpleNamespace())
    assert bus.register("x", lambda data: None) is False
    assert not bus.is_available
    bus.pump()
    bus.unregister("x")
    bus.uninstall()
    bus.uninstall()
    assert not can_show_strip(SimpleNamespace(display_pub=None))


def test_a_kernel_without_the_expected_parts_is_left_alone():
    kernel = SimpleNamespace(shell_stream=object(), shell_channel_thread=SimpleNamespace())
    assert StopBus(SimpleNamespace(kernel=kernel)).install() is False
    assert vars(kernel).keys() == {"shell_stream", "shell_channel_thread"}


def test_no_strip_where_nobody_can_press_it():
    headless = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=False))
    attended = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=True))
    assert (can_show_strip(headless), can_show_strip(attended)) == (False, True)


def test_importing_the_strip_imports_no_widgets():
    import subprocess

    code = (
        "import sys, kani_nb.notebook.strip, kani_nb.notebook.stream_view, kani_nb.notebook.load_view\n"
        "heavy = ('torch', 'transformers', 'plotly', 'ipywidgets', 'anywidget', 'nh3', 'markdown_it')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_a_strip_that_was_never_opened_can_be_updated_and_closed():
    strip = LiveStrip(lambda: None, StopBus(SimpleNamespace()))
    strip.update("answering")
    strip.close()
    assert not strip.is_stopping
