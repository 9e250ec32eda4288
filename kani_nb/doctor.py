"""What is installed, imported, seen and decided on this machine, and for each problem the line that fixes it.

Only looks: the network is never asked, nothing is changed, no model is touched. torch is imported. What is known of the
front end is told by the caller, since this module knows no notebook.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kani_nb.errors import KaniNbError

_GIB = 2**30
#: Less free disk than this will not hold the next model.
_LITTLE_DISK_BYTES = 2 * _GIB
_MOST_DEVICES = 5
_WIDTH = 14

#: Distribution and module name, and whether nothing works without it.
_PACKAGES = (
    ("torch", "torch", True),
    ("transformers", "transformers", True),
    ("accelerate", "accelerate", True),
    ("huggingface-hub", "huggingface_hub", True),
    ("bitsandbytes", "bitsandbytes", False),
    ("pydantic", "pydantic", True),
    ("httpx", "httpx", True),
    ("llguidance", "llguidance", False),
    ("llama-cpp-python", "llama_cpp", False),
    ("kani", "kani", False),
    ("pillow", "PIL", False),
    ("soundfile", "soundfile", False),
    ("ipython", "IPython", True),
    ("ipykernel", "ipykernel", False),
    ("ipywidgets", "ipywidgets", True),
    ("anywidget", "anywidget", True),
    ("plotly", "plotly", True),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was found, and where something is wrong, that and the line that mends it."""

    topic: str
    text: str
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found, in the order to read it in."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that need something done."""
        return tuple(finding for finding in self.findings if finding.problem)

    def to_text(self) -> str:
        """One line per finding, then each problem with its fix."""
        lines = [f"{each.topic:<{_WIDTH}}{each.text}" for each in self.findings if each.text]
        if not self.problems:
            lines.append("No problem was found.")
        lines += [f"! {each.problem}" + (f"\n  → {each.fix}" if each.fix else "") for each in self.problems]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: the findings in order, and the number of problems."""
        return {"findings": [asdict(each) for each in self.findings], "problems": len(self.problems)}


def report(front_end: Mapping[str, str] | None = None) -> Report:
    """Look at this process and its machine. Takes about a second, most of it torch's import.

    Args:
        front_end: what the caller knows of the place it runs in, in words, by topic.
    """
    found = [*_programs(), *_compute(), *_quantization(), *_hub(), *_conversations()]
    found += [Finding(topic, text) for topic, text in (front_end or {}).items()]
    return Report(tuple(found))


def _programs() -> Iterator[Finding]:
    import kani_nb

    yield Finding(
        "kani_nb",
        f"{kani_nb.__version__} · Python {platform.python_version()} · {platform.system()} {platform.machine()}",
    )
    names, missing, changed = [], [], []
    for package, module, is_needed in _PACKAGES:
        installed = _installed(package)
        if installed is None:
            if is_needed:
                missing.append(package)
            continue
        imported = str(getattr(sys.modules.get(module), "__version__", installed))
        names.append(f"{package} {installed}")
        if imported.split("+")[0] != installed.split("+")[0]:
            changed.append(f"{package} is imported as {imported}, and installed as {installed}")
    half = (len(names) + 1) // 2
    yield Finding("packages", " · ".join(names[:half]))
    yield Finding("", " · ".join(names[half:]))
    if missing:
        yield Finding(
            "",
            "",
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            f"%pip install -U {' '.join(missing)}",
        )
    for each in changed:
        yield Finding("", "", each, "restart the kernel")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compute() -> Iterator[Finding]:
    from kani_nb.hardware.devices import choose_threads

    try:
        yield from _devices()
    except (ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        yield Finding("devices", "unknown", f"torch cannot be imported: {reason}", "%pip install -U torch")
    threads = choose_threads()
    yield Finding("CPU threads", f"{threads.threads}: {threads.reason}")


def _devices() -> Iterator[Finding]:
    from kani_nb.hardware.devices import best_device, list_devices

    devices = list_devices()
    for device in devices[:_MOST_DEVICES]:
        memory = f"{device.free_bytes / _GIB:.1f} of {device.total_bytes / _GIB:.1f} GiB free"
        capability = (
            f", capability {'.'.join(map(str, device.compute_capability))}" if device.compute_capability else ""
        )
        yield Finding("device", f"{device.name}: {device.description}, {memory}{capability}")
    has_gpu = len(devices) > 1
    yield Finding("chosen", best_device())
    if not has_gpu and shutil.which("nvidia-smi") is not None:
        import torch

        yield Finding(
            "",
            "",
            f"there is an NVIDIA driver, and torch {torch.__version__} sees no GPU",
            "%pip install -U --force-reinstall torch, then restart the kernel"
            if torch.version.cuda is None
            else "check what nvidia-smi says, and CUDA_VISIBLE_DEVICES",
        )


def _quantization() -> Iterator[Finding]:
    try:
        yield from _schemes()
        yield _bitsandbytes()
        yield from _spilling()
    except (ImportError, OSError):  # torch, whose absence has been told
        return


def _schemes() -> Iterator[Finding]:
    """Which schemes run on the chosen device, and for the others why not; then what the CPU computes them with."""
    from kani_nb.hardware.devices import best_device, list_devices
    from kani_nb.hardware.plans import Budget
    from kani_nb.hardware.precision import cpu_features, slow_cpu_note, why_not
    from kani_nb.hardware.schemes import our_schemes

    chosen = next(device for device in list_devices() if device.name == best_device())
    features = cpu_features()
    budget = Budget(
        name=chosen.name,
        description=chosen.description,
        total_bytes=chosen.total_bytes,
        usable_bytes=chosen.free_bytes,
        compute_capability=chosen.compute_capability,
        cpu_features=features,
    )
    reasons = {scheme.name: why_not(scheme, budget) for scheme in our_schemes()}
    slow = {scheme.name for scheme in our_schemes() if slow_cpu_note(scheme, budget)}
    running = [f"{name} (slow on this CPU)" if name in slow else name for name, why in reasons.items() if not why]
    yield Finding("quantization", f"on {chosen.name}: {', '.join(running)}")
    refused = [each for each in reasons.values() if each]
    if refused:
        yield Finding("not here", " · ".join(refused))
    yield from _cpu_kernels(features)


def _cpu_kernels(features: tuple[str, ...]) -> Iterator[Finding]:
    """What torch computes with on the CPU, and whether its packed low-bit products, tried once, were right."""
    import torch

    from kani_nb.hardware.packed_kernels import kernel_support

    has = f"; this CPU has {', '.join(features)}" if features else ""
    yield Finding("CPU kernels", f"torch computes with {torch.backends.cpu.get_cpu_capability()}{has}")
    tried = [(f"cpu-int{bits}", kernel_support(bits)) for bits in (8, 4)]
    said = [f"{name}: {'right' if support.works else 'not used, ' + support.why}" for name, support in tried]
    yield Finding("packed", f"products tried here, {' · '.join(said)}")


def _bitsandbytes() -> Finding:
    from kani_nb.hardware.bitsandbytes_check import check_bitsandbytes

    problem = check_bitsandbytes()
    if problem is None:
        import torch

        toolkit = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "the CPU"
        return Finding("bitsandbytes", f"{_installed('bitsandbytes')}, with its library for {toolkit}")
    what = f"{problem.what}: {problem.why}" if problem.why else problem.what
    return Finding("bitsandbytes", "cannot be used", what, problem.fix)


def _spilling() -> Iterator[Finding]:
    """Whether the driver may move a model into main memory by itself, and whether it has."""
    from kani_nb.hardware.devices import list_devices
    from kani_nb.hardware.spill import CONTROL_PANEL_SETTING, SEEN_SLOWDOWN, driver_may_spill, spilled_bytes

    cards = [device.name for device in list_devices() if device.name.startswith("cuda")]
    if not cards or not driver_may_spill():
        return
    spilled = spilled_bytes(*cards)
    has = f"has put at least {spilled / _GIB:.1f} GiB" if spilled else "puts what does not fit"
    yield Finding(
        "shared memory",
        f"{spilled / _GIB:.1f} GiB spilled" if spilled else "nothing spilled",
        f"this driver {has} into main memory without an error, and answers were {SEEN_SLOWDOWN} times slower there",
        CONTROL_PANEL_SETTING,
    )


def _hub() -> Iterator[Finding]:
    from kani_nb.engines.hub import cached_models, hub_environment

    try:
        hub = hub_environment()
    except KaniNbError as error:
        yield Finding("Hub", "unknown", str(error.what), error.fix or error.why)
        return
    reach = "offline (HF_HUB_OFFLINE)" if hub.is_offline else "not asked now"
    token = f"token from {hub.token_source}" if hub.token_source else "no token (needed for gated models only)"
    yield Finding("Hub", f"{hub.endpoint}, {reach}; {token}")
    if hub.proxies:
        yield Finding("proxies", " · ".join(f"{name} {url}" for name, url in hub.proxies.items()))
    if hub.ca_bundle:
        problem = "" if hub.ca_bundle_exists else f"the certificates {hub.ca_bundle} are not there"
        yield Finding(
            "certificates", hub.ca_bundle, problem, "correct SSL_CERT_FILE or REQUESTS_CA_BUNDLE" * bool(problem)
        )
    folders = (
        ("Hub's cache", hub.hub_cache, hub.hub_cache_is_writable, hub.hub_cache_free_bytes, "HF_HOME"),
        ("own cache", hub.own_cache, hub.own_cache_is_writable, hub.own_cache_free_bytes, "KANI_NB_CACHE"),
    )
    for topic, folder, is_writable, free, variable in folders:
        problem = ""
        if not is_writable:
            problem = f"{folder} cannot be written"
        elif free < _LITTLE_DISK_BYTES:
            problem = f"only {free / _GIB:.1f} GiB are free at {folder}"
        fix = f"set {variable} to a folder with space that is yours, before the kernel starts" if problem else ""
        yield Finding(topic, f"{folder}, {free / _GIB:.1f} GiB free", problem, fix)
    models = cached_models()
    shown = ", ".join(f"{each.name} ({each.size_bytes / _GIB:.2f} GiB)" for each in models[:4])
    more = f" and {len(models) - 4} more" if len(models) > 4 else ""
    yield Finding("models here", shown + more if models else "none yet: %load_engine smollm2 fetches a small one")


def _conversations() -> Iterator[Finding]:
    from kani_nb.conversation.store import ConversationStore, default_store_path

    path = default_store_path()
    if not path.exists():
        obstacle = _obstacle(path.parent)
        fix = "set KANI_NB_HOME to a folder that you can write to, before the kernel starts" if obstacle else ""
        yield Finding("conversations", str(path) if obstacle else f"{path}, made with the first answer", obstacle, fix)
        return
    try:
        with ConversationStore(path) as store:
            count = len(store.conversations())
            store.check_writable()
    except KaniNbError as error:
        yield Finding("conversations", str(path), f"{error.what}: {error.why}" if error.why else error.what, error.fix)
        return
    yield Finding("conversations", f"{path}, {count} kept")


def _obstacle(folder: Path) -> str:
    """Why the conversations' file cannot be made in `folder`; empty where it can."""
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not nearest.is_dir():
        return f"conversations cannot be kept: {nearest} is not a folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"conversations cannot be kept: {nearest} is read-only"
    return ""
