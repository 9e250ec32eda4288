"""What the documents of kani, transformers and LLaMA show about loading, done here with the same arguments.

Each row of BLOCKS is one Python block of the five documents this project grew from. GPU ids are read as the CPU, model
names as small models of the same architecture made here; nothing else is changed. What plain transformers 5 no longer
takes is among them. Shell blocks and those of other repositories are listed with the reason why they are not run.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from transformers import BitsAndBytesConfig, BloomConfig, BloomForCausalLM

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.engines.huggingface.placing import choose_placing
from kani_nb.errors import ConfigError
from tests.conftest import make_tokenizer, save_model

KANI_0X = "kani 0.x, HuggingFace engine"
KANI_1X = "kani 1.x, HuggingEngine"
KANI_ENGINES = "kani 0.x, engines"
TRANSFORMERS = "transformers 4.31, quantization"
LLAMA = "LLaMA inference"


class Block(NamedTuple):
    document: str
    what: str
    test: str  # the name of the test here, or why there is none


BLOCKS = [
    Block(KANI_0X, "model_load_kwargs of an engine in fp4", "test_an_engine_in_fp4_with_transformers_4_arguments"),
    Block(KANI_ENGINES, "the same block", "test_an_engine_in_fp4_with_transformers_4_arguments"),
    Block(KANI_1X, "HuggingEngine(model_id=...)", "test_a_model_by_its_id_alone"),
    Block(KANI_1X, "the same, with a chat template", "test_a_model_by_its_id_alone"),
    Block(KANI_1X, "Qwen3-Omni with its own classes", "tests/engines/test_multimodal.py"),
    Block(KANI_1X, "BitsAndBytesConfig in model_load_kwargs", "test_a_bitsandbytes_config_in_model_load_kwargs"),
    Block(TRANSFORMERS, "load_in_4bit, device_map auto", "test_four_and_eight_bits_by_their_old_flags"),
    Block(TRANSFORMERS, "load_in_8bit, device_map auto", "test_four_and_eight_bits_by_their_old_flags"),
    Block(TRANSFORMERS, "get_memory_footprint", "test_the_footprint_counts_what_transformers_leaves_out"),
    Block(TRANSFORMERS, "the compute dtype", "test_config_objects_of_the_advanced_uses"),
    Block(TRANSFORMERS, "nf4", "test_config_objects_of_the_advanced_uses"),
    Block(TRANSFORMERS, "nested quantization", "test_config_objects_of_the_advanced_uses"),
    Block(TRANSFORMERS, "push_to_hub of an 8-bit model", "tests/engines/test_push_to_hub.py"),
    Block(TRANSFORMERS, "a quantized model from the Hub", "tests/engines/test_push_to_hub.py"),
    Block(
        TRANSFORMERS, "llm_int8_enable_fp32_cpu_offload alone", "test_offloading_between_a_gpu_and_the_cpu_is_planned"
    ),
    Block(TRANSFORMERS, "the device map of bloom", "test_offloading_between_a_gpu_and_the_cpu_is_planned"),
    Block(TRANSFORMERS, "loading with both", "test_offloading_between_a_gpu_and_the_cpu_is_planned"),
    Block(TRANSFORMERS, "llm_int8_threshold=10", "test_the_outlier_threshold_given_as_a_whole_number"),
    Block(TRANSFORMERS, "llm_int8_skip_modules", "test_modules_that_are_not_converted"),
    Block(LLAMA, "load_in_8bit with torch_dtype float16", "test_llama_in_8_bits_and_in_float16"),
    Block(LLAMA, "model.half() where it is not quantized", "test_llama_in_8_bits_and_in_float16"),
    Block(
        LLAMA, "shell: GPTQ-for-LLaMa's llama.py", "not run: another repository; its files are converted (tests/gptq)"
    ),
    Block(LLAMA, "shell: server.py and benchmark.py", "not run: scripts of another repository"),
]


def test_every_block_has_its_test_or_its_reason():
    for block in BLOCKS:
        is_here = block.test in globals()
        assert is_here or block.test.startswith(("not run: ", "tests/")), block
    assert len({block.document for block in BLOCKS}) == 5


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    """A small random Bloom: the architecture of bloom-1b7, with the module names that the documents use."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        n_layer=2,
        n_head=4,
        seq_length=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float16",
    )
    return save_model(tmp_path_factory.mktemp("bloom"), BloomForCausalLM(config).half(), tokenizer)


async def loaded(folder, **arguments):
    """The engine those arguments describe, loaded, having answered once; and what it was given, unchanged."""
    before = copy.deepcopy(arguments)
    engine = HuggingEngine(str(folder), **({"max_context_size": 512} | arguments))
    await engine.load()
    completion = await engine.predict([ChatMessage.user("the quick brown fox")], max_new_tokens=8, do_sample=False)
    assert completion.completion_tokens
    assert set(before) == set(arguments)
    for name, value in before.items():
        assert str(arguments[name]) == str(value)
    return engine


def classes_of(engine):
    """How many linear layers there are of each class."""
    names = [type(module).__name__ for module in engine.model.modules()]
    return {name: names.count(name) for name in ("Linear", "Linear4bit", "Linear8bitLt") if name in names}


async def test_a_model_by_its_id_alone(tiny_model):
    engine = await loaded(tiny_model)
    assert classes_of(engine) == {"Linear": 15}


async def test_an_engine_in_fp4_with_transformers_4_arguments(tiny_model):
    engine = await loaded(
        tiny_model, use_auth_token=True, model_load_kwargs={"device_map": "auto", "load_in_4bit": True}
    )
    assert classes_of(engine) == {"Linear": 1, "Linear4bit": 14}
    assert engine.model.config.quantization_config.bnb_4bit_quant_type == "fp4"
    await engine.close()


async def test_a_bitsandbytes_config_in_model_load_kwargs(tiny_model):
    quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    engine = await loaded(tiny_model, model_load_kwargs={"quantization_config": quantization_config})
    assert classes_of(engine) == {"Linear": 1, "Linear4bit": 14}
    await engine.close()


@pytest.mark.parametrize(("flag", "kind"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
async def test_four_and_eight_bits_by_their_old_flags(bloom, flag, kind):
    engine = await loaded(bloom, device_map="auto", **{flag: True})
    assert classes_of(engine)[kind] == 8
    await engine.close()


async def test_the_footprint_counts_what_transformers_leaves_out(bloom):
    engine = await loaded(bloom, device_map="auto", load_in_8bit=True)
    scales = sum(4 * each.out_features for each in engine.model.modules() if type(each).__name__ == "Linear8bitLt")
    assert engine.memory().weight_bytes - engine.model.get_memory_footprint() == scales
    await engine.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}, ("fp4", False, torch.bfloat16)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ("nf4", False, torch.float32)),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, ("fp4", True, torch.float32)),
    ],
)
async def test_config_objects_of_the_advanced_uses(tiny_model, arguments, expected):
    engine = await loaded(tiny_model, quantization=BitsAndBytesConfig(**arguments))
    layer = engine.model.model.layers[0].mlp.up_proj
    assert (layer.weight.quant_type, layer.weight.compress_statistics, layer.compute_dtype) == expected
    await engine.close()


async def test_the_outlier_threshold_given_as_a_whole_number(bloom):
    with pytest.raises(TypeError, match="llm_int8_threshold must be a float"):
        BitsAndBytesConfig(llm_int8_threshold=10)  # the block itself, in transformers 5
    engine = await loaded(bloom, device_map="cpu", quantization={"llm_int8_threshold": 10})
    assert {each.state.threshold for each in engine.model.modules() if hasattr(each, "state")} == {10.0}
    await engine.close()


async def test_modules_that_are_not_converted(bloom):
    engine = await loaded(
        bloom, device_map="cpu", quantization=BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", "dense_h_to_4h"])
    )
    assert classes_of(engine) == {"Linear": 3, "Linear8bitLt": 6}
    await engine.close()


@pytest.mark.parametrize("use_8bit", [True, False])
async def test_llama_in_8_bits_and_in_float16(tiny_model, use_8bit):
    engine = await loaded(
        tiny_model, model_load_kwargs={"load_in_8bit": use_8bit, "torch_dtype": torch.float16, "device_map": "auto"}
    )
    assert engine.model.dtype == torch.float16
    assert not engine.model.training
    assert ("Linear8bitLt" in classes_of(engine)) is use_8bit
    await engine.close()


DEVICE_MAP = {
    "transformer.word_embeddings": 0,
    "transformer.word_embeddings_layernorm": 0,
    "lm_head": "cpu",
    "transformer.h": 0,
    "transformer.ln_f": 0,
}


def test_offloading_between_a_gpu_and_the_cpu_is_planned(bloom, monkeypatch):
    """On the meta device: what transformers would quantize under the document's map, and what our plan counts."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    import kani_nb.hardware.budgets as budgets
    from kani_nb.hardware.plans import Budget

    card = Budget(name="cuda:0", description="a card", total_bytes=2**30, usable_bytes=2**30, compute_capability=(8, 0))
    cpu = Budget(name="cpu", description="a CPU", total_bytes=2**30, usable_bytes=2**30)
    monkeypatch.setattr(budgets, "budgets_here", lambda *_, **__: (card, cpu))
    engine = HuggingEngine(
        str(bloom),
        device_map=DEVICE_MAP,
        quantization=BitsAndBytesConfig(llm_int8_enable_fp32_cpu_offload=True),
        allow_offload=True,
    )
    config = AutoConfig.from_pretrained(bloom)
    placing = choose_placing(engine._prepared.request(), config)
    assert placing.device == "cuda:0"
    assert placing.device_map["lm_head"] == "cpu"
    with init_empty_weights():
        model = BloomForCausalLM(config)
    model.tie_weights()
    quantizer = AutoHfQuantizer.from_config(placing.quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=placing.device_map)
    assert {name for name, each in model.named_modules() if type(each).__name__ == "Linear"} == {"lm_head"}
    assert sum(type(each).__name__ == "Linear8bitLt" for each in model.modules()) == 8
    # Bloom's head is its embedding, which lies on the card: what the map says of it moves nothing.
    on_card = next(share for share in placing.row.shares if share.device == "cuda:0")
    assert on_card.weight_bytes == placing.row.weight_bytes


def test_a_map_to_the_cpu_alone_with_fp32_offload_is_refused(bloom):
    """transformers leaves the whole model unquantized then, without a word."""
    from transformers import AutoConfig

    engine = HuggingEngine(
        str(bloom),
        device_map=dict.fromkeys(DEVICE_MAP, "cpu"),
        quantization={"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True},
    )
    with pytest.raises(ConfigError, match=r"(?s)int8 with llm_int8_enable_fp32_cpu_offload on cpu alone.*whole model"):
        choose_placing(engine._prepared.request(), AutoConfig.from_pretrained(bloom))
