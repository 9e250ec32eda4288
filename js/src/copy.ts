/** Text onto the clipboard, also where a page from another machine over plain HTTP has no clipboard to write to. */

import { element } from "./dom";

/** Copy `text`; whether it is on the clipboard now. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

function copySelected(text: string): boolean {
  if (typeof document.execCommand !== "function") return false;
  const before = document.activeElement;
  const box = element("textarea", { "aria-hidden": "true", tabindex: -1 });
  box.value = text;
  box.style.cssText = "position:fixed;opacity:0";
  document.body.append(box);
  box.focus();
  box.select();
  const isCopied = document.execCommand("copy");
  box.remove();
  if (before instanceof HTMLElement) before.focus();
  return isCopied;
}
