/** An answer's Markdown on the page. While it grows, only its last blocks are drawn again; a long one comes in steps. */

import { signal } from "@preact/signals";
import { Component, createRef } from "preact";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";

import type { Block } from "../markdown/blocks";
import { firstStep, isAllDrawn, nextStep, pieceBegins } from "../markdown/drawn";
import type { Drawn } from "../markdown/drawn";
import { texts } from "../texts";
import { holdPlace, inFrame, stepSize } from "./frames";

const library = signal<typeof import("../markdown/library") | null>(null);
let loading: Promise<void> | null = null;

/** Load what reads Markdown; until it is there, answers are shown as they are written. */
export function loadMarkdown(): void {
  loading ??= import("../markdown/library")
    .then((module) => void (library.value = module))
    .catch(() => void (loading = null));
}

interface Properties {
  text: string;
  isGrowing: boolean;
  /** Readers see its end first. */
  isReadFromEnd: boolean;
}

export function Markdown({ text, isGrowing, isReadFromEnd }: Properties) {
  loadMarkdown();
  const loaded = library.value;
  const growing = useMemo(() => loaded && new loaded.GrowingMarkdown(), [loaded]);
  const blocks = useMemo(() => growing?.read(text, isGrowing), [growing, text, isGrowing]);
  if (!blocks) return <div class="prose raw">{text}</div>;
  return <Blocks blocks={blocks} isReadFromEnd={isReadFromEnd} />;
}

interface BlocksProperties {
  blocks: Block[];
  isReadFromEnd: boolean;
}

class Blocks extends Component<BlocksProperties> {
  readonly #element = createRef<HTMLDivElement>();
  #drawn: Drawn | null = null;
  /** How many blocks there were, and where what is drawn began, when it was drawn last. */
  #known = 0;
  #began = 0;
  #takeBack: (() => void) | null = null;

  override componentDidMount(): void {
    this.#goOn();
  }

  override getSnapshotBeforeUpdate(): (() => void) | null {
    const element = this.#element.current!;
    return this.#drawn!.begin < this.#began ? holdPlace(element, element.getBoundingClientRect().top) : null;
  }

  override componentDidUpdate(_properties: BlocksProperties, _state: unknown, restorePlace: (() => void) | null): void {
    restorePlace?.();
    this.#goOn();
  }

  override componentWillUnmount(): void {
    this.#takeBack?.();
  }

  override render({ blocks, isReadFromEnd }: BlocksProperties) {
    const { begin, end } = (this.#drawn = this.#drawnOf(blocks, isReadFromEnd));
    this.#known = blocks.length;
    const drawn = blocks.slice(0, end);
    const begins = pieceBegins(drawn);
    return (
      <div class="prose" ref={this.#element}>
        {begins.map((first, index) => first >= begin && <Piece key={first} isFirst={first === 0} blocks={drawn.slice(first, begins[index + 1])} />)}
      </div>
    );
  }

  /** New blocks are drawn at once, unless others are still waited for. */
  #drawnOf(blocks: Block[], isReadFromEnd: boolean): Drawn {
    const drawn = this.#drawn;
    if (drawn === null) return firstStep(blocks, 2 * stepSize(), isReadFromEnd);
    return drawn.end >= this.#known && drawn.end < blocks.length ? nextStep(blocks, drawn, stepSize()) : drawn;
  }

  #goOn(): void {
    this.#began = this.#drawn!.begin;
    if (this.#takeBack !== null || isAllDrawn(this.props.blocks, this.#drawn!)) return;
    this.#takeBack = inFrame((size) => {
      this.#takeBack = null;
      this.#drawn = nextStep(this.props.blocks, this.#drawn!, size);
      this.forceUpdate();
    });
  }
}

interface PieceProperties {
  blocks: Block[];
  isFirst: boolean;
}

/** Blocks that are drawn again only when one of them is another. */
class Piece extends Component<PieceProperties> {
  override shouldComponentUpdate({ blocks }: PieceProperties): boolean {
    const shown = this.props.blocks;
    return blocks.length !== shown.length || blocks.some((block, index) => block !== shown[index]);
  }

  override render({ blocks, isFirst }: PieceProperties) {
    return (
      <div class={isFirst ? "piece first" : "piece"}>
        {blocks.map((block, index) =>
          block.kind === "code" ? (
            <Code key={index} code={block.code} language={block.language} isGrowing={block.isGrowing} />
          ) : (
            <Text key={index} block={block} />
          ),
        )}
      </div>
    );
  }
}

function Text({ block: { source, moreRows, isGrowing, isRaw, isContinued } }: { block: Block }) {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const place = element.current!;
    if (isRaw) return void (place.textContent = source);
    place.replaceChildren(library.value!.render(source));
    library.value!.setFormulas(place);
    if (!isGrowing) library.value!.colourAll(place);
    return addRows(place, moreRows);
  }, [source, moreRows.join("\n"), isGrowing, isRaw]);
  const name = `block ${isContinued ? "continued" : ""} ${isRaw ? "raw" : ""} ${isGrowing ? "growing" : ""}`;
  return <div class={name} dir="auto" ref={element} />;
}

/** Add rows to the table, each of the `steps` in a frame to come. Gives what ends that. */
function addRows(place: HTMLElement, steps: string[]): () => void {
  let count = 0;
  let takeBack: () => void = () => undefined;
  const addNext = () => {
    if (count < steps.length) takeBack = inFrame(add);
  };
  const add = () => {
    const body = place.querySelector("tbody");
    if (body === null) return;
    const rows = library.value!.render(steps[count++]!).querySelectorAll("tbody > tr");
    const restorePlace = holdPlace(place, place.getBoundingClientRect().bottom);
    body.append(...rows);
    library.value!.setFormulas(place);
    restorePlace();
    addNext();
  };
  addNext();
  return () => takeBack();
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
