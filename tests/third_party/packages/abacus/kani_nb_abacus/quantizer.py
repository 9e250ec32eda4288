"""How transformers carries `abacus8` out: linear layers are replaced when their weights have been read."""

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin


class AbacusLinear(torch.nn.Module):
    """`(out, in) int8` codes and `(out,) float32` scales."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("codes", torch.round(weight / scales[:, None]).to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, states):
        weight = self.codes.to(states.dtype) * self.scales.to(states.dtype)[:, None]
        return torch.nn.functional.linear(states, weight, self.bias)


@register_quantization_config("abacus")
class AbacusConfig(QuantizationConfigMixin):
    def __init__(self, skip_modules=None, **others):
        self.quant_method = "abacus"
        self.skip_modules = None if skip_modules is None else list(skip_modules)


@register_quantizer("abacus")
class AbacusQuantizer(HfQuantizer):
    def _process_model_after_weight_loading(self, model, **kwargs):
        skipped = self.get_modules_to_not_convert(model, self.quantization_config.skip_modules)
        for name, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear and should_convert_module(name, skipped):
                model.set_submodule(name, AbacusLinear(layer))
        return model

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False
