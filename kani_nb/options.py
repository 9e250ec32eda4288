"""The options of the magics, in tables that make the command line, its help, its completion and its printed form.

One table for all of them, so that they cannot drift apart. Nothing here knows what an engine does with a value.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from kani_nb._arguments import in_plain_words
from kani_nb.errors import ConfigError, did_you_mean
from kani_nb.quantization import DTYPES, STORAGES, dtype_name

#: Options that may be given again, each time for one more value.
_REPEATED = ("stop_strings", "eos_token_id", "llm_int8_skip_modules")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a magic: `--flag VALUE`, what it sets, and one line of help."""

    flag: str
    dest: str
    help: str
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    of: Literal["engine", "generation", "quantization"] = "engine"
    metavar: str = ""

    @property
    def is_repeated(self) -> bool:
        """Whether it may be given again, each time for one more value."""
        return self.dest in _REPEATED

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare the option, without a default, so that only what was said is set."""
        common: dict[str, Any] = {"dest": self.dest, "default": argparse.SUPPRESS, "help": self.help}
        if self.type is bool:
            parser.add_argument(self.flag, action=argparse.BooleanOptionalAction, **common)
        elif self.is_repeated:
            parser.add_argument(self.flag, action="append", type=self.type, metavar=self.metavar or "TEXT", **common)
        else:
            metavar = self.metavar or self.dest.upper()
            parser.add_argument(self.flag, type=self.type, choices=self.choices or None, metavar=metavar, **common)

    def to_words(self, value: Any) -> list[str]:
        """The words that set the option to `value`, quoted for the command line."""
        if self.type is bool:
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        values = (value or ("none",)) if isinstance(value, tuple) else (value,)
        return [f"{self.flag}={shlex.quote(str(each))}" for each in values]


GENERATION_OPTIONS = (
    Option(
        "--max-new-tokens",
        "max_new_tokens",
        "most tokens of an answer (default 512)",
        int,
        of="generation",
        metavar="N",
    ),
    Option("--min-new-tokens", "min_new_tokens", "fewest tokens of an answer", int, of="generation", metavar="N"),
    Option("--sample", "do_sample", "draw tokens at random instead of taking the likeliest", bool, of="generation"),
    Option("--temperature", "temperature", "randomness of sampling; 0 is greedy", float, of="generation", metavar="T"),
    Option("--top-k", "top_k", "sample among the K likeliest tokens", int, of="generation", metavar="K"),
    Option("--top-p", "top_p", "sample among the likeliest tokens that sum to P", float, of="generation", metavar="P"),
    Option(
        "--min-p", "min_p", "drop tokens less likely than P times the likeliest", float, of="generation", metavar="P"
    ),
    Option("--typical-p", "typical_p", "locally typical sampling", float, of="generation", metavar="P"),
    Option(
        "--repetition-penalty",
        "repetition_penalty",
        "above 1 discourages repetition",
        float,
        of="generation",
        metavar="X",
    ),
    Option(
        "--no-repeat-ngram-size",
        "no_repeat_ngram_size",
        "never repeat N tokens in a row",
        int,
        of="generation",
        metavar="N",
    ),
    Option("--seed", "seed", "make sampling repeatable", int, of="generation", metavar="N"),
    Option(
        "--eos-token-id",
        "eos_token_id",
        "token that ends an answer (may be given again)",
        int,
        of="generation",
        metavar="ID",
    ),
    Option("--stop", "stop_strings", "end the answer before this text (may be given again)", of="generation"),
)

QUANTIZATION_OPTIONS = (
    Option(
        "--quant",
        "scheme",
        "precision of the weights in fewer bits: int8, nf4, fp4, cpu-int8, cpu-int4, ...",
        of="quantization",
    ),
    Option("--double-quant", "double_quant", "quantize the scales of 4-bit weights too", bool, of="quantization"),
    Option(
        "--compute-dtype",
        "compute_dtype",
        "what 4-bit weights are multiplied in",
        lambda text: dtype_name(text, "compute_dtype"),
        choices=DTYPES,
        of="quantization",
    ),
    Option(
        "--quant-storage",
        "quant_storage",
        "what the 4-bit codes are stored in (default uint8)",
        choices=STORAGES,
        of="quantization",
    ),
    Option(
        "--group-size",
        "group_size",
        "input weights that share a scale (cpu-int4, gptq)",
        int,
        of="quantization",
        metavar="N",
    ),
    Option(
        "--llm-int8-threshold",
        "llm_int8_threshold",
        "int8: hidden states above it in half precision (default 6)",
        float,
        of="quantization",
        metavar="X",
    ),
    Option(
        "--llm-int8-skip-modules",
        "llm_int8_skip_modules",
        "module to leave as it is (may be given again)",
        of="quantization",
        metavar="NAME",
    ),
    Option(
        "--llm-int8-has-fp16-weight",
        "llm_int8_has_fp16_weight",
        "int8: keep half-precision weights too, to train them",
        bool,
        of="quantization",
    ),
    Option(
        "--llm-int8-enable-fp32-cpu-offload",
        "llm_int8_enable_fp32_cpu_offload",
        "leave modules on the CPU unquantized",
        bool,
        of="quantization",
    ),
)

LOAD_OPTIONS = (
    Option("--revision", "revision", "branch, tag or commit of the repository"),
    Option("--dtype", "dtype", "precision of the weights", lambda text: dtype_name(text), choices=DTYPES),
    *QUANTIZATION_OPTIONS,
    Option("--device", "device", "cuda, cuda:1, mps or cpu (default: the best there is)"),
    Option("--device-map", "device_map", "auto, balanced, sequential, a device, or JSON"),
    Option("--max-memory", "max_memory", "most of each device, as 0=10GiB,cpu=30GiB"),
    Option("--allow-offload", "allow_offload", "let what does not fit run from main memory or the disk, slowly", bool),
    Option("--offload-folder", "offload_folder", "folder for weights that are offloaded to the disk"),
    Option("--cache-quantized", "cache_quantized", "keep the quantized weights on the disk for the next time", bool),
    Option("--max-context-size", "max_context_size", "tokens of prompt and answer together", int, metavar="N"),
    Option("--cache-gib", "cache_gib", "GiB of KV cache kept for reuse; 0 turns it off", float, metavar="GIB"),
    Option("--threads", "threads", "CPU threads of a generation", int, metavar="N"),
    Option("--local-only", "local_only", "never ask the network", bool),
    Option("--trust-remote-code", "trust_remote_code", "run Python code that the repository ships", bool),
    Option("--allow-pickle", "allow_pickle", "load pickled weights, which can run code too", bool),
    *GENERATION_OPTIONS,
)


def split_words(line: str) -> list[str]:
    """The words of a line, quoted as in a shell; on Windows a backslash is a part of a path.

    Raises:
        ValueError: a quote is not closed.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.name == "nt":
        lexer.escape = ""
    return list(lexer)


class LineParser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are `ConfigError`s and which never exits the process."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(in_plain_words(message), fix=f"{self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(message or f"exit status {status}")

    def parse_line(self, line: str) -> argparse.Namespace:
        """Parse one command line, quoted as in a shell.

        Raises:
            ConfigError: an option that is not known (with the near misses), a bad value, or an unclosed quote.
        """
        try:
            words = split_words(line)
        except ValueError as error:
            raise ConfigError(f"cannot read {line!r}", why=str(error).lower()) from None
        known = sorted(flag for action in self._actions for flag in action.option_strings if flag.startswith("--"))
        for word in words:
            flag = word.split("=", 1)[0]
            if flag == "--":
                break
            if flag.startswith("--") and flag not in known and sum(each.startswith(flag) for each in known) != 1:
                raise ConfigError(
                    f"unknown option {flag!r}", fix=did_you_mean(flag, known) or f"{self.prog} --help lists them"
                )
        return self.parse_args(words)
