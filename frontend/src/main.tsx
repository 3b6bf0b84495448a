/** The page begins here. */

import { effect } from "@preact/signals";
import { render } from "preact";

import { app } from "./page";
import { texts } from "./texts";
import { Page } from "./views/Page";

effect(() => {
  const { theme } = app;
  if (theme.value === "system") delete document.documentElement.dataset["theme"];
  else document.documentElement.dataset["theme"] = theme.value;
});
effect(() => {
  const { view } = app.route.value;
  const title = view === "swarm" ? texts.swarm.title : view === "chat" ? app.conversation.value?.chat.value.title : "";
  document.title = title ? `${title} – ${texts.name}` : texts.name;
});

void app.start();
render(<Page />, document.getElementById("app")!);
