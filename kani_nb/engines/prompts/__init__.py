"""Prompts as pipelines: `PromptPipeline`, its steps, and ready pipelines for models without a chat template."""

from kani_nb.engines.prompts.base import FilteredStep, PipelineStep
from kani_nb.engines.prompts.models import LLAMA2_PIPELINE, LLAMA3_PIPELINE, MISTRAL_V3_PIPELINE
from kani_nb.engines.prompts.pipeline import PromptPipeline
from kani_nb.engines.prompts.steps import ApplyContext

__all__ = [
    "LLAMA2_PIPELINE",
    "LLAMA3_PIPELINE",
    "MISTRAL_V3_PIPELINE",
    "ApplyContext",
    "FilteredStep",
    "PipelineStep",
    "PromptPipeline",
]
