/** The running answer, put together from wholes and numbered deltas: what was missed is waited for, never guessed. */

import type { Delta, Running } from "./types";

export class LiveAnswer {
  private run = "";
  private seq = 0;
  private hasGap = false;
  text = "";
  reasoning = "";
  numbers = "";

  /** Take a whole: another answer, or this one as far as it is. Whether anything changed. */
  whole(running: Running): boolean {
    const run = running.run ?? "";
    const seq = running.seq ?? 0;
    if (run === this.run && seq < this.seq && !this.hasGap) return false;
    this.run = run;
    this.seq = seq;
    this.hasGap = false;
    this.text = running.text ?? "";
    this.reasoning = running.reasoning ?? "";
    this.numbers = running.numbers ?? "";
    return true;
  }

  /** Take a delta; one that does not follow the last is dropped, and the next whole makes up for it. */
  delta(delta: Delta): boolean {
    if (delta.run !== this.run || this.hasGap || delta.seq <= this.seq) return false;
    if (delta.seq !== this.seq + 1) {
      this.hasGap = true;
      return false;
    }
    this.seq = delta.seq;
    this.text += delta.text ?? "";
    this.reasoning += delta.reasoning ?? "";
    this.numbers = delta.numbers;
    return true;
  }
}
