"""From result rows and run facts to summary.json, report.md, report.html and plots.

`rows` are the rows of rows.jsonl, one per (method, task, problem, seed).

`facts` describe how the rows were produced. Required are title, command, policy, reward, task and reward_kind (as
`Reward.kind`). Optional are:

- versions, seeds, hardware, setup_seconds, total_seconds and revisions {model: revision}
- sampling: the fields of `nabla_trl.models.options.Sampling`
- trained: [{"label", "method", "beta", "tuning", "train_flops", "train_seconds", "processes"}], where the costs
  include traces or rollouts and the FLOPs of the audit, a number may be null, and processes may be missing (1)
- problems {held-out id: {"question", "level"}}, files {label: path} and notes [sentence]
- audit: {"conclusion": sentence, "auc_interval": {"value", "low", "high"}, "best_of_n_accuracy": {N: the same}} with
  any further numbers
- show_targets: true adds the targets that this project set for its own demonstration
- reward_train_flops, reward_train_seconds: costs of training the reward, which totals count apart
- dollars_per_gpu_hour: price of an hour of the device of one process
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nabla_trl.audit.terms import describe_audit
from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.grids import ResultGrid, build_grids, compute_mean_reward_by_round
from nabla_trl.evaluation.method import POLICY_LABELS, Method, list_methods
from nabla_trl.evaluation.results import EXTRACTION_FILE, describe_failed_comparisons, list_extraction_differences
from nabla_trl.evaluation.rows import Row
from nabla_trl.report.compute_tradeoff import TRADEOFF_FIGURES, build_tradeoff_section
from nabla_trl.report.conclusions import (
    REWARD_MODEL_SAMPLING_NOTE,
    build_plot_titles,
    classify_pair,
    compare,
    evaluate_targets,
    format_accuracy,
    format_cost,
    format_p_value,
    format_relative_flops,
    format_reward,
    has_strict_difference,
    write_conclusions,
)
from nabla_trl.report.markdown import format_bullets, format_table
from nabla_trl.report.paper_claim import compute_paper_claims, describe_paper_claims
from nabla_trl.report.summary import Summary, get_value, parse_pairs, summarize
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import format_count, format_error, format_interval, format_seconds
from nabla_trl.utils.progress import PrintableConsole, announce
from nabla_trl.utils.statistics import INTERVAL_NOTE, SIGNIFICANCE_LEVEL

NO_OVEROPTIMIZATION = "No run with the most FLOPs is worse than a cheaper run of its family, beyond chance."
MAIN_FIGURES = {
    "accuracy_flops": "Accuracy against FLOPs per problem",
    "accuracy_seconds": "Accuracy against seconds per problem",
    "reward_rounds": "Reward over rounds",
}
ALL_FIGURES = MAIN_FIGURES | {"samples": "pass@k and maj@k"} | TRADEOFF_FIGURES
_REQUIRED_FACTS = ("title", "command", "policy", "reward", "task", "reward_kind")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_number(value.get(end)) for end in ("value", "low", "high"))


def _is_problem(value: Any) -> bool:
    """Return whether a value is {"question": text, "level": text or null}."""
    if not isinstance(value, Mapping) or not {"question", "level"} <= value.keys():
        return False
    return isinstance(value["question"], str) and isinstance(value["level"], str | None)


def _is_audit(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("conclusion", value.get("verdict")), str):
        return False
    for name, is_valid in (("accuracy", _is_interval), ("reward", lambda value: value is None or _is_number(value))):
        curve = value.get(f"best_of_n_{name}") or {}
        if not isinstance(curve, Mapping) or not all(str(n).isdecimal() and is_valid(curve[n]) for n in curve):
            return False
    return value.get("auc_interval") is None or _is_interval(value["auc_interval"])


def _is_training(value: Any) -> bool:
    """Return whether a value describes a trained policy (`TrainingCost`), as far as its keys are there."""
    if not isinstance(value, Mapping):
        return False
    texts = [value.get(name, "") for name in ("label", "method", "tuning")]
    numbers = [value.get(name) for name in ("beta", "train_flops", "train_seconds", "processes")]
    return all(isinstance(text, str) for text in texts) and all(n is None or _is_number(n) for n in numbers)


# How the values of facts are recognized. Null stands for a value that is not known.
_FACT_CHECKS: dict[str, Callable[[Any], bool]] = {
    **{name: lambda value: isinstance(value, str) for name in (*_REQUIRED_FACTS, "hardware")},
    **{name: _is_number for name in ("setup_seconds", "total_seconds", "reward_train_flops", "reward_train_seconds")},
    "dollars_per_gpu_hour": lambda value: _is_number(value) and value > 0,
    **{
        name: lambda value: isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values())
        for name in ("files", "versions", "revisions")
    },
    "seeds": lambda value: isinstance(value, list) and all(isinstance(seed, int) for seed in value),
    "notes": lambda value: isinstance(value, list) and all(isinstance(note, str) for note in value),
    "sampling": lambda value: isinstance(value, Mapping) and all(map(_is_number, value.values())),
    "problems": lambda value: isinstance(value, Mapping) and all(map(_is_problem, value.values())),
    "trained": lambda value: isinstance(value, list) and all(map(_is_training, value)),
    "audit": _is_audit,
}
_COST_HEADS = {"tokens": "tokens", "calls": "model calls", "dollars": "dollars"}
_SAMPLES_LEGEND = (
    "pass@k: probability that at least one of k independent samples is correct (no method selects it). maj@k: "
    "probability that the most frequent answer of k samples is correct. Both are averaged over every choice of k of "
    "the n samples of a problem and seed (unbiased, Chen et al., arXiv 2107.03374). avg@n: accuracy of one sample."
)


def write_report_files(folder: str | Path, rows: Sequence[Row], facts: Mapping) -> Summary:
    """Write summary.json, report.md, plots/*.png, and report.html with report_data/, each atomically.

    Args:
        folder: Where the report goes. The viewer of report.html shows the traces in `folder`/traces, if there are any.

    Returns:
        The summary.

    Raises:
        ValueError: Rows or facts are refused. Nothing is written then.
    """
    from nabla_trl.report.html.page import render_page
    from nabla_trl.report.plots.canvas import NARROW, WIDE
    from nabla_trl.report.plots.figures import plot_figures, save_figures

    check_facts(facts)
    folder = Path(folder)
    with announce(f"writing the report to {folder}"):
        summary = summarize(rows, facts)
        grids = build_grids(rows)
        searches = {name: grid for name, grid in grids.items() if Method.parse(name).family in ("nabla", "control")}
        reward_by_round = {name: compute_mean_reward_by_round(grid) for name, grid in searches.items()}
        titles = build_plot_titles(summary, facts)
        figures, narrow_figures = (plot_figures(summary, reward_by_round, titles, size) for size in (WIDE, NARROW))
        plot_paths = save_figures(folder / "plots", {name: figures[name] for name in ALL_FIGURES})
        write_atomic(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
        sections = build_sections(summary, rows, grids, facts, folder, plot_paths)
        blocks = [block for name, texts in sections.items() for block in ([f"## {name}"] if name else []) + texts]
        write_atomic(folder / "report.md", "\n\n".join(blocks) + "\n")
        html = render_page(folder, sections, summary, rows, facts, reward_by_round, figures, narrow_figures)
        write_atomic(folder / "report.html", html)
    return summary


def check_facts(facts: Mapping) -> None:
    missing = [name for name in _REQUIRED_FACTS if facts.get(name) is None]
    if missing:
        raise ValueError(f"the run facts lack {', '.join(missing)}")
    unreadable = [
        name for name, is_valid in _FACT_CHECKS.items() if facts.get(name) is not None if not is_valid(facts[name])
    ]
    if unreadable:
        values = ", ".join(f"{name} ({format_error(repr(facts[name]), 60)})" for name in unreadable)
        raise ValueError(f"the run facts hold values that cannot be read: {values}")
    if "verdict" in (facts.get("audit") or {}):
        raise ValueError("the run facts hold the unknown key audit.verdict: it is now audit.conclusion")


def print_summary_table(summary: Summary, console: Console | None = None) -> None:
    """Print a line per method with its accuracy and costs, and pass@k and maj@k of samples.

    Columns that do not fit into the console are left out, the least important first. Some are shown only where there
    is something to see: strict accuracy that differs, dollars where a GPU hour has a price, and errors.
    """
    console = console or PrintableConsole()
    methods = list_methods(summary)
    if methods:
        columns = _fit_columns(methods, _build_terminal_columns(summary, methods), console.width)
        table = _create_terminal_table("method", *columns)
        for row in zip(methods, *columns.values(), strict=True):
            table.add_row(*row)
        console.print(table)
    if samples := metrics.group_sample_metrics(summary):
        table = _create_terminal_table("samples of", "k", "pass@k [95%]", "maj@k [95%]")
        for policy, curves in samples.items():
            for k in curves["pass"]:
                table.add_row(policy, str(k), format_interval(curves["pass"][k]), format_interval(curves["maj"][k]))
        console.print(table)


def _build_terminal_columns(summary: Summary, methods: Sequence[str]) -> dict[str, list[str]]:
    """Return heading -> cells of all columns behind the method, from left to right."""
    strict = [format_accuracy(summary, method, "accuracy_strict").split(" ")[0] for method in methods]
    errors = [f"{get_value(summary, 'errors', method):.0f}" for method in methods]
    flops, seconds, calls, dollars = (
        [format_cost(summary, cost, method).removesuffix("FLOPs") for method in methods]
        for cost in ("flops", "seconds", "calls", "dollars")
    )
    columns = {
        "accuracy [95%]": [format_accuracy(summary, method) for method in methods],
        "strict": strict if has_strict_difference(summary) else [],
        "FLOPs": flops,
        "× bo16": [format_relative_flops(summary, method) for method in methods],
        "time": seconds,
        "calls": calls,
        "$ / 1000": [cell.removesuffix(" / 1000") for cell in dollars],
        "errors": errors if any(get_value(summary, "errors", method) for method in methods) else [],
    }
    return {heading: cells for heading, cells in columns.items() if set(cells) - {"–"}}


def _fit_columns(methods: Sequence[str], columns: Mapping[str, list[str]], width: int) -> dict[str, list[str]]:
    """Return the columns that fit into so many characters beside the methods."""
    fitted, gap = dict(columns), 2
    for heading in ("× bo16", "strict", "calls", "$ / 1000"):
        widths = [max(map(len, texts)) for texts in (methods, *([head, *cells] for head, cells in fitted.items()))]
        if sum(widths) + gap * len(fitted) <= width:
            break
        fitted.pop(heading, None)
    return fitted


def _create_terminal_table(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


# --- report.md ----------------------------------------------------------------------------------------


def build_sections(
    summary: Summary,
    rows: Sequence[Row],
    grids: Mapping[str, ResultGrid],
    facts: Mapping,
    folder: Path,
    plot_paths: Mapping[str, Path],
) -> dict[str, list[str]]:
    """Return heading -> its blocks of Markdown. The title and the statement are under an empty heading."""
    images = {
        name: f"![{ALL_FIGURES[name]}]({path.relative_to(folder).as_posix()})" for name, path in plot_paths.items()
    }
    baseline = [REWARD_MODEL_SAMPLING_NOTE] if facts["reward_kind"] == "log-ratio" else []
    missing = [title for name, title in ALL_FIGURES.items() if name not in images]
    return {
        "": [f"# {facts['title']}", _format_statement(summary, rows, facts)],
        "Conclusions": [
            format_bullets([*write_conclusions(summary, facts), *describe_paper_claims(compute_paper_claims(grids))])
        ],
        **({"Targets": _format_targets(summary, facts)} if facts.get("show_targets") else {}),
        "Results": [_format_results(summary), *_format_strictness_note(summary, rows), *baseline],
        "Paired differences of accuracy": _format_paired_differences(summary),
        "pass@k, maj@k and avg@n": _format_samples(summary, images),
        "Over-optimization of the reward": [describe_overoptimization(summary), *_format_audit(facts)],
        "Train-time vs test-time compute": build_tradeoff_section(summary, grids, facts, images),
        "Plots": [
            *(images[name] for name in MAIN_FIGURES if name in images),
            *([f"Not drawn, because rows or facts are missing: {', '.join(missing)}."] if missing else []),
        ],
        "Provenance": [f"```\n{facts['command']}\n```", format_bullets(_list_provenance(summary, facts))],
        "Files": [_format_files(facts, folder, plot_paths)],
    }


def _format_statement(summary: Summary, rows: Sequence[Row], facts: Mapping) -> str:
    problems = max(entry["problems"] for entry in summary.values())
    methods = len({row.method for row in rows})
    errors = sum(row.error is not None for row in rows)
    ungraded = sum(row.correct is None and row.error is None for row in rows)
    sentences = [
        f"{methods} method{'s' * (methods > 1)} on {format_count(problems)} held-out problems of {facts['task']}: "
        f"policy `{facts['policy']}`, {facts['reward_kind']} reward `{facts['reward']}`.",
        _describe_ungraded(len(rows), errors, ungraded),
        describe_failed_comparisons(rows),
        f"{INTERVAL_NOTE} FLOPs and seconds are per problem and include rejected work.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _describe_ungraded(num_rows: int, num_errors: int, num_ungraded: int) -> str:
    if not num_errors + num_ungraded:
        return f"All {num_rows:,} rows were graded."
    return (
        f"Of {num_rows:,} rows, {num_errors:,} ended in an error and {num_ungraded:,} could not be graded. They count "
        "as wrong."
    )


def _format_targets(summary: Summary, facts: Mapping) -> list[str]:
    note = (
        "These are the targets of the demonstration of nabla_trl, not of your run. The first one is reached if the "
        "paired interval is nowhere below zero. The trained policy and the best test-time method are those with the "
        "highest mean accuracy on these same problems."
    )
    if facts["reward_kind"] != "log-ratio":
        note += (
            f" The first two targets were set for a log-ratio reward. This run has a {facts['reward_kind']} reward."
        )
    return [format_table(["target", "measured", "result"], evaluate_targets(summary)), note]


def _format_results(summary: Summary) -> str:
    if not list_methods(summary):
        return "Missing: no method that gives one answer was evaluated."
    strict = has_strict_difference(summary)
    costs = [cost for cost in ("tokens", "calls", "dollars") if any(name.startswith(f"{cost}.") for name in summary)]
    heads = ["method", "accuracy", *["strict accuracy"] * strict, "reward", "FLOPs / problem", "× best_of_16"]
    heads += ["time / problem", *(_COST_HEADS[cost] for cost in costs)]
    lines = []
    for method in list_methods(summary):
        accuracy = summary[f"accuracy.{method}"]
        cells = [method, format_interval(accuracy)]
        cells += [format_accuracy(summary, method, "accuracy_strict")] * strict
        cells += [format_reward(summary, method), format_cost(summary, "flops", method)]
        cells += [format_relative_flops(summary, method), format_cost(summary, "seconds", method)]
        cells += [format_cost(summary, cost, method) for cost in costs]
        counts = accuracy["seeds"], accuracy["problems"], get_value(summary, "errors", method)
        lines.append([*cells, *map(format_count, counts)])
    return format_table([*heads, "seeds", "problems", "errors"], lines)


def _format_strictness_note(summary: Summary, rows: Sequence[Row]) -> list[str]:
    """Return what strict accuracy is and how many answers it depends on, where strict extraction differs at all."""
    differences = len(list_extraction_differences(rows))
    if not differences:
        return []
    same = "" if has_strict_difference(summary) else " (here the same)"
    return [
        f"Strict accuracy{same} counts an answer only in the form that the task asks for. Accuracy accepts it "
        f"anywhere in the response. {differences:,} of {len(rows):,} responses are read in two ways: "
        f"`{EXTRACTION_FILE}` holds them."
    ]


def _format_paired_differences(summary: Summary) -> list[str]:
    lines = [
        [
            f"{a} − {b}",
            format_interval(summary[f"paired.{a}-{b}"], "+.3f"),
            *(
                format_p_value(summary, a, b, name).removeprefix("p = ").removeprefix("p ")
                for name in ("p_value", "p_adjusted")
            ),
            format_relative_flops(summary, a, b),
        ]
        for a, b in parse_pairs(summary, "paired")
    ]
    if not lines:
        return ["Missing: no two methods that belong together were evaluated."]
    note = (
        "p: two-sided sign-flip permutation test over problems. Adjusted p: the same, adjusted for the "
        f"{len(lines)} comparisons of this table (Holm). Conclusions say ahead or behind only where the adjusted p is "
        f"below {SIGNIFICANCE_LEVEL:g} and the interval excludes zero, so the chance of any wrong claim among them is "
        f"at most {SIGNIFICANCE_LEVEL:.0%}."
    )
    return [format_table(["a − b", "difference", "p", "adjusted p", "FLOPs a / b"], lines), note]


def _format_samples(summary: Summary, images: Mapping[str, str]) -> list[str]:
    samples = metrics.group_sample_metrics(summary)
    if not samples:
        return ["Missing: no method samples_N was evaluated."]
    curves = {f"{name}@k, {policy}": entries[name] for policy, entries in samples.items() for name in ("pass", "maj")}
    ks = sorted({k for curve in curves.values() for k in curve})
    lines = [[k, *(format_interval(curve[k]) if k in curve else "–" for curve in curves.values())] for k in ks]
    means = [
        f"{policy} {format_interval(mean)} (n = {n})"
        for policy, entries in samples.items()
        for n, mean in entries["avg"].items()
    ]
    image = [images["samples"]] if "samples" in images else []
    return [f"avg@n: {'; '.join(means)}.", format_table(["k", *curves], lines), *image, _SAMPLES_LEGEND]


def describe_overoptimization(summary: Summary) -> str:
    """Return a Markdown list on whether accuracy falls as best-of-N, the control and nabla get more FLOPs."""
    pairs = [(a, b) for a, b in parse_pairs(summary, "paired") if Method.parse(a).family == Method.parse(b).family]
    if not pairs:
        return "Missing: no method was evaluated at several budgets."
    lines = [f"{compare(summary, a, b, note_a=' (most FLOPs)')}." for a, b in pairs]
    falling = dict.fromkeys(a for a, b in pairs if classify_pair(summary, a, b) == "behind")
    warning = f"Over-optimization: accuracy falls with more FLOPs: {', '.join(falling)}."
    return format_bullets([*lines, warning if falling else NO_OVEROPTIMIZATION])


def _format_audit(facts: Mapping) -> list[str]:
    audit = facts.get("audit")
    if not audit:
        return ["Missing: the reward was not audited."]
    accuracies, rewards = (
        {int(count): value for count, value in (audit.get(f"best_of_n_{name}") or {}).items()}
        for name in ("accuracy", "reward")
    )
    points = [
        [f"best of {count}", format_interval(accuracies[count]), _format_number(rewards.get(count))]
        for count in sorted(accuracies)
    ]
    return [
        f"Audit before the search: {audit['conclusion']}",
        *([format_table(["chosen by the reward", "accuracy", "mean reward"], points)] if points else []),
        format_table(["the reward", "value", "what it means"], describe_audit(audit)),
    ]


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _list_provenance(summary: Summary, facts: Mapping) -> Iterable[str]:
    yield f"policy: `{facts['policy']}`"
    yield f"reward: `{facts['reward']}` ({facts['reward_kind']})"
    if facts.get("seeds") is not None:
        yield f"seeds: {', '.join(map(str, facts['seeds']))}"
    yield from (f"revision of {name}: `{revision}`" for name, revision in (facts.get("revisions") or {}).items())
    yield from (f"{name}: {version}" for name, version in (facts.get("versions") or {}).items())
    timers = {
        "setup": "set-up",
        "total": "total time",
        **{f"training.{name}": f"training of {name}" for name in POLICY_LABELS},
    }
    for name, words in timers.items():
        if f"seconds.{name}" in summary:
            yield f"{words}: {format_seconds(get_value(summary, 'seconds', name))}"
    if facts.get("hardware") is not None:
        yield f"hardware: {facts['hardware']}"
    yield from facts.get("notes") or []


def _format_files(facts: Mapping, folder: Path, plot_paths: Mapping[str, Path]) -> str:
    files = {**(facts.get("files") or {}), "summary": folder / "summary.json"}
    files |= {f"figure, {name.replace('_', ' ')}": path for name, path in plot_paths.items()}
    paths = {label: Path(path) for label, path in files.items()}
    return format_bullets(
        f"{label}: `{(path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()}`"
        for label, path in paths.items()
    )
