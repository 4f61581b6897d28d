// The trace viewer. Its data is in report_data/*.js beside the page. These are scripts, because a page from the file
// system may load nothing else. Each calls nablaData(name, value). Texts go into the page as texts, never as HTML.
const FOLDER = "report_data/";
const ROW_HEIGHT = 52; // of an item of the list, as in style.css
const MAX_DIFF_CELLS = 4e6; // beyond this size of a comparison of two suffixes, only their ends are compared
const loaded = new Map();
const pending = new Map();

function nablaData(name, value) {
  loaded.set(name, value);
  pending.get(name)?.resolve(value);
}

function load(name) {
  if (loaded.has(name)) return Promise.resolve(loaded.get(name));
  if (!pending.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    const script = element("script", { src: `${FOLDER}${name}.js` });
    script.onerror = () => { pending.delete(name); entry.reject(new Error(`${FOLDER}${name}.js is missing`)); };
    pending.set(name, entry);
    document.head.append(script);
  }
  return pending.get(name).promise;
}

// Loads the value at [file, index] of the files <name>-0000.js, …
async function loadFromChunk(name, location) {
  if (!location) return null;
  const values = await load(`${name}-${String(location[0]).padStart(4, "0")}`);
  return values[location[1]];
}

const view = { source: "traces", selected: 0, step: 0, accepted: false, color: "change", items: [], visibleItems: [] };
const sources = {}; // traces and rows: {items, base, search}
let tokens = { special_ids: [], texts: {} };
let specialIds = new Set();

// --- the list ---

function filterItems() {
  const outcome = $("#outcome").value, query = $("#search").value.trim().toLowerCase(), order = $("#order").value;
  const items = view.items.filter((item) => {
    if (query && !item.name.toLowerCase().includes(query) && !item.question.toLowerCase().includes(query)) return false;
    if (outcome === "error") return item.error;
    return !outcome || (!item.error && item.correct.join("") === outcome);
  });
  const keys = { gain: (item) => -(item.gain ?? -Infinity), loss: (item) => item.gain ?? Infinity, steps: (item) => -item.proposals };
  return order ? items.sort((a, b) => keys[order](a) - keys[order](b)) : items;
}

function refreshList() {
  view.visibleItems = filterItems();
  $("#list-spacer").style.height = `${view.visibleItems.length * ROW_HEIGHT}px`;
  $("#count").textContent = `${view.visibleItems.length} of ${view.items.length}`;
  $("#items").scrollTop = 0;
  renderList();
  showItem(0);
}

// The page holds only the items in sight.
function renderList() {
  const box = $("#items");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW_HEIGHT) - 5);
  const end = first + Math.ceil(box.clientHeight / ROW_HEIGHT) + 10;
  $("#list-spacer").replaceChildren(...view.visibleItems.slice(first, end).map((item, offset) => {
    const at = first + offset;
    const node = element("div", { class: "item", role: "option", style: `top:${at * ROW_HEIGHT}px`, "aria-selected": at === view.selected },
      element("span", {}, item.name),
      element("span", {}, outcomeSign(item.correct[0]), " → ", outcomeSign(item.correct[1]), ` ${item.error ? "error" : formatSigned(item.gain)}`),
      element("span", { class: "question" }, item.question));
    node.addEventListener("click", () => showItem(at));
    return node;
  }));
}

async function showItem(at) {
  view.selected = at;
  renderList();
  const item = view.visibleItems[at], detail = $("#detail"), box = $("#items");
  if (!item) {
    detail.replaceChildren(element("p", { class: "note" }, view.items.length ? "No problem matches these filters." : EMPTY[view.source]));
    return;
  }
  box.scrollTop = Math.min(Math.max(box.scrollTop, (at + 1) * ROW_HEIGHT - box.clientHeight), at * ROW_HEIGHT);
  try {
    const [value, trace] = await Promise.all([loadFromChunk(view.source, item.chunk), loadFromChunk("eval_traces", item.trace)]);
    if (view.visibleItems[view.selected] !== item) return; // another item was selected in the meantime
    if (view.source === "traces") showTrace(reconstructSteps(value));
    else showProblem(value, trace && reconstructSteps(trace));
  } catch (error) {
    detail.replaceChildren(element("p", { class: "note" }, `This problem cannot be shown: ${error.message}.`));
  }
}

const EMPTY = {
  traces: "This run has no traces beside its report. The traces stage of recipes/distill.py writes them.",
  rows: "This run has no rows of a method that gives one answer.",
};

// --- one held-out problem ---

// `trace` is that of the search, or null where none was stored.
function showProblem(problem, trace) {
  view.trace = null;
  const { base, search } = sources.rows;
  const rows = problem.rows.map((row) => tableRow(row.method === base || row.method === search, [
    element("span", {}, row.method), `${row.seed}`, element("span", {}, outcomeSign(row.correct), ` ${row.error ?? row.answer ?? "none"}`),
    formatNumber(row.reward), formatSi(row.flops, "FLOPs"), formatSeconds(row.seconds), row.revisions ? `${row.accepted} of ${row.revisions}` : "–"]));
  const curves = problem.rows.flatMap((row) => {
    const rewards = row.reward_by_round;
    if (trace || row.method !== search || rewards.filter((reward) => reward !== null).length < 2) return [];
    const { path, svg } = curveFrame(rewards, 80);
    return [element("small", {}, `${row.method}, seed ${row.seed}: reward of the selected response by round`), svg("reward over rounds", path(rewards))];
  });
  $("#detail").replaceChildren(element("h3", {}, problem.id),
    ...(problem.question && !trace ? [element("pre", { class: "prompt" }, problem.question)] : []),
    element("ul", { class: "facts" }, factItem("gold", problem.gold ?? "none"), problem.level === null ? null : factItem("level", problem.level)),
    ...curves,
    ...(trace ? traceParts(trace).slice(1) : []), // without its own heading
    element("h3", {}, "Answers of all methods"),
    element("div", { class: "scroll" }, makeTable(["method", "seed", "answer", "reward", "FLOPs", "time", "accepted"], rows)),
    trace ? "" : element("p", { class: "note" }, "No trace of the search was stored, so there is nothing to step through."));
  if (trace?.initial_ids.length) showStep(0);
}

// --- the whole ---

function chooseSource(source) {
  if (!sources[source]) return; // not loaded yet
  view.source = source;
  $$("[data-source]").forEach((button) => button.setAttribute("aria-pressed", button.dataset.source === source));
  view.items = sources[source].items;
  const { base, search } = sources.rows;
  $("#meaning").textContent = !view.items.length ? "" : source === "traces"
    ? "For a training trace, base is the first response and nabla is the selected response. The list shows base → nabla, and the gain of reward. ?: not graded, or not known without a checker."
    : `For a held-out problem, base is ${base} and nabla is ${search}. The list shows base → nabla, and the gain of reward.`;
  refreshList();
}

async function loadIndex() {
  try {
    const [index, tokenTexts] = await Promise.all([load("index"), load("tokens")]);
    tokens = tokenTexts;
    specialIds = new Set(tokens.special_ids);
    const { compare } = new Intl.Collator("en", { numeric: true });
    for (const items of [index.traces, index.rows.items]) items.sort((a, b) => compare(a.name, b.name));
    sources.traces = { items: index.traces };
    sources.rows = index.rows;
    chooseSource(index.traces.length ? "traces" : "rows");
  } catch (error) {
    $$("#viewer button, #viewer select, #viewer input").forEach((control) => { control.disabled = true; });
    $(".list").hidden = true;
    $("#detail").replaceChildren(element("p", { class: "alone", role: "alert" },
      `There is nothing to step through: ${error.message}. The traces are in the folder ${FOLDER} beside report.html. Keep the two together. All other parts of this page are complete.`));
  }
}

$$("[data-source]").forEach((button) => button.addEventListener("click", () => chooseSource(button.dataset.source)));
for (const name of ["outcome", "order"]) $(`#${name}`).addEventListener("change", refreshList);
$("#search").addEventListener("input", refreshList);
$("#items").addEventListener("scroll", renderList);
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input[type=search], select, textarea");
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const stepping = view.trace?.initial_ids.length;
  const actions = {
    d: toggleTheme,
    "/": () => $("#search").focus(),
    j: () => view.selected + 1 < view.visibleItems.length && showItem(view.selected + 1),
    k: () => view.selected > 0 && showItem(view.selected - 1),
    ArrowRight: stepping && (() => moveStep(1)),
    ArrowLeft: stepping && (() => moveStep(-1)),
    Home: stepping && (() => showStep(0)),
    End: stepping && (() => showStep(view.trace.steps.length)),
    a: stepping && (() => $("#accepted").click()),
  };
  const action = Object.hasOwn(actions, event.key) && actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
$("#viewer").hidden = false;
// Nothing is loaded before the viewer comes near to sight.
new IntersectionObserver((entries, observer) => {
  if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); loadIndex(); }
}, { rootMargin: "600px" }).observe($("#viewer"));
