/** The page's one state. */

import { App } from "./state/app";

export const app = new App();
