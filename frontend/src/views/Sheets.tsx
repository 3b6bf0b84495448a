/** The sheet that is open, if one is. */

import { useRef, useState } from "preact/hooks";

import { copyText } from "../clipboard";
import type { Chat } from "../contract";
import { app } from "../page";
import { hashOf } from "../state/routes";
import { texts } from "../texts";
import { closeSheet, Dialog } from "./Dialog";
import { ModelSheet } from "./ModelSheet";
import { SettingsSheet } from "./SettingsSheet";

export function Sheets() {
  const sheet = app.sheet.value;
  switch (sheet?.kind) {
    case "model":
      return <ModelSheet />;
    case "settings":
      return <SettingsSheet />;
    case "help":
      return <Help />;
    case "rename":
      return <Rename chat={sheet.chat} />;
    case "remove":
      return <Remove chat={sheet.chat} />;
    case "removeAll":
      return <RemoveAll />;
    case "share":
      return <Share chat={sheet.chat} />;
    default:
      return null;
  }
}

function Help() {
  return (
    <Dialog title={texts.help.title}>
      <dl class="keys">
        {texts.help.keys.map(([keys, meaning]) => (
          <div key={keys}>
            <dt>
              <kbd>{keys}</kbd>
            </dt>
            <dd>{meaning}</dd>
          </div>
        ))}
      </dl>
      <p class="small muted">{texts.help.mac}</p>
      <p class="small muted">{texts.help.about}</p>
      <p class="small">
        <a href="./docs" target="_blank" rel="noopener">
          {texts.help.documentation}
        </a>
      </p>
    </Dialog>
  );
}

function Rename({ chat }: { chat: Chat }) {
  const field = useRef<HTMLInputElement>(null);
  const save = (event: Event) => {
    event.preventDefault();
    const title = field.current!.value.trim();
    if (title !== "" && title !== chat.title) void app.changeChat(chat, { title });
    closeSheet();
  };
  return (
    <Dialog title={texts.rename.title}>
      <form onSubmit={save}>
        <label class="field">
          <span>{texts.rename.label}</span>
          <input ref={field} dir="auto" maxLength={200} defaultValue={chat.title} autofocus />
        </label>
        <div class="sheet-buttons">
          <button type="button" class="quiet" onClick={closeSheet}>
            {texts.cancel}
          </button>
          <button type="submit" class="primary">
            {texts.save}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function Remove({ chat }: { chat: Chat }) {
  const { title, body, confirm } = texts.remove;
  return <Confirm title={title} body={body(chat.title || texts.sidebar.untitled)} confirm={confirm} run={() => app.deleteChat(chat)} />;
}

function RemoveAll() {
  const { allTitle, allBody, allConfirm } = texts.remove;
  return <Confirm title={allTitle} body={allBody} confirm={allConfirm} run={() => app.deleteAll()} />;
}

function Confirm({ title, body, confirm, run }: { title: string; body: string; confirm: string; run: () => Promise<void> }) {
  return (
    <Dialog title={title}>
      <p>{body}</p>
      <div class="sheet-buttons">
        <button type="button" class="quiet" autofocus onClick={closeSheet}>
          {texts.cancel}
        </button>
        <button
          type="button"
          class="dangerous"
          onClick={() => {
            closeSheet();
            void run();
          }}
        >
          {confirm}
        </button>
      </div>
    </Dialog>
  );
}

function Share({ chat }: { chat: Chat }) {
  const [token, setToken] = useState(chat.shared);
  const [note, setNote] = useState("");
  const field = useRef<HTMLInputElement>(null);
  const link = token === null ? "" : new URL(hashOf({ view: "shared", token }), location.href).href;
  const share = async () => {
    const isAgain = token !== null;
    const made = await app.share(chat);
    if (made === undefined) return;
    setToken(made);
    setNote(isAgain ? texts.share.refreshed : "");
  };
  const copy = async () => {
    field.current?.select();
    setNote((await copyText(link)) ? texts.chat.copied : texts.chat.copyFailed);
  };
  const revoke = async () => {
    await app.unshare(chat);
    setToken(null);
    setNote(texts.share.revoked);
  };
  return (
    <Dialog title={texts.share.title}>
      <p class="muted">{texts.share.body}</p>
      {token !== null && (
        <label class="field">
          <span>{texts.share.link}</span>
          <input ref={field} readOnly value={link} onFocus={(event) => event.currentTarget.select()} />
        </label>
      )}
      <p class="small" role="status">
        {note}
      </p>
      <div class="sheet-buttons">
        {token === null ? (
          <button type="button" class="primary" onClick={() => void share()}>
            {texts.share.create}
          </button>
        ) : (
          <>
            <button type="button" class="quiet" onClick={() => void revoke()}>
              {texts.share.revoke}
            </button>
            <button type="button" class="quiet" onClick={() => void share()}>
              {texts.share.refresh}
            </button>
            <button type="button" class="primary" onClick={() => void copy()}>
              {texts.share.copy}
            </button>
          </>
        )}
      </div>
    </Dialog>
  );
}
