"""Which of transformers' automatic classes loads a model: the one that answers, whatever else the model can do."""

from __future__ import annotations

from typing import Any


def auto_class_of(config: Any) -> Any:
    """The automatic class for this configuration, or None where this transformers has no model that writes text.

    A causal language model before one that also takes images or sound, and an encoder-decoder one last. Imports
    transformers.
    """
    import transformers

    names = ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM"]
    if getattr(config, "is_encoder_decoder", False):
        names = names[3:]  # T5 has an image-to-text cousin, and Bart a causal half
    known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return next((each for each in known if type(config) in each._model_mapping), None)
