"""Encoder-decoder models: the same answers as transformers' generate, without states for later prompts."""

import pytest

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.testing import EngineContract
from tests.conftest import make_tokenizer, save_model
from tests.engines.asking import GREEDY, answer


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = make_tokenizer(None)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return save_model(folder, model, tokenizer)


def engine_of(folder):
    return HuggingEngine(str(folder), max_context_size=512, dtype="float32", threads=1)


async def test_it_says_what_generate_says_in_every_turn(t5):
    import torch

    engine = engine_of(t5)
    history = []
    for text in ("translate: the quick brown fox", "and the lazy dog", "What is the capital of France?"):
        history.append(ChatMessage.user(text))
        completion = await answer(engine, history)
        ids = torch.tensor([engine.prompt_ids(history)])
        made = engine.model.generate(ids, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)[0, 1:]
        assert completion.message.text == engine.tokenizer.decode(made, skip_special_tokens=True)
        assert len(completion.message.text) > 3
        assert completion.cached_tokens == 0
        history.append(completion.message)
    assert engine.memory().kv_bytes == 0
    await engine.close()


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
async def test_what_forbids_repeating_looks_at_the_answer_alone(t5, penalty):
    import torch

    engine = engine_of(t5)
    asked = [ChatMessage.user("the quick brown fox jumps over the lazy dog")]
    completion = await answer(engine, asked, **penalty)
    ids = torch.tensor([engine.prompt_ids(asked)])
    options = {"max_new_tokens": GREEDY["max_new_tokens"], "do_sample": False, **penalty}
    made = engine.model.generate(ids, **options)[0, 1:]
    assert completion.message.text == engine.tokenizer.decode(made, skip_special_tokens=True)
    await engine.close()


async def test_the_first_token_may_be_the_models_own(t5):
    engine = engine_of(t5)
    await engine.load()
    forced = engine.tokenizer.encode("k")[0]
    engine.model.generation_config.forced_bos_token_id = forced
    assert (await answer(engine, [ChatMessage.user("hello")])).message.text.startswith("k")
    await engine.close()


def test_a_prompt_without_a_template_is_the_texts(t5):
    engine = engine_of(t5)
    messages = [ChatMessage.system("translate:"), ChatMessage.user("the fox")]
    assert engine.tokenizer.decode(engine.prompt_ids(messages)) == "translate:\nthe fox"


@pytest.mark.slow
class TestEncoderDecoder(EngineContract):
    @pytest.fixture(autouse=True)
    def folder(self, t5):
        self.t5 = t5

    def make_engine(self):
        return engine_of(self.t5)
