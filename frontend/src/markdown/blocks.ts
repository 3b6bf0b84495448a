/**
 * Markdown that grows: cut into its top-level blocks, of which only the last ones are read again.
 *
 * Pure. What the blocks look like is `render`'s affair.
 */

import { Lexer } from "marked";
import type { Token } from "marked";
import remend from "remend";

import { languageOf, markdown } from "./syntax";

/** What is open is closed; nothing else is changed, since it would look otherwise in the end. */
const COMPLETIONS = { linkMode: "text-only", htmlTags: false, comparisonOperators: false, singleTilde: false } as const;

export interface Block {
  kind: "code" | "text";
  /** Its Markdown; of the growing block, with what is open closed. */
  source: string;
  /** Of a code block: its text, language, and whether its end was seen. */
  code: string;
  language: string;
  isGrowing: boolean;
  /** Too long to be drawn anew with each token: as long as it grows, it is shown as it is written. */
  isRaw: boolean;
}

/** Characters of a growing block. */
const LONGEST_DRAWN_GROWING = 12_000;

export class GrowingMarkdown {
  #text = "";
  /** Blocks that nothing can change any more, and the characters they take. */
  #settled: Block[] = [];
  #settledLength = 0;

  /** The blocks of `text`, which mostly is the text of the last call and something more. */
  read(text: string, isGrowing: boolean): Block[] {
    text = text.replace(/\r\n?/g, "\n"); // as the lexer does, which counts them so
    if (!text.startsWith(this.#text)) {
      this.#settled = [];
      this.#settledLength = 0;
    }
    this.#text = text;
    // Without what is within the blocks: that is read when one is drawn.
    const tokens = new Lexer(markdown.defaults).blockTokens(text.slice(this.#settledLength));
    const visible = tokens.filter((token) => token.type !== "space" && token.type !== "def");
    // The last but one can still become one with the last: "1. a", "2" and then ". b".
    const settling = visible.slice(0, -2);
    this.#settle(tokens, settling);
    const growing = visible.slice(settling.length);
    const last = growing.length - 1;
    const tail = growing.map((token, index) => blockOf(token, isGrowing && index === last));
    return [...this.#settled, ...tail];
  }

  #settle(tokens: Token[], settling: Token[]): void {
    if (settling.length === 0) return;
    for (const token of tokens) {
      this.#settledLength += token.raw.length;
      if (token === settling.at(-1)) break;
    }
    this.#settled = [...this.#settled, ...settling.map((token) => blockOf(token, false))];
  }
}

function blockOf(token: Token, isGrowing: boolean): Block {
  if (token.type === "code") {
    const { text, lang } = token as { text: string; lang?: string };
    return { kind: "code", source: token.raw, code: text, language: languageOf(lang), isGrowing, isRaw: false };
  }
  const isRaw = isGrowing && token.raw.length > LONGEST_DRAWN_GROWING;
  const source = isGrowing && !isRaw ? remend(token.raw, COMPLETIONS) : token.raw;
  return { kind: "text", source, code: "", language: "", isGrowing, isRaw };
}
