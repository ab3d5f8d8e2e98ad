"use strict";
// Draws the figures of a page in the colours of the reader's system, light in print, and lets texts be copied.
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
    const touched = touch ? { dragmode: false } : {};  // touching a figure scrolls the page
    const height = Math.round(spec.layout.height * (printing ? 0.8 : 1));
    box.style.height = height + "px";
    // A4 without its margins is 680 pixels wide
    const size = printing ? { height, width: 680 } : { height };
    const layout = { ...colored(spec.layout, colors), ...touched, ...size };
    return Plotly.react(box, colored(spec.data, colors), layout, { displayModeBar: false, responsive: true });
  };
  const draw = () => Promise.all(plots.map(drawOne));
  const redraw = async () => {
    await draw();
    if (!printing) await Promise.all(plots.map(({ box }) => Plotly.Plots.resize(box)));  // back to the width of the page
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
        button.textContent = "Selected: press Ctrl+C";  // the browser denies this page the clipboard
      }
    });
  }
  const open = async () => {
    const times = document.documentElement.dataset;  // milliseconds since loading began
    for (const plot of plots) {
      // the figures within the window are drawn by now; the others follow while the user reads
      if (plot.box.getBoundingClientRect().top > innerHeight) times.opened ??= performance.now();
      await drawOne(plot);
      await new Promise((done) => setTimeout(done));  // one at a time, so that the page stays responsive
    }
    times.opened ??= performance.now();
    times.drawn = performance.now();
  };
  open();
})();
