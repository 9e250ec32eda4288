"""The verbs of `%engine`: look at engines, switch between them, know what a model would take, keep a quantized one."""

from __future__ import annotations

import asyncio
import shlex
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb._amounts import in_words
from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._runtime import runtime
from kani_nb._waiting import Call
from kani_nb.engines.base import details_of
from kani_nb.errors import ConfigError, KaniNbError
from kani_nb.notebook.settings import KaniNB
from kani_nb.notebook.stat_line import places_in_words
from kani_nb.notebook.tables import one_line, print_text, text_table
from kani_nb.notebook.verbs import Verb, VerbTable, required, unquoted
from kani_nb.options import LineParser

if TYPE_CHECKING:
    from kani_nb.engines.sources import ModelSource


#: Details that `%engine info` has told already, in other words.
_TOLD = ("model", "loaded", "device", "context_tokens", "weight_bytes")


class EngineVerbs:
    """What follows `%engine`.

    Args:
        shell: the running shell.
        settings: `%config KaniNB`.

    Attributes:
        table: the verbs.
    """

    def __init__(self, shell: Any, settings: KaniNB) -> None:
        self.shell = shell
        self._settings = settings
        self.table = VerbTable(
            "%engine",
            [
                Verb(
                    "panel [MODEL] [OPTIONS of %load_engine]",
                    "choose a model, its precision and its place by looking, with a memory plan that follows",
                    self._panel,
                    parses=True,
                ),
                Verb("list", "the engines that are loaded", self._list),
                Verb("info [NAME]", "what the current engine, or that one, is and holds", self._info),
                Verb("kinds", "the engines that there are, what each runs and can do", self._kinds),
                Verb("use NAME", "let another loaded engine answer", self._use),
                Verb("stats", "what this conversation's answers took", self._stats),
                Verb("dashboard", "the same as one live figure, which follows each answer", self._dashboard),
                Verb(
                    "plan [MODEL] [--context N] [--card CARD] [--schemes none,int8,nf4+dq]",
                    "what a model would take under each precision, and what fits, before loading it",
                    self._plan,
                    parses=True,
                    details=_plan_details,
                ),
                Verb("explain [MODEL]", "which precision to choose, and why", self._explain, parses=True),
                Verb(
                    "compare MODEL [--schemes none,int8,nf4] [--sweep SETTING=V,V] [--runs N] [--text FILE]",
                    "load a model in several precisions, and measure memory, speed and quality",
                    self._compare,
                    parses=True,
                    details=_compare_details,
                ),
                Verb("save FOLDER", "keep the loaded model, quantized as it is, to load it from there", self._save),
                Verb("push ORG/NAME", "put the loaded model into a repository of the Hub", self._push, parses=True),
                Verb(
                    "copies [--delete NAME]", "quantized copies that --cache-quantized keeps", self._copies, parses=True
                ),
                Verb("prefetch MODEL", "download a model without loading it", self._prefetch, parses=True),
            ],
            examples=["%engine plan qwen3-4b", "%engine use second", "%engine save ./smollm2-nf4"],
            hint="%load_engine loads one, %unload_engine NAME frees one",
        )

    def _panel(self, rest: str) -> None:
        from kani_nb.notebook.panels.showing import need_place_for_panel

        need_place_for_panel(self.shell, "%load_engine --help")
        from kani_nb.notebook.panels.engine_panel import show_engine_panel

        show_engine_panel(rest)

    def _list(self, _rest: str) -> None:
        rt = runtime()
        if not rt.engines:
            print_text("No engine is loaded. %load_engine smollm2 loads a small one that runs anywhere.")
            return
        rows = []
        for name, engine in rt.engines.items():
            memory = engine.memory()
            held = ""
            if memory is not None:
                held = f"{places_in_words(memory)} + {in_words(memory.kv_bytes)} KV"
            config = rt.config_of(name)
            line = f"your own: {type(engine).__name__}" if config is None else config.to_line()
            rows.append(("*" if name == rt.engine_name else "", name, held, line))
        print_text(text_table(("", "name", "memory", "loaded with"), rows))

    def _kinds(self, _rest: str) -> None:
        from kani_nb.engines.kinds import kinds

        for name, found, kind in kinds():
            print_text(f"{name}  {found.__name__}: {kind.runs}")
            print_text(f"    {kind.example}{f'   ({kind.install})' if kind.install else ''}")
            print_text(f"    can: {', '.join(kind.can) or 'text'}; tested on: {kind.tested}")

    def _info(self, rest: str) -> None:
        rt = runtime()
        name = unquoted(rest) or rt.engine_name
        engine = rt.need_engine(unquoted(rest) or None)
        config = rt.config_of(name)
        lines = {
            "name": name,
            "loaded with": "" if config is None else config.to_line(),
            "engine": repr(engine),
            "context": f"{engine.max_context_size:,} tokens" if engine.is_loaded and engine.max_context_size else "",
        }
        memory = engine.memory()
        if memory is not None:
            lines["memory"] = f"weights {places_in_words(memory)}, KV cache {in_words(memory.kv_bytes)}"
        for key, value in details_of(engine).items():
            if key in _TOLD and memory is not None:
                continue
            name, is_bytes = key.removesuffix("_bytes").replace("_", " "), key.endswith("_bytes")
            lines.setdefault(name, in_words(value) if is_bytes and isinstance(value, int) else str(value))
        print_text(text_table(None, [(key, value) for key, value in lines.items() if value]))

    def _use(self, rest: str) -> None:
        name = unquoted(required(rest, "%engine use NAME"))
        runtime().use(name)
        print_text(f"{name} answers from now on.")

    def _stats(self, _rest: str) -> None:
        from kani_nb.notebook.stats import show_stats

        show_stats(self.shell, runtime().chat, draws=self._settings.plot != "never")

    def _dashboard(self, _rest: str) -> None:
        from kani_nb.notebook.panels.showing import need_place_for_panel

        need_place_for_panel(self.shell, "%engine stats")
        from kani_nb.notebook.panels.dashboard import show_dashboard

        show_dashboard()

    def _plan(self, rest: str) -> None:
        from kani_nb.notebook.plan_view import run_plan

        run_plan(self.shell, rest, draws=self._settings.plot != "never")

    def _explain(self, rest: str) -> None:
        from kani_nb.notebook.plan_view import run_explain

        run_explain(self.shell, rest)

    def _compare(self, rest: str) -> None:
        from kani_nb.notebook.compare_view import run_compare

        run_compare(self.shell, rest, draws=self._settings.plot != "never")

    def _prefetch(self, rest: str) -> None:
        from kani_nb.engines.sources import prefetch
        from kani_nb.notebook.load_view import LoadView

        parser = LineParser(prog="%engine prefetch", add_help=False)
        parser.add_argument("model", metavar="MODEL")
        parser.add_argument("--revision")
        args = parser.parse_line(required(rest, "%engine prefetch MODEL"))
        with InterruptGuard() as guard:
            view = LoadView(args.model)
            cancelled = threading.Event()
            source: ModelSource | None = None
            failure: BaseException | None = None
            fetching = asyncio.to_thread(
                prefetch, args.model, view.progress, revision=args.revision, cancelled=cancelled
            )
            call: Call[ModelSource] | None = None
            try:
                call = Call(runtime().loop, fetching, guard, pump=view.pump, ask_to_end=cancelled.set)
                source = call.result()
            except BaseException as error:
                failure = error
                is_expected = isinstance(error, (Interrupted, CancelledError, KaniNbError))
                if call is not None and call.was_interrupted and is_expected:
                    kept = "what came is kept, and the next time goes on from there"
                    failure = Interrupted(f"interrupted; {args.model} was not downloaded: {kept}")
                    raise failure from None
                raise
            finally:
                found = "" if source is None else f"{source.origin}, {in_words(source.size_bytes)}"
                note = "on this disk" if failure is None else f"was not downloaded: {one_line(str(failure), 200)}"
                view.finish(origin=found, note=note)

    def _save(self, rest: str) -> None:
        folder = Path(unquoted(required(rest, "%engine save FOLDER"))).expanduser()
        engine = runtime().need_engine()
        save = getattr(engine, "save", None)
        if not callable(save):
            raise ConfigError(f"{type(engine).__name__} cannot be saved", why="its weights are not in this process")
        with InterruptGuard() as guard:
            # A folder appears whole or not at all: an interrupt is answered when that is decided.
            saved = Call(runtime().loop, save(folder), guard, ask_to_end=lambda: None, grace_s=60.0).result()
        bytes_ = sum(each.stat().st_size for each in Path(saved).rglob("*") if each.is_file())
        # A bare name could be an alias, or a repository's.
        named = folder if folder.is_absolute() or folder.parts[:1] == ("..",) else f"./{folder}"
        print_text(f"Saved, {in_words(bytes_)}: %load_engine {shlex.quote(str(named))} loads it again as it is.")

    def _copies(self, rest: str) -> None:
        from kani_nb.engines.quantized_copies import delete_copy, list_copies

        parser = LineParser(prog="%engine copies", add_help=False)
        parser.add_argument("--delete", metavar="NAME")
        args = parser.parse_line(rest)
        if args.delete is not None:
            print_text(f"{args.delete} is deleted: {in_words(delete_copy(args.delete))} freed.")
            return
        copies = list_copies()
        if not copies:
            print_text("There is no quantized copy. %load_engine MODEL --quant nf4 --cache-quantized keeps one.")
            return
        print_text(
            text_table(
                ("model", "precision", "size", "name"),
                [(each.name, each.scheme, in_words(each.size_bytes), each.folder.name) for each in copies],
            )
        )

    def _push(self, rest: str) -> None:
        parser = LineParser(prog="%engine push", add_help=False)
        parser.add_argument("repo", metavar="ORG/NAME")
        parser.add_argument("--private", action="store_true")
        args = parser.parse_line(required(rest, "%engine push ORG/NAME"))
        engine = runtime().need_engine()
        push = getattr(engine, "push_to_hub", None)
        if not callable(push):
            raise ConfigError(f"{type(engine).__name__} cannot be pushed", why="its weights are not in this process")
        with InterruptGuard() as guard:
            address = Call(runtime().loop, push(args.repo, private=args.private), guard).result()
        print_text(f"Pushed: {address}\n%load_engine {args.repo} loads it from there.")


def _plan_details() -> str:
    from kani_nb.notebook.plan_view import plan_details

    return plan_details()


def _compare_details() -> str:
    from kani_nb.notebook.compare_view import compare_details

    return compare_details()
