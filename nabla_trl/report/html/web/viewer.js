// The trace viewer. Data lies in report_data/*.js beside the page: scripts, as a page from the file system may load
// nothing else. Each calls nablaData(name, value). Texts go into the page as texts, never as HTML.
const FOLDER = "report_data/";
const ROW = 52; // height of an item of the list, as in style.css
const MOST_CELLS = 4e6; // of a comparison of two suffixes; beyond that only their ends are compared
const arrived = new Map();
const waiting = new Map();

function nablaData(name, value) {
  arrived.set(name, value);
  waiting.get(name)?.resolve(value);
}

function load(name) {
  if (arrived.has(name)) return Promise.resolve(arrived.get(name));
  if (!waiting.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    const script = element("script", { src: `${FOLDER}${name}.js` });
    script.onerror = () => { waiting.delete(name); entry.reject(new Error(`${FOLDER}${name}.js is not there`)); };
    waiting.set(name, entry);
    document.head.append(script);
  }
  return waiting.get(name).promise;
}

const view = { source: "traces", picked: 0, step: 0, accepted: false, colour: "change", items: [], shown: [] };
const sources = {}; // traces, rows: {items, base, ours}
let tokens = { special: [], texts: {} };
let special = new Set();

// --- the list ---

// An item: [name, question, first verdict, last verdict, gain, proposals, accepted, error, file, place]; of a held-out
// problem also the file and the place of the search's trace, or nulls
function filtered() {
  const outcome = $("#outcome").value, wanted = $("#search").value.trim().toLowerCase(), order = $("#order").value;
  const kept = view.items.filter((item) => {
    if (wanted && !item[0].toLowerCase().includes(wanted) && !item[1].toLowerCase().includes(wanted)) return false;
    if (outcome === "error") return item[7];
    return !outcome || (!item[7] && `${item[2]}${item[3]}` === outcome);
  });
  const keys = { gain: (item) => -(item[4] ?? -Infinity), loss: (item) => item[4] ?? Infinity, steps: (item) => -item[5] };
  return order ? kept.sort((a, b) => keys[order](a) - keys[order](b)) : kept;
}

function renew() {
  view.shown = filtered();
  $("#pad").style.height = `${view.shown.length * ROW}px`;
  $("#count").textContent = `${view.shown.length} of ${view.items.length}`;
  $("#items").scrollTop = 0;
  paint();
  pick(0);
}

// Only the items in sight are in the page.
function paint() {
  const box = $("#items");
  const from = Math.max(0, Math.floor(box.scrollTop / ROW) - 5);
  const to = Math.min(view.shown.length, from + Math.ceil(box.clientHeight / ROW) + 10);
  $("#pad").replaceChildren(...view.shown.slice(from, to).map((item, at) => {
    const gain = item[7] ? "error" : signed(item[4]);
    const made = element("div", {
      class: "item", role: "option", style: `top:${(from + at) * ROW}px`, "aria-selected": from + at === view.picked,
    }, element("span", {}, item[0]), element("span", {}, mark(item[2]), " → ", mark(item[3]), ` ${gain}`),
    element("span", { class: "question" }, item[1]));
    made.addEventListener("click", () => pick(from + at));
    return made;
  }));
}

async function pick(number) {
  view.picked = number;
  paint();
  const item = view.shown[number], detail = $("#detail");
  if (!item) {
    detail.replaceChildren(element("p", { class: "note" }, view.items.length ? "Nothing fits these filters." : EMPTY[view.source]));
    return;
  }
  const box = $("#items");
  if (number * ROW < box.scrollTop) box.scrollTop = number * ROW;
  if ((number + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (number + 1) * ROW - box.clientHeight;
  const piece = (name, file) => load(`${name}-${String(file).padStart(4, "0")}`);
  const traced = view.source === "rows" && item[10] !== null;
  try {
    const [own, held] = await Promise.all([piece(view.source, item[8]), traced ? piece("held", item[10]) : null]);
    if (view.shown[view.picked] !== item) return; // another one was picked meanwhile
    if (view.source === "traces") showTrace(unfold(own[item[9]]));
    else showProblem(own[item[9]], traced ? unfold(held[item[11]]) : null);
  } catch (error) {
    detail.replaceChildren(element("p", { class: "note" }, `Cannot show this one: ${error.message}.`));
  }
}

const EMPTY = {
  traces: "This run has no traces beside its report: they are made by the stage traces of recipes/distill.py.",
  rows: "This run has no rows of a method that gives one answer.",
};

// --- one held-out problem ---

// `trace`: of the search, or null where none was kept.
function showProblem(problem, trace) {
  view.trace = null;
  const { base, ours } = sources.rows;
  const rows = problem.rows.map((row) => element("tr", { "aria-current": row.method === base || row.method === ours ? "true" : null },
    element("td", {}, row.method), element("td", { class: "n" }, `${row.seed}`), element("td", {}, mark(row.correct), ` ${row.error ?? row.answer ?? "none"}`),
    element("td", { class: "n" }, number(row.reward)), element("td", { class: "n" }, si(row.flops, "FLOPs")), element("td", { class: "n" }, si(row.seconds, "s")),
    element("td", { class: "n" }, row.proposals ? `${row.accepted} of ${row.proposals}` : "–")));
  const heads = ["method", "seed", "answer", "reward", "FLOPs", "seconds", "accepted"].map((text) => element("th", {}, text));
  const searches = trace ? [] : problem.rows.filter((row) => row.method === ours && row.rounds.filter((one) => one !== null).length > 1);
  const level = problem.level === null ? [] : [fact("level", problem.level)];
  $("#detail").replaceChildren(element("h3", {}, problem.id),
    ...(problem.question && !trace ? [element("pre", { class: "prompt" }, problem.question)] : []),
    element("ul", { class: "facts" }, fact("gold", problem.gold ?? "none"), ...level),
    ...searches.flatMap((row) => [element("small", {}, `${row.method}, seed ${row.seed}: reward of the response kept, by round`), rounds(row.rounds)]),
    ...(trace ? traceParts(trace).slice(1) : []), // without its own heading
    element("h3", {}, "What every method made of it"),
    element("div", { class: "scroll" }, element("table", { class: "others" }, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows))),
    ...(trace ? [] : [element("p", { class: "note" }, "No trace of the search was kept, so there is nothing to step through.")]));
  if (trace?.initial.length) go(0);
}

function rounds(values) {
  const known = values.filter((value) => value !== null), [low, high] = [Math.min(...known), Math.max(...known)];
  const WIDTH = Math.max($("#detail").clientWidth, 280);
  const x = (at) => 56 + (at * (WIDTH - 70)) / (values.length - 1), y = (value) => (high > low ? 10 + ((high - value) * 60) / (high - low) : 40);
  const rules = [...new Set([low, high])].flatMap((value) => [element("svg:line", { x1: 44, x2: WIDTH, y1: y(value), y2: y(value) }),
    element("svg:text", { x: 38, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2))]);
  const path = values.map((value, at) => (value === null ? "" : `H${x(at)}V${y(value)}`)).join("").replace(/^H([^V]*)V/, "M$1 ");
  return element("svg:svg", { class: "curve", viewBox: `0 0 ${WIDTH} 80`, role: "img", "aria-label": "reward over rounds" }, ...rules, element("svg:path", { class: "step", d: path }));
}

// --- the whole ---

function choose(source) {
  view.source = source;
  $$("[data-source]").forEach((one) => one.setAttribute("aria-pressed", one.dataset.source === source));
  view.items = sources[source].items;
  const { base, ours } = sources.rows;
  $("#meaning").textContent = !view.items.length ? "" : source === "traces"
    ? "Of a training trace, base is the first response and nabla the one that was kept; the list shows base → nabla, and the gain of reward. ?: not graded, or not known without a checker."
    : `Of a held-out problem, ${base} stands for base and ${ours} for nabla. The list shows base → nabla, and the gain of reward.`;
  renew();
}

async function begin() {
  try {
    const [index, texts] = await Promise.all([load("index"), load("tokens")]);
    tokens = texts;
    special = new Set(texts.special);
    const { compare: inOrder } = new Intl.Collator("en", { numeric: true });
    for (const items of [index.traces, index.rows.items]) items.sort((a, b) => inOrder(a[0], b[0]));
    sources.traces = { items: index.traces };
    sources.rows = index.rows;
    choose(index.traces.length ? "traces" : "rows");
  } catch (error) {
    $("#detail").replaceChildren(element("p", { class: "note" },
      `${error.message}: the viewer's data lies in ${FOLDER} beside report.html. Keep the two together.`));
  }
}

$$("[data-source]").forEach((one) => one.addEventListener("click", () => choose(one.dataset.source)));
for (const name of ["outcome", "order"]) $(`#${name}`).addEventListener("change", renew);
$("#search").addEventListener("input", renew);
$("#items").addEventListener("scroll", paint);
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input[type=search], select, textarea");
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const stepping = view.trace && view.trace.initial.length;
  const acts = {
    d: toggleTheme,
    "/": () => $("#search").focus(),
    j: () => view.picked + 1 < view.shown.length && pick(view.picked + 1),
    k: () => view.picked > 0 && pick(view.picked - 1),
    ArrowRight: stepping && (() => move(1)),
    ArrowLeft: stepping && (() => move(-1)),
    Home: stepping && (() => go(0)),
    End: stepping && (() => go(view.trace.steps.length)),
    a: stepping && (() => $("#accepted").click()),
  };
  const act = Object.hasOwn(acts, event.key) && acts[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
// Nothing is loaded before the viewer comes near to sight.
new IntersectionObserver((entries, observer) => {
  if (entries.some((one) => one.isIntersecting)) { observer.disconnect(); begin(); }
}, { rootMargin: "600px" }).observe($("#viewer"));
