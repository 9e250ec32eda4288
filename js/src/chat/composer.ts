/** Where a person writes: Enter sends, Shift+Enter breaks the line, Esc stops; files are dropped, pasted or chosen. */

import { element, press } from "../dom";
import type { Scope } from "../scope";

/** A Jupyter server closes the connection on a message over 10 MiB; these go out together with the text. */
const MOST_BYTES = 8 * 2 ** 20;

/** What leaves the composer. */
export interface Draft {
  text: string;
  files: readonly File[];
}

/** What is asked of the pane. */
export interface ComposerActions {
  /** Gets what was written; the draft stays until another is filled in. */
  send(draft: Draft): void;
  /** Ends the running answer. */
  stop(): void;
  /** Esc where nothing runs, or Cancel: what Send would do is not wanted. */
  escape(): void;
  /** Says what is wrong. */
  complain(text: string): void;
}

export class Composer {
  readonly node: HTMLElement;
  private readonly box = element("textarea", { rows: 2, "aria-label": "Message", placeholder: "Ask something. Enter sends, Shift+Enter begins a line." });
  private readonly sendButton = element("button", { type: "button", class: "kn-main" }, "Send");
  private readonly stopButton = element("button", { type: "button", class: "kn-main" }, "Stop");
  private readonly picker = element("input", { type: "file", accept: "image/*,audio/*", multiple: true, class: "kn-sr", tabindex: -1, "aria-label": "Attach images or audio" });
  private readonly attach = element("button", { type: "button", title: "Attach images or audio", "aria-label": "Attach images or audio" }, "Attach");
  private readonly chips = element("ul", { class: "kn-chips", "aria-label": "Attached files" });
  private readonly label = element("span", { class: "kn-note" });
  private readonly cancel = element("button", { type: "button", class: "kn-small", "aria-label": "Cancel the edit" }, "Cancel");
  private readonly purpose = element("div", { class: "kn-row kn-hidden" }, this.label, this.cancel);
  private files: readonly File[] = [];
  /** The answer that runs; empty where none does. */
  private run = "";
  /** What is written was sent, and is not taken yet. */
  private isSent = false;

  constructor(
    scope: Scope,
    private readonly acts: ComposerActions,
  ) {
    scope.listen(this.box, "keydown", (event) => {
      // What an input method composes is not sent yet; Safari tells of its last Enter by this code alone.
      const isComposing = event.isComposing || event.keyCode === 229;
      if (event.key === "Enter" && !event.shiftKey && !isComposing) {
        event.preventDefault();
        this.submit();
      }
      if (event.key === "Escape") (this.run ? acts.stop : acts.escape)();
    });
    scope.listen(this.box, "input", () => {
      this.isSent = false;
      this.fit();
    });
    scope.listen(this.box, "paste", (event) => {
      // A table from a spreadsheet is text with a picture of itself.
      if (!event.clipboardData?.types.includes("text/plain")) this.take(event.clipboardData?.files, event);
    });
    scope.listen(this.sendButton, "click", () => this.submit());
    scope.listen(this.stopButton, "click", () => acts.stop());
    scope.listen(this.cancel, "click", () => {
      acts.escape();
      this.focus();
    });
    scope.listen(this.attach, "click", () => this.picker.click());
    scope.listen(this.picker, "change", () => {
      this.take(this.picker.files);
      this.picker.value = ""; // the same file may be chosen again
    });
    const row = element("div", { class: "kn-row" }, this.sendButton, this.stopButton, this.attach, this.picker);
    this.node = element("div", { class: "kn-composer" }, this.purpose, this.box, this.chips, row);
    this.stopButton.classList.add("kn-hidden");
  }

  /** Take files that were dropped, pasted or chosen, as many as can be sent together. */
  take(files: Iterable<File> & { length: number } | null | undefined, event?: Event): void {
    if (!files?.length) return;
    event?.preventDefault();
    let size = this.files.reduce((sum, file) => sum + file.size, 0);
    for (const file of files) {
      size += file.size;
      if (size > MOST_BYTES) {
        size -= file.size;
        const most = `${MOST_BYTES / 2 ** 20} MB together`;
        this.acts.complain(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB: ${most} can be sent from here. In a cell: %%chat -a FILE`);
      } else this.files = [...this.files, file];
    }
    this.isSent = false;
    this.drawChips();
  }

  /** Whether Stop or Send is what can be pressed: an answer of that id runs, or none where it is empty. */
  answering(run: string): void {
    if (run === this.run) return;
    const had = document.activeElement === (this.run ? this.stopButton : this.sendButton);
    const is = run !== "";
    this.run = run;
    this.sendButton.classList.toggle("kn-hidden", is);
    this.stopButton.classList.toggle("kn-hidden", !is);
    this.stopButton.disabled = false;
    if (had) (is ? this.stopButton : this.sendButton).focus();
  }

  /** Stop was pressed: once is enough. */
  stopping(): void {
    this.stopButton.disabled = true;
  }

  /** What is written, and not sent. */
  get draft(): Draft {
    return { text: this.box.value, files: this.files };
  }

  /** Put a draft to write on with, and say what Send will do with it. */
  fill(draft: Draft, label = ""): void {
    this.box.value = draft.text;
    this.files = draft.files;
    this.isSent = false;
    this.say(label);
    this.drawChips();
    this.fit();
  }

  /** Let the person write on. */
  focus(): void {
    this.box.focus();
  }

  /** Say what Send will do, where that is not to append. */
  say(label: string): void {
    this.label.textContent = label;
    this.purpose.classList.toggle("kn-hidden", !label);
  }

  /** Nothing can be sent any more. */
  disable(): void {
    for (const each of [this.sendButton, this.attach]) each.disabled = true;
  }

  /** What was sent was not taken: it may be sent again. */
  again(): void {
    this.isSent = false;
  }

  private submit(): void {
    const draft = this.draft;
    if (this.run || this.sendButton.disabled || this.isSent || (!draft.text.trim() && !draft.files.length)) return;
    this.isSent = true;
    this.acts.send(draft);
  }

  private fit(): void {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(240, this.box.scrollHeight + 2)}px`;
  }

  private drawChips(): void {
    this.chips.replaceChildren(
      ...this.files.map((file) => {
        const away = element("button", { type: "button", class: "kn-small", "aria-label": `Remove ${file.name}` }, "✕");
        press(away, () => {
          this.files = this.files.filter((each) => each !== file);
          this.isSent = false;
          this.drawChips();
        });
        return element("li", {}, `${file.name} (${Math.ceil(file.size / 1024)} KB) `, away);
      }),
    );
  }
}
