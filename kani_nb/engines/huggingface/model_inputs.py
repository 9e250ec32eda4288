"""A prompt as a model takes it: token ids, and for images and sound the tensors that stand behind some of them.

States of earlier prompts are found by `keys`. They are the ids, but where a medium stands: all images look alike in
ids, so there the medium's own hash is the key, and another image is another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: What forward gets from elsewhere.
_NOT_MEDIA = ("input_ids", "attention_mask", "position_ids", "labels")


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One prompt.

    Attributes:
        ids: its tokens.
        keys: what its states are found by, one for each token.
        media: further arguments of forward, by name; empty where there are no media.
        media_end: how many tokens must be computed with `media`: those up to the last that a medium stands behind.
    """

    ids: list[int]
    keys: list[int]
    media: Mapping[str, Any] = field(default_factory=dict)
    media_end: int = 0

    @classmethod
    def of_text(cls, ids: list[int]) -> ModelInputs:
        """A prompt of text alone."""
        return cls(ids, ids)

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any], placeholders: Sequence[int], digests: Sequence[int]) -> ModelInputs:
        """What a processor made of one prompt.

        Args:
            batch: with `input_ids` `(1, T) int64`.
            placeholders: ids of the tokens that media stand behind.
            digests: a number for each medium, in order; equal for equal media.
        """
        ids = [int(token) for token in batch["input_ids"].flatten().tolist()]
        media = {name: value for name, value in batch.items() if name not in _NOT_MEDIA}
        places = [at for at, token in enumerate(ids) if token in set(placeholders)]
        # A run of placeholders is a medium; where a processor splits them otherwise, each stands for all.
        starts = [at for at in places if at - 1 not in places]
        keys = list(ids)
        run = -1
        everything = -1 - (hash(tuple(digests)) & (2**60 - 1))
        for at in places:
            run += at in starts
            keys[at] = -1 - digests[run] if len(starts) == len(digests) else everything
        return cls(ids, keys, media, places[-1] + 1 if places else len(ids))


def placeholder_ids(config: Any, processor: Any) -> tuple[int, ...]:
    """Ids of the tokens that images, sound and video stand behind, as the model's configuration names them."""
    found = []
    for owner in (config, processor):
        for medium in ("image", "audio", "video"):
            for name in (f"{medium}_token_id", f"{medium}_token_index"):
                value = getattr(owner, name, None)
                if isinstance(value, int):
                    found.append(value)
    return tuple(dict.fromkeys(found))
