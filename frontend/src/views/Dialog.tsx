/** A sheet over the page. The browser keeps the focus in it and gives it back. */

import type { ComponentChildren } from "preact";
import { useId, useLayoutEffect, useRef } from "preact/hooks";

import { app } from "../page";
import { texts } from "../texts";
import { Icon } from "./icons";

interface Properties {
  title: string;
  children: ComponentChildren;
  class?: string;
}

export function Dialog({ title, children, class: name = "" }: Properties) {
  const element = useRef<HTMLDialogElement>(null);
  const id = useId();
  useLayoutEffect(() => {
    const dialog = element.current!;
    dialog.showModal();
    return () => dialog.close();
  }, []);
  return (
    <dialog
      ref={element}
      class={`sheet ${name}`}
      aria-labelledby={id}
      onCancel={closeSheet} // Escape; the close event that follows comes a moment too late for the next key
      onClose={closeSheet}
      onClick={(event) => event.target === event.currentTarget && closeSheet()}
    >
      <div class="sheet-body">
        <div class="sheet-head">
          <h2 id={id}>{title}</h2>
          <button type="button" class="icon-button" aria-label={texts.close} onClick={closeSheet}>
            <Icon name="close" />
          </button>
        </div>
        {children}
      </div>
    </dialog>
  );
}

export function closeSheet(): void {
  app.sheet.value = null;
}
