/** The engine panel: controls on one side, the memory plan on the other, and the line that does the same below. */

import { copyText } from "../copy";
import { assign, element, press, say, stageOf } from "../dom";
import { LayerEditor, MemoryLimits, PlaceChoice } from "../engine/places";
import { type Control, control, fill } from "../engine/fields";
import { PlanView } from "../engine/plan";
import type { Engine, Field, State, Value, Values, View } from "../engine/types";
import { keepKeys } from "../keys";
import type { Context } from "../model";
import { complaints, Requests } from "../requests";
import { Scope } from "../scope";
import theme from "../theme.css?inline";
import css from "./engine_panel.css?inline";

/** Fields that have a control of their own kind here. */
const OWN = new Set(["device", "device_map", "max_memory"]);
const OPEN = new Set(["Model", "Precision", "Place", "Context"]);

function render({ model, el }: Context<State>): () => void {
  const scope = new Scope();
  const complaint = element("p", { class: "kn-error", role: "alert" });
  const requests = new Requests(scope, model, complaints(complaint));
  const values = (): Values => model.get("values") ?? {};
  const view = (): View => model.get("view") ?? {};
  const set = (changes: Record<string, Value>): void => {
    model.set("values", { ...values(), ...changes });
    model.save_changes();
  };

  const fields = new Map<string, Control>();
  const plan = new PlanView();
  const layers = new LayerEditor(set);
  const place = new PlaceChoice(scope, set, view);
  const limits = new MemoryLimits(set);
  const about = element("p", { class: "kn-note", "aria-live": "polite" });
  const aboutScheme = element("p", { class: "kn-note", "aria-live": "polite" });
  const models = element("datalist", { id: `kani-models-${Math.random().toString(36).slice(2)}` });
  const contextSlider = element("input", { type: "range", min: 7, step: 0.25, "aria-label": "Context length" });

  const top = element("div", { class: "kn-top" });
  const sections = element("div", { class: "kn-sections" });
  const build = (): void => {
    const made = (model.get("controls")?.sections ?? []).map(({ title, fields: described }) => {
      const box = element("div", { class: "kn-fields" });
      if (title === "Place") box.append(place.node, layers.node, limits.node);
      for (const field of described) box.append(...nodesOf(field));
      if (title === "Model") {
        top.replaceChildren(box, models, about);
        return "";
      }
      if (title === "Context") {
        const length = fields.get("max_context_size")?.node;
        length?.classList.add("kn-wide");
        length?.querySelector("input")?.after(contextSlider);
      }
      return element("details", { class: "kn-section", open: OPEN.has(title) }, element("summary", {}, title), box);
    });
    sections.replaceChildren(...made.filter(Boolean));
  };
  const nodesOf = (field: Field): HTMLElement[] => {
    const shown: Field = field.name === "scheme" ? { ...field, kind: "choice", choices: [] } : field;
    const one = control(scope, shown, (value) =>
      set(field.name === "device" || field.name === "device_map" ? { device: null, device_map: null, [field.name]: value } : { [field.name]: value }),
    );
    fields.set(field.name, one);
    if (field.name === "model") {
      one.node.classList.add("kn-wide");
      assign(one.node.querySelector("input") as Element, { list: models.id });
    }
    if (field.name === "scheme") one.node.append(aboutScheme);
    return [one.node];
  };

  const load = button("Load", () => requests.send("load"), "kn-main");
  const cancel = button("Cancel", () => requests.send("cancel"));
  const refresh = button("Check again", () => requests.send("refresh"));
  assign(refresh, { title: "Plan with the memory that is free now" });
  const line = element("code");
  const copy = button("Copy", () => void copyLine());
  const copyLine = async (): Promise<void> => {
    const isCopied = await copyText(line.textContent ?? "");
    if (!isCopied) getSelection()?.selectAllChildren(line);
    say(copy, isCopied ? "Copied" : "Selected: press Ctrl-C");
    scope.after(2000, () => say(copy, "Copy"));
  };
  const stage = element("span", { role: "status" });
  const elapsed = element("span");
  const steps = element("ul", { class: "kn-steps kn-note" });
  const progress = element("progress", { max: 1, "aria-label": "Progress of the load" });
  const busy = element("div", { class: "kn-busy" }, steps, element("p", { class: "kn-note" }, stage, elapsed), progress);
  const frees = element("p", { class: "kn-note" });
  const gone = element("p", { class: "kn-gone kn-hidden", role: "alert" });
  let isGone = false;
  const said = element("p", { class: "kn-outcome", role: "status", "aria-live": "polite" });
  const engines = element("ul", { class: "kn-engines", "aria-label": "Loaded engines" });
  const root = element(
    "div",
    { class: "kani-panel kani-live", role: "region", "aria-label": "Engine" },
    element("style", {}, theme + css),
    element(
      "div",
      { class: "kn-engine" },
      top,
      element(
        "div",
        { class: "kn-side" },
        gone,
        plan.node,
        element("div", { class: "kn-row" }, element("div", { class: "kn-line", role: "group", "aria-label": "The same as a magic line" }, line), copy),
        element("div", { class: "kn-row" }, load, cancel, refresh),
        frees,
        busy,
        said,
        complaint,
        engines,
      ),
      sections,
    ),
  );
  el.append(root);
  keepKeys(scope, root);
  scope.finally(() => root.remove());

  function button(text: string, press: () => void, name = ""): HTMLButtonElement {
    const node = element("button", { type: "button", class: name || null }, text);
    scope.listen(node, "click", press);
    return node;
  }

  const drawChoices = (): void => {
    const given = model.get("controls") ?? {};
    models.replaceChildren(
      ...(given.models ?? []).map(({ name, about: words }) => element("option", { value: name, label: `${name}: ${words}` })),
    );
    const scheme = fields.get("scheme")?.node.querySelector("select");
    if (scheme) {
      const named = (given.schemes ?? []).filter(({ name }) => name !== "none").map(({ name }) => [name, name] as const);
      fill(scheme, [["", "none"], ...named]);
    }
  };

  const drawValues = (): void => {
    const now = values();
    say(aboutScheme, (model.get("controls")?.schemes ?? []).find(({ name }) => name === now["scheme"])?.about ?? "");
    for (const [name, one] of fields) one.set(now[name] ?? null);
    const chosen = (given: Value | undefined): string => (typeof given === "string" ? given : "");
    place.draw(view(), chosen(now["device"]), chosen(now["device_map"]));
    layers.draw(view(), chosen(now["device_map"]));
    const context = Number(now["max_context_size"] ?? view().model?.window ?? 4096);
    if (contextSlider !== document.activeElement) contextSlider.value = String(Math.log2(context || 1));
    assign(contextSlider, { "aria-valuetext": `${context.toLocaleString("en")} tokens` });
  };

  const drawView = (): void => {
    const now = view();
    const shown = new Set(now.shown ?? []);
    for (const [name, one] of fields) {
      const text = now.errors?.[name] ?? "";
      one.complain(text);
      one.node.classList.toggle("kn-hidden", (!shown.has(name) || OWN.has(name)) && !text);
    }
    const described = now.model;
    const window = described?.window ? `, a window of ${described.window.toLocaleString("en")} tokens` : "";
    say(about, described?.is_reading ? "Reading its configuration…" : described?.title ? `${described.title}${window}. ${described.note}` : "");
    const context = fields.get("max_context_size")?.node.querySelector("input[type=text]");
    if (context) assign(context, { placeholder: described?.window ? `default: ${described.window.toLocaleString("en")}` : "default" });
    contextSlider.max = String(Math.log2(described?.window ?? 131072));
    const hasErrors = Object.keys(now.errors ?? {}).length > 0;
    plan.draw(hasErrors ? null : now.plan, hasErrors ? "No plan: the field that is marked cannot be used." : "Planning…");
    limits.draw(now);
    say(line, now.line || "(no line: a field that is marked cannot be used)");
    const running = now.busy ?? null;
    load.disabled = isGone || running !== null || !now.line || hasErrors || now.plan?.fits === false;
    say(frees, running ? "" : (now.frees ?? ""));
    cancel.disabled = !running?.can_cancel;
    busy.classList.toggle("kn-hidden", !running);
    if (running) {
      steps.replaceChildren(...running.done.map((each) => element("li", {}, `✓ ${each}`)));
      say(stage, [running.title, stageOf(running.stage)].filter(Boolean).join(": "));
      say(elapsed, `${running.stage.slice(stageOf(running.stage).length)} · ${running.elapsed}`);
      if (running.fraction === null) progress.removeAttribute("value");
      else progress.value = running.fraction;
    }
    const end = now.said ?? {};
    say(said, [end.text, end.remarks].filter(Boolean).join("\n"));
    said.classList.toggle("kn-error", end.kind === "error");
    drawEngines(now.engines ?? [], running !== null);
  };

  let drawnEngines = "";
  const drawEngines = (loaded: Engine[], isBusy: boolean): void => {
    const key = JSON.stringify([loaded, isBusy]);
    if (key === drawnEngines) return;
    drawnEngines = key;
    engines.replaceChildren(
      ...loaded.map(({ name, holds, is_current }) => {
        const free = element("button", { type: "button" }, "Unload");
        press(free, () => requests.send("unload", { name }));
        assign(free, { "aria-label": `Unload ${name}`, disabled: isBusy || isGone });
        const words = [name, is_current ? "current" : "", holds].filter(Boolean).join(" · ");
        return element("li", {}, element("span", {}, words), free);
      }),
    );
  };

  scope.listen(contextSlider, "input", () => {
    const tokens = 2 ** Number(contextSlider.value);
    const most = view().model?.window ?? Infinity;
    const step = tokens >= 4096 ? 256 : 64;
    set({ max_context_size: String(Math.min(most, Math.max(128, Math.round(tokens / step) * step))) });
  });
  const drawAll = (): void => {
    drawView();
    drawValues();
  };
  scope.on(model, "comm_live_update", () => {
    isGone = true;
    say(gone, "The kernel was restarted, or is gone: this panel has ended. Run its cell again to use it.");
    gone.classList.remove("kn-hidden");
    for (const each of [top, sections, cancel, refresh, engines]) each.inert = true;
    busy.classList.add("kn-hidden");
    load.disabled = true;
  });
  scope.on(model, "change:controls", drawChoices);
  scope.on(model, "change:values", drawValues);
  scope.on(model, "change:view", drawAll);
  build();
  drawChoices();
  drawAll();
  return scope.end;
}

export default { render };
