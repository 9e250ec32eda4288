/** What is folded above an answer: the calls of tools, and what the model thought. What a person opened stays open. */

import { element, say } from "../dom";
import type { Step } from "./types";

export class Folds {
  readonly steps = element("div");
  readonly reasoning: HTMLElement;
  private readonly thought = element("div", { dir: "auto" });
  private drawn = "";

  constructor() {
    this.reasoning = element("details", { class: "kn-fold kn-hidden" }, element("summary", {}, "Reasoning"), this.thought);
  }

  draw(steps: readonly Step[], reasoning: string): void {
    this.reasoning.classList.toggle("kn-hidden", !reasoning);
    say(this.thought, reasoning);
    const key = JSON.stringify(steps);
    if (key === this.drawn) return;
    this.drawn = key;
    const opened = this.all().map((each) => each.open);
    this.steps.replaceChildren(...steps.map(stepNode));
    this.steps.className = steps.length ? "kn-steps-done" : "kn-hidden";
    this.all().forEach((each, at) => (each.open = opened[at] ?? false));
  }

  private all(): HTMLDetailsElement[] {
    return [...this.steps.querySelectorAll("details")];
  }
}

/** What a person asked, as it was written. */
export function promptNode(text = ""): HTMLElement {
  return element("div", { class: "kn-said", dir: "auto" }, text);
}

function stepNode(step: Step): HTMLElement {
  const folded = element(
    "details",
    { class: "kn-fold" },
    element("summary", {}, `${step.is_error ? "✗ " : ""}${step.line}`),
    element("pre", { tabindex: 0 }, step.arguments),
    step.result === null ? null : element("pre", { tabindex: 0 }, step.result),
  );
  return element("div", {}, step.said ? element("div", { class: "kn-note", dir: "auto" }, step.said) : null, folded);
}
