import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { settled, shown, turn } from "./pane_page";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => {
  vi.useRealTimers();
  document.body.replaceChildren();
});

describe("writing", () => {
  test("Enter sends, Shift+Enter does not, and the text stays until it was taken", async () => {
    const { model, press, write, box, answer } = shown();
    write("hello");
    press("Enter", { shiftKey: true });
    press("Enter", { isComposing: true });
    expect(model.sent).toEqual([]);
    press("Enter");
    await settled();
    expect(model.sent).toMatchObject([{ kind: "send", text: "hello", files: [] }]);
    expect(box.value).toBe("hello");
    answer();
    expect(box.value).toBe("");
  });

  test("what was refused stays, with the reason", async () => {
    const { press, write, box, answer, all } = shown();
    write("hello");
    press("Enter");
    await settled();
    answer({ kind: "error", why: "no engine is loaded" });
    expect(box.value).toBe("hello");
    expect(all("[role=alert]").map((each) => each.textContent)).toContain("no engine is loaded");
  });

  test("nothing is not sent", async () => {
    const { model, press, write } = shown();
    write("  \n ");
    press("Enter");
    await settled();
    expect(model.sent).toEqual([]);
  });

  test.each(["textarea", "button", ".kn-log", "select", "input[type=number]"])("keys on %s do not reach the notebook, but for saving", (selector) => {
    const { el, of } = shown({ recent: [turn(1)] });
    const reached: string[] = [];
    el.addEventListener("keydown", ({ key }) => reached.push(key));
    for (const key of ["a", "b", "d", "x", "Escape", "ArrowDown", "Enter"]) of(selector).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    expect(reached).toEqual([]);
    of(selector).dispatchEvent(new KeyboardEvent("keydown", { key: "s", ctrlKey: true, bubbles: true }));
    expect(reached).toEqual(["s"]);
  });

  test("keys are not listened for any more when the view has ended", () => {
    const { end } = shown();
    const root = document.querySelector(".kn-chat") as HTMLElement;
    const box = root.querySelector("textarea") as HTMLElement;
    end();
    document.body.append(root);
    box.dispatchEvent(new KeyboardEvent("keydown", { key: "a", bubbles: true }));
    expect(box.hasAttribute("data-lm-suppress-shortcuts")).toBe(false);
  });

  test("a setting that cannot be used stays as it was typed, marked, with the reason beside it", () => {
    const { model, all, answer } = shown();
    const input = all("label").find((each) => each.textContent === "Top p")?.querySelector("input") as HTMLInputElement;
    input.value = "2";
    input.dispatchEvent(new Event("change"));
    answer({ kind: "error", why: "top_p is 2.0: it must be above 0 and at most 1" });
    model.arrives("around", { name: "chat-1", params: {} });
    expect([input.value, input.getAttribute("aria-invalid")]).toEqual(["2", "true"]);
    expect(document.getElementById(input.getAttribute("aria-describedby") as string)?.textContent).toContain("top_p is 2.0");
    input.value = "";
    input.dispatchEvent(new Event("change"));
    answer();
    expect(input.hasAttribute("aria-invalid")).toBe(false);
  });

  test("a turn is edited in the box", async () => {
    const { model, button, box, write, press } = shown({ recent: [turn(1)] });
    button("Edit").click();
    expect(box.value).toBe("question 1");
    write("question 1, better");
    press("Enter");
    await settled();
    expect(model.sent.at(-1)).toMatchObject({ kind: "edit", turn: "t1", text: "question 1, better" });
  });

  test.each(["Escape", "Cancel"])("an edit is given up by %s, and what was written before is there again", async (how) => {
    const { model, button, box, write, press, of } = shown({ recent: [turn(1)] });
    write("my draft");
    button("Edit").click();
    expect(of(".kn-composer .kn-row").textContent).toContain("turn 1");
    if (how === "Escape") press("Escape");
    else button("Cancel").click();
    expect(box.value).toBe("my draft");
    press("Enter");
    await settled();
    expect(model.sent.at(-1)).toMatchObject({ kind: "send", text: "my draft" });
  });

  test("an edit that is begun while another message waits for the kernel stays one", async () => {
    const { model, button, box, write, press, of } = shown({ recent: [turn(1)] });
    write("sent first");
    press("Enter");
    await settled();
    button("Edit").click();
    write("question 1, better");
    model.receive({ kind: "done", id: model.sent[0]?.["id"] });
    expect(of(".kn-composer .kn-row").classList.contains("kn-hidden")).toBe(false);
    press("Enter");
    await settled();
    expect(model.sent.at(-1)).toMatchObject({ kind: "edit", turn: "t1", text: "question 1, better" });
    model.receive({ kind: "done", id: model.sent.at(-1)?.["id"] });
    expect(box.value).toBe("");
  });

  test("what was written before an edit is there again, however the edit ends", async () => {
    const { model, button, box, write, press, answer } = shown({ recent: [turn(1)] });
    write("my draft");
    button("Edit").click();
    write("better");
    press("Enter");
    await settled();
    write("better still");
    answer();
    expect(box.value).toBe("my draft\n\nbetter still");
    write("my draft");
    button("Edit").click();
    model.arrives("recent", [turn(1, { id: "another" })]);
    expect(box.value).toBe("my draft");
  });

  test("an edit ends when its turn leaves the page", async () => {
    const { model, button, write, press } = shown({ recent: [turn(1)] });
    button("Edit").click();
    write("my words");
    model.arrives("recent", [turn(1, { id: "of another conversation" })]);
    press("Enter");
    await settled();
    expect(model.sent.at(-1)).toMatchObject({ kind: "send", text: "my words" });
  });

  test("Enter pressed twice sends once, and what is written meanwhile stays", async () => {
    const { model, write, press, box, answer } = shown();
    write("hello");
    press("Enter");
    press("Enter");
    await settled();
    expect(model.sent).toHaveLength(1);
    write("hello, and more");
    answer();
    expect(box.value).toBe("hello, and more");
    press("Enter");
    await settled();
    expect(model.sent).toHaveLength(2);
  });

  test("the Enter that ends a composition in Safari sends nothing", async () => {
    const { model, write, press } = shown();
    write("に");
    press("Enter", { keyCode: 229 });
    await settled();
    expect(model.sent).toEqual([]);
  });

  test("what cannot be sent is refused where it was dropped: too large, unreadable", async () => {
    const { model, write, press, of, all } = shown();
    const drop = (...files: File[]) => of(".kn-chat").dispatchEvent(Object.assign(new Event("drop", { bubbles: true }), { dataTransfer: { files } }));
    const complaints = () => all("[role=alert]").map((each) => each.textContent).join(" ");
    const large = new File(["x"], "photo.jpg");
    Object.defineProperty(large, "size", { value: 12 * 2 ** 20 });
    drop(large);
    expect(all(".kn-chips li")).toHaveLength(0);
    expect(complaints()).toContain("photo.jpg has 12.0 MB: 8 MB together can be sent from here");
    const gone = new File(["x"], "gone.png");
    gone.arrayBuffer = () => Promise.reject(new Error("it was deleted"));
    drop(gone);
    write("hello");
    press("Enter");
    await vi.waitFor(() => expect(complaints()).toContain("it was deleted"));
    expect(model.sent).toEqual([]);
    expect(all(".kn-chips li")).toHaveLength(1);
  });

  test("a table is pasted as text, a picture as a picture", () => {
    const { box, all } = shown();
    const paste = (types: string[]) =>
      box.dispatchEvent(Object.assign(new Event("paste", { bubbles: true, cancelable: true }), { clipboardData: { types, files: [new File(["x"], "a.png")] } }));
    paste(["text/plain", "Files"]);
    expect(all(".kn-chips li")).toHaveLength(0);
    paste(["Files"]);
    expect(all(".kn-chips li")).toHaveLength(1);
  });

  test("what failed comes back into an empty box only", () => {
    const { model, box, write } = shown();
    model.arrives("problem", { text: "it failed", prompt: "my words", gives_back: true });
    expect(box.value).toBe("my words");
    write("other words");
    model.arrives("problem", { text: "it failed", prompt: "my words", gives_back: true });
    expect(box.value).toBe("other words");
  });
});

describe("what could not be answered", () => {
  const problem = { text: "it failed", prompt: "my words", gives_back: true };

  test("comes back with its files", async () => {
    const { model, write, press, answer, box, of, all } = shown();
    const drop = new Event("drop", { bubbles: true, cancelable: true });
    Object.assign(drop, { dataTransfer: { files: [new File(["x"], "dot.png", { type: "image/png" })] } });
    of(".kn-chat").dispatchEvent(drop);
    write("my words");
    press("Enter");
    await vi.waitFor(() => expect(model.sent).toMatchObject([{ kind: "send", files: [{ name: "dot.png", mime: "image/png" }] }]));
    answer();
    expect(all(".kn-chips li")).toHaveLength(0);
    model.arrives("problem", problem);
    expect(box.value).toBe("my words");
    expect(all(".kn-chips li").map((each) => each.textContent)).toEqual([expect.stringContaining("dot.png")]);
  });

  test("comes back where it was a picture alone", async () => {
    const { model, press, answer, of, all } = shown();
    of(".kn-chat").dispatchEvent(Object.assign(new Event("drop", { bubbles: true }), { dataTransfer: { files: [new File(["x"], "dot.png")] } }));
    press("Enter");
    await vi.waitFor(() => expect(model.sent).toHaveLength(1));
    answer();
    model.arrives("problem", { text: "it failed", prompt: "", gives_back: true });
    expect(all(".kn-chips li")).toHaveLength(1);
  });

  test("comes back also where it failed before it was heard to be taken", async () => {
    const { model, write, press, answer, box } = shown();
    write("my words");
    press("Enter");
    await settled();
    model.arrives("problem", problem);
    answer();
    expect(box.value).toBe("my words");
  });

  test("comes back as the edit that it was", async () => {
    const { model, button, write, press, answer } = shown({ recent: [turn(1)] });
    button("Edit").click();
    write("my words");
    press("Enter");
    await settled();
    answer();
    model.arrives("problem", problem);
    press("Enter");
    await settled();
    expect(model.sent.at(-1)).toMatchObject({ kind: "edit", turn: "t1", text: "my words" });
  });
});

describe("copying", () => {
  test.each([true, false])("goes through a selection where the page has no clipboard, and says whether it went (%s)", async (works) => {
    vi.stubGlobal("navigator", {});
    let selected = "";
    const execCommand = vi.fn(() => {
      selected = (document.activeElement as HTMLTextAreaElement).value;
      return works;
    });
    Object.assign(document, { execCommand });
    const { button } = shown({ recent: [turn(1)] });
    button("Copy").click();
    await settled();
    expect(selected).toBe("answer **1**");
    expect(button(works ? "Copied" : "Not allowed here")).toBeDefined();
    expect(document.querySelectorAll("textarea[aria-hidden]")).toHaveLength(0);
    Reflect.deleteProperty(document, "execCommand");
    vi.unstubAllGlobals();
  });
});
