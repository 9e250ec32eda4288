"""The process that quantizes: `python -m kani_nb.engines.huggingface.gptq_process`.

The first line of its input is the job, a JSON object; it ends when its input does. It prints one JSON object per line:
`{"stage": ..., "fraction": ...}` while it works, `{"written": ...}` at the end, and `{"error": ..., "kind": ...}` when
it fails; what gptqmodel prints is known by not being that. Its caller gives it an empty folder, ends it when it likes,
and throws the folder away when it fails.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kani_nb.engines.gptq_folder import (
    GptqFolder,
    Skeleton,
    read_layers,
    read_others,
    read_skeleton,
    write_gptq_folder,
)
from kani_nb.engines.gptq_format import GptqLayer
from kani_nb.engines.sources_cache import is_disk_full
from kani_nb.errors import ConfigError, KaniNbError, ModelFilesError
from kani_nb.hardware.schemes import find_scheme

#: Longest text that is used, in tokens.
_LONGEST = 2048
#: Share of a weight's norm that 4 bits may lose. About 0.1 is usual; weights that were packed wrongly lose more than 1.
_MOST_LOST = 0.5


def _tell(**record: object) -> None:
    sys.stdout.write(f"\n{json.dumps(record)}\n")  # whatever stands in the line was printed by others
    sys.stdout.flush()


def quantize(folder: Path, work: Path, group_size: int, texts: list[str]) -> GptqFolder:
    """Quantize the model of `folder` and write it into `work`."""
    _tell(stage="starting gptqmodel", fraction=0.02)
    import torch
    from optimum.gptq import GPTQQuantizer
    from optimum.gptq.utils import get_block_name_with_pattern
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kani_nb.hardware.devices import choose_threads

    torch.set_num_threads(choose_threads().threads)
    skeleton = read_skeleton(folder)
    _tell(stage="loading the model", fraction=0.05)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", use_safetensors=True).eval()
    held = model.dtype
    if held == torch.float16 and not torch.cuda.is_available():
        model = model.float()  # a CPU emulates half precision, slowly
    name = get_block_name_with_pattern(model)
    blocks = list(model.get_submodule(name))
    _check_layers(folder.name, name, skeleton)
    first = next(iter(skeleton.linears))
    original = model.get_submodule(first).weight.detach().clone()
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(_Announced(number, len(blocks)))
    quantizer = GPTQQuantizer(
        bits=4,
        dataset=[tokenizer(text, return_tensors="pt", truncation=True, max_length=_longest(model)) for text in texts],
        group_size=group_size,
        sym=True,
        desc_act=False,
        backend="torch",  # the one that leaves the weights as they are saved
        block_name_to_quantize=name,
    )
    quantizer.quantize_model(model, tokenizer)
    _tell(stage="writing", fraction=0.95)
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    layers = read_layers(folder.name, state, skeleton, bits=4, version=2)
    others = {
        key: tensor.to(held) if tensor.is_floating_point() else tensor
        for key, tensor in read_others(folder.name, state, skeleton).items()
    }
    _check_close(next(layer for layer in layers if layer.name == first), original.float().cpu(), group_size)
    return write_gptq_folder(work, folder, layers, others, group_size, meta=quantizer.to_dict()["meta"])


def _longest(model: Any) -> int:
    return min(_LONGEST, int(getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST)))


class _Announced:
    """Tells once that a block is reached."""

    def __init__(self, number: int, blocks: int) -> None:
        self._number, self._blocks, self._told = number, blocks, False

    def __call__(self, _module: Any, _inputs: Any) -> None:
        if not self._told:
            self._told = True
            share = 0.1 + 0.85 * self._number / self._blocks
            _tell(stage=f"block {self._number + 1} of {self._blocks}", fraction=round(share, 3))


def _check_layers(model: str, blocks: str, skeleton: Skeleton) -> None:
    """Refuse models whose linear layers gptqmodel would not reach, or cannot pack."""
    scheme = find_scheme("gptq")
    for name, (outputs, inputs, _) in skeleton.linears.items():
        if not name.startswith(f"{blocks}."):
            raise ModelFilesError(f"{model} cannot be quantized with GPTQ", why=f"{name} is outside of {blocks}")
        if inputs % scheme.in_multiple or outputs % scheme.out_multiple:
            raise ModelFilesError(
                f"{model} cannot be quantized with GPTQ",
                why=f"{name} has {inputs} inputs and {outputs} outputs, and both must be multiples of "
                f"{scheme.in_multiple}",
                fix="another scheme: nf4, int8 or cpu-int8",
            )
    experts = [name for name, shape in skeleton.others.items() if len(shape) == 3 and name.startswith(f"{blocks}.")]
    if experts:
        raise ModelFilesError(
            f"{model} cannot be quantized with GPTQ",
            why=f"{experts[0]} holds several experts in one tensor, and gptqmodel would leave it as it is",
        )
    if not skeleton.linears:
        raise ModelFilesError(f"{model} cannot be quantized with GPTQ", why="it has no linear layers in its blocks")


def _check_close(layer: GptqLayer, original: Any, group_size: int) -> None:
    """Refuse to write weights that are not the model's any more."""
    lost = float((layer.dequantized(group_size) - original).norm() / original.norm())
    if not lost < _MOST_LOST:  # also where it is no number
        raise ModelFilesError(
            f"{layer.name} lost {lost:.0%} of its weights' norm", why="they were packed otherwise than they are read"
        )


def main(wanted: dict[str, Any]) -> int:
    """Quantize, and put a failure in one line; 0 when the folder is complete."""
    try:
        done = quantize(Path(wanted["folder"]), Path(wanted["work"]), wanted["group_size"], wanted["texts"])
    except KaniNbError as error:
        kind = "settings" if isinstance(error, ConfigError) else "files"
        _tell(what=error.what, error=error.why, fix=error.fix, kind=kind)
        return 1
    except Exception as error:  # noqa: BLE001 - the parent process makes it an error of ours
        _tell(error=f"{type(error).__name__}: {error}", kind=_kind(error))
        return 1
    _tell(written={name: value for name, value in asdict(done).items() if name != "folder"})
    return 0


def _kind(error: Exception) -> str:
    if is_disk_full(error):
        return "disk"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "DefaultCPUAllocator" in str(error):
        return "memory"
    return "library" if isinstance(error, ImportError) else "files" if isinstance(error, OSError) else "other"


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(job))
