/** An answer's Markdown on the page. While it grows, only its last blocks are drawn again. */

import { signal } from "@preact/signals";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";

import type { Block } from "../markdown/blocks";
import { texts } from "../texts";

/** More of one growing block than this is drawn as it is written, to stay fluid. */
const LONGEST_GROWING_BLOCK = 12_000;

const library = signal<typeof import("../markdown/library") | null>(null);
let loading: Promise<void> | null = null;

/** Load what reads Markdown; until it is there, answers are shown as they are written. */
export function loadMarkdown(): void {
  loading ??= import("../markdown/library")
    .then((module) => void (library.value = module))
    .catch(() => void (loading = null));
}

export function Markdown({ text, isGrowing }: { text: string; isGrowing: boolean }) {
  loadMarkdown();
  const loaded = library.value;
  const growing = useMemo(() => loaded && new loaded.GrowingMarkdown(), [loaded]);
  const blocks = useMemo(() => growing?.read(text, isGrowing), [growing, text, isGrowing]);
  if (!blocks) return <div class="prose raw">{text}</div>;
  return (
    <div class="prose">
      {blocks.map((block, index) =>
        block.kind === "code" ? (
          <Code key={index} code={block.code} language={block.language} isGrowing={block.isGrowing} />
        ) : (
          <Text key={index} source={block.source} isGrowing={block.isGrowing} />
        ),
      )}
    </div>
  );
}

function Text({ source, isGrowing }: Pick<Block, "source" | "isGrowing">) {
  const element = useRef<HTMLDivElement>(null);
  const isRaw = isGrowing && source.length > LONGEST_GROWING_BLOCK;
  useLayoutEffect(() => {
    const block = element.current!;
    block.classList.toggle("raw", isRaw);
    if (isRaw) return void (block.textContent = source);
    block.replaceChildren(library.value!.render(source));
    library.value!.setFormulas(block);
    if (!isGrowing) library.value!.colourAll(block);
  }, [source, isGrowing, isRaw]);
  return <div class="block" dir="auto" ref={element} />;
}

function Code({ code, language, isGrowing }: Pick<Block, "code" | "language" | "isGrowing">) {
  const element = useRef<HTMLElement>(null);
  useLayoutEffect(() => {
    element.current!.textContent = code;
    if (!isGrowing) library.value!.colour(element.current!, language);
  }, [code, language, isGrowing]);
  return (
    <div class="code" dir="ltr">
      <div class="code-head">
        <span>{language || texts.chat.plainText}</span>
        <button type="button" class="bare" data-copy="">
          {texts.chat.copyCode}
        </button>
      </div>
      <pre tabIndex={0}>
        <code ref={element} />
      </pre>
    </div>
  );
}
