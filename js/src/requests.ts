/** Messages to the kernel that are answered: each carries an id, and what goes wrong is told. */

import type { Model } from "./model";
import type { Scope } from "./scope";

/** A kernel that is busy with a cell answers when that has ended; by then the person should have been told. */
const PATIENCE_MS = 2500;

export interface Answer {
  kind?: string;
  id?: string;
  why?: string;
}

export class Requests<State extends object> {
  private readonly open = new Map<string, () => void>();
  private count = 0;

  /**
   * @param complain shows what went wrong; an empty text takes it away.
   * @param answered gets every answer.
   */
  constructor(
    private readonly scope: Scope,
    private readonly model: Model<State>,
    private readonly complain: (text: string) => void,
    answered: (answer: Answer) => void = () => undefined,
  ) {
    scope.on(model, "msg:custom", (answer: Answer | undefined) => {
      const settle = answer?.id === undefined ? undefined : this.open.get(answer.id);
      if (answer?.id === undefined || !settle) return;
      this.open.delete(answer.id);
      settle();
      this.complain(answer.kind === "error" ? (answer.why ?? "it failed") : "");
      answered(answer);
    });
  }

  /** Send one message; its id. */
  send(kind: string, more: Record<string, unknown> = {}, buffers: ArrayBuffer[] = []): string {
    const id = `${Date.now().toString(36)}-${++this.count}`;
    const stop = this.scope.after(PATIENCE_MS, () =>
      this.complain("The kernel has not answered yet: it is busy, or gone. What was asked is done when it is free."),
    );
    this.open.set(id, stop);
    if (buffers.length) this.model.send({ kind, id, ...more }, undefined, buffers);
    else this.model.send({ kind, id, ...more });
    return id;
  }
}
