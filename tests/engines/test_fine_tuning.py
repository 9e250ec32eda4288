"""Training a loaded model with peft: it learns, the engine answers with that, and no state outlives a change."""

import asyncio
import threading
from contextlib import aclosing

import pytest
import torch

from kani_nb import BaseCompletion, ChatMessage
from kani_nb.errors import EngineError
from tests.conftest import make_model
from tests.engines.asking import answer, engine_of

TEXTS = ["the quick brown fox jumps over the lazy dog", "über den faulen Hund. Ça va très bien, merci."]
QUESTION = ChatMessage.user("What is the capital of France? The capital of France is")
SHORT = {"max_new_tokens": 10}
_EXPECTED = ("torch.utils.checkpoint", ".*gradient_checkpointing.*:FutureWarning", "(Unm|M)erge lora module")
pytestmark = [pytest.mark.quant, *(pytest.mark.filterwarnings(f"ignore:{each}") for each in _EXPECTED)]


def lora(engine, *, dropout=0.0, checkpoints=False, name="default"):
    """The engine's model with an adapter on it, ready to be trained."""
    from peft import LoraConfig, get_peft_model

    model = prepared(engine, checkpoints=checkpoints)
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout), adapter_name=name)


def prepared(engine, *, checkpoints=False):
    """The engine's model, frozen, with what is not quantized in float32."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(engine.model, use_gradient_checkpointing=checkpoints)


def batch(engine):
    encoded = engine.tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask, "labels": labels}


def train(engine, tuned, *, steps=4, optimizer=torch.optim.AdamW, **options):
    """The loss of each step."""
    trained = optimizer([each for each in tuned.parameters() if each.requires_grad], lr=2e-2, **options)
    tuned.train()
    losses = []
    for _ in range(steps):
        loss = tuned(**batch(engine)).loss
        loss.backward()
        trained.step()
        trained.zero_grad()
        losses.append(loss.item())
    tuned.eval()
    return losses


def computed_afresh(engine, messages, tokens=10):
    """The greedy answer, each token from the whole sequence and without any cache."""
    ids = engine.prompt_ids(messages)
    length = len(ids)
    in_training = [each for each in engine.model.modules() if each.training]
    engine.model.eval()
    with torch.inference_mode():
        while len(ids) < length + tokens:
            ids.append(int(engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == engine.tokenizer.eos_token_id:
                break
    for each in in_training:
        each.training = True
    return engine.tokenizer.decode(ids[length:], skip_special_tokens=True)


class Conversation:
    """Asks the same engine again and again, and compares every answer with one computed afresh."""

    def __init__(self, engine):
        self.engine = engine
        self.history = []

    async def turn(self):
        """Tokens of the prompt that were taken from the cache."""
        self.history.append(QUESTION)
        expected = computed_afresh(self.engine, self.history)
        completion = await answer(self.engine, self.history, **SHORT)
        assert completion.message.text == expected
        self.history.append(completion.message)
        return completion.cached_tokens


#: Without the threshold, whose outliers depend on which tokens are computed together.
SCHEMES = {"int8": {"quantization": "int8", "llm_int8_threshold": 0.0}, "nf4": {"quantization": "nf4"}}


@pytest.fixture(params=SCHEMES)
async def quantized(request, tiny_model):
    engine = engine_of(tiny_model, **SCHEMES[request.param])
    await engine.load()
    yield engine
    await engine.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_quantized_engine_that_answered_before_learns_and_answers_with_what_it_learnt(tiny_model, scheme):
    engine = engine_of(tiny_model, **SCHEMES[scheme])
    before = (await answer(engine, [QUESTION], **SHORT)).message.text
    losses = train(engine, lora(engine, checkpoints=True), steps=6)
    assert losses[-1] < 0.8 * losses[0]
    after = (await answer(engine, [QUESTION], **SHORT)).message.text
    assert after == computed_afresh(engine, [QUESTION])
    assert after != before
    await engine.close()


async def test_an_answer_before_the_training_changes_nothing_of_it(tiny_model):
    """bitsandbytes computes no gradient through the 4-bit weights that an answer packed for the CPU."""
    losses = []
    for answers in (False, True):
        engine = engine_of(tiny_model, quantization="nf4")
        await engine.load()
        if answers:
            await answer(engine, [QUESTION], **SHORT)
        losses.append(train(engine, lora(engine)))
        await engine.close()
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


async def test_every_change_of_adapters_drops_the_states_and_only_a_change_does(quantized):
    conversation = Conversation(quantized)
    assert await conversation.turn() == 0
    assert await conversation.turn() > 0
    tuned = lora(quantized)
    assert await conversation.turn() == 0, "attached"
    train(quantized, tuned)
    assert await conversation.turn() == 0, "trained"
    assert await conversation.turn() > 0
    with tuned.disable_adapter():
        assert await conversation.turn() == 0, "switched off"
    assert await conversation.turn() == 0, "switched on"
    tuned.add_adapter("other", tuned.peft_config["default"])
    for parameter in (each for name, each in tuned.named_parameters() if ".other." in name):
        parameter.data.normal_(0, 0.3)  # not counted by torch
    tuned.set_adapter("other")
    assert await conversation.turn() == 0, "switched to another"
    for parameter in (each for name, each in tuned.named_parameters() if ".other." in name):
        parameter.data.normal_(0, 0.3)
    assert await conversation.turn() == 0, "changed by hand"
    tuned.set_adapter("default")
    assert await conversation.turn() == 0, "switched back"
    assert await conversation.turn() > 0
    merged = tuned.merge_and_unload()
    assert await conversation.turn() == 0, "merged"
    assert merged is quantized.model


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("torch.optim.AdamW", {"fused": True}), ("torch.optim.SGD", {}), ("bitsandbytes.optim.AdamW8bit", {})],
    ids=["fused", "plain", "8 bit"],
)
async def test_a_step_of_any_optimizer_is_noticed_also_of_those_that_torch_does_not_count(engine, optimizer, options):
    from importlib import import_module

    library, _, name = optimizer.rpartition(".")
    conversation = Conversation(engine)
    await conversation.turn()
    assert await conversation.turn() > 0
    parameters = list(engine.model.parameters())
    trained = getattr(import_module(library), name)(parameters, lr=0.05, **options)
    engine.model(**batch(engine)).loss.backward()
    assert await conversation.turn() == 0, "a step may have come"
    trained.step()  # without a forward before it, and its gradients stay
    assert await conversation.turn() == 0
    assert await conversation.turn() > 0
    trained.zero_grad()
    await conversation.turn()
    assert await conversation.turn() > 0


async def test_weights_that_are_replaced_or_written_in_place_are_noticed(engine):
    conversation = Conversation(engine)
    mlp, await_turns = engine.model.model.layers[1].mlp, []
    with torch.no_grad():
        for change in (
            lambda: mlp.down_proj.weight.mul_(1.5),
            lambda: setattr(mlp.down_proj, "weight", torch.nn.Parameter(mlp.down_proj.weight.flip(0))),
            lambda: setattr(mlp.up_proj.weight, "data", mlp.up_proj.weight.data.flip(0)),
            lambda: setattr(mlp, "act_fn", torch.nn.ReLU()),
        ):
            await conversation.turn()
            await_turns.append(await conversation.turn())
            change()
            assert await conversation.turn() == 0
    assert min(await_turns) > 0


async def test_a_model_left_in_training_mode_answers_without_dropout_and_stays_in_it(quantized):
    tuned = lora(quantized, dropout=0.5, checkpoints=True)
    train(quantized, tuned)
    expected = computed_afresh(quantized, [QUESTION])
    tuned.train()
    quantized.model.model.layers[0].mlp.eval()
    modes = [each.training for each in quantized.model.modules()]
    texts = {(await answer(quantized, [QUESTION], **SHORT)).message.text for _ in range(3)}
    assert texts == {expected}
    assert [each.training for each in quantized.model.modules()] == modes
    assert True in modes
    assert False in modes


async def test_an_answer_is_refused_while_another_thread_trains(quantized):
    tuned = lora(quantized)
    await answer(quantized, [QUESTION], **SHORT)
    in_the_middle, may_go_on = threading.Event(), threading.Event()
    failures = []

    def run():
        try:
            tuned.train()
            loss = tuned(**batch(quantized)).loss
            in_the_middle.set()
            assert may_go_on.wait(30)
            loss.backward()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="fine-tuning")
    thread.start()
    try:
        assert await asyncio.to_thread(in_the_middle.wait, 30)
        with pytest.raises(EngineError, match=r"trained by the thread 'fine-tuning'.*\n.*model\.eval\(\)"):
            await answer(quantized, [QUESTION], **SHORT)
    finally:
        may_go_on.set()
        await asyncio.to_thread(thread.join)
    assert not failures
    assert any(each.grad is not None and bool(each.grad.any()) for each in tuned.parameters())
    assert (await answer(quantized, [QUESTION], **SHORT)).message.text == computed_afresh(quantized, [QUESTION])


def test_an_answer_is_refused_while_the_main_thread_trains(tiny_model):
    engine = engine_of(tiny_model, quantization="nf4")
    asyncio.run(engine.load())
    tuned = lora(engine).train()
    errors = []

    def ask():
        try:
            asyncio.run(answer(engine, [QUESTION], **SHORT))
        except EngineError as error:
            errors.append(str(error))

    def ask_from_another_thread(*_):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(30)

    hook = engine.model.model.layers[0].register_forward_pre_hook(ask_from_another_thread)
    tuned(**batch(engine))
    hook.remove()
    assert ["trained by the thread 'MainThread'" in each for each in errors] == [True]
    ask()
    assert len(errors) == 1, "it is left in training mode, and nobody trains"
    asyncio.run(engine.close())


async def test_a_training_step_waits_for_the_answer_that_is_running(quantized):
    tuned = lora(quantized)
    order = []
    quantized.model.model.register_forward_pre_hook(lambda *_: order.append(threading.current_thread().name))
    step = threading.Thread(target=lambda: tuned(**batch(quantized)), name="step")
    last = None
    async with aclosing(quantized.stream([QUESTION], do_sample=False, max_new_tokens=30)) as events:
        async for event in events:
            if event == "" or not isinstance(event, str) or step.ident is not None:
                last = event
                continue
            step.start()  # the answer has begun
    await asyncio.to_thread(step.join)
    assert isinstance(last, BaseCompletion)
    assert order.count("step") == 1
    assert order[-1] == "step"


async def test_an_answer_whose_weights_change_under_it_fails_and_leaves_no_states(engine):
    conversation = Conversation(engine)
    await conversation.turn()
    calls = []

    def change(module, _arguments):
        calls.append(module)
        if len(calls) == 5:
            with torch.no_grad():
                engine.model.lm_head.weight.mul_(1.01)

    hook = engine.model.model.register_forward_pre_hook(change)
    with pytest.raises(EngineError, match=r"changed while it answered.*\n.*ask again"):
        await answer(engine, [*conversation.history, QUESTION], **SHORT)
    hook.remove()
    assert await conversation.turn() == 0


async def test_weights_that_a_library_arranges_anew_while_it_answers_fail_no_answer(engine):
    conversation = Conversation(engine)
    engine.model.register_buffer("calls", torch.zeros(1))

    def count(module, _):
        module.calls.add_(1)

    engine.model.register_forward_pre_hook(count)
    assert await conversation.turn() == 0
    assert await conversation.turn() == 0
    assert engine.model.calls > 1


async def test_merging_after_an_answer_keeps_the_model(tiny_model):
    """bitsandbytes dequantizes 4-bit weights that an answer packed as if they were not."""
    merged = []
    for answers in (False, True):
        engine = engine_of(tiny_model, quantization="nf4", dtype="bfloat16")
        await engine.load()
        tuned = lora(engine)
        train(engine, tuned)
        if answers:
            await answer(engine, [QUESTION], **SHORT)
        merged.append(tuned.merge_and_unload().model.layers[0].mlp.down_proj.weight.quant_state.absmax.clone())
        await engine.close()
    assert torch.allclose(*merged, rtol=0.05)


@pytest.mark.parametrize("scheme", [*SCHEMES, "none"])
async def test_saving_refuses_attached_adapters_and_keeps_merged_ones(tiny_model, tmp_path, scheme):
    from peft import PeftModel

    engine = engine_of(tiny_model, dtype="bfloat16", **SCHEMES.get(scheme, {}))
    await engine.load()
    tuned = lora(engine)
    train(engine, tuned)
    with pytest.raises(EngineError, match=r"adapters \(LoRA\) attached(.|\n)*merge_and_unload"):
        await engine.save(tmp_path / "whole")
    tuned.save_pretrained(tmp_path / "adapter")
    with_adapter = (await answer(engine, [QUESTION], **SHORT)).message.text
    tuned.merge_and_unload()
    await engine.save(tmp_path / "whole")
    merged = (await answer(engine, [QUESTION], **SHORT)).message.text
    await engine.close()
    fresh = engine_of(tiny_model, dtype="bfloat16", **SCHEMES.get(scheme, {}))
    await fresh.load()
    PeftModel.from_pretrained(prepared(fresh), tmp_path / "adapter")
    assert (await answer(fresh, [QUESTION], **SHORT)).message.text == with_adapter
    await fresh.close()
    whole = engine_of(tmp_path / "whole", dtype="auto")
    assert (await answer(whole, [QUESTION], **SHORT)).message.text == merged
    await whole.close()


async def test_what_the_engine_says_of_its_memory_includes_the_adapter(tmp_path):
    engine = engine_of(make_model(tmp_path), quantization="int8", dtype="bfloat16")
    await engine.load()
    before = engine.memory().weight_bytes
    tuned = lora(engine)
    await answer(engine, [QUESTION], **SHORT)
    adapter = sum(each.nbytes for each in tuned.parameters() if each.requires_grad)
    assert adapter > 0
    assert engine.memory().weight_bytes >= before + adapter
    assert engine.details()["dtype"] == "float32", "prepare_model_for_kbit_training casts what is not quantized"
    await engine.close()
