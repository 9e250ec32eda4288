"""Stop in the chat pane while a cell of any kind blocks the kernel, over each way that a front end has."""

import time

import pytest

from tests.kernels.driver import VERSIONS
from tests.kernels.driver import kernel as start_kernel
from tests.notebook.in_kernels import good

pytestmark = pytest.mark.kernels

WIDGET = "application/vnd.jupyter.widget-view+json"
OPEN = "%load_ext kani_nb\n%load_engine echo:delay=0.02\nimport time, kani_nb; rt = kani_nb.runtime()\n%chat panel"
STOP = {"method": "custom", "content": {"kind": "stop"}}
#: The person's own cell: it knows nothing of us, and does not let go of the main thread.
BLOCK = "began = time.monotonic()\nwhile rt.chat.is_busy and time.monotonic() - began < 10:\n    time.sleep(0.01)"


@pytest.fixture(params=VERSIONS)
def kernel(request, own_home):
    with start_kernel(request.param, env={"KANI_NB_HOME": str(own_home), "OMP_NUM_THREADS": "1"}) as running:
        yield running


def pane(kernel):
    """The comm of a pane that answers at length."""
    outcome = kernel.collect(kernel.send(OPEN, allow_stdin=True))
    assert outcome.status == "ok", outcome.text
    comm_id = next(each["data"][WIDGET]["model_id"] for each in outcome.outputs if WIDGET in each.get("data", {}))
    message = {"method": "custom", "content": {"kind": "send", "id": "1", "text": "word " * 2000, "files": []}}
    session = kernel.client.session
    kernel.client.shell_channel.send(session.msg("comm_msg", {"comm_id": comm_id, "data": message}))
    ends_at = time.monotonic() + 20
    while kernel.value("rt.chat.is_busy") != "True":
        assert time.monotonic() < ends_at
    return comm_id


@pytest.mark.parametrize("way", ["shell", "control"])
def test_an_answer_of_the_pane_is_stopped_while_a_cell_of_the_persons_own_blocks(kernel, way):
    version = tuple(int(part) for part in kernel.value("__import__('ipykernel').__version__").split(".")[:2])
    if way == "shell" and version < (7, 0):
        pytest.skip(f"ipykernel {version[0]}.{version[1]} reads the shell channel on the thread that is blocked")
    comm_id = pane(kernel)
    cell = kernel.send(BLOCK)
    time.sleep(0.5)
    session, client = kernel.client.session, kernel.client
    if way == "shell":
        client.shell_channel.send(session.msg("comm_msg", {"comm_id": comm_id, "data": STOP}))
    else:
        client.control_channel.send(session.msg("kani_nb_comm_msg", {"comm_id": comm_id, "data": STOP}))
    outcome = kernel.collect(cell)
    assert outcome.status == "ok", "the person's own cell is not harmed"
    assert kernel.value("rt.chat.is_busy") == "False"
    assert float(kernel.value("time.monotonic() - began")) < 8
    assert kernel.value("[turn.interrupted for turn in rt.chat.turns]") == "[True]"
    good(kernel, "%unload_ext kani_nb")
    assert kernel.value("'kani_nb_comm_msg' in get_ipython().kernel.control_handlers") == "False"
