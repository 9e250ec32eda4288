/** A widget model without a kernel: what a test sets, what the widget sends, and the kernel's side of both. */

import type { Model } from "../src/model";

export class FakeModel<State extends object> implements Model<State> {
  readonly sent: Record<string, unknown>[] = [];
  readonly saved: Partial<State>[] = [];
  interrupts = 0;
  readonly control: { header: Record<string, string>; content: object }[] = [];
  readonly widget_manager = {
    kernel: {
      interrupt: () => ++this.interrupts,
      sendControlMessage: (message: object) => this.control.push(message as (typeof this.control)[number]),
    },
  };
  private readonly listeners = new Map<string, Set<(...given: never[]) => void>>();
  private changed: Partial<State> = {};

  constructor(private readonly state: State) {}

  get<Name extends keyof State & string>(name: Name): State[Name] {
    return this.state[name];
  }

  set<Name extends keyof State & string>(name: Name, value: State[Name]): void {
    this.state[name] = value;
    this.changed[name] = value;
    this.tell(`change:${name}`);
  }

  save_changes(): void {
    this.saved.push(this.changed);
    this.changed = {};
  }

  send(content: unknown): void {
    this.sent.push(content as Record<string, unknown>);
  }

  on(event: string, listener: (...given: never[]) => void): void {
    if (!this.listeners.has(event)) this.listeners.set(event, new Set());
    this.listeners.get(event)?.add(listener);
  }

  off(event: string, listener: (...given: never[]) => void): void {
    this.listeners.get(event)?.delete(listener);
  }

  /** A message of the kernel. */
  receive(message: unknown): void {
    this.tell("msg:custom", message);
  }

  /** A trait that the kernel set. */
  arrives<Name extends keyof State & string>(name: Name, value: State[Name]): void {
    this.state[name] = value;
    this.tell(`change:${name}`);
  }

  /** Traits that the kernel set in one message: all are there before the first is told of. */
  arriveTogether(changes: Partial<State>): void {
    Object.assign(this.state, changes);
    for (const name of Object.keys(changes)) this.tell(`change:${name}`);
  }

  /** How many listeners there are. */
  get size(): number {
    return [...this.listeners.values()].reduce((sum, each) => sum + each.size, 0);
  }

  private tell(event: string, ...given: unknown[]): void {
    for (const listener of [...(this.listeners.get(event) ?? [])]) (listener as (...each: unknown[]) => void)(...given);
  }
}
