/**
 * The live strip under a running answer: Stop, what happens, elapsed time, speed, and a sparkline of memory.
 *
 * Kept under 5 KB: its source travels in every comm_open.
 */

import { element, say, stageOf } from "../dom";
import { keepKeys } from "../keys";
import type { Context } from "../model";
import { Scope } from "../scope";
import { sparkline } from "../sparkline";
import { stopper } from "../stop";
import css from "./strip.css?inline";

interface Shown {
  comm?: string;
  status?: string;
  numbers?: string;
  memory?: string;
  series?: number[];
}

function render({ model, el }: Context<{ state: Shown }>): () => void {
  const scope = new Scope();
  const stop = element("button", { type: "button", "aria-label": "Stop the answer" }, "Stop");
  const status = element("span");
  const spoken = element("b", { role: "status" });
  const numbers = element("span");
  const memory = element("span");
  const line = sparkline();
  const root = element(
    "div",
    { class: "kani-strip", role: "group", "aria-label": "Running answer" },
    element("style", {}, css),
    stop,
    element("i", { "aria-hidden": "true" }),
    status,
    spoken,
    numbers,
    memory,
    line.node,
  );
  el.append(root);
  scope.finally(() => root.remove());
  keepKeys(scope, root);

  const tell = (text: string): void => {
    say(status, text);
    say(spoken, stageOf(text));
  };
  let isStopping = false;
  const draw = (): void => {
    const shown = model.get("state") ?? {};
    tell(isStopping ? "stopping…" : (shown.status ?? ""));
    numbers.textContent = shown.numbers ?? "";
    memory.textContent = shown.memory ?? "";
    line.draw(shown.series ?? []);
  };
  const send = stopper(scope, model, () => model.get("state")?.comm ?? "", () => tell("interrupting the kernel…"));
  scope.listen(stop, "click", () => {
    isStopping = stop.disabled = true;
    draw();
    send();
  });
  scope.on(model, "change:state", draw);
  draw();
  return scope.end;
}

export default { render };
