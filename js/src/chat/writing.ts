/** What a person writes: sent, or put in the place of a turn; and what comes back when it could not be answered. */

import type { Answer, Requests } from "../requests";
import type { Scope } from "../scope";
import { Composer, type Draft } from "./composer";
import type { Problem, State, Turn } from "./types";

const NOTHING: Draft = { text: "", files: [] };

export class Writing {
  readonly composer: Composer;
  /** What is written takes the place of this turn. */
  private edited: Turn | null = null;
  /** What was written before that. */
  private aside = NOTHING;
  /** What was sent last, and what it was to take the place of. */
  private last: { draft: Draft; edited: Turn | null } = { draft: NOTHING, edited: null };

  /**
   * @param problem why the last prompt could not be answered.
   * @param stop ends the running answer.
   */
  constructor(
    scope: Scope,
    private readonly requests: Requests<State>,
    private readonly problem: () => Problem,
    stop: () => void,
  ) {
    this.composer = new Composer(scope, {
      send: (draft) => void this.send(draft),
      stop,
      escape: () => this.cancelEdit(),
      complain: (text) => requests.refuse("send", text),
    });
  }

  /** Write on a turn's prompt, to ask that in its place. */
  edit(turn: Turn): void {
    if (!this.edited) this.aside = this.composer.draft;
    this.fill({ text: turn.prompt, files: [] }, turn);
    this.composer.focus();
  }

  /** These turns are on the page: one that is not cannot be edited any more. What was written stays. */
  turnsChanged(turns: readonly Turn[]): void {
    const { edited } = this;
    if (!edited || turns.some(({ id }) => id === edited.id)) return;
    const { draft } = this.composer;
    this.endEdit(draft.text === edited.prompt ? NOTHING : draft);
  }

  /** Give back what could not be answered, with its files and as the edit that it was, where nothing else is written. */
  bringBack(): void {
    const { prompt = "", gives_back = false } = this.problem();
    const { text, files } = this.composer.draft;
    if (!gives_back || text || files.length) return;
    const { draft, edited } = this.last;
    if (draft.text === prompt) this.fill(draft, edited);
    else this.fill({ text: prompt, files: [] }, null);
  }

  private fill(draft: Draft, edited: Turn | null): void {
    this.edited = edited;
    this.composer.fill(draft, edited ? `Takes the place of turn ${edited.number}; the old one stays as a branch.` : "");
  }

  private cancelEdit(): void {
    if (this.edited) this.endEdit(NOTHING);
  }

  /** Go on with what was written before the edit, and with what is left of the edit. */
  private endEdit({ text, files }: Draft): void {
    const before = this.aside;
    this.aside = NOTHING;
    this.fill({ text: [before.text, text].filter(Boolean).join("\n\n"), files: [...before.files, ...files] }, null);
  }

  private async send(draft: Draft): Promise<void> {
    const { text, files } = draft;
    const edited = this.edited;
    const answered = ({ kind }: Answer): void => {
      if (kind === "done") this.taken(draft, edited);
      else this.composer.again();
    };
    if (edited) {
      this.requests.send("edit", { turn: edited.id, text }, answered);
      return;
    }
    try {
      const buffers = await Promise.all(files.map((file) => file.arrayBuffer()));
      this.requests.send("send", { text, files: files.map(({ name, type }) => ({ name, mime: type })) }, answered, buffers);
    } catch (error) {
      this.composer.again();
      this.requests.refuse("send", `A file could not be read: ${String(error)}. Remove it, or choose it again.`);
    }
  }

  private taken(draft: Draft, edited: Turn | null): void {
    this.last = { draft, edited };
    if (this.edited !== edited) {
      // Another edit was begun since: what was sent is what stands aside.
      if (!edited) this.aside = without(this.aside, draft);
      return;
    }
    const left = without(this.composer.draft, draft);
    if (edited) this.endEdit(left);
    else this.fill(left, null);
    this.bringBack(); // it may have failed before it was heard to be taken
  }
}

/** What was written since `sent` went out. */
function without({ text, files }: Draft, sent: Draft): Draft {
  return { text: text === sent.text ? "" : text, files: files.filter((file) => !sent.files.includes(file)) };
}
