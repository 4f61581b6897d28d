"use strict";
// The page itself: theme, sortable table, tabs. Everything is readable without it.
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];

function element(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("nabla-theme", root.dataset.theme); } catch { /* no storage: for this visit only */ }
}
$("#theme").addEventListener("click", toggleTheme);

// Sorting: a cell sorts by its <data>, else by the number and the unit that it begins with, else by its text.
const UNITS = { n: 1e-9, "µ": 1e-6, m: 1e-3, k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18, min: 60, h: 3600, million: 1e6, billion: 1e9, trillion: 1e12 };
const NUMBER = /^[≤<>$\s]*([+\-−]?(?:\d[\d,]*)?\.?\d+(?:e[+-]?\d+)?)(?:\s*(million|billion|trillion|min|h)\b|\s*([nµmkMGTPE])(?=FLOPs|s\b))?/;
function sortKey(row, column) {
  const cell = row.cells[column], data = cell && $("data", cell);
  if (data) return Number(data.value);
  const text = cell ? cell.textContent.trim() : "", match = text.match(NUMBER);
  return match ? Number(match[1].replaceAll(",", "").replace("−", "-")) * (UNITS[match[2] ?? match[3]] ?? 1) : text;
}
const isKnown = (key) => key !== "" && key !== "–";

function makeSortable(table) {
  const heads = $$("thead th", table), bodies = [...table.tBodies], groups = $$("tr.group", table);
  const rows = bodies.map((body) => [...body.rows].filter((row) => !groups.includes(row)));
  if (rows.flat().length < 2) return;
  const sort = (column, order) => {
    heads.forEach((head, at) => head.setAttribute("aria-sort", at === column && order ? (order < 0 ? "descending" : "ascending") : "none"));
    groups.forEach((row) => { row.hidden = order !== 0; });
    if (!order) { bodies.forEach((body, at) => body.append(...rows[at])); return; }
    bodies[0].append(...rows.flat().sort((a, b) => {
      const [x, y] = [sortKey(a, column), sortKey(b, column)];
      if (isKnown(x) !== isKnown(y)) return isKnown(x) ? -1 : 1; // what is not known comes last
      const compared = typeof x !== typeof y ? (typeof x === "number" ? 1 : -1) : typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
      return order * compared;
    }));
  };
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = element("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    // Numbers begin with the largest, texts with the first. The third time brings back the first order.
    const first = head.classList.contains("n") ? -1 : 1;
    button.addEventListener("click", () => {
      const order = { descending: -1, ascending: 1 }[head.getAttribute("aria-sort")] ?? 0;
      sort(column, order === 0 ? first : order === first ? -first : 0);
    });
  });
  sort(0, 0);
}
$$(".scroll > table").forEach(makeSortable);
$$(".scripted, #theme").forEach((node) => { node.hidden = false; });

for (const tabs of $$(".tabs")) {
  const panels = $$("[data-tab]", tabs);
  const bar = element("div", { class: "choice", role: "group", "aria-label": "cost" });
  const show = (panel) => {
    panels.forEach((one) => { one.hidden = one !== panel; });
    $$("button", bar).forEach((one, at) => one.setAttribute("aria-pressed", panels[at] === panel));
  };
  for (const panel of panels) {
    const button = element("button", { type: "button" }, { flops: "FLOPs", seconds: "time", tokens: "tokens" }[panel.dataset.tab]);
    button.addEventListener("click", () => show(panel));
    bar.append(button);
  }
  tabs.prepend(bar);
  show(panels[0]);
}
