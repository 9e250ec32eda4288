"""Loading is shown in stages and ends as one line."""

from __future__ import annotations

import threading
from itertools import pairwise

from kani_nb.engines.base import LoadProgress
from kani_nb.notebook.load_view import LoadView
from kani_nb.notebook.surface import SurfaceKind


def test_stages_pass_and_the_last_frame_is_one_line(screen, clock):
    view = LoadView("smollm2", display=screen, clock=clock)
    view.progress(LoadProgress("config"))
    view.pump()
    view.progress(LoadProgress("weights", "12 of 100 MB", 0.12))
    clock.now += 1
    view.pump()
    assert "config: done" in screen.last["text/plain"]
    assert "weights 12% 12 of 100 MB" in screen.last["text/plain"]
    assert '<progress max="1" value="0.120">' in screen.last["text/html"]
    view.finish(model="SmolLM2-135M", origin="wheel <x>", dtype="bfloat16", held="270 MiB on cpu")
    assert screen.last["text/plain"] == "SmolLM2-135M · wheel <x> · bfloat16 · 270 MiB on cpu · loaded in 1.00 s"
    assert "wheel &lt;x&gt;" in screen.last["text/html"]
    assert screen.opened == 1


def test_frames_come_at_most_five_times_a_second(screen, clock):
    view = LoadView("m", display=screen, clock=clock)
    for step in range(300):
        view.progress(LoadProgress("weights", f"{step}", step / 300))
        clock.now += 0.01
        view.pump()
    times = [at for at, _, _ in screen.frames]
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.199
    assert len(times) >= 14


def test_a_stage_that_says_nothing_new_still_counts_the_seconds(screen, clock):
    view = LoadView("m", display=screen, clock=clock)
    view.progress(LoadProgress("weights"))
    for _ in range(32):
        view.pump()
        clock.now += 0.1
    assert len(screen.frames) == 4
    assert screen.last["text/plain"].startswith("loading m, 3 s")


def test_a_failure_is_one_line_too(screen, clock):
    view = LoadView("smollm3", display=screen, clock=clock)
    view.finish(has_failed=True, note="smollm2 still answers")
    assert screen.last["text/plain"] == "smollm3 was not loaded after 0.00 s; smollm2 still answers"
    assert screen.frames[-1][2]["kani_nb"]["state"] == "error"
    view.finish(model="late")
    assert len(screen.frames) == 1


def test_a_password_in_an_address_is_not_shown(screen, clock):
    view = LoadView("vllm:m@http://me:s3cret@h:1/v1?api_key=k3y", display=screen, clock=clock)
    view.progress(LoadProgress("asking"))
    view.pump()
    view.finish(has_failed=True)
    assert not any(secret in repr(frame) for frame in screen.frames for secret in ("s3cret", "k3y"))
    assert "vllm:m@http://h:1/v1" in screen.last["text/plain"]


def test_progress_may_come_from_any_thread(screen, clock):
    view = LoadView("m", display=screen, clock=clock)
    threads = [
        threading.Thread(target=lambda n=n: [view.progress(LoadProgress(f"s{n}", str(i))) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        clock.now += 0.01
        view.pump()
    view.finish()


def test_a_terminal_gets_a_line_per_stage(capsys, clock):
    view = LoadView("m", clock=clock, kind=SurfaceKind.TERMINAL)
    view.progress(LoadProgress("config"))
    view.pump()
    view.pump()
    view.progress(LoadProgress("weights", "1 of 2"))
    view.finish(note="loaded already")
    assert capsys.readouterr().out == "config\nweights 1 of 2\nm · loaded already\n"
