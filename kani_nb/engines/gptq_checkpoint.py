"""Old GPTQ checkpoints in a single file (`llama7b-4bit-128g.pt`) made into folders that can be loaded.

GPTQ-for-LLaMa wrote a model's tensors alone: no configuration, no tokenizer, and not even the group size. With the
folder of the model that it was made from, all of that can be had. Such a file is a pickle: it is read without running
any code, and one that asks for code is refused. Nothing here quantizes, and gptqmodel is not needed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb.engines.gptq_folder import (
    GptqFolder,
    check_group_size,
    first_line,
    read_config,
    read_layers,
    read_others,
    read_skeleton,
    write_gptq_folder,
)
from kani_nb.engines.gptq_format import BITS, USUAL_SIZES, fits
from kani_nb.errors import ConfigError, ModelFilesError

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def convert_gptq_checkpoint(
    file: Path | str, model_folder: Path | str, out_folder: Path | str, group_size: int = 128, bits: int = 4
) -> GptqFolder:
    """A folder that transformers loads (with gptqmodel), made from an old single-file checkpoint of GPTQ-for-LLaMa.

    Blocks. The file's tensors are read as they are needed, where the file allows it.

    Args:
        file: a `.pt` (or `.safetensors`) with `model.layers.0.self_attn.q_proj.qweight` and so on.
        model_folder: the model that it was made from: its `config.json` and tokenizer; weights are not needed.
        out_folder: a new or empty folder; it appears whole or not at all.
        group_size: inputs that share a scale, as it was made; -1 is all of them.
        bits: of each weight.

    Raises:
        ModelFilesError: the file is no such checkpoint, is damaged, asks for code, or is of another model.
        ConfigError: it has another group size or other bits; or a folder cannot be used.
        EngineError: the disk is full.
    """
    from kani_nb.engines.staging import check_empty, staged_folder

    path, model, out = (Path(each).expanduser() for each in (file, model_folder, out_folder))
    check_settings(group_size, bits)
    check_empty(out)
    read_config(model)
    tensors = read_checkpoint(path)
    if not is_gptq(tensors):
        raise ModelFilesError(
            f"{path} is no GPTQ checkpoint",
            why=f"it holds {', '.join(list(tensors)[:2])} and so on, and nothing that ends in .qweight",
        )
    skeleton = read_skeleton(model)
    layers = read_layers(path.name, tensors, skeleton, bits=bits, version=1)
    check_group_size(path.name, layers, group_size)
    others = read_others(path.name, tensors, skeleton)
    with staged_folder(out) as work:
        return replace(write_gptq_folder(work, model, layers, others, group_size), folder=out)


def check_settings(group_size: int, bits: int = 4) -> None:
    """Refuse what no GPTQ model has.

    Raises:
        ConfigError: it says what there is.
    """
    if bits not in BITS:
        raise ConfigError(f"bits is {bits!r}", why=f"it must be one of {', '.join(map(str, BITS))}")
    size: Any = group_size
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise ConfigError(f"group_size is {group_size!r}", why="it must be a whole number, or -1 for no groups")


def refuse_or_explain(path: Path | str) -> ModelFilesError:
    """The error for a single file that was given in the place of a model, ready to be raised.

    Looks into files of weights: an old GPTQ checkpoint is recognised, and the command that converts it is given with
    its own bits and group size.
    """
    path = Path(path)
    fix = f"name the folder of a model instead: {path.parent.absolute()}"
    if path.suffix.lower() not in _SUFFIXES:
        return ModelFilesError(f"{path} is a single file, and not a GGUF", fix=fix)
    try:
        tensors = read_checkpoint(path)
    except ModelFilesError as error:
        return error
    if not is_gptq(tensors):
        why = "a model is a folder, with its configuration and tokenizer"
        return ModelFilesError(f"{path} is weights alone", why=why, fix=fix)
    bits, size = _guess(tensors)
    options = f" --bits {bits}" * (bits != 4) + f" --group-size {size}"
    out = shlex.quote(str(path.with_suffix("")))
    return ModelFilesError(
        f"{path} is an old GPTQ checkpoint ({bits} bits, {'no groups' if size == -1 else f'groups of {size}'})",
        why="it is weights alone, without configuration and tokenizer",
        fix=f"kani-nb convert-gptq {shlex.quote(str(path))} --model FOLDER --out {out}{options}, where FOLDER is that "
        "of the model it was made from (config.json and tokenizer; its weights are not needed)",
    )


def is_gptq(tensors: Mapping[str, Any]) -> bool:
    """Whether these are a GPTQ model's."""
    return any(name.endswith(".qweight") for name in tensors)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt` or `.safetensors` by name, mapped from the disk where they can be. Runs no code of it.

    Raises:
        ModelFilesError: it is missing, cut off, no checkpoint, or asks for more than tensors.
    """
    import pickle

    import torch

    if not path.is_file():
        raise ModelFilesError(f"there is no file {path}", fix=f"the current folder is {Path.cwd()}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            with path.open("rb") as file:
                is_zip = file.read(2) == b"PK"  # torch's format since 1.6; the one before it cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except Exception as error:
        raise _damaged(path, first_line(error)) from error
    if not isinstance(found, dict) or not found or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ModelFilesError(f"{path} is no checkpoint", why="it is no table of tensors by name")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _refused(path: Path, said: str) -> ModelFilesError:
    """What the reader of pickles did not take: code, or what is no pickle at all."""
    wanted = re.search(r"GLOBAL (\S+)", said)
    if wanted is None:
        return _damaged(path, "")
    return ModelFilesError(
        f"{path} asks for {wanted[1]} while it is read",
        why="weights need tensors alone, and a pickle can run any code; it was not opened",
        fix="take a copy that was saved as a state_dict, or as safetensors",
    )


def _damaged(path: Path, why: str) -> ModelFilesError:
    return ModelFilesError(f"{path} is damaged, cut off, or no checkpoint", why=why, fix="copy or download it again")


def _guess(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Bits and group size, from the shapes of the layers; those of the first files where they say nothing."""
    bits, shapes = 4, set()
    for name, qweight in tensors.items():
        layer = name.removesuffix(".qweight")
        qzeros, scales = tensors.get(f"{layer}.qzeros"), tensors.get(f"{layer}.scales")
        if name.endswith(".qweight") and qzeros is not None and scales is not None:
            bits = round(qzeros.shape[-1] * 32 / qweight.shape[-1])
            shapes.add((qweight.shape[0] * 32 // max(bits, 1), scales.shape[0]))
    fitting = [size for size in (-1, 128, *USUAL_SIZES) if shapes and all(fits(*each, size) for each in shapes)]
    return bits, fitting[0] if fitting else -1
