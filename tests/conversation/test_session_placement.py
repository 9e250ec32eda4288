"""Where an engine's weights are goes with the metrics of its answers, and is stored with the conversation."""

import pytest

from kani_nb.engines.base import EngineMemory, TextDelta
from kani_nb.metrics.recorder import GenerationMetrics
from tests.conversation.scripted import Scripted, done


class Held(Scripted):
    """Says what it is told to of its memory."""

    def __init__(self, memory):
        super().__init__(TextDelta("ok"), done("ok"))
        self._memory = memory

    def memory(self):
        return self._memory


@pytest.mark.parametrize(
    ("memory", "placement"),
    [
        (EngineMemory(1000, 5, "cpu"), {"cpu": 1.0}),
        (EngineMemory(1000, 5, "cpu", shares={"disk": 250, "cpu": 750}), {"cpu": 0.75, "disk": 0.25}),
        (EngineMemory(1000, 5, "cpu", shares={"cpu": 1000, "disk": 0}), {"cpu": 1.0}),
        (EngineMemory(0, 0, "cpu"), {}),
        (None, {}),
    ],
)
async def test_the_share_of_each_device_is_kept_with_the_answer(open_session, store, memory, placement):
    session = open_session(Held(memory))
    reply = await session.ask("hi")
    assert reply.metrics.placement == placement
    assert reply.metrics.spilled_bytes == 0
    stored = store.load(session.conversation.id)
    assert GenerationMetrics.from_dict(stored.path()[0].metrics) == reply.metrics
