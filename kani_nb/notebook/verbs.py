"""Verbs under a noun: `%chat undo 2`, `%engine list`. One table makes the dispatch, the help and the completion.

A verb gets the rest of its line as it was typed, since some take free text; the readers below turn it into values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kani_nb.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb.

    Attributes:
        usage: what it is called with; the options that it takes stand in it.
        help: what it does.
        run: gets the rest of the line.
        parses: `run` has a parser of its own, which refuses unknown options.
        takes_text: what follows is text, in which only the first word can be an option.
        details: more lines of its own help, made when asked for.
    """

    usage: str
    help: str
    run: Callable[[str], None]
    parses: bool = False
    takes_text: bool = False
    details: Callable[[], str] | None = None

    @property
    def name(self) -> str:
        """Its first word."""
        return self.usage.split()[0]

    @property
    def brief_usage(self) -> str:
        """Its usage with several options summed up."""
        without = re.sub(r" \[--[^]]*\]", "", self.usage)
        return self.usage if len(self.options) < 2 else f"{without} [OPTIONS]"

    @property
    def takes_arguments(self) -> bool:
        """Whether anything may follow it."""
        return len(self.usage.split()) > 1

    @property
    def options(self) -> list[str]:
        """The options in its usage."""
        return re.findall(r"--[\w-]+", self.usage)


class VerbTable:
    """The verbs of one magic.

    Args:
        prog: the magic, `%chat`.
        verbs: in the order of the help.
        examples: lines of the help that show the most usual ones.
        hint: what to say where somebody meant something else altogether.
    """

    def __init__(self, prog: str, verbs: Sequence[Verb], *, examples: Sequence[str] = (), hint: str = "") -> None:
        self._prog = prog
        self._verbs = {verb.name: verb for verb in verbs}
        self._examples = tuple(examples)
        self._hint = hint

    @property
    def names(self) -> list[str]:
        """The verbs' names, and `help`."""
        return [*self._verbs, "help"]

    @property
    def help_text(self) -> str:
        """Every verb with its arguments, then examples."""
        lines = {verb.brief_usage: verb.help for verb in self._verbs.values()} | {"help": "this list"}
        width = max(len(usage) for usage in lines) + 2
        text = [f"{self._prog} VERB", "", *(f"  {usage:<{width}}{help_}" for usage, help_ in lines.items())]
        if self._examples:
            text += ["", "Examples:", *(f"  {line}" for line in self._examples)]
        return "\n".join(text)

    def dispatch(self, line: str) -> None:
        """Run the verb that `line` names; an empty line and `help` print the help.

        Raises:
            ConfigError: no verb has this name (with the near misses), or it takes no argument.
        """
        name, _, rest = line.strip().partition(" ")
        if name in ("", "help", "--help", "-h"):
            print(self.help_text)  # noqa: T201 - the answer to a request for it
            return
        verb = self._verbs.get(name)
        if verb is None:
            guess = did_you_mean(name, self.names)
            fix = "; ".join(each for each in (guess, self._hint, f"{self._prog} help lists the verbs") if each)
            raise ConfigError(f"{self._prog} has no verb {name!r}", fix=fix)
        rest = rest.strip()
        if rest in ("--help", "-h"):
            lines = [f"{self._prog} {verb.usage}", "", f"  {verb.help}"]
            lines += ["", verb.details()] if verb.details is not None else []
            print("\n".join(lines))  # noqa: T201 - the answer to a request for it
            return
        if not verb.parses:
            self._refuse_options(verb, rest)
        if rest and not verb.takes_arguments:
            fix = "; ".join(each for each in (f"{self._prog} {name}", self._hint) if each)
            raise ConfigError(f"{self._prog} {name} takes nothing after it", why=f"got {rest[:60]!r}", fix=fix)
        verb.run(rest)

    def _refuse_options(self, verb: Verb, rest: str) -> None:
        for word in rest.split()[: 1 if verb.takes_text else None]:
            if word.startswith("--") and word not in verb.options:
                known = verb.options
                fix = did_you_mean(word, known) or f"{self._prog} {verb.usage}"
                raise ConfigError(f"{self._prog} {verb.name} has no option {word[:60]!r}", fix=fix)


def required(rest: str, usage: str) -> str:
    """The text after a verb.

    Raises:
        ConfigError: there is none.
    """
    if not rest:
        raise ConfigError(f"{usage.split()[0]} {usage.split()[1]} needs something after it", fix=usage)
    return rest


def unquoted(rest: str) -> str:
    """A name without the one pair of quotes around it."""
    is_quoted = len(rest) > 2 and rest[0] in "'\"" and rest[-1] == rest[0] and rest[0] not in rest[1:-1]
    return rest[1:-1].strip() if is_quoted else rest


def whole_number(rest: str, usage: str, default: int | None = None) -> int | None:
    """The positive number after a verb, or `default` where nothing follows.

    Raises:
        ConfigError: something else follows.
    """
    if not rest:
        return default
    if not (rest.isascii() and rest.isdecimal()) or int(rest) < 1:
        raise ConfigError(f"{rest[:60]!r} is not a number from 1", fix=usage)
    return int(rest)
