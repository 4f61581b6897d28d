// One trace of the viewer: its facts, its reward over proposals, and each proposal beside the response that it was
// proposed against. `view`, `tokens` and `specialIds` are in viewer.js.

// --- formatting ---

const OUTCOME_SIGNS = { 1: ["✓", "right"], 0: ["✗", "wrong"] };
function outcomeSign(correct) {
  const [sign, kind] = OUTCOME_SIGNS[correct] ?? ["?", "unknown"];
  return element("span", { class: kind, title: kind === "unknown" ? "not known" : kind }, sign);
}
const formatNumber = (value) => value?.toFixed(3) ?? "–";
const formatSigned = (value) => (value === null ? "–" : `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(3)}`);
const difference = (a, b) => (a === null || b === null ? null : a - b);
const PREFIXES = ["n", "µ", "m", "", "k", "M", "G", "T", "P", "E"];
function formatSi(value, unit) {
  if (value === null) return "–";
  if (!value) return `0 ${unit}`;
  const power = Math.min(Math.max(Math.floor(Math.log10(Math.abs(value)) / 3), -3), 6);
  return `${Number((value / 1000 ** power).toPrecision(3))} ${PREFIXES[power + 3]}${unit}`;
}
const formatSeconds = (value) => (value < 120 ? formatSi(value, "s") : value < 7200 ? `${Number((value / 60).toPrecision(3))} min` : `${Number((value / 3600).toPrecision(3))} h`);
const tokenText = (id) => tokens.texts[id] ?? `⟨${id}⟩`;
// A token that is visible where it stands alone: spaces and line breaks become signs.
const visibleToken = (id) => tokenText(id).replace(/^ | $/g, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || `⟨${id}⟩`;
const factItem = (name, ...value) => element("li", {}, element("b", {}, name), ...value);

function makeTable(heads, rows) {
  return element("table", { class: "others" }, element("thead", {}, element("tr", {}, ...heads.map((head, column) => element("th", { scope: "col", class: rows.length && rows[0].cells[column].className === "n" ? "n" : null }, head)))),
    element("tbody", {}, ...rows));
}
// Cells of numbers are given as strings, all others as nodes.
const tableRow = (current, cells) => element("tr", { "aria-current": current ? "true" : null },
  ...cells.map((cell) => element("td", { class: typeof cell === "string" ? "n" : null }, cell)));

// --- one trace ---

// Adds to each revision the response that it was proposed against, and the number of this incumbent.
function reconstructSteps(trace) {
  let incumbent = trace.initial_ids, base = incumbent, round = null, numAccepted = 0, incumbentIndex = 0;
  trace.steps = trace.revisions.map(([ownRound, position, suffix, rewardBefore, rewardAfter, accepted, flops]) => {
    if (ownRound !== round) { base = incumbent; round = ownRound; incumbentIndex = numAccepted; }
    if (accepted) { incumbent = base.slice(0, position).concat(suffix); numAccepted += 1; }
    return { round, position, suffix, rewardBefore, rewardAfter, accepted, flops, base, incumbentIndex, oldToken: base[position], newToken: suffix[0] };
  });
  trace.numAccepted = numAccepted;
  return trace;
}

// The parts of a trace for the page. `showStep(0)` fills in the first step once they are there.
function traceParts(trace) {
  view.trace = trace;
  view.step = 0;
  const [first, last] = trace.correct;
  const parts = [element("h3", {}, `${trace.id} · seed ${trace.seed} · ${trace.method}`),
    element("pre", { class: "prompt" }, trace.prompt),
    element("ul", { class: "facts" },
      factItem("first answer", outcomeSign(first), ` ${trace.answers[0] ?? "not known"}`),
      factItem("final answer", outcomeSign(last), ` ${trace.answers[1] ?? "none found"}`),
      factItem("gold", trace.gold ?? "none"),
      factItem("reward", `${formatNumber(trace.rewards[0])} → ${formatNumber(trace.rewards[1])}`),
      factItem("proposals", `${trace.steps.length}, ${trace.numAccepted} accepted`),
      factItem("cost", `${formatSi(trace.flops, "FLOPs")}, ${formatSeconds(trace.seconds)}`),
      factItem("stop reason", trace.finished ? trace.stop_reason : `${trace.stop_reason}, response cut off`))];
  if (trace.error) parts.push(element("p", { class: "wrong" }, trace.error));
  if (trace.initial_ids.length) parts.push(rewardCurve(trace), controls(trace), element("div", { id: "step" }));
  return parts;
}

function showTrace(trace) {
  $("#detail").replaceChildren(...traceParts(trace));
  if (trace.initial_ids.length) showStep(0);
}

// The coordinates of a curve, and the lines and labels at its ends.
function curveFrame(values, height) {
  const known = values.filter((value) => value !== null), low = Math.min(...known), high = Math.max(...known);
  const width = Math.max($("#detail").clientWidth, 280), left = 44;
  const x = (at) => left + 12 + (at * (width - left - 24)) / Math.max(values.length - 1, 1);
  const y = (value) => (high > low ? 12 + ((high - value) * (height - 24)) / (high - low) : height / 2);
  const rules = [...new Set([low, high])].flatMap((value) => [element("svg:line", { x1: left, x2: width, y1: y(value), y2: y(value) }),
    element("svg:text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2))]);
  const path = (heights) => element("svg:path", {
    class: "step", d: heights.map((value, at) => (value === null ? "" : `H${x(at)}V${y(value)}`)).join("").replace(/^H([^V]*)V/, "M$1 "),
  });
  const svg = (name, ...parts) => element("svg:svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name }, ...rules, ...parts);
  return { x, y, path, svg };
}

// The incumbent's reward over proposals, and that of every proposal.
function rewardCurve(trace) {
  const values = [trace.rewards[0], ...trace.steps.map((step) => step.rewardAfter)];
  if (values.every((value) => value === null)) return element("div");
  const { x, y, path, svg } = curveFrame(values, 130);
  let current = trace.rewards[0];
  const incumbents = values.map((value, at) => {
    if (current !== null && trace.steps[at - 1]?.accepted) current = value;
    return current;
  });
  const dots = values.map((value, at) => {
    if (value === null) return null;
    const step = trace.steps[at - 1], outcome = step?.accepted ? "accepted" : "rejected";
    const title = step ? `proposal ${at}: reward ${formatNumber(value)}, ${outcome}` : `first response: reward ${formatNumber(value)}`;
    const dot = element("svg:circle", { cx: x(at), cy: y(value), r: 4.5, class: !step || step.accepted ? "accepted" : "", "data-step": at },
      element("svg:title", {}, title));
    dot.addEventListener("click", () => showStep(at));
    return dot;
  });
  return element("div", {}, element("small", {}, "Reward by proposal (filled: accepted, hollow: rejected). The line is the reward of the selected response."),
    svg("reward over proposals", path(incumbents), ...dots));
}

function controls(trace) {
  const button = (id, text, title, act) => {
    const node = element("button", { type: "button", id, title }, text);
    node.addEventListener("click", act);
    return node;
  };
  const hasGradient = trace.predicted_gain.levels.length > 0;
  if (view.color === "gradient" && !hasGradient) view.color = "change";
  const color = element("select", { id: "color" },
    element("option", { value: "change" }, "what changed"),
    element("option", { value: "gradient", disabled: !hasGradient }, hasGradient ? "gradient" : "gradient (not recorded)"),
    element("option", { value: "attempts" }, "number of attempts"));
  color.value = view.color;
  color.addEventListener("change", () => { view.color = color.value; showStep(view.step); });
  const only = element("input", { type: "checkbox", id: "accepted" });
  only.checked = view.accepted;
  only.addEventListener("change", () => { view.accepted = only.checked; });
  return element("div", { class: "steps" },
    button("first", "|←", "first response (Home)", () => showStep(0)), button("previous", "←", "previous proposal (←)", () => moveStep(-1)),
    element("output", { id: "step-position" }), button("next", "→", "next proposal (→)", () => moveStep(1)),
    button("last", "→|", "last proposal (End)", () => showStep(trace.steps.length)),
    element("label", {}, only, " accepted only"), element("label", {}, "colors ", color));
}

function moveStep(by) {
  const steps = view.trace.steps;
  let at = view.step + by;
  while (view.accepted && at > 0 && at <= steps.length && !steps[at - 1].accepted) at += by;
  if (at >= 0 && at <= steps.length) showStep(at);
}

function showStep(at) {
  const trace = view.trace, step = trace.steps[at - 1];
  view.step = at;
  $("#step-position").textContent = at ? `proposal ${at} of ${trace.steps.length}` : "first response";
  $("#first").disabled = $("#previous").disabled = at === 0;
  $("#next").disabled = $("#last").disabled = at === trace.steps.length;
  $$(".curve circle").forEach((dot) => dot.classList.toggle("current", Number(dot.dataset.step) === at));
  $("#step").replaceChildren(...(step ? proposalBlock(trace, step) : firstResponse(trace)), legend(trace), ...otherProposals(trace, step), ...finalResponse(trace, at));
}

function firstResponse(trace) {
  return [element("p", { class: "change" }, `The first response, reward ${formatNumber(trace.rewards[0])}.`),
    tokenBlock(trace, trace.initial_ids, tokenStyles(trace, trace.initial_ids, 0))];
}

function proposalBlock(trace, step) {
  const { position, base, suffix, rewardBefore, rewardAfter } = step;
  const outcome = element("b", { class: step.accepted ? "right" : "wrong" }, step.accepted ? "accepted" : "rejected");
  const head = element("p", { class: "change" }, `Round ${step.round + 1}: at position ${position} `,
    element("code", {}, visibleToken(step.oldToken)), " became ", element("code", {}, visibleToken(step.newToken)),
    `, and the rest was sampled again. Reward ${formatNumber(rewardBefore)} → ${formatNumber(rewardAfter)} (${formatSigned(difference(rewardAfter, rewardBefore))}): `, outcome, ".");
  const proposal = base.slice(0, position).concat(suffix);
  const [gone, added] = diffTokens(base.slice(position), suffix).map((changes) => new Set([...changes].map((at) => at + position)));
  return [head, element("small", {}, "old: the response that was selected until then"),
    tokenBlock(trace, base, tokenStyles(trace, base, step.incumbentIndex, gone, "gone", position)),
    element("small", {}, "new: the proposal"),
    tokenBlock(trace, proposal, tokenStyles(trace, proposal, null, added, "added", position))];
}

// How a token of a response looks: [class, style, title] by position. `incumbentIndex` is null for a proposal.
function tokenStyles(trace, ids, incumbentIndex, changed = new Set(), kind = "", branch = -1) {
  const { max, levels_per_max: top, levels } = trace.predicted_gain;
  const gains = view.color === "gradient" && incumbentIndex !== null ? levels[incumbentIndex] : undefined;
  const attempts = view.color === "attempts" && incumbentIndex !== null ? new Map() : null;
  if (attempts) for (const step of trace.steps) if (step.incumbentIndex === incumbentIndex) attempts.set(step.position, (attempts.get(step.position) ?? 0) + 1);
  return (at) => {
    const names = at === branch ? ["branch"] : [];
    let style = "", title = `position ${at}, id ${ids[at]}`;
    if (gains) {
      style = heatBackground(Math.sqrt(gains[at] / top));
      title += `, predicted gain of reward ${((gains[at] / top) * max).toPrecision(3)}`;
    } else if (attempts) {
      style = heatBackground(Math.min(1, (attempts.get(at) ?? 0) / 3));
      title += `, ${attempts.get(at) ?? 0} attempts`;
    } else if (view.color === "change" || incumbentIndex === null) {
      if (changed.has(at)) names.push(kind);
      else if (at < branch) names.push("unchanged");
    }
    if (specialIds.has(ids[at])) names.push("special");
    return [names.join(" "), style, title];
  };
}

const heatBackground = (share) => (share > 0 ? `background: color-mix(in srgb, var(--vermilion) ${Math.round(75 * share)}%, transparent)` : "");

function tokenBlock(trace, ids, look) {
  const box = element("div", { class: "tokens", tabindex: "0" });
  if (!trace.has_token_texts && !ids.length) box.append("(empty)");
  ids.forEach((id, at) => {
    const [names, style, title] = look(at);
    box.append(element("span", { class: names || null, style: style || null, title }, trace.has_token_texts ? tokenText(id) : `${id} `));
  });
  return box;
}

function legend(trace) {
  const swatch = (style, text) => element("span", {}, element("i", { class: "swatch", style }), text);
  const parts = {
    gradient: () => [element("span", {}, ...[0.25, 0.6, 1].map((share) => swatch(heatBackground(share), "")),
      `largest gain of reward that the gradient predicts for another token at this position: from none to ${trace.predicted_gain.max.toPrecision(3)}, on a square-root scale. Proposals have no gradient.`)],
    attempts: () => [swatch(heatBackground(0.33), "one attempt"), swatch(heatBackground(1), "three or more attempts, at this response")],
    change: () => [swatch("background: var(--old)", "gone"), swatch("background: var(--new)", "new"), element("span", {}, "framed: the branch position; gray: unchanged")],
  };
  return element("p", { class: "legend" }, ...parts[view.color]());
}

// Positions of two lists of ids that the other list lacks, by a longest common subsequence.
function diffTokens(a, b) {
  let tail = 0;
  while (tail < Math.min(a.length, b.length) - 1 && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail += 1;
  const [n, m] = [a.length - tail, b.length - tail];
  const gone = new Set(Array.from({ length: n }, (_, at) => at)), added = new Set(Array.from({ length: m }, (_, at) => at));
  if (n * m > MAX_DIFF_CELLS) return [gone, added];
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

// All proposals against the same response.
function otherProposals(trace, step) {
  const incumbentIndex = step?.incumbentIndex ?? 0;
  const rows = trace.steps.flatMap((other, index) => {
    if (other.incumbentIndex !== incumbentIndex) return [];
    const open = element("button", { type: "button" }, `${index + 1}`);
    open.addEventListener("click", () => showStep(index + 1));
    const row = tableRow(index + 1 === view.step, [open, element("span", {}, other.accepted ? "accepted" : "rejected"), `${other.position}`,
      element("code", {}, visibleToken(other.oldToken)), element("code", {}, visibleToken(other.newToken)), formatNumber(other.rewardAfter),
      formatSigned(difference(other.rewardAfter, other.rewardBefore)), formatSi(other.flops, "FLOPs")]);
    return [row];
  });
  if (!rows.length) return [];
  const title = incumbentIndex ? `Proposed against the response after ${incumbentIndex} accepted` : "Proposed against the first response";
  const heads = ["", "", "position", "old", "new", "reward", "gain", "total FLOPs"];
  return [element("h3", {}, title), element("div", { class: "scroll tall", tabindex: "0" }, makeTable(heads, rows))];
}

function finalResponse(trace, at) {
  if (at < trace.steps.length) return [];
  return [element("h3", {}, "Final response"), element("pre", {}, trace.response),
    element("p", {}, "Answer ", element("b", {}, trace.answers[1] ?? "none found"), " ", outcomeSign(trace.correct[1]), ", gold ", element("b", {}, trace.gold ?? "none"), ".")];
}
