"""`%load_engine auto`: the largest model of a short list that fits this machine and answers quickly enough, and why.

`choose_auto` decides from what it is told, and always the same; `auto_config` looks at the machine, its caches and the
network first. Blocking: call it in a worker thread.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.config import EngineConfig, parse_config
from kani_nb.engines.auto_models import AUTO_MODELS, AutoModel
from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.errors import DoesNotFitError, KaniNbError, ModelUnavailableError
from kani_nb.hardware.plans import Budget, Plan, PlanRow
from kani_nb.hardware.schemes import find_scheme
from kani_nb.hardware.shapes import ModelShape
from kani_nb.plan_text import count_of_parameters, disk, row_in_words, speed
from kani_nb.planning import end_if, speeds_of

NAME = "auto"
#: The least context that a chat is planned with, and the most that is taken without being asked for.
_LEAST_CONTEXT, _MOST_CONTEXT = 4096, 32768
#: A person reads about 250 words a minute, which is 5 to 6 tokens a second; of the bandwidth's ceiling a fifth to a
#: third was reached on a CPU (SmolLM2-135M in float32, bfloat16 and cpu-int8).
_READING_TOKENS_PER_S, _REACHED = 5.0, 0.3
LEAST_CEILING_TOKENS_PER_S = _READING_TOKENS_PER_S / _REACHED
#: Below, 4 bits cost more than a step of size gains: 0.28 nats at 135 M parameters.
_FEWEST_FOR_4_BITS = 1_000_000_000
_FEWEST_BITS, _FOUR_BITS_AT_MOST = 4.0, 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A model and how to load it.

    Attributes:
        config: what was asked for, with the model and its precision filled in.
        why: one or two sentences.
        plan: what it was taken from.
    """

    config: EngineConfig
    why: str
    plan: Plan


def choose_auto(
    budgets: Sequence[Budget],
    *,
    is_offline: bool = False,
    cached: Collection[str] = (),
    free_disk_bytes: int | None = None,
    asked: EngineConfig | None = None,
    cpu_speeds: Mapping[str, float] | None = None,
) -> Choice:
    """The largest model of the list that fits `budgets`, in the precision that its plan recommends.

    It must fit with 4,096 tokens of context and leave room on the disk, and the memory must be read fast enough for an
    answer that comes as fast as one reads; where that is true of none, the smallest is taken. Below a billion
    parameters no 4-bit scheme is taken. The context is then the largest that fits, up to 32,768 tokens.

    Args:
        budgets: the devices, in the order they are filled.
        is_offline: the Hub cannot be asked; then only what is in `cached` or in the package index comes into question.
        cached: aliases of the models on this disk.
        free_disk_bytes: room for a download; None does not count.
        asked: what the user wants beside the model: scheme, dtype, device, context and the rest are kept.
        cpu_speeds: as `planner.make_plan` takes them.

    Raises:
        DoesNotFitError: not even the smallest fits.
        ModelUnavailableError: none that fits can be had from here.
    """
    wish = asked or EngineConfig(NAME)
    search = _Search(tuple(budgets), is_offline, frozenset(cached), free_disk_bytes, wish, cpu_speeds)
    for model in reversed(AUTO_MODELS):
        found = search.look_at(model)
        if isinstance(found, Choice):
            return found
        search.refused.append(found)
    for model in AUTO_MODELS:  # nothing is quick enough: then what is least slow
        found = search.look_at(model, must_be_quick=False)
        if isinstance(found, Choice):
            return found
    raise search.refusal()


@dataclass(frozen=True, slots=True)
class _Refused:
    """A model that was looked at and left: why, in a clause, and whether it only cannot be had."""

    name: str
    reason: str
    is_out_of_reach: bool = False


class _Search:
    """One pass over the list.

    Attributes:
        refused: what was looked at and left, the largest first.
    """

    def __init__(
        self,
        budgets: tuple[Budget, ...],
        is_offline: bool,
        cached: frozenset[str],
        free_disk_bytes: int | None,
        asked: EngineConfig,
        cpu_speeds: Mapping[str, float] | None,
    ) -> None:
        self._budgets = budgets
        self._is_offline = is_offline
        self._cached = cached
        self._free_disk_bytes = free_disk_bytes
        self._asked = asked
        self._cpu_speeds = cpu_speeds
        self.refused: list[_Refused] = []

    def look_at(self, model: AutoModel, *, must_be_quick: bool = True) -> Choice | _Refused:
        """The choice of `model`, or why it is none."""
        if (reason := self._outright(model, must_be_quick)) is not None:  # spares building it
            return _Refused(model.name, reason)
        if self._is_offline and model.name not in self._cached and not self._is_packaged(model):
            return _Refused(model.name, "is not on this disk, and the Hub cannot be asked", is_out_of_reach=True)
        plan = self._plan(model)
        fitting = [row for row in plan.rows if row.fits and self._is_wanted(model, row)]
        if not fitting:
            return _Refused(model.name, f"takes more than {in_words(plan.usable_bytes)}")
        quick = [row for row in fitting if not must_be_quick or _is_quick(row.ceiling_tokens_per_s)]
        if not quick:
            fastest = max(row.ceiling_tokens_per_s or 0.0 for row in fitting)
            return _Refused(model.name, f"fits, and would give at most {speed(fastest)}")
        row = plan.best if plan.best in quick else max(quick, key=lambda each: (each.has_headroom, each.weight_bytes))
        assert row is not None
        if not self._has_room_on_disk(model, row):
            reason = f"is a download of {disk(row.disk_bytes)}, and {disk(self._free_disk_bytes or 0)} of disk are free"
            return _Refused(model.name, reason, is_out_of_reach=True)
        return self._choice(model, row, plan, is_quick=must_be_quick)

    def _outright(self, model: AutoModel, must_be_quick: bool) -> str | None:
        """Why no scheme could be had of it, from its number of parameters alone; None where it must be looked at."""
        first = self._budgets[0]
        usable = sum(each.usable_bytes for each in self._budgets if each.kind == first.kind)
        least = model.alias.parameters * _FEWEST_BITS / 8
        if least > usable:
            return f"takes more than {in_words(usable)}"
        # An embedding that is only looked up is not read: a tenth at most.
        ceiling = None if first.bandwidth_bytes_per_s is None else first.bandwidth_bytes_per_s / (0.9 * least)
        return None if _is_quick(ceiling) or not must_be_quick else f"would give less than {speed(ceiling or 0.0)}"

    def _is_packaged(self, model: AutoModel) -> bool:
        """Whether it can come from the package index, which may be asked where the Hub may not."""
        return model.alias.wheel is not None and not self._asked.local_only

    def _plan(self, model: AutoModel) -> Plan:
        from kani_nb.hardware.planner import make_plan

        asked = self._asked
        return make_plan(
            auto_shape(model.name),
            name=model.name,
            context_tokens=asked.max_context_size or min(_LEAST_CONTEXT, model.context_tokens),
            budgets=self._budgets,
            quantizations=None if asked.quantization.is_none else (asked.quantization,),
            dtype=asked.dtype,
            cpu_speeds=self._cpu_speeds,
        )

    def _is_wanted(self, model: AutoModel, row: PlanRow) -> bool:
        """Whether it can be made of the checkpoint while it is loaded; and four bits are not for the smallest."""
        scheme = find_scheme(row.settings.scheme)
        if not self._asked.quantization.is_none:
            return True
        if scheme.backend not in ("torch", "bitsandbytes", "packed"):
            return False
        is_wide = row.settings.is_none or scheme.bits_per_weight(row.settings) > _FOUR_BITS_AT_MOST
        return is_wide or model.alias.parameters >= _FEWEST_FOR_4_BITS

    def _has_room_on_disk(self, model: AutoModel, row: PlanRow) -> bool:
        if self._free_disk_bytes is None or model.name in self._cached:
            return True
        return row.disk_bytes < self._free_disk_bytes

    def _choice(self, model: AutoModel, row: PlanRow, plan: Plan, *, is_quick: bool) -> Choice:
        context = self._context(model, row)
        found = parse_config(row.line)
        config = replace(
            self._asked,
            model=model.name,
            dtype=found.dtype,
            quantization=found.quantization,
            device=self._asked.device or found.device,
            device_map=self._asked.device_map or found.device_map,
            max_context_size=None if context == model.context_tokens else context,
        )
        return Choice(config=config, why=self._why(model, row, plan, context, is_quick), plan=plan)

    def _context(self, model: AutoModel, row: PlanRow) -> int:
        """The tokens asked for, or the most that fit, in whole thousands of two."""
        if self._asked.max_context_size is not None:
            return self._asked.max_context_size
        most = min(model.context_tokens, _MOST_CONTEXT, row.most_context_tokens)
        return most if most == model.context_tokens else most // 1024 * 1024

    def _why(self, model: AutoModel, row: PlanRow, plan: Plan, context: int, is_quick: bool) -> str:
        devices = [share.device for share in row.shares]
        where = " + ".join(devices) if len(devices) <= 2 else f"{len(devices)} devices"
        takes = [f"takes {in_words(row.peak_bytes)} of {in_words(plan.usable_bytes)} on {where}"]
        if row.ceiling_tokens_per_s is not None:
            takes.append(f"can give up to {speed(row.ceiling_tokens_per_s)}")
        if model.name in self._cached:
            got = "is on this disk"
        elif self._is_offline and model.alias.wheel is not None:
            got = f"comes from the package index ({disk(model.alias.wheel.wheel_bytes)})"
        else:
            got = f"is a download of {disk(row.disk_bytes)}"
        size = count_of_parameters(model.alias.parameters)
        here = " of those that can be had without the Hub" if self._is_offline else ""
        rank = f"the largest{here} that fits and should keep pace with a reader"
        if not is_quick:
            rank = "the smallest that can be had, and none would keep pace with a reader here"
        facts = f"{size} parameters, {model.alias.licence}, {context:,} tokens of context"
        said = (
            f"{model.name} in {row_in_words(row)} ({facts}): of {len(AUTO_MODELS)} chat models it is {rank}. "
            f"It {', '.join(takes)}, and {got}."
        )
        if self.refused and is_quick:
            larger = self.refused[-1]
            said += f" The next larger, {larger.name}, {larger.reason}."
        return said

    def refusal(self) -> KaniNbError:
        """What to raise when nothing is left."""
        smallest = self.refused[-1]
        why = f"the smallest, {smallest.name}, {smallest.reason}"
        if smallest.is_out_of_reach:
            return ModelUnavailableError(
                "no model of the short list can be had from here",
                why=why,
                fix="run `kani-nb prefetch smollm2` where there is a network, or name a model on this disk",
            )
        return DoesNotFitError(
            "no model of the short list fits this machine",
            why=why,
            fix="%unload_engine what is loaded, or close what else holds memory"
            if self._asked.max_memory is None
            else f"allow more than --max-memory={self._asked.max_memory}",
        )


@cache
def auto_shape(name: str) -> ModelShape:
    """The shape of the model of the list with that alias. Kept, since it never changes."""
    from kani_nb.hardware.shape_reading import shape_of

    return shape_of(next(each for each in AUTO_MODELS if each.name == name).config(), name)


def _is_quick(ceiling_tokens_per_s: float | None) -> bool:
    return ceiling_tokens_per_s is None or ceiling_tokens_per_s >= LEAST_CEILING_TOKENS_PER_S


def auto_config(
    asked: EngineConfig, *, progress: ProgressCallback | None = None, cancelled: threading.Event | None = None
) -> Choice:
    """What `auto` means on this machine now. Blocks: looks at devices and caches, and asks the Hub for one small file.

    Where the Hub does not answer, the choice is made again among what can be had without it.

    Args:
        asked: the configuration of a line whose model is `auto`; all else in it is kept.
        progress: called on the calling thread.
        cancelled: ends it at the next step.

    Raises:
        DoesNotFitError, ModelUnavailableError: as `choose_auto`.
        ConfigError: a device or `max_memory` that is not there.
    """
    from kani_nb.engines.hub_http import is_offline
    from kani_nb.engines.sources_cache import free_bytes, hub_cache_folder
    from kani_nb.hardware.budgets import budgets_here

    tell = progress or (lambda _event: None)
    tell(LoadProgress("looking", "at this machine"))
    budgets = _on(asked.device, budgets_here(asked.max_memory, with_bandwidth=True))
    cached = frozenset(model.name for model in AUTO_MODELS if _is_cached(model.name))
    offline = asked.local_only or is_offline()
    room = free_bytes(hub_cache_folder())
    tell(LoadProgress("choosing", "the largest model that fits"))
    circumstances: dict[str, Any] = {
        "cached": cached, "free_disk_bytes": room, "asked": asked, "cpu_speeds": speeds_of(budgets)
    }  # fmt: skip
    choice = choose_auto(budgets, is_offline=offline, **circumstances)
    end_if(cancelled, NAME)
    if offline or choice.config.model in cached:
        return choice
    tell(LoadProgress("asking", f"the Hub for {choice.config.model}"))
    trouble = _unreachable(choice.config.model, cancelled)
    if trouble is None:
        return choice
    again = choose_auto(budgets, is_offline=True, **circumstances)
    return replace(again, why=f"{again.why} The Hub could not be asked: {trouble}.")


def _on(device: str | None, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """The budgets that the user's own choice of a device leaves.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return budgets
    from kani_nb.hardware.devices import free_bytes
    from kani_nb.hardware.placement import device_name

    name = device_name(device)
    free_bytes(name)
    return tuple(each for each in budgets if each.name == name)


def _is_cached(name: str) -> bool:
    """Whether all files of an alias are on this disk."""
    from kani_nb.engines.sources import resolve

    try:
        resolve(name, local_only=True)
    except KaniNbError:
        return False
    return True


def _unreachable(name: str, cancelled: threading.Event | None) -> str | None:
    """Why the Hub cannot be asked for `name` now, in a clause; None where it answers."""
    from kani_nb.engines.sources_config import config_of

    try:
        config_of(name, cancelled=cancelled)
    except ModelUnavailableError as error:
        end_if(cancelled, NAME)
        return error.why or error.what
    return None
