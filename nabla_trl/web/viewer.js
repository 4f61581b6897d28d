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

// --- words ---

const MARKS = { 1: ["✓", "right"], 0: ["✗", "wrong"] };
const mark = (verdict) => {
  const [sign, kind] = MARKS[verdict] ?? ["?", "unknown"];
  return element("span", { class: kind, title: kind === "unknown" ? "not known" : kind }, sign);
};
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value) => (value === null || value === undefined ? "–" : `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(3)}`);
const PREFIXES = ["n", "µ", "m", "", "k", "M", "G", "T", "P", "E"];
function si(value, unit) {
  if (!value) return `0 ${unit}`;
  const power = Math.min(Math.max(Math.floor(Math.log10(Math.abs(value)) / 3), -3), 6);
  return `${Number((value / 1000 ** power).toPrecision(3))} ${PREFIXES[power + 3]}${unit}`;
}
const tokenText = (id) => tokens.texts[id] ?? `⟨${id}⟩`;
// A token that can be seen where it stands alone: spaces and line breaks as signs.
const visible = (id) => tokenText(id).replace(/^ | $/g, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || `⟨${id}⟩`;

// --- the list ---

// An item: [name, question, first verdict, last verdict, gain, proposals, accepted, error, file, place]
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
  const file = `${view.source}-${String(item[8]).padStart(4, "0")}`;
  try {
    const piece = await load(file);
    if (view.shown[view.picked] !== item) return; // another one was picked meanwhile
    if (view.source === "traces") showTrace(unfold(piece[item[9]]));
    else showProblem(piece[item[9]]);
  } catch (error) {
    detail.replaceChildren(element("p", { class: "note" }, `Cannot show this one: ${error.message}.`));
  }
}

const EMPTY = {
  traces: "This run has no traces beside its report: they are made by the stage traces of recipes/distill.py.",
  rows: "This run has no rows.",
};

// --- one trace ---

// Adds to each revision what it was proposed against, and to the trace how its reward went.
function unfold(trace) {
  let incumbent = trace.initial, base = incumbent, round = null, accepted = 0, number = 0;
  trace.steps = trace.revisions.map(([own, position, suffix, before, after, taken, flops]) => {
    if (own !== round) { base = incumbent; round = own; number = accepted; }
    const step = { round: own, position, suffix, before, after, taken, flops, base, number, old: base[position], made: suffix[0] };
    if (taken) { incumbent = base.slice(0, position).concat(suffix); accepted += 1; }
    return step;
  });
  trace.final = incumbent;
  trace.accepted = accepted;
  return trace;
}

function showTrace(trace) {
  view.trace = trace;
  view.step = 0;
  const [first, last] = trace.verdicts;
  const answers = element("ul", { class: "facts" },
    fact("first answer", mark(first), ` ${trace.answers[0] ?? "not known"}`),
    fact("final answer", mark(last), ` ${trace.answers[1] ?? "none found"}`),
    fact("gold", trace.gold ?? "none"),
    fact("reward", `${number(trace.rewards[0])} → ${number(trace.rewards[1])}`),
    fact("proposals", `${trace.steps.length}, ${trace.accepted} accepted`),
    fact("cost", `${si(trace.flops, "FLOPs")}, ${si(trace.seconds, "s")}`),
    fact("ended by", trace.finished ? trace.stop : `${trace.stop}, response cut off`));
  const parts = [element("h3", {}, `${trace.id} · seed ${trace.seed} · ${trace.method}`),
    element("pre", { class: "prompt" }, trace.prompt), answers];
  if (trace.error) parts.push(element("p", { class: "wrong" }, trace.error));
  if (trace.initial.length) parts.push(curve(trace), controls(trace), element("div", { id: "step" }));
  $("#detail").replaceChildren(...parts);
  if (trace.initial.length) go(0);
}

const fact = (name, ...value) => element("li", {}, element("b", {}, name), ...value);

// The incumbent's reward over proposals, and every proposal's own.
function curve(trace) {
  const values = [trace.rewards[0], ...trace.steps.map((one) => one.after)];
  const known = values.filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const WIDTH = Math.max($("#detail").clientWidth, 280), HEIGHT = 130, LEFT = 44, x = (at) => LEFT + 12 + (at * (WIDTH - LEFT - 24)) / Math.max(values.length - 1, 1);
  const y = (value) => 12 + ((high - value) * (HEIGHT - 24)) / (high - low || 1);
  let now = trace.rewards[0], path = now === null ? "" : `M${x(0)} ${y(now)}`;
  trace.steps.forEach((step, at) => {
    if (now === null) return;
    path += `H${x(at + 1)}`;
    if (step.taken) { now = step.after; path += `V${y(now)}`; }
  });
  const rules = [low, high].flatMap((value) => [
    element("svg:line", { x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }),
    element("svg:text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2))]);
  const dots = values.map((value, at) => {
    if (value === null) return null;
    const step = trace.steps[at - 1];
    const dot = element("svg:circle", { cx: x(at), cy: y(value), r: 4.5, class: !step || step.taken ? "taken" : "", "data-step": at },
      element("svg:title", {}, step ? `proposal ${at}: reward ${number(value)}, ${step.taken ? "accepted" : "rejected"}` : `first response: reward ${number(value)}`));
    dot.addEventListener("click", () => go(at));
    return dot;
  });
  const drawn = element("svg:svg", { class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "reward over proposals" },
    ...rules, element("svg:path", { class: "step", d: path }), ...dots);
  return element("div", {}, element("small", {}, "Reward by proposal: filled accepted, hollow rejected; the line is that of the response kept."), drawn);
}

function controls(trace) {
  const button = (name, text, title, act) => {
    const made = element("button", { type: "button", id: name, title }, text);
    made.addEventListener("click", act);
    return made;
  };
  const colour = element("select", { id: "colour" },
    element("option", { value: "change" }, "what changed"),
    element("option", { value: "pull", disabled: !trace.pull.steps.length },
      trace.pull.steps.length ? "gradient" : "gradient (not recorded)"),
    element("option", { value: "tries" }, "where it was tried"));
  if (view.colour === "pull" && !trace.pull.steps.length) view.colour = "change";
  colour.value = view.colour;
  colour.addEventListener("change", () => { view.colour = colour.value; go(view.step); });
  const only = element("input", { type: "checkbox", id: "accepted" });
  only.checked = view.accepted;
  only.addEventListener("change", () => { view.accepted = only.checked; });
  return element("div", { class: "steps" },
    button("first", "|←", "first response (Home)", () => go(0)), button("previous", "←", "previous proposal (←)", () => move(-1)),
    element("output", { id: "where" }), button("next", "→", "next proposal (→)", () => move(1)),
    button("last", "→|", "last proposal (End)", () => go(trace.steps.length)),
    element("label", {}, only, " accepted only"), element("label", {}, "colours ", colour));
}

function move(by) {
  const steps = view.trace.steps;
  let at = view.step + by;
  while (view.accepted && at > 0 && at <= steps.length && !steps[at - 1].taken) at += by;
  if (at >= 0 && at <= steps.length) go(at);
}

function go(at) {
  const trace = view.trace, step = trace.steps[at - 1];
  view.step = at;
  $("#where").textContent = at ? `proposal ${at} of ${trace.steps.length}` : "first response";
  $("#first").disabled = $("#previous").disabled = at === 0;
  $("#next").disabled = $("#last").disabled = at === trace.steps.length;
  $$(".curve circle").forEach((dot) => dot.classList.toggle("now", Number(dot.dataset.step) === at));
  $("#step").replaceChildren(...(step ? proposal(trace, step) : start(trace)), ...rivals(trace, step), ...ending(trace, at));
}

function start(trace) {
  return [element("p", { class: "change" }, `The first response, reward ${number(trace.rewards[0])}.`),
    block(trace, trace.initial, colours(trace, trace.initial, 0)), legend(trace)];
}

function proposal(trace, step) {
  const verdict = element("b", { class: step.taken ? "right" : "wrong" }, step.taken ? "accepted" : "rejected");
  const gain = step.after === null || step.before === null ? null : step.after - step.before;
  const head = element("p", { class: "change" }, `Round ${step.round + 1}: at position ${step.position} `,
    element("code", {}, visible(step.old)), " became ", element("code", {}, visible(step.made)),
    `, and the rest was drawn anew. Reward ${number(step.before)} → ${number(step.after)} (${signed(gain)}): `, verdict, ".");
  const made = step.base.slice(0, step.position).concat(step.suffix);
  const [gone, added] = compare(step.base.slice(step.position), step.suffix);
  const shift = (set) => new Set([...set].map((one) => one + step.position));
  return [head, element("small", {}, "old: the response that was kept until then"),
    block(trace, step.base, colours(trace, step.base, step.number, shift(gone), "gone", step.position)),
    element("small", {}, "new: the proposal"),
    block(trace, made, colours(trace, made, null, shift(added), "added", step.position)), legend(trace)];
}

// How a token of a response looks: [class, style, title] by position. `incumbent`: its number; null for a proposal.
function colours(trace, ids, incumbent, changed = new Set(), kind = "", branch = -1) {
  const pull = incumbent === null ? undefined : trace.pull.steps[incumbent];
  const tries = incumbent === null || view.colour !== "tries" ? null : new Map();
  if (tries) for (const step of trace.steps) if (step.number === incumbent) tries.set(step.position, (tries.get(step.position) ?? 0) + 1);
  return (at) => {
    const names = at === branch ? ["branch"] : [];
    let style = "", title = `position ${at}, id ${ids[at]}`;
    if (view.colour === "pull" && pull) {
      style = heat(Math.sqrt(pull[at] / 100));
      title += `, promised gain of reward ${((pull[at] / 100) * trace.pull.top).toPrecision(3)}`;
    } else if (tries) {
      style = heat(Math.min(1, (tries.get(at) ?? 0) / 3));
      title += `, tried ${tries.get(at) ?? 0} times`;
    } else if (view.colour === "change" || incumbent === null) {
      if (changed.has(at)) names.push(kind);
      else if (branch >= 0 && at < branch) names.push("kept");
    }
    if (special.has(ids[at])) names.push("special");
    return [names.join(" "), style, title];
  };
}

const heat = (share) => (share > 0 ? `background: color-mix(in srgb, var(--vermilion) ${Math.round(75 * share)}%, transparent)` : "");

function block(trace, ids, look) {
  const box = element("div", { class: "tokens", tabindex: "0" });
  if (!trace.texts && !ids.length) box.append("(empty)");
  ids.forEach((id, at) => {
    const [names, style, title] = look(at);
    const text = trace.texts ? tokenText(id) : `${id} `;
    box.append(element("span", { class: names || null, style: style || null, title }, text));
  });
  return box;
}

function legend(trace) {
  const swatch = (style, text) => element("span", {}, element("i", { class: "swatch", style }), text);
  if (view.colour === "pull") {
    return element("p", { class: "legend" }, element("span", {}, ...[0.25, 0.6, 1].map((share) => swatch(heat(share), "")),
      `by how much, at most, the gradient promised to raise the reward with another token there: none to ${trace.pull.top.toPrecision(3)}, on a square-root scale. Proposals have none: theirs was not taken.`));
  }
  if (view.colour === "tries") return element("p", { class: "legend" }, swatch(heat(0.33), "tried once"), swatch(heat(1), "three times or more, at this response"));
  return element("p", { class: "legend" }, swatch("background: var(--old)", "gone"), swatch("background: var(--new)", "new"), element("span", {}, "framed: the branch; grey: kept"));
}

// Positions of two lists of ids that the other lacks, by a longest common subsequence.
function compare(a, b) {
  let tail = 0;
  while (tail < Math.min(a.length, b.length) - 1 && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail += 1;
  const [n, m] = [a.length - tail, b.length - tail];
  const gone = new Set(Array.from({ length: n }, (_, at) => at)), added = new Set(Array.from({ length: m }, (_, at) => at));
  if (n * m > MOST_CELLS) return [gone, added];
  const width = m + 1, table = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      table[i * width + j] = a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[i] === b[j]) { gone.delete(i); added.delete(j); i += 1; j += 1; }
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [gone, added];
}

// What else was proposed against the same response.
function rivals(trace, step) {
  const incumbent = step ? step.number : 0;
  const lines = trace.steps.map((one, at) => [one, at + 1]).filter(([one]) => one.number === incumbent);
  if (!lines.length) return [];
  const rows = lines.map(([one, at]) => {
    const open = element("button", { type: "button" }, `${at}`);
    open.addEventListener("click", () => go(at));
    const gain = one.after === null ? null : one.after - one.before;
    return element("tr", { "aria-current": at === view.step ? "true" : null }, element("td", { class: "n" }, open), element("td", {}, one.taken ? "accepted" : "rejected"),
      element("td", { class: "n" }, `${one.position}`), element("td", {}, element("code", {}, visible(one.old))), element("td", {}, element("code", {}, visible(one.made))),
      element("td", { class: "n" }, number(one.after)), element("td", { class: "n" }, signed(gain)), element("td", { class: "n" }, si(one.flops, "FLOPs")));
  });
  const heads = ["", "", "position", "old", "new", "reward", "gain", "spent by then"].map((text) => element("th", {}, text));
  const title = incumbent ? `Proposed against the response after ${incumbent} accepted` : "Proposed against the first response";
  return [element("h3", {}, title), element("div", { class: "scroll tall", tabindex: "0" }, element("table", { class: "others" },
    element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)))];
}

function ending(trace, at) {
  if (at < trace.steps.length) return [];
  return [element("h3", {}, "Final response"), element("pre", {}, trace.response),
    element("p", {}, "Answer ", element("b", {}, trace.answers[1] ?? "none found"), " ", mark(trace.verdicts[1]), ", gold ", element("b", {}, trace.gold ?? "none"), ".")];
}

// --- one held-out problem ---

function showProblem(problem) {
  view.trace = null;
  const { base, ours } = sources.rows;
  const rows = problem.rows.map((row) => element("tr", { "aria-current": row.method === base || row.method === ours ? "true" : null },
    element("td", {}, row.method), element("td", { class: "n" }, `${row.seed}`), element("td", {}, mark(row.correct), ` ${row.error ?? row.answer ?? "none"}`),
    element("td", { class: "n" }, number(row.reward)), element("td", { class: "n" }, si(row.flops, "FLOPs")), element("td", { class: "n" }, si(row.seconds, "s")),
    element("td", { class: "n" }, row.proposals ? `${row.accepted} of ${row.proposals}` : "–")));
  const heads = ["method", "seed", "answer", "reward", "FLOPs", "seconds", "accepted"].map((text) => element("th", {}, text));
  const searches = problem.rows.filter((row) => row.method === ours && row.rounds.length > 1);
  const level = problem.level === null ? [] : [fact("level", problem.level)];
  $("#detail").replaceChildren(element("h3", {}, problem.id),
    ...(problem.question ? [element("pre", { class: "prompt" }, problem.question)] : []),
    element("ul", { class: "facts" }, fact("gold", problem.gold ?? "none"), ...level),
    ...searches.flatMap((row) => [element("small", {}, `${row.method}, seed ${row.seed}: reward of the response kept, by round`), rounds(row.rounds)]),
    element("div", { class: "scroll" }, element("table", { class: "others" }, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows))),
    element("p", { class: "note" }, "Rows keep answers, rewards and costs, but no responses: those can be stepped through in the training traces."));
}

function rounds(values) {
  const known = values.filter((value) => value !== null), [low, high] = [Math.min(...known), Math.max(...known)];
  const WIDTH = Math.max($("#detail").clientWidth, 280);
  const x = (at) => 56 + (at * (WIDTH - 70)) / (values.length - 1), y = (value) => (high > low ? 10 + ((high - value) * 60) / (high - low) : 40);
  const rules = [...new Set([low, high])].flatMap((value) => [element("svg:line", { x1: 44, x2: WIDTH, y1: y(value), y2: y(value) }),
    element("svg:text", { x: 38, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2))]);
  const path = values.map((value, at) => (value === null ? "" : `${at ? `H${x(at)}V` : `M${x(at)} `}${y(value)}`)).join("");
  return element("svg:svg", { class: "curve", viewBox: `0 0 ${WIDTH} 80`, role: "img", "aria-label": "reward over rounds" }, ...rules, element("svg:path", { class: "step", d: path }));
}

// --- the whole ---

function choose(source) {
  view.source = source;
  $$("[data-source]").forEach((one) => one.setAttribute("aria-pressed", one.dataset.source === source));
  view.items = sources[source].items;
  const { base, ours } = sources.rows;
  $("#meaning").textContent = source === "traces"
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
