// Builds one .js and one .css a widget into ../static; with --check it only says whether what lies there is current.

import { build } from "esbuild";
import { readFile, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const WIDGETS = ["job_progress"];

/** anywidget sends both files with every instance, so they stay small. */
const LIMIT_BYTES = 100_000;

const sources = dirname(fileURLToPath(import.meta.url));
const target = join(sources, "..", "static");
const check = process.argv.includes("--check");

const { outputFiles } = await build({
  absWorkingDir: sources,
  entryPoints: WIDGETS.flatMap((name) => [`${name}.js`, `${name}.css`]),
  bundle: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
  legalComments: "none",
  outdir: target,
  write: false,
});

let stale = false;
for (const { path, contents, text } of outputFiles) {
  if (contents.length > LIMIT_BYTES) throw new Error(`${basename(path)} has ${contents.length} bytes, more than ${LIMIT_BYTES}`);
  if (!check) {
    await writeFile(path, contents);
    console.log(`${basename(path)}  ${contents.length} bytes`);
  } else if ((await readFile(path, "utf8").catch(() => "")) !== text) {
    console.error(`${basename(path)} is not what its sources make: run npm run build`);
    stale = true;
  }
}
process.exit(stale ? 1 : 0);
