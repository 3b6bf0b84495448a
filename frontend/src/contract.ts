/** What the server and the page tell each other: the shapes of docs/http-api.md and docs/websocket-api.md. */

export interface Sampling {
  do_sample: boolean;
  temperature: number;
  top_k: number;
  top_p: number;
  repetition_penalty: number;
}

export interface ChatSettings extends Partial<Sampling> {
  system?: string | null;
  max_new_tokens?: number;
}

export interface Chat {
  id: string;
  title: string;
  model: string;
  pinned: boolean;
  settings: ChatSettings;
  /** The shown leaf. */
  current: string | null;
  /** Seconds since 1970. */
  created_at: number;
  updated_at: number;
  /** The token of its link, if it is shared. */
  shared: string | null;
}

export type MessageState = "complete" | "answering" | "stopped" | "failed" | "interrupted";

export interface Message {
  id: string;
  parent: string | null;
  role: "user" | "assistant";
  content: string;
  model: string | null;
  created_at: number;
  state: MessageState;
  /** The code of what it failed with. */
  error: string | null;
  /** While it is being answered: attach with it. */
  generation: string | null;
  /** While it is being answered: how many of the generation's tokens `content` has. */
  position?: number | null;
  /** Why it ended, unless it broke off. */
  finish_reason?: FinishReason | null;
  tokens: number | null;
  seconds: number | null;
  first_token_seconds: number | null;
}

export interface WholeChat extends Chat {
  messages: Message[];
}

export interface SharedChat {
  title: string;
  model: string;
  created_at: number;
  messages: Message[];
}

export type ModelState = "loading" | "ready" | "full" | "broken" | "unavailable";

export interface Model {
  key: string;
  name: string;
  family: string;
  model_card: string | null;
  license: string | null;
  public_api: boolean;
  default: boolean;
  state: ModelState;
  missing_blocks: number[];
  max_session_length: number;
  chat: { generation: Sampling; sample_questions: string[] };
}

export interface PromptMessage {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface AnswerRequest extends Partial<Sampling> {
  type: "answer";
  model: string;
  messages: PromptMessage[];
  max_new_tokens?: number;
  record?: { chat: string; message: string; parent: string };
}

export type FinishReason = "stop" | "length" | "context_full" | "stopped";

/** A frame from the server, as far as the page reads it. */
export interface Frame {
  ok: boolean;
  code?: string;
  generation?: string;
  queue_place?: number;
  /** What the answer waits for: the code of an error that passes. */
  waiting_for?: string;
  outputs?: string;
  token_count?: number;
  /** Tokens of this generation, up to the end of this frame. */
  position?: number;
  stop?: boolean;
  finish_reason?: FinishReason;
  prompt_tokens?: number;
  cached_tokens?: number;
}

export interface ServerRow {
  peer_id: string;
  short_peer_id?: string;
  state: "online" | "joining" | "offline";
  span: { start: number; end: number };
  public_name?: string | null;
  version?: string | null;
  throughput?: number | null;
  inference_rps?: number | null;
  cache_tokens_left?: number | null;
  torch_dtype?: string | null;
  quant_type?: string | null;
  using_relay?: boolean | null;
  ping_seconds?: number | null;
}

export interface ModelReport {
  name: string;
  key: string;
  display_name: string;
  state: "healthy" | "broken";
  status: "ready" | "loading" | "broken" | "full" | "unavailable";
  num_blocks: number;
  missing_blocks: number[];
  /** How many machines hold the rarest block, and which blocks so few hold. */
  rarest_block_servers: number;
  rarest_blocks: number[];
  join_command: string | null;
  age_seconds: number | null;
  server_rows: ServerRow[];
}

export interface SwarmState {
  model_reports: ModelReport[];
  last_updated?: number | string;
}
