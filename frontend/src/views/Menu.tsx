/** A button that opens a list of actions. */

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

import { Icon } from "./icons";

export interface Action {
  text: string;
  run: () => void;
  isDangerous?: boolean;
}

const MARGIN = 8;

export function Menu({ label, actions, class: name = "" }: { label: string; actions: () => Action[]; class?: string }) {
  const [isOpen, setOpen] = useState(false);
  const button = useRef<HTMLButtonElement>(null);
  const close = (focus: boolean) => {
    setOpen(false);
    if (focus) button.current?.focus();
  };
  return (
    <>
      <button
        ref={button}
        type="button"
        class={`icon-button ${name}`}
        aria-label={label}
        aria-haspopup="menu"
        aria-expanded={isOpen}
        onClick={() => setOpen(!isOpen)}
      >
        <Icon name="more" />
      </button>
      {isOpen && <Items label={label} actions={actions()} anchor={button.current!} close={close} />}
    </>
  );
}

interface ItemsProperties {
  label: string;
  actions: Action[];
  anchor: HTMLElement;
  close: (focus: boolean) => void;
}

function Items({ label, actions, anchor, close }: ItemsProperties) {
  const list = useRef<HTMLUListElement>(null);
  useLayoutEffect(() => {
    const menu = list.current!;
    // On top of everything, whatever clips the place where it is written.
    menu.showPopover?.();
    place(menu, anchor);
    menu.querySelector("button")?.focus();
  }, []);
  useEffect(() => {
    const leave = (event: Event) => {
      const target = event.target as Node;
      if (!list.current?.contains(target) && !anchor.contains(target)) close(false);
    };
    document.addEventListener("pointerdown", leave);
    document.addEventListener("scroll", leave, true);
    return () => {
      document.removeEventListener("pointerdown", leave);
      document.removeEventListener("scroll", leave, true);
    };
  }, []);
  const move = (event: KeyboardEvent) => {
    const items = [...list.current!.querySelectorAll("button")];
    const index = items.indexOf(document.activeElement as HTMLButtonElement);
    const targets: Record<string, number> = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: -1 };
    if (event.key === "Escape" || event.key === "Tab") {
      event.stopPropagation();
      event.preventDefault();
      close(true);
    } else if (event.key in targets) {
      event.preventDefault();
      items.at(targets[event.key]! % items.length)?.focus();
    }
  };
  return (
    <ul ref={list} class="menu" role="menu" aria-label={label} popover="manual" onKeyDown={move}>
      {actions.map(({ text, run, isDangerous }) => (
        <li key={text} role="none">
          <button
            type="button"
            role="menuitem"
            class={isDangerous ? "dangerous" : ""}
            tabIndex={-1}
            onClick={() => {
              close(true);
              run();
            }}
          >
            {text}
          </button>
        </li>
      ))}
    </ul>
  );
}

/** Below the anchor, or above it where there is no room. */
function place(menu: HTMLElement, anchor: HTMLElement): void {
  const at = anchor.getBoundingClientRect();
  const { offsetWidth, offsetHeight } = menu;
  const left = Math.max(MARGIN, Math.min(at.right - offsetWidth, innerWidth - offsetWidth - MARGIN));
  const fitsBelow = at.bottom + offsetHeight + MARGIN <= innerHeight;
  menu.style.left = `${left}px`;
  menu.style.top = `${Math.max(MARGIN, fitsBelow ? at.bottom + 4 : at.top - offsetHeight - 4)}px`;
}
