/** A line of numbers, 80 by 16: how something went, not how much it was. */

import { assign, drawing } from "./dom";

const WIDTH = 80;
const HEIGHT = 16;

/** The points of a polyline over `values`, which fill the box. */
export function points(values: readonly number[]): string {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const step = WIDTH / Math.max(1, values.length - 1);
  return values
    .map((value, at) => `${(at * step).toFixed(1)},${(HEIGHT - 1 - ((HEIGHT - 2) * (value - low)) / span).toFixed(1)}`)
    .join(" ");
}

/** The drawing, and what puts other numbers into it; fewer than two are none. */
export function sparkline(): { node: SVGSVGElement; draw(values: readonly number[]): void } {
  const line = drawing("polyline");
  const node = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" }, line);
  return {
    node,
    draw(values) {
      node.style.display = values.length > 1 ? "" : "none";
      if (values.length > 1) assign(line, { points: points(values) });
    },
  };
}
