"""What a pre-quantized checkpoint needs installed, by the method its configuration names.

transformers finds a missing package late and in its own words; this says it before anything is loaded.
"""

from __future__ import annotations

import importlib.util

from kani_nb.errors import MissingDependencyError, ModelFilesError
from kani_nb.hardware.gptq_check import needs_of

#: Method -> module and the packages that `pip install` gets it from; as in transformers 5.23's quantizers.
_PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "awq": ("gptqmodel", "gptqmodel"),
    "aqlm": ("aqlm", "aqlm"),
    "auto-round": ("auto_round", "auto-round"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("kernels", "kernels"),
    "fbgemm_fp8": ("kernels", "kernels"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}


def check_checkpoint_packages(name: str, method: str) -> None:
    """Refuse a checkpoint whose quantization package is missing, or that this transformers does not know.

    Raises:
        MissingDependencyError: the package is not installed; with the line that installs it.
        ModelFilesError: transformers has no such method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method in ("gptq", "awq") and (lacking := needs_of("gptq")) is not None:
        needed = lacking.what.partition(" needs ")[2]
        raise MissingDependencyError(
            f"{name} is quantized with {method}, which needs {needed}", why=lacking.why, fix=lacking.fix
        )
    module, packages = _PACKAGES.get(method, ("", ""))
    if module and not _is_installed(module):
        raise MissingDependencyError(
            f"{name} is quantized with {method}", why=f"{module} is not installed", fix=f"%pip install -U {packages}"
        )
    if method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes", "kani_nb_packed"):
        raise ModelFilesError(
            f"{name} is quantized with {method!r}",
            why="this transformers does not know that method",
            fix="%pip install -U transformers, or load the model that it was made from",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
