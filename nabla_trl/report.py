"""Result rows and run facts -> summary.json, report.md and plots. Every sentence is computed from numbers.

`rows` are the dictionaries of rows.jsonl, one per (method, task, problem, seed).
`facts` tells how they were made: title, command, policy, reward, task, reward_kind ("log-ratio" or "scalar")
and, where known, versions, seeds, train_flops (traces and training), train_seconds, setup_seconds,
total_seconds, files {label: path}, notes [sentence] and audit: {"verdict": sentence, "auc": number,
"best_of_n": {N: {"value", "low", "high"}}} with any further numbers by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nabla_trl import stats
from nabla_trl.stats import Grid, Interval

Summary = dict[str, dict[str, float]]

FLOPS_SHARE = 1 / 3  # target: nabla reaches best-of-16 at no more than this share of its FLOPs
GAIN_SHARE = 0.6  # target: the share of nabla's gain that one greedy decode keeps after distillation
EQUAL_FLOPS = 0.9  # a control that spent less than this share of nabla's FLOPs was not given an equal budget
RIVAL = "reward_model_sampling"
RIVAL_NOTE = f"The reward is a log-ratio, so the obvious rival is sampling from the better model itself, {RIVAL}"
NO_TURN = "Nowhere is the run with the most FLOPs worse than a cheaper one of its kind, beyond chance."
_EXPECTED = (
    "greedy",
    "best_of_8",
    "best_of_16",
    "control",
    "nabla",
    "distilled_greedy",
    "distilled_best_of_8",
)
_FACTS = ("title", "command", "policy", "reward", "task", "reward_kind")
_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P", 6: "E", 7: "Z", 8: "Y"}


def summarise(rows: Sequence[Mapping], facts: Mapping) -> Summary:
    """The content of summary.json: name -> {"value", "low", "high", "seeds", "problems"}.

    Names: accuracy., flops., seconds., reward., errors.<method> (FLOPs and seconds per problem);
    paired.<a>-<b> (accuracy of a minus b) and p_value.<a>-<b>; recovered.distilled_greedy;
    break_even.distilled_greedy-<method> (queries); flops.training, seconds.training, seconds.setup and
    seconds.total. A name whose rows or facts are not there is left out. Raises ValueError on rows that are
    incomplete, repeated or of several tasks.
    """
    grids = stats.grids(rows)
    found: dict[str, Interval] = {}
    for metric in stats.METRICS:
        for method, grid in grids.items():
            if any(map(math.isfinite, grid.columns[metric].ravel())):
                found[f"{metric}.{method}"] = stats.mean_interval(grid.columns[metric])
    for method, grid in grids.items():
        found[f"errors.{method}"] = Interval.exact(grid.errors, len(grid.seeds), len(grid.problems))
    for a, b in dict.fromkeys([*_pairs(grids), *_turning_pairs(grids)]):
        gap = stats.paired_difference(grids[a].scores("accuracy"), grids[b].scores("accuracy"))
        found[f"paired.{a}-{b}"] = gap
        found[f"p_value.{a}-{b}"] = Interval.exact(gap.p_value, gap.seeds, gap.problems)
    found |= _training_entries(grids, facts)
    clocks = {"setup": "setup_seconds", "total": "total_seconds", "training": "train_seconds"}
    for name, fact in clocks.items():
        if _known(facts, fact):
            found[f"seconds.{name}"] = Interval.exact(facts[fact])
    return {name: one.entry() for name, one in found.items()}


def write_report(folder: str | Path, rows: Sequence[Mapping], facts: Mapping) -> Summary:
    """Write summary.json, report.md and plots/*.png under `folder`, each atomically; returns the summary.

    Raises ValueError on rows or facts that `summarise` refuses; nothing is written then.
    """
    from nabla_trl import plots  # here, so that a terminal table does not load matplotlib

    missing = [name for name in _FACTS if not _known(facts, name)]
    if missing:
        raise ValueError(f"the run facts lack {', '.join(missing)}")
    summary = summarise(rows, facts)
    folder = Path(folder)
    rounds = {name: stats.reward_rounds(grid) for name, grid in stats.grids(rows).items() if _searches(name)}
    drawn = plots.draw(folder / "plots", summary, rounds, titles=_titles(summary, facts))
    _write(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    _write(folder / "report.md", "\n\n".join(_sections(summary, rows, facts, folder, drawn)) + "\n")
    return summary


def terminal_table(summary: Summary, console: Console | None = None) -> None:
    """Print method, accuracy, FLOPs (also as a share of best_of_16's) and time per problem."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy [95%]", "FLOPs", "× bo16", "time", "errors"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in methods(summary):
        flops = _cost(summary, "flops", method).removesuffix("FLOPs")
        errors = str(round(summary[f"errors.{method}"]["value"]))
        costs = (flops, _relative(summary, method), _cost(summary, "seconds", method))
        table.add_row(method, accuracy(summary, method), *costs, errors)
    (console or Console()).print(table)


def methods(summary: Summary) -> list[str]:
    """The methods of a summary, in the order of the report."""
    return [name.partition(".")[2] for name in summary if name.startswith("accuracy.")]


def accuracy(summary: Summary, method: str) -> str:
    """An accuracy as it is always printed: with its interval."""
    return _span(summary[f"accuracy.{method}"])


def si(value: float, unit: str = "") -> str:
    """Three significant digits and an SI prefix: 1.2e8, "FLOPs" -> "120 MFLOPs"."""
    value = float(f"{value:.3g}")
    power = math.floor(math.log10(abs(value)) / 3) if value else 0
    power = min(max(power, min(_PREFIXES)), max(_PREFIXES))
    return f"{value / 1000.0**power:.3g} {_PREFIXES[power]}{unit}".rstrip()


# ---------------------------------------------------------------------------------------------------- numbers


def _pairs(grids: Mapping[str, Grid]) -> list[tuple[str, str]]:
    ours = [name for name in grids if stats.family(name)[0] == "nabla"]
    wanted = [(name, name.replace("nabla", "control")) for name in ours]
    wanted += [(name, "best_of_16") for name in ours]
    wanted += [("nabla", "greedy"), ("distilled_greedy", "greedy"), ("distilled_greedy", "nabla")]
    wanted += [("distilled_best_of_8", "best_of_8"), ("nabla", RIVAL)]
    if "nabla" not in grids and ours:
        wanted += [(ours[-1], "greedy"), (ours[-1], RIVAL)]
    return [(a, b) for a, b in wanted if a in grids and b in grids]


def _turning_pairs(grids: Mapping[str, Grid]) -> list[tuple[str, str]]:
    """For best-of-N, control and nabla: the costliest run against the cheapest and against the best."""
    pairs = []
    for name in ("best_of", "control", "nabla"):
        curve = [method for method in grids if stats.family(method)[0] == name]
        curve.sort(key=lambda method: grids[method].columns["flops"].mean())
        if len(curve) > 1:
            best = max(curve, key=lambda method: grids[method].columns["accuracy"].mean())
            pairs += [(curve[-1], other) for other in dict.fromkeys([curve[0], best]) if other != curve[-1]]
    return pairs


def _training_entries(grids: Mapping[str, Grid], facts: Mapping) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    trio = ("distilled_greedy", "nabla", "greedy")
    if grids.keys() >= set(trio):
        share = stats.share_of_gain(*(grids[method].scores("accuracy") for method in trio))
        found |= {"recovered.distilled_greedy": share} if share else {}
    if not _known(facts, "train_flops"):
        return found
    spent = float(facts["train_flops"])
    found["flops.training"] = Interval.exact(spent)
    for method in grids if "distilled_greedy" in grids else ():
        own, theirs = (grids[name].scores("flops") for name in ("distilled_greedy", method))
        saved = stats.paired_difference(theirs, own)
        if saved.low > 0 and not method.startswith("distilled"):
            queries = (spent / saved.value, spent / saved.high, spent / saved.low)
            found[f"break_even.distilled_greedy-{method}"] = Interval(*queries, saved.seeds, saved.problems)
    return found


def _known(facts: Mapping, name: str) -> bool:
    return facts.get(name) is not None


def _searches(method: str) -> bool:
    return stats.family(method)[0] in ("nabla", "control")


def _ratio(summary: Summary, cost: str, a: str, b: str) -> float:
    top, bottom = summary.get(f"{cost}.{a}"), summary.get(f"{cost}.{b}")
    return top["value"] / bottom["value"] if top and bottom and bottom["value"] else math.nan


def _missing(summary: Summary, *names: str) -> list[str]:
    return [name for name in names if f"accuracy.{name}" not in summary]


def _main_nabla(summary: Summary) -> str | None:
    ours = [method for method in methods(summary) if stats.family(method)[0] == "nabla"]
    return ours[-1] if ours else None


def _nabla_within(summary: Summary) -> str | None:
    """The costliest nabla run within the target's share: chosen by cost, so that luck can't choose."""
    ours = [m for m in methods(summary) if stats.family(m)[0] == "nabla"]
    within = [m for m in ours if _ratio(summary, "flops", m, "best_of_16") <= FLOPS_SHARE]
    return max(within, key=lambda m: summary[f"flops.{m}"]["value"], default=None)


# ------------------------------------------------------------------------------------------- figures in words


def _span(one: Mapping[str, float], form: str = ".3f") -> str:
    return f"{one['value']:{form}} [{one['low']:{form}}, {one['high']:{form}}]"


def _gap(summary: Summary, a: str, b: str) -> str:
    one = summary[f"paired.{a}-{b}"]
    side = "ahead" if one["low"] > 0 else "behind" if one["high"] < 0 else "not distinguishable from zero"
    return f"paired difference {_span(one, '+.3f')}, {_chance(summary, a, b)}: {side}"


def _chance(summary: Summary, a: str, b: str) -> str:
    p_value = summary[f"p_value.{a}-{b}"]["value"]
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def _cost(summary: Summary, cost: str, method: str) -> str:
    one = summary.get(f"{cost}.{method}")
    return si(one["value"], "s" if cost == "seconds" else "FLOPs") if one else "–"


def _relative(summary: Summary, method: str) -> str:
    ratio = _ratio(summary, "flops", method, "best_of_16")
    return f"{ratio:.2f}" if math.isfinite(ratio) else "–"


def _against_best_of_16(summary: Summary, method: str) -> str:
    return (
        f"{method} reaches {accuracy(summary, method)} at {_relative(summary, method)} of best_of_16's FLOPs "
        f"(best_of_16: {accuracy(summary, 'best_of_16')}); {_gap(summary, method, 'best_of_16')}"
    )


def _against_control(summary: Summary, method: str, control: str) -> str:
    return (
        f"{method} {accuracy(summary, method)} against {control} {accuracy(summary, control)}, which spent "
        f"{_ratio(summary, 'flops', control, method):.2f} of its FLOPs; {_gap(summary, method, control)}"
    )


def targets(summary: Summary) -> list[tuple[str, str, str]]:
    """(target, measurement, verdict) by figure to reach; verdicts: reached, NOT reached, not measured."""
    share, gain = f"{FLOPS_SHARE:.2f}", f"{GAIN_SHARE:.0%}"
    return [
        (f"nabla reaches best_of_16 at no more than {share} of its FLOPs", *_cheap_target(summary)),
        ("nabla beats the control at equal FLOPs, paired interval without zero", *_control_target(summary)),
        (f"distilled_greedy keeps at least {gain} of nabla's gain over greedy", *_distilled_target(summary)),
    ]


def _cheap_target(summary: Summary) -> tuple[str, str]:
    main = _main_nabla(summary)
    if main is None or _missing(summary, "best_of_16"):
        return f"missing: {'nabla' if main is None else 'best_of_16'}", "not measured"
    method = _nabla_within(summary)
    if method is None:
        return f"no nabla run was that cheap: {_against_best_of_16(summary, main)}", "NOT reached"
    reached = summary[f"paired.{method}-best_of_16"]["value"] >= 0
    return _against_best_of_16(summary, method), "reached" if reached else "NOT reached"


def _control_target(summary: Summary) -> tuple[str, str]:
    method = _nabla_within(summary) or _main_nabla(summary)
    control = method.replace("nabla", "control") if method else "control"
    if method is None or _missing(summary, control):
        return f"missing: {control if method else 'nabla'}", "not measured"
    measured = _against_control(summary, method, control)
    if _ratio(summary, "flops", control, method) < EQUAL_FLOPS:
        return f"the budgets were not equal: {measured}", "not measured"
    return measured, "reached" if summary[f"paired.{method}-{control}"]["low"] > 0 else "NOT reached"


def _distilled_target(summary: Summary) -> tuple[str, str]:
    missing = _missing(summary, "distilled_greedy", "greedy", "nabla")
    if missing:
        return f"missing: {', '.join(missing)}", "not measured"
    share = summary.get("recovered.distilled_greedy")
    if share is None:
        gap = _gap(summary, "nabla", "greedy")
        return f"nabla's gain over greedy may be zero, so a share of it means nothing: {gap}", "NOT reached"
    cost = _ratio(summary, "flops", "distilled_greedy", "greedy")
    measured = (
        f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}] of the gain: greedy "
        f"{accuracy(summary, 'greedy')}, distilled_greedy {accuracy(summary, 'distilled_greedy')}, nabla "
        f"{accuracy(summary, 'nabla')}; {cost:.2f} of greedy's FLOPs per query"
    )
    return measured, "reached" if share["value"] >= GAIN_SHARE else "NOT reached"


def verdict(summary: Summary, facts: Mapping) -> list[str]:
    """What the numbers say, one sentence per comparison that was measured."""
    found = []
    for method in methods(summary):
        if f"paired.{method}-best_of_16" in summary:
            found.append(_against_best_of_16(summary, method))
    for method in methods(summary):
        control = method.replace("nabla", "control")
        if f"paired.{method}-{control}" in summary:
            found.append(_against_control(summary, method, control))
    for a, b in (("nabla", "greedy"), ("distilled_greedy", "greedy"), ("distilled_best_of_8", "best_of_8")):
        if f"paired.{a}-{b}" in summary:
            found.append(f"{a} {accuracy(summary, a)} against {b} {accuracy(summary, b)}; {_gap(summary, a, b)}")
    absent = _missing(summary, *_EXPECTED)
    note = [f"Missing, and so not compared: {', '.join(absent)}."] if absent else []
    return [f"{sentence}." for sentence in found] + _rival(summary, facts) + note


def _rival(summary: Summary, facts: Mapping) -> list[str]:
    if facts["reward_kind"] != "log-ratio":
        return []
    ours = _main_nabla(summary)
    if ours is None or _missing(summary, RIVAL):
        return [f"{RIVAL_NOTE}; missing: {RIVAL if ours else 'nabla'}."]
    gap = summary[f"paired.{ours}-{RIVAL}"]
    winner = f"{ours} wins" if gap["low"] > 0 else "the rival wins" if gap["high"] < 0 else "neither is ahead"
    cost = f"{accuracy(summary, RIVAL)} at {_ratio(summary, 'flops', RIVAL, ours):.2f} of {ours}'s FLOPs"
    measured = f"{cost}, {ours} {accuracy(summary, ours)}; {_gap(summary, ours, RIVAL)}"
    return [f"{RIVAL_NOTE}: {measured}. Here {winner}."]


def _titles(summary: Summary, facts: Mapping) -> dict[str, str]:
    method = _nabla_within(summary) or _main_nabla(summary)
    titles = {}
    for cost in ("flops", "seconds"):
        ratio = _ratio(summary, cost, method, "best_of_16") if method else math.nan
        unit = "FLOPs" if cost == "flops" else "seconds"
        titles[cost] = f"Accuracy against {unit} per problem"
        if method and math.isfinite(ratio):
            a, b = accuracy(summary, method), accuracy(summary, "best_of_16")
            titles[cost] = f"{method} scores {a} at {ratio:.2f} of best_of_16's {unit} ({b})"
    problems = max(one["problems"] for one in summary.values())
    titles["subject"] = f"{facts['task']}, {problems} held-out problems"
    return titles


# --------------------------------------------------------------------------------------------------- the page


def _sections(
    summary: Summary, rows: Sequence[Mapping], facts: Mapping, folder: Path, drawn: Mapping[str, Path]
) -> list[str]:
    return [
        f"# {facts['title']}",
        _statement(summary, rows, facts),
        "## Verdict",
        _bullets(verdict(summary, facts)),
        "## Figures to reach",
        _table(["target", "measured", "verdict"], targets(summary)),
        _target_note(facts),
        "## Results",
        _results(summary),
        *([RIVAL_NOTE + "."] if facts["reward_kind"] == "log-ratio" else []),
        "## Paired differences of accuracy",
        _paired(summary),
        "## Is the reward sound under search?",
        turning(summary),
        _audit(facts),
        "## Break-even",
        _break_even(summary, facts),
        "## Plots",
        *_plots(drawn, folder),
        "## Provenance",
        _provenance(summary, facts),
        "## Files",
        _files(facts, folder, drawn),
    ]


def _statement(summary: Summary, rows: Sequence[Mapping], facts: Mapping) -> str:
    problems = max(one["problems"] for one in summary.values())
    wrong = round(sum(one["value"] for name, one in summary.items() if name.startswith("errors.")))
    ungraded = sum(row["correct"] is None and row["error"] is None for row in rows)
    head = (
        f"{len(methods(summary))} methods on {problems} held-out problems of {facts['task']}: policy "
        f"`{facts['policy']}`, {facts['reward_kind']} reward `{facts['reward']}`. Of {len(rows)} rows "
        f"{wrong} ended in an error and {ungraded} could not be graded; they count as wrong."
    )
    return (
        f"{head} Brackets hold 95% bootstrap intervals over problems, the seeds of a problem averaged first. "
        "FLOPs and seconds are per problem, rejected work included. An interval without width says that all "
        "problems agreed, not that the figure is certain."
    )


def _target_note(facts: Mapping) -> str:
    note = "The first asks for an accuracy no lower than best_of_16's; its paired interval says how surely."
    if facts["reward_kind"] == "log-ratio":
        return note
    return f"{note} The first two were set for a log-ratio reward; this run has a {facts['reward_kind']} one."


def _results(summary: Summary) -> str:
    heads = ["method", "accuracy", "reward", "FLOPs / problem", "× best_of_16", "seconds / problem"]
    lines = []
    for method in methods(summary):
        one = summary[f"accuracy.{method}"]
        reward = summary.get(f"reward.{method}")
        costs = [
            _cost(summary, "flops", method),
            _relative(summary, method),
            _cost(summary, "seconds", method),
        ]
        counts = [one["seeds"], one["problems"], round(summary[f"errors.{method}"]["value"])]
        lines.append([method, _span(one), _span(reward, ".3g") if reward else "–", *costs, *counts])
    return _table([*heads, "seeds", "problems", "errors"], lines)


def _paired(summary: Summary) -> str:
    lines = []
    for name, one in summary.items():
        if name.startswith("paired."):
            a, b = _sides(name)
            chance = _chance(summary, a, b).removeprefix("p = ").removeprefix("p ")
            lines.append([f"{a} − {b}", _span(one, "+.3f"), chance, f"{_ratio(summary, 'flops', a, b):.2f}"])
    if not lines:
        return "Missing: no two methods that belong together were evaluated."
    note = "p: two-sided sign-flip permutation test over problems, not corrected for how many tests there are."
    return _table(["a − b", "difference", "p", "FLOPs a / b"], lines) + f"\n\n{note}"


def turning(summary: Summary) -> str:
    """Whether accuracy falls as best-of-N, the control and nabla are given more FLOPs: a list in Markdown."""
    pairs = [_sides(name) for name in summary if name.startswith("paired.")]
    pairs = [(a, b) for a, b in pairs if stats.family(a)[0] == stats.family(b)[0]]
    lines = [
        f"{a} (most FLOPs) {accuracy(summary, a)} against {b} {accuracy(summary, b)}; {_gap(summary, a, b)}."
        for a, b in pairs
    ]
    if not lines:
        return "Missing: no method was evaluated at several budgets."
    falls = dict.fromkeys(a for a, b in pairs if summary[f"paired.{a}-{b}"]["high"] < 0)
    end = f"Accuracy turns under more search: {', '.join(falls)}." if falls else NO_TURN
    return _bullets([*lines, end])


def _audit(facts: Mapping) -> str:
    audit = facts.get("audit")
    if not audit:
        return "Missing: the reward was not audited."
    curve = {int(count): one for count, one in audit.get("best_of_n", {}).items()}
    figures = [[f"best of {count}", _span(curve[count])] for count in sorted(curve)]
    figures += [[name, f"{one:.3f}"] for name, one in audit.items() if isinstance(one, (int, float))]
    return f"Audit before the search: {audit['verdict']}\n\n" + _table(["audit", "value"], figures)


def _break_even(summary: Summary, facts: Mapping) -> str:
    if "flops.training" not in summary or _missing(summary, "distilled_greedy"):
        missing = "distilled_greedy" if "flops.training" in summary else "the FLOPs of training"
        return f"Missing: {missing}."
    own = _cost(summary, "flops", "distilled_greedy")
    clock = f" in {si(facts['train_seconds'], 's')}" if _known(facts, "train_seconds") else ""
    head = (
        f"Traces and training took {si(facts['train_flops'], 'FLOPs')}{clock}; one query of distilled_greedy "
        f"costs {own}. Queries after which that has cost less in all than answering with:"
    )
    lines, never = [], []
    for method in methods(summary):
        one = summary.get(f"break_even.distilled_greedy-{method}")
        if one:
            low, value, high = (si(one[key]) for key in ("low", "value", "high"))
            lines.append([method, accuracy(summary, method), f"{value} [{low}, {high}]"])
        elif not method.startswith("distilled"):
            never.append(method)
    page = f"{head}\n\n" + _table(["method", "accuracy", "queries"], lines) if lines else head
    return page + (f"\n\nNever, as each query costs no less than theirs: {', '.join(never)}." if never else "")


def _plots(drawn: Mapping[str, Path], folder: Path) -> list[str]:
    names = {
        "accuracy_flops": "Accuracy against FLOPs per problem",
        "accuracy_seconds": "Accuracy against seconds per problem",
        "reward_rounds": "Reward over rounds",
        "break_even": "Break-even",
    }
    images = [f"![{names[key]}]({path.relative_to(folder).as_posix()})" for key, path in drawn.items()]
    absent = [title for key, title in names.items() if key not in drawn]
    return images + ([f"Not drawn for want of rows or facts: {', '.join(absent)}."] if absent else [])


def _provenance(summary: Summary, facts: Mapping) -> str:
    lines = [f"policy: `{facts['policy']}`", f"reward: `{facts['reward']}` ({facts['reward_kind']})"]
    lines += [f"seeds: {', '.join(map(str, facts['seeds']))}"] if _known(facts, "seeds") else []
    lines += [f"{name}: {version}" for name, version in (facts.get("versions") or {}).items()]
    clocks = {"setup": "set-up", "training": "traces and training", "total": "in all"}
    for key, words in clocks.items():
        if f"seconds.{key}" in summary:
            lines.append(f"seconds, {words}: {summary[f'seconds.{key}']['value']:.1f}")
    lines += facts.get("notes") or []
    return f"```\n{facts['command']}\n```\n\n{_bullets(lines)}"


def _files(facts: Mapping, folder: Path, drawn: Mapping[str, Path]) -> str:
    files = {**(facts.get("files") or {}), "summary": folder / "summary.json"}
    files |= {f"plot, {key}": path for key, path in drawn.items()}
    return _bullets(f"{label}: `{_near(Path(path), folder)}`" for label, path in files.items())


def _near(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _sides(name: str) -> tuple[str, str]:
    """paired.<a>-<b> -> (a, b); the names of methods hold no hyphen."""
    a, _, b = name.removeprefix("paired.").partition("-")
    return a, b


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: Sequence[str], lines: Iterable[Sequence]) -> str:
    def line(cells: Iterable) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, lines)])


def _write(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
