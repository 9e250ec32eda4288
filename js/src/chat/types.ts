/** What the kernel says of the chat pane: `chat_view.py` and `answer_feed.py` make it. */

export interface Step {
  line: string;
  said: string;
  arguments: string;
  result: string | null;
  is_error: boolean;
}

export interface Turn {
  id: string;
  number: number;
  prompt: string;
  pictures: { words: string; source: string }[];
  can_edit: boolean;
  answer: string;
  reasoning: string;
  steps: Step[];
  model: string;
  is_cut: boolean;
  stat: string;
  siblings: string[];
}

export interface Running {
  run?: string;
  seq?: number;
  prompt?: string;
  replaces?: string;
  text?: string;
  reasoning?: string;
  steps?: Step[];
  notes?: string[];
  status?: string;
  numbers?: string;
  question?: { id?: string; text?: string };
}

export interface Delta {
  kind: "delta";
  run: string;
  seq: number;
  status: string;
  numbers: string;
  text?: string;
  reasoning?: string;
}

export interface Around {
  name?: string;
  system?: string;
  branches?: number;
  engine?: string;
  context?: { used: number | null; window: number | null };
  params?: Record<string, string>;
}

export interface Chat {
  name: string;
  turns: number;
  notebook: string;
  updated_at: number;
  is_current: boolean;
}

/** Why a prompt could not be answered; `gives_back` where it is not kept, so that it may be sent again. */
export interface Problem {
  text?: string;
  prompt?: string;
  gives_back?: boolean;
}

export interface State {
  door: string;
  history: Turn[];
  recent: Turn[];
  running: Running;
  around: Around;
  problem: Problem;
  notices: string[];
}
