/** The memory plan: a bar for each device, what it means in words, and whether it fits. Nothing by colour alone. */

import { element, say } from "../dom";
import type { Device, Plan } from "./types";

const PARTS = [
  ["weights", "weights"],
  ["kv", "KV cache"],
  ["working", "working memory"],
] as const;

export class PlanView {
  readonly node: HTMLElement;
  private readonly bars = element("div");
  private readonly verdict = element("p", { class: "kn-verdict", role: "status", "aria-live": "polite" });
  private readonly more = element("div");
  private drawn = "";

  constructor() {
    const legend = element(
      "ul",
      { class: "kn-legend" },
      ...PARTS.map(([part, name]) => element("li", {}, swatch(`kn-${part}`), name)),
      element("li", {}, swatch("kn-used"), "not available"),
    );
    this.node = element("div", { role: "group", "aria-label": "Memory plan" }, this.verdict, this.bars, legend, this.more);
  }

  /** Draw a plan; `waiting` is said where there is none yet. */
  draw(plan: Plan | null | undefined, waiting: string): void {
    const key = JSON.stringify(plan ?? waiting);
    if (key === this.drawn) return;
    this.drawn = key;
    const isRefused = plan?.fits === false || (plan?.fits === null && plan.fix !== "");
    say(this.verdict, plan ? `${isRefused ? "✗ " : plan.fits ? "✓ " : ""}${plan.verdict}` : waiting);
    this.verdict.classList.toggle("kn-error", isRefused);
    this.bars.replaceChildren(...(plan?.devices ?? []).map(bar));
    const notes = plan ? [plan.fix && `→ ${plan.fix}`, plan.speed, ...plan.notes].filter(Boolean) : [];
    this.more.replaceChildren(...notes.map((note) => element("p", { class: "kn-note" }, note as string)));
  }
}

function swatch(name: string): HTMLElement {
  const node = element("i", { "aria-hidden": "true", class: name });
  node.style.background = `var(--${name}, repeating-linear-gradient(45deg, var(--kn-line) 0 2px, transparent 2px 5px))`;
  return node;
}

function bar(device: Device): HTMLElement {
  const needed = device.weights + device.kv + device.working;
  const whole = Math.max(device.total, needed) || 1;
  const percent = (bytes: number): string => `${((100 * bytes) / whole).toFixed(2)}%`;
  const drawing = element("div", {
    class: `kn-bar${device.is_over ? " kn-over" : ""}`,
    role: "img",
    "aria-label": `${device.name}: ${device.words}`,
  });
  const add = (name: string, bytes: number): void => {
    if (bytes <= 0) return;
    const part = element("i", { class: name });
    part.style.width = percent(bytes);
    drawing.append(part);
  };
  add("kn-used", Math.min(device.total - device.usable, whole - needed));
  for (const [part] of PARTS) add(`kn-${part}`, device[part]);
  const about = device.description ? ` (${device.description})` : "";
  return element(
    "div",
    { class: "kn-device" },
    element("div", { class: "kn-device-name" }, element("span", {}, `${device.name}${about}`)),
    drawing,
    element("p", { class: `kn-note${device.is_over ? " kn-error" : ""}` }, device.words),
  );
}
