/** Small things that this browser remembers. It may refuse to: then they are forgotten with the page. */

import { signal } from "@preact/signals";

const PREFIX = "petals-chat.";

export function preference<T extends string>(name: string, initial: T, allowed?: readonly T[]) {
  let stored: string | null = null;
  try {
    stored = localStorage.getItem(PREFIX + name);
  } catch {
    // storage is closed to this page
  }
  const isAllowed = stored !== null && (allowed === undefined || (allowed as readonly string[]).includes(stored));
  const value = signal<T>(isAllowed ? (stored as T) : initial);
  value.subscribe((current) => {
    try {
      localStorage.setItem(PREFIX + name, current);
    } catch {
      // as above
    }
  });
  return value;
}
