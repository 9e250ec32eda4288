/** What opens beside the conversation: the list of conversations, and how answers are generated. */

import { assign, element, press, say } from "../dom";
import type { Scope } from "../scope";
import type { Chat } from "./types";

const PARAMS = [
  ["max_new_tokens", "Most new tokens", "512"],
  ["temperature", "Temperature", "the model's"],
  ["top_p", "Top p", "the model's"],
  ["top_k", "Top k", "the model's"],
  ["repetition_penalty", "Repetition penalty", "the model's"],
  ["seed", "Seed", "random"],
] as const;

/** What the list of conversations asks for. */
export interface ListActions {
  find(query: string): void;
  open(name: string): void;
  begin(): void;
  rename(name: string): void;
}

let lastId = 0;

/** The conversations, found by name and by what was said in them. */
export class ChatList {
  readonly node: HTMLElement;
  private readonly search = element("input", { type: "search", "aria-label": "Search conversations", placeholder: "Search" });
  private readonly list = element("ul", { class: "kn-chats", "aria-label": "Conversations" });
  private readonly name = element("input", { type: "text" });

  constructor(
    scope: Scope,
    private readonly acts: ListActions,
  ) {
    let cancel: (() => void) | undefined;
    scope.listen(this.search, "input", () => {
      cancel?.();
      cancel = scope.after(250, () => acts.find(this.search.value));
    });
    scope.listen(this.name, "change", () => acts.rename(this.name.value));
    const fresh = element("button", { type: "button" }, "New conversation");
    scope.listen(fresh, "click", () => acts.begin());
    this.node = element("section", { class: "kn-drawer", "aria-label": "Conversations" }, element("label", { class: "kn-field" }, "Name of this conversation", this.name), element("div", { class: "kn-row" }, this.search, fresh), this.list);
  }

  /** What is looked for. */
  get query(): string {
    return this.search.value;
  }

  /** Show what this conversation is called. */
  call(name: string): void {
    if (this.name !== document.activeElement) this.name.value = name;
  }

  draw(chats: readonly Chat[]): void {
    this.list.replaceChildren(
      ...chats.map((chat) => {
        const turns = `${chat.turns} turn${chat.turns === 1 ? "" : "s"}`;
        const button = element(
          "button",
          { type: "button", "aria-current": chat.is_current ? "true" : null },
          `${chat.name} · ${turns} · ${new Date(chat.updated_at * 1000).toLocaleString()}`,
        );
        press(button, () => this.acts.open(chat.name));
        return element("li", {}, button);
      }),
    );
    const none = this.query.trim() ? "Nothing was found." : "None is kept yet.";
    if (!chats.length) this.list.append(element("li", { class: "kn-note" }, none));
  }
}

/** The system prompt and the sampling settings. */
export class Settings {
  readonly node: HTMLElement;
  private readonly system = element("textarea", { rows: 2, "aria-label": "System prompt", placeholder: "none" });
  private readonly inputs = new Map<string, HTMLInputElement>();
  private readonly sampling = element("select", { "aria-label": "Sampling" });
  private readonly mistake = element("p", { class: "kn-error", role: "alert", id: `kani-mistake-${++lastId}` });

  constructor(scope: Scope, setSystem: (text: string) => void, setParams: (params: Record<string, number | boolean | null>) => void) {
    for (const [value, label] of [["", "the model's"], ["true", "at random"], ["false", "greedy"]] as const)
      this.sampling.append(element("option", { value }, label));
    const changed = (): void => {
      const params: Record<string, number | boolean | null> = {};
      for (const [name, input] of this.inputs) params[name] = input.value.trim() === "" ? null : Number(input.value);
      params["do_sample"] = this.sampling.value === "" ? null : this.sampling.value === "true";
      setParams(params);
    };
    const fields = PARAMS.map(([name, label, placeholder]) => {
      const input = element("input", { type: "number", step: "any", placeholder });
      this.inputs.set(name, input);
      scope.listen(input, "change", changed);
      return element("label", { class: "kn-field" }, label, input);
    });
    scope.listen(this.sampling, "change", changed);
    scope.listen(this.system, "change", () => setSystem(this.system.value));
    this.node = element(
      "section",
      { class: "kn-drawer", "aria-label": "Settings" },
      element("label", { class: "kn-field" }, "System prompt", this.system),
      element("div", { class: "kn-params" }, element("label", { class: "kn-field" }, "Sampling", this.sampling), ...fields),
      this.mistake,
    );
  }

  /** Say what cannot be used, at the setting that it is about; an empty text takes that away. */
  complain(text: string): void {
    say(this.mistake, text);
    for (const [name, input] of this.inputs) {
      const isWrong = new RegExp(`\\b${name}\\b`).test(text);
      assign(input, { "aria-invalid": isWrong ? "true" : null, "aria-describedby": isWrong ? this.mistake.id : null });
    }
  }

  /** Show what is set; what cannot be used stays as it was typed. */
  draw(system: string, params: Record<string, string>): void {
    if (this.system !== document.activeElement) this.system.value = system;
    for (const [name, input] of this.inputs)
      if (input !== document.activeElement && !input.hasAttribute("aria-invalid")) input.value = params[name] ?? "";
    this.sampling.value = params["do_sample"]?.toLowerCase() ?? "";
  }
}
