import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { LiveAnswer } from "../src/chat/live_answer";
import type { Delta, State } from "../src/chat/types";
import { Scope } from "../src/scope";
import pane from "../src/widgets/chat_pane";
import { FakeModel } from "./fake_model";
import { EMPTY, frames, shown, turn } from "./pane_page";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => {
  vi.useRealTimers();
  document.body.replaceChildren();
});

describe("a conversation", () => {
  test("is shown turn by turn, its Markdown drawn", () => {
    const { all, of } = shown({ history: [turn(1)], recent: [turn(2)] });
    expect(all(".kn-turn").map((each) => each.dataset["turn"])).toEqual(["t1", "t2"]);
    expect(all(".kn-md strong").map((each) => each.textContent)).toEqual(["1", "2"]);
    expect(of(".kn-title").textContent).toBe("chat-1 · echo");
  });

  test("keeps the nodes of turns that stay, and replaces those that do not", () => {
    const { model, all } = shown({ recent: [turn(1), turn(2)] });
    const [first, second] = all(".kn-turn");
    model.arrives("recent", [turn(1), turn(2, { id: "other", siblings: ["t2", "other"] })]);
    expect(all(".kn-turn")[0]).toBe(first);
    expect(all(".kn-turn")[1]).not.toBe(second);
    expect(all(".kn-count").map((each) => each.textContent)).toEqual(["2 of 2"]);
  });

  test.each(["recent", "running"])("takes what is drawn of the running answer into its turn, told of %s first", (first) => {
    const writeText = vi.fn(() => Promise.resolve());
    vi.stubGlobal("navigator", { clipboard: { writeText } });
    const { model, all, of } = shown({ recent: [turn(1)] });
    const code = "```python\nprint(1)\n```";
    model.arrives("running", { run: "r", seq: 1, prompt: "question 2", text: `one\n\n${code}\n\ntw` });
    frames();
    const [words, block] = all(".kn-running .kn-block");
    const recent = [turn(1), turn(2, { answer: `one\n\n${code}\n\ntwo` })];
    model.arriveTogether(first === "recent" ? { recent, running: {} } : { running: {}, recent });
    expect(of(".kn-running")).toBeNull();
    const blocks = all("[data-turn=t2] .kn-block");
    expect(blocks[0]).toBe(words);
    expect(blocks[1]).toBe(block);
    expect(blocks.map((each) => each.textContent?.trim()).at(-1)).toBe("two");
    expect(of("[data-turn=t2] .kn-md").hasAttribute("aria-live")).toBe(false);
    of("[data-turn=t2] .kn-code-tools button").click();
    expect(writeText).toHaveBeenCalledWith("print(1)");
    vi.unstubAllGlobals();
  });

  test("goes between the versions of a turn", () => {
    const { model, all } = shown({ recent: [turn(1, { siblings: ["t0", "t1"] })] });
    const [back, on] = [..."‹›"].map((text) => all("button").find((each) => each.textContent === text) as HTMLButtonElement);
    expect([back?.disabled, on?.disabled]).toEqual([false, true]);
    back?.click();
    expect(model.sent.at(-1)).toMatchObject({ kind: "switch", turn: "t0" });
  });

  test("says nothing as markup", () => {
    const hostile = '<img src=x onerror="alert(1)"><script>alert(1)</script>';
    const step = { line: hostile, said: hostile, arguments: hostile, result: hostile, is_error: true };
    const { el } = shown({
      recent: [turn(1, { prompt: hostile, answer: hostile, reasoning: hostile, model: hostile, stat: hostile, steps: [step] })],
      around: { name: hostile, engine: hostile, system: hostile },
      problem: { text: hostile },
      notices: [hostile],
      running: { run: "r", seq: 1, prompt: hostile, text: hostile, reasoning: hostile, status: hostile, notes: [hostile], steps: [step] },
    });
    frames();
    expect(el.querySelector("img, script")).toBeNull();
    expect(el.textContent).toContain("onerror");
  });
});

describe("a running answer", () => {
  const running = { run: "r1", seq: 1, prompt: "question 1", text: "one ", status: "answering", numbers: "0.1 s" };

  test("is spoken a block at a time, each once, and the last one when it ends", () => {
    const { model, of } = shown({ running: { ...running, text: "", status: "reading the prompt 5/10 tokens" } });
    const spoken = () => [...of("[role=status]").children].map((each) => each.textContent?.trim());
    const comes = (seq: number, text: string) => {
      model.receive({ kind: "delta", run: "r1", seq, text, status: "answering", numbers: "" } satisfies Delta);
      frames();
    };
    frames();
    comes(2, "one");
    comes(3, " two\n\nthree");
    comes(4, " four");
    expect(spoken()).toEqual(["reading the prompt", "one two"]);
    model.arriveTogether({ recent: [turn(1, { answer: "one two\n\nthree four five" })], running: {} });
    expect(spoken()).toEqual(["reading the prompt", "one two", "three four five"]);
    expect(of(".kn-turn [aria-live], .kn-turn[aria-busy]")).toBeNull();
  });

  test("code that grows keeps its node and its buttons", () => {
    const { model, of, all } = shown({ running: { ...running, text: "```python\nx = 1" } });
    frames();
    const [block, copy] = [of(".kn-running pre"), of(".kn-running .kn-code-tools button")];
    model.receive({ kind: "delta", run: "r1", seq: 2, text: "\ny = 2\n```", status: "", numbers: "" } satisfies Delta);
    frames();
    expect(of(".kn-running pre")).toBe(block);
    expect(of(".kn-running .kn-code-tools button")).toBe(copy);
    expect(all(".kn-running code .hljs-number").map((each) => each.textContent)).toEqual(["1", "2"]);
  });

  test("what was unfolded while it ran stays so in the turn that it becomes", () => {
    const step = { line: "f() → 1", said: "", arguments: "{}", result: "1", is_error: false };
    const { model, all } = shown({ running: { ...running, steps: [step], reasoning: "hm" } });
    frames();
    for (const each of all("details")) each.setAttribute("open", "");
    model.arrives("running", { ...running, seq: 2, steps: [step, step], reasoning: "hm" });
    frames();
    const open = () => all("details").map((each) => (each as HTMLDetailsElement).open);
    expect(open()).toEqual([true, false, true]);
    model.arriveTogether({ recent: [turn(1, { steps: [step, step], reasoning: "hm" })], running: {} });
    expect(open()).toEqual([true, false, true]);
  });

  test("Stop that was pressed stays pressed while the answer goes on, and is free for another's", () => {
    const { model, button } = shown({ running });
    button("Stop").click();
    model.arrives("running", { ...running, seq: 2 });
    expect(button("Stop").disabled).toBe(true);
    model.arrives("running", { ...running, run: "of another conversation" });
    expect(button("Stop").disabled).toBe(false);
  });

  test("is not taken over by a turn of another conversation", () => {
    const { model, of } = shown({ running: { ...running, text: "mine", prompt: "question of mine" } });
    frames();
    model.arriveTogether({ recent: [turn(1)], running: {} });
    expect(of(".kn-turn .kn-md").textContent).toContain("answer 1");
    expect([...of("[role=status]").children].map((each) => each.textContent)).toEqual([]);
  });

  test("grows by deltas, and Stop takes the place of Send", () => {
    const { model, of, button } = shown({ running });
    frames();
    expect(button("Send").classList.contains("kn-hidden")).toBe(true);
    model.receive({ kind: "delta", run: "r1", seq: 2, text: "**two**", status: "answering", numbers: "0.2 s" } satisfies Delta);
    frames();
    expect(of(".kn-running .kn-md").textContent).toBe("one two\n");
    model.arrives("recent", [turn(1)]);
    model.arrives("running", {});
    expect(of(".kn-running")).toBeNull();
    expect(button("Send").classList.contains("kn-hidden")).toBe(false);
  });

  test("is stopped by the button and by Esc, and interrupted where nobody hears", () => {
    const { model, button, press } = shown({ running });
    button("Stop").click();
    expect(model.sent).toEqual([{ kind: "stop" }]);
    expect(model.control.map(({ header, content }) => [header["msg_type"], content])).toEqual([
      ["kani_nb_comm_msg", { comm_id: "comm-1", data: { method: "custom", content: { kind: "stop" } } }],
    ]);
    expect(button("Stop").disabled).toBe(true);
    model.receive({ kind: "ack" });
    vi.advanceTimersByTime(5000);
    expect(model.interrupts).toBe(0);
    press("Escape");
    vi.advanceTimersByTime(5000);
    expect(model.interrupts).toBe(1);
  });

  test("asks before a function runs, and sends what was pressed", () => {
    const { model, of, button } = shown({ running: { ...running, question: { id: "q1", text: "Run echo('[y]es, [n]o')?" } } });
    frames();
    expect(of(".kn-question").textContent).toBe("Run echo('[y]es, [n]o')?");
    button("Do not run it").click();
    expect(model.sent.at(-1)).toMatchObject({ kind: "answer", question: "q1", text: "n" });
    expect(of(".kn-asked .kn-row").inert).toBe(true);
    expect(document.activeElement).toBe(of(".kn-running"));
    model.arrives("running", { ...running, seq: 2, question: { id: "q2", text: "Run another()?" } });
    frames();
    expect(of(".kn-asked .kn-row").inert).toBe(false);
    model.arrives("running", { ...running, seq: 3 });
    frames();
    expect(of(".kn-asked").classList.contains("kn-hidden")).toBe(true);
  });

  test("fades what it will replace", () => {
    const { all } = shown({ recent: [turn(1), turn(2), turn(3)], running: { ...running, replaces: "t2" } });
    expect(all(".kn-turn:not(.kn-running)").map((each) => each.classList.contains("kn-replaced"))).toEqual([false, true, true]);
  });
});

describe("the running text", () => {
  const words = ["a", "b", "c", "d", "e", "f"];
  const text = (seq: number) => words.slice(0, seq).join("");

  test("is never wrong, whatever is lost or late", () => {
    // Every subset of six messages, of which the first, fourth and last are wholes.
    for (let lost = 0; lost < 2 ** 6; lost++) {
      const live = new LiveAnswer();
      for (let seq = 1; seq <= 6; seq++) {
        if (lost & (1 << (seq - 1))) continue;
        if (seq === 1 || seq === 4 || seq === 6) live.whole({ run: "r", seq, text: text(seq) });
        else live.delta({ kind: "delta", run: "r", seq, text: words[seq - 1] as string, status: "", numbers: "" });
        expect(text(6).startsWith(live.text)).toBe(true);
      }
      if (!(lost & (1 << 5))) expect(live.text).toBe(text(6));
    }
  });

  test("whatever the order of its messages, the answer is whole when all are there", () => {
    const orders = (rest: number[]): number[][] =>
      rest.length ? rest.flatMap((each) => orders(rest.filter((other) => other !== each)).map((order) => [each, ...order])) : [[]];
    for (const order of orders([1, 2, 3, 4, 5, 6])) {
      const live = new LiveAnswer();
      live.whole({ run: "before", seq: 9, text: "another" });
      for (const seq of order) {
        if (seq === 1 || seq === 4) live.whole({ run: "r", seq, text: text(seq) });
        else live.delta({ kind: "delta", run: "r", seq, text: words[seq - 1] as string, status: "", numbers: "" });
        expect(live.text === "another" || text(6).startsWith(live.text)).toBe(true);
      }
      expect(live.text).toBe(text(6));
    }
  });

  test("ignores what belongs to another answer, and what is old", () => {
    const live = new LiveAnswer();
    live.whole({ run: "r", seq: 5, text: "new" });
    expect(live.delta({ kind: "delta", run: "s", seq: 6, text: "x", status: "", numbers: "" })).toBe(false);
    expect(live.whole({ run: "r", seq: 4, text: "old" })).toBe(false);
    expect(live.text).toBe("new");
  });
});

test("conversations are searched, renamed and opened, settings are set", () => {
  const { model, button, of, answer, all } = shown();
  const input = (label: string) => all("label").find((each) => each.textContent === label)?.querySelector("input") as HTMLInputElement;
  button("Conversations").click();
  expect(model.sent.at(-1)).toMatchObject({ kind: "list", query: "" });
  answer({ chats: [{ name: "whales", turns: 1, notebook: "", updated_at: 0, is_current: true }] });
  const name = input("Name of this conversation");
  expect(name.value).toBe("chat-1");
  name.value = "dolphins";
  name.dispatchEvent(new Event("change"));
  expect(model.sent.at(-1)).toMatchObject({ kind: "rename", name: "dolphins" });
  answer();
  expect(model.sent.at(-1)).toMatchObject({ kind: "list" });
  all(".kn-chats button")[0]?.click();
  expect(model.sent.at(-1)).toMatchObject({ kind: "open", name: "whales" });
  button("Settings").click();
  const seed = input("Seed");
  seed.value = "7";
  seed.dispatchEvent(new Event("change"));
  expect(model.sent.at(-1)).toMatchObject({ kind: "params", params: { seed: 7, temperature: null, do_sample: null } });
  const system = of<HTMLTextAreaElement>("[aria-label='System prompt']");
  system.value = "be brief";
  system.dispatchEvent(new Event("change"));
  expect(model.sent.at(-1)).toMatchObject({ kind: "system", text: "be brief" });
});

test("code has buttons, and goes into the next cell where there is a notebook", () => {
  const insertCell = vi.fn();
  const model = new FakeModel<State>({ ...EMPTY, recent: [turn(1, { answer: "```python\nx = 1\n```" })] });
  Object.assign(model.widget_manager, { context: { model: { sharedModel: { cells: [1, 2], insertCell } } } });
  const cell = document.createElement("div");
  cell.className = "jp-Cell";
  const notebook = document.createElement("div");
  notebook.append(document.createElement("div"), cell);
  notebook.firstElementChild?.classList.add("jp-Cell");
  document.body.append(notebook);
  pane.render({ model, el: cell.appendChild(document.createElement("div")) });
  const button = [...cell.querySelectorAll("button")].find((each) => each.textContent === "To next cell");
  button?.click();
  expect(insertCell).toHaveBeenCalledWith(2, { cell_type: "code", source: "x = 1", metadata: {} });
});

test("pictures of the person are shown, and nothing else as a picture", () => {
  const source = "data:image/png;base64,iVBORw0KGgo=";
  const bad = ["https://evil.example/x.png", "data:image/svg+xml;base64,AA==", "javascript:alert(1)"];
  const { all } = shown({ recent: [turn(1, { pictures: [source, ...bad].map((each) => ({ words: "a cat", source: each })) })] });
  expect(all("img").map((each) => [each.getAttribute("src"), each.getAttribute("alt")])).toEqual([[source, "a cat"]]);
});

test("a kernel that is gone is told of, with the way back", () => {
  const { model, of, button } = shown({ recent: [turn(1)], running: { run: "r", seq: 1, text: "x" } });
  model.arrives("around", { name: "chat-1", engine: "echo" });
  (model as unknown as { tell(event: string): void }).tell("comm_live_update");
  expect(of(".kn-gone").textContent).toContain("%chat resume chat-1");
  expect(button("Send").disabled).toBe(true);
  expect(of(".kn-running")).toBeNull();
  expect(of(".kn-acts").inert).toBe(true);
  expect(of(".kn-drawer").inert).toBe(true);
});

test("the focus stays on the button that was pressed when its turn is drawn anew", () => {
  const { model, all } = shown({ recent: [turn(1, { id: "a", siblings: ["a", "b", "c"] })] });
  const on = () => all("[aria-label='Later version of this turn']")[0] as HTMLButtonElement;
  on().focus();
  model.arrives("recent", [turn(1, { id: "b", siblings: ["a", "b", "c"] })]);
  expect(document.activeElement).toBe(on());
  model.arrives("recent", [turn(1, { id: "c", siblings: ["a", "b", "c"] })]);
  expect(document.activeElement?.textContent).toBe("‹");
});

test("a drawer that closes gives the focus back to what opened it", () => {
  const { button, answer, all } = shown();
  button("Conversations").click();
  answer({ chats: [{ name: "whales", turns: 1, notebook: "", updated_at: 0, is_current: true }] });
  all(".kn-chats button")[0]?.focus();
  all(".kn-chats button")[0]?.click();
  expect(document.activeElement).toBe(button("Conversations"));
});

test("what fails elsewhere does not take the focus", () => {
  const elsewhere = document.createElement("input");
  document.body.append(elsewhere);
  elsewhere.focus();
  const { model } = shown({ problem: { text: "it failed", prompt: "my words", gives_back: true } });
  model.arrives("problem", { text: "it failed", prompt: "my words" });
  expect(document.activeElement).toBe(elsewhere);
});

test("a long answer leaves nothing behind for each time it was drawn", () => {
  const listen = vi.spyOn(Scope.prototype, "listen");
  const { model } = shown({ running: { run: "r", seq: 1, text: "```python\nx = 1\n```\n\n" } });
  frames();
  const before = listen.mock.calls.length;
  for (let seq = 2; seq < 60; seq++) {
    model.receive({ kind: "delta", run: "r", seq, text: `\n\n\`\`\`\ny = ${seq}\n\`\`\``, status: "", numbers: "" } satisfies Delta);
    frames();
  }
  expect(listen.mock.calls.length).toBe(before);
});

test("the end of a view undoes all of it", () => {
  const { model, el, end } = shown({ recent: [turn(1)], running: { run: "r", seq: 1, text: "x" } });
  model.receive({ kind: "delta", run: "r", seq: 2, text: "y", status: "", numbers: "" } satisfies Delta);
  end();
  expect([el.childElementCount, model.size, vi.getTimerCount()]).toEqual([0, 0, 0]);
});
