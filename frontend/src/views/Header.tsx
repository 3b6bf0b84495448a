/** The bar above the chat: the list's switch, the model, the way to a new chat. */

import { app } from "../page";
import { texts } from "../texts";
import { Icon } from "./icons";
import { isNarrow, toggleSidebar } from "./Sidebar";

export function Header() {
  const model = app.model.value;
  const { view } = app.route.value;
  const title = app.conversation.value?.chat.value.title;
  const isOpen = isNarrow.value ? app.isDrawerOpen.value : app.sidebar.value === "open";
  return (
    <header class="bar">
      <h1 class="visually-hidden">{view === "swarm" ? texts.swarm.title : title || texts.name}</h1>
      {(isNarrow.value || !isOpen) && (
        <button type="button" class="icon-button" aria-label={texts.sidebar.open} aria-expanded={isOpen} onClick={toggleSidebar}>
          <Icon name="panel" />
        </button>
      )}
      <button
        type="button"
        class="model-button"
        aria-haspopup="dialog"
        disabled={model === undefined}
        onClick={() => (app.sheet.value = { kind: "model" })}
      >
        <span class="visually-hidden">{texts.model.label}: </span>
        {model && <span class={`dot ${model.state}`} />}
        <span class="model-name">{model?.name ?? (app.models.all.value?.length === 0 ? texts.model.none : texts.model.asking)}</span>
        {model && model.state !== "ready" && <span class="muted">{texts.model.remarks[model.state]}</span>}
        <Icon name="chevron" />
      </button>
      <span class="spring" />
      {view === "chat" && app.conversation.value?.isSaved && app.history?.isOnServer && (
        <button
          type="button"
          class="icon-button wide-only"
          aria-label={texts.sidebar.share}
          onClick={() => (app.sheet.value = { kind: "share", chat: app.conversation.value!.chat.value })}
        >
          <Icon name="share" />
        </button>
      )}
      {(isNarrow.value || !isOpen) && (
        <button type="button" class="icon-button" aria-label={texts.sidebar.newChat} onClick={() => app.newChat()}>
          <Icon name="plus" />
        </button>
      )}
    </header>
  );
}
