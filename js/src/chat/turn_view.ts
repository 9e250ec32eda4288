/** One turn on the page: prompt, tool steps, reasoning, answer, numbers; and what can be done with it. */

import { assign, element, say } from "../dom";
import { Scope } from "../scope";
import { AnswerBody } from "./answer_body";
import { copyButton, type Insert } from "./code_tools";
import type { LiveAnswer } from "./live_answer";
import type { Running, Step, Turn } from "./types";

/** The person's own pictures, as the kernel made them: raster formats alone. */
const PICTURE = /^data:image\/(?:png|jpeg|gif|webp);base64,[\w+/=]*$/;

/** What the buttons of a turn do. */
export interface Actions {
  retry(turn: Turn): void;
  edit(turn: Turn): void;
  go(turnId: string): void;
  insert: Insert;
}

/** A turn that is over. Its answer is drawn when it comes near the screen: most of a long conversation never does. */
export class TurnView {
  readonly node: HTMLElement;
  private readonly scope = new Scope();
  private readonly body: AnswerBody;
  private isDrawn = false;

  /** @param drawn the answer as it stands on the page already, if it does. */
  constructor(
    readonly turn: Turn,
    actions: Actions,
    drawn?: AnswerBody,
  ) {
    this.body = drawn ?? new AnswerBody(actions.insert);
    const { siblings, id } = turn;
    const at = siblings.indexOf(id);
    const tools = element("div", { class: "kn-tools" });
    tools.append(
      copyButton(this.scope, "Copy", () => turn.answer),
      this.button("Retry", `Retry turn ${turn.number}`, () => actions.retry(turn)),
    );
    if (turn.can_edit) tools.append(this.button("Edit", `Edit turn ${turn.number}`, () => actions.edit(turn)));
    if (siblings.length > 1) {
      const back = this.button("‹", "Earlier version of this turn", () => actions.go(siblings[at - 1] as string));
      const on = this.button("›", "Later version of this turn", () => actions.go(siblings[at + 1] as string));
      back.disabled = at === 0;
      on.disabled = at === siblings.length - 1;
      tools.append(back, element("span", { class: "kn-count" }, `${at + 1} of ${siblings.length}`), on);
    }
    if (drawn) this.draw();
    else this.body.node.textContent = turn.answer;
    this.node = element(
      "article",
      { class: "kn-turn", "aria-label": `Turn ${turn.number}`, "data-turn": id },
      promptNode(turn.prompt),
      ...turn.pictures.filter(({ source }) => PICTURE.test(source)).map(({ words, source }) => element("img", { class: "kn-picture", alt: words, src: source })),
      stepsNode(turn.steps),
      reasoningNode(turn.reasoning, false),
      element("div", { class: "kn-who" }, turn.model),
      this.body.node,
      element("p", { class: "kn-note kn-stat" }, turn.is_cut && !turn.stat ? "interrupted" : turn.stat),
      tools,
    );
  }

  /** Draw the answer's Markdown, once. */
  draw(): void {
    if (this.isDrawn) return;
    this.isDrawn = true;
    this.body.draw(this.turn.answer);
  }

  /** Take it away. */
  end(): void {
    this.body.end();
    this.scope.end();
    this.node.remove();
  }

  private button(text: string, label: string, press: () => void): HTMLButtonElement {
    const node = element("button", { type: "button", class: "kn-small", "aria-label": label, title: label }, text);
    this.scope.listen(node, "click", press);
    return node;
  }
}

/** The turn that is being answered. */
export class RunningView {
  readonly node: HTMLElement;
  private readonly scope = new Scope();
  private readonly prompt = element("div", { class: "kn-said", dir: "auto" });
  private readonly steps = element("div");
  private readonly reasoning = element("details", { class: "kn-fold" }, element("summary", {}, "Reasoning"), element("div", { dir: "auto" }));
  private body: AnswerBody | null;
  private readonly notes = element("div");
  private readonly status = element("span", { role: "status" });
  private readonly numbers = element("span");
  private readonly question = element("p", { class: "kn-question" });
  private readonly asked: HTMLElement;
  private drawnSteps = "";

  /** @param answer sends what was pressed where the round asks. */
  constructor(insert: Insert, answer: (text: string) => void) {
    this.body = new AnswerBody(insert);
    this.body.speak(true);
    const buttons = [["y", "Run it"], ["a", "Always"], ["n", "Do not run it"]].map(([text, label]) => {
      const button = element("button", { type: "button" }, label as string);
      this.scope.listen(button, "click", () => answer(text as string));
      return button;
    });
    this.asked = element("div", { class: "kn-asked", role: "alert" }, this.question, element("div", { class: "kn-row" }, ...buttons));
    this.node = element(
      "article",
      { class: "kn-turn kn-running", "aria-label": "Running answer", "aria-busy": "true" },
      this.prompt,
      this.steps,
      this.reasoning,
      this.body.node,
      this.asked,
      this.notes,
      element("p", { class: "kn-note kn-stat" }, element("i", { class: "kn-pulse", "aria-hidden": "true" }), this.status, this.numbers),
    );
  }

  draw(running: Running, live: LiveAnswer): void {
    say(this.prompt, running.prompt ?? "");
    const key = JSON.stringify(running.steps ?? []);
    if (key !== this.drawnSteps) {
      this.drawnSteps = key;
      this.steps.replaceChildren(stepsNode(running.steps ?? []));
    }
    this.reasoning.classList.toggle("kn-hidden", !live.reasoning);
    const thought = this.reasoning.lastElementChild;
    if (thought) say(thought, live.reasoning);
    this.body?.draw(live.text);
    say(this.question, (running.question ?? "").replace(/\s*\[y\]es.*$/s, ""));
    this.asked.classList.toggle("kn-hidden", !running.question);
    this.notes.replaceChildren(...(running.notes ?? []).map((note) => element("p", { class: "kn-note" }, note)));
    say(this.status, running.status ?? "");
    say(this.numbers, live.numbers ? ` · ${live.numbers}` : "");
  }

  /** Hand on the answer as it is drawn; this view shows none from then on. */
  handOn(): AnswerBody | undefined {
    const body = this.body ?? undefined;
    this.body = null;
    body?.speak(false);
    return body;
  }

  end(): void {
    this.body?.end();
    this.scope.end();
    this.node.remove();
  }
}

function promptNode(text: string): HTMLElement {
  return element("div", { class: "kn-said", dir: "auto" }, text);
}

function reasoningNode(text: string, open: boolean): HTMLElement {
  const node = element("details", { class: "kn-fold", open }, element("summary", {}, "Reasoning"), element("div", { dir: "auto" }, text));
  node.classList.toggle("kn-hidden", !text);
  return node;
}

function stepsNode(steps: readonly Step[]): HTMLElement {
  const node = element("div", {}, ...steps.map(stepNode));
  assign(node, { class: steps.length ? "kn-steps-done" : "kn-hidden" });
  return node;
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
