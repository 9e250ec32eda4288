import { readFileSync } from "node:fs";
import { expect, test } from "vitest";

const css = readFileSync("src/theme.css", "utf8");
/** Behind the text, where the front end gives no colours of its own: pages and what is raised from them. */
const PAGES = { light: ["#ffffff", "#f3f3f3"], dark: ["#1e1e1e", "#111111", "#383838"] };
const TEXT = ["error", "link", "keyword", "string", "number", "name"];

function colour(name: string, theme: keyof typeof PAGES): string {
  const found = [...css.matchAll(new RegExp(`--kn-${name}: (#[0-9a-f]{6})`, "g"))].map(([, value]) => value);
  expect(found).toHaveLength(2);
  return found[theme === "light" ? 0 : 1] as string;
}

/** WCAG 2's relative luminance. */
function luminance(hex: string): number {
  const [red, green, blue] = [1, 3, 5].map((at) => {
    const part = Number.parseInt(hex.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  }) as [number, number, number];
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

test.each(TEXT)("%s can be read on light pages and on dark ones (AA)", (name) => {
  for (const theme of ["light", "dark"] as const)
    for (const page of PAGES[theme]) {
      const [high, low] = [luminance(colour(name, theme)), luminance(page)].sort((one, other) => other - one) as [number, number];
      expect((high + 0.05) / (low + 0.05), `${name} on ${page}`).toBeGreaterThanOrEqual(4.5);
    }
});
