"""What holds while a loaded model computes, whatever that is: its threads, its weights, and failures in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kani_nb._frames import release_frames
from kani_nb.engines.huggingface import library_errors
from kani_nb.engines.huggingface.generation import LoadedModel
from kani_nb.engines.huggingface.prefix_cache import PrefixCache
from kani_nb.engines.huggingface.weights import Weights
from kani_nb.errors import GenerationError, KaniNbError

#: What helps when an answer runs out of memory.
_LESS = "ask for less (--max-new-tokens, or start afresh with %chat new); the engine still works"


@contextmanager
def in_use(loaded: LoadedModel, cache: PrefixCache, weights: Weights, name: str, doing: str) -> Iterator[LoadedModel]:
    """For the thread that holds the engine's slot: the model as it is now, its states dropped if its weights changed.

    Raises:
        OutOfMemoryError: the memory ran out; the states have been dropped.
        EngineError: something trains the model meanwhile.
        GenerationError: what a library raised, as its cause.
    """
    try:
        if loaded.threads is not None:
            import torch

            torch.set_num_threads(loaded.threads)  # a thread's own setting
        with weights.in_use() as have_changed:
            if have_changed:
                cache.clear()  # states of other weights
                loaded = loaded.counted_again()
            yield loaded
    except KaniNbError:
        raise
    except Exception as error:
        release_frames(error)
        if library_errors.is_out_of_memory(error):
            cache.clear()
            raise library_errors.out_of_memory(f"{name} was {doing}", _LESS) from None
        raise GenerationError(f"{name} failed while {doing}", why=library_errors.short(error)) from error
