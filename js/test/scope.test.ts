import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Scope } from "../src/scope";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

test("what a scope began ends with it, the latest first", () => {
  const scope = new Scope();
  const seen: string[] = [];
  scope.finally(() => seen.push("first"));
  scope.finally(() => seen.push("second"));
  scope.after(10, () => seen.push("timer"));
  scope.end();
  scope.end();
  vi.advanceTimersByTime(100);
  expect(seen).toEqual(["second", "first"]);
});

test("a timer runs once, can be cancelled, and does not outlive its scope", () => {
  const scope = new Scope();
  const seen: string[] = [];
  scope.after(10, () => seen.push("ran"));
  scope.after(10, () => seen.push("cancelled"))();
  vi.advanceTimersByTime(100);
  scope.end();
  scope.after(10, () => seen.push("late"));
  vi.advanceTimersByTime(100);
  expect(seen).toEqual(["ran"]);
});

test("a listener of a node is taken away with the scope", () => {
  const scope = new Scope();
  const node = document.createElement("button");
  const seen: string[] = [];
  scope.listen(node, "click", () => seen.push("click"));
  node.click();
  scope.end();
  node.click();
  expect(seen).toEqual(["click"]);
});
