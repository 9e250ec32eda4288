/** What the kernel says of the engine panel: `engine_form.py`, `engine_view.py` and `model_choices.py` make it. */

export type Value = string | boolean | string[] | null;
export type Values = Record<string, Value>;

export interface Field {
  name: string;
  label: string;
  kind: "text" | "number" | "choice" | "choice3" | "switch" | "list";
  help: string;
  flag: string;
  choices: string[];
}

export interface Controls {
  sections?: { title: string; fields: Field[] }[];
  models?: { name: string; about: string }[];
  schemes?: { name: string; about: string }[];
}

export interface Device {
  name: string;
  description: string;
  total: number;
  usable: number;
  weights: number;
  kv: number;
  working: number;
  is_over: boolean;
  words: string;
}

export interface Plan {
  devices: Device[];
  fits: boolean | null;
  verdict: string;
  fix: string;
  notes: string[];
  speed: string;
  map: Record<string, string>;
}

export interface Busy {
  title: string;
  done: string[];
  stage: string;
  fraction: number | null;
  elapsed: string;
  can_cancel: boolean;
}

export interface Engine {
  name: string;
  holds: string;
  is_current: boolean;
}

export interface View {
  line?: string;
  errors?: Record<string, string>;
  shown?: string[];
  model?: { title: string; window: number | null; note: string; is_reading: boolean };
  plan?: Plan | null;
  blocks?: string[];
  limits?: Record<string, number>;
  busy?: Busy | null;
  said?: { text?: string; remarks?: string; kind?: string };
  engines?: Engine[];
  /** What Load frees first, in a sentence. */
  frees?: string;
}

export interface State {
  values: Values;
  view: View;
  controls: Controls;
}
