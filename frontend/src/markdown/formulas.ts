/** Formulas as MathML, which browsers lay out themselves: no fonts to load, no inline styles. The library comes with the first formula. */

import { renderMath } from "./render";

type Library = typeof import("katex").default;

let library: Library | null = null;
let loading: Promise<void> | null = null;
const LONGEST = 5000;

/** Set the formulas within `root`; those that cannot be read stay as they are written. */
export function setFormulas(root: Element): void {
  const places = root.querySelectorAll<HTMLElement>("[data-math]:not([data-set])");
  if (places.length === 0) return;
  if (library !== null) {
    for (const place of places) set(place, library);
    return;
  }
  loading ??= import("katex").then((module) => void (library = module.default));
  loading.then(() => setFormulas(root)).catch(() => (loading = null));
}

function set(place: HTMLElement, katex: Library): void {
  const source = place.textContent ?? "";
  place.dataset["set"] = "";
  if (source.length > LONGEST) return;
  try {
    const displayMode = place.dataset["math"] === "display";
    const mathml = katex.renderToString(source, { output: "mathml", displayMode, throwOnError: true, trust: false, strict: "ignore", maxExpand: 200, maxSize: 20 });
    place.replaceChildren(renderMath(mathml));
  } catch {
    place.classList.add("unset");
  }
}
