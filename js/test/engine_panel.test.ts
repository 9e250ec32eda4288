import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { countsOf, mapOf, withCount } from "../src/engine/places";
import type { Device, Field, State, View } from "../src/engine/types";
import panel from "../src/widgets/engine_panel";
import { FakeModel } from "./fake_model";

const field = (name: string, kind: Field["kind"], more: Partial<Field> = {}): Field => ({
  name,
  label: name,
  kind,
  help: `help of ${name}`,
  flag: `--${name}`,
  choices: [],
  ...more,
});
const CONTROLS = {
  sections: [
    { title: "Model", fields: [field("model", "text")] },
    {
      title: "Precision",
      fields: [field("scheme", "text"), field("dtype", "choice", { choices: ["auto", "float32"] }), field("double_quant", "choice3")],
    },
    { title: "Place", fields: [field("device", "text"), field("device_map", "text"), field("max_memory", "text"), field("allow_offload", "switch")] },
    { title: "Context", fields: [field("max_context_size", "number")] },
    { title: "Answers", fields: [field("stop_strings", "list")] },
  ],
  models: [{ name: "smollm2", group: "Known models", about: "<script>1</script>" }],
  schemes: [
    { name: "none", about: "", knobs: [] },
    { name: "nf4", about: "", knobs: ["double_quant"] },
  ],
};
const GIB = 2 ** 30;
const CPU: Device = { name: "cpu", description: "x", total: 8 * GIB, usable: 6 * GIB, weights: GIB, kv: 0, working: 0, is_over: false, words: "1 GiB weights" };
const VIEW: View = {
  line: "%load_engine smollm2",
  errors: {},
  shown: ["model", "scheme", "dtype", "allow_offload", "max_context_size", "stop_strings"],
  model: { title: "Llama", window: 8192, note: "", is_reading: false },
  plan: { devices: [CPU], fits: true, verdict: "Fits.", fix: "", notes: ["a note"], speed: "", map: { "": "cpu" } },
  blocks: ["embed", "layers.0", "layers.1", "norm"],
  limits: {},
  busy: null,
  said: {},
  engines: [],
};

function shown(values: State["values"] = { model: "smollm2" }, view: View = VIEW) {
  const model = new FakeModel<State>({ values, view, controls: CONTROLS });
  const el = document.createElement("div");
  document.body.append(el);
  const end = panel.render({ model, el });
  const of = <Node extends Element>(selector: string): Node => el.querySelector(selector) as Node;
  const input = (name: string) => of<HTMLInputElement>(`[data-field=${name}] :is(input:not([type=range]), select, textarea)`);
  const button = (text: string) => [...el.querySelectorAll("button")].find((each) => each.textContent === text) as HTMLButtonElement;
  const type = (node: HTMLInputElement, value: string, event = "change") => {
    node.value = value;
    node.dispatchEvent(new Event(event, { bubbles: true }));
  };
  return { model, el, end, of, input, button, type };
}

beforeEach(() => void vi.useFakeTimers());
afterEach(() => {
  vi.useRealTimers();
  document.body.replaceChildren();
});

test("each control sends its value, and the default as null", () => {
  const { model, input, type } = shown();
  type(input("scheme"), "nf4");
  type(input("dtype"), "float32");
  type(input("dtype"), "");
  input("allow_offload").click();
  type(input("stop_strings"), "one\n\ntwo");
  expect(model.get("values")).toEqual({
    model: "smollm2",
    scheme: "nf4",
    dtype: null,
    allow_offload: true,
    stop_strings: ["one", "two"],
  });
  expect(model.saved).toHaveLength(5);
});

test("a choice of three tells yes and no from nothing said", () => {
  const { model, input, type } = shown({ model: "m", double_quant: true });
  expect(input("double_quant").value).toBe("true");
  type(input("double_quant"), "false");
  expect(model.get("values")["double_quant"]).toBe(false);
  type(input("double_quant"), "");
  expect(model.get("values")["double_quant"]).toBeNull();
});

test("controls that mean nothing here are hidden, but not where something is wrong with them", () => {
  const { model, of } = shown();
  const node = of<HTMLElement>("[data-field=double_quant]");
  expect(node.classList.contains("kn-hidden")).toBe(true);
  model.arrives("view", { ...VIEW, errors: { double_quant: "double_quant is 7: <b>no</b>" } });
  expect(node.classList.contains("kn-hidden")).toBe(false);
  expect(node.querySelector(".kn-error")?.textContent).toBe("double_quant is 7: <b>no</b>");
  expect(node.querySelector("select")?.getAttribute("aria-invalid")).toBe("true");
  expect(of(".kn-verdict").textContent).toContain("No plan");
});

test("what the kernel sets is shown, also where a select does not offer it", () => {
  const { model, input } = shown();
  model.arrives("values", { model: "org/other", scheme: "of-a-stranger" });
  expect([input("model").value, input("scheme").value]).toEqual(["org/other", "of-a-stranger"]);
});

test("the plan is said in words as well as drawn", () => {
  const { model, of, el } = shown();
  expect(of(".kn-verdict").textContent).toBe("✓ Fits.");
  expect(of(".kn-bar").getAttribute("aria-label")).toBe("cpu: 1 GiB weights");
  const over = { ...CPU, weights: 9 * GIB, is_over: true, words: "3 GiB too much" };
  const plan = { ...VIEW.plan!, devices: [over], fits: false, verdict: "It does not fit", fix: "take less" };
  model.arrives("view", { ...VIEW, plan });
  expect(of(".kn-verdict").textContent).toBe("✗ It does not fit");
  expect(el.querySelector(".kn-over")).not.toBeNull();
  expect(el.textContent).toContain("→ take less");
});

test("load, cancel and unload are sent with an id, and a kernel that is silent is told of", () => {
  const { model, button, of } = shown({ model: "m" }, { ...VIEW, engines: [{ name: "e", holds: "1 GiB", is_current: true }] });
  expect(button("Cancel").disabled).toBe(true);
  button("Load").click();
  button("Unload").click();
  expect(model.sent.map(({ kind, name }) => [kind, name])).toEqual([
    ["load", undefined],
    ["unload", "e"],
  ]);
  expect(new Set(model.sent.map(({ id }) => id)).size).toBe(2);
  model.receive({ kind: "done", id: model.sent[0]?.["id"] });
  vi.advanceTimersByTime(3000);
  expect(of("[role=alert].kn-error").textContent).toContain("The kernel has not answered yet");
  model.receive({ kind: "error", id: model.sent[1]?.["id"], why: "no such engine" });
  expect(of("[role=alert].kn-error").textContent).toBe("no such engine");
});

test("while a load runs its stages are shown, and it can be given up", () => {
  const busy = { title: "Loading m", done: ["reading"], stage: "weights 3 of 9", fraction: 0.4, elapsed: "2.0 s", can_cancel: true };
  const { button, of } = shown({ model: "m" }, { ...VIEW, busy });
  expect([button("Load").disabled, button("Cancel").disabled]).toEqual([true, false]);
  expect(of(".kn-busy").textContent).toBe("✓ readingLoading m: weights 3 of 9 · 2.0 s");
  expect(of<HTMLProgressElement>("progress").value).toBe(0.4);
});

test("a place is a device or a map, never both", () => {
  const { model, of, type } = shown({ model: "m", device_map: "auto" });
  const place = of<HTMLSelectElement>("[aria-label=Place]");
  expect(place.value).toBe("auto");
  type(place as unknown as HTMLInputElement, "on:cpu");
  expect(model.get("values")).toEqual({ model: "m", device: "cpu", device_map: null });
  type(place as unknown as HTMLInputElement, "layers");
  expect(JSON.parse(String(model.get("values")["device_map"]))).toEqual({ embed: "cpu", "layers.0": "cpu", "layers.1": "cpu", norm: "cpu" });
  expect(model.get("values")["device"]).toBeNull();
});

test("layers are moved between devices with sliders", () => {
  const { model, of, type } = shown({ model: "m", device_map: mapOf(VIEW.blocks!, ["cpu", "disk"], [4, 0]) });
  type(of<HTMLInputElement>("[aria-label='Parts on disk']"), "1", "input");
  expect(JSON.parse(String(model.get("values")["device_map"]))).toEqual({ embed: "cpu", "layers.0": "cpu", "layers.1": "cpu", norm: "disk" });
});

test("a limit is an amount of a device, and none at the end of its slider", () => {
  const { model, of, type } = shown();
  const slider = of<HTMLInputElement>("[aria-label='Most memory of cpu']");
  type(slider, "2", "input");
  expect(model.get("values")["max_memory"]).toBe("cpu=2GiB");
  model.arrives("view", { ...VIEW, limits: { cpu: 2 * GIB } });
  expect(of("[aria-label='Memory limits'] output").textContent).toBe("at most 2.00 GiB");
  type(slider, "8", "input");
  expect(model.get("values")["max_memory"]).toBeNull();
});

describe("maps by layer", () => {
  const blocks = ["a", "b", "c", "d", "e"];
  const devices = ["x", "y", "z"];

  test.each([[[5, 0, 0]], [[0, 0, 5]], [[1, 3, 1]], [[2, 0, 3]]])("%j is read back from its map", (counts) => {
    expect(countsOf(blocks, devices, mapOf(blocks, devices, counts))).toEqual(counts);
  });

  test("one that mixes the order is left to the text", () => {
    expect(countsOf(blocks, devices, JSON.stringify({ a: "y", b: "x", c: "x", d: "x", e: "x" }))).toBeNull();
    expect(countsOf(blocks, devices, "auto")).toBeNull();
  });

  test("every part stays somewhere, whatever is moved", () => {
    for (let first = 0; first <= 5; first++)
      for (let second = 0; first + second <= 5; second++)
        for (let at = 0; at < 3; at++)
          for (let count = 0; count <= 5; count++) {
            const changed = withCount([first, second, 5 - first - second], at, count);
            expect(changed.reduce((sum, each) => sum + each, 0)).toBe(5);
            expect(changed[at]).toBe(count);
            expect(Math.min(...changed)).toBeGreaterThanOrEqual(0);
          }
  });
});

test("the end of a view undoes all of it", () => {
  const { model, el, end } = shown();
  end();
  expect([el.childElementCount, model.size]).toEqual([0, 0]);
});

test("what is being typed is not overwritten by what comes from the kernel", () => {
  const { model, of } = shown({ model: "smollm2" });
  const input = of<HTMLInputElement>("[data-field=model] input");
  input.focus();
  input.value = "org/mo";
  input.dispatchEvent(new Event("input", { bubbles: true }));
  model.arrives("view", { ...VIEW });
  expect(input.value).toBe("org/mo");
  input.dispatchEvent(new Event("change"));
  model.arrives("values", { model: "" });
  expect(input.value).toBe("");
});

test("a kernel that is gone is told of, and nothing can be pressed any more", () => {
  const { model, of, button } = shown({ model: "m" }, { ...VIEW, engines: [{ name: "e", holds: "", is_current: true }] });
  (model as unknown as { tell(event: string): void }).tell("comm_live_update");
  expect(of(".kn-gone").textContent).toContain("Run its cell again");
  model.arrives("view", { ...VIEW });
  expect(button("Load").disabled).toBe(true);
  for (const each of [of<HTMLElement>(".kn-sections"), of<HTMLElement>(".kn-engines"), button("Check again")]) expect(each.inert).toBe(true);
});

test("keys do not reach the notebook", () => {
  const { el, of } = shown({ model: "m" });
  const reached = vi.fn();
  el.addEventListener("keydown", reached);
  for (const selector of ["button", "select", "input[type=range]", "input"])
    of(selector).dispatchEvent(new KeyboardEvent("keydown", { key: "b", bubbles: true }));
  expect(reached).not.toHaveBeenCalled();
});

test("what a scheme is stands below it", () => {
  const { model, of } = shown({ model: "m", scheme: "nf4" });
  model.arrives("controls", { ...model.get("controls"), schemes: [{ name: "nf4", about: "4 bits a weight" }] });
  model.arrives("values", { model: "m", scheme: "nf4" });
  expect(of("[data-field=scheme]").textContent).toContain("4 bits a weight");
});
