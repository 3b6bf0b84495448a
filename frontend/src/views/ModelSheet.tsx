/** Choosing a model, by family. */

import type { Model } from "../contract";
import { app } from "../page";
import { texts } from "../texts";
import { Dialog } from "./Dialog";
import { wholeNumber } from "./numbers";

export function ModelSheet() {
  return (
    <Dialog title={texts.model.choose}>
      {app.models.families.value.map(({ family, models }) => (
        <fieldset key={family} class="models">
          <legend>{family}</legend>
          {models.map((model) => (
            <Choice key={model.key} model={model} />
          ))}
        </fieldset>
      ))}
    </Dialog>
  );
}

function Choice({ model }: { model: Model }) {
  const remarks = [
    ...(model.state === "ready" ? [] : [texts.model.remarks[model.state]]),
    texts.model.context(wholeNumber(model.max_session_length)),
    ...(model.public_api ? [] : [texts.model.notPublic]),
  ];
  return (
    <div class="model">
      <label>
        <input type="radio" name="model" value={model.key} checked={app.model.value?.key === model.key} onChange={() => app.chooseModel(model.key)} />
        <span class="model-name">
          <span class={`dot ${model.state}`} />
          {model.name}
        </span>
        <span class="small muted">{remarks.join(" · ")}</span>
      </label>
      <span class="model-links small">
        {model.model_card && <Link href={model.model_card} text={texts.model.card} name={model.name} />}
        {model.license && <Link href={model.license} text={texts.model.license} name={model.name} />}
      </span>
    </div>
  );
}

function Link({ href, text, name }: { href: string; text: string; name: string }) {
  return (
    <a href={href} target="_blank" rel="noopener">
      {text}
      <span class="visually-hidden"> ({name})</span>
    </a>
  );
}
