/** Keys that are pressed in a panel stay there: a notebook has shortcuts for buttons and sliders too, and `x` cuts a cell. */

import type { Scope } from "./scope";

/** What JupyterLab's shortcuts pass over, on the very element that has the focus. */
const SUPPRESSED = "data-lm-suppress-shortcuts";

const isSave = ({ key, ctrlKey, metaKey }: KeyboardEvent): boolean => (ctrlKey || metaKey) && key.toLowerCase() === "s";

/** Keep the keys in `root`, but for those that save the notebook. */
export function keepKeys(scope: Scope, root: HTMLElement): void {
  // Notebook 7 hears keys at the document before any widget does: told before that, it passes over the element.
  scope.listen(
    window,
    "keydown",
    (event) => {
      const target = event.target;
      if (target instanceof Element && root.contains(target)) target.toggleAttribute(SUPPRESSED, !isSave(event));
    },
    { capture: true },
  );
  scope.listen(root, "keydown", (event) => {
    if (!isSave(event)) event.stopPropagation();
  });
}
