/** When something that failed is tried again: soon at first, then rarer, and at once when there is reason to hope. */

const FIRST_SECONDS = 0.5;
const LONGEST_SECONDS = 5;

/** Seconds until the next attempt, after so many failures in a row; at random, so that not all pages come at once. */
export function backOff(failures: number): number {
  const longest = Math.min(FIRST_SECONDS * 2 ** (failures - 1), LONGEST_SECONDS);
  return longest * (0.5 + Math.random() / 2);
}

/** Waits that can be cut short. */
export class Pauses {
  readonly #ends = new Set<() => void>();

  wait(seconds: number): Promise<void> {
    return new Promise((resolve) => {
      const end = () => {
        clearTimeout(timer);
        this.#ends.delete(end);
        resolve();
      };
      const timer = setTimeout(end, seconds * 1000);
      this.#ends.add(end);
    });
  }

  /** End those that are waited for now. */
  end(): void {
    for (const end of [...this.#ends]) end();
  }
}
