"""The scheme `abacus8`: 8-bit codes and one float32 scale for each output. Neither torch nor transformers is loaded."""

from kani_nb.hardware.schemes import Scheme


def _bytes(outputs, inputs, settings, dtype_bytes):
    return outputs * inputs + 4 * outputs


def _config(settings, dtype):
    from kani_nb_abacus.quantizer import AbacusConfig

    return AbacusConfig(settings.llm_int8_skip_modules)


ABACUS8 = Scheme(
    name="abacus8",
    summary="8-bit codes with a scale for each output, by an abacus",
    backend="other",
    linear_bytes=_bytes,
    devices=frozenset({"cpu", "cuda"}),
    knobs=frozenset({"llm_int8_skip_modules"}),
    transformers_config=_config,
)
