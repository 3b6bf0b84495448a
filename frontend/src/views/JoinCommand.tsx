/** How a machine joins the swarm of the chosen model, where the server tells it. */

import { useEffect, useState } from "preact/hooks";

import { copyText } from "../clipboard";
import { app } from "../page";
import { fetchSwarm } from "../state/swarm";
import { texts } from "../texts";

export function JoinCommand({ intro }: { intro: string }) {
  const [command, setCommand] = useState<string | null>(null);
  const key = app.model.value?.key;
  useEffect(() => {
    fetchSwarm([])
      .then(({ model_reports }) => setCommand(model_reports.find((report) => report.key === key)?.join_command ?? null))
      .catch(() => undefined);
  }, [key]);
  return command === null ? null : <Command intro={intro} command={command} />;
}

export function Command({ intro, command }: { intro: string; command: string }) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    if (await copyText(command)) setCopied(true);
    else app.tell(texts.chat.copyFailed);
  };
  return (
    <div class="join">
      <p class="small">{intro}</p>
      <div class="code" dir="ltr">
        <div class="code-head">
          <span>shell</span>
          <button type="button" class="bare" onClick={() => void copy()}>
            {isCopied ? texts.chat.copied : texts.swarm.copy}
          </button>
        </div>
        <pre tabIndex={0}>
          <code>{command}</code>
        </pre>
      </div>
    </div>
  );
}
