/**
 * A conversation as a tree: every version of a message and of an answer is kept, and one branch is shown.
 *
 * Pure; a change gives a new tree.
 */

import type { Message, PromptMessage } from "../contract";

export class Tree {
  readonly #byId: ReadonlyMap<string, Message>;
  readonly #children = new Map<string | null, Message[]>();

  constructor(messages: Iterable<Message> = []) {
    this.#byId = new Map([...messages].map((message) => [message.id, message]));
    for (const message of this.#byId.values()) {
      // What lost its parent is shown at the root rather than not at all.
      const parent = message.parent !== null && this.#byId.has(message.parent) ? message.parent : null;
      const siblings = this.#children.get(parent);
      if (siblings) siblings.push(message);
      else this.#children.set(parent, [message]);
    }
    for (const siblings of this.#children.values()) siblings.sort((a, b) => a.created_at - b.created_at);
  }

  get messages(): Message[] {
    return [...this.#byId.values()];
  }

  get(id: string | null): Message | undefined {
    return id === null ? undefined : this.#byId.get(id);
  }

  /** The tree with this message added, or in the place of the one with its id. */
  with(message: Message): Tree {
    return new Tree(new Map(this.#byId).set(message.id, message).values());
  }

  /** The messages from the root to `leaf`; of an unknown leaf, those of the newest branch. */
  branch(leaf: string | null): Message[] {
    const branch: Message[] = [];
    const seen = new Set<string>();
    let message = this.get(leaf) ?? this.get(this.leafUnder(null));
    while (message !== undefined && !seen.has(message.id)) {
      seen.add(message.id);
      branch.push(message);
      message = this.get(message.parent);
    }
    return branch.reverse();
  }

  /** The versions of a message, oldest first: what stands in its place on other branches, and itself. */
  versions(id: string): Message[] {
    const message = this.get(id);
    if (message === undefined) return [];
    const parent = this.get(message.parent)?.id ?? null;
    return (this.#children.get(parent) ?? []).filter(
      // An answer that failed before its first word is no version; but what is shown must be found.
      (other) => other.role === message.role && (other.id === id || !isEmptyFailure(other)),
    );
  }

  /** The end of the newest branch through this message (null: of all). */
  leafUnder(id: string | null): string | null {
    const seen = new Set<string | null>();
    for (let leaf = id; !seen.has(leaf); ) {
      seen.add(leaf);
      const newest = this.#children.get(leaf)?.at(-1);
      if (newest === undefined) return leaf;
      leaf = newest.id;
    }
    return id;
  }
}

function isEmptyFailure(message: Message): boolean {
  return message.role === "assistant" && message.content === "" && message.state !== "answering" && message.state !== "complete";
}

/**
 * A branch as the model is told it.
 *
 * A question that got no answer would only confuse the model, so it is left out, unless it is the last.
 *
 * @param leftOut How many of the oldest questions and their answers are left out to make room.
 */
export function promptOf(branch: readonly Message[], system: string | null | undefined, leftOut = 0): PromptMessage[] {
  const turns: PromptMessage[][] = [];
  const questions = branch.filter((message) => message.role === "user");
  const first = questions[Math.min(leftOut, questions.length - 1)];
  const told = first === undefined ? [] : branch.slice(branch.indexOf(first));
  told.forEach(({ role, content }, index) => {
    if (role === "user") turns.push([{ role, content }]);
    else if (content !== "") turns.at(-1)?.push({ role, content });
    else if (index < told.length - 1) turns.pop();
  });
  const prompt = turns.filter((turn, index) => turn.length > 1 || index === turns.length - 1).flat();
  return system ? [{ role: "system", content: system }, ...prompt] : prompt;
}
