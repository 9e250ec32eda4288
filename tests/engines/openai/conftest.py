"""A stand-in server, and an environment without keys."""

import pytest

from kani_nb.engines.httpclient.client import BaseClient
from tests.engines.openai.stand_in import StandIn


@pytest.fixture
def server():
    with StandIn() as stand_in:
        yield stand_in


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    """Those of whoever runs the tests go nowhere."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "KANI_NB_API_KEY", "KANI_NB_API_BASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_pauses(monkeypatch):
    """Retries come at once."""
    monkeypatch.setattr(BaseClient, "BACKOFF_S", 0.0)


@pytest.fixture
def make(server):
    class EchoClient(BaseClient):
        SERVICE_BASE = server.root

    server.usual["/echo"] = lambda exchange: exchange.answer(
        200, {"method": exchange.asked.method, "path": exchange.asked.path, "body": exchange.asked.body}
    )
    made = []

    def make(base=server.root, **kwargs):
        EchoClient.SERVICE_BASE = base
        made.append(EchoClient(**kwargs))
        return made[-1]

    return make


@pytest.fixture
async def client(make):
    client = make()
    yield client
    await client.close()
