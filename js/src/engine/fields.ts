/** The controls: each a label, an input, its help and its mistake; set from the kernel, and told of what is typed. */

import { assign, element, say } from "../dom";
import type { Scope } from "../scope";
import type { Field, Value } from "./types";

type Input = HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement;

/** One control on the page. */
export interface Control {
  field: Field;
  node: HTMLElement;
  /** Show a value, unless the person is typing another just now. */
  set(value: Value): void;
  /** Show a mistake under the control; an empty text takes it away. */
  complain(text: string): void;
}

/** Options of a choice: what is sent, and what is read. */
export type Choices = readonly (readonly [value: string, label: string])[];

let lastId = 0;

/** The control of `field`; `changed` gets the value whenever the person settled on one. */
export function control(scope: Scope, field: Field, changed: (value: Value) => void): Control {
  const id = `kani-${++lastId}`;
  const input = inputOf(field);
  assign(input, { id, "aria-describedby": `${id}-help ${id}-error`, title: field.flag });
  const label = element("label", { for: id }, field.label);
  const help = element("p", { id: `${id}-help`, class: "kn-sr" }, field.help);
  const error = element("p", { id: `${id}-error`, class: "kn-error kn-hidden" });
  const isCheck = field.kind === "switch";
  const node = element(
    "div",
    { class: `kn-field${isCheck ? " kn-check" : ""}`, "data-field": field.name },
    ...(isCheck ? [input, label] : [label, input]),
    help,
    error,
  );
  let isTyping = false;
  scope.listen(input, "input", () => (isTyping = true));
  scope.listen(input, "change", () => {
    isTyping = false;
    changed(valueOf(field, input));
  });
  return {
    field,
    node,
    set: (value) => {
      if (!isTyping || input !== document.activeElement) show(input, value);
    },
    complain(text) {
      say(error, text);
      error.classList.toggle("kn-hidden", !text);
      assign(input, { "aria-invalid": text ? "true" : null });
    },
  };
}

function inputOf(field: Field): Input {
  switch (field.kind) {
    case "switch":
      return element("input", { type: "checkbox" });
    case "list":
      return element("textarea", { rows: 2, spellcheck: "false", placeholder: "one a line" });
    case "choice":
    case "choice3": {
      const node = element("select");
      const named: Choices =
        field.kind === "choice" ? field.choices.map((each) => [each, each]) : [["true", "yes"], ["false", "no"]];
      fill(node, [["", "default"], ...named.filter(([value]) => value !== "auto")]);
      return node;
    }
    default:
      return element("input", {
        type: "text",
        spellcheck: "false",
        autocomplete: "off",
        inputmode: field.kind === "number" ? "decimal" : null,
        placeholder: field.name === "model" ? null : "default",
      });
  }
}

/** Give a select these options, and keep what is chosen. */
export function fill(node: HTMLSelectElement, choices: Choices): void {
  const key = JSON.stringify(choices);
  if (node.dataset["choices"] === key) return;
  const chosen = node.value;
  node.dataset["choices"] = key;
  node.replaceChildren(...choices.map(([value, label]) => element("option", { value }, label)));
  node.value = chosen;
}

/** Choose a value of a select, which may not have offered it. */
export function choose(node: HTMLSelectElement, value: string): void {
  if (![...node.options].some((option) => option.value === value)) node.append(element("option", { value }, value));
  node.value = value;
}

function valueOf(field: Field, input: Input): Value {
  if (input instanceof HTMLInputElement && input.type === "checkbox") return input.checked;
  if (field.kind === "list") {
    const lines = input.value.split("\n").filter((line) => line !== "");
    return lines.length ? lines : null;
  }
  if (field.kind === "choice3") return input.value === "" ? null : input.value === "true";
  const text = input.value.trim();
  return text === "" ? null : text;
}

function show(input: Input, value: Value): void {
  if (input instanceof HTMLInputElement && input.type === "checkbox") {
    input.checked = value === true;
    return;
  }
  const text = Array.isArray(value) ? value.join("\n") : value === null || value === undefined ? "" : String(value);
  if (input instanceof HTMLSelectElement) choose(input, text);
  else if (input.value !== text) input.value = text;
}
