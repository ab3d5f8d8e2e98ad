"""The style sheet and the script of every page. The script draws the figures in the reader's colours."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b2530; --muted: #596673; --line: #dfe4e9; --paper: #ffffff; --soft: #f4f6f8; --accent: #0b63b0;
  --good: #00705c; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8edf2; --muted: #a6b1bc; --line: #343d47; --paper: #171c22; --soft: #1f262e; --accent: #6db4f3;
    --good: #45c8ae; --bad: #ff9a8f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.muted, figcaption, footer { color: var(--muted); }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .8rem 0; font-size: .9rem; }
nav a { text-decoration: none; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; margin: .6rem 0; }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.3; overflow-wrap: anywhere; }
.card span { font-size: .85rem; color: var(--muted); display: block; line-height: 1.35; }
figure { margin: .6rem 0; }
figcaption { font-size: .9rem; max-width: 46rem; }
.plot { width: 100%; overflow: hidden; }
table { border-collapse: collapse; max-width: 100%; margin: .6rem 0; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
td:last-child, td code { overflow-wrap: anywhere; }
table.stack td:last-child { min-width: 16rem; }
th { color: var(--muted); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
code, pre { font: .86rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { margin: 0; padding: .8rem; background: var(--soft); border: 1px solid var(--line); border-radius: .5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 28rem; overflow-y: auto; }
.copied { position: relative; margin: .6rem 0; }
.copied button { position: absolute; top: .5rem; right: .5rem; }
button { font: inherit; font-size: .85rem; color: var(--ink); background: var(--paper); border: 1px solid var(--muted);
  border-radius: .4rem; padding: .2rem .7rem; cursor: pointer; }
button[hidden] { display: none; }
.meter { display: block; height: .7rem; border: 1px solid var(--muted); border-radius: .2rem; background: var(--paper);
  min-width: 6rem; }
.meter i { display: block; height: 100%; background: var(--accent); print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.next { background: var(--soft); border-left: .3rem solid var(--accent); padding: .6rem .9rem; max-width: none; }
footer { padding-bottom: 2rem; font-size: .85rem; }
@media (max-width: 640px) {
  body { font-size: 15px; }
  table.stack, table.stack tbody { display: block; }
  table.stack thead { display: none; }
  table.stack tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  table.stack td { display: flex; overflow-wrap: anywhere; gap: .6rem; border: 0; padding: .1rem 0; text-align: left; }
  table.stack td:empty { display: none; }
  table.stack td:last-child { min-width: 0; }
  table.stack td::before { content: attr(data-label); color: var(--muted); flex: 0 0 6.2rem; }
  table.stack td > * { min-width: 0; }
}
@media print {
  :root { color-scheme: light; --ink: #1b2530; --muted: #47535f; --line: #c9d0d6; --paper: #ffffff; --soft: #ffffff;
    --accent: #0b63b0; --good: #00705c; --bad: #b3261e; }
  @page { margin: 14mm; }
  body { font-size: 10.5pt; }
  nav, button { display: none; }
  main, header, footer { max-width: none; padding: 0; }
  pre { max-height: none; overflow: visible; font-size: 7.5pt; }
  #winner, #config { columns: 2; }
  figure, .card, tr, .next { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

SCRIPT = """
"use strict";
(() => {
  const darkColors = JSON.parse(document.getElementById("dark-colors").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const plots = [...document.querySelectorAll(".plot")].map((box) => ({ box }));
  let printing = false;

  const colored = (node, colors) => {
    if (typeof node === "string") return colors[node] ?? node;
    if (Array.isArray(node)) return typeof node[0] === "number" ? node : node.map((one) => colored(one, colors));
    if (node === null || typeof node !== "object") return node;
    return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, colored(value, colors)]));
  };
  const drawOne = (plot) => {
    const { box } = plot;
    const spec = plot.spec ??= JSON.parse(document.getElementById(box.id + "-data").textContent);
    const colors = dark.matches && !printing ? darkColors : {};
    const touched = touch ? { dragmode: false } : {};  // a finger scrolls the page, not the figure
    const height = Math.round(spec.layout.height * (printing ? 0.8 : 1));
    box.style.height = height + "px";
    // A4 less its margins is 680 pixels wide
    const size = printing ? { height, width: 680 } : { height };
    const layout = { ...colored(spec.layout, colors), ...touched, ...size };
    return Plotly.react(box, colored(spec.data, colors), layout, { displayModeBar: false, responsive: true });
  };
  const draw = () => Promise.all(plots.map(drawOne));
  const redraw = async () => {
    await draw();
    if (!printing) await Promise.all(plots.map(({ box }) => Plotly.Plots.resize(box)));  // as wide as the page again
  };
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => { printing = true; redraw(); });
  addEventListener("afterprint", () => { printing = false; redraw(); });

  for (const button of document.querySelectorAll("button[data-copies]")) {
    const text = document.getElementById(button.dataset.copies);
    button.hidden = false;
    button.addEventListener("click", async () => {
      getSelection().selectAllChildren(text);
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected: press Ctrl+C";  // the browser keeps the clipboard from this page
      }
    });
  }
  const open = async () => {
    const said = document.documentElement.dataset;
    for (const plot of plots) {
      // all that the window shows is there: the rest is drawn while it is read
      if (plot.box.getBoundingClientRect().top > innerHeight) said.opened ??= performance.now();
      await drawOne(plot);
      await new Promise((done) => setTimeout(done));  // one at a time, so that the page can be scrolled meanwhile
    }
    said.opened ??= performance.now();
    said.drawn = performance.now();
  };
  open();
})();
"""
