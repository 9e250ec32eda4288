/** Elements without markup: text enters as text, attributes by name. */

type Child = Node | string | null | undefined | false;
type Attributes = Record<string, string | number | boolean | null | undefined>;

/** A new element. An attribute that is `true` stands alone; one that is `false`, null or undefined is left out. */
export function element<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[Tag] {
  const node = document.createElement(tag);
  assign(node, attributes);
  append(node, children);
  return node;
}

/** The same for drawings. */
export function drawing<Tag extends keyof SVGElementTagNameMap>(
  tag: Tag,
  attributes: Attributes = {},
  ...children: Child[]
): SVGElementTagNameMap[Tag] {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  assign(node, attributes);
  append(node, children);
  return node;
}

/** Set attributes, and take away those that are `false`, null or undefined. */
export function assign(node: Element, attributes: Attributes): void {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) node.removeAttribute(name);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
}

/** Put text into a node, only where it differs: what is live is spoken when it changes. */
export function say(node: Element, text: string): void {
  if (node.textContent !== text) node.textContent = text;
}

/** What a press of a button does. For nodes that go away with the button's listener: nothing else keeps them. */
export function press(node: HTMLElement, act: () => void): void {
  node.addEventListener("click", act);
}

/** What happens, without the numbers in it: what is worth being spoken when it changes. */
export function stageOf(status: string): string {
  return status.replace(/,?\s\d.*$/s, "");
}

function append(node: Element, children: Child[]): void {
  for (const child of children) if (child) node.append(child);
}
