/** The languages that are coloured: the library's common ones. */

export { default } from "highlight.js/lib/common";
