// src/*.ts with an entry of their own -> ../kani_nb/static/*.js, one self-contained ES module for each widget, and a
// stamp of the sources they were built from. Deterministic: the same sources give the same bytes.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createHash } from "node:crypto";
import { dirname, join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "kani_nb", "static");
const entries = readdirSync(join(here, "src", "widgets")).filter((name) => name.endsWith(".ts"));

// A style sheet is imported as text (`?inline`, as vite has it), without its white space.
const css = {
  name: "css",
  setup(build) {
    build.onResolve({ filter: /\.css\?inline$/ }, (found) => ({
      path: join(found.resolveDir, found.path.replace("?inline", "")),
      namespace: "css",
    }));
    build.onLoad({ filter: /.*/, namespace: "css" }, async ({ path }) => {
      const done = await esbuild.transform(readFileSync(path, "utf8"), { loader: "css", minify: true });
      return { contents: done.code.trim(), loader: "text" };
    });
  },
};

/** Of everything that the bundles are made from. `hatch_build.py` counts it alike, and a test compares them. */
function stamp() {
  const sources = readdirSync(join(here, "src"), { recursive: true, withFileTypes: true })
    .filter((each) => each.isFile())
    .map((each) => relative(here, join(each.parentPath, each.name)).split(sep).join("/"));
  const hash = createHash("sha256");
  for (const name of [...sources, "build.mjs", "package.json", "package-lock.json"].sort()) {
    const text = readFileSync(join(here, name), "utf8").replaceAll("\r\n", "\n");
    hash.update(`${name}\0${text}\0`);
  }
  return hash.digest("hex");
}

const options = {
  entryPoints: entries.map((name) => join(here, "src", "widgets", name)),
  outdir: out,
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  charset: "utf8",
  legalComments: "none",
  plugins: [css],
  metafile: true,
  logLevel: "warning",
};

if (process.argv.includes("--watch")) {
  await (await esbuild.context(options)).watch();
} else {
  const { metafile } = await esbuild.build(options);
  // As sha256sum writes it: first what the bundles were built from, then what they are.
  const bundles = entries.map((name) => name.replace(/\.ts$/, ".js")).sort();
  const lines = bundles.map((name) => `${createHash("sha256").update(readFileSync(join(out, name))).digest("hex")}  ${name}`);
  writeFileSync(join(out, "sources.sha256"), [`${stamp()}  sources`, ...lines, ""].join("\n"));
  for (const [name, { bytes }] of Object.entries(metafile.outputs)) console.log(`${name} ${(bytes / 1024).toFixed(1)} KB`);
}
