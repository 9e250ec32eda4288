"""A process that loads folders of GPTQ weights with the real libraries: `python -m tests.gptq.reading`.

It is given a file with a list of jobs as JSON: `{"folder": ..., "through": "transformers" | "gptqmodel" | "engine"}`
and what else they are to find out. The last line that it prints is the list of what came of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France?"


def through_engine(folder: str, options: dict[str, Any], save: str | None) -> dict[str, Any]:
    """As a user of this package loads it."""
    from kani_nb import ChatMessage, HuggingEngine

    async def ask() -> dict[str, Any]:
        engine = HuggingEngine(folder, threads=1, **options)
        completion = await engine.predict([ChatMessage.user(QUESTION)], do_sample=False, max_new_tokens=12)
        found = {"answer": completion.message.text, "weight_bytes": engine.memory().weight_bytes, **engine.details()}
        if save is not None:
            await engine.save(save)
        await engine.close()
        return found

    return asyncio.run(ask())


def load(folder: str, through: str) -> Any:
    """The model itself."""
    if through == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(folder, device="cpu").model.eval()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def storage_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_of(model)}
    return sum(storages.values())


def tensors_of(model: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


def logits_of(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def quality(model: Any, folder: str, reference: str) -> dict[str, Any]:
    """How far the model is from the one it was made from, in float32, on the text that schemes are compared on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kani_nb.metrics.divergence import QualityTotals
    from kani_nb.metrics.passages import PASSAGES

    tokenizer, totals = AutoTokenizer.from_pretrained(folder), QualityTotals()
    original = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    for passage in PASSAGES:
        ids = tokenizer(passage).input_ids
        totals.add(ids, logits_of(model, ids).log_softmax(-1), logits_of(original, ids).log_softmax(-1))
    found = totals.quality
    return {"kl_nats": found.kl_nats, "top1": found.top1_agreement, "perplexity": found.perplexity}


def answer(model: Any, folder: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    started = time.perf_counter()
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return {
        "answer": tokenizer.decode(ids, skip_special_tokens=True),
        "tokens_per_s": len(ids) / (time.perf_counter() - started),
    }


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Load one folder, and do what the job asks for."""
    import torch

    folder, through = job["folder"], job["through"]
    if through == "engine":
        return through_engine(folder, job.get("options", {}), job.get("save"))
    started = time.perf_counter()
    model = load(folder, through)
    first = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    found = {"load_s": time.perf_counter() - started, "kernel": type(first).__name__, "bytes": storage_bytes(model)}
    if "ids" in job:
        torch.save(logits_of(model, job["ids"]), job["logits"])
    if job.get("ask"):
        found |= answer(model, folder)
    if "reference" in job:
        found |= quality(model, folder, job["reference"])
    return found


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    results = [read(job) for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    print(f"\n{json.dumps(results, default=str)}")
