// The live strip under a running answer: Stop, what happens, elapsed time, speed, and a sparkline of memory.
// Only built-in DOM; text enters by textContent. Kept small: this source travels in every comm_open.

const ACK_MS = 800; // without an answer by then, the kernel does not see messages: interrupt it instead
const CSS = `.kani-strip{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;font-size:12px;
font-family:var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,inherit);
font-variant-numeric:tabular-nums}
.kani-strip button{font:inherit;font-weight:600;min-height:24px;padding:2px 12px;border-radius:4px;cursor:pointer;
color:inherit;background:var(--jp-layout-color2,transparent);border:1px solid var(--jp-border-color1,#888)}
.kani-strip button:disabled{opacity:.6;cursor:default}
.kani-strip button:focus-visible{outline:2px solid var(--jp-brand-color1,#2a7de1);outline-offset:1px}
.kani-strip svg{width:80px;height:16px;stroke:var(--jp-brand-color1,#2a7de1);fill:none}
.kani-strip i{width:8px;height:8px;border-radius:50%;background:var(--jp-brand-color1,#2a7de1);
animation:kani-strip 1.2s ease-in-out infinite alternate}
@keyframes kani-strip{to{opacity:.25}}
@media (prefers-reduced-motion:reduce){.kani-strip i{animation:none}}`;

/** The points of a polyline over `values`, in a box of 80 by 16. */
export function points(values) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const step = 80 / Math.max(1, values.length - 1);
  return values.map((v, i) => `${(i * step).toFixed(1)},${(15 - (14 * (v - low)) / span).toFixed(1)}`).join(" ");
}

function add(parent, name, text) {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

function render({ model, el }) {
  const abort = new AbortController();
  const root = add(el, "div");
  root.className = "kani-strip";
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Running answer");
  add(root, "style", CSS);
  const stop = add(root, "button", "Stop");
  stop.type = "button";
  stop.setAttribute("aria-label", "Stop the answer");
  add(root, "i").setAttribute("aria-hidden", "true");
  const status = add(root, "span");
  status.setAttribute("role", "status");
  const numbers = add(root, "span");
  const memory = add(root, "span");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 80 16");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  svg.append(line);
  root.append(svg);

  let timer;
  let isStopping = false;
  const draw = () => {
    const state = model.get("state") ?? {};
    const said = isStopping ? "stopping…" : (state.status ?? "");
    if (status.textContent !== said) status.textContent = said; // spoken only when it changes
    numbers.textContent = state.numbers ?? "";
    memory.textContent = state.memory ?? "";
    const series = state.series ?? [];
    svg.style.display = series.length > 1 ? "" : "none";
    if (series.length > 1) line.setAttribute("points", points(series));
  };
  const interrupt = () => {
    status.textContent = "interrupting the kernel…";
    model.widget_manager?.kernel?.interrupt();
  };
  const onMessage = (message) => {
    if (message?.kind === "ack") clearTimeout(timer);
  };
  stop.addEventListener(
    "click",
    () => {
      isStopping = stop.disabled = true;
      draw();
      timer = setTimeout(interrupt, ACK_MS);
      model.send({ kind: "stop" });
    },
    { signal: abort.signal },
  );
  model.on("change:state", draw);
  model.on("msg:custom", onMessage);
  draw();

  return () => {
    clearTimeout(timer);
    abort.abort();
    model.off("change:state", draw);
    model.off("msg:custom", onMessage);
    root.remove();
  };
}

export default { render };
