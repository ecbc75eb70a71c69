"use strict";
// Groups of runs and their curves. A group is one run, or the finished runs of one setting that differ in their seed only.

const DASHES = ["solid", "dash", "dot", "dashdot"];
const MOST_IN_ONE_LABEL = 12; // with more groups, the hover label shows one curve instead of all at an x value
const CHART_HEIGHT = 380;

function escapeHtml(text) {
  return String(text).replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function standardDeviation(values) {
  const middle = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
}

function formatNumber(value, key = "") {
  if (Number.isInteger(value)) return Math.abs(value) >= 10000 ? value.toLocaleString("en-US") : String(value);
  return /(accuracy|loss|mean|sd)$/.test(key) ? value.toFixed(4) : String(Number(value.toPrecision(5)));
}

// Return [{name, rows}]: where `fold` is set, the newest finished runs of each seed of one setting together; every other run alone.
function groupRuns(rows, fold) {
  const newest = new Map();
  for (const row of rows.filter((row) => fold && row.setting && row.state === "finished")) {
    const key = `${row.setting} ${row.seed}`;
    if (!(newest.get(key)?.date > row.date)) newest.set(key, row);
  }
  const folded = new Set(newest.values());
  const groups = new Map();
  rows.forEach((row, i) => {
    const key = folded.has(row) ? row.setting : `alone ${i}`;
    groups.set(key, [...(groups.get(key) ?? []), row]);
  });
  return [...groups.values()].map((members) => {
    const first = members[0].name;
    const name = members.length > 1 ? first.replace(/[-_. ]?seed[-_=]?\d+$/i, "") || first : first;
    return { name: members.length > 1 ? `${name} (${members.length} seeds)` : name, rows: members };
  });
}

// Return the points of one run's curve as a map: step -> [x, y]. Points of several seeds meet at the same step.
function pointsOf(row, metric, axis) {
  const curves = row.curves ?? {};
  const points = new Map();
  if (metric === "step_loss") {
    if (axis !== "epoch" && !curves[axis]) return points; // before the first evaluation its scale is not known
    const scale = axis === "epoch" ? 1 : curves[axis].at(-1) / curves.epoch.at(-1);
    (curves.step_loss ?? []).forEach((y, i) => points.set(curves.step_loss_epoch[i], [curves.step_loss_epoch[i] * scale, y]));
  } else {
    (curves[metric] ?? []).forEach((y, i) => {
      if (y !== null) points.set(curves.step[i], [curves[axis][i], y]);
    });
  }
  return points;
}

// Return the curves of a group: one of mean and standard deviation, or one per run where the runs share no step.
function curvesOf(group, metric, axis) {
  const all = group.rows.map((row) => pointsOf(row, metric, axis)).filter((points) => points.size);
  if (!all.length) return [];
  const shared = [...all[0].keys()].filter((step) => all.every((points) => points.has(step)));
  const folded = shared.length ? [{ members: all, steps: shared }] : all.map((points) => ({ members: [points], steps: [...points.keys()] }));
  return folded.map(({ members, steps }) => {
    const at = (step, which) => members.map((points) => points.get(step)[which]);
    return {
      n: members.length,
      x: steps.map((step) => mean(at(step, 0))),
      y: steps.map((step) => mean(at(step, 1))),
      sd: members.length > 1 ? steps.map((step) => standardDeviation(at(step, 1))) : null,
    };
  });
}

// Return the line of a curve for Plotly, and its band of one standard deviation.
function tracesOf(curve, name, color, dash, group) {
  const note = curve.y.map((_, i) => (curve.sd ? ` ± ${curve.sd[i].toPrecision(2)} (n = ${curve.n})` : ""));
  const line = {
    x: curve.x, y: curve.y, customdata: note, name: escapeHtml(name), legendgroup: group, type: "scatter",
    mode: curve.x.length > 30 ? "lines" : "lines+markers", line: { color, dash, width: 2 }, marker: { size: curve.x.length > 1 ? 5 : 8 },
    hovertemplate: `${escapeHtml(name)}: %{y:.4~f}%{customdata}<extra></extra>`,
  };
  if (!curve.sd) return [line];
  const band = {
    x: [...curve.x, ...[...curve.x].reverse()],
    y: [...curve.y.map((y, i) => y + curve.sd[i]), ...curve.y.map((y, i) => y - curve.sd[i]).reverse()],
    type: "scatter", mode: "lines", fill: "toself", fillcolor: `${color}30`, line: { width: 0 },
    legendgroup: group, showlegend: false, hoverinfo: "skip",
  };
  return [band, line];
}

function drawChart(element, groups, metric, axis, axisLabel, colors, logarithmic) {
  const traces = groups.flatMap((group, i) =>
    curvesOf(group, metric, axis).flatMap((curve, j) =>
      tracesOf(curve, group.name, colors[i % colors.length], DASHES[Math.floor(i / colors.length) % DASHES.length], `${i}-${j}`)));
  const layout = {
    height: CHART_HEIGHT, margin: { l: 60, r: 15, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    xaxis: { title: { text: axisLabel }, rangemode: "tozero", zeroline: false, unifiedhovertitle: { text: `${axisLabel} %{x}` } },
    modebar: { bgcolor: "rgba(0,0,0,0)" },
    yaxis: { title: { text: escapeHtml(metric) }, zeroline: false, type: logarithmic && /loss$/.test(metric) ? "log" : "linear" },
    legend: { orientation: "h", y: -0.25 }, showlegend: true,
    hoverdistance: -1, // the nearest values, however far apart the points of a short run are
    hovermode: groups.length > MOST_IN_ONE_LABEL ? "closest" : "x unified",
  };
  // named, because one of the usual buttons sends the data to a website
  const buttons = [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const options = { responsive: true, displaylogo: false, modeBarButtons: buttons };
  Plotly.react(element, traces, layout, options);
}

// A drawing has a fixed width: paper is narrower than most windows.
window.addEventListener("beforeprint", () => resizeCharts({ width: 900 }));
window.addEventListener("afterprint", () => resizeCharts({ width: null, autosize: true }));

function resizeCharts(layout) {
  document.querySelectorAll(".js-plotly-plot").forEach((element) => Plotly.relayout(element, layout));
}
