/** What a widget's `render` began, so that all of it can be undone: listeners, timers, nodes. */

import type { Model } from "./model";

export class Scope {
  private readonly undo: (() => void)[] = [];
  private readonly timers = new Set<ReturnType<typeof setTimeout>>();
  private isOver = false;

  /** Have `step` run when the scope ends; at once where it has ended. */
  finally(step: () => void): void {
    if (this.isOver) step();
    else this.undo.push(step);
  }

  /** Listen to a node for as long as the scope lasts. */
  listen<Type extends keyof HTMLElementEventMap>(
    target: HTMLElement | Document | Window,
    type: Type,
    listener: (event: HTMLElementEventMap[Type]) => void,
    options: AddEventListenerOptions = {},
  ): void {
    target.addEventListener(type, listener as EventListener, options);
    this.finally(() => target.removeEventListener(type, listener as EventListener, options));
  }

  /** Listen to a model: `change:NAME`, or `msg:custom`. */
  on<State extends object>(model: Model<State>, event: string, listener: (...given: never[]) => void): void {
    model.on(event, listener);
    this.finally(() => model.off(event, listener));
  }

  /** Call `step` once after `ms`, unless the scope ends before; the result cancels it. */
  after(ms: number, step: () => void): () => void {
    const timer = setTimeout(() => {
      this.timers.delete(timer);
      step();
    }, ms);
    this.timers.add(timer);
    const cancel = (): void => {
      clearTimeout(timer);
      this.timers.delete(timer);
    };
    if (this.isOver) cancel();
    return cancel;
  }

  /** Undo everything, the latest first. Safe to call twice. */
  readonly end = (): void => {
    this.isOver = true;
    for (const timer of this.timers) clearTimeout(timer);
    this.timers.clear();
    while (this.undo.length) this.undo.pop()?.();
  };
}
