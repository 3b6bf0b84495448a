/** The served models and how they are, asked for again and again. */

import { computed, signal } from "@preact/signals";

import type { Model } from "../contract";
import { request } from "../http";
import { backOff } from "../retries";
import type { Pauses } from "../retries";

const READY_POLL_SECONDS = 30;
const UNREADY_POLL_SECONDS = 3;
const REPLY_SECONDS = 15;

export class Models {
  /** Null until the server has told them. */
  readonly all = signal<Model[] | null>(null);
  readonly isUnreachable = signal(false);
  #failures = 0;
  readonly families = computed(() => {
    const models = this.all.value ?? [];
    return [...new Set(models.map((model) => model.family))].map((family) => ({
      family,
      models: models.filter((model) => model.family === family),
    }));
  });

  find(key: string): Model | undefined {
    return this.all.value?.find((model) => model.key === key);
  }

  /** The model with this key; without one, the default model. */
  findOrDefault(key: string): Model | undefined {
    return this.find(key) ?? this.all.value?.find((model) => model.default) ?? this.all.value?.[0];
  }

  /** Rejects never: what went wrong is in `isUnreachable`. */
  async refresh(): Promise<void> {
    try {
      const { models } = await request<{ models: Model[] }>("GET", "api/models", undefined, REPLY_SECONDS);
      // The same news is no news: nothing has to be drawn again.
      if (JSON.stringify(models) !== JSON.stringify(this.all.value)) this.all.value = models;
      this.#failures = 0;
    } catch {
      this.#failures++;
    }
    this.isUnreachable.value = this.#failures > 0;
  }

  /** Refresh for as long as the page is open; `isWatched` says whether somebody looks, `key` gives the chosen model. */
  async watch(pauses: Pauses, isWatched: () => boolean, key: () => string): Promise<never> {
    for (;;) {
      if (isWatched()) await this.refresh();
      await pauses.wait(this.#secondsToNext(key()));
    }
  }

  #secondsToNext(key: string): number {
    if (this.#failures > 0) return backOff(this.#failures);
    return this.findOrDefault(key)?.state === "ready" ? READY_POLL_SECONDS : UNREADY_POLL_SECONDS;
  }
}
