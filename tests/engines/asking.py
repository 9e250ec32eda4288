"""How the engine tests ask."""

from kani_nb import BaseCompletion, ChatMessage, HuggingEngine, TextDelta

GREEDY = {"do_sample": False, "max_new_tokens": 24}
QUESTIONS = ["What is the capital of France?", "How are you today?", "über den faulen Hund", "the quick brown fox"]


def engine_of(folder, **options):
    return HuggingEngine(str(folder), **({"dtype": "float32", "threads": 1} | options))


async def answer(engine, messages, **params):
    events = [event async for event in engine.stream(messages, **(GREEDY | params))]
    assert isinstance(events[-1], BaseCompletion)
    assert not any(isinstance(event, BaseCompletion) for event in events[:-1])
    assert "".join(event for event in events if isinstance(event, TextDelta)) == events[-1].message.text
    return events[-1]


async def converse(engine, questions=QUESTIONS, **params):
    history, completions = [], []
    for question in questions:
        history.append(ChatMessage.user(question))
        completions.append(await answer(engine, history, **params))
        history.append(completions[-1].message)
    return history, completions


def forward_lengths(engine):
    """Lengths of the pieces that the model really computes from now on, counted on its own forward."""
    lengths = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths
