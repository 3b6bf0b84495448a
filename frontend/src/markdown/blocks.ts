/**
 * Markdown that grows: cut into its top-level blocks, of which only the last ones are read again.
 *
 * Pure. What the blocks look like is `render`'s affair.
 */

import { Lexer } from "marked";
import type { Token, Tokens } from "marked";
import remend from "remend";

import { languageOf, markdown } from "./syntax";

/** What is open is closed; nothing else is changed, since it would look otherwise in the end. */
const COMPLETIONS = { linkMode: "text-only", htmlTags: false, comparisonOperators: false, singleTilde: false } as const;

export interface Block {
  kind: "code" | "text";
  /** Its Markdown; of the growing block, with what is open closed; of a long table, its first rows. */
  source: string;
  /** More rows of a long table: tables with the same head, to be drawn one after the other. */
  moreRows: string[];
  /** Of a code block: its text, language, and whether its end was seen. */
  code: string;
  language: string;
  isGrowing: boolean;
  /** Too long to be drawn anew with each token: as long as it grows, it is shown as it is written. */
  isRaw: boolean;
  /** It goes on with the list of the block before. */
  isContinued: boolean;
}

/** A top-level token, or a part of a long list. */
type Part = Token & { isContinued?: boolean };

/** Characters of a growing block. */
const LONGEST_DRAWN_GROWING = 12_000;
/** Longer lists are several blocks. */
const ITEMS_IN_PART = 50;
/** Longer tables are drawn in steps. */
const ROWS_IN_STEP = 100;

export class GrowingMarkdown {
  #text = "";
  /** Blocks that nothing can change any more, and the characters they take. */
  #settled: Block[] = [];
  #settledLength = 0;
  /** What has settled ends within a list. */
  #isWithinList = false;

  /** The blocks of `text`, which mostly is the text of the last call and something more. */
  read(text: string, isGrowing: boolean): Block[] {
    text = text.replace(/\r\n?/g, "\n"); // as the lexer does, which counts them so
    if (!text.startsWith(this.#text)) {
      this.#settled = [];
      this.#settledLength = 0;
      this.#isWithinList = false;
    }
    this.#text = text;
    const parts = this.#parts(text.slice(this.#settledLength));
    const visible = parts.filter(({ type }) => type !== "space" && type !== "def");
    // The last but one can still become one with the last: "1. a", "2" and then ". b".
    const settling = visible.slice(0, -2);
    this.#settle(parts, settling);
    const growing = visible.slice(settling.length);
    const last = growing.length - 1;
    const tail = growing.map((part, index) => blockOf(part, isGrowing && index === last));
    return [...this.#settled, ...tail];
  }

  #parts(text: string): Part[] {
    // Without what is within the blocks: that is read when one is drawn.
    const tokens = new Lexer(markdown.defaults).blockTokens(text);
    const parts = tokens.flatMap(partsOf);
    if (this.#isWithinList && parts[0]?.type === "list") parts[0] = { ...parts[0], isContinued: true };
    return parts;
  }

  #settle(parts: Part[], settling: Part[]): void {
    if (settling.length === 0) return;
    const end = parts.indexOf(settling.at(-1)!) + 1;
    for (const { raw } of parts.slice(0, end)) this.#settledLength += raw.length;
    this.#isWithinList = parts[end]?.isContinued ?? false;
    this.#settled = [...this.#settled, ...settling.map((part) => blockOf(part, false))];
  }
}

/** A long list in parts, so that those before the last can settle; everything else as it is. */
function partsOf(token: Token): Part[] {
  if (token.type !== "list") return [token];
  const list = token as Tokens.List;
  const count = Math.ceil(list.items.length / ITEMS_IN_PART);
  if (count === 1) return [token];
  let end = 0;
  return Array.from({ length: count }, (_, index) => {
    const items = list.items.slice(index * ITEMS_IN_PART, (index + 1) * ITEMS_IN_PART);
    const begin = end;
    for (const { raw } of items) end += raw.length;
    // A line end after the list is the list's, not its last item's.
    if (index === count - 1) end = list.raw.length;
    return { ...list, items, raw: list.raw.slice(begin, end), isContinued: index > 0 };
  });
}

function blockOf(part: Part, isGrowing: boolean): Block {
  const { raw, isContinued = false } = part;
  const block = { kind: "text" as const, source: raw, moreRows: [], code: "", language: "", isGrowing, isRaw: false, isContinued };
  if (part.type === "code") {
    const { text, lang } = part as Tokens.Code;
    return { ...block, kind: "code", code: text, language: languageOf(lang) };
  }
  if (isGrowing) return raw.length > LONGEST_DRAWN_GROWING ? { ...block, isRaw: true } : { ...block, source: remend(raw, COMPLETIONS) };
  if (part.type === "table" && (part as Tokens.Table).rows.length > ROWS_IN_STEP) return { ...block, ...stepsOf(raw) };
  return block;
}

/** A row is a line, and so are the two of the head. */
function stepsOf(table: string): Pick<Block, "source" | "moreRows"> {
  const lines = table.trimEnd().split("\n");
  const head = lines.splice(0, 2);
  const steps: string[] = [];
  for (let row = 0; row < lines.length; row += ROWS_IN_STEP) {
    steps.push([...head, ...lines.slice(row, row + ROWS_IN_STEP)].join("\n"));
  }
  return { source: steps[0]!, moreRows: steps.slice(1) };
}
