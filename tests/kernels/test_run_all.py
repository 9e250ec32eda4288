"""Run All on the real model: the same conversation every time, with cell ids and without, in its own precision."""

import json

import pytest

from tests.kernels.driver import kernel

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(300)]

CELLS = [
    "Write a short story about a dragon.",
    "Who was the bravest in it?",
    "Describe the dragon's cave in detail.",
    "Summarise everything.",
]
OPTIONS = "--no-sample --max-new-tokens 24"


def run_all(running, ids, cells=CELLS):
    for number, prompt in enumerate(cells):
        cell_id = f"cell-{number}" if ids else None
        outcome = running.run(f"%%chat {OPTIONS}\n{prompt}", cell_id=cell_id, timeout=120)
        assert outcome.status == "ok", outcome.text
    return conversation(running)


def conversation(running):
    return json.loads(
        running.value("__import__('json').dumps([m.text for m in __import__('kani_nb').runtime().chat.history])")
    )


@pytest.mark.parametrize("version", ["installed", "colab"])
@pytest.mark.parametrize("ids", [True, False], ids=["with cell ids", "without"])
def test_running_all_cells_twice_gives_the_same_conversation(smollm2, own_home, version, ids):
    with kernel(version, env={"KANI_NB_HOME": str(own_home)}) as running:
        loaded = running.run("%load_ext kani_nb\n%config KaniNB.plot = 'never'\n%load_engine smollm2", timeout=120)
        assert loaded.status == "ok", loaded.text
        first = run_all(running, ids)
        assert len(first) == 2 * len(CELLS)
        assert run_all(running, ids) == first
        if not ids:
            return
        edited = "Who was the most cowardly in it?"
        outcome = running.run(f"%%chat {OPTIONS}\n{edited}", cell_id="cell-1", timeout=120)
        assert outcome.status == "ok", outcome.text
        forked = conversation(running)
        assert forked[:2] == first[:2]
        assert forked[2] == edited
        assert len(forked) == 4
        assert running.value("len(__import__('kani_nb').runtime().chat.conversation.branches())") == "3"
