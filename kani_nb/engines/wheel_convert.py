"""A child process that turns one GGUF file into bf16 safetensors: `python -m kani_nb.engines.wheel_convert`.

A process of its own, because the conversion cannot be stopped from inside and its memory should go back at once. It
prints one JSON object per line: `{"stage": ..., "fraction": ...}` while it works, and `{"error": ..., "kind": ...}`
when it fails. It knows nothing of caches, locks or downloads: its caller gives it an empty folder and throws the
folder away on failure.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from kani_nb.engines.sources_cache import is_disk_full


def _tell(**record: object) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def convert(gguf: Path, folder: Path) -> None:
    """Write the model, its configuration, tokenizer and chat template of `gguf` into `folder`."""
    _tell(stage="starting torch", fraction=0.02)
    import torch
    import transformers

    torch.set_num_threads(1)
    _tell(stage="reading the tokenizer", fraction=0.15)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _tell(stage="reading the weights", fraction=0.4)
    # Without this, transformers 5 marks the dequantized model as quantized and then refuses to save it.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config_class(dequantize=True)} if config_class is not None else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    broken = [name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} of its tensors hold values that are not finite, first {broken[0]}")
    _tell(stage="writing safetensors", fraction=0.85)
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    if window := getattr(model.config, "max_position_embeddings", None):
        tokenizer.model_max_length = window
    tokenizer.save_pretrained(folder)


def main(gguf: str, folder: str) -> int:
    """Convert, and put a failure in one line; 0 when the folder is complete."""
    try:
        convert(Path(gguf), Path(folder))
    except Exception as error:  # noqa: BLE001 - the parent process makes it an error of ours, with this cause
        memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        kind = "disk" if is_disk_full(error) else "memory" if memory else "files"
        _tell(error=f"{type(error).__name__}: {error}", kind=kind)
        return 1
    _tell(stage="written", fraction=0.95)
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"
    sys.exit(main(*sys.argv[1:3]))
