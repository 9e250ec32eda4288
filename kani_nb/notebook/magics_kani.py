"""`%kani VERB`: the package itself - what it found here, which version it is, and the end of whatever is running."""

from __future__ import annotations

import getpass
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand

from kani_nb._interrupts import InterruptGuard
from kani_nb._runtime import runtime
from kani_nb.notebook.capabilities import capabilities
from kani_nb.notebook.secrets import ask_token, refuse_secrets
from kani_nb.notebook.short_errors import short_errors
from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.tables import print_text
from kani_nb.notebook.verbs import Verb, VerbTable


@magics_class
class KaniMagics(Magics):
    """The magic about the package.

    Args:
        shell: the running shell.
        bus: whose state `%kani doctor` tells.
    """

    def __init__(self, shell: Any, bus: StopBus) -> None:
        super().__init__(shell)
        self._bus = bus
        self.verbs = VerbTable(
            "%kani",
            [
                Verb("doctor", "what is installed, seen and decided here, and what to do about problems", self._doctor),
                Verb("version", "the version of kani_nb", self._version),
                Verb("stop", "end every answer that is running", self._stop),
                Verb("token", "enter a Hugging Face token at a hidden prompt, for this kernel only", self._token),
            ],
            examples=["%kani doctor"],
            hint="%chat and %engine have verbs of their own",
        )

    @no_var_expand
    @line_magic
    @short_errors
    def kani(self, line: str) -> None:
        """Look after kani_nb itself.

        %kani doctor
        %kani version
        %kani help
        """
        refuse_secrets(line)
        self.verbs.dispatch(line)

    def _doctor(self, _rest: str) -> None:
        from kani_nb.doctor import report

        print_text(report(capabilities(self.shell, self._bus)).to_text())

    def _version(self, _rest: str) -> None:
        import kani_nb

        print_text(f"kani_nb {kani_nb.__version__}")

    def _stop(self, _rest: str) -> None:
        with InterruptGuard():
            stopped = runtime().stop()
        print_text("Stopping." if stopped else "Nothing is being answered.")

    def _token(self, _rest: str) -> None:
        ask_token(getpass.getpass)
        print_text("The token is in this kernel's environment, and nowhere else.")
