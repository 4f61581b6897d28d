"""Result rows and run facts -> summary.json, report.md, report.html, plots. Every sentence is computed from numbers.

`rows` are the dictionaries of rows.jsonl, one per (method, task, problem, seed).
`facts` tells how they were made: title, command, policy, reward, task, reward_kind (as `Reward.kind`)
and, where known, versions, seeds, sampling (the fields of `options.Sampling`), trained: [{"label", "method", "beta",
"tuning", "train_flops", "train_seconds"}] (traces or rollouts, training and audit; a number may be null),
setup_seconds, total_seconds, hardware, revisions {model: revision}, problems {held-out id: {"question", "level"}},
files {label: path}, notes [sentence] and audit: {"verdict": sentence, "auc": number,
"best_of_n": {N: {"value", "low", "high"}}} with any further numbers by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.grids import Grid, build_grids, reward_rounds
from nabla_trl.evaluation.method import LABELS, family, methods
from nabla_trl.evaluation.results import EXTRACTION, comparisons_lost, extractions
from nabla_trl.report import compute_tradeoff_page, samples
from nabla_trl.report.conclusions import (
    RIVAL_NOTE,
    accuracy,
    chance_in_words,
    cost_in_words,
    gap_in_words,
    plot_titles,
    relative_in_words,
    strict_differs,
    strict_in_words,
    targets,
    verdict,
)
from nabla_trl.report.summary import Summary, cost_ratio, is_known, summarise
from nabla_trl.utils.files import write_whole
from nabla_trl.utils.formatting import span
from nabla_trl.utils.markdown import bullets, table

NO_TURN = "Nowhere is the run with the most FLOPs worse than a cheaper one of its kind, beyond chance."
FIGURES = {
    "accuracy_flops": "Accuracy against FLOPs per problem",
    "accuracy_seconds": "Accuracy against seconds per problem",
    "reward_rounds": "Reward over rounds",
}
ALL_FIGURES = FIGURES | samples.FIGURES | compute_tradeoff_page.FIGURES
_FACTS = ("title", "command", "policy", "reward", "task", "reward_kind")


def write_report(folder: str | Path, rows: Sequence[Mapping], facts: Mapping) -> Summary:
    """Write summary.json, report.md, plots/*.png and report.html with report_data/ under `folder`, each atomically.

    The viewer of report.html shows the traces in `folder`/traces, where there are any. Returns the summary.

    Raises ValueError on rows or facts that `summarise` refuses; nothing is written then.
    """
    from nabla_trl.report import figures as figure_module
    from nabla_trl.report.html.page import page

    _check_facts(facts)
    summary = summarise(rows, facts)
    folder = Path(folder)
    grids = build_grids(rows)
    rounds = {name: reward_rounds(grid) for name, grid in grids.items() if _searches(name)}
    titles = plot_titles(summary, facts)
    figures = figure_module.figures(summary, rounds, titles)
    drawn = figure_module.draw(folder / "plots", figures)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    sections = _sections(summary, rows, grids, facts, folder, drawn)
    blocks = [block for name, own in sections.items() for block in ([f"## {name}"] if name else []) + own]
    write_whole(folder / "report.md", "\n\n".join(blocks) + "\n")
    html = page(folder, sections, summary, rows, facts, rounds, figures, titles)
    write_whole(folder / "report.html", html)
    return summary


def terminal_table(summary: Summary, console: Console | None = None) -> None:
    """Print method, accuracy (strict, too, where that differs), FLOPs (also as a share of best_of_16's), time and
    errors, if any; of samples pass@k and maj@k."""
    console = console or Console()
    if methods(summary):
        console.print(_terminal_methods(summary))
    if metrics.curves(summary):
        console.print(_terminal_samples(summary))


def _check_facts(facts: Mapping) -> None:
    missing = [name for name in _FACTS if not is_known(facts, name)]
    if missing:
        raise ValueError(f"the run facts lack {', '.join(missing)}")
    kinds: dict[str, type] = dict.fromkeys(_FACTS, str) | {"seeds": list, "problems": Mapping, "versions": Mapping}
    for name, kind in kinds.items():
        if is_known(facts, name) and not isinstance(facts[name], kind):
            raise ValueError(f"the run facts hold no {name} that can be read: {facts[name]!r}")


def _terminal_columns(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _terminal_methods(summary: Summary) -> Table:
    strict = strict_differs(summary)
    failed = any(summary[f"errors.{method}"]["value"] for method in methods(summary))  # else the column takes room
    headings = ("accuracy [95%]", *["strict"] * strict, "FLOPs", "× bo16", "time", *["errors"] * failed)
    table = _terminal_columns("method", *headings)
    for method in methods(summary):
        flops = cost_in_words(summary, "flops", method).removesuffix("FLOPs")
        errors = [str(round(summary[f"errors.{method}"]["value"]))] * failed
        costs = (flops, relative_in_words(summary, method), cost_in_words(summary, "seconds", method))
        read = [strict_in_words(summary, method).split(" ")[0]] * strict
        table.add_row(method, accuracy(summary, method), *read, *costs, *errors)
    return table


def _terminal_samples(summary: Summary) -> Table:
    table = _terminal_columns("samples of", "k", "pass@k [95%]", "maj@k [95%]")
    for policy, own in metrics.curves(summary).items():
        for k in own["pass"]:
            table.add_row(policy, str(k), span(own["pass"][k]), span(own["maj"][k]))
    return table


def _searches(method: str) -> bool:
    return family(method)[0] in ("nabla", "control")


# --------------------------------------------------------------------------------------------------- the page


def _sections(
    summary: Summary,
    rows: Sequence[Mapping],
    grids: Mapping[str, Grid],
    facts: Mapping,
    folder: Path,
    drawn: Mapping[str, Path],
) -> dict[str, list[str]]:
    """Blocks of Markdown under each heading; those of the title under an empty one."""
    images = _images(drawn, folder)
    rival = [RIVAL_NOTE + "."] if facts["reward_kind"] == "log-ratio" else []
    return {
        "": [f"# {facts['title']}", _statement(summary, rows, facts)],
        "Verdict": [bullets(verdict(summary, facts))],
        "Figures to reach": [table(["target", "measured", "verdict"], targets(summary)), _target_note(facts)],
        "Results": [_results(summary), *_strictness(summary, rows), *rival],
        "Paired differences of accuracy": _paired(summary),
        samples.HEADING: samples.section(summary, _only(images, samples.FIGURES)),
        "Is the reward sound under search?": [turning(summary), *_audit(facts)],
        "Test-time against train-time": compute_tradeoff_page.sections(summary, grids, facts, images),
        "Plots": _plots(images),
        "Provenance": _provenance(summary, facts),
        "Files": [_files(facts, folder, drawn)],
    }


def _statement(summary: Summary, rows: Sequence[Mapping], facts: Mapping) -> str:
    problems = max(one["problems"] for one in summary.values())
    count = len({row["method"] for row in rows})
    wrong = sum(row["error"] is not None for row in rows)
    ungraded = sum(row["correct"] is None and row["error"] is None for row in rows)
    head = (
        f"{count} method{'s' * (count > 1)} on {problems} held-out problems of {facts['task']}: policy "
        f"`{facts['policy']}`, {facts['reward_kind']} reward `{facts['reward']}`. Of {len(rows)} rows "
        f"{wrong} ended in an error and {ungraded} could not be graded; they count as wrong."
    )
    head = f"{head} {comparisons_lost(rows)}".rstrip()
    return (
        f"{head} Brackets hold 95% bootstrap intervals over problems, the seeds of a problem averaged first. "
        "FLOPs and seconds are per problem, rejected work included. An interval without width says that all "
        "problems agreed, not that the figure is certain."
    )


def _target_note(facts: Mapping) -> str:
    note = (
        "The first asks for an accuracy no lower than best_of_16's; its paired interval says how surely. The trained "
        "policy and the best test-time method are those with the highest mean accuracy on these very problems."
    )
    if facts["reward_kind"] == "log-ratio":
        return note
    return f"{note} The first two were set for a log-ratio reward; this run's is of kind {facts['reward_kind']}."


def _results(summary: Summary) -> str:
    if not methods(summary):
        return "Missing: no method that gives one answer was evaluated."
    strict = strict_differs(summary)
    heads = ["method", "accuracy", *["strict accuracy"] * strict]
    heads += ["reward", "FLOPs / problem", "× best_of_16", "seconds / problem"]
    lines = []
    for method in methods(summary):
        one = summary[f"accuracy.{method}"]
        reward = summary.get(f"reward.{method}")
        costs = [
            cost_in_words(summary, "flops", method),
            relative_in_words(summary, method),
            cost_in_words(summary, "seconds", method),
        ]
        counts = [one["seeds"], one["problems"], round(summary[f"errors.{method}"]["value"])]
        read = [strict_in_words(summary, method)] * strict
        lines.append([method, span(one), *read, span(reward, ".3g") if reward else "–", *costs, *counts])
    return table([*heads, "seeds", "problems", "errors"], lines)


def _strictness(summary: Summary, rows: Sequence[Mapping]) -> list[str]:
    """What strict accuracy is and on how many answers it rests, where any answer is read in two ways."""
    differ = len(extractions(rows))
    if not differ:
        return []
    what = "Strict accuracy counts" if strict_differs(summary) else "Strict accuracy, here the same, counts"
    return [
        f"{what} an answer only in the form that the task asks for; accuracy takes it wherever the response put it. "
        f"{differ} of {len(rows)} responses are read in two ways: `{EXTRACTION}` holds them."
    ]


def _paired(summary: Summary) -> list[str]:
    lines = []
    for name, one in summary.items():
        if name.startswith("paired."):
            a, b = _sides(name)
            chance = chance_in_words(summary, a, b).removeprefix("p = ").removeprefix("p ")
            lines.append([f"{a} − {b}", span(one, "+.3f"), chance, f"{cost_ratio(summary, 'flops', a, b):.2f}"])
    if not lines:
        return ["Missing: no two methods that belong together were evaluated."]
    note = "p: two-sided sign-flip permutation test over problems, not corrected for how many tests there are."
    return [table(["a − b", "difference", "p", "FLOPs a / b"], lines), note]


def turning(summary: Summary) -> str:
    """Whether accuracy falls as best-of-N, the control and nabla are given more FLOPs: a list in Markdown."""
    pairs = [_sides(name) for name in summary if name.startswith("paired.")]
    pairs = [(a, b) for a, b in pairs if family(a)[0] == family(b)[0]]
    lines = [
        f"{a} (most FLOPs) {accuracy(summary, a)} against {b} {accuracy(summary, b)}; {gap_in_words(summary, a, b)}."
        for a, b in pairs
    ]
    if not lines:
        return "Missing: no method was evaluated at several budgets."
    falls = dict.fromkeys(a for a, b in pairs if summary[f"paired.{a}-{b}"]["high"] < 0)
    end = f"Accuracy turns under more search: {', '.join(falls)}." if falls else NO_TURN
    return bullets([*lines, end])


def _audit(facts: Mapping) -> list[str]:
    audit = facts.get("audit")
    if not audit:
        return ["Missing: the reward was not audited."]
    curve = {int(count): one for count, one in audit.get("best_of_n", {}).items()}
    figures = [[f"best of {count}", span(curve[count])] for count in sorted(curve)]
    figures += [[name, f"{one:.3f}"] for name, one in audit.items() if isinstance(one, (int, float))]
    return [f"Audit before the search: {audit['verdict']}", table(["audit", "value"], figures)]


def _images(drawn: Mapping[str, Path], folder: Path) -> dict[str, str]:
    return {key: f"![{ALL_FIGURES[key]}]({path.relative_to(folder).as_posix()})" for key, path in drawn.items()}


def _only(images: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: image for name, image in images.items() if name in names}


def _plots(images: Mapping[str, str]) -> list[str]:
    absent = [title for key, title in ALL_FIGURES.items() if key not in images]
    shown = [images[key] for key in FIGURES if key in images]
    return shown + ([f"Not drawn for want of rows or facts: {', '.join(absent)}."] if absent else [])


def _provenance(summary: Summary, facts: Mapping) -> list[str]:
    lines = [f"policy: `{facts['policy']}`", f"reward: `{facts['reward']}` ({facts['reward_kind']})"]
    lines += [f"seeds: {', '.join(map(str, facts['seeds']))}"] if is_known(facts, "seeds") else []
    lines += [f"revision of {what}: `{one}`" for what, one in (facts.get("revisions") or {}).items()]
    lines += [f"{name}: {version}" for name, version in (facts.get("versions") or {}).items()]
    clocks = {"setup": "set-up", "total": "in all"}
    clocks |= {f"training.{label}": f"making {label}" for label in LABELS}
    for key, words in clocks.items():
        if f"seconds.{key}" in summary:
            lines.append(f"seconds, {words}: {summary[f'seconds.{key}']['value']:.1f}")
    lines += facts.get("notes") or []
    return [f"```\n{facts['command']}\n```", bullets(lines)]


def _files(facts: Mapping, folder: Path, drawn: Mapping[str, Path]) -> str:
    files = {**(facts.get("files") or {}), "summary": folder / "summary.json"}
    files |= {f"plot, {key}": path for key, path in drawn.items()}
    return bullets(f"{label}: `{_near(Path(path), folder)}`" for label, path in files.items())


def _near(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _sides(name: str) -> tuple[str, str]:
    """paired.<a>-<b> -> (a, b); the names of methods hold no hyphen."""
    a, _, b = name.removeprefix("paired.").partition("-")
    return a, b
