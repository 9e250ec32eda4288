/** The running answer, put together from wholes and numbered deltas, in whatever order they come: nothing is guessed. */

import type { Delta, Running } from "./types";

export class LiveAnswer {
  private run = "";
  private seq = 0;
  /** Deltas that came before what they follow: a trait is set later than a message that was sent after it. */
  private readonly early = new Map<number, Delta>();
  text = "";
  reasoning = "";
  status = "";
  numbers = "";

  /** Take a whole: another answer, or this one as far as it is. Whether anything changed. */
  whole(running: Running): boolean {
    const run = running.run ?? "";
    const seq = running.seq ?? 0;
    if (run === this.run && seq < this.seq) return false;
    this.run = run;
    this.seq = seq;
    this.text = running.text ?? "";
    this.reasoning = running.reasoning ?? "";
    this.status = running.status ?? "";
    this.numbers = running.numbers ?? "";
    this.follow();
    return true;
  }

  /** Take a delta; one that does not follow yet is kept until it does, or until a whole has made up for it. */
  delta(delta: Delta): boolean {
    if (delta.run === this.run && delta.seq <= this.seq) return false;
    if ([...this.early.values()].some(({ run }) => run !== delta.run)) this.early.clear();
    this.early.set(delta.seq, delta);
    return delta.run === this.run && this.follow();
  }

  private follow(): boolean {
    const before = this.seq;
    for (const [seq, { run }] of this.early) if (run !== this.run || seq <= this.seq) this.early.delete(seq);
    for (let next = this.early.get(this.seq + 1); next; next = this.early.get(this.seq + 1)) {
      this.early.delete(next.seq);
      this.seq = next.seq;
      this.text += next.text ?? "";
      this.reasoning += next.reasoning ?? "";
      this.status = next.status;
      this.numbers = next.numbers;
    }
    return this.seq > before;
  }
}
