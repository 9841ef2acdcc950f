"use strict";
// Each figure holds its views as JSON; a person's choices pick one. Colours of text and grid follow the page's theme.
const PRINTED_WIDTH = 680; // of A4 between its margins, in CSS pixels
const drawn = [];

function themed(layout, canvas) {
  const text = getComputedStyle(document.body).color, line = getComputedStyle(canvas).borderTopColor;
  const narrow = canvas.clientWidth < 600;
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line };
  return {
    ...layout,
    font: { family: "system-ui, sans-serif", size: narrow ? 11 : 13, color: text },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 8, r: 8, t: 12, b: 8 },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", ...layout.legend },
    hoverlabel: { font: { size: 12 } },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}

function height(traces, canvas, printed) {
  const names = traces.filter((trace) => trace.showlegend !== false && trace.name).map((trace) => trace.name);
  const width = Math.max(200, canvas.clientWidth), entry = 60 + 7 * Math.max(0, ...names.map((name) => name.length));
  const rows = names.length > 1 ? Math.ceil(names.length / Math.max(1, Math.floor(width / entry))) : 0;
  const cells = traces[0].type === "heatmap" ? 26 * traces[0].y.length + 80 : 0;
  return Math.max(width < 600 || printed ? 320 : 400, cells) + 20 * rows;
}

function show(one) {
  const key = one.selects.map((select) => select.value).join("\n");
  const traces = one.plot.views[key].map((trace) => structuredClone(trace));
  const layout = themed(structuredClone(one.plot.layout), one.canvas);
  layout.height = height(traces, one.canvas, one.printed);
  if (one.printed) { layout.width = PRINTED_WIDTH; } else { layout.autosize = true; }
  const options = {
    responsive: true, displaylogo: false, displayModeBar: one.canvas.clientWidth < 600 ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: { format: "svg", filename: one.plot.name },
  };
  Plotly.react(one.canvas, traces, layout, options);
}

function chooser(choice, changed) {
  const select = document.createElement("select"), label = document.createElement("label");
  for (const value of choice.values) { select.add(new Option(value, value)); }
  label.append(choice.name, select);
  if (choice.values.length < 2) { label.style.display = "none"; }
  select.addEventListener("change", changed);
  return [select, label];
}

for (const figure of document.querySelectorAll("figure.plot")) {
  const one = { plot: JSON.parse(figure.querySelector("script").textContent), canvas: figure.querySelector(".canvas"), selects: [], printed: false };
  for (const choice of one.plot.choices) {
    const [select, label] = chooser(choice, () => show(one));
    one.selects.push(select);
    figure.querySelector(".choices").append(label);
  }
  drawn.push(one);
  show(one);
}

const THEMES = ["system", "light", "dark"], button = document.getElementById("theme");
let theme = "system";
function setTheme(name) {
  theme = name;
  button.textContent = `theme: ${name}`;
  if (name === "system") { delete document.documentElement.dataset.theme; } else { document.documentElement.dataset.theme = name; }
  drawn.forEach(show);
}
button.addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(show));
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawn.forEach(show); } });
let before = theme;
addEventListener("beforeprint", () => { before = theme; drawn.forEach((one) => { one.printed = true; }); setTheme("light"); });
addEventListener("afterprint", () => { drawn.forEach((one) => { one.printed = false; }); setTheme(before); });
