/** The settings of the chat: what the model is told beforehand, and how it draws its words. */

import { useId, useState } from "preact/hooks";

import type { ChatSettings, Sampling } from "../contract";
import { app } from "../page";
import { texts } from "../texts";
import { closeSheet, Dialog } from "./Dialog";

const LONGEST_SYSTEM_PROMPT = 20_000;
const NO_MODEL: Sampling = { do_sample: true, temperature: 1, top_k: 0, top_p: 1, repetition_penalty: 1 };
const SLIDERS = [
  ["temperature", texts.settings.temperature, texts.settings.temperatureHint, 0, 2, 0.05],
  ["top_p", texts.settings.topP, texts.settings.topPHint, 0, 1, 0.01],
  ["top_k", texts.settings.topK, texts.settings.topKHint, 0, 200, 1],
  ["repetition_penalty", texts.settings.repetition, texts.settings.repetitionHint, 0.5, 2, 0.05],
] as const;

export function SettingsSheet() {
  const defaults = app.model.value?.chat.generation ?? NO_MODEL;
  const [settings, setSettings] = useState<ChatSettings>(app.conversation.value?.chat.value.settings ?? {});
  const sampling = { ...defaults, ...settings };
  const isDefault = Object.keys(defaults).every((key) => settings[key as keyof Sampling] === undefined);
  const change = (changes: ChatSettings) => setSettings({ ...settings, ...changes });
  const reset = () => {
    const { system, max_new_tokens } = settings;
    setSettings({ ...(system ? { system } : {}), ...(max_new_tokens ? { max_new_tokens } : {}) });
  };
  const save = (event: Event) => {
    event.preventDefault();
    closeSheet();
    void app.changeSettings(settings);
  };
  return (
    <Dialog title={texts.settings.title}>
      {/* Values from elsewhere may lie beside a slider's range and steps, and be kept. */}
      <form noValidate onSubmit={save}>
        <p class="muted small">{texts.settings.intro}</p>
        <label class="field">
          <span>{texts.settings.system}</span>
          <small>{texts.settings.systemHint}</small>
          <textarea
            rows={4}
            dir="auto"
            maxLength={LONGEST_SYSTEM_PROMPT}
            value={settings.system ?? ""}
            onInput={(event) => change({ system: event.currentTarget.value || null })}
          />
        </label>
        <h3>{texts.settings.sampling}</h3>
        <label class="switch">
          <input type="checkbox" checked={sampling.do_sample} onChange={(event) => change({ do_sample: event.currentTarget.checked })} />
          <span>{texts.settings.doSample}</span>
          <small>{texts.settings.doSampleHint}</small>
        </label>
        {SLIDERS.map(([name, label, hint, min, max, step]) => (
          <Slider
            key={name}
            {...{ label, hint, min, max, step }}
            value={sampling[name]}
            isDisabled={!sampling.do_sample && name !== "repetition_penalty"}
            change={(value) => change({ [name]: value })}
          />
        ))}
        <label class="field inline">
          <span>{texts.settings.maxTokens}</span>
          <input
            type="number"
            min={1}
            step={1}
            value={settings.max_new_tokens ?? ""}
            onInput={(event) => {
              const { max_new_tokens: _, ...others } = settings;
              const value = Math.floor(event.currentTarget.valueAsNumber);
              setSettings(value >= 1 ? { ...others, max_new_tokens: value } : others);
            }}
          />
          <small>{texts.settings.maxTokensHint}</small>
        </label>
        <button type="button" class="bare" disabled={isDefault} onClick={reset}>
          {texts.settings.reset}
        </button>
        <Themes />
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

interface SliderProperties {
  label: string;
  hint: string;
  min: number;
  max: number;
  step: number;
  value: number;
  isDisabled: boolean;
  change: (value: number) => void;
}

function Slider({ label, hint, min, max, step, value, isDisabled, change }: SliderProperties) {
  const id = useId();
  const read = (event: { currentTarget: HTMLInputElement }) => {
    const number = event.currentTarget.valueAsNumber;
    if (Number.isFinite(number)) change(Math.min(max, Math.max(min, number)));
  };
  const shared = { min, max, step, value, disabled: isDisabled };
  return (
    <div class="field slider">
      <label for={id}>{label}</label>
      <input type="number" aria-label={label} {...shared} onChange={read} />
      <input id={id} type="range" aria-describedby={`${id}-hint`} {...shared} onInput={read} />
      <small id={`${id}-hint`}>{hint}</small>
    </div>
  );
}

function Themes() {
  return (
    <fieldset class="themes">
      <legend>{texts.settings.theme}</legend>
      {(["system", "light", "dark"] as const).map((theme) => (
        <label key={theme}>
          <input type="radio" name="theme" checked={app.theme.value === theme} onChange={() => (app.theme.value = theme)} />
          {texts.settings.themes[theme]}
        </label>
      ))}
    </fieldset>
  );
}
