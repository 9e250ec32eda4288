/** The chat pane on a page without a kernel, and what a person sees and presses there. */

import { vi } from "vitest";
import type { State, Turn } from "../src/chat/types";
import pane from "../src/widgets/chat_pane";
import { FakeModel } from "./fake_model";

export const turn = (number: number, more: Partial<Turn> = {}): Turn => ({
  id: `t${number}`,
  number,
  prompt: `question ${number}`,
  pictures: [],
  can_edit: true,
  answer: `answer **${number}**`,
  reasoning: "",
  steps: [],
  model: "echo",
  is_cut: false,
  stat: "2 tokens",
  siblings: [`t${number}`],
  ...more,
});
export const EMPTY: State = { door: "comm-1", history: [], recent: [], running: {}, around: { name: "chat-1", engine: "echo" }, problem: {}, notices: [] };

export function shown(state: Partial<State> = {}) {
  const model = new FakeModel<State>({ ...EMPTY, ...state });
  const el = document.createElement("div");
  document.body.append(el);
  const end = pane.render({ model, el });
  const of = <Node extends Element = HTMLElement>(selector: string): Node => el.querySelector(selector) as unknown as Node;
  const all = (selector: string) => [...el.querySelectorAll<HTMLElement>(selector)];
  const button = (text: string) => all("button").find((each) => each.textContent === text) as HTMLButtonElement;
  const box = of<HTMLTextAreaElement>("[aria-label=Message]");
  const press = (key: string, more = {}) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
  const write = (text: string) => {
    box.value = text;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const answer = (more = {}) => model.receive({ kind: "done", id: model.sent.at(-1)?.["id"], ...more });
  return { model, el, end, of, all, button, box, press, write, answer };
}
export const frames = () => vi.advanceTimersByTime(50);
export const settled = async () => void (await vi.advanceTimersByTimeAsync(0));
