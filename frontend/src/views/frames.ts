/**
 * Drawing in steps, so that the page never stands still: one step in a frame, as large as this machine can take.
 * A page that nobody sees has no frames, and goes on with them when it is seen.
 */

/** Characters of Markdown. */
const SMALLEST_STEP = 500;
const LARGEST_STEP = 8000;
/** A frame that took longer was too full; in one that took less there is room for more. */
const LONG_MILLISECONDS = 40;
const SHORT_MILLISECONDS = 20;

type Step = (size: number) => void;

let size = 2000;
const waiting: Step[] = [];
let isAsked = false;

/** How much may be drawn at once, in characters. */
export function stepSize(): number {
  return size;
}

/** Draw in a frame to come; of several steps the newest comes first. Gives what takes it back. */
export function inFrame(step: Step): () => void {
  waiting.push(step);
  ask();
  return () => {
    const index = waiting.indexOf(step);
    if (index >= 0) waiting.splice(index, 1);
  };
}

function ask(): void {
  if (isAsked) return;
  isAsked = true;
  requestAnimationFrame(() => {
    isAsked = false;
    const step = waiting.pop();
    if (step === undefined) return;
    const begin = performance.now();
    setTimeout(() => adapt(performance.now() - begin)); // after the frame
    if (waiting.length > 0) ask();
    step(size);
  });
}

function adapt(milliseconds: number): void {
  if (milliseconds > LONG_MILLISECONDS) size = Math.max(SMALLEST_STEP, size / 2);
  else if (milliseconds < SHORT_MILLISECONDS) size = Math.min(LARGEST_STEP, size * 1.25);
}

/**
 * Remember what is seen, before the page changes at this height of the window. What is given back is called after
 * that: if the change is above what is seen, it is brought back to its place.
 */
export function holdPlace(element: Element, height: number): () => void {
  const area = element.closest(".scroll-area");
  if (area === null || height >= area.getBoundingClientRect().top) return () => undefined;
  const below = area.scrollHeight - area.scrollTop;
  return () => void (area.scrollTop = area.scrollHeight - below);
}
