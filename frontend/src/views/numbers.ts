/** Numbers and dates as people read them. */

import { texts } from "../texts";

const whole = new Intl.NumberFormat(texts.locale, { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat(texts.locale, { maximumFractionDigits: 1 });
const day = new Intl.DateTimeFormat(texts.locale, { dateStyle: "long" });

export const wholeNumber = (value: number) => whole.format(value);
/** With one decimal, where it matters. */
export const roundNumber = (value: number) => (value < 100 ? one : whole).format(value);
/** @param seconds Since 1970. */
export const date = (seconds: number) => day.format(new Date(seconds * 1000));
