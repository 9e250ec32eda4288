/** The chat pane: a conversation that streams, with everything that `%chat` can do to it. */

import { inserter } from "../chat/code_tools";
import { ChatList, Settings } from "../chat/drawers";
import { Log } from "../chat/log";
import type { Actions } from "../chat/turn_view";
import type { Chat, Delta, State } from "../chat/types";
import { Writing } from "../chat/writing";
import { assign, element, say } from "../dom";
import { keepKeys } from "../keys";
import type { Context } from "../model";
import { type Answer, complaints, Requests } from "../requests";
import { Scope } from "../scope";
import { stopper } from "../stop";
import theme from "../theme.css?inline";
import css from "./chat_pane.css?inline";

function render({ model, el }: Context<State>): () => void {
  const scope = new Scope();
  const complaint = element("p", { class: "kn-error", role: "alert" });
  const complain = complaints(complaint);
  const requests = new Requests<State, Answer & { chats?: Chat[] }>(scope, model, (text, kind) => {
    if (kind === "params") settings.complain(text);
    else complain(text, kind);
  });
  const ask = requests.send.bind(requests);

  // -- the page ------------------------------------------------------------------------------------------------------
  const insert = inserter(model.widget_manager, el);
  const actions: Actions = {
    retry: ({ id }) => ask("retry", { turn: id }),
    edit: (turn) => writing.edit(turn),
    go: (turn) => ask("switch", { turn }),
    insert,
  };
  const log = new Log(scope, actions, (question, text) => ask("answer", { question, text }));
  const title = element("span", { class: "kn-title" });
  const meter = element("meter", { min: 0, max: 1, low: 0.7, high: 0.9, optimum: 0, "aria-label": "Context used" });
  const context = element("span");
  const notices = element("div", { "aria-live": "polite" });
  const problem = element("p", { class: "kn-error", role: "alert" });
  const gone = element("div", { class: "kn-gone kn-hidden", role: "alert" });
  const list = new ChatList(scope, {
    find,
    open: (name) => {
      ask("open", { name });
      toggle("list", false);
    },
    begin: () => {
      ask("new");
      toggle("list", false);
    },
    rename: (name) =>
      ask("rename", { name }, () => {
        list.call(model.get("around")?.name ?? "");
        find(list.query);
      }),
  });
  const settings = new Settings(scope, (text) => ask("system", { text }), (params) => ask("params", { params }));
  const drawers = { list: list.node, settings: settings.node };
  const openers = { list: opener("Conversations", "list"), settings: opener("Settings", "settings") };
  const sendStop = stopper(scope, model, () => model.get("door") ?? "", () => say(problem, "The kernel does not hear: interrupting it…"));
  const stop = (): void => {
    composer.stopping();
    sendStop();
  };
  const writing = new Writing(scope, requests, () => model.get("problem") ?? {}, stop);
  const { composer } = writing;
  const root = element(
    "div",
    { class: "kani-panel kani-live kn-chat", role: "region", "aria-label": "Chat" },
    element("style", {}, theme + css),
    element("div", { class: "kn-head" }, title, element("span", { class: "kn-context" }, meter, context), openers.list, openers.settings),
    drawers.list,
    drawers.settings,
    log.node,
    log.spoken,
    notices,
    problem,
    gone,
    complaint,
    composer.node,
  );
  for (const drawer of Object.values(drawers)) drawer.classList.add("kn-hidden");
  el.append(root);
  keepKeys(scope, root);
  scope.finally(() => root.remove());

  function opener(text: string, name: "list" | "settings"): HTMLButtonElement {
    const button = element("button", { type: "button", "aria-expanded": "false" }, text);
    scope.listen(button, "click", () => toggle(name));
    return button;
  }
  function toggle(name: "list" | "settings", open = drawers[name].classList.contains("kn-hidden")): void {
    const hadFocus = drawers[name].contains(document.activeElement);
    drawers[name].classList.toggle("kn-hidden", !open);
    assign(openers[name], { "aria-expanded": String(open) });
    if (!open && hadFocus) openers[name].focus();
    if (open && name === "list") find(list.query);
  }
  function find(query: string): void {
    ask("list", { query }, ({ chats }) => list.draw(chats ?? []));
  }

  // -- what is shown -------------------------------------------------------------------------------------------------
  const drawLog = (): void => {
    const running = model.get("running") ?? {};
    composer.answering(running.run ?? "");
    const turns = [...(model.get("history") ?? []), ...(model.get("recent") ?? [])];
    writing.turnsChanged(turns);
    log.draw(turns, running);
  };
  const drawAround = (): void => {
    const around = model.get("around") ?? {};
    const branches = (around.branches ?? 0) > 1 ? ` · ${around.branches} branches` : "";
    say(title, `${around.name ?? ""}${branches} · ${around.engine || "no engine is loaded"}`);
    const { used = null, window: most = null } = around.context ?? {};
    meter.classList.toggle("kn-hidden", used === null || most === null);
    if (used !== null && most !== null) meter.value = Math.min(1, used / most);
    say(context, used === null ? "" : `${used.toLocaleString("en")}${most ? ` of ${most.toLocaleString("en")}` : ""} tokens`);
    list.call(around.name ?? "");
    settings.draw(around.system ?? "", around.params ?? {});
  };
  const drawProblem = (): void => {
    say(problem, model.get("problem")?.text ?? "");
    writing.bringBack();
  };
  const drawNotices = (): void => {
    notices.replaceChildren(...(model.get("notices") ?? []).map((notice) => element("p", { class: "kn-note" }, notice)));
  };

  // -- what is dropped -----------------------------------------------------------------------------------------------
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
    composer.answering("");
    composer.disable();
    log.freeze();
    for (const drawer of Object.values(drawers)) drawer.inert = true;
  };
  scope.on(model, "comm_live_update", lost);
  scope.on(model, "msg:custom", (message: Delta | undefined) => {
    if (message?.kind === "delta") log.delta(message);
  });
  for (const part of ["history", "recent", "running"] as const) scope.on(model, `change:${part}`, drawLog);
  scope.on(model, "change:around", drawAround);
  scope.on(model, "change:problem", drawProblem);
  scope.on(model, "change:notices", drawNotices);
  drawLog();
  drawAround();
  drawProblem();
  drawNotices();
  const laidOut = requestAnimationFrame(() => log.toEnd());
  scope.finally(() => cancelAnimationFrame(laidOut));
  return scope.end;
}

export default { render };
