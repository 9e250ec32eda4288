"""How transformers loads, saves and reloads models whose linear layers are `hardware.packed`'s.

`register()` makes the quantization method `kani_nb_packed` known to transformers; from then on

    AutoModelForCausalLM.from_pretrained(folder, quantization_config=PackedConfig(bits=8))

quantizes each weight as it is read, `save_pretrained` writes the codes with a configuration that says everything, and
`from_pretrained` of what was written takes no argument. Nothing is registered by importing this module. It knows linear
layers only: convolutions, GPT-2's `Conv1D` and the experts of a mixture, which are several matrices in one tensor, stay
as they are. The classes are built when they are first asked for, since they derive from transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from enum import StrEnum
from functools import cache
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.hardware.packed import fits_int4, fits_int8, packed_class
from kani_nb.hardware.packed_codes import GROUP_SIZES, group_size_for
from kani_nb.hardware.schemes import DEFAULT_GROUP_SIZE

#: The output head is held in 8 bits under both schemes: at 4 it costs more than it saves. Mean KL divergence from
#: float32 of SmolLM2-135M in 4 bits, groups of 32: .0012 without the head, .0024 with it in 8 bits, .0409 in 4.
HEAD_BITS = 8
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


class PackedMethod(StrEnum):
    """What transformers calls it; as an enumeration, because some of its messages want a `.value`."""

    PACKED = "kani_nb_packed"


def register() -> None:
    """Make `kani_nb_packed` known to transformers. Calling it again changes nothing. Loads transformers."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZATION_CONFIG_MAPPING[PackedMethod.PACKED.value] = _config_class()
    AUTO_QUANTIZER_MAPPING[PackedMethod.PACKED.value] = _quantizer_class()


class _Config:
    """What `quantization_config` of `from_pretrained` takes for `cpu-int8` and `cpu-int4`.

    Args:
        bits: of the linear layers: 8 or 4.
        group_size: inputs that share a scale at 4 bits; a layer whose inputs it does not divide takes the next smaller.
        skip_modules: linear layers that stay as they are, by full name, beginning, end or regular expression; None
            skips none.
        head_bits: of the output head.

    Raises:
        ConfigError: a value that cannot be.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        skip_modules: tuple[str, ...] | list[str] | None = None,
        head_bits: int = HEAD_BITS,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        if others:
            raise ConfigError(
                f"the packed quantization has no {', '.join(sorted(others))}", why="this version does not"
            )
        if bits not in (4, 8) or head_bits not in (4, 8):
            raise ConfigError(f"{bits} bits (head: {head_bits}) are not possible", why="they must be 8 or 4")
        if bits == 4 and group_size is None:
            group_size = DEFAULT_GROUP_SIZE["cpu-int4"]
        if group_size is not None and (bits == 8 or group_size not in GROUP_SIZES):
            why = "8-bit weights have one scale for each output" if bits == 8 else f"it must be one of {GROUP_SIZES}"
            raise ConfigError(f"group_size is {group_size!r}", why=why)
        self.quant_method = PackedMethod.PACKED
        self.bits = bits
        self.group_size = group_size
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.head_bits = head_bits
        register()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says."""
        return {**vars(self), "quant_method": self.quant_method.value}


class _Quantizer:
    """Transformers' `HfQuantizer` for it."""

    requires_calibration = False
    quantization_config: Any
    pre_quantized: bool
    #: Names of weights that become codes while they are read.
    _waiting: Set[str] = frozenset()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse places other than main memory.

        Raises:
            ConfigError: part of the model would be on a GPU or on disk.
        """
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        names = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places}
        wrong = sorted(names - {"None", "cpu", *_AUTOMATIC})
        if wrong:
            raise ConfigError(
                f"packed {self.quantization_config.bits}-bit weights cannot be put on {' and '.join(wrong)}",
                why="torch multiplies them on a CPU, in main memory",
                fix="--quant int8 or nf4 for a GPU, or --device cpu",
            )

    def update_device_map(self, device_map: Any) -> Any:
        """An automatic map is the CPU."""
        return {"": "cpu"} if isinstance(device_map, str) and device_map in _AUTOMATIC else device_map

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor of a checkpoint becomes codes while it is read."""
        return param_name in self._waiting

    def get_quantize_ops(self) -> Any:
        """The operation that turns it into codes."""
        operation = _operation_class()()
        operation.waiting, operation.pack = self._waiting, self.pack
        return operation

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers = dict(_chosen_layers(model, self.quantization_config))
        if not layers:
            raise ConfigError(
                f"no linear layer of {type(model).__name__} can be held in {self.quantization_config.bits} bits",
                why="none has a shape that fits, or all are skipped",
            )
        if self.pre_quantized:
            head = model.get_output_embeddings()
            _replace(model, {layer: self._packed(layer, is_head=layer is head) for layer in layers.values()})
            _untie(model, layers)
        else:
            # A weight that is tied to an embedding is read as that: its layer is packed when all is there.
            tied = model.all_tied_weights_keys
            self._waiting = {f"{name}.weight" for name in layers} - {*tied.keys(), *tied.values()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            layers = dict(_chosen_layers(model, self.quantization_config))
            for name, layer in layers.items():
                self.pack(model, name, layer.weight)
            _untie(model, layers)
        for module in filter(is_packed, model.modules()):
            module.finish()
        _keep_names(model)
        return model

    def pack(self, model: Any, name: str, weight: Any) -> None:
        """Put a packed layer that holds `weight` in the place of the linear layer of that name."""
        layer = model.get_submodule(name)
        packed = self._packed(layer, is_head=layer is model.get_output_embeddings())
        packed.quantize(weight)
        if layer.bias is not None:
            packed.bias = layer.bias.detach()  # on the meta device, if it has not been read yet
        _replace(model, {layer: packed})

    def _packed(self, layer: Any, *, is_head: bool) -> Any:
        """A packed layer of the shape of `layer`, still without content."""
        config = self.quantization_config
        bits = config.head_bits if is_head else config.bits
        options: dict[str, Any] = {"bias": layer.bias is not None, "dtype": layer.weight.dtype, "device": "meta"}
        if bits == 4:
            wanted = config.group_size or DEFAULT_GROUP_SIZE["cpu-int4"]
            options["group_size"] = group_size_for(layer.in_features, wanted)
        return packed_class(bits)(layer.in_features, layer.out_features, **options)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """It can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It cannot be trained."""
        return False


class _Operation:
    """What transformers calls with each weight that it has read: the layer becomes a packed one, at once."""

    waiting: Set[str]
    pack: Callable[[Any, str, Any], None]

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What is left to be put in place: the tensors that belong to no packed layer."""
        left = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if name not in self.waiting:
                left[name] = weight
                continue
            self.pack(model, name.removesuffix(".weight"), weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left


def is_packed(module: Any) -> bool:
    """Whether it is a `PackedInt8Linear` or a `PackedInt4Linear`."""
    return isinstance(module, packed_class(8) | packed_class(4))


def _chosen_layers(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Names and linear layers that are to be packed.

    Raises:
        ConfigError: a module to skip is not there.
    """
    import torch
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [name for name, _ in model.named_modules()]
    for pattern in config.skip_modules or ():
        if all(should_convert_module(name, [pattern]) for name in names):
            linear = next((name for name, each in model.named_modules() if type(each) is torch.nn.Linear), "lm_head")
            raise ConfigError(
                f"llm_int8_skip_modules names {pattern!r}, and no module is called so",
                why="a name must be whole, or the end of one, or a regular expression for one",
                fix=f"for example {linear}",
            )
    skipped = [*(config.skip_modules or ()), *_kept_float32(model)]
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        # Subclasses are left alone: some have their weight read by others.
        if type(module) is not torch.nn.Linear or not should_convert_module(name, skipped):
            continue
        fits = fits_int8 if (config.head_bits if module is head else config.bits) == 8 else fits_int4
        if fits(module.in_features, module.out_features):
            yield name, module


def _kept_float32(model: Any) -> list[str]:
    """Modules that the architecture wants in float32."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return [each for name in names for each in getattr(model, name, None) or ()]


def _replace(model: Any, replaced: dict[Any, Any]) -> None:
    """Put packed layers in the place of linear ones, wherever they are referred to."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in replaced:
                setattr(parent, name, replaced[child])


def _untie(model: Any, layers: dict[str, Any]) -> None:
    """Say in the configuration what is now so: the head has codes of its own, and the embedding stays as it is."""
    tied = model.all_tied_weights_keys
    ours = {f"{name}.weight" for name in layers} & tied.keys()
    for name in ours:
        del tied[name]
    if ours and not tied:  # encoder-decoder models tie other embeddings too
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _keep_names(model: Any) -> None:
    """Save packed layers under their own names, not split or joined as in the checkpoint they came from."""
    from transformers.core_model_loading import WeightConverter

    names = [f"{name}.codes" for name, module in model.named_modules() if is_packed(module)]

    def concerns_packed(conversion: Any) -> bool:
        patterns = [re.sub(r"\\\d", ".*", pattern) for pattern in conversion.target_patterns]
        return any(re.search(pattern, name) for pattern in patterns for name in names)

    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        each for each in conversions if not (isinstance(each, WeightConverter) and concerns_packed(each))
    ]


@cache
def _config_class() -> Any:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    return _derived("PackedConfig", _Config, QuantizationConfigMixin)


@cache
def _quantizer_class() -> Any:
    from transformers.quantizers.base import HfQuantizer

    return _derived("PackedQuantizer", _Quantizer, HfQuantizer)


@cache
def _operation_class() -> Any:
    from transformers.core_model_loading import ConversionOps

    return _derived("PackedOperation", _Operation, ConversionOps)


def _derived(name: str, body: type, base: Any) -> Any:
    return type(name, (body, base), {"__module__": __name__, "__doc__": body.__doc__})


def __getattr__(name: str) -> Any:
    if name == "PackedConfig":
        return _config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
