import { expect, test } from "vitest";

import { GrowingMarkdown } from "../src/markdown/blocks";
import { firstStep, isAllDrawn, nextStep, pieceBegins } from "../src/markdown/drawn";
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

test("a long list that grows line by line ends as if it had come at once", () => {
  const ordered = Array.from({ length: 170 }, (_, index) => `${index + 3}. item\n     - nested\n`).join("");
  const document = `${ordered}\nEnd\n\n${"* x\n\n  y\n".repeat(110)}`;
  const growing = new GrowingMarkdown();
  for (let end = 0; end >= 0; end = document.indexOf("\n", end + 1)) growing.read(document.slice(0, end), true);
  const blocks = growing.read(document, false);
  expect(blocks).toEqual(new GrowingMarkdown().read(document, false));
  expect(blocks).toHaveLength(8);
});

test.each(["## Next\n", "```\ncode\n```\n", "1. other\n"])("what follows a long list at once is read once: %j", (next) => {
  const document = `${"- item\n".repeat(60)}${next}\nThird.\n\nFourth.\n\nFifth.\n\nSixth.`;
  const growing = new GrowingMarkdown();
  growing.read(document, true);
  expect(growing.read(document, false)).toEqual(new GrowingMarkdown().read(document, false));
  expect(growing.read(document, false).slice(-3).map(({ source }) => source)).toEqual(["Fourth.", "Fifth.", "Sixth."]);
});

test.each(Array.from({ length: 60 }, (_, seed) => seed))("any text that grows in any steps is read once: %d", (seed) => {
  const random = randomNumbers(seed);
  const document = randomDocument(random);
  const growing = new GrowingMarkdown();
  for (let end = 0; end < document.length; end += 1 + random([50, 5000][random(2)]!)) {
    const text = document.slice(0, end);
    expect(letters(growing.read(text, false).map(({ source }) => source).join(""))).toBe(letters(text));
  }
  expect(growing.read(document, false)).toEqual(new GrowingMarkdown().read(document, false));
});

/** Whole numbers below `limit`, the same for the same seed: a linear congruential generator. */
function randomNumbers(seed: number): (limit: number) => number {
  let state = seed * 0x9e3779b1;
  return (limit) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * limit);
  };
}

/** Blocks of each kind, with and without an empty line between them. */
function randomDocument(random: (limit: number) => number): string {
  const lines = (count: number, line: (index: number) => string) => Array.from({ length: count }, (_, index) => line(index)).join("\n");
  const length = () => (random(3) === 0 ? 1 + random(5) : 45 + random(70));
  const paragraph = () => lines(1 + random(3), (index) => `Sentence ${index}.`);
  const kinds = [
    () => lines(length(), (index) => `- item ${index}.`),
    () => lines(length(), (index) => `${index + 1}. item ${index}.${index % 7 === 0 ? "\n   - nested" : ""}`),
    () => lines(length(), (index) => `* [ ] loose ${index}.\n`),
    () => `${"#".repeat(1 + random(4))} Heading`,
    () => `\`\`\`js\n${lines(random(5), (index) => `const a = ${index};\n`)}\n\`\`\``,
    () => `| a | b |\n| - | - |\n${lines(1 + random(5), (index) => `| ${index} | x |`)}`,
    paragraph,
    () => "> quoted",
    () => "$$\nx\n$$",
    () => "---",
  ];
  const some = () => kinds[random(kinds.length)]!() + "\n".repeat(1 + random(2));
  return Array.from({ length: 10 }, () => `${some()}${some()}\n${paragraph()}\n\n${paragraph()}\n\n`).join("");
}

const letters = (text: string) => text.replace(/\s/g, "");

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
  const paragraph = "some **words**\n".repeat(1000);
  expect(growing.read(`${paragraph}and **open`, true)).toMatchObject([{ isRaw: true, source: `${paragraph}and **open` }]);
  expect(growing.read(`${paragraph}and **open** ones`, false)).toMatchObject([{ isRaw: false }]);
});

test("a long list is several blocks, of which only the last ones are read again", () => {
  const growing = new GrowingMarkdown();
  const list = Array.from({ length: 1000 }, (_, index) => `${index + 1}. an **item**\n`).join("");
  const before = growing.read(`Text\n\n${list}1001. an **open`, true);
  expect(before).toHaveLength(22);
  expect(before.map(({ isContinued }) => isContinued)).toEqual([false, false, ...Array(20).fill(true)]);
  expect(before.at(-1)).toMatchObject({ isRaw: false, source: "1001. an **open**" });
  const after = growing.read(`Text\n\n${list}1001. an **open** one\n\nEnd`, false);
  expect(after.slice(0, 20).every((block, index) => block === before[index])).toBe(true);
  expect(after.map(({ isContinued }) => isContinued)).toEqual([false, false, ...Array(20).fill(true), false]);
});

test("a long table is drawn in steps, with its head in each", () => {
  const head = "| a | b |\n| - | - |";
  const rows = Array.from({ length: 250 }, (_, index) => `| ${index} | x |`);
  const [table] = new GrowingMarkdown().read([head, ...rows].join("\n"), false);
  const steps = [table!.source, ...table!.moreRows].map((source) => source.split("\n"));
  expect(steps.map((lines) => lines.length)).toEqual([102, 102, 52]);
  expect(steps.every((lines) => lines.slice(0, 2).join("\n") === head)).toBe(true);
  expect(steps.flatMap((lines) => lines.slice(2))).toEqual(rows);
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

const paragraphs = (count: number) => new GrowingMarkdown().read("Ten letters.\n\n".repeat(count), false);

test.each([1, 40, 500])("a long answer of %d blocks is drawn from its end in whole pieces, until all of it is there", (count) => {
  const blocks = paragraphs(count);
  let drawn = firstStep(blocks, 1000, true);
  expect(drawn.end).toBe(count);
  const begins = [drawn.begin];
  while (!isAllDrawn(blocks, drawn)) begins.push((drawn = nextStep(blocks, drawn, 1000)).begin);
  expect(begins.at(-1)).toBe(0);
  begins.forEach((begin, index) => {
    expect(pieceBegins(blocks)).toContain(begin);
    expect((begins[index - 1] ?? count) - begin).toBeLessThan(1000 / "Ten letters.".length + 32 + 1);
  });
});

test("pieces are bounded by blocks and by characters, and stay where they are when more comes", () => {
  expect(pieceBegins(paragraphs(100))).toEqual([0, 32, 64, 96]);
  const long = new GrowingMarkdown().read(`${"x".repeat(1500)}\n\n`.repeat(5), false);
  expect(pieceBegins(long)).toEqual([0, 2, 4]);
  expect(pieceBegins(long.slice(0, 3))).toEqual([0, 2]);
});

test("what comes while an answer is drawn goes before what is above", () => {
  const drawn = firstStep(paragraphs(500), 1000, true);
  const longer = paragraphs(600);
  const next = nextStep(longer, drawn, 600);
  expect(next.begin).toBe(drawn.begin);
  expect(next.end).toBe(550);
});

test("an answer that is read from its beginning is drawn from there", () => {
  expect(firstStep(paragraphs(500), 1200, false)).toEqual({ begin: 0, end: 100 });
});

test("however much is behind, it is made up for in some steps", () => {
  const blocks = paragraphs(10_000);
  let drawn = firstStep(blocks, 500, false);
  let steps = 0;
  for (; !isAllDrawn(blocks, drawn); steps++) drawn = nextStep(blocks, drawn, 500);
  expect(steps).toBeLessThan(120);
});
