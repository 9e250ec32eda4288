"""How far one model's predictions are from a reference's: KL divergence, agreement on the likeliest token, perplexity.

The reference is usually the same model in a higher precision, which does not fit beside the other: so its probabilities
are kept on the disk, a piece of the text at a time, whole and in float32 (keeping only the likeliest tokens would give
a lower bound of the divergence). Nothing here runs a model.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kani_nb.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Most disk space that a reference may take: about 10,000 tokens of a vocabulary of 50,000.
REFERENCE_LIMIT_BYTES = 2 * 2**30
#: Rows that are compared at once, in float64.
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Quality:
    """What a model makes of a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of each token but the first of a piece. It depends on the
            tokenizer: only models that share one can be compared by it.
        kl_nats: mean over the positions of KL(reference || this), in nats; None without a reference.
        top1_agreement: share of the positions at which both have the same likeliest next token; None likewise.
        positions: predictions that were compared.
    """

    perplexity: float
    kl_nats: float | None
    top1_agreement: float | None
    positions: int


class QualityTotals:
    """Sums over the pieces of a text, from which `quality` follows."""

    def __init__(self) -> None:
        self._positions = 0
        self._agreeing = 0
        self._kl = 0.0
        self._log_likelihood = 0.0
        self._predicted = 0
        self._is_compared = True

    def add(self, ids: list[int], log_probs: torch.Tensor, reference: torch.Tensor | None = None) -> None:
        """Count one piece.

        Args:
            ids: the piece's tokens.
            log_probs: `(T, V)`: natural logarithms of the probabilities of the token after each of `ids`.
            reference: the same of the reference; None leaves the divergence out.
        """
        import torch

        self._positions += len(ids)
        if len(ids) > 1:
            following = torch.tensor(ids[1:]).unsqueeze(1)
            self._log_likelihood += float(log_probs[:-1].gather(1, following).double().sum())
            self._predicted += len(ids) - 1
        if reference is None:
            self._is_compared = False
            return
        self._agreeing += int((log_probs.argmax(dim=1) == reference.argmax(dim=1)).sum())
        for start in range(0, len(ids), _ROWS):
            known, other = reference[start : start + _ROWS].double(), log_probs[start : start + _ROWS].double()
            probabilities = known.exp()
            # What the reference excludes counts nothing, also where its logarithm is minus infinity.
            self._kl += float(torch.where(probabilities > 0, probabilities * (known - other), 0.0).sum())

    @property
    def quality(self) -> Quality:
        """What was counted.

        Raises:
            ValueError: nothing was.
        """
        if not self._predicted:
            raise ValueError("a text of at least two tokens is needed")
        has_reference = self._is_compared
        return Quality(
            perplexity=math.exp(min(700.0, -self._log_likelihood / self._predicted)),
            # Rounding may bring equal distributions a hair below zero.
            kl_nats=max(0.0, self._kl / self._positions) if has_reference else None,
            top1_agreement=self._agreeing / self._positions if has_reference else None,
            positions=self._positions,
        )


class Reference:
    """The reference's log-probabilities, on the disk until the context is left.

    Args:
        positions: tokens of the whole text, so that what does not fit is refused before much was computed.
        limit_bytes: most that may be written.
    """

    def __init__(self, positions: int, limit_bytes: int = REFERENCE_LIMIT_BYTES) -> None:
        self._total = positions
        self._limit_bytes = limit_bytes
        self._folder: Path | None = None
        self._count = 0

    def __enter__(self) -> Self:
        """Make a temporary folder."""
        self._folder = Path(tempfile.mkdtemp(prefix="kani-nb-reference-"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Delete it."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __len__(self) -> int:
        """Pieces that are kept."""
        return self._count

    def add(self, log_probs: torch.Tensor) -> None:
        """Keep the next piece's `(T, V)` as float32.

        Raises:
            ConfigError: the whole text would take more than may be written, or than the disk has free.
        """
        import torch

        assert self._folder is not None
        needed = self._total * log_probs.shape[1] * 4
        free = shutil.disk_usage(self._folder).free
        if not self._count and needed > min(self._limit_bytes, free):
            most = min(self._limit_bytes, free) // (log_probs.shape[1] * 4)
            why = f"the reference's probabilities would take {needed / 2**30:.1f} GiB of disk"
            where = (
                f", and {free / 2**30:.1f} GiB are free in {self._folder.parent}" if free < self._limit_bytes else ""
            )
            raise ConfigError(
                f"the text has {self._total:,} tokens", why=why + where, fix=f"a text of at most {most:,} tokens"
            )
        torch.save(log_probs.float().contiguous(), self._folder / f"{self._count}.pt")
        self._count += 1

    def clear(self) -> None:
        """Forget every piece, to begin again with another reference."""
        assert self._folder is not None
        for path in self._folder.iterdir():
            path.unlink()
        self._count = 0

    def read(self, index: int) -> Any:
        """The piece of that number, from 0, `(T, V) float32`.

        Raises:
            IndexError: it was not kept.
        """
        import torch

        if not 0 <= index < self._count:
            raise IndexError(f"piece {index} of {self._count}")
        assert self._folder is not None
        return torch.load(self._folder / f"{index}.pt", weights_only=True)
