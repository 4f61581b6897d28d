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

// Sorting: a cell sorts by its <data>, else by the number it begins with, else by its text.
function sortKey(row, column) {
  const cell = row.cells[column];
  const data = $("data", cell);
  const number = data ? Number(data.value) : parseFloat(cell.textContent);
  return Number.isNaN(number) ? cell.textContent : number;
}
for (const table of $$("table.headline")) {
  $$("th", table).forEach((head, column) => {
    if (!head.textContent) return;
    const button = element("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      $$("th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = $$("tbody tr", table).sort((a, b) => {
        const [x, y] = [sortKey(a, column), sortKey(b, column)];
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? 1 : -1;
        return down ? -order : order;
      });
      $("tbody", table).append(...rows);
    });
  });
}

for (const tabs of $$(".tabs")) {
  const panels = $$("[data-tab]", tabs);
  const bar = element("div", { class: "choice", role: "group", "aria-label": "cost" });
  const show = (panel) => {
    panels.forEach((one) => { one.hidden = one !== panel; });
    $$("button", bar).forEach((one, at) => one.setAttribute("aria-pressed", panels[at] === panel));
  };
  for (const panel of panels) {
    const button = element("button", { type: "button" }, panel.dataset.tab === "flops" ? "FLOPs" : panel.dataset.tab);
    button.addEventListener("click", () => show(panel));
    bar.append(button);
  }
  tabs.prepend(bar);
  show(panels[0]);
}
