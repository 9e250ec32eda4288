"""LlamaCTransformersEngine: LLaMA 2 chat in a GGML file, and the worked example of `CTransformersEngine`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from kani_nb.config import EngineConfig
from kani_nb.engines.ctransformers.base import CTransformersEngine
from kani_nb.engines.huggingface.llama2 import check_turns
from kani_nb.engines.kinds import EngineKind
from kani_nb.engines.prompts import LLAMA2_PIPELINE
from kani_nb.errors import ConfigError
from kani_nb.messages import ChatMessage

_CONTROL = re.compile("</?s>")


class LlamaCTransformersEngine(CTransformersEngine):
    """LLaMA 2 chat.

    Args:
        model_id, model_file: see `CTransformersEngine`.
        max_context_size: tokens of prompt and answer together.
        strict: refuse conversations in which user and assistant do not take turns, instead of merging messages.
        kwargs: see `CTransformersEngine`.
    """

    kind = EngineKind(
        runs="old GGML files (gpt2, gptj, gpt-neox, starcoder, mpt, llama), in a process of their own",
        example="%load_engine ctransformers:FILE.bin",
        install="pip install 'kani-nb[ctransformers]'",
        can=(),
        tested="tiny files of seven kinds, written by the tests",
    )

    def __init__(
        self,
        model_id: str = "TheBloke/Llama-2-7B-Chat-GGML",
        model_file: str | None = "llama-2-7b-chat.ggmlv3.q4_K_M.bin",
        max_context_size: int = 4096,
        *args: Any,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_id, model_file, max_context_size, *args, **kwargs)
        self.strict = strict

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """From `%load_engine ctransformers:FILE.bin`, or `ctransformers:org/model:FILE.bin`.

        Raises:
            ConfigError: no file is named.
        """
        name = re.sub(r"^ctransformers:", "", config.model.strip(), flags=re.IGNORECASE).strip()
        if not name:
            raise ConfigError("no model was named", fix="%load_engine ctransformers:FILE.bin")
        model_id, _, model_file = (name, "", "") if Path(name).expanduser().exists() else name.partition(":")
        settings = {"threads": config.threads} if config.threads is not None else {}
        context = config.max_context_size or 4096
        return cls(model_id, model_file or None, context, settings, generation=config.generation)

    def build_prompt(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """`<s>[INST] ... [/INST] answer </s><s>[INST] ... [/INST]` as token ids.

        Raises:
            PromptError: with `strict`, the messages do not take turns.
        """
        if self.strict:
            check_turns(messages)
        spoken = "".join(message.text for message in messages)
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in spoken)
        marked = [
            message.copy_with(text=_CONTROL.sub(lambda found: f"<{mark}{found[0][1:]}", message.text))
            for message in messages
        ]
        # The package puts a beginning of sequence before every text that it encodes, and knows no token within one.
        ids: list[int] = []
        for piece in filter(None, str(LLAMA2_PIPELINE(marked, functions)).split("<s>")):
            said, end, _ = piece.partition("</s>")
            ids += self.tokenize(said.replace(mark, ""))
            if end:
                ids.append(int(self._facts["end_id"]))
        return ids

    def message_len(self, message: ChatMessage) -> int:
        """Tokens of one message with what the format puts around it, at most; `prompt_len` counts exactly."""
        return len(self.build_prompt([message])) + 3
