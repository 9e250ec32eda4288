/** Copy, and insert as the next cell: the buttons on a block of code. */

import { copyText } from "../copy";
import { element, press, say } from "../dom";
import type { Scope } from "../scope";

/** What inserts code below the running cell's notebook position; null where the front end offers no way. */
export type Insert = ((code: string) => void) | null;

/** A button that copies what `text` gives, and says so. */
export function copyButton(scope: Scope, label: string, text: () => string): HTMLButtonElement {
  const button = element("button", { type: "button", class: "kn-small" }, label);
  press(button, () => {
    void copyText(text()).then((isCopied) => {
      say(button, isCopied ? "Copied" : "Not allowed here");
      scope.after(1500, () => say(button, label));
    });
  });
  return button;
}

/** Put the buttons onto the code in a block of an answer, once. */
export function decorate(scope: Scope, block: HTMLElement, insert: Insert): void {
  const code = block.querySelector("pre > code");
  if (!code) return;
  const text = (): string => (code.textContent ?? "").replace(/\n$/, "");
  const tools = element("div", { class: "kn-code-tools" }, copyButton(scope, "Copy", text));
  if (insert) {
    const button = element("button", { type: "button", class: "kn-small" }, "To next cell");
    press(button, () => {
      insert(text());
      say(button, "Inserted");
      scope.after(1500, () => say(button, "To next cell"));
    });
    tools.append(button);
  }
  block.classList.add("kn-code");
  block.prepend(tools);
}

interface Notebook {
  cells: unknown[];
  insertCell(index: number, cell: { cell_type: "code"; source: string; metadata: object }): unknown;
}

/** What inserts a code cell below the cell that holds `el`, through the notebook that its widget manager belongs to. */
export function inserter(manager: unknown, el: HTMLElement): Insert {
  const context = (manager as { context?: { model?: { sharedModel?: Notebook } } } | undefined)?.context;
  const notebook = context?.model?.sharedModel;
  if (!notebook || typeof notebook.insertCell !== "function") return null;
  return (code) => {
    const cell = el.closest<HTMLElement>(".jp-Cell");
    // Where cells far away are not on the page, each says which it is.
    const own = Number(cell?.dataset["windowedListIndex"] ?? Number.NaN);
    const cells = [...(cell?.parentElement?.querySelectorAll(":scope > .jp-Cell") ?? [])];
    const at = cell ? (Number.isNaN(own) ? cells.indexOf(cell) : own) + 1 : 0;
    notebook.insertCell(at || notebook.cells.length, { cell_type: "code", source: code, metadata: {} });
  };
}
