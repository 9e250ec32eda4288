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

interface Open<Given> {
  kind: string;
  answered: (answer: Given) => void;
  /** Ends the wait for an answer. */
  settle: () => void;
}

export class Requests<State extends object, Given extends Answer = Answer> {
  private readonly open = new Map<string, Open<Given>>();
  private count = 0;
  /** What kinds of request were complained of: when such a one succeeds, the complaint goes. */
  private readonly complained = new Set<string>();

  /** @param complain shows what went wrong with a kind of request; an empty text takes it away. */
  constructor(
    private readonly scope: Scope,
    private readonly model: Model<State>,
    private readonly complain: (text: string, kind: string) => void,
  ) {
    scope.on(model, "msg:custom", (answer: Given | undefined) => {
      const asked = answer?.id === undefined ? undefined : this.open.get(answer.id);
      if (answer?.id === undefined || !asked) return;
      this.open.delete(answer.id);
      asked.settle();
      if (answer.kind === "error") this.say(asked.kind, answer.why ?? "it failed");
      else if (this.complained.has(asked.kind)) this.say(asked.kind, "");
      asked.answered(answer);
    });
  }

  /** Send one message; `answered` gets the answer, whichever it is. */
  send(kind: string, more: Record<string, unknown> = {}, answered: (answer: Given) => void = () => undefined, buffers: ArrayBuffer[] = []): void {
    const id = `${Date.now().toString(36)}-${++this.count}`;
    const settle = this.scope.after(PATIENCE_MS, () =>
      this.say(kind, "The kernel has not answered yet: it is busy, or gone. What was asked is done when it is free."),
    );
    this.open.set(id, { kind, answered, settle });
    if (buffers.length) this.model.send({ kind, id, ...more }, undefined, buffers);
    else this.model.send({ kind, id, ...more });
  }

  /** Complain of what was not sent at all. */
  refuse(kind: string, why: string): void {
    this.say(kind, why);
  }

  private say(kind: string, text: string): void {
    if (text) this.complained.add(kind);
    else this.complained.delete(kind);
    this.complain(text, kind);
  }
}
