/** One turn on the page: prompt, tool steps, reasoning, answer, numbers; and what can be done with it. */

import { element, press } from "../dom";
import { Scope } from "../scope";
import { AnswerBody } from "./answer_body";
import { copyButton, type Insert } from "./code_tools";
import { Folds, promptNode } from "./folds";
import type { Turn } from "./types";

/** The person's own pictures, as the kernel made them: raster formats alone. */
const PICTURE = /^data:image\/(?:png|jpeg|gif|webp);base64,[\w+/=]*$/;

/** What the buttons of a turn do. */
export interface Actions {
  retry(turn: Turn): void;
  edit(turn: Turn): void;
  go(turnId: string): void;
  insert: Insert;
}

/** What of a turn stands on the page already, from when it was being answered. */
export interface Handed {
  body: AnswerBody;
  folds: Folds;
}

/** A turn that is over. Its answer is drawn when it comes near the screen: most of a long conversation never does. */
export class TurnView {
  readonly node: HTMLElement;
  private readonly scope = new Scope();
  private readonly body: AnswerBody;
  /** What changes the conversation. */
  private readonly acts = element("span", { class: "kn-acts" });
  private isDrawn = false;

  /** @param handed what stands on the page already, if it does. */
  constructor(
    readonly turn: Turn,
    actions: Actions,
    handed?: Handed,
  ) {
    this.body = handed?.body ?? new AnswerBody(actions.insert);
    const folds = handed?.folds ?? new Folds();
    folds.draw(turn.steps, turn.reasoning);
    const { siblings, id } = turn;
    const at = siblings.indexOf(id);
    this.acts.append(button("Retry", `Retry turn ${turn.number}`, () => actions.retry(turn)));
    if (turn.can_edit) this.acts.append(button("Edit", `Edit turn ${turn.number}`, () => actions.edit(turn)));
    if (siblings.length > 1) {
      const back = button("‹", "Earlier version of this turn", () => actions.go(siblings[at - 1] as string));
      const on = button("›", "Later version of this turn", () => actions.go(siblings[at + 1] as string));
      back.disabled = at === 0;
      on.disabled = at === siblings.length - 1;
      this.acts.append(back, element("span", { class: "kn-count" }, `${at + 1} of ${siblings.length}`), on);
    }
    this.body.node.textContent ||= turn.answer;
    if (handed) {
      this.draw();
      this.body.finish();
    }
    this.node = element(
      "article",
      { class: "kn-turn", "aria-label": `Turn ${turn.number}`, "data-turn": id },
      promptNode(turn.prompt),
      ...turn.pictures.filter(({ source }) => PICTURE.test(source)).map(({ words, source }) => element("img", { class: "kn-picture", alt: words, src: source })),
      folds.steps,
      folds.reasoning,
      element("div", { class: "kn-who" }, `Turn ${turn.number} · ${turn.model}`),
      this.body.node,
      element("p", { class: "kn-note kn-stat" }, turn.is_cut && !turn.stat ? "interrupted" : turn.stat),
      element("div", { class: "kn-tools" }, copyButton(this.scope, "Copy", () => turn.answer), this.acts),
    );
  }

  /** Draw the answer's Markdown, once. */
  draw(): void {
    if (this.isDrawn) return;
    this.isDrawn = true;
    this.body.draw(this.turn.answer);
  }

  /** The label of the button that has the focus; null where none of them has. */
  get focused(): string | null {
    const node = document.activeElement;
    return node && this.node.contains(node) ? node.getAttribute("aria-label") : null;
  }

  /** Give the focus to the button of that label, or to one beside it. */
  focus(label: string): void {
    const buttons = [...this.acts.querySelectorAll("button")].filter((each) => !each.disabled);
    (buttons.find((each) => each.getAttribute("aria-label") === label) ?? buttons.at(-1))?.focus();
  }

  /** The conversation cannot be changed from here any more. */
  freeze(): void {
    this.acts.inert = true;
  }

  /** Take it away. */
  end(): void {
    this.body.end();
    this.scope.end();
    this.node.remove();
  }
}

function button(text: string, label: string, act: () => void): HTMLButtonElement {
  const node = element("button", { type: "button", class: "kn-small", "aria-label": label, title: label }, text);
  press(node, act);
  return node;
}
