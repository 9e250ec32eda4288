"""Images and sound through real processors: the same answers as transformers', states reused, bad media refused."""

import inspect
import struct
import zlib

import numpy as np
import pytest

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.engines.huggingface.media import read_audio, read_image
from kani_nb.errors import ConfigError, PromptError
from kani_nb.functions import ai_function
from kani_nb.messages import AudioPart, ImagePart, VideoPart
from tests.engines.asking import GREEDY, answer
from tests.engines.media_models import make_hearing_model, make_seeing_model, png, wav

PICTURE = ImagePart(png(), "image/png")
OTHER = ImagePart(png(1), "image/png")
TONE = AudioPart(wav(), "audio/wav")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return make_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    return make_hearing_model(tmp_path_factory.mktemp("hearing"))


def engine_of(folder, **options):
    return HuggingEngine(str(folder), dtype="float32", threads=1, **options)


def generated(folder, media, text):
    """What transformers' own generate says, given the processor's output."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    batch = processor(text=[text], return_tensors="pt", **media)
    made = model.generate(**batch, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
    ids = made[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True), batch["input_ids"].shape[1]


async def test_an_image_is_seen_as_transformers_sees_it(seeing):
    text = "<|im_start|>user\nWhat is <image>this?<|im_end|>\n<|im_start|>assistant\n"
    expected, tokens = generated(seeing, {"images": [read_image(PICTURE)]}, text)
    engine = engine_of(seeing)
    asked = [ChatMessage.user(("What is ", PICTURE, "this?"))]
    completion = await answer(engine, asked)
    assert completion.message.text == expected
    assert completion.prompt_tokens == tokens == engine.prompt_len(asked)
    other = await answer(engine, [ChatMessage.user(("What is ", OTHER, "this?"))])
    assert other.message.text != expected
    await engine.close()


async def test_later_turns_reuse_the_states_of_an_image_and_never_those_of_another(seeing):
    engine = engine_of(seeing)
    history = [ChatMessage.user(("What is ", PICTURE, "this?"))]
    history.append((await answer(engine, history)).message)
    history.append(ChatMessage.user("And what colour is it?"))
    again = await answer(engine, history)
    assert again.cached_tokens > 10
    swapped = [history[0].copy_with(content=("What is ", OTHER, "this?")), *history[1:]]
    other = await answer(engine, swapped)
    assert other.cached_tokens < 10
    more = await answer(engine, [*history, again.message, ChatMessage.user(("Compare: ", OTHER))])
    for messages, found in ((history, again), (swapped, other)):
        fresh = engine_of(seeing, cache_gib=0)
        assert (await answer(fresh, messages)).message.text == found.message.text
        await fresh.close()
    assert more.prompt_tokens > again.prompt_tokens
    await engine.close()


async def test_a_model_that_sees_answers_to_text_alone(seeing):
    engine = engine_of(seeing)
    completion = await answer(engine, [ChatMessage.user("Hello <image> you")])
    assert completion.completion_tokens > 0
    assert engine.tokenizer.convert_tokens_to_ids("<image>") not in engine.prompt_ids([ChatMessage.user("<image>")])
    await engine.close()


async def test_sound_is_heard_as_transformers_hears_it_at_whatever_rate_it_comes(hearing):
    text = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    expected, tokens = generated(hearing, {"audio": [read_audio(TONE, 16_000)], "sampling_rate": 16_000}, text)
    engine = engine_of(hearing)
    completion = await answer(engine, [ChatMessage.user((TONE, "What is it?"))])
    assert completion.message.text == expected
    assert completion.prompt_tokens == tokens
    faster = AudioPart(wav(44_100, channels=2), "audio/wav")
    assert (await answer(engine, [ChatMessage.user((faster, "What is it?"))])).prompt_tokens == tokens
    await engine.close()


def test_another_rate_is_converted():
    slow, fast = (read_audio(AudioPart(wav(rate), "audio/wav"), 16_000) for rate in (8_000, 48_000))
    same = read_audio(TONE, 16_000)
    assert len(slow) == len(fast) == len(same) == 8_000
    assert same.dtype == np.float32
    for other in (slow, fast):
        assert np.abs(other[200:-200] - same[200:-200]).max() < 0.02


@pytest.mark.parametrize("name", ["audio_sr", "audio_sample_rate", "mm_audio_sample_rate"])
async def test_the_documents_names_of_the_rate_are_taken(hearing, name):
    engine = engine_of(hearing, **{name: 16_000})
    assert (await answer(engine, [ChatMessage.user((TONE, "?"))])).completion_tokens
    await engine.close()
    with pytest.raises(ConfigError, match="audio_sample_rate is 0"):
        engine_of(hearing, **{name: 0})


async def test_the_documents_own_classes_and_end_of_sequence_are_taken(hearing):
    from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    engine = HuggingEngine(
        str(hearing),
        max_context_size=320,
        audio_sr=16000,
        model_cls=Qwen2AudioForConditionalGeneration,
        tokenizer_cls=Qwen2AudioProcessor,
        eos_token_id=[2],
        threads=1,
        dtype="float32",
    )
    plain = engine_of(hearing)
    asked = [ChatMessage.user((TONE, "What is it?"))]
    assert (await answer(engine, asked)).message == (await answer(plain, asked)).message
    assert type(engine.model) is Qwen2AudioForConditionalGeneration
    assert engine.max_context_size == 320
    await engine.close()
    await plain.close()


def huge_png():
    """A PNG of few bytes that says it has 40,000 x 40,000 pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        (ImagePart(b"not a picture", "image/png"), r"the image \(image/png, 13 bytes\) cannot be read"),
        (ImagePart(png()[:200], "image/png"), "cannot be read"),
        (ImagePart(b"", "image/png"), "cannot be read"),
        (ImagePart(huge_png(), "image/png"), "40,000 x 40,000 pixels|too large"),
        (TONE, "cannot read audio/wav: it reads text, image"),
        (VideoPart(b"x", "video/mp4"), "cannot read video/mp4"),
    ],
    ids=["no image", "truncated", "empty", "huge", "sound", "video"],
)
async def test_a_bad_medium_is_refused_and_the_engine_goes_on(seeing, part, complaint):
    engine = engine_of(seeing)
    with pytest.raises(PromptError, match=complaint):
        await answer(engine, [ChatMessage.user((part, "What?"))])
    assert (await answer(engine, [ChatMessage.user((PICTURE, "What?"))])).completion_tokens
    await engine.close()


@pytest.mark.parametrize("data", [b"nonsense", wav()[:30], b""])
async def test_bad_sound_is_refused(hearing, data):
    with pytest.raises(PromptError, match="the sound"):
        engine_of(hearing).prompt_len([ChatMessage.user((AudioPart(data, "audio/wav"), "?"))])


def test_beside_media_a_control_token_in_the_text_is_refused(seeing):
    with pytest.raises(PromptError, match="holds '<image>'"):
        engine_of(seeing).prompt_len([ChatMessage.user((PICTURE, "an <image> of <image>"))])


def test_a_model_of_text_says_that_it_reads_only_text(tiny_model):
    with pytest.raises(PromptError, match="this model reads only text, and the message holds image/png"):
        engine_of(tiny_model).prompt_len([ChatMessage.user((PICTURE, "?"))])


def test_a_model_with_positions_in_several_dimensions_sees_as_transformers_does():
    """Qwen2-VL puts an image into a plane of positions; plain ones would put it in a line, without any error."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from kani_nb.engines.huggingface import kv_layers
    from kani_nb.engines.huggingface.driving import CacheMode, find_driving, forward

    torch.manual_seed(0)
    text = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    marks = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 148, "vision_end_token_id": 149}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = [5, 6, 148, *[150] * 16, 149, 7, 8, 9]
    media = {"pixel_values": torch.randn(64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        media["mm_token_type_ids"] = torch.tensor([[int(each == 150) for each in ids]])
    driving = find_driving(model, "cpu")
    assert driving.mode is not CacheMode.REUSE
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **media}
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(ids) :].tolist()
    said: list[int] = []
    with torch.inference_mode():
        cache = kv_layers.new_cache(model.config)
        logits = forward(model, driving, cache, ids, 0, "cpu", media=media)
        while len(said) < 12:
            said.append(int(logits.argmax()))
            logits = forward(model, driving, cache, [said[-1]], len(ids) + len(said) - 1, "cpu")
    assert said == expected


async def test_tools_are_told_beside_an_image_too(seeing):
    @ai_function(read_only=True)
    def measure(width: int) -> str:
        """Measure the picture."""

    engine = engine_of(seeing)
    asked = [ChatMessage.user(("What is ", PICTURE, "this?"))]
    with_tool = engine.tokenizer.decode(engine.prompt_ids(asked, [measure]))
    assert "Measure the picture." in with_tool
    measure.desc = "Weigh the picture."
    assert "Weigh the picture." in engine.tokenizer.decode(engine.prompt_ids(asked, [measure]))


def test_a_pipeline_of_text_refuses_images(seeing):
    engine = HuggingEngine(str(seeing), prompt_pipeline=lambda messages, functions: "text")
    with pytest.raises(PromptError, match="a pipeline of text cannot hold images"):
        engine.prompt_len([ChatMessage.user((PICTURE, "?"))])
