// One trace of the viewer: what it is, its reward over proposals, and each proposal against what it was proposed
// against. `view`, `tokens` and `special` are viewer.js's.

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

// The parts of a trace for the page; `go(0)` fills in its step once they are there.
function traceParts(trace) {
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
  return parts;
}

function showTrace(trace) {
  $("#detail").replaceChildren(...traceParts(trace));
  if (trace.initial.length) go(0);
}

const fact = (name, ...value) => element("li", {}, element("b", {}, name), ...value);

// The incumbent's reward over proposals, and every proposal's own.
function curve(trace) {
  const values = [trace.rewards[0], ...trace.steps.map((one) => one.after)];
  const known = values.filter((value) => value !== null);
  if (!known.length) return element("div");
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
