"""What can be done with loaded weights besides answering: keep them, give them away, look into them.

Each waits for the engine's slot, loads if need be, and blocks no event loop. How it is done stands in `saving` and
`probing`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kani_nb.engines.base import BaseEngine
from kani_nb.engines.worker import Slot, run_in_thread

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.arguments import LoadRequest
    from kani_nb.engines.huggingface.generation import LoadedModel
    from kani_nb.engines.huggingface.prepared import Prepared
    from kani_nb.engines.huggingface.weights import Weights

T = TypeVar("T")


class KeepsWeights(BaseEngine):
    """The part of `HuggingEngine` that uses the weights for something else than an answer."""

    slot: Slot
    _asked: LoadRequest
    _prepared: Prepared
    _loaded: LoadedModel | None
    _weights: Weights | None

    @abstractmethod
    def _in_use(self, stop: threading.Event, doing: str) -> AbstractContextManager[LoadedModel]:
        """While the model computes, in the thread that holds the slot; gives the model as it is now."""

    async def save(self, folder: str | Path) -> Path:
        """Write the model as it was loaded, with its tokenizer, into a new or empty folder; the folder.

        It loads again from there without any argument, and answers in the same way.

        Raises:
            ConfigError: the folder is not empty, or cannot be written.
            EngineError: what was loaded can no longer be had exactly; it says why.
        """
        from kani_nb.engines.huggingface import saving

        return await self._with_weights(
            "saving",
            lambda loaded: saving.save_model(loaded.model, loaded.tokenizer, Path(folder), **self._origin_of(loaded)),
        )

    async def push_to_hub(self, repo_id: str, *, private: bool = False, commit_message: str | None = None) -> str:
        """Put what `save` writes into a repository of the Hub, which is made if need be; its address.

        Cancelling returns at once; an upload that has begun goes on, and changes nothing there before it is whole.

        Raises:
            ConfigError, EngineError: as `save`.
            GatedModelError, ModelUnavailableError: the Hub refuses, or cannot be reached.
        """
        from kani_nb.engines.huggingface import saving

        token = self._asked.token
        ready = await self._with_weights(
            "saving",
            lambda loaded: saving.prepare_push(
                loaded.model, loaded.tokenizer, repo_id, token=token, **self._origin_of(loaded)
            ),
            discard=saving.ReadyPush.discard,
        )

        # The engine may answer meanwhile.
        return await run_in_thread(lambda _: ready.send(private, commit_message), name="kani-nb-push")

    def _origin_of(self, loaded: LoadedModel) -> dict[str, Any]:
        from kani_nb.engines.huggingface.loading import origin_of

        has_changed = self._weights is not None and self._weights.have_changed
        return {**origin_of(self._prepared.request(), loaded), "weights_changed": has_changed}

    async def log_probs(self, ids: Sequence[int]) -> Any:
        """What the model expects after each of `ids`: natural-log probabilities `(T, V) float32` on the CPU.

        Raises:
            PromptTooLongError, ConfigError, GenerationError, OutOfMemoryError: as their names say.
        """
        from kani_nb.engines.huggingface.probing import log_probs

        return await self._with_weights("reading a text", lambda loaded: log_probs(loaded, ids))

    async def _with_weights(
        self, doing: str, work: Callable[[LoadedModel], T], discard: Callable[[T], None] | None = None
    ) -> T:
        """What `work` makes of the loaded model, in a thread that holds the slot."""
        if self._loaded is None:
            await self.load()

        def run(cancelled: threading.Event) -> T:
            with self._in_use(cancelled, doing) as loaded, self._prepared.tokenizer_lock:
                return work(loaded)

        return await run_in_thread(run, name="kani-nb-work", slot=self.slot, discard=discard)
