import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { points } from "../src/sparkline";
import strip from "../src/widgets/strip";
import { FakeModel } from "./fake_model";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

function shown(state = {}) {
  const model = new FakeModel({ state });
  const el = document.createElement("div");
  const end = strip.render({ model, el });
  const button = el.querySelector("button") as HTMLButtonElement;
  const status = el.querySelector("[role=status]") as HTMLElement;
  return { model, el, end, button, status };
}

test("a line of numbers fills its box", () => {
  expect(points([1, 3, 2])).toBe("0.0,15.0 40.0,1.0 80.0,8.0");
  expect(points([5, 5])).toBe("0.0,15.0 80.0,15.0");
  expect(points([7])).toBe("0.0,15.0");
});

test("words of the kernel enter as text", () => {
  const { el, status } = shown({ status: "<img src=x onerror=alert(1)>", numbers: "<u>1</u>", memory: "2" });
  expect(status.textContent).toBe("<img src=x onerror=alert(1)>");
  expect(el.querySelector("img, u")).toBeNull();
});

test("stop that is acknowledged interrupts nothing", () => {
  const { model, button, status } = shown({ status: "answering" });
  button.click();
  expect(model.sent).toEqual([{ kind: "stop" }]);
  expect([button.disabled, status.textContent]).toEqual([true, "stopping…"]);
  model.receive({ kind: "ack" });
  vi.advanceTimersByTime(10_000);
  expect(model.interrupts).toBe(0);
});

test("stop that nobody hears interrupts the kernel", () => {
  const { model, button, status } = shown();
  button.click();
  vi.advanceTimersByTime(799);
  expect(model.interrupts).toBe(0);
  vi.advanceTimersByTime(1);
  expect([model.interrupts, status.textContent]).toEqual([1, "interrupting the kernel…"]);
});

test("the end of a view undoes all of it", () => {
  const { model, el, end, button } = shown();
  button.click();
  end();
  expect([el.childElementCount, model.size]).toEqual([0, 0]);
  vi.advanceTimersByTime(10_000);
  expect(model.interrupts).toBe(0);
});
