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
from nabla_trl.evaluation.grids import ResultGrid, build_grids, compute_mean_reward_by_round
from nabla_trl.evaluation.method import POLICY_LABELS, list_methods, parse_family
from nabla_trl.evaluation.results import EXTRACTION_FILE, describe_failed_comparisons, list_extraction_differences
from nabla_trl.evaluation.rows import Row
from nabla_trl.report import compute_tradeoff_page, samples
from nabla_trl.report.conclusions import (
    REWARD_MODEL_SAMPLING_NOTE,
    build_plot_titles,
    describe_difference,
    evaluate_targets,
    format_accuracy,
    format_cost,
    format_p_value,
    format_relative_flops,
    format_strict_accuracy,
    has_strict_difference,
    write_conclusions,
)
from nabla_trl.report.summary import Summary, compute_cost_ratio, has_fact, summarize
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.markdown import format_bullets, format_table

NO_OVEROPTIMIZATION = "Nowhere is the run with the most FLOPs worse than a cheaper one of its kind, beyond chance."
MAIN_FIGURES = {
    "accuracy_flops": "Accuracy against FLOPs per problem",
    "accuracy_seconds": "Accuracy against seconds per problem",
    "reward_rounds": "Reward over rounds",
}
ALL_FIGURES = MAIN_FIGURES | samples.SAMPLE_FIGURES | compute_tradeoff_page.TRADEOFF_FIGURES
_REQUIRED_FACTS = ("title", "command", "policy", "reward", "task", "reward_kind")


def write_report(folder: str | Path, rows: Sequence[Row], facts: Mapping) -> Summary:
    """Write summary.json, report.md, plots/*.png and report.html with report_data/ under `folder`, each atomically.

    The viewer of report.html shows the traces in `folder`/traces, where there are any. Returns the summary.

    Raises ValueError on rows or facts that `summarise` refuses; nothing is written then.
    """
    from nabla_trl.report import figures as figure_module
    from nabla_trl.report.html.page import render_page

    _check_facts(facts)
    summary = summarize(rows, facts)
    folder = Path(folder)
    grids = build_grids(rows)
    rounds = {name: compute_mean_reward_by_round(grid) for name, grid in grids.items() if _is_search(name)}
    titles = build_plot_titles(summary, facts)
    figures = figure_module.plot_figures(summary, rounds, titles)
    drawn = figure_module.save_figures(folder / "plots", figures)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    sections = _build_sections(summary, rows, grids, facts, folder, drawn)
    blocks = [block for name, own in sections.items() for block in ([f"## {name}"] if name else []) + own]
    write_atomic(folder / "report.md", "\n\n".join(blocks) + "\n")
    html = render_page(folder, sections, summary, rows, facts, rounds, figures, titles)
    write_atomic(folder / "report.html", html)
    return summary


def print_summary_table(summary: Summary, console: Console | None = None) -> None:
    """Print method, accuracy (strict, too, where that differs), FLOPs (also as a share of best_of_16's), time and
    errors, if any; of samples pass@k and maj@k."""
    console = console or Console()
    if list_methods(summary):
        console.print(_build_method_table(summary))
    if metrics.group_sample_metrics(summary):
        console.print(_build_samples_table(summary))


def _check_facts(facts: Mapping) -> None:
    missing = [name for name in _REQUIRED_FACTS if not has_fact(facts, name)]
    if missing:
        raise ValueError(f"the run facts lack {', '.join(missing)}")
    kinds: dict[str, type] = dict.fromkeys(_REQUIRED_FACTS, str) | {
        "seeds": list,
        "problems": Mapping,
        "versions": Mapping,
    }
    for name, kind in kinds.items():
        if has_fact(facts, name) and not isinstance(facts[name], kind):
            raise ValueError(f"the run facts hold no {name} that can be read: {facts[name]!r}")


def _create_terminal_table(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _build_method_table(summary: Summary) -> Table:
    strict = has_strict_difference(summary)
    failed = any(
        summary[f"errors.{method}"]["value"] for method in list_methods(summary)
    )  # else the column takes room
    headings = ("accuracy [95%]", *["strict"] * strict, "FLOPs", "× bo16", "time", *["errors"] * failed)
    table = _create_terminal_table("method", *headings)
    for method in list_methods(summary):
        flops = format_cost(summary, "flops", method).removesuffix("FLOPs")
        errors = [str(round(summary[f"errors.{method}"]["value"]))] * failed
        costs = (flops, format_relative_flops(summary, method), format_cost(summary, "seconds", method))
        read = [format_strict_accuracy(summary, method).split(" ")[0]] * strict
        table.add_row(method, format_accuracy(summary, method), *read, *costs, *errors)
    return table


def _build_samples_table(summary: Summary) -> Table:
    table = _create_terminal_table("samples of", "k", "pass@k [95%]", "maj@k [95%]")
    for policy, own in metrics.group_sample_metrics(summary).items():
        for k in own["pass"]:
            table.add_row(policy, str(k), format_interval(own["pass"][k]), format_interval(own["maj"][k]))
    return table


def _is_search(method: str) -> bool:
    return parse_family(method)[0] in ("nabla", "control")


# --------------------------------------------------------------------------------------------------- the page


def _build_sections(
    summary: Summary,
    rows: Sequence[Row],
    grids: Mapping[str, ResultGrid],
    facts: Mapping,
    folder: Path,
    plot_paths: Mapping[str, Path],
) -> dict[str, list[str]]:
    """Blocks of Markdown under each heading; those of the title under an empty one."""
    images = _link_images(plot_paths, folder)
    rival = [REWARD_MODEL_SAMPLING_NOTE + "."] if facts["reward_kind"] == "log-ratio" else []
    return {
        "": [f"# {facts['title']}", _format_statement(summary, rows, facts)],
        "Verdict": [format_bullets(write_conclusions(summary, facts))],
        "Figures to reach": [
            format_table(["target", "measured", "verdict"], evaluate_targets(summary)),
            _format_target_note(facts),
        ],
        "Results": [_format_results(summary), *_format_strictness_note(summary, rows), *rival],
        "Paired differences of accuracy": _format_paired_differences(summary),
        samples.SAMPLES_HEADING: samples.build_samples_section(
            summary, _select_images(images, samples.SAMPLE_FIGURES)
        ),
        "Is the reward sound under search?": [describe_overoptimization(summary), *_format_audit(facts)],
        "Test-time against train-time": compute_tradeoff_page.build_tradeoff_section(summary, grids, facts, images),
        "Plots": _format_plots(images),
        "Provenance": _format_provenance(summary, facts),
        "Files": [_format_files(facts, folder, plot_paths)],
    }


def _format_statement(summary: Summary, rows: Sequence[Row], facts: Mapping) -> str:
    problems = max(one["problems"] for one in summary.values())
    count = len({row.method for row in rows})
    wrong = sum(row.error is not None for row in rows)
    ungraded = sum(row.correct is None and row.error is None for row in rows)
    head = (
        f"{count} method{'s' * (count > 1)} on {problems} held-out problems of {facts['task']}: policy "
        f"`{facts['policy']}`, {facts['reward_kind']} reward `{facts['reward']}`. Of {len(rows)} rows "
        f"{wrong} ended in an error and {ungraded} could not be graded; they count as wrong."
    )
    head = f"{head} {describe_failed_comparisons(rows)}".rstrip()
    return (
        f"{head} Brackets hold 95% bootstrap intervals over problems, the seeds of a problem averaged first. "
        "FLOPs and seconds are per problem, rejected work included. An interval without width says that all "
        "problems agreed, not that the figure is certain."
    )


def _format_target_note(facts: Mapping) -> str:
    note = (
        "The first asks for an accuracy no lower than best_of_16's; its paired interval says how surely. The trained "
        "policy and the best test-time method are those with the highest mean accuracy on these very problems."
    )
    if facts["reward_kind"] == "log-ratio":
        return note
    return f"{note} The first two were set for a log-ratio reward; this run's is of kind {facts['reward_kind']}."


def _format_results(summary: Summary) -> str:
    if not list_methods(summary):
        return "Missing: no method that gives one answer was evaluated."
    strict = has_strict_difference(summary)
    heads = ["method", "accuracy", *["strict accuracy"] * strict]
    heads += ["reward", "FLOPs / problem", "× best_of_16", "seconds / problem"]
    lines = []
    for method in list_methods(summary):
        one = summary[f"accuracy.{method}"]
        reward = summary.get(f"reward.{method}")
        costs = [
            format_cost(summary, "flops", method),
            format_relative_flops(summary, method),
            format_cost(summary, "seconds", method),
        ]
        counts = [one["seeds"], one["problems"], round(summary[f"errors.{method}"]["value"])]
        read = [format_strict_accuracy(summary, method)] * strict
        lines.append(
            [method, format_interval(one), *read, format_interval(reward, ".3g") if reward else "–", *costs, *counts]
        )
    return format_table([*heads, "seeds", "problems", "errors"], lines)


def _format_strictness_note(summary: Summary, rows: Sequence[Row]) -> list[str]:
    """What strict accuracy is and on how many answers it rests, where any answer is read in two ways."""
    differ = len(list_extraction_differences(rows))
    if not differ:
        return []
    what = "Strict accuracy counts" if has_strict_difference(summary) else "Strict accuracy, here the same, counts"
    return [
        f"{what} an answer only in the form that the task asks for; accuracy takes it wherever the response put it. "
        f"{differ} of {len(rows)} responses are read in two ways: `{EXTRACTION_FILE}` holds them."
    ]


def _format_paired_differences(summary: Summary) -> list[str]:
    lines = []
    for name, one in summary.items():
        if name.startswith("paired."):
            a, b = _parse_paired_name(name)
            chance = format_p_value(summary, a, b).removeprefix("p = ").removeprefix("p ")
            lines.append(
                [
                    f"{a} − {b}",
                    format_interval(one, "+.3f"),
                    chance,
                    f"{compute_cost_ratio(summary, 'flops', a, b):.2f}",
                ]
            )
    if not lines:
        return ["Missing: no two methods that belong together were evaluated."]
    note = "p: two-sided sign-flip permutation test over problems, not corrected for how many tests there are."
    return [format_table(["a − b", "difference", "p", "FLOPs a / b"], lines), note]


def describe_overoptimization(summary: Summary) -> str:
    """Whether accuracy falls as best-of-N, the control and nabla are given more FLOPs: a list in Markdown."""
    pairs = [_parse_paired_name(name) for name in summary if name.startswith("paired.")]
    pairs = [(a, b) for a, b in pairs if parse_family(a)[0] == parse_family(b)[0]]
    lines = [
        f"{a} (most FLOPs) {format_accuracy(summary, a)} against {b} {format_accuracy(summary, b)}; {describe_difference(summary, a, b)}."
        for a, b in pairs
    ]
    if not lines:
        return "Missing: no method was evaluated at several budgets."
    falls = dict.fromkeys(a for a, b in pairs if summary[f"paired.{a}-{b}"]["high"] < 0)
    end = f"Accuracy turns under more search: {', '.join(falls)}." if falls else NO_OVEROPTIMIZATION
    return format_bullets([*lines, end])


def _format_audit(facts: Mapping) -> list[str]:
    audit = facts.get("audit")
    if not audit:
        return ["Missing: the reward was not audited."]
    curve = {int(count): one for count, one in audit.get("best_of_n", {}).items()}
    figures = [[f"best of {count}", format_interval(curve[count])] for count in sorted(curve)]
    figures += [[name, f"{one:.3f}"] for name, one in audit.items() if isinstance(one, (int, float))]
    return [f"Audit before the search: {audit['verdict']}", format_table(["audit", "value"], figures)]


def _link_images(plot_paths: Mapping[str, Path], folder: Path) -> dict[str, str]:
    return {key: f"![{ALL_FIGURES[key]}]({path.relative_to(folder).as_posix()})" for key, path in plot_paths.items()}


def _select_images(images: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: image for name, image in images.items() if name in names}


def _format_plots(images: Mapping[str, str]) -> list[str]:
    absent = [title for key, title in ALL_FIGURES.items() if key not in images]
    shown = [images[key] for key in MAIN_FIGURES if key in images]
    return shown + ([f"Not drawn for want of rows or facts: {', '.join(absent)}."] if absent else [])


def _format_provenance(summary: Summary, facts: Mapping) -> list[str]:
    lines = [f"policy: `{facts['policy']}`", f"reward: `{facts['reward']}` ({facts['reward_kind']})"]
    lines += [f"seeds: {', '.join(map(str, facts['seeds']))}"] if has_fact(facts, "seeds") else []
    lines += [f"revision of {what}: `{one}`" for what, one in (facts.get("revisions") or {}).items()]
    lines += [f"{name}: {version}" for name, version in (facts.get("versions") or {}).items()]
    clocks = {"setup": "set-up", "total": "in all"}
    clocks |= {f"training.{label}": f"making {label}" for label in POLICY_LABELS}
    for key, words in clocks.items():
        if f"seconds.{key}" in summary:
            lines.append(f"seconds, {words}: {summary[f'seconds.{key}']['value']:.1f}")
    lines += facts.get("notes") or []
    return [f"```\n{facts['command']}\n```", format_bullets(lines)]


def _format_files(facts: Mapping, folder: Path, plot_paths: Mapping[str, Path]) -> str:
    files = {**(facts.get("files") or {}), "summary": folder / "summary.json"}
    files |= {f"plot, {key}": path for key, path in plot_paths.items()}
    return format_bullets(f"{label}: `{_to_relative_path(Path(path), folder)}`" for label, path in files.items())


def _to_relative_path(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _parse_paired_name(name: str) -> tuple[str, str]:
    """paired.<a>-<b> -> (a, b); the names of methods hold no hyphen."""
    a, _, b = name.removeprefix("paired.").partition("-")
    return a, b
