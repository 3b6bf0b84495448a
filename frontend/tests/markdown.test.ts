import { expect, test } from "vitest";

import { GrowingMarkdown } from "../src/markdown/blocks";
import { languageOf, markdown } from "../src/markdown/syntax";

const DOCUMENTS = [
  "# Title\n\nSome *text* with **bold** and `code`.\n\n- one\n- two\n\n  still two\n- three\n\nEnd",
  "1. a\n2. b\n\n   ```python\n   print(1)\n   ```\n\n3. c\n\n> quote\nlazy\n\n---\n\nlast",
  "```js\nconst a = 1;\n\n# no heading\n```\n\nafter\n\n    indented\n\nafter that",
  "| a | b |\n| - | -: |\n| 1 | 2 |\n\ntext $x^2$ and $$y$$\n\n$$\n\\sum_i i\n$$\n\nSetext\n======\n\n\\[ z \\]\n",
  "<script>alert(1)</script>\n\n<b>bold</b> and [link](https://example.org) ![picture](x.png)\n\n~~~\nopen fence",
];

const html = (source: string) => markdown.parse(source, { async: false });

test.each(DOCUMENTS)("Markdown that grows letter by letter ends as if it had come at once: %j", (document) => {
  const growing = new GrowingMarkdown();
  const seen = new Map<number, string>();
  for (let length = 1; length <= document.length; length++) {
    const blocks = growing.read(document.slice(0, length), true);
    // What has settled stays: all but the last two blocks.
    blocks.slice(0, -2).forEach((block, index) => {
      expect(seen.get(index) ?? block.source).toBe(block.source);
      seen.set(index, block.source);
    });
  }
  const atOnce = new GrowingMarkdown().read(document, false);
  expect(growing.read(document, false)).toEqual(atOnce);
  seen.forEach((source, index) => expect(atOnce[index]?.source.trim()).toBe(source.trim()));
});

test("only the end of a long text is read again", () => {
  const growing = new GrowingMarkdown();
  const paragraphs = Array.from({ length: 200 }, (_, index) => `Paragraph ${index}.`).join("\n\n");
  const before = growing.read(paragraphs, true);
  const after = growing.read(`${paragraphs} More.`, true);
  expect(after).toHaveLength(200);
  // The settled blocks are the same objects: nothing draws them again.
  expect(after.slice(0, -2).every((block, index) => block === before[index])).toBe(true);
});

test.each(["\r\n", "\r"])("lines may end as they like: %j", (end) => {
  const growing = new GrowingMarkdown();
  const document = Array.from({ length: 9 }, (_, index) => `Paragraph ${index},${end}second line.`).join(end + end);
  for (let length = 1; length < document.length; length++) growing.read(document.slice(0, length), true);
  expect(growing.read(document, false)).toEqual(new GrowingMarkdown().read(document.replaceAll(end, "\n"), false));
});

test("a long block that grows is shown as it is written, until its end", () => {
  const growing = new GrowingMarkdown();
  const list = "- an **item**\n".repeat(1000);
  expect(growing.read(`${list}- an **open`, true)).toMatchObject([{ isRaw: true, source: `${list}- an **open` }]);
  expect(growing.read(`${list}- an **open** one`, false)).toMatchObject([{ isRaw: false }]);
});

test("what is open in the growing block is closed", () => {
  const [block] = new GrowingMarkdown().read("Some **bold", true);
  expect(block?.source).toBe("Some **bold**");
});

test("a code block that grows is code from its first line on", () => {
  const [block] = new GrowingMarkdown().read("```python\nprint(", true);
  expect(block).toMatchObject({ kind: "code", language: "python", code: "print(", isGrowing: true });
});

test("HTML is shown as it is written", () => {
  expect(html("<img src=x onerror=alert(1)>")).not.toContain("<img");
  expect(html("a <b onclick=x>bold</b>")).toContain("&#60;b onclick=x&#62;bold");
});

test("pictures are links", () => {
  expect(html("![a <b> picture](https://example.org/x.png)")).toBe('<p><a href="https://example.org/x.png">a &#60;b&#62; picture</a></p>\n');
});

test.each([
  ["$x^2$", "inline"],
  ["\\(x\\)", "inline"],
  ["so $$x$$ here", "display"],
  ["\\[\nx\n\\]", "display"],
  ["text\n$$\nx\n$$\n", "display"],
])("formulas are found: %j", (source, kind) => {
  expect(html(source)).toContain(`data-math="${kind}"`);
});

test.each(["It costs $5 and $6.", "$ x $", "a $ b", "`$x$`", "US$ 5 and US$ 6"])("money is no formula: %j", (source) => {
  expect(html(source)).not.toContain("data-math");
});

test("a language is a name, not markup", () => {
  expect(languageOf("Python title=x")).toBe("python");
  expect(languageOf('"><script>')).toBe("");
  expect(languageOf("c++")).toBe("c++");
  expect(languageOf(undefined)).toBe("");
});
