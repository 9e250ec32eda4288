"""What the schemes are measured against: which precision, on which pieces of which text.

Decides and puts into words; the models are loaded and read by `kani_nb.compare.measuring`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kani_nb.compare.cases import Case
from kani_nb.quantization import Quantization

#: Tokens of a text that are read at once. It bounds the memory for the probabilities: about twice this times the
#: vocabulary times 4 bytes, 0.5 GB for a vocabulary of 262,144.
PIECE_TOKENS = 256
#: llama.cpp's names of types of few bits, as an origin mentions them.
_GGUF_TYPE = re.compile(r"\bI?Q[2-6]_\w+", re.IGNORECASE)


def reference_cases(cases: Sequence[Case]) -> list[Case]:
    """What to measure the others against, the highest precision first."""
    from kani_nb.hardware.schemes import find_scheme

    config = replace(cases[0].config, quantization=Quantization())
    dtypes = dict.fromkeys(("float32", config.dtype, "auto"))
    plain = [Case(f"none + {dtype}", replace(config, dtype=dtype)) for dtype in dtypes]

    def bits(case: Case) -> float:
        settings = case.config.quantization
        return find_scheme(settings.scheme).bits_per_weight(settings)

    return [*plain, *sorted((case for case in cases if not case.config.quantization.is_none), key=bits, reverse=True)]


def text_pieces(engine: Any, passages: Sequence[str]) -> list[list[int]]:
    """The passages as tokens, in pieces that are short enough to be read at once.

    Each begins as the model's texts do: many models make nothing of a text without their first token.
    """
    tokenizer = engine.tokenizer
    bos = getattr(tokenizer, "bos_token_id", None)
    first = [int(bos)] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []
    most = max(2, min(PIECE_TOKENS, engine.max_context_size)) - len(first)
    pieces = []
    for passage in passages:
        ids = [int(token) for token in tokenizer(passage, add_special_tokens=False)["input_ids"]]
        pieces += [first + ids[start : start + most] for start in range(0, len(ids), most)]
    return pieces


def reference_name(case: Case, details: dict[str, Any]) -> str:
    """What the reference is, as the engine itself says it: a checkpoint may have been quantized before."""
    held = str(details.get("quantization", "none"))
    if not case.config.quantization.is_none or held != "none":
        return held if held != "none" else case.label
    return f"{details.get('dtype') or case.config.dtype} weights"


def provenance(origin: str) -> tuple[str, ...]:
    """A warning where the weights themselves were 4-bit codes once: the schemes then do not start from the same."""
    found = _GGUF_TYPE.search(origin)
    if found is None:
        return ()
    grid = f"These weights were made from {found[0]} codes"
    return (
        f"{grid}: a scheme on the same grid finds them again and looks better here than it is, one on another worse.",
    )
