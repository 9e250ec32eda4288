import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { GrowingMarkdown } from "../src/markdown";

const ATTACKS = Object.entries(JSON.parse(readFileSync("../tests/hostile_answers.json", "utf8")) as Record<string, string>);
const ALLOWED = new Set("div p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre hr br code em strong del a span table thead tbody tr th td".split(" "));
const ATTRIBUTES = new Set(["href", "rel", "target", "class", "start", "align"]);

function drawn(text: string): HTMLElement {
  const root = document.createElement("div");
  new GrowingMarkdown(root).draw(text);
  return root;
}

/** What must not be there. */
function faults(root: HTMLElement): string[] {
  const found: string[] = [];
  for (const node of root.querySelectorAll("*")) {
    if (!ALLOWED.has(node.localName) || node.namespaceURI !== "http://www.w3.org/1999/xhtml") found.push(node.outerHTML);
    for (const { name, value } of node.attributes) {
      if (!ATTRIBUTES.has(name)) found.push(`${name}=${value}`);
      if (name === "href" && !/^(https?:|mailto:|#)/i.test(value)) found.push(value);
      if (name === "class" && value.split(" ").some((each) => !/^(kn-block|kn-image|hljs-|function_|class_|inherited__|language-)/.test(each)))
        found.push(value);
    }
  }
  return found;
}

describe.each(ATTACKS)("%s", (_name, attack) => {
  test.each([
    ["alone", attack],
    ["in an answer", `Sure!\n\n${attack}\n\nDone.`],
    ["in a list", `- item ${attack}\n`],
    ["in emphasis", `*${attack}*`],
    ["in a table", `|a|b|\n|-|-|\n|${attack.replaceAll("\n", " ")}|x|`],
  ])("is words, %s", (_where, text) => {
    expect(faults(drawn(text))).toEqual([]);
  });

  test("is words while it is written", () => {
    const root = document.createElement("div");
    const growing = new GrowingMarkdown(root);
    const text = `Sure!\n\n${attack}\n\nDone.`;
    for (let end = 0; end <= text.length; end += 3) {
      growing.draw(text.slice(0, end));
      expect(faults(root)).toEqual([]);
    }
  });
});

test("what is drawn piece by piece is what is drawn at once", () => {
  const text = "# A\n\n- one\n- two\n\n```python\nx = 1\n```\n\n| a | b |\n|:-:|--:|\n| 1 | 2 |\n\n> quoted\n\nLast *words* and `code`, [a](https://a.example).";
  const root = document.createElement("div");
  const growing = new GrowingMarkdown(root);
  for (let end = 1; end <= text.length; end++) {
    growing.draw(text.slice(0, end));
    expect(root.innerHTML).toBe(drawn(text.slice(0, end)).innerHTML);
  }
});

test("blocks that are done keep their nodes", () => {
  const root = document.createElement("div");
  const growing = new GrowingMarkdown(root);
  growing.draw("one\n\ntwo\n\nth");
  const [first, second] = root.children;
  growing.draw("one\n\ntwo\n\nthree");
  expect([root.children[0], root.children[1]]).toEqual([first, second]);
  expect(root.children[2]?.textContent).toBe("three\n");
});

test("another text takes the place of the first", () => {
  const root = document.createElement("div");
  const growing = new GrowingMarkdown(root);
  growing.draw("one\n\ntwo");
  growing.draw("three");
  expect(root.textContent).toBe("three\n");
});

test("code is coloured, tables are aligned, images are words", () => {
  const root = drawn("```python\ndef f():\n    return 1\n```\n\n|a|\n|:-:|\n|1|\n\n![a cat](https://evil.example/c.png)");
  expect(root.querySelector("code.language-python .hljs-keyword")?.textContent).toBe("def");
  expect(root.querySelector("td")?.getAttribute("align")).toBe("center");
  expect(root.querySelector(".kn-image")?.textContent).toBe("[image: a cat https://evil.example/c.png]");
});

test.each([
  ["open brackets", "[".repeat(50_000)],
  ["quotations", ">".repeat(5_000)],
  ["stars", "*a".repeat(20_000)],
  ["backquotes", "`".repeat(50_000)],
  ["lists", "- ".repeat(500)],
  ["links", "[a](".repeat(5_000)],
  ["a long word", "x".repeat(500_000)],
  ["angle brackets", "<a ".repeat(20_000)],
])("%s without end are drawn in seconds", (_name, text) => {
  expect(faults(drawn(text))).toEqual([]);
}, 20_000);
