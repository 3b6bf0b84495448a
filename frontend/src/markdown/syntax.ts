/**
 * The Markdown that is read: GitHub's, and formulas between $…$, $$…$$, \(…\) and \[…\].
 *
 * HTML in it is shown as it is written, never as HTML; pictures are links, since they would be requests to others.
 */

import { Marked, type TokenizerAndRendererExtension, type Tokens } from "marked";

import { texts } from "../texts";

const INLINE = [/^\\\(([\s\S]+?)\\\)/, /^\$(?![\s$])((?:\\[\s\S]|[^\\$\n])+?)(?<!\s)\$(?![\d$])/];
const DISPLAY = [/^\\\[([\s\S]+?)\\\]/, /^\$\$([\s\S]+?)\$\$/];
const BLOCK = [/^ {0,3}\\\[([\s\S]+?)\\\][ \t]*(?:\n|$)/, /^ {0,3}\$\$([\s\S]+?)\$\$[ \t]*(?:\n|$)/];

function formula(name: string, level: "block" | "inline", rules: RegExp[], isDisplay: boolean): TokenizerAndRendererExtension {
  return {
    name,
    level,
    start: (source) => startOf(source, level),
    tokenizer(source) {
      const match = rules.map((rule) => rule.exec(source)).find((found) => found !== null);
      return match ? { type: name, raw: match[0], text: match[1]!.trim() } : undefined;
    },
    renderer({ text }) {
      const tag = isDisplay && level === "block" ? "div" : "span";
      return `<${tag} class="math" data-math="${isDisplay ? "display" : "inline"}">${escape(text as string)}</${tag}>`;
    },
  };
}

/** Where a formula may begin; one that is a block begins a line. */
function startOf(source: string, level: "block" | "inline"): number | undefined {
  if (level === "inline") return /\$|\\[([]/.exec(source)?.index;
  const match = /\n {0,3}(?:\$\$|\\\[)/.exec(source);
  return match === null ? undefined : match.index + 1;
}

export const markdown = new Marked({
  gfm: true,
  breaks: false,
  extensions: [
    formula("mathBlock", "block", BLOCK, true),
    formula("mathDisplay", "inline", DISPLAY, true),
    formula("math", "inline", INLINE, false),
  ],
  renderer: {
    html: (token: Tokens.HTML | Tokens.Tag) =>
      token.block ? `<p class="raw">${escape(token.text.trim())}</p>` : escape(token.text),
    image: ({ href, text }: Tokens.Image) => `<a href="${escape(href)}">${escape(text || texts.chat.picture)}</a>`,
    code: ({ text, lang }: Tokens.Code) => codeBlock(text, languageOf(lang)),
    table(table) {
      const row = (cells: Tokens.TableCell[]) => `<tr>${cells.map((cell) => this.tablecell(cell)).join("")}</tr>`;
      const body = table.rows.map(row).join("");
      return `<div class="table" tabindex="0" role="group" aria-label="${escape(texts.chat.table)}"><table><thead>${row(table.header)}</thead><tbody>${body}</tbody></table></div>`;
    },
  },
});

/** The markup of a code block within other blocks; at the top level it is a component of its own. */
function codeBlock(text: string, language: string): string {
  const name = language || texts.chat.plainText;
  return (
    `<div class="code"><div class="code-head"><span>${escape(name)}</span>` +
    `<button type="button" class="bare" data-copy="">${escape(texts.chat.copyCode)}</button></div>` +
    `<pre tabindex="0"><code data-language="${escape(language)}">${escape(text)}</code></pre></div>`
  );
}

/** The name after the fence, as far as it is one. */
export function languageOf(info: string | undefined): string {
  return /^[\w+#.-]{1,30}/.exec(info ?? "")?.[0].toLowerCase() ?? "";
}

function escape(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}
