/** An answer's Markdown on the page. While it grows, only its last blocks are drawn again. */

import { signal } from "@preact/signals";
import { Component } from "preact";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";

import type { Block } from "../markdown/blocks";
import { texts } from "../texts";

/** So many blocks are drawn and laid out together: what has settled costs the later ones nothing. */
const BLOCKS_IN_PIECE = 32;

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
      {piecesOf(blocks).map((piece, index) => (
        <Piece key={index} blocks={piece} />
      ))}
    </div>
  );
}

function piecesOf(blocks: Block[]): Block[][] {
  const count = Math.ceil(blocks.length / BLOCKS_IN_PIECE);
  return Array.from({ length: count }, (_, index) => blocks.slice(index * BLOCKS_IN_PIECE, (index + 1) * BLOCKS_IN_PIECE));
}

/** Blocks that are drawn again only when one of them is another. */
class Piece extends Component<{ blocks: Block[] }> {
  override shouldComponentUpdate({ blocks }: { blocks: Block[] }): boolean {
    const shown = this.props.blocks;
    return blocks.length !== shown.length || blocks.some((block, index) => block !== shown[index]);
  }

  override render({ blocks }: { blocks: Block[] }) {
    return (
      <div class="piece">
        {blocks.map((block, index) =>
          block.kind === "code" ? (
            <Code key={index} code={block.code} language={block.language} isGrowing={block.isGrowing} />
          ) : (
            <Text key={index} source={block.source} isGrowing={block.isGrowing} isRaw={block.isRaw} />
          ),
        )}
      </div>
    );
  }
}

function Text({ source, isGrowing, isRaw }: Pick<Block, "source" | "isGrowing" | "isRaw">) {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const block = element.current!;
    if (isRaw) return void (block.textContent = source);
    block.replaceChildren(library.value!.render(source));
    library.value!.setFormulas(block);
    if (!isGrowing) library.value!.colourAll(block);
  }, [source, isGrowing, isRaw]);
  return <div class={`block ${isRaw ? "raw" : ""} ${isGrowing ? "growing" : ""}`} dir="auto" ref={element} />;
}

function Code({ code, language, isGrowing }: Pick<Block, "code" | "language" | "isGrowing">) {
  const element = useRef<HTMLElement>(null);
  useLayoutEffect(() => {
    element.current!.textContent = code;
    if (!isGrowing) library.value!.colour(element.current!, language);
  }, [code, language, isGrowing]);
  return (
    <div class={`code ${isGrowing ? "growing" : ""}`} dir="ltr">
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
