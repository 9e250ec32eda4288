/** Where a model goes: one device, a strategy, layers by hand, or a map as text; and how much each device may give. */

import { assign, element, say } from "../dom";
import type { Scope } from "../scope";
import { type Choices, choose, fill } from "./fields";
import type { Value, View } from "./types";

const STRATEGIES: Choices = [
  ["", "best device"],
  ["auto", "auto: spread over all"],
  ["balanced", "balanced: evenly"],
  ["sequential", "sequential: one after the other"],
];
const GIB = 2 ** 30;

/** How many of `blocks` each device gets, in order, where a map puts them so; null where it does not. */
export function countsOf(blocks: readonly string[], devices: readonly string[], text: string): number[] | null {
  let map: Record<string, unknown>;
  try {
    map = JSON.parse(text) as Record<string, unknown>;
  } catch {
    return null;
  }
  const counts = devices.map(() => 0);
  let reached = 0;
  for (const block of blocks) {
    const at = devices.indexOf(String(map[block]));
    if (at < reached) return null;
    reached = at;
    counts[at] = (counts[at] ?? 0) + 1;
  }
  return Object.keys(map).length === blocks.length ? counts : null;
}

/** The map that gives each device so many of `blocks`, in order. */
export function mapOf(blocks: readonly string[], devices: readonly string[], counts: readonly number[]): string {
  const map: Record<string, string> = {};
  let next = 0;
  devices.forEach((device, at) => {
    for (const block of blocks.slice(next, next + (counts[at] ?? 0))) map[block] = device;
    next += counts[at] ?? 0;
  });
  return JSON.stringify(map);
}

/** `counts` with that of one device changed; the devices after it, or else those before, make up for it. */
export function withCount(counts: readonly number[], at: number, count: number): number[] {
  const changed = [...counts];
  let missing = (changed[at] ?? 0) - count;
  changed[at] = count;
  const others = [...counts.keys()].filter((each) => each > at).concat([...counts.keys()].filter((each) => each < at).reverse());
  for (const each of others) {
    const next = Math.max(0, (changed[each] ?? 0) + missing);
    missing -= next - (changed[each] ?? 0);
    changed[each] = next;
    if (missing === 0) break;
  }
  return changed;
}

type Set = (changes: Record<string, Value>) => void;

/** The device map's own editor: how many layers each device holds. */
export class LayerEditor {
  readonly node = element("div", { class: "kn-field kn-wide", role: "group", "aria-label": "Layers by device" });
  private counts: number[] = [];
  private drawn = "";

  constructor(private readonly set: Set) {}

  draw(view: View, text: string): void {
    const blocks = view.blocks ?? [];
    const devices = [...new Set([...(view.plan?.devices ?? []).map((each) => each.name), "disk"])];
    const counts = countsOf(blocks, devices, text);
    this.node.classList.toggle("kn-hidden", !text.startsWith("{") || counts === null || !blocks.length);
    if (!counts) return;
    const key = JSON.stringify([blocks, devices]);
    this.counts = counts;
    if (this.drawn !== key) {
      this.drawn = key;
      this.node.replaceChildren(
        element("p", { class: "kn-note" }, `${blocks.length} parts in order: ${blocks[0] ?? ""} … ${blocks.at(-1) ?? ""}`),
        ...devices.map((device, at) => this.slider(device, at, blocks, devices)),
      );
    }
    this.node.querySelectorAll<HTMLInputElement>("input").forEach((input, at) => {
      if (input !== document.activeElement) input.value = String(counts[at] ?? 0);
    });
    this.node.querySelectorAll("output").forEach((output, at) => say(output, spanOf(blocks, counts, at)));
  }

  private slider(device: string, at: number, blocks: readonly string[], devices: readonly string[]): HTMLElement {
    const input = element("input", { type: "range", min: 0, max: blocks.length, step: 1, "aria-label": `Parts on ${device}` });
    input.addEventListener("input", () => {
      const counts = withCount(this.counts, at, Number(input.value));
      this.set({ device_map: mapOf(blocks, devices, counts), device: null });
    });
    return element("div", { class: "kn-slider" }, element("span", {}, device), input, element("output"));
  }
}

function spanOf(blocks: readonly string[], counts: readonly number[], at: number): string {
  const begin = counts.slice(0, at).reduce((sum, each) => sum + each, 0);
  const count = counts[at] ?? 0;
  if (!count) return "none";
  const short = (name: string | undefined): string => (name ?? "").replace(/^model\./, "");
  const first = short(blocks[begin]);
  const last = short(blocks[begin + count - 1]);
  return count === 1 ? first : `${count}: ${first} … ${last}`;
}

/** One choice for `device` and `device_map` together, since each excludes the other. */
export class PlaceChoice {
  readonly node: HTMLElement;
  private readonly select = element("select");

  constructor(scope: Scope, set: Set, view: () => View) {
    assign(this.select, { "aria-label": "Place" });
    this.node = element("div", { class: "kn-field kn-wide" }, this.select);
    scope.listen(this.select, "change", () => {
      const chosen = this.select.value;
      if (chosen.startsWith("on:")) set({ device: chosen.slice(3), device_map: null });
      else if (chosen === "layers") set({ device: null, device_map: layersNow(view()) });
      else if (chosen !== "own") set({ device: null, device_map: chosen || null });
    });
  }

  draw(view: View, device: string, map: string): void {
    const devices = (view.plan?.devices ?? []).map((each) => each.name).filter((name) => name !== "disk");
    const own: Choices = map && !STRATEGIES.some(([value]) => value === map) && !map.startsWith("{") ? [["own", map]] : [];
    fill(this.select, [
      ...STRATEGIES,
      ...devices.map((name) => [`on:${name}`, `only ${name}`] as const),
      ["layers", "by layer"],
      ...own,
    ]);
    choose(this.select, device ? `on:${device}` : map.startsWith("{") ? "layers" : own.length ? "own" : map);
  }
}

/** The map as planned now, to be changed by hand; where nothing is planned, all on the first device. */
function layersNow(view: View): string {
  const blocks = view.blocks ?? [];
  const devices = (view.plan?.devices ?? []).map((each) => each.name);
  const planned = view.plan?.map ?? {};
  const map = Object.fromEntries(blocks.map((block) => [block, planned[block] ?? planned[""] ?? devices[0] ?? "cpu"]));
  return JSON.stringify(blocks.length ? map : { "": devices[0] ?? "cpu" });
}

/** A slider for each device: how much of it may be used. */
export class MemoryLimits {
  readonly node = element("div", { class: "kn-field kn-wide", role: "group", "aria-label": "Memory limits" });
  private limits: Record<string, number> = {};
  private drawn = "";

  constructor(private readonly set: Set) {}

  draw(view: View): void {
    const devices = (view.plan?.devices ?? []).filter((each) => each.name !== "disk");
    this.limits = { ...view.limits };
    const key = JSON.stringify(devices.map((each) => [each.name, each.total]));
    if (key !== this.drawn) {
      this.drawn = key;
      const caption = element("p", { class: "kn-note" }, "Most memory of each device:");
      this.node.replaceChildren(caption, ...devices.map((each) => this.slider(each.name, each.total)));
    }
    devices.forEach((device, at) => {
      const input = this.node.querySelectorAll("input")[at];
      const limit = this.limits[device.name];
      if (input && input !== document.activeElement) input.value = String((limit ?? device.total) / GIB);
      const output = this.node.querySelectorAll("output")[at];
      if (output) say(output, limit === undefined ? "no limit" : `at most ${(limit / GIB).toFixed(2)} GiB`);
    });
  }

  private slider(name: string, total: number): HTMLElement {
    const most = total / GIB;
    const step = most > 16 ? 0.5 : most > 2 ? 0.125 : 0.03125;
    const input = element("input", { type: "range", min: 0, max: most, step, "aria-label": `Most memory of ${name}` });
    input.addEventListener("input", () => {
      const limits = { ...this.limits };
      const chosen = Number(input.value);
      if (chosen > most - step) delete limits[name];
      else limits[name] = Math.round(chosen * GIB);
      const words = Object.entries(limits).map(([device, bytes]) => `${device}=${Number((bytes / GIB).toFixed(3))}GiB`);
      this.set({ max_memory: words.length ? words.join(",") : null });
    });
    return element("div", { class: "kn-slider" }, element("span", {}, name), input, element("output"));
  }
}
