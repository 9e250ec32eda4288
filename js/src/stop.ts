/** A Stop that is heard: it waits for the kernel's acknowledgement, and interrupts the kernel where none comes. */

import type { Model } from "./model";
import type { Scope } from "./scope";

/** Without an answer by then, the kernel does not see messages while its cell runs. */
const ACKNOWLEDGED_WITHIN_MS = 800;

/**
 * What sends a Stop. The kernel answers `{kind: "ack"}`.
 *
 * @param onInterrupt called when the kernel is interrupted instead.
 */
export function stopper<State extends object>(scope: Scope, model: Model<State>, onInterrupt: () => void): () => void {
  let cancel: (() => void) | undefined;
  scope.on(model, "msg:custom", (message: { kind?: string } | undefined) => {
    if (message?.kind === "ack") cancel?.();
  });
  return () => {
    cancel?.();
    cancel = scope.after(ACKNOWLEDGED_WITHIN_MS, () => {
      onInterrupt();
      model.widget_manager?.kernel?.interrupt();
    });
    model.send({ kind: "stop" });
  };
}
