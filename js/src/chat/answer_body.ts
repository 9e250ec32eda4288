/** The drawn text of an answer: it grows while the answer runs, and is handed on to the turn that the answer becomes. */

import { element } from "../dom";
import { GrowingMarkdown } from "../markdown";
import { Scope } from "../scope";
import { decorate, type Insert } from "./code_tools";

export class AnswerBody {
  readonly node = element("div", { class: "kn-md", dir: "auto" });
  private readonly scope = new Scope();
  private readonly growing: GrowingMarkdown;

  /** @param speak gets the text of each block when it has ended. */
  constructor(insert: Insert, speak: (text: string) => void = () => undefined) {
    this.growing = new GrowingMarkdown(
      this.node,
      (block) => decorate(this.scope, block, insert),
      (block) => speak((block.querySelector("pre > code") ?? block).textContent ?? ""),
    );
  }

  /** Draw `text`; what stands there already is kept. */
  draw(text: string): void {
    this.growing.draw(text);
  }

  /** There comes no more. */
  finish(): void {
    this.growing.end();
  }

  /** Take it away. */
  end(): void {
    this.scope.end();
    this.node.remove();
  }
}
