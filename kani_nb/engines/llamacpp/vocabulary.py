"""The vocabulary of a GGUF: text to token ids and back, without the weights.

A vocabulary of its own, loaded in a tenth of a second, so that prompts can be counted before the model is loaded, and
while it is closed. Safe from any thread.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import warnings
from pathlib import Path
from typing import Any

from kani_nb.engines.llamacpp.library import library, listening
from kani_nb.errors import GenerationError, ModelFilesError

_UNKNOWN, _CONTROL = 1, 8  # llama.h: llama_token_attr


class Vocabulary:
    """What a GGUF file's tokens are.

    Args:
        path: the file, or the first of its shards.

    Raises:
        ModelFilesError: llama.cpp cannot read it, with its reason.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._llama = llama = library()
        params = llama.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        with listening() as said:
            self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise unreadable(path, said.reason)
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.size: int = llama.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        """Free it; whoever uses it later is told so."""
        with self._lock:
            model, self._model, self._vocab = self._model, None, None
            if model:
                with listening():
                    self._llama.llama_model_free(model)

    def __del__(self) -> None:
        """Free it."""
        if getattr(self, "_model", None):
            self.close()

    @property
    def _pointer(self) -> Any:
        if not self._vocab:
            raise GenerationError("the model was closed meanwhile", fix="ask again")
        return self._vocab

    # -- text to ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool, add_special: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: what to encode.
            special: control tokens that are spelled out in it are those tokens; otherwise they are text.
            add_special: put the model's usual tokens around it (beginning of sequence).
        """
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 16
        with self._lock, listening():  # it remarks on a second beginning of sequence
            vocab = self._pointer
            while True:
                ids = (self._llama.llama_token * room)()
                count = self._llama.llama_tokenize(vocab, raw, len(raw), ids, room, add_special, special)
                if count >= 0:
                    return list(ids[:count])
                if -count <= room:
                    raise GenerationError("llama.cpp could not encode a text", why=f"it has {len(raw):,} bytes")
                room = -count

    @functools.cached_property
    def all_special_ids(self) -> list[int]:
        """The tokens that are no text: control tokens, and the unknown one."""
        with self._lock:
            vocab, attribute = self._pointer, self._llama.llama_vocab_get_attr
            return [token for token in range(self.size) if attribute(vocab, token) & (_CONTROL | _UNKNOWN)]

    @functools.cached_property
    def control_texts(self) -> re.Pattern[str] | None:
        """Matches every text that `encode(special=True)` would make a control token of, the longest first."""
        texts = {self.convert_ids_to_tokens(token) for token in self.all_special_ids}
        spelled = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spelled))) if spelled else None

    # -- ids to text -----------------------------------------------------------------------------------------------

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The text of a token; it may end within a character. Nothing for control tokens, unless they are `special`."""
        room = 64
        with self._lock:
            while True:
                buffer = ctypes.create_string_buffer(room)
                count = self._llama.llama_token_to_piece(self._pointer, token, buffer, room, 0, special)
                if count >= 0:
                    return buffer.raw[:count]
                room = -count

    def convert_ids_to_tokens(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        with self._lock:
            if not 0 <= token < self.size:
                return ""
            text: bytes = self._llama.llama_vocab_get_text(self._pointer, token) or b""
        return text.decode("utf-8", "replace")

    # -- single tokens ---------------------------------------------------------------------------------------------

    def is_end(self, token: int) -> bool:
        """Whether `token` ends an answer."""
        with self._lock:
            return bool(self._llama.llama_vocab_is_eog(self._pointer, token))

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """All tokens that end an answer."""
        with self._lock:
            vocab, ends = self._pointer, self._llama.llama_vocab_is_eog
            return [token for token in range(self.size) if ends(vocab, token)]

    @functools.cached_property
    def guided_tokens(self) -> Any:
        """The vocabulary as llguidance reads it; it must not be used after `close`."""
        from llguidance.llamacpp import lltokenizer_from_vocab

        with self._lock, listening(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses older names of llama.cpp's functions
            ends = self.end_ids
            return lltokenizer_from_vocab(self._pointer, eos_token=ends[0] if ends else None)

    @functools.cached_property
    def special_texts(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token` as templates ask for them; only those that there are."""
        found = {}
        for name in ("bos", "eos", "pad"):
            with self._lock:
                token = getattr(self._llama, f"llama_vocab_{name}")(self._pointer)
            if token >= 0:
                found[f"{name}_token"] = self.convert_ids_to_tokens(token)
        return found


def unreadable(path: Path, reason: str) -> ModelFilesError:
    """The error for a file that llama.cpp cannot load, in its words."""
    is_new = "architecture" in reason
    fix = "pip install --upgrade llama-cpp-python knows more; HuggingEngine (hf:FILE.gguf) may know it, too"
    return ModelFilesError(
        f"llama.cpp cannot load {path.name}",
        why=reason or "it does not say why",
        fix=fix if is_new else "download it again, or take another file of this model",
    )
