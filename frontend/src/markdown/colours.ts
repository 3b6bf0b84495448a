/** Colours for code. The library comes with the first code block that names its language. */

import type { HLJSApi } from "highlight.js";

let library: HLJSApi | null = null;
let loading: Promise<void> | null = null;
/** Colouring more than this would be felt. */
const LONGEST = 50_000;

/** Colour this code, whose text stays the same. */
export function colour(code: HTMLElement, language: string): void {
  if (language === "" || (code.textContent ?? "").length > LONGEST) return;
  if (library === null) {
    loading ??= import("./languages").then((module) => void (library = module.default));
    loading.then(() => code.isConnected && colour(code, language)).catch(() => (loading = null));
    return;
  }
  if (!library.getLanguage(language)) return;
  const { value } = library.highlight(code.textContent ?? "", { language, ignoreIllegals: true });
  // The library escapes the code: what it adds is spans with classes.
  code.innerHTML = value;
}
