"""One server of each kind and one browser for the suite; kernels end with each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.browser.front_end import CHROMIUM, Chromium
from tests.browser.jupyter import PACKAGES, JupyterServer, Kind


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, JupyterServer]]:
    """Running servers by kind; each test takes its own through `server`."""
    running: dict[str, JupyterServer] = {}
    yield running
    for server in running.values():
        server.close()


@pytest.fixture(params=["lab", "notebook"])
def server(
    request: pytest.FixtureRequest, servers: dict[str, JupyterServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[JupyterServer]:
    """JupyterLab, then Notebook 7."""
    yield from _serve(request.param, servers, tmp_path_factory)


@pytest.fixture
def voila(servers: dict[str, JupyterServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """Voila, which runs a notebook from its top and shows its outputs alone."""
    yield from _serve("voila", servers, tmp_path_factory)


def _serve(kind: Kind, servers: dict[str, JupyterServer], folders: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    if find_spec(PACKAGES[kind]) is None:
        pytest.skip(f"{PACKAGES[kind]} is not installed: pip install 'kani-nb[browser]'")
    if kind not in servers:
        servers[kind] = JupyterServer(kind, folders.mktemp(kind)).__enter__()
    yield servers[kind]
    servers[kind].stop_kernels()


@pytest.fixture(scope="session")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """The suite's browser."""
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install 'kani-nb[browser]'")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium, or your system's package of it")
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Chromium) -> Iterator[Chromium]:
    """The browser, with nothing seen yet, and without this test's pages afterwards."""
    one_browser.forget()
    yield one_browser
    one_browser.close_pages()


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Where pictures for people go; not part of the repository."""
    folder = Path(__file__).parents[1] / "artifacts"
    folder.mkdir(exist_ok=True)
    return folder
