"""Which dtype a device computes in, and whether a scheme can run on it: decisions, each with its reason in words.

Nothing here loads a model. Devices are described by their kind and capability, so that a card that is not here can be
asked about; packages are looked at only where the device is.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from kani_nb.hardware.bitsandbytes_check import installed_version, release
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.schemes import Scheme

#: Lowest CUDA compute capabilities that multiply these at full speed (CUDA C++ programming guide, arithmetic
#: instructions): Ampere bfloat16, the Tegra X1 and Pascal float16.
BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY = (8, 0), (5, 3)
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype, and why it is not the one that was asked for or stored.

    Attributes:
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: whatever the checkpoint turns out to have.
        reason: one clause for a person; empty where nothing had to be decided.
    """

    dtype: str
    reason: str = ""


def choose_dtype(
    asked: str,
    checkpoint: str | None,
    device_kind: str,
    capability: tuple[int, int] | None = None,
    scheme: Scheme | None = None,
) -> DtypeChoice:
    """What the weights that stay unquantized are held and multiplied in; or what 4-bit weights are multiplied in.

    `auto` is the checkpoint's own dtype, except that a CPU, which emulates float16 slowly, takes float32 for it. What a
    CUDA device has no arithmetic for is replaced, asked for or not: bfloat16 by float16 below 8.0, float16 by float32
    below 5.3. On a CPU a float16 that was asked for is given, and torch's packed products take bfloat16 where nothing
    was: their kernels are fast in nothing else. Apple's GPUs have both (bfloat16 from macOS 14).

    Args:
        asked: `auto`, `float32`, `bfloat16` or `float16`.
        checkpoint: the dtype that the configuration names; None where it names none.
        device_kind: `cuda`, `mps` or `cpu`.
        capability: of a CUDA device; None for AMD's and others.
        scheme: of the weights, where it is known.
    """
    wanted = checkpoint if asked == "auto" else asked
    if wanted not in ("float32", "bfloat16", "float16"):
        return DtypeChoice("auto")
    is_packed = device_kind == "cpu" and scheme is not None and scheme.backend == "packed"
    if is_packed and asked == "auto" and wanted != "bfloat16":
        return DtypeChoice(
            "bfloat16", f"torch's packed products are fast in bfloat16 only, which is taken for {wanted}"
        )
    if device_kind == "cpu" and wanted == "float16":
        if asked == "auto":
            return DtypeChoice("float32", "a CPU emulates float16 slowly, so float32 is taken instead")
        return DtypeChoice("float16", "a CPU emulates float16 slowly: float32 and bfloat16 are faster there")
    if device_kind != "cuda" or capability is None:
        return DtypeChoice(wanted)
    device = f"a device of compute capability {_dotted(capability)}"
    lacking, found = "", wanted
    if found == "bfloat16" and capability < BFLOAT16_CAPABILITY:
        lacking, found = "bfloat16 (8.0 is the first)", "float16"
    if found == "float16" and capability < FLOAT16_CAPABILITY:
        lacking, found = f"{wanted} (5.3 is the first with float16)", "float32"
    if found == wanted:
        return DtypeChoice(wanted)
    range_note = ", whose largest number is 65,504" if found == "float16" else ""
    return DtypeChoice(found, f"{device} has no {lacking}, so {found} is taken instead{range_note}")


def why_not(scheme: Scheme, budget: Budget) -> str:
    """Why `scheme` cannot run on that device, in one sentence with what to do; empty where it can.

    A missing package counts only for devices of this machine.
    """
    if budget.kind not in scheme.devices:
        others = " and ".join(_KINDS.get(each, each) for each in sorted(scheme.devices))
        return f"{scheme.name} runs on {others} only, and {budget.name} is {_KINDS.get(budget.kind, budget.kind)}"
    lowest, capability = scheme.min_capability, budget.compute_capability
    if budget.kind == "cuda" and lowest is not None and capability is not None and capability < lowest:
        return (
            f"{scheme.name} needs compute capability {_dotted(lowest)}, and {budget.description} has "
            f"{_dotted(capability)}"
        )
    return missing_packages(scheme) if budget.is_here else ""


def missing_packages(scheme: Scheme) -> str:
    """What `scheme` needs and is not installed, or too old, with the line that mends it; empty where nothing is."""
    if scheme.backend == "gptq":
        from kani_nb.hardware.gptq_check import needs_of

        lacking = needs_of(scheme.name)
        return "" if lacking is None else f"{lacking.what}: {lacking.why}; {lacking.fix}"
    absent, old, wanted = [], [], []
    for distribution, lowest in scheme.needs:
        installed = installed_version(distribution)
        if installed is not None and release(installed) >= release(lowest):
            continue
        wanted.append(f'"{distribution}>={lowest}"')
        if installed is None:
            absent.append(distribution)
        else:
            old.append(f"{distribution} is {installed}")
    if not wanted:
        return ""
    words = [f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"] if absent else []
    return f"{scheme.name} cannot run: {' and '.join(words + old)}; %pip install -U {' '.join(wanted)}"


def slow_cpu_note(scheme: Scheme, budget: Budget) -> str:
    """What to expect of a scheme on a CPU that lacks the instructions it is fast with; empty where it has them."""
    if budget.kind != "cpu" or not scheme.cpu_features or set(scheme.cpu_features) & set(budget.cpu_features):
        return ""
    return f"slow here: this CPU has no {' or '.join(scheme.cpu_features)}"


def cpu_features(cpu_info: Path = _CPU_INFO) -> tuple[str, ...]:
    """The instruction sets that schemes look at and this CPU has, by Linux's names. Loads torch except on Linux."""
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_int8", "amx_bf16", "asimd")
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _features_torch_knows()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = set(found[1].split()) if found else set()
    return tuple(each for each in known if each in words)


def _features_torch_knows() -> tuple[str, ...]:
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        return ("asimd",)
    level = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ("avx2", "avx512f"), "AVX2": ("avx2",)}.get(level, ())


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


_KINDS = {"cuda": "a CUDA device", "cpu": "a CPU", "mps": "an Apple GPU", "disk": "a disk"}
