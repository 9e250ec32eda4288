/** The conversation on the page: its turns, and below them the answer that is on its way. */

import { element } from "../dom";
import type { Scope } from "../scope";
import { LiveAnswer } from "./live_answer";
import { RunningView } from "./running_view";
import { type Actions, TurnView } from "./turn_view";
import type { Delta, Running, Turn } from "./types";

/** So near to its end the conversation stays there when it grows. */
const NEAR_PX = 60;
/** Turns that come into sight are drawn for so long in a frame. */
const FRAME_MS = 25;
/** Texts that wait to be spoken, or were; older ones are taken away. */
const MOST_SPOKEN = 20;

export class Log {
  readonly node: HTMLElement;
  private readonly page = element("div");
  /** What is said to those who do not see the conversation: each block of the answer on its way when it has ended. */
  readonly spoken = element("div", { class: "kn-sr", "aria-live": "polite", role: "status" });
  private views: TurnView[] = [];
  private runningView: RunningView | null = null;
  private readonly live = new LiveAnswer();
  private running: Running = {};
  /** Turns that came near the screen and are not drawn yet. */
  private readonly near = new Set<TurnView>();
  private nearFrame = 0;
  private frame = 0;
  /** Whether the end stays in sight when the conversation grows. */
  private sticks = true;
  private readonly sight: IntersectionObserver | null;

  /**
   * @param actions what the buttons of a turn do.
   * @param answer sends what was pressed where the running answer asks.
   */
  constructor(
    scope: Scope,
    private readonly actions: Actions,
    private readonly answer: (question: string, text: string) => void,
  ) {
    this.node = element("div", { class: "kn-log", role: "log", "aria-label": "Conversation", "aria-live": "off", tabindex: 0 }, this.page);
    scope.listen(this.node, "scroll", () => (this.sticks = this.isNearEnd()));
    // A turn off the screen has a guessed height: what it really has comes when the browser lays it out.
    const grown = typeof ResizeObserver === "undefined" ? null : new ResizeObserver(() => this.sticks && this.toEnd());
    grown?.observe(this.page);
    scope.finally(() => grown?.disconnect());
    this.sight =
      typeof IntersectionObserver === "undefined"
        ? null
        : new IntersectionObserver((entries) => this.cameNear(entries), { root: this.node, rootMargin: "600px" });
    scope.finally(() => {
      this.sight?.disconnect();
      cancelAnimationFrame(this.nearFrame);
      cancelAnimationFrame(this.frame);
      for (const view of this.views) view.end();
      this.runningView?.end();
    });
  }

  /** Show these turns, and the answer on its way if there is one; what stands there already is kept. */
  draw(turns: readonly Turn[], running: Running): void {
    const before = this.running;
    this.running = running;
    const isFresh = Boolean(running.run) && !this.runningView;
    this.staysDown(() => {
      this.drawTurns(turns, before);
      this.drawRunning();
    });
    if (isFresh) {
      this.sticks = true;
      this.toEnd();
    }
  }

  /** More of the answer on its way. */
  delta(delta: Delta): void {
    if (this.live.delta(delta)) this.later();
  }

  /** The kernel is gone: nothing runs, and nothing can be changed. */
  freeze(): void {
    this.draw(this.views.map(({ turn }) => turn), {});
    for (const view of this.views) view.freeze();
  }

  /** Scroll to the end. */
  toEnd(): void {
    this.node.scrollTop = this.node.scrollHeight;
  }

  private drawTurns(turns: readonly Turn[], before: Running): void {
    let same = 0;
    while (same < turns.length && same < this.views.length && isSame(turns[same] as Turn, (this.views[same] as TurnView).turn)) same++;
    const replaced = this.views.splice(same);
    const held = replaced.map(({ turn, focused }) => [turn.number, focused] as const).find(([, label]) => label !== null);
    for (const view of replaced) {
      this.sight?.unobserve(view.node);
      this.near.delete(view);
      view.end();
    }
    const fresh = turns.slice(same).map((turn, at, all) => {
      // What the answer on its way became takes over what is drawn; a turn of another conversation does not.
      const isIt = !this.running.run && at === all.length - 1 && turn.prompt === before.prompt;
      const drawn = isIt ? this.runningView?.handOn() : undefined;
      return new TurnView(turn, this.actions, drawn);
    });
    this.views.push(...fresh);
    const nodes = fresh.map(({ node }) => node);
    // Before the answer on its way, which is not moved: a selection in it, and what it is spoken by, would be lost.
    if (this.runningView) this.runningView.node.before(...nodes);
    else this.page.append(...nodes);
    for (const view of fresh) {
      if (this.sight) this.sight.observe(view.node);
      else view.draw();
    }
    if (held) this.focusAgain(...held);
  }

  /** A button that was pressed stands in another node now: the focus goes with it. */
  private focusAgain(number: number, label: string | null): void {
    const view = this.views.find(({ turn }) => turn.number === number);
    if (view && label) view.focus(label);
    else this.node.focus();
  }

  private speak(text: string): void {
    this.spoken.append(element("p", {}, text));
    while (this.spoken.childElementCount > MOST_SPOKEN) this.spoken.firstElementChild?.remove();
  }

  private drawRunning(): void {
    const { run, replaces } = this.running;
    let isReplaced = false;
    for (const { node, turn } of this.views) {
      isReplaced ||= Boolean(run) && turn.id === replaces;
      node.classList.toggle("kn-replaced", isReplaced);
    }
    if (!run) {
      this.runningView?.end();
      this.runningView = null;
      return;
    }
    if (!this.runningView) {
      this.runningView = new RunningView(this.actions.insert, this.answer, (text) => this.speak(text));
      this.page.append(this.runningView.node);
    }
    this.live.whole(this.running);
    this.later();
  }

  private later(): void {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.staysDown(() => this.runningView?.draw(this.running, this.live));
    });
  }

  private cameNear(entries: IntersectionObserverEntry[]): void {
    for (const { isIntersecting, target } of entries) {
      const view = isIntersecting && this.views.find(({ node }) => node === target);
      if (view) this.near.add(view);
    }
    this.drawNear();
  }

  /** The latest first, and no more in a frame than it has time for. */
  private drawNear(): void {
    this.nearFrame ||= requestAnimationFrame(() => {
      this.nearFrame = 0;
      const endsAt = performance.now() + FRAME_MS;
      this.staysDown(() => {
        for (const view of [...this.near].sort((one, other) => other.turn.number - one.turn.number)) {
          view.draw();
          this.near.delete(view);
          if (performance.now() > endsAt) break;
        }
      });
      if (this.near.size) this.drawNear();
    });
  }

  private staysDown(draw: () => void): void {
    this.sticks = this.isNearEnd();
    draw();
    if (this.sticks) this.toEnd();
  }

  private isNearEnd(): boolean {
    return this.node.scrollHeight - this.node.scrollTop - this.node.clientHeight < NEAR_PX;
  }
}

function isSame(one: Turn, other: Turn): boolean {
  return one.id === other.id && one.siblings.length === other.siblings.length && one.number === other.number;
}
