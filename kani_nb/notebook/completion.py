"""Tab completion of the magics' first line: options, verbs, values, names of models, engines and conversations.

`complete` is pure; two adapters give it to IPython: a matcher that silences the others where there is one (IPython
8.6), and the older `complete_command` hook. Nothing is asked of the network, and no model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kani_nb.options import GENERATION_OPTIONS, LOAD_OPTIONS, Option

NameSource = Callable[[], Sequence[str]]
_MOST_PATHS = 200


@dataclass(frozen=True, slots=True)
class Grammar:
    """What may follow one magic on its line.

    Attributes:
        options: flags that may stand anywhere; `options[flag]` gives the values of one that takes some.
        first: names that may stand as the first word.
        after: for a first word (a verb), names that may follow it.
        files_after: first words (verbs) that a path may follow.
        file_flags: flags of `options` whose value may be a path.
        list_flags: flags of `options` whose value is a list with commas.
        first_is_file: the first word may be a path, when it looks like one.
    """

    options: Mapping[str, NameSource] = field(default_factory=dict)
    first: NameSource = tuple
    after: Mapping[str, NameSource] = field(default_factory=dict)
    files_after: Sequence[str] = ()
    file_flags: Sequence[str] = ()
    list_flags: Sequence[str] = ()
    first_is_file: bool = False


@dataclass(frozen=True, slots=True)
class Completions:
    """What the word under the cursor may become."""

    fragment: str
    names: tuple[str, ...]


def no_names() -> Sequence[str]:
    """For values that nobody can list."""
    return ()


def options_of(options: Sequence[Option]) -> dict[str, NameSource]:
    """The flags of `options` with the values they may take."""
    found: dict[str, NameSource] = {}
    for option in options:
        found[option.flag] = lambda choices=option.choices: choices  # type: ignore[misc]
        if option.type is bool:
            found[f"--no-{option.flag[2:]}"] = no_names
    return found


LOAD_FLAGS = options_of(LOAD_OPTIONS)
GENERATION_FLAGS = options_of(GENERATION_OPTIONS)


def complete(grammars: Mapping[str, Grammar], line: str) -> Completions | None:
    """What `line`, up to the cursor, may go on with; None where it is not a line of ours."""
    magic, space, rest = line.lstrip().partition(" ")
    grammar = grammars.get(magic)
    if grammar is None or not space:
        return None
    words = rest.split()
    fragment = "" if not rest or rest[-1].isspace() else words.pop()
    flag, equals, value = fragment.partition("=")
    if equals and flag in grammar.file_flags:
        return Completions(value, _paths(value))
    if equals and flag in grammar.options:
        return _values(grammar, flag, value)
    if fragment.startswith("-"):
        return _matching(fragment, list(grammar.options))
    if words and words[-1] in grammar.file_flags:
        return Completions(fragment, _paths(fragment))
    if words and words[-1] in grammar.options:
        found = _values(grammar, words[-1], fragment)
        if found.names:
            return found
    plain = [word for word in words if not word.startswith("-")]
    if not plain:
        if grammar.first_is_file and fragment.startswith((".", "/", "~")):
            return Completions(fragment, _paths(fragment))
        return _matching(fragment, grammar.first())
    if len(plain) == 1 and plain[0] in grammar.files_after:
        return Completions(fragment, _paths(fragment))
    if len(plain) == 1 and plain[0] in grammar.after:
        return _matching(fragment, grammar.after[plain[0]]())
    return Completions(fragment, ())


def _values(grammar: Grammar, flag: str, fragment: str) -> Completions:
    """What the value of a flag may become; of a list its last item."""
    head, comma, _ = fragment.rpartition(",") if flag in grammar.list_flags else ("", "", "")
    return _matching(fragment, [f"{head}{comma}{name}" for name in grammar.options[flag]()])


def _paths(fragment: str) -> tuple[str, ...]:
    """Files and folders that `fragment` may become; folders end in a slash."""
    head, slash, tail = fragment.rpartition("/")
    folder = Path(head + slash).expanduser() if slash else Path()
    try:
        found = sorted((each.name, each.is_dir()) for each in folder.iterdir())
    except OSError:
        return ()
    return tuple(
        f"{head}{slash}{name}{'/' if is_folder else ''}"
        for name, is_folder in found
        if name.startswith(tail) and (tail.startswith(".") or not name.startswith("."))
    )[:_MOST_PATHS]


def _matching(fragment: str, names: Sequence[str]) -> Completions:
    return Completions(fragment, tuple(name for name in names if name.startswith(fragment)))


def install(shell: Any, grammars: Mapping[str, Grammar]) -> Callable[[], None]:
    """Complete these magics in `shell`; the result undoes it."""
    from IPython.core import completer

    if hasattr(completer, "context_matcher"):
        return _install_matcher(shell.Completer, grammars)
    return _install_hook(shell, grammars)


def _install_matcher(completer: Any, grammars: Mapping[str, Grammar]) -> Callable[[], None]:
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher(identifier="kani_nb")
    def match(context: Any) -> dict[str, Any]:
        lines = context.full_text.split("\n")
        # The body of a cell magic is not ours; line magics stand on any line of code.
        is_body = context.cursor_line > 0 and lines[0].startswith("%%")
        found = None if is_body else complete(grammars, lines[context.cursor_line][: context.cursor_position])
        if found is None:
            return {"completions": [], "suppress": False}
        # With nothing at all, IPython would offer Python's own names.
        names = [SimpleCompletion(text=name, type="magic option") for name in found.names or (found.fragment,)]
        return {"completions": names, "suppress": True, "matched_fragment": found.fragment, "ordered": True}

    completer.custom_matchers.append(match)
    return lambda: completer.custom_matchers.remove(match) if match in completer.custom_matchers else None


def _install_hook(shell: Any, grammars: Mapping[str, Grammar]) -> Callable[[], None]:
    def match(_completer: Any, event: Any) -> list[str]:
        found = complete(grammars, event.text_until_cursor)
        if found is None:
            return []
        # The completer replaces the word it found itself, which may begin later than ours (after a colon).
        symbol = str(event.symbol)
        head = found.fragment[: len(found.fragment) - len(symbol)] if found.fragment.endswith(symbol) else ""
        return [name[len(head) :] for name in found.names]

    def undo() -> None:
        chains = shell.strdispatchers.get("complete_command")
        for magic in grammars:
            chain = chains.strs.get(magic) if chains is not None else None
            if chain is None:
                continue
            # Methods are compared by equality: each access makes a new one.
            chain.chain[:] = [entry for entry in chain.chain if getattr(entry[1], "__func__", entry[1]) is not match]
            if not chain.chain:
                del chains.strs[magic]

    for magic in grammars:
        shell.set_hook("complete_command", match, str_key=magic)
    return undo
