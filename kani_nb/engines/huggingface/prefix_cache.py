"""Nothing is computed twice: KV states of earlier prompts, found again by their longest common prefix of token ids.

Each entry is one sequence of token ids with the states of it. A new prompt takes the entry that saves most. One that
only goes on is extended in place; one that leaves an entry in the middle (a retry, an edit, a branch, another
conversation with the same system prompt) copies the common part, so that both go on, or crops it when the byte budget
has no room for two.

States are reused only from where a chunk of a prompt began, or from within an answer. The rest of that chunk is
computed again in the same shape as before, so that a retry gives the same numbers bit for bit, also in bfloat16, where
another shape may round differently. At least one token is always left to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kani_nb.engines.huggingface import kv_layers
from kani_nb.engines.huggingface.driving import CacheMode

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.generation import LoadedModel

#: A shorter common prefix is cheaper to compute than to keep apart.
_LEAST_REUSED_TOKENS = 4
_GIB = 2**30


@dataclass(slots=True, eq=False)
class CacheEntry:
    """One sequence: its token ids, the states of a prefix of it, and where the chunks of prompts lie in it.

    Attributes:
        ids: tokens whose states the cache holds, in order.
        chunks: `(start, end)` of each piece of prompt that was computed in one forward pass.
        is_long: computed with the rotary factors of long sequences, which fit no short one.
    """

    cache: Any
    ids: list[int] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    is_long: bool = False

    def reusable(self, ids: Sequence[int]) -> int:
        """Tokens of `ids` that need not be computed again: 0 where this entry is of no use."""
        common = common_prefix(self.ids, ids)
        if common == len(self.ids) and common < len(ids):
            return common
        if not kv_layers.can_go_back(self.cache):
            return 0
        wanted = min(common, len(ids) - 1)
        for start, end in self.chunks:
            if start <= wanted < end:
                return start
        return wanted

    def go_back(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        kv_layers.crop(self.cache, length)
        del self.ids[length:]
        self._cut_chunks(length)

    def fork(self, length: int) -> CacheEntry:
        """A new entry with a copy of the first `length` tokens."""
        twin = CacheEntry(kv_layers.fork(self.cache, length), self.ids[:length], list(self.chunks), self.is_long)
        twin._cut_chunks(length)
        return twin

    def restart(self, cache: Any, *, is_long: bool) -> None:
        """Begin again with an empty cache."""
        self.cache, self.is_long = cache, is_long
        self.ids.clear()
        self.chunks.clear()

    def _cut_chunks(self, length: int) -> None:
        self.chunks = [(start, min(end, length)) for start, end in self.chunks if start < length]

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return kv_layers.nbytes(self.cache)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginnings."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:
        return shortest
    low, high = 0, shortest  # the sequences agree up to `low` and differ before `high`
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixCache:
    """The entries of one engine, least recently used first. Touched only by the thread that holds the engine's slot.

    Args:
        config: the model's, for new caches.
        budget_bytes: what all entries together may take; 0 keeps nothing.
        limit_tokens: the longest sequence there will be; buffers get no room beyond it.
    """

    def __init__(self, config: Any, budget_bytes: int, limit_tokens: int | None = None) -> None:
        self._config = config
        self._limit_tokens = limit_tokens
        self.budget_bytes = budget_bytes
        self._entries: list[CacheEntry] = []

    def __len__(self) -> int:
        """How many sequences are kept."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, the one in use included."""
        return sum(entry.nbytes for entry in list(self._entries))

    def empty(self, *, is_long: bool = False) -> CacheEntry:
        """An entry without states, which is not kept unless it is given back."""
        return CacheEntry(kv_layers.new_cache(self._config, self._limit_tokens), is_long=is_long)

    def take(self, ids: Sequence[int], growth_tokens: int, *, is_long: bool = False) -> CacheEntry:
        """An entry that holds states of a proper prefix of `ids` and nothing else, for the caller to go on with.

        Args:
            ids: the prompt's tokens.
            growth_tokens: how many the prompt and the answer will have together, at most; room is made for them.
            is_long: the prompt is computed with the rotary factors of long sequences.
        """
        best, length = None, 0
        for entry in reversed(self._entries):
            if entry.is_long is is_long and (saved := entry.reusable(ids)) > length:
                best, length = entry, saved
        if best is None or length < _LEAST_REUSED_TOKENS:
            taken = self.empty(is_long=is_long)
            self._make_room(growth_tokens, keep=None)
        elif length == len(best.ids):
            taken = best
            self._entries.remove(best)
            self._make_room(growth_tokens, keep=None)
        elif self._make_room(growth_tokens, keep=best):
            taken = best.fork(length)
            self._entries.remove(best)
            self._entries.append(best)
        else:
            taken = best
            self._entries.remove(best)
            taken.go_back(length)
        self._entries.append(taken)
        return taken

    def give_back(self, entry: CacheEntry) -> None:
        """Keep `entry` for later, if the budget allows it."""
        if self.budget_bytes <= 0 or not entry.ids:
            self.drop(entry)
            return
        while self.nbytes > self.budget_bytes and self._entries:
            self._entries.pop(0)

    def drop(self, entry: CacheEntry) -> None:
        """Forget `entry`: after an error its layers may disagree."""
        if entry in self._entries:
            self._entries.remove(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _make_room(self, growth_tokens: int, keep: CacheEntry | None) -> bool:
        """Drop the least recently used until a sequence of `growth_tokens` fits beside the rest; False if it cannot."""
        needed = growth_tokens * self._bytes_per_token()
        while sum(entry.nbytes for entry in self._entries) + needed > self.budget_bytes:
            victim = next((entry for entry in self._entries if entry is not keep), None)
            if victim is None:
                return False
            self._entries.remove(victim)
        return True

    def _bytes_per_token(self) -> int:
        return next((kv_layers.bytes_per_token(entry.cache) for entry in reversed(self._entries) if entry.ids), 0)


def cache_budget(loaded: LoadedModel, asked_gib: float | None) -> int:
    """Bytes of states to keep: as asked for, or one full context, at most a quarter of the device's free memory."""
    from kani_nb.hardware.arithmetic import kv_bytes
    from kani_nb.hardware.devices import free_bytes

    if asked_gib is not None:
        return int(asked_gib * _GIB)
    if loaded.driving.mode is not CacheMode.REUSE:
        return 0
    shape = loaded.placing.shape
    if shape is not None:
        whole = kv_bytes(shape, loaded.context_tokens, loaded.dtype)
    else:
        whole = kv_layers.full_context_bytes(loaded.model, loaded.context_tokens)
    return min(whole, free_bytes(loaded.device) // 4)
