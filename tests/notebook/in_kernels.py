"""How the tests talk to real kernels."""

import json
import time


def good(kernel, code, cell_id=None, **options):
    outcome = kernel.run(code, cell_id=cell_id, **options)
    while outcome.status == "aborted":  # for a moment after a cell failed, as if it had been queued behind that
        outcome = kernel.run(code, cell_id=cell_id, **options)
    assert outcome.status == "ok", outcome.text
    return outcome


def interrupt_when(kernel, words):
    """For `collect`: interrupts once, when an output holds `words`; remembers when."""
    asked = []

    def look(message):
        if words in json.dumps(message["content"]) and message["msg_type"] != "execute_input" and not asked:
            asked.append(time.monotonic())
            kernel.interrupt()

    return look, asked
