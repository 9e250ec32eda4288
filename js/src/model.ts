/** What anywidget passes to `render`: the part of Jupyter's widget model that we use. */

export interface Model<State extends object> {
  get<Name extends keyof State & string>(name: Name): State[Name] | undefined;
  set<Name extends keyof State & string>(name: Name, value: State[Name]): void;
  save_changes(): void;
  send(content: unknown, callbacks?: undefined, buffers?: ArrayBuffer[]): void;
  on(event: string, listener: (...given: never[]) => void): void;
  off(event: string, listener: (...given: never[]) => void): void;
  /** Where the front end gives it: what can interrupt the kernel without the kernel's help. */
  widget_manager?: { kernel?: Kernel };
}

/** Of JupyterLab's connection to a kernel. */
export interface Kernel {
  interrupt(): unknown;
  clientId?: string;
  username?: string;
  sendControlMessage?(message: object, expectsReply: boolean, disposes: boolean): unknown;
}

export interface Context<State extends object> {
  model: Model<State>;
  el: HTMLElement;
}
