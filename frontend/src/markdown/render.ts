/**
 * Markdown into nodes for the page. What models write is hostile: only what stands in the lists here gets through.
 */

import DOMPurify from "dompurify";

import { markdown } from "./syntax";

const TAGS = [
  ..."a b blockquote br button code del div em h1 h2 h3 h4 h5 h6 hr i input li ol p pre s span strong sub sup".split(" "),
  ..."table tbody td th thead tr ul".split(" "),
];
const ATTRIBUTES =
  "align aria-label checked class data-copy data-language data-math disabled href role start tabindex title type".split(" ");
const ADDRESSES = /^(?:https?:|mailto:)/i;

const MATH_TAGS = [
  ..."math semantics mrow mi mo mn ms mtext mspace msup msub msubsup munder mover munderover mfrac msqrt mroot".split(" "),
  ..."mtable mtr mtd mstyle mpadded mphantom menclose mmultiscripts mprescripts none annotation span".split(" "),
];
const MATH_ATTRIBUTES = (
  "accent accentunder class columnalign columnlines columnspacing columnspan depth display displaystyle encoding fence " +
  "height linebreak linethickness lspace mathbackground mathcolor mathsize mathvariant maxsize minsize movablelimits " +
  "notation rowalign rowlines rowspacing rspace scriptlevel separator side stretchy symmetric voffset width xmlns"
).split(" ");

const purifier = DOMPurify(window);
purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  } else if (node.tagName === "INPUT") {
    // Only the boxes of task lists.
    node.setAttribute("type", "checkbox");
    node.setAttribute("disabled", "");
    node.setAttribute("aria-hidden", "true");
  }
});

/** The nodes of one block of Markdown. */
export function render(source: string): DocumentFragment {
  const html = markdown.parse(source, { async: false });
  const fragment = purifier.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOWED_URI_REGEXP: ADDRESSES,
    // All others would have to look like addresses too.
    ADD_URI_SAFE_ATTR: ATTRIBUTES.filter((name) => name !== "href"),
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  lowerHeadings(fragment);
  return fragment;
}

/** The nodes of MathML, as the formula library writes it. */
export function renderMath(mathml: string): DocumentFragment {
  return purifier.sanitize(mathml, {
    ALLOWED_TAGS: MATH_TAGS,
    ALLOWED_ATTR: MATH_ATTRIBUTES,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    HTML_INTEGRATION_POINTS: {},
    RETURN_DOM_FRAGMENT: true,
  });
}

/** An answer's headings stand below those of the page, which screen readers list. */
function lowerHeadings(fragment: DocumentFragment): void {
  for (const heading of fragment.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const level = Math.min(6, Number(heading.tagName[1]) + 2);
    const lower = document.createElement(`h${level}`);
    lower.dataset["level"] = heading.tagName[1];
    lower.append(...heading.childNodes);
    heading.replaceWith(lower);
  }
}
