"""Prompts with images and sound, made by the model's own processor.

A processor knows how many tokens an image takes and makes the tensors behind them. Where a prompt holds no media, the
chat template alone is used, as for every model.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kani_nb.engines.huggingface.arguments import LoadRequest
from kani_nb.engines.huggingface.library_errors import quiet, translated
from kani_nb.engines.huggingface.media import digest_of, read_audio, read_image, video_file
from kani_nb.engines.huggingface.model_inputs import ModelInputs, placeholder_ids
from kani_nb.engines.huggingface.prompting import template_records
from kani_nb.errors import ModelFilesError, PromptError
from kani_nb.functions import tool_schemas
from kani_nb.messages import AudioPart, ChatMessage, ImagePart, MediaPart, VideoPart

#: Prompts with media that are kept as they were encoded: each is counted first, and then computed.
_KEPT_PROMPTS = 2
_PARTS_OF = {"image": ImagePart, "audio": AudioPart, "video": VideoPart}


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How media are read.

    Attributes:
        audio_sample_rate: in Hz; None takes the processor's own.
        video_fps: frames per second that are taken from a video.
    """

    audio_sample_rate: int | None = None
    video_fps: float = 1.0


def media_of(config: Any) -> tuple[str, ...]:
    """The kinds of media that a model of this configuration reads: `image`, `audio`, `video`."""
    inner = getattr(config, "thinker_config", None) or config
    kinds = [
        kind
        for kind, names in (
            ("image", ("vision_config", "vision_tower", "image_token_id", "image_token_index")),
            ("audio", ("audio_config", "audio_token_id", "audio_token_index")),
            ("video", ("video_token_id", "video_token_index")),
        )
        if any(getattr(inner, name, None) is not None for name in names)
    ]
    return tuple(kinds)


def load_processor(request: LoadRequest) -> Any:
    """The model's processor.

    Raises:
        ModelFilesError: its files are missing or broken, or it needs a library that is not installed.
    """
    options = {"trust_remote_code": request.trust_remote_code, **request.tokenizer_kwargs}
    with translated(request.name, request.files), quiet():
        from transformers import AutoProcessor

        is_processor = request.tokenizer_cls is not None and "Processor" in request.tokenizer_cls.__name__
        found = request.tokenizer_cls if is_processor else AutoProcessor
        processor = found.from_pretrained(str(request.folder), **options)
    if not callable(processor) or getattr(processor, "tokenizer", None) is None:
        raise ModelFilesError(f"{request.name} has no processor for images or sound", fix="check its files")
    return processor


class MediaPrompts:
    """Encodes prompts that hold media. Several threads may ask at once.

    Args:
        request: whose processor is loaded when it is first needed.
        config: the model's configuration.
        options: how media are read.
        template_kwargs: further variables of the chat template.
    """

    def __init__(
        self, request: LoadRequest, config: Any, options: MediaOptions, template_kwargs: dict[str, Any]
    ) -> None:
        self._request = request
        self._config = config
        self._options = options
        self._template_kwargs = template_kwargs
        self._kinds = media_of(config)
        self._processor: Any = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, ModelInputs] = OrderedDict()

    def encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> ModelInputs:
        """The prompt with its media.

        Raises:
            PromptError: the model reads no media of this kind, one of them cannot be read, or the template refuses.
            ModelFilesError: the processor's files are broken.
            MissingDependencyError: a library that reads them is not installed.
        """
        key = (tuple(messages), json.dumps(tool_schemas(functions), sort_keys=True, default=str))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._encode(messages, functions)
                while len(self._kept) > _KEPT_PROMPTS:
                    self._kept.popitem(last=False)
            return self._kept[key]

    def _encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> ModelInputs:
        parts = [part for message in messages for part in message.parts if isinstance(part, MediaPart)]
        for part in parts:
            kind = next(name for name, of in _PARTS_OF.items() if isinstance(part, of))
            if kind not in self._kinds:
                reads = ", ".join(("text", *self._kinds))
                raise PromptError(f"{self._request.name} cannot read {part.mime}", why=f"it reads {reads}")
        if self._processor is None:
            self._processor = load_processor(self._request)
        self._refuse_control_tokens(messages)
        made: dict[str, list[Any]] = {}
        try:
            self._give(parts, made)
            text = self._rendered(messages, functions)
            batch = self._run(text, made)
        finally:
            for path in made.get("videos", ()):
                Path(path).unlink(missing_ok=True)
        placeholders = placeholder_ids(getattr(self._config, "thinker_config", None) or self._config, self._processor)
        return ModelInputs.of_batch(batch, placeholders, [digest_of(part) for part in parts])

    def _refuse_control_tokens(self, messages: Sequence[ChatMessage]) -> None:
        """The processor would take what is spelled like a control token for one."""
        for message in messages:
            for token in self._processor.tokenizer.all_special_tokens:
                if token and token in message.text:
                    raise PromptError(
                        f"a message of this prompt holds {token!r}",
                        why="beside images and sound this model would take it for a control token",
                        fix="leave it out, or ask without media",
                    )

    def forget(self) -> None:
        """Drop the prompts that are kept."""
        with self._lock:
            self._kept.clear()

    def _give(self, parts: Sequence[MediaPart], given: dict[str, list[Any]]) -> None:
        """Put the media into `given` as the processor takes them, by its arguments' names."""
        for part in parts:
            if isinstance(part, ImagePart):
                given.setdefault("images", []).append(read_image(part))
            elif isinstance(part, AudioPart):
                given.setdefault("audio", []).append(read_audio(part, self._sample_rate()))
            elif isinstance(part, VideoPart):
                given.setdefault("videos", []).append(video_file(part))

    def _sample_rate(self) -> int:
        extractor = getattr(self._processor, "feature_extractor", None)
        return self._options.audio_sample_rate or int(getattr(extractor, "sampling_rate", 16_000))

    def _rendered(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None) -> str:
        from jinja2 import TemplateError

        records = template_records(messages, with_media=True)
        options = {"tools": tool_schemas(functions) or None, **self._template_kwargs}
        try:
            text: str = self._processor.apply_chat_template(
                records, tokenize=False, add_generation_prompt=True, **options
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(
                f"the chat template of {self._request.name} refuses these messages",
                why=str(error) or type(error).__name__,
            ) from error
        return text

    def _run(self, text: str, given: dict[str, list[Any]]) -> Any:
        options: dict[str, Any] = {"text": [text], "return_tensors": "pt", **given}
        if "audio" in given:
            options["sampling_rate"] = self._sample_rate()
        if "videos" in given:
            options["fps"] = self._options.video_fps
        try:
            with quiet():
                return self._processor(**options)
        except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise PromptError(
                f"the processor of {self._request.name} cannot take these media", why=reason[0][:300]
            ) from error
