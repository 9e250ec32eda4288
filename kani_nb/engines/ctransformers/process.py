"""The process that ctransformers runs in: `python -m kani_nb.engines.ctransformers.process`, JSON lines over pipes.

The package has not been maintained since 2023, and what it does not like ends its process with signal 11. So it lives
here, and takes nothing along but this process. Requests come on the standard input, one object in a line; answers go
to what was the standard output, while all that the C code prints goes to the standard error. The process ends when its
input does.

    {"load": {"path", "model_type", "lib", "threads", "config"}}  -> {"ready": {...}}
    {"encode": text}                                              -> {"ids": [...]}
    {"generate": [ids], "limit", "end_ids", "sampling", "seed"}   -> {"prefilled", "cached"} ... {"token", "text"} ...
                                                                     {"done": reason}
    {"stop": true}, while it generates                            -> {"done": "cancelled"}

Any of them may be answered with {"failed": text} instead.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib
import json
import os
import platform
import queue
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Tokens of a prompt that are computed at once; what the package itself takes, and the only number it is used with.
_CHUNK = 8
Say = Callable[..., None]


class _Model:
    """A model of ctransformers, asked through the functions of its library.

    Its own `tokenize` reserves room for fewer tokens than there may be, and the library then writes beyond it: that is
    what most of its crashes come from.
    """

    def __init__(
        self, path: str, model_type: str | None, lib: str | None, threads: int, config: dict[str, Any]
    ) -> None:
        library: Any = importlib.import_module("ctransformers.llm")
        if lib is None and not config.get("gpu_layers"):
            lib = _library_for(Path(library.__file__).parent / "lib")
        self._llm = library.LLM(path, model_type, config=library.Config(threads=threads, **config), lib=lib)
        self._threads = threads
        self.context_tokens = int(self._llm.context_length)
        self.kind = str(self._llm.model_type)
        self._held: list[int] = []

    def facts(self) -> dict[str, Any]:
        llm = self._llm
        return {
            "context_tokens": self.context_tokens,
            "model_type": self.kind,
            "vocabulary": int(llm.vocab_size),
            "end_id": int(llm.eos_token_id),
            "begin_id": int(llm.bos_token_id),
        }

    def encode(self, text: str) -> list[int]:
        raw = text.encode("utf-8", "replace")
        if not raw:
            return []
        room = 4 * len(raw) + 16
        ids = (ctypes.c_int * room)()
        count = self._llm.ctransformers_llm_tokenize(raw, self.kind == "llama", ids)
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        return bytes(self._llm.ctransformers_llm_detokenize(token) or b"")

    def is_end(self, token: int) -> bool:
        return bool(self._llm.is_eos_token(token))

    def go_back(self, ids: Sequence[int]) -> int:
        """Keep what is held of `ids`, one token at least being left to compute; how many that is."""
        most = min(len(ids) - 1, len(self._held))
        common = next((at for at in range(most) if ids[at] != self._held[at]), most)
        # In whole chunks, so that the same prompt is always computed in the same shapes.
        common -= common % _CHUNK if common < len(self._held) else 0
        del self._held[common:]
        return common

    def compute(self, tokens: Sequence[int]) -> None:
        if len(self._held) + len(tokens) > self.context_tokens:  # the library would write beyond its memory
            raise RuntimeError("the context is full")
        array = (ctypes.c_int * len(tokens))(*tokens)
        if not self._llm.ctransformers_llm_batch_eval(
            array, len(tokens), len(self._held), max(_CHUNK, len(tokens)), self._threads
        ):
            self._held.clear()
            raise RuntimeError("Failed to evaluate tokens.")
        self._held.extend(tokens)

    def choose(self, sampling: dict[str, Any], seed: int) -> int:
        last = self._held[-int(sampling.pop("last_n_tokens", 64)) :]
        array = (ctypes.c_int * len(last))(*last)
        return int(
            self._llm.ctransformers_llm_sample(
                array,
                len(last),
                min(int(sampling["top_k"]), int(self._llm.vocab_size)),  # beyond it, it would sort what is not there
                float(sampling["top_p"]),
                float(sampling["temperature"]),
                float(sampling["repetition_penalty"]),
                seed,
            )
        )


def _library_for(folder: Path) -> str | None:
    """The variant of the library that this CPU runs; None leaves it to the package, whose look takes a second."""
    flags = Path("/proc/cpuinfo")
    if (folder / "local").is_dir() or platform.machine() != "x86_64" or not flags.exists():
        return None
    known = set(re.findall(r"\w+", flags.read_text(encoding="utf-8", errors="replace").partition("flags")[2][:5000]))
    if "avx2" in known:
        return "avx2"
    return "avx" if {"avx", "f16c"} <= known else "basic"


def generate(model: _Model, request: dict[str, Any], say: Say, is_stopped: Callable[[], bool]) -> str:
    """Compute the prompt and say each token; why it ended."""
    ids: list[int] = request["generate"]
    cached = done = model.go_back(ids)
    say(prefilled=done, cached=cached)
    while done < len(ids):
        if is_stopped():
            return "cancelled"
        end = min(done - done % _CHUNK + _CHUNK, len(ids))
        model.compute(ids[done:end])
        done = end
        if done < len(ids):
            say(prefilled=done, cached=cached)
    for number in range(request["limit"]):
        if is_stopped():
            return "cancelled"
        # Its generator begins anew with each token.
        token = model.choose(dict(request["sampling"]), (request["seed"] + 7919 * number) % (2**31 - 1))
        is_end = token in request["end_ids"] if request["end_ids"] else model.is_end(token)
        say(token=token, text="" if is_end else base64.b64encode(model.piece(token)).decode())
        if is_end:
            return "stop"
        if number + 1 < request["limit"]:
            model.compute([token])
    return "length"


def serve(requests: queue.Queue[dict[str, Any]], stop: threading.Event, say: Say) -> None:
    """Answer requests, one after the other."""
    model: _Model | None = None
    while True:
        request = requests.get()
        try:
            if "load" in request:
                model = _Model(**request["load"])
                say(ready=model.facts())
            elif model is None:
                say(failed="no model is loaded")
            elif "encode" in request:
                say(ids=model.encode(request["encode"]))
            elif "generate" in request:
                stop.clear()
                say(done=generate(model, request, say, stop.is_set))
        except Exception as error:  # noqa: BLE001 - told to the other process
            say(failed=f"{type(error).__name__}: {error}", is_import=isinstance(error, ImportError))


def main() -> None:
    """Serve the process that started this one."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the C code prints is no answer
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    stop = threading.Event()

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def listen() -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if "stop" in request:
                stop.set()
            else:
                requests.put(request)
        os._exit(0)  # nobody is there any more

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        serve(requests, stop, say)


if __name__ == "__main__":
    main()
