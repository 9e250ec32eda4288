"""From what a model writes to what it means: its answer, its reasoning, and the tools that it calls."""

from kani_nb.engines.parsers.formats import AnswerFormat, format_of
from kani_nb.engines.parsers.reader import AnswerReader, PlainReader

__all__ = ["AnswerFormat", "AnswerReader", "PlainReader", "format_of"]
