/** The chat pane: a conversation that streams, with everything that `%chat` can do to it. */

import { inserter } from "../chat/code_tools";
import { Composer, type Draft } from "../chat/composer";
import { ChatList, Settings } from "../chat/drawers";
import { LiveAnswer } from "../chat/live_answer";
import { type Actions, RunningView, TurnView } from "../chat/turn_view";
import type { Chat, Delta, State, Turn } from "../chat/types";
import { assign, element, say } from "../dom";
import type { Context } from "../model";
import { type Answer, Requests } from "../requests";
import { Scope } from "../scope";
import { stopper } from "../stop";
import theme from "../theme.css?inline";
import css from "./chat_pane.css?inline";

/** So near to its end the conversation stays there when it grows. */
const NEAR_PX = 60;
/** Turns that come into sight are drawn for so long in a frame. */
const FRAME_MS = 25;

function render({ model, el }: Context<State>): () => void {
  const scope = new Scope();
  const complaint = element("p", { class: "kn-error", role: "alert" });
  const answered = new Map<string, (answer: Answer & { chats?: Chat[] }) => void>();
  const requests = new Requests(scope, model, (text) => say(complaint, text), (answer) => {
    const then = answered.get(answer.id ?? "");
    answered.delete(answer.id ?? "");
    then?.(answer as Answer & { chats?: Chat[] });
  });
  const ask = (kind: string, more: Record<string, unknown> = {}, then?: (answer: Answer & { chats?: Chat[] }) => void, buffers?: ArrayBuffer[]): void => {
    const id = requests.send(kind, more, buffers);
    if (then) answered.set(id, then);
  };

  // -- the page ------------------------------------------------------------------------------------------------------
  const insert = inserter(model.widget_manager, el);
  const log = element("div", { class: "kn-log", role: "log", "aria-label": "Conversation", "aria-live": "off", tabindex: 0 });
  const title = element("span", { class: "kn-title" });
  const meter = element("meter", { min: 0, max: 1, low: 0.7, high: 0.9, optimum: 0, "aria-label": "Context used" });
  const context = element("span");
  const notices = element("div", { "aria-live": "polite" });
  const problem = element("p", { class: "kn-error", role: "alert" });
  const gone = element("div", { class: "kn-gone kn-hidden", role: "alert" });
  const list = new ChatList(scope, (query) => find(query), (name) => { ask("open", { name }); toggle("list", false); }, () => { ask("new"); toggle("list", false); });
  const settings = new Settings(scope, (text) => ask("system", { text }), (params) => ask("params", { params }));
  const drawers = { list: list.node, settings: settings.node };
  const openers = { list: opener("Conversations", "list"), settings: opener("Settings", "settings") };
  const live = new LiveAnswer();
  const sendStop = stopper(scope, model, () => model.get("door") ?? "", () => say(problem, "The kernel does not hear: interrupting it…"));
  const stop = (): void => {
    composer.stopping();
    sendStop();
  };
  const composer = new Composer(scope, (draft) => void submit(draft), stop);
  const root = element(
    "div",
    { class: "kani-panel kani-live kn-chat", role: "region", "aria-label": "Chat" },
    element("style", {}, theme + css),
    element("div", { class: "kn-head" }, title, element("span", { class: "kn-context" }, meter, context), openers.list, openers.settings),
    drawers.list,
    drawers.settings,
    log,
    notices,
    problem,
    gone,
    complaint,
    composer.node,
  );
  for (const drawer of Object.values(drawers)) drawer.classList.add("kn-hidden");
  el.append(root);
  scope.finally(() => root.remove());

  function opener(text: string, name: "list" | "settings"): HTMLButtonElement {
    const button = element("button", { type: "button", "aria-expanded": "false" }, text);
    scope.listen(button, "click", () => toggle(name));
    return button;
  }
  function toggle(name: "list" | "settings", open = drawers[name].classList.contains("kn-hidden")): void {
    drawers[name].classList.toggle("kn-hidden", !open);
    assign(openers[name], { "aria-expanded": String(open) });
    if (open && name === "list") find("");
  }
  function find(query: string): void {
    ask("list", { query }, ({ chats }) => list.draw(chats ?? []));
  }

  // -- turns ---------------------------------------------------------------------------------------------------------
  let edited: Turn | null = null;
  const actions: Actions = {
    retry: ({ number }) => ask("retry", { number }),
    edit: (turn) => {
      edited = turn;
      composer.fill(turn.prompt, `Takes the place of turn ${turn.number}; the old one stays as a branch. Empty it to cancel.`);
    },
    go: (turn) => ask("switch", { turn }),
    insert,
  };
  let views: TurnView[] = [];
  let runningView: RunningView | null = null;
  const seen =
    typeof IntersectionObserver === "undefined"
      ? null
      : new IntersectionObserver(
          (entries) => {
            for (const { isIntersecting, target } of entries) {
              const view = isIntersecting && views.find(({ node }) => node === target);
              if (view) near.add(view);
            }
            drawNear();
          },
          { root: log, rootMargin: "600px" },
        );
  scope.finally(() => seen?.disconnect());

  const staysDown = (draw: () => void): void => {
    const isNear = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    draw();
    if (isNear) log.scrollTop = log.scrollHeight;
  };
  // The latest first, and no more in a frame than it has time for.
  const near = new Set<TurnView>();
  let nearFrame = 0;
  const drawNear = (): void => {
    nearFrame ||= requestAnimationFrame(() => {
      nearFrame = 0;
      const endsAt = performance.now() + FRAME_MS;
      staysDown(() => {
        for (const view of [...near].sort((one, other) => other.turn.number - one.turn.number)) {
          view.draw();
          near.delete(view);
          if (performance.now() > endsAt) break;
        }
      });
      if (near.size) drawNear();
    });
  };
  scope.finally(() => cancelAnimationFrame(nearFrame));
  const drawTurns = (): void => {
    const turns = [...(model.get("history") ?? []), ...(model.get("recent") ?? [])];
    let same = 0;
    while (same < turns.length && same < views.length && isSame(turns[same] as Turn, (views[same] as TurnView).turn)) same++;
    for (const view of views.splice(same)) {
      seen?.unobserve(view.node);
      near.delete(view);
      view.end();
    }
    const isOver = !model.get("running")?.run;
    const fresh = turns.slice(same).map((turn, at, all) => {
      const drawn = isOver && at === all.length - 1 ? runningView?.handOn() : undefined;
      return new TurnView(turn, actions, drawn);
    });
    log.append(...fresh.map(({ node }) => node));
    views.push(...fresh);
    for (const view of fresh) {
      if (seen) seen.observe(view.node);
      else view.draw();
    }
    if (runningView) log.append(runningView.node);
  };

  // -- the running answer --------------------------------------------------------------------------------------------
  let frame = 0;
  const later = (): void => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (runningView) staysDown(() => runningView?.draw(model.get("running") ?? {}, live));
    });
  };
  scope.finally(() => cancelAnimationFrame(frame));
  const drawRunning = (): void => {
    const running = model.get("running") ?? {};
    const is = Boolean(running.run);
    composer.answering(is);
    root.classList.toggle("kn-is-answering", is);
    if (!is) {
      drawTurns(); // what it became came in the same message, and takes over what is drawn
      runningView?.end();
      runningView = null;
      for (const { node } of views) node.classList.remove("kn-replaced");
      return;
    }
    if (!runningView) {
      runningView = new RunningView(insert, (text) => ask("answer", { text }));
      log.append(runningView.node);
      log.scrollTop = log.scrollHeight;
    }
    let isReplaced = false;
    for (const { node, turn } of views) {
      isReplaced ||= turn.id === running.replaces;
      node.classList.toggle("kn-replaced", isReplaced);
    }
    live.whole(running);
    later();
  };
  const drawAround = (): void => {
    const around = model.get("around") ?? {};
    const branches = (around.branches ?? 0) > 1 ? ` · ${around.branches} branches` : "";
    say(title, `${around.name ?? ""}${branches} · ${around.engine || "no engine is loaded"}`);
    const { used = null, window: most = null } = around.context ?? {};
    meter.classList.toggle("kn-hidden", used === null || most === null);
    if (used !== null && most !== null) meter.value = Math.min(1, used / most);
    say(context, used === null ? "" : `${used.toLocaleString("en")}${most ? ` of ${most.toLocaleString("en")}` : ""} tokens`);
    settings.draw(around.system ?? "", around.params ?? {});
  };
  const drawProblem = (): void => {
    const { text = "", prompt = "" } = model.get("problem") ?? {};
    say(problem, text);
    if (prompt && !composer.text) composer.fill(prompt);
  };
  const drawNotices = (): void => {
    notices.replaceChildren(...(model.get("notices") ?? []).map((notice) => element("p", { class: "kn-note" }, notice)));
  };

  // -- what is sent --------------------------------------------------------------------------------------------------
  async function submit({ text, files }: Draft): Promise<void> {
    const replaced = edited;
    const sent = (answer: Answer): void => {
      if (answer.kind !== "done") return;
      edited = null;
      composer.clear();
    };
    if (replaced) return ask("edit", { number: replaced.number, text }, sent);
    const described = files.map(({ name, type }) => ({ name, mime: type }));
    const buffers = await Promise.all(files.map((file) => file.arrayBuffer()));
    ask("send", { text, files: described }, sent, buffers);
  }
  scope.listen(composer.node, "input", () => {
    if (edited && !composer.text) {
      edited = null;
      composer.say("");
    }
  });
  scope.listen(root, "dragover", (event) => event.preventDefault());
  scope.listen(root, "drop", (event) => composer.take(event.dataTransfer?.files, event));

  // -- the kernel is gone --------------------------------------------------------------------------------------------
  const resume = (): string => `%load_ext kani_nb\n%chat resume ${model.get("around")?.name ?? ""}\n%chat panel`.trimEnd();
  const lost = (): void => {
    const words = "The kernel was restarted, or is gone: this pane has ended. The conversation is kept. ";
    const button = insert ? element("button", { type: "button" }, "Insert a cell that resumes it") : null;
    if (button) scope.listen(button, "click", () => insert?.(resume()));
    gone.replaceChildren(element("p", {}, `${words}${insert ? "" : `Resume it with: ${resume().replaceAll("\n", ", ")}`}`), ...(button ? [button] : []));
    gone.classList.remove("kn-hidden");
    composer.answering(false);
    composer.disable();
  };
  scope.on(model, "comm_live_update", lost);
  scope.on(model, "msg:custom", (message: Delta | undefined) => {
    if (message?.kind === "delta" && live.delta(message)) later();
  });
  for (const part of ["history", "recent"] as const) scope.on(model, `change:${part}`, () => staysDown(drawTurns));
  scope.on(model, "change:running", () => staysDown(drawRunning));
  scope.on(model, "change:around", drawAround);
  scope.on(model, "change:problem", drawProblem);
  scope.on(model, "change:notices", drawNotices);
  drawTurns();
  drawRunning();
  drawAround();
  drawProblem();
  drawNotices();
  requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
  scope.finally(() => views.forEach((view) => view.end()));
  return scope.end;
}

function isSame(one: Turn, other: Turn): boolean {
  return one.id === other.id && one.siblings.length === other.siblings.length && one.number === other.number;
}

export default { render };
