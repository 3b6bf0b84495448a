/** All that shows Markdown, as one part of the page that is loaded when it is needed. */

import { colour } from "./colours";

export { GrowingMarkdown } from "./blocks";
export { setFormulas } from "./formulas";
export { render } from "./render";
export { colour };

/** Colour the code blocks within `root`. */
export function colourAll(root: Element): void {
  for (const code of root.querySelectorAll<HTMLElement>("code[data-language]")) {
    colour(code, code.dataset["language"] ?? "");
  }
}
