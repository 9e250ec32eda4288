/** Where a person writes: Enter sends, Shift+Enter breaks the line, Esc stops; files are dropped, pasted or chosen. */

import { element } from "../dom";
import type { Scope } from "../scope";

/** What leaves the composer. */
export interface Draft {
  text: string;
  files: File[];
}

export class Composer {
  readonly node: HTMLElement;
  private readonly box = element("textarea", { rows: 2, "aria-label": "Message", placeholder: "Ask something. Enter sends, Shift+Enter begins a line." });
  private readonly sendButton = element("button", { type: "button", class: "kn-main" }, "Send");
  private readonly stopButton = element("button", { type: "button", class: "kn-main" }, "Stop");
  private readonly picker = element("input", { type: "file", accept: "image/*,audio/*", multiple: true, class: "kn-sr", tabindex: -1, "aria-label": "Attach images or audio" });
  private readonly attach = element("button", { type: "button", title: "Attach images or audio", "aria-label": "Attach images or audio" }, "Attach");
  private readonly chips = element("ul", { class: "kn-chips", "aria-label": "Attached files" });
  private readonly label = element("p", { class: "kn-note kn-hidden" });
  private files: File[] = [];
  private isAnswering = false;

  /**
   * @param send gets what was written; the draft stays until `clear`.
   * @param stop ends the running answer.
   */
  constructor(
    private readonly scope: Scope,
    private readonly send: (draft: Draft) => void,
    stop: () => void,
  ) {
    scope.listen(this.box, "keydown", (event) => {
      // What an input method composes is not sent yet.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit();
      }
      // The notebook has shortcuts of its own.
      event.stopPropagation();
      if (event.key === "Escape" && this.isAnswering) stop();
    });
    scope.listen(this.box, "input", () => this.fit());
    scope.listen(this.box, "paste", (event) => this.take(event.clipboardData?.files, event));
    scope.listen(this.sendButton, "click", () => this.submit());
    scope.listen(this.stopButton, "click", stop);
    scope.listen(this.attach, "click", () => this.picker.click());
    scope.listen(this.picker, "change", () => this.take(this.picker.files));
    const row = element("div", { class: "kn-row" }, this.sendButton, this.stopButton, this.attach, this.picker);
    this.node = element("div", { class: "kn-composer" }, this.label, this.box, this.chips, row);
    this.answering(false);
  }

  /** Take files that were dropped or pasted. */
  take(files: Iterable<File> & { length: number } | null | undefined, event?: Event): void {
    if (!files?.length) return;
    event?.preventDefault();
    this.files.push(...files);
    this.drawChips();
  }

  /** Whether Stop or Send is what can be pressed. */
  answering(is: boolean): void {
    const had = document.activeElement === (this.isAnswering ? this.stopButton : this.sendButton);
    this.isAnswering = is;
    this.sendButton.classList.toggle("kn-hidden", is);
    this.stopButton.classList.toggle("kn-hidden", !is);
    if (is) this.stopButton.disabled = false;
    if (had) (is ? this.stopButton : this.sendButton).focus();
  }

  /** Stop was pressed: once is enough. */
  stopping(): void {
    this.stopButton.disabled = true;
  }

  /** Put a text to write on with, and say what it will do. */
  fill(text: string, label = ""): void {
    this.box.value = text;
    this.say(label);
    this.fit();
  }

  /** Let the person write on. */
  focus(): void {
    this.box.focus();
  }

  /** Say what Send will do, where that is not to append. */
  say(label: string): void {
    this.label.textContent = label;
    this.label.classList.toggle("kn-hidden", !label);
  }

  /** Nothing can be sent any more. */
  disable(): void {
    for (const each of [this.sendButton, this.attach]) each.disabled = true;
  }

  clear(): void {
    this.box.value = "";
    this.files = [];
    this.say("");
    this.drawChips();
    this.fit();
  }

  get text(): string {
    return this.box.value;
  }

  private submit(): void {
    if (this.isAnswering || this.sendButton.disabled || (!this.box.value.trim() && !this.files.length)) return;
    this.send({ text: this.box.value, files: this.files });
  }

  private fit(): void {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(240, this.box.scrollHeight + 2)}px`;
  }

  private drawChips(): void {
    this.chips.replaceChildren(
      ...this.files.map((file) => {
        const away = element("button", { type: "button", class: "kn-small", "aria-label": `Remove ${file.name}` }, "✕");
        this.scope.listen(away, "click", () => {
          this.files = this.files.filter((each) => each !== file);
          this.drawChips();
        });
        return element("li", {}, `${file.name} (${Math.ceil(file.size / 1024)} KB) `, away);
      }),
    );
  }
}
