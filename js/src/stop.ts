/** A Stop that is heard: it waits for the kernel's acknowledgement, and interrupts the kernel where none comes. */

import type { Kernel, Model } from "./model";
import type { Scope } from "./scope";

/** Without an answer by then, the kernel does not see messages while its cell runs. */
const ACKNOWLEDGED_WITHIN_MS = 800;

/**
 * The same over the control channel, which a kernel reads in a thread of its own: an ipykernel 6 sees nothing else while
 * a cell that is not ours blocks it.
 */
function sendOverControl(kernel: Kernel | undefined, commId: string): void {
  if (!commId || typeof kernel?.sendControlMessage !== "function") return;
  const header = {
    msg_id: `kani-${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`,
    msg_type: "kani_nb_comm_msg",
    session: kernel.clientId ?? "",
    username: kernel.username ?? "",
    date: new Date().toISOString(),
    version: "5.3",
  };
  const content = { comm_id: commId, data: { method: "custom", content: { kind: "stop" } } };
  try {
    kernel.sendControlMessage({ channel: "control", header, parent_header: {}, metadata: {}, content, buffers: [] }, false, true);
  } catch {
    // A connection that is gone: the interrupt that follows says so.
  }
}

/**
 * What sends a Stop. The kernel answers `{kind: "ack"}`.
 *
 * @param commId the widget's own, as the kernel knows it.
 * @param onInterrupt called when the kernel is interrupted instead.
 */
export function stopper<State extends object>(
  scope: Scope,
  model: Model<State>,
  commId: () => string,
  onInterrupt: () => void,
): () => void {
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
    sendOverControl(model.widget_manager?.kernel, commId());
  };
}
