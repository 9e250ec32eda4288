/** Messages to the kernel that are answered: each carries an id, and what goes wrong is told. */

import { say } from "./dom";
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

/** What shows complaints in one line: a success takes away what was said of requests of its own kind alone. */
export function complaints(line: Element): (text: string, kind: string) => void {
  let complainedOf = "";
  return (text, kind) => {
    if (!text && kind !== complainedOf) return;
    complainedOf = kind;
    say(line, text);
  };
}

export class Requests<State extends object, Given extends Answer = Answer> {
  private readonly open = new Map<string, Open<Given>>();
  private count = 0;

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
      if (answer.kind === "error") this.complain(answer.why ?? "it failed", asked.kind);
      else this.complain("", asked.kind);
      asked.answered(answer);
    });
  }

  /** Send one message; `answered` gets the answer, whichever it is. */
  send(kind: string, more: Record<string, unknown> = {}, answered: (answer: Given) => void = () => undefined, buffers: ArrayBuffer[] = []): void {
    const id = `${Date.now().toString(36)}-${++this.count}`;
    const settle = this.scope.after(PATIENCE_MS, () =>
      this.complain("The kernel has not answered yet: it is busy, or gone. What was asked is done when it is free.", kind),
    );
    this.open.set(id, { kind, answered, settle });
    if (buffers.length) this.model.send({ kind, id, ...more }, undefined, buffers);
    else this.model.send({ kind, id, ...more });
  }

  /** Complain of what was not sent at all. */
  refuse(kind: string, why: string): void {
    this.complain(why, kind);
  }
}
