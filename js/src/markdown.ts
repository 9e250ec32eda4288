/**
 * Markdown by a model -> nodes that are safe on a page with the person's own rights.
 *
 * Two walls, as on the kernel's side (`notebook/render.py`): marked with raw HTML as text, images as words and links
 * checked; then DOMPurify with a list of what the first one writes. Nothing is fetched.
 */

import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import { Marked, type Token, type Tokens } from "marked";

for (const [name, language] of Object.entries({ bash, json, python })) hljs.registerLanguage(name, language);

const SAFE_LINK = /^(?:https?:|mailto:|#)/i;
/** Colouring more than this takes long enough to be felt. */
const LONGEST_COLOURED = 20_000;
const UNSHOWABLE = /[\0\ud800-\udfff]/gu;

const escape = (text: string): string =>
  text.replace(/[&<>"']/g, (found) => `&#${found.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: false,
  tokenizer: {
    // A definition far below would change what stands above it.
    def: () => undefined,
  },
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<span class="kn-image">[image: ${escape(`${text} ${href}`)}]</span>`,
    link(this: { parser: { parseInline(tokens: Token[]): string } }, { href, tokens }: Tokens.Link) {
      const words = this.parser.parseInline(tokens);
      if (!SAFE_LINK.test(href.trim())) return words;
      return `<a href="${escape(href)}" target="_blank" rel="noopener noreferrer nofollow">${words}</a>`;
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => codeBlock(text, (lang ?? "").split(/\s/)[0] ?? ""),
  },
});

function codeBlock(text: string, language: string): string {
  const known = language !== "" && hljs.getLanguage(language) && text.length <= LONGEST_COLOURED;
  const body = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escape(text);
  const name = /^[\w+#.-]{1,30}$/.test(language) ? ` class="language-${language}"` : "";
  return `<pre><code${name}>${body}</code></pre>`;
}

const TAGS = (
  "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre hr br code em strong del a span table thead tbody tr th td"
).split(" ");
const OWN_CLASS = /^(?:hljs-[\w-]+|function_|class_|inherited__|language-[\w+#.-]{1,30}|kn-image)$/;

// An instance of our own: hooks of another library on the page are not ours, and ours not theirs.
const purifier = DOMPurify(window);
purifier.addHook("uponSanitizeAttribute", (_node, data) => {
  if (data.attrName === "class") {
    data.attrValue = data.attrValue
      .split(/\s+/)
      .filter((name) => OWN_CLASS.test(name))
      .join(" ");
    data.keepAttr = data.attrValue !== "";
  } else if (data.attrName === "href") data.keepAttr = SAFE_LINK.test(data.attrValue.trim());
});

function purified(html: string): DocumentFragment {
  return purifier.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "rel", "target", "class", "start", "align"],
    ADD_URI_SAFE_ATTR: ["align", "start", "target", "rel"],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: SAFE_LINK,
    RETURN_DOM_FRAGMENT: true,
  });
}

/** `text` with what cannot be shown (NUL, lone surrogates) as U+FFFD. */
export function showable(text: string): string {
  return text.replace(/\r\n?/g, "\n").replace(UNSHOWABLE, "\ufffd");
}

/** A text's blocks, top level only. What is nested too deeply to be read is one block of plain text. */
function blocksOf(text: string): Token[] {
  const shown = showable(text);
  try {
    return marked.lexer(shown).filter((token) => token.type !== "space");
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return [{ type: "code", raw: shown, text: shown }];
  }
}

function drawn(token: Token): HTMLElement {
  const node = document.createElement("div");
  node.className = "kn-block";
  try {
    node.append(purified(marked.parser([token])));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    node.textContent = token.raw;
  }
  return node;
}

/** Put the longer code of `token` into a block of code, whose buttons and scroll position stay; whether that was one. */
function grow(block: Element | null, token: Token | undefined): boolean {
  const code = block?.querySelector("pre > code");
  if (!code || token?.type !== "code") return false;
  const longer = drawn(token).querySelector("pre > code");
  if (!longer || longer.className !== code.className) return false;
  code.replaceChildren(...longer.childNodes);
  return true;
}

/**
 * A text that grows at its end, drawn into `root`: blocks that stay the same keep their nodes, so that a selection and
 * the scroll position of a code block stay too.
 */
export class GrowingMarkdown {
  private raws: string[] = [];
  private finished = 0;

  /**
   * @param decorate gets each new block, to put buttons onto code.
   * @param finish gets each block when it has ended: when another follows it, or at `end`.
   */
  constructor(
    readonly root: HTMLElement,
    private readonly decorate: (block: HTMLElement) => void = () => undefined,
    private readonly finish: (block: HTMLElement) => void = () => undefined,
  ) {}

  /** Draw the whole of `text`. */
  draw(text: string): void {
    const tokens = blocksOf(text);
    if (!this.raws.length) this.root.textContent = "";
    let same = 0;
    while (same < tokens.length && same < this.raws.length && tokens[same]?.raw === this.raws[same]) same++;
    this.finished = Math.min(this.finished, same);
    if (same === this.raws.length - 1 && grow(this.root.lastElementChild, tokens[same])) same++;
    while (this.root.childElementCount > same) this.root.lastElementChild?.remove();
    for (const token of tokens.slice(same)) {
      const block = drawn(token);
      this.decorate(block);
      this.root.append(block);
    }
    this.raws = tokens.map((token) => token.raw);
    this.finishUntil(tokens.length - 1);
  }

  /** There comes no more. */
  end(): void {
    this.finishUntil(this.root.childElementCount);
  }

  private finishUntil(count: number): void {
    for (; this.finished < count; this.finished++) this.finish(this.root.children[this.finished] as HTMLElement);
  }
}
