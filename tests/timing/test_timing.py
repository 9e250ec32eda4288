"""How long things take, measured on this machine: `python -m pytest -m timing -s`.

Each prints what it measured with the machine's load, and compares within one process where it compares.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time

import pytest

from kani_nb import BaseCompletion, ChatMessage, HuggingEngine, TextDelta
from tests.kernels.driver import kernel
from tests.timing.figures import p95, show

pytestmark = [pytest.mark.timing, pytest.mark.timeout(900)]

TURNS = [
    "Write a short story about a dragon.",
    "Now tell it from the village's point of view.",
    "Who was the bravest person in it?",
    "Describe the dragon's cave in detail.",
    "What did the villagers eat?",
    "Continue the story after the dragon left.",
    "Write a song about it.",
    "Explain the moral.",
    "What would a modern version look like?",
    "Summarise everything.",
]


async def ten_turns(folder, cache_gib):
    """Text, computed prompt tokens (counted on the model's forward) and TTFT of each of ten turns."""
    engine = HuggingEngine(str(folder), dtype="float32", cache_gib=cache_gib, threads=1)
    await engine.load()
    lengths, history, turns = [], [], []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for question in TURNS:
        history.append(ChatMessage.user(question))
        lengths.clear()
        asked, first, completion = time.perf_counter(), None, None
        async for event in engine.stream(history, max_new_tokens=64, do_sample=False):
            if isinstance(event, TextDelta) and first is None:
                first = time.perf_counter() - asked
            if isinstance(event, BaseCompletion):
                completion = event
        history.append(completion.message)
        turns.append((completion.message.text, sum(lengths) - (completion.completion_tokens - 1), first))
    await engine.close()
    return turns


async def test_ten_turns_with_reuse_and_without(smollm2):
    reused, fresh = await ten_turns(smollm2, None), await ten_turns(smollm2, 0)
    show(
        "ten turns of 64 tokens, float32, one thread",
        prompt_tokens_computed_with_reuse=[turn[1] for turn in reused],
        prompt_tokens_computed_without=[turn[1] for turn in fresh],
        ttft_ms_with_reuse=[round(turn[2] * 1e3) for turn in reused],
        ttft_ms_without=[round(turn[2] * 1e3) for turn in fresh],
    )
    assert [turn[0] for turn in reused] == [turn[0] for turn in fresh]
    assert reused[9][1] <= 1.5 * reused[1][1]
    assert reused[9][2] <= fresh[9][2] / 5


DECODE = """
import json, statistics, time, torch, kani_nb
rt = kani_nb.runtime()
model, shell = rt.engine.model, get_ipython()
prompt = "Write a long story about a dragon and a village."
ids = torch.tensor([rt.engine.prompt_ids([kani_nb.ChatMessage.user(prompt)])])
stamps = []
model.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))

def per_token(run):
    stamps.clear()
    run()
    decode = stamps[-(N - 1):]            # the forwards that computed one token each
    return (decode[-1] - decode[0]) / (len(decode) - 1)

def through_the_cell():
    shell.run_cell_magic("chat", f"--append --max-new-tokens {N} --min-new-tokens {N} --no-sample", prompt)
    rt.new_chat()

def bare():
    torch.set_num_threads(rt.engine.details()["threads"])
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=N, min_new_tokens=N)

N = 96
per_token(bare), per_token(through_the_cell)
pairs = [(per_token(bare), per_token(through_the_cell)) for _ in range(8)]
print("FIGURES" + json.dumps(pairs))
"""


def test_decoding_through_a_cell_against_bare_generate(smollm2):
    with kernel() as running:
        assert running.run("%load_ext kani_nb\n%config KaniNB.plot = 'never'").status == "ok"
        loaded = running.run("%load_engine smollm2")
        assert loaded.status == "ok", loaded.text
        outcome = running.run(DECODE, timeout=600)
        assert outcome.status == "ok", outcome.text
    pairs = json.loads(outcome.text.split("FIGURES")[1].splitlines()[0])
    bare, ours = zip(*pairs, strict=True)
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    show(
        "time per token, %%chat against bare generate, interleaved",
        ours_ms=[round(each * 1e3, 1) for each in ours],
        bare_ms=[round(each * 1e3, 1) for each in bare],
        median_ratio=round(ratio, 3),
    )
    assert ratio <= 1.03


async def measure_gaps(gaps):
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.002)
        gaps.append(time.perf_counter() - before)


async def test_the_loops_largest_gap_while_generating(smollm2):
    engine = HuggingEngine(str(smollm2), threads=1)
    await engine.load()
    worst = []
    for _ in range(5):
        gaps = []
        ticker = asyncio.create_task(measure_gaps(gaps))
        await engine.predict([ChatMessage.user("Tell me a story. " * 20)], max_new_tokens=48, do_sample=False)
        ticker.cancel()
        worst.append(max(gaps))
    await engine.close()
    show("largest gap of the event loop while generating", gaps_ms=[round(each * 1e3, 1) for each in worst])
    assert statistics.median(worst) < 0.05


@pytest.mark.parametrize("how", ["interrupt", "stop"])
def test_ending_an_answer(smollm2, how):
    times = []
    with kernel() as running:
        assert running.run("%load_ext kani_nb\n%load_engine smollm2").status == "ok"
        stop = "import threading, time, kani_nb\nstopped = []\n"
        stop += "def later(s):\n    time.sleep(s); stopped.append(time.time()); kani_nb.runtime().stop()\n"
        assert running.run(stop).status == "ok"
        for number in range(10):
            wait_s = 0.3 + 0.17 * number
            cell = "%%chat --append --max-new-tokens 400 --min-new-tokens 400\nTell me a very long story."
            if how == "stop":
                running.run(f"threading.Thread(target=later, args=({wait_s},)).start()")
            request = running.send(cell)
            if how == "interrupt":
                time.sleep(wait_s)
                asked = time.time()
                running.interrupt()
            outcome = running.collect(request)
            ended = time.time()
            if how == "stop":
                asked = float(running.value("stopped[-1]"))
            assert outcome.status == ("error" if how == "interrupt" else "ok"), outcome.text
            times.append(ended - asked)
    show(f"from {how} to the end of the cell", ms=[round(each * 1e3) for each in times], p95_ms=round(p95(times) * 1e3))
    assert p95(times) < 0.5


def test_importing_and_loading_the_extension():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell.instance();"
        "import time; began = time.process_time(); import kani_nb;"
        "shell.extension_manager.load_extension('kani_nb'); print(time.process_time() - began)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(7)
    ]
    show("CPU of import kani_nb and %load_ext", ms=[round(each * 1e3) for each in runs], p95_ms=round(p95(runs) * 1e3))
    assert p95(runs) < 0.15


SLIDERS = """
import json, time
from kani_nb.notebook.panels import EnginePanel
panel = EnginePanel("smollm2")
assert panel.wait()
times = {}
for name, values in {
    "max_context_size": [str(256 * step) for step in range(1, 33)],
    "max_memory": [f"cpu={step}GiB" for step in range(1, 33)],
    "scheme": ["nf4", "int8", "cpu-int8", "none"] * 8,
}.items():
    times[name] = []
    for value in values:
        began = time.perf_counter()
        panel.values = {**panel.values, name: value}   # what a message of the front end does
        times[name].append(time.perf_counter() - began)
        assert panel.wait()
print("FIGURES" + json.dumps(times))
"""


def test_moving_a_slider_of_the_engine_panel(smollm2):
    """In the kernel: the time that the message takes on the main thread; the plan follows from another."""
    with kernel() as running:
        outcome = running.run(SLIDERS, timeout=300)
    assert outcome.status == "ok", outcome.text
    times = json.loads(outcome.text.split("FIGURES")[1].splitlines()[0])
    for name, each in times.items():
        show(f"a change of {name} in the engine panel", p95_ms=round(p95(each) * 1e3, 1), runs=len(each))
    assert max(p95(each) for each in times.values()) < 0.02
