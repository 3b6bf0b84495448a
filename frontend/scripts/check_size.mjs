// Prints what the page loads, gzipped, and fails if that is more than it may be before the first message.

import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";

const LIMIT_KIB = 60;
const folder = "../src/petals_chat/web";
const manifest = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
rmSync(join(folder, "manifest.json")); // the page does not use it

const kib = (file) => gzipSync(readFileSync(join(folder, file))).length / 1024;
const show = (file, size) => console.log(`${size.toFixed(1).padStart(8)} KiB  ${file}`);

/** The files of an entry and of all that it loads at once. */
function filesOf(key, seen = new Set()) {
  if (seen.has(key)) return [];
  seen.add(key);
  const { file, css = [], imports = [] } = manifest[key];
  return [file, ...css, ...imports.flatMap((other) => filesOf(other, seen))];
}

const entry = Object.keys(manifest).find((key) => manifest[key].isEntry);
const first = [...new Set(["index.html", "icon.svg", ...filesOf(entry)])];
const later = [...new Set(Object.values(manifest).map(({ file }) => file))].filter((file) => !first.includes(file));
const sum = first.reduce((total, file) => total + kib(file), 0);

console.log("Before the first message, gzipped:");
for (const file of first) show(file, kib(file));
show("in all", sum);
console.log("Later, when it is needed:");
for (const file of later) show(file, kib(file));
if (sum > LIMIT_KIB) {
  console.error(`The page may have ${LIMIT_KIB} KiB before the first message, not ${sum.toFixed(1)}.`);
  process.exit(1);
}
