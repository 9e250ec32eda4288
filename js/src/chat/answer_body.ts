/** The drawn text of an answer: it grows while the answer runs, and is handed on to the turn that the answer becomes. */

import { assign, element } from "../dom";
import { GrowingMarkdown } from "../markdown";
import { Scope } from "../scope";
import { decorate, type Insert } from "./code_tools";

export class AnswerBody {
  readonly node = element("div", { class: "kn-md", dir: "auto" });
  private readonly scope = new Scope();
  private readonly growing: GrowingMarkdown;

  constructor(insert: Insert) {
    this.growing = new GrowingMarkdown(this.node, (block) => decorate(this.scope, block, insert));
  }

  /** Draw `text`; what stands there already is kept. */
  draw(text: string): void {
    this.growing.draw(text);
  }

  /** Whether what comes is spoken. */
  speak(isSpoken: boolean): void {
    assign(this.node, { "aria-live": isSpoken ? "polite" : null, "aria-atomic": isSpoken ? "false" : null });
  }

  /** Take it away. */
  end(): void {
    this.scope.end();
    this.node.remove();
  }
}
