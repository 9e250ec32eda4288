"""A folder of GPTQ weights that can be loaded: what a model's configuration asks for, checked, and written.

Both ways to such a folder end here, quantizing a model and converting an old checkpoint, so that neither can write what
would not load again. Nothing here quantizes, or reads weights.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb.engines.gptq_format import PARTS, GptqLayer, bits_of, read_layer, sizes_that_fit
from kani_nb.errors import ConfigError, ModelFilesError

if TYPE_CHECKING:
    import torch

#: What a model's folder holds beside weights, index and configuration.
_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.*",
    "generation_config.json",
)
#: Tables that older models kept with their weights, and that are computed today.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
#: What gptqmodel's fast kernels for a CPU take: these group sizes, inputs that are a multiple of it, and outputs of
#: this number.
_FAST_GROUPS, _FAST_OUTPUTS = (32, 64, 128, 256), 32
#: What groups that are larger, or all of the inputs, are divided into.
_USUAL_GROUP = 128


@dataclass(frozen=True, slots=True)
class GptqFolder:
    """A folder of GPTQ weights that was written.

    Attributes:
        folder: what to load.
        group_size: inputs that share a scale, as they were written; -1 is all of them.
        is_symmetric: whether every zero point is the middle of the codes.
        has_act_order: whether inputs were put into groups by their importance.
        weight_bytes: of the file of weights.
        note: what to know before loading it; often empty.
    """

    folder: Path
    bits: int
    group_size: int
    is_symmetric: bool
    has_act_order: bool
    weight_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a model's configuration makes of it: the linear layers of its blocks, and every other tensor.

    Attributes:
        linears: name -> `(outputs, inputs, whether it has a bias)`.
        others: name -> shape.
        tied: name -> the name of the tensor that it shares.
    """

    linears: dict[str, tuple[int, int, bool]]
    others: dict[str, tuple[int, ...]]
    tied: dict[str, str]


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`.

    Raises:
        ModelFilesError: there is none, or it is no JSON object.
        ConfigError: the model in it is quantized already.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFilesError(
            f"{folder} has no config.json that can be read", why=str(error.strerror), fix="name the model's folder"
        ) from error
    except ValueError as error:
        raise ModelFilesError(f"{path} is not JSON", why=str(error), fix="copy or download it again") from error
    if not isinstance(config, dict):
        raise ModelFilesError(f"{path} is not a JSON object", fix="copy or download it again")
    if quantized := config.get("quantization_config"):
        raise ConfigError(
            f"the model in {folder} is quantized already",
            why=f"its config.json says {quantized.get('quant_method') if isinstance(quantized, dict) else quantized!r}",
            fix="name the folder of the model that it was made from",
        )
    return config


def read_skeleton(folder: Path) -> Skeleton:
    """The tensors that the model in `folder` has by its configuration; takes no memory for any of them.

    Raises:
        ModelFilesError: this transformers does not know its architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    except (ValueError, KeyError, OSError) as error:
        raise ModelFilesError(f"the configuration in {folder} cannot be used", why=first_line(error)) from error
    linears = {
        name: (module.out_features, module.in_features, module.bias is not None)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and re.search(r"\.\d+\.", name)
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, tensor in parameters.items():
        first.setdefault(id(tensor), name)
    others = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if _owner(name) not in linears}
    return Skeleton(
        linears, others, {name: first[id(each)] for name, each in parameters.items() if first[id(each)] != name}
    )


def read_layers(
    source: str, tensors: Mapping[str, torch.Tensor], skeleton: Skeleton, *, bits: int, version: int
) -> list[GptqLayer]:
    """Every linear layer of the blocks, checked against the configuration.

    Args:
        source: the name of the file, for errors.
        tensors: all of it, by full name.
        skeleton: what the configuration asks for.
        bits: of each weight.
        version: 1 where zero points are stored minus one.

    Raises:
        ModelFilesError: a layer is missing, damaged, or of another shape.
        ConfigError: they have other bits.
    """
    missing = [name for name in skeleton.linears if f"{name}.qweight" not in tensors]
    if missing:
        raise ModelFilesError(
            f"{source} has no {missing[0]}.qweight"
            + f" (and {len(missing) - 1} more are missing)" * (len(missing) > 1),
            why=f"the configuration asks for {len(skeleton.linears)} quantized layers",
            fix="name the folder of the model that it was made from",
        )
    layers = []
    for name, (outputs, inputs, _) in skeleton.linears.items():
        qweight = tensors[f"{name}.qweight"]
        found = bits_of(qweight, inputs) if qweight.dim() == 2 and qweight.shape[1] == outputs else None
        if found is None:
            raise ModelFilesError(
                f"{name}.qweight of {source} is {tuple(qweight.shape)}",
                why=f"the configuration has {inputs} inputs and {outputs} outputs there",
                fix="name the folder of the model that it was made from",
            )
        if found != bits:
            raise ConfigError(f"bits is {bits} for {source}", why=f"its weights have {found}", fix=f"--bits {found}")
        parts = {part: tensors[f"{name}.{part}"] for part in (*PARTS, "zeros") if f"{name}.{part}" in tensors}
        layers.append(read_layer(name, parts, bits, version))
    return layers


def check_group_size(source: str, layers: Iterable[GptqLayer], group_size: int) -> None:
    """Refuse a group size that some layer does not have.

    Raises:
        ConfigError: it says which fit all of them.
        ModelFilesError: none does.
    """
    fitting = sizes_that_fit(layers, group_size)
    if not fitting:
        raise ModelFilesError(f"the scales in {source} fit no one group size", why="the file is damaged")
    if group_size not in fitting:
        raise ConfigError(
            f"group_size is {group_size} for {source}",
            why=f"its scales fit {' or '.join(map(str, fitting))}" + " (-1 is no groups)" * (-1 in fitting),
            fix=f"--group-size {fitting[0]}",
        )


def read_others(source: str, tensors: Mapping[str, torch.Tensor], skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """Every tensor that is not quantized (embeddings, norms, head, biases), checked against the configuration.

    Raises:
        ModelFilesError: one is missing, of another shape, or unknown to the configuration.
    """
    wanted = skeleton.others | {
        f"{name}.bias": (rows,) for name, (rows, _, has_bias) in skeleton.linears.items() if has_bias
    }
    kept = {}
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if name in skeleton.tied:
            continue  # it is the other one's
        if tensor is None or tuple(tensor.shape) != shape:
            has = f"is {tuple(tensor.shape)} in {source}" if tensor is not None else f"is missing from {source}"
            raise ModelFilesError(
                f"{name} {has}",
                why=f"the configuration asks for {shape}",
                fix="name the folder of the model that it was made from",
            )
        kept[name] = tensor
    _check_leftovers(source, tensors, skeleton, kept)
    return kept


def _check_leftovers(
    source: str, tensors: Mapping[str, torch.Tensor], skeleton: Skeleton, kept: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that would be lost silently."""
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if name in kept or _COMPUTED.search(name) or (owner in skeleton.linears and part in (*PARTS, "zeros")):
            continue
        if owner in skeleton.linears and part == "bias" and not bool(tensor.any()):
            continue  # the first versions wrote one for every layer
        twin = tensors.get(skeleton.tied.get(name, ""))
        if twin is not None and twin.shape == tensor.shape and bool((twin == tensor).all()):
            continue
        raise ModelFilesError(
            f"{source} holds {name}, and the configuration has no place for it",
            fix="name the folder of the model that it was made from",
        )


def write_gptq_folder(
    work: Path,
    model: Path,
    layers: list[GptqLayer],
    others: Mapping[str, torch.Tensor],
    group_size: int,
    **further: Any,
) -> GptqFolder:
    """Write weights, configuration and tokenizer into `work`.

    Symmetric weights are written in the first version of the format, which every reader knows; others in the second,
    since gptqmodel refuses those of the first. Groups that do not divide the inputs of every layer are divided, each
    part with the scales of the whole: gptqmodel's fast kernels refuse others, or read them wrongly.

    Args:
        work: an empty folder.
        model: the folder whose configuration, tokenizer and settings of generation it takes over.
        layers: the quantized ones.
        others: all that is not quantized.
        group_size: inputs that share a scale.
        further: entries of `quantization_config`.
    """
    import torch
    from safetensors.torch import save_file

    version = 1 if all(layer.is_symmetric for layer in layers) else 2
    stored = _stored_group_size(layers, group_size)
    odd = [layer for layer in layers if layer.qweight.shape[1] % _FAST_OUTPUTS]
    is_fast = stored in _FAST_GROUPS and not odd
    if stored != group_size:
        layers = [layer.regrouped(group_size, stored) for layer in layers]
    state: dict[str, torch.Tensor] = {}
    for layer in layers:
        state |= layer.tensors(version, stored)
    dtype = next(each.dtype for each in others.values() if each.is_floating_point())
    dtype = torch.float16 if dtype == torch.float32 else dtype
    for name, tensor in others.items():
        state[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    weights = work / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    name = "gptq" if version == 1 else "gptq_v2"
    quantized = {
        "quant_method": "gptq",
        "bits": layers[0].bits,
        "group_size": stored,
        "desc_act": any(layer.g_idx is not None for layer in layers),
        "sym": version == 1,
        "format": name,
        "checkpoint_format": name,
        # Without it, a kernel is chosen that refuses the shapes only when they are there.
        **({} if is_fast else {"backend": "torch"}),
        **further,
    }
    config = read_config(model)
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantized}
    for pattern in _BESIDE:
        for path in model.glob(pattern):
            shutil.copyfile(path, work / path.name)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return GptqFolder(
        work,
        layers[0].bits,
        stored,
        version == 1,
        bool(quantized["desc_act"]),
        weights.stat().st_size,
        _note(group_size, stored, is_fast),
    )


def _stored_group_size(layers: list[GptqLayer], group_size: int) -> int:
    """The group size that is written: one that fast kernels take, where the groups can be divided into such."""
    inputs = {layer.in_features for layer in layers}
    size = math.gcd(_USUAL_GROUP if group_size == -1 else group_size, *inputs)
    if size > max(_FAST_GROUPS):
        size = math.gcd(_USUAL_GROUP, size)
    return size if size in _FAST_GROUPS else group_size


def _note(group_size: int, stored: int, is_fast: bool) -> str:
    notes = []
    if stored != group_size:
        what = "all inputs in one group" if group_size == -1 else f"groups of {group_size}"
        notes.append(f"{what} are kept as groups of {stored} with equal scales, the same weights, for fast kernels")
    if not is_fast:
        notes.append("no fast kernel takes its shapes: gptqmodel's plain one is used, many times slower on a CPU")
    return "; ".join(notes)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
