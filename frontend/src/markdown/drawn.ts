/**
 * Which blocks of an answer are on the page. A long answer comes onto it in steps, from where it is read: first what
 * comes after that, then what comes before. Pure.
 */

import type { Block } from "./blocks";

/** What is laid out together, so that what has settled costs the later blocks nothing: blocks, and characters. */
const BLOCKS_IN_PIECE = 32;
const CHARACTERS_IN_PIECE = 2000;
/** What is behind by much is made up for within so many steps. */
const MOST_STEPS_BEHIND = 30;

/** The blocks from `begin`, where a piece begins, to before `end`. */
export interface Drawn {
  readonly begin: number;
  readonly end: number;
}

/** Where pieces of the blocks begin. More blocks at the end change nothing for those before. */
export function pieceBegins(blocks: readonly Block[]): number[] {
  const begins: number[] = [];
  let characters = 0;
  blocks.forEach(({ source }, index) => {
    const begin = begins.at(-1);
    if (begin === undefined || index - begin >= BLOCKS_IN_PIECE || characters >= CHARACTERS_IN_PIECE) {
      begins.push(index);
      characters = 0;
    }
    characters += source.length;
  });
  return begins;
}

/** The first step: about `size` characters, of the end or of the beginning. */
export function firstStep(blocks: readonly Block[], size: number, isFromEnd: boolean): Drawn {
  const { length } = blocks;
  return isFromEnd ? { begin: stepBack(blocks, length, size), end: length } : stepOn(blocks, { begin: 0, end: 0 }, size);
}

/** A step of about `size` characters more. */
export function nextStep(blocks: readonly Block[], drawn: Drawn, size: number): Drawn {
  if (drawn.end < blocks.length) return stepOn(blocks, drawn, size);
  return { begin: stepBack(blocks, drawn.begin, size), end: blocks.length };
}

export function isAllDrawn(blocks: readonly Block[], { begin, end }: Drawn): boolean {
  return begin === 0 && end >= blocks.length;
}

function stepOn(blocks: readonly Block[], { begin, end }: Drawn, size: number): Drawn {
  const behind = blocks.slice(end).reduce((sum, { source }) => sum + source.length, 0);
  let left = Math.max(size, behind / MOST_STEPS_BEHIND);
  while (end < blocks.length && left > 0) left -= blocks[end++]!.source.length;
  return { begin, end };
}

function stepBack(blocks: readonly Block[], end: number, size: number): number {
  const begins = new Set(pieceBegins(blocks));
  let begin = end;
  while (begin > 0 && (size > 0 || !begins.has(begin))) size -= blocks[--begin]!.source.length;
  return begin;
}
