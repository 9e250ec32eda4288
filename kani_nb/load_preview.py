"""What a load would take, for any settings, in milliseconds: the model is read once, and planned anew for each change.

What the engine panel draws beside its controls. Whether a load fits is decided by the engine's own code, so that
nothing is promised here that a load would refuse, and nothing refused that it would do. No weights are touched.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kani_nb.config import EngineConfig
from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.engines.registry import create_engine, engine_class, parse_spec
from kani_nb.errors import DoesNotFitError, KaniNbError
from kani_nb.hardware.plans import Budget, PlanRow
from kani_nb.plan_text import count_of_parameters
from kani_nb.planning import FoundConfig, end_if, find_config

if TYPE_CHECKING:
    from kani_nb.engines.llamacpp.planning import GgufWeights
    from kani_nb.hardware.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPreview:
    """What a load would take and where, or why it would be refused.

    Attributes:
        budgets: the devices of this machine, with what may be used of each.
        row: the plan; None where nothing can be known before loading.
        precision: what the weights would be held in, in a word or two.
        error: why `%load_engine` would refuse it; None where it would not.
        notes: what was decided on the way, in sentences.
    """

    budgets: tuple[Budget, ...] = ()
    row: PlanRow | None = None
    precision: str = ""
    error: KaniNbError | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReading:
    """A model as far as its configuration tells; made by `read_model`.

    Attributes:
        model: as it was asked for.
        engine: the name of the engine that runs it.
        title: its architecture and size, or what runs it; one line.
        window_tokens: the longest context; None where that is not known.
        shape: what it is made of; None where that cannot be known without its weights.
        note: where something was not to be had, a sentence about that.
    """

    model: str
    engine: str
    title: str
    window_tokens: int | None = None
    shape: ModelShape | None = None
    note: str = ""
    _found: FoundConfig | None = field(default=None, repr=False)
    _gguf: GgufWeights | None = field(default=None, repr=False)

    def preview(self, config: EngineConfig, *, also_free: Mapping[str, int] | None = None) -> LoadPreview:
        """What loading `config` would take, where `config.model` is this model. About 10 ms.

        Args:
            config: every setting of the load.
            also_free: bytes by device that are held now and will have been given back.
        """
        from kani_nb.hardware.budgets import budgets_here

        try:
            budgets = budgets_here(config.max_memory, also_free=also_free)
        except KaniNbError as error:
            return LoadPreview(budgets=budgets_here(also_free=also_free), error=error)
        try:
            create_engine(config)  # refuses options that the engine does not have
            if self._found is None:
                return LoadPreview(budgets=budgets)
            if self._gguf is not None:
                return self._of_gguf(config, budgets)
            return self._of_transformers(config, budgets, also_free)
        except DoesNotFitError as error:
            return LoadPreview(budgets=budgets, row=error.row, precision=_precision(error.row), error=error)
        except KaniNbError as error:
            return LoadPreview(budgets=budgets, error=error)

    def _of_transformers(
        self, config: EngineConfig, budgets: tuple[Budget, ...], also_free: Mapping[str, int] | None
    ) -> LoadPreview:
        from kani_nb.engines.huggingface.arguments import request_of
        from kani_nb.engines.huggingface.loading import context_of
        from kani_nb.engines.huggingface.placing import choose_placing

        assert self._found is not None
        request = request_of(replace(config, model=parse_spec(config.model).model or config.model))
        context_of(self._found.config, config.max_context_size, config.model)
        placing = choose_placing(request, self._found.config, shape=self.shape, also_free=also_free)
        precision = placing.dtype if placing.label == "none" else placing.label
        return LoadPreview(
            budgets=budgets,
            row=placing.row,
            precision=precision,
            notes=placing.notes,
        )

    def _of_gguf(self, config: EngineConfig, budgets: tuple[Budget, ...]) -> LoadPreview:
        from kani_nb.engines.llamacpp.planning import make_gguf_plan

        assert self.shape is not None and self._gguf is not None
        plan = make_gguf_plan(self.shape, self._gguf, self.model, context=config.max_context_size, budgets=budgets)
        (row,) = plan.rows
        error = None
        if not row.fits:
            fix = f"--max-context-size {row.most_context_tokens} fits" if row.most_context_tokens else ""
            error = DoesNotFitError(f"{self.model} does not fit", why=row.why_not, fix=fix or "take a smaller model")
        return LoadPreview(budgets=plan.budgets, row=row, precision=row.label, error=error, notes=plan.notes)


def _precision(row: PlanRow | None) -> str:
    return "" if row is None else row.dtype if row.settings.is_none else row.label


def read_model(
    config: EngineConfig,
    *,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> ModelReading:
    """What `config.model` is, from its configuration alone. Blocks: it may ask the Hub, and it imports transformers.

    Raises:
        ConfigError: no engine runs it.
        UnknownModelError, ModelUnavailableError, GatedModelError, ModelFilesError: its configuration cannot be had.
    """
    from kani_nb.hardware.shape_reading import shape_of

    model, spec = config.model, parse_spec(config.model)
    end_if(cancelled, model)
    if model == "auto":
        return ModelReading(model=model, engine="hf", title="the best of a short list that fits, chosen when it loads")
    if spec.engine not in ("hf", "llama2", "llamacpp"):
        kind = engine_class(spec.engine).kind
        return ModelReading(model=model, engine=spec.engine, title=kind.runs if kind is not None else spec.engine)
    name, gguf = spec.model or model, None
    if spec.engine == "llamacpp":
        from kani_nb.engines.llamacpp.planning import gguf_weights

        gguf = gguf_weights(name, model)
        name = gguf.config_from
    if progress is not None:
        progress(LoadProgress("reading", "the configuration"))
    found = find_config(
        name,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
        cancelled=cancelled,
    )
    end_if(cancelled, model)
    shape, note = None, found.note
    try:
        if not getattr(found.config, "is_encoder_decoder", False):
            shape = shape_of(found.config, model, trust_remote_code=config.trust_remote_code)
    except KaniNbError as error:
        note = error.what
    return ModelReading(
        model=model,
        engine=spec.engine,
        title=_title(found.config, shape),
        window_tokens=shape.context_tokens if shape is not None else None,
        shape=shape,
        note=note,
        _found=found if gguf is None or shape is not None else None,
        _gguf=gguf,
    )


def _title(config: Any, shape: ModelShape | None) -> str:
    if shape is None:
        return str((getattr(config, "architectures", None) or [type(config).__name__])[0])
    return f"{shape.architecture}, {count_of_parameters(shape.parameters)} parameters"
