"""Puts words into a real model's mouth: its forward pass runs, and a script's next token is likeliest."""

from __future__ import annotations

from typing import Any

START = "<|im_start|>assistant\n"


def speak(engine: Any, *answers: str) -> None:
    """From now on the loaded `engine` says `answers`: the n-th where the prompt holds n openings of the model's turns.

    Args:
        engine: a loaded HuggingEngine.
        answers: text with control tokens as they are written; each ends with the end-of-sequence token.
    """
    tokenizer, model = engine.tokenizer, engine.model
    start = tokenizer.encode(START, add_special_tokens=False)
    scripts = [[*tokenizer.encode(each, add_special_tokens=False), tokenizer.eos_token_id] for each in answers]
    seen: list[int] = []

    def likeliest(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        ids = kwargs["input_ids"][0].tolist()
        del seen[kwargs["past_key_values"].get_seq_length() - len(ids) :]
        seen.extend(ids)
        begins = [at for at in range(len(seen) - len(start) + 1) if seen[at : at + len(start)] == start]
        if begins:
            script = scripts[min(len(begins), len(scripts)) - 1]
            said = len(seen) - begins[-1] - len(start)
            output.logits[:, -1, script[min(said, len(script) - 1)]] = 1e4
        return output

    model.register_forward_hook(likeliest, with_kwargs=True)
