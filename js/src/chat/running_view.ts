/** The turn that is being answered: what happens, what has come, and what the round asks. */

import { element, press, say, stageOf } from "../dom";
import { AnswerBody } from "./answer_body";
import type { Insert } from "./code_tools";
import { Folds, promptNode } from "./folds";
import type { LiveAnswer } from "./live_answer";
import type { Handed } from "./turn_view";
import type { Running } from "./types";

/** What the round may be answered when it asks. */
const ANSWERS = [["y", "Run it"], ["a", "Always"], ["n", "Do not run it"]] as const;

export class RunningView {
  readonly node: HTMLElement;
  private readonly prompt = promptNode();
  private readonly folds = new Folds();
  private body: AnswerBody | null;
  private readonly notes = element("div");
  private readonly status = element("span");
  private readonly numbers = element("span");
  private readonly question = element("p", { class: "kn-question" });
  private readonly answers = element("div", { class: "kn-row" });
  private readonly asked = element("div", { class: "kn-asked", role: "alert" }, this.question, this.answers);
  private questionId = "";
  private stage = "";

  /**
   * @param insert see `AnswerBody`.
   * @param answer sends what was pressed where the round asks: to which question, and `y`, `a` or `n`.
   * @param speak says what is worth it to those who do not see it.
   */
  constructor(
    insert: Insert,
    answer: (question: string, text: string) => void,
    private readonly speak: (text: string) => void,
  ) {
    this.body = new AnswerBody(insert, speak);
    for (const [text, label] of ANSWERS) {
      const button = element("button", { type: "button" }, label);
      press(button, () => {
        this.node.focus(); // which the button loses
        this.answers.inert = true; // one press answers one question
        answer(this.questionId, text);
      });
      this.answers.append(button);
    }
    this.node = element(
      "article",
      { class: "kn-turn kn-running", "aria-label": "Running answer", tabindex: -1 },
      this.prompt,
      this.folds.steps,
      this.folds.reasoning,
      this.body.node,
      this.asked,
      this.notes,
      element("p", { class: "kn-note kn-stat" }, element("i", { class: "kn-pulse", "aria-hidden": "true" }), this.status, this.numbers),
    );
  }

  draw(running: Running, live: LiveAnswer): void {
    say(this.prompt, running.prompt ?? "");
    this.folds.draw(running.steps ?? [], live.reasoning);
    this.body?.draw(live.text);
    this.ask(running.question?.id ?? "", running.question?.text ?? "");
    this.notes.replaceChildren(...(running.notes ?? []).map((note) => element("p", { class: "kn-note" }, note)));
    say(this.status, live.status);
    say(this.numbers, live.numbers ? ` · ${live.numbers}` : "");
    const stage = stageOf(live.status);
    if (stage === this.stage) return;
    this.stage = stage;
    if (!live.text) this.speak(stage);
  }

  /** Hand on what is drawn; this view shows none of it from then on. */
  handOn(): Handed | undefined {
    const body = this.body;
    this.body = null;
    return body ? { body, folds: this.folds } : undefined;
  }

  end(): void {
    this.body?.end();
    this.node.remove();
  }

  private ask(id: string, text: string): void {
    this.asked.classList.toggle("kn-hidden", !id);
    say(this.question, text);
    if (id !== this.questionId) this.answers.inert = false;
    this.questionId = id;
  }
}
