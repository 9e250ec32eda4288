"""Every error this package raises on purpose, in one tree.

    KaniNbError
    ├── ConfigError              an option or a value that cannot be used
    ├── NoEngineError            a chat was asked for before an engine was loaded
    ├── EngineError
    │   ├── UnknownModelError    no such alias, folder, file or repository
    │   ├── ModelUnavailableError  it exists, but cannot be had from here (network, disk, interrupted)
    │   │   └── GatedModelError  its owner must grant access first
    │   ├── ModelFilesError      the files are there and wrong (no weights, truncated, wrong sha256, pickle)
    │   ├── MissingDependencyError  an optional library is not installed
    │   ├── GenerationError      something failed inside generation
    │   ├── OutOfMemoryError     also a MemoryError
    │   └── DoesNotFitError      refused before loading: it needs more memory than there is
    ├── ArgumentsError           what a model passed to a function does not fit its parameters
    ├── SchemaError              no answer had the type that was asked for
    ├── PromptError              the prompt cannot be given to this model
    │   └── PromptTooLongError
    └── ConversationError
        ├── ConversationBusyError  a round is already running on this conversation
        └── StoreError           the conversations' database cannot be read or written

The message of each says what happened (with the value), why, and the next command. Inside IPython it is shown as that
one paragraph, and the cell fails; the traceback of an unexpected exception is never hidden.
"""

from __future__ import annotations

from typing import Any


class KaniNbError(Exception):
    """One short paragraph for the person at the keyboard.

    Args:
        what: what could not be done, with the offending value.
        why: the reason, when it is not plain from `what`.
        fix: the next command or action.

    Attributes:
        reply: the `ChatReply` with what came before, which is kept in the conversation; None where nothing is.
    """

    reply: Any = None

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        """The paragraph: what, why, and the next command."""
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}\n→ {self.fix}" if self.fix else text

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(KaniNbError):
    """An option, a name or a value that cannot be used."""


class NoEngineError(KaniNbError):
    """A chat was asked for before an engine was loaded."""


class EngineError(KaniNbError):
    """An engine could not be found, loaded or run."""


class UnknownModelError(EngineError):
    """No alias, folder, file or repository has this name."""


class ModelUnavailableError(EngineError):
    """The model exists, but cannot be had from here: no network, no disk space, an interrupted download."""


class GatedModelError(ModelUnavailableError):
    """The model's owner must grant access first (401, 403)."""


class ModelFilesError(EngineError):
    """The model's files are there, and wrong."""


class MissingDependencyError(EngineError):
    """An optional library is not installed."""


class GenerationError(EngineError):
    """Something failed inside generation; the original exception is the cause."""


class OutOfMemoryError(EngineError, MemoryError):
    """The device's memory did not suffice; what the attempt held has been freed. An answer's part is its `reply`."""


class DoesNotFitError(EngineError):
    """More memory is needed than there is; nothing was loaded.

    Attributes:
        row: the plan that does not fit, a `hardware.plans.PlanRow`; None where none was made.
    """

    row: Any = None


class ArgumentsError(KaniNbError):
    """What a model passed to a function does not fit its parameters; the text is for the model to read."""


class SchemaError(KaniNbError):
    """No answer had the type that was asked for."""


class PromptError(KaniNbError):
    """The prompt cannot be given to this model."""


class PromptTooLongError(PromptError):
    """The prompt does not fit the model's context, even without any history."""


class ConversationError(KaniNbError):
    """A conversation, branch or turn that is not there or cannot be changed so."""


class ConversationBusyError(ConversationError):
    """A round is already running on this conversation."""


class StoreError(ConversationError):
    """The conversations' database cannot be read or written."""


def near_misses(name: str, known: list[str], *, limit: int = 3) -> list[str]:
    """The names in `known` that `name` was probably meant to be, best first; never `help`."""
    import difflib

    # The dashes that all options share would make any two short ones alike.
    lowered = {each.lower().lstrip("-"): each for each in known if each.lstrip("-") != "help"}
    meant = name.lower().lstrip("-")
    found = difflib.get_close_matches(meant, lowered, n=limit, cutoff=0.7)
    starts = [each for each in lowered if len(meant) > 1 and each.startswith(meant) and each not in found]
    return [lowered[each] for each in (*found, *starts)][:limit]


def did_you_mean(name: str, known: list[str]) -> str:
    """A sentence that offers the near misses of `name`, or an empty string."""
    found = near_misses(name, known)
    return f"did you mean {' or '.join(found)}?" if found else ""
