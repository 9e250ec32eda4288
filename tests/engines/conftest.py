"""A loaded engine, and what the process holds without one."""

import pytest

from tests.engines.asking import engine_of
from tests.memory import held_once_warm


@pytest.fixture
async def engine(tiny_model):
    engine = engine_of(tiny_model)
    await engine.load()
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def baseline(wide_model):
    """What the process holds when it has loaded, asked and freed the wide model in every precision."""
    return held_once_warm(wide_model)
