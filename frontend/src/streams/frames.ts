/**
 * What the frames of one generation mean, in the order in which they come, over any number of connections.
 *
 * Pure: a frame in, events out. Each token is given out once, however often it is sent.
 */

import type { FinishReason, Frame } from "../contract";

export type AnswerEvent =
  | { kind: "started"; generation: string }
  | { kind: "queued"; place: number }
  | { kind: "waiting"; code: string }
  | { kind: "text"; text: string; tokens: number }
  | { kind: "finished"; reason: FinishReason; promptTokens: number | null }
  | { kind: "failed"; code: string }
  /** Tokens are missing between what came and this frame: attach again at `position`. */
  | { kind: "gap" };

export class FrameReader {
  /** Tokens given out. */
  position: number;

  constructor(position = 0) {
    this.position = position;
  }

  read(frame: Frame): AnswerEvent[] {
    if (!frame.ok) return [{ kind: "failed", code: frame.code ?? "internal_error" }];
    if (frame.queue_place !== undefined) return [{ kind: "queued", place: frame.queue_place }];
    if (frame.waiting_for !== undefined) return [{ kind: "waiting", code: frame.waiting_for }];
    if (frame.outputs === undefined) {
      return frame.generation === undefined ? [] : [{ kind: "started", generation: frame.generation }];
    }
    return this.#readText(frame, frame.outputs);
  }

  #readText(frame: Frame, text: string): AnswerEvent[] {
    const count = frame.token_count ?? 0;
    const position = frame.position ?? this.position + count;
    if (position - count > this.position) return [{ kind: "gap" }];
    const events: AnswerEvent[] = [];
    // The last frame may have text without a token: what was held back as a possible stop text.
    if (position > this.position || (frame.stop === true && count === 0 && text !== "")) {
      events.push({ kind: "text", text, tokens: position - this.position });
      this.position = position;
    }
    if (frame.stop === true) {
      events.push({
        kind: "finished",
        reason: frame.finish_reason ?? "stop",
        promptTokens: frame.prompt_tokens ?? null,
      });
    }
    return events;
  }
}
