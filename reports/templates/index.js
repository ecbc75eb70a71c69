"use strict";
// The table of all runs, and the panel that compares the selected ones. Data and libraries stand in this page.

const MOST_COLUMNS = 16; // of the table of differences
const RESULT = /(accuracy|loss|seconds|per_second|gib|_mean|_sd)$|^(epoch|skipped_steps)$/;
const byId = (id) => document.getElementById(id);

async function readData() {
  const packed = Uint8Array.from(atob(byId("data").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function loadDataTables() {
  const source = new Blob([byId("datatables-source").textContent], { type: "text/javascript" });
  return (await import(URL.createObjectURL(source))).default;
}

function followDarkMode() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => document.documentElement.classList.toggle("dark", dark.matches && !window.matchMedia("print").matches);
  dark.addEventListener("change", apply);
  window.matchMedia("print").addEventListener("change", apply);
  apply();
}

// --- table ---------------------------------------------------------------------------------------------------------

// Sort empty cells last in both directions.
function addOrder(DataTable) {
  const compare = (sign) => (a, b) => (a === null) - (b === null) || sign * (a < b ? -1 : a > b ? 1 : 0);
  for (const type of ["num", "string", "date"]) {
    DataTable.ext.type.order[`cell-${type}-asc`] = compare(1);
    DataTable.ext.type.order[`cell-${type}-desc`] = compare(-1);
  }
}

function renderCell(column, value, purpose, row) {
  if (purpose === "sort" || purpose === "type") return value ?? null;
  if (value === null || value === undefined) return "";
  if (purpose === "value") return column.type === "date" ? value.slice(0, 10) : value; // what filter conditions compare
  if (purpose === "filter") return column.type === "num" ? value : escapeHtml(column.type === "date" ? value.slice(0, 10) : value);
  const text = escapeHtml(column.type === "num" ? formatNumber(value, column.key) : value);
  if (column.key !== "name") return text;
  return `<a href="${escapeHtml(row.href)}">${text}</a>` + (row.note ? `<span class="note">${escapeHtml(row.note)}</span>` : "");
}

function makeTable(DataTable, data) {
  addOrder(DataTable);
  const columns = data.columns.map((column, i) => ({
    title: escapeHtml(column.key), name: column.key, visible: column.shown, type: `cell-${column.type}`,
    // a path instead of a function: SearchBuilder 1.8.4 calls a function without a row
    data: column.key === "note" ? "note" : `values.${i}`, defaultContent: "",
    render: (value, purpose, row) => renderCell(column, value, purpose, row),
    searchBuilderType: column.type, searchBuilder: { orthogonal: { display: "filter", search: "value" } },
    className: column.type === "num" ? "dt-right" : column.key === "name" ? "link" : "",
    orderSequence: column.type === "num" && !/loss$/.test(column.key) || column.type === "date" ? ["desc", "asc", ""] : ["asc", "desc", ""],
  }));
  const date = data.columns.findIndex((column) => column.key === "date") + 1;
  return new DataTable("#runs", {
    data: data.rows,
    columns: [{ data: null, orderable: false, searchable: false, className: "dt-select", render: DataTable.render.select(), title: "" }, ...columns],
    order: [[date, "desc"]], pageLength: 25, lengthMenu: [10, 25, 100, { label: "all", value: -1 }], deferRender: true, autoWidth: false,
    select: { style: "multi", selector: "td:not(.link)", headerCheckbox: false },
    searchBuilder: { columns: columns.map((_, i) => i + 1) },
    layout: {
      top2Start: "searchBuilder",
      topStart: {
        buttons: [
          { extend: "colvis", text: "Columns", columns: ":gt(0)", collectionLayout: "fixed four-column" },
          { extend: "selectAll", text: "Select all filtered", selectorModifier: { search: "applied" } },
          { extend: "selectNone", text: "Select none" },
          { extend: "csv", text: "CSV", exportOptions: { columns: ":visible:gt(0)" } },
        ],
      },
      topEnd: "search", bottomStart: ["info", "pageLength"], bottomEnd: "paging",
    },
    language: {
      searchBuilder: { title: { 0: "Filter", _: "Filter (%d)" }, add: "Add condition", data: "column" },
      search: "Search:", emptyTable: "no run", info: "_START_ to _END_ of _TOTAL_", infoEmpty: "no row", infoFiltered: "(filtered from _MAX_)", lengthMenu: "_MENU_ rows per page",
    },
  });
}

// --- selected runs -------------------------------------------------------------------------------------------------

// Return the selected runs, and the runs of the selected comparisons.
function chosenRuns(selected, rows) {
  const folders = selected.filter((row) => row.kind === "comparison").map((row) => `${row.name.split("/").at(-1)}/`);
  const chosen = new Set(selected.filter((row) => row.kind === "run"));
  rows.filter((row) => row.kind === "run" && folders.some((folder) => row.name.startsWith(folder))).forEach((row) => chosen.add(row));
  return [...chosen];
}

function cell(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

function tableRow(cells) {
  const row = document.createElement("tr");
  row.append(...cells);
  return row;
}

// Return the text of a group's value: a number with its spread over seeds, or the values that occur in the group.
function groupValue(group, i, key) {
  const values = group.rows.map((row) => row.values[i]).filter((value) => value !== null);
  if (RESULT.test(key) && values.length > 1 && values.every((value) => typeof value === "number"))
    return formatNumber(mean(values), key) + (new Set(values).size > 1 ? ` ± ${standardDeviation(values).toPrecision(2)}` : "");
  return [...new Set(values)].sort().map((value) => (typeof value === "number" ? formatNumber(value, key) : value)).join(", ");
}

function showDifferences(groups, columns) {
  const shown = groups.slice(0, MOST_COLUMNS);
  const sections = { results: [], settings: [] };
  columns.forEach(({ key }, i) => {
    if (["name", "kind", "date", "note", "seeds", "seeds_mean", "seeds_sd"].includes(key)) return;
    const texts = shown.map((group) => groupValue(group, i, key));
    if (RESULT.test(key) ? texts.some(Boolean) : new Set(texts).size > 1) sections[RESULT.test(key) ? "results" : "settings"].push([key, texts]);
  });
  const rows = [tableRow([cell("th", groups.length > shown.length ? `the first ${shown.length} of ${groups.length}` : ""), ...shown.map((group) => cell("th", group.name, "number"))])];
  for (const [name, found] of Object.entries(sections)) {
    const heading = tableRow([cell("th", found.length ? name : `${name}: no difference`)]);
    heading.className = "heading";
    rows.push(heading, ...found.map(([key, texts]) => tableRow([cell("td", key), ...texts.map((text) => cell("td", text, "number"))])));
  }
  byId("differences").replaceChildren(...rows);
}

function showVariants(selected) {
  const parts = selected.filter((row) => row.variants).flatMap((row) => {
    const table = document.createElement("table");
    const text = (one) => [one.name, one.n, one.mean === null ? "" : formatNumber(one.mean, "accuracy"), one.sd === null ? "" : one.sd.toPrecision(2), one.verdict];
    table.append(tableRow(["variant", "seeds", "mean accuracy", "sd", "verdict"].map((name) => cell("th", name))), ...row.variants.map((one) => tableRow(text(one).map((value) => cell("td", value)))));
    const scroll = cell("div", "", "scroll");
    scroll.append(table);
    return [cell("h3", `Comparison ${row.name}`), scroll];
  });
  byId("variants").replaceChildren(...parts);
}

// Offer the curves that the chosen runs have; keep a choice that is still possible.
function fillMetrics(select, metrics, preferred) {
  const kept = metrics.includes(select.value) ? select.value : preferred.find((metric) => metrics.includes(metric)) ?? metrics[0];
  select.replaceChildren(...metrics.map((metric) => new Option(metric, metric, false, metric === kept)));
}

function showSelection(table, data) {
  const selected = table.rows({ selected: true }).data().toArray();
  byId("comparison").hidden = !selected.length;
  if (!selected.length) return;
  const runs = chosenRuns(selected, data.rows);
  const groups = groupRuns(runs, byId("fold").checked);
  byId("selected").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}`;
  const metrics = data.metrics.filter((metric) => runs.some((row) => row.curves?.[metric]));
  const preferred = [["validation_accuracy", "test_accuracy"], ["train_loss", "step_loss"]];
  const axis = byId("x");
  preferred.forEach((names, i) => {
    fillMetrics(byId(`metric-${i}`), metrics, names);
    drawChart(byId(`chart-${i}`), groups, byId(`metric-${i}`).value, axis.value, axis.selectedOptions[0].text, data.colors, byId("log").checked);
  });
  showVariants(selected);
  showDifferences(groups, data.columns);
}

function showConstants(constants) {
  const rows = Object.entries(constants).map(([key, value]) => tableRow([cell("td", key), cell("td", String(value))]));
  byId("constants").querySelector("table").append(...rows);
  byId("constants").hidden = !rows.length;
}

async function start() {
  followDarkMode();
  const [data, DataTable] = await Promise.all([readData(), loadDataTables()]);
  for (const key of ["name", "seed", "state", "date"]) {
    const i = data.columns.findIndex((column) => column.key === key);
    data.rows.forEach((row) => (row[key] = row.values[i]));
  }
  const table = makeTable(DataTable, data);
  let waiting = 0;
  const update = () => {
    clearTimeout(waiting); // selecting many rows is one event for each
    waiting = setTimeout(() => showSelection(table, data), 30);
  };
  table.on("select deselect", update);
  ["fold", "x", "log", "metric-0", "metric-1"].forEach((id) => byId(id).addEventListener("change", update));
  showConstants(data.constant);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("failed").textContent = `This page could not be shown: ${error.message}. As text: python report.py --list`;
  byId("failed").hidden = false;
  console.error(error);
});
