"""A real InteractiveShell with the extension loaded, and a Runtime of the test's own behind it."""

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from tests.kernels.driver import VERSIONS
from tests.kernels.driver import kernel as start_kernel
from tests.notebook.in_kernels import good


@pytest.fixture(scope="session")
def bare_shell():
    config = Config()
    config.HistoryManager.enabled = False
    InteractiveShell.clear_instance()
    made = InteractiveShell.instance(config=config)
    yield made
    made.restore_sys_module_state()
    InteractiveShell.clear_instance()


class Cells:
    """Runs cells, and tells what they printed."""

    def __init__(self, shell, capsys):
        self.shell = shell
        self._capsys = capsys

    def run(self, code):
        self._capsys.readouterr()
        result = self.shell.run_cell(code, store_history=True)
        caught = self._capsys.readouterr()
        return result, caught.out + caught.err

    def good(self, code):
        result, printed = self.run(code)
        assert result.success, printed
        return printed

    def bad(self, code):
        """What a cell that must fail printed: without a traceback, and short."""
        result, printed = self.run(code)
        assert not result.success, printed
        assert "Traceback" not in printed
        assert len(printed.strip().splitlines()) <= 4
        return printed


@pytest.fixture
def cells(bare_shell, capsys, clean_runtime):
    bare_shell.run_line_magic("load_ext", "kani_nb")
    yield Cells(bare_shell, capsys)
    bare_shell.run_line_magic("unload_ext", "kani_nb")
    bare_shell.config.pop("KaniNB", None)
    bare_shell.reset(new_session=False)


@pytest.fixture(params=VERSIONS)
def kernel(request, own_home):
    """A real kernel of each supported version, with the extension loaded."""
    with start_kernel(request.param, env={"KANI_NB_HOME": str(own_home), "OMP_NUM_THREADS": "1"}) as running:
        good(running, "%load_ext kani_nb")
        good(running, "%config KaniNB.plot = 'never'")
        yield running
