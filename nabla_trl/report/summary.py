"""Result rows and run facts -> the numbers of a report, by name. `nabla_trl.report.text` tells what rows and facts hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.grids import METRICS, ResultGrid, build_grids
from nabla_trl.evaluation.method import (
    REWARD_MODEL_SAMPLING,
    STEP_SEARCHES,
    join_label,
    list_methods,
    list_policy_labels,
    parse_family,
    split_label,
)
from nabla_trl.evaluation.rows import Row
from nabla_trl.report import compute_tradeoff
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Interval

Summary = dict[str, dict[str, float]]

MAX_FLOPS_SHARE = 1 / 3  # target: nabla reaches best-of-16 at no more than this share of its FLOPs


def summarize(rows: Sequence[Row], facts: Mapping) -> Summary:
    """The content of summary.json: name -> {"value", "low", "high", "seeds", "problems"}.

    Names: accuracy., accuracy_strict., flops., seconds., tokens., reward., kl., errors.<method> (FLOPs, seconds,
    tokens drawn and nats per problem; strict: of answers in the form that the task asks for alone, if it does);
    level.<level>.<method> (accuracy on the problems of one level, where the facts tell of several);
    paired.<a>-<b> (accuracy of a minus b) and p_value.<a>-<b>; of a trained policy's greedy decode its share of
    nabla's gain over greedy, recovered.<label>_greedy, and of the way from greedy to the best test-time method,
    way.<label>_greedy; break_even.<trained method>-<method> (queries); flops.training.<label> and
    seconds.training.<label>; seconds.setup and seconds.total; pass@<k>., maj@<k>. and avg@<n>.<policy> of samples_n
    (`nabla_trl.evaluation.metrics`). A name whose rows or facts are not there is left out.

    Raises:
        ValueError: rows that are incomplete, repeated or of several tasks, or facts of training that are not whole.
    """
    grids = build_grids(rows)
    trained = compute_tradeoff.read_training_costs(facts)
    summary = {name: one.to_dict() for name, one in _compute_means(grids).items()}
    goal = compute_tradeoff.find_best_test_time(summary)
    found = (
        _compute_level_means(grids, facts)
        | _compute_paired_differences(grids, goal)
        | _compute_training_entries(grids, trained, goal)
    )
    found |= metrics.estimate_sample_metrics(rows)
    for name in ("setup", "total"):
        if has_fact(facts, f"{name}_seconds"):
            found[f"seconds.{name}"] = Interval.exact(facts[f"{name}_seconds"])
    return summary | {name: one.to_dict() for name, one in found.items()}


def _compute_means(grids: Mapping[str, ResultGrid]) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for metric in METRICS:
        for method, grid in grids.items():
            if any(map(math.isfinite, grid.columns[metric].ravel())):
                found[f"{metric}.{method}"] = statistics.mean_interval(grid.columns[metric])
    for method, grid in grids.items():
        found[f"errors.{method}"] = Interval.exact(grid.num_errors, len(grid.seeds), len(grid.problems))
    return found


def group_problems_by_level(facts: Mapping) -> dict[str, list[str]]:
    """Level -> its held-out problems, the lowest first; empty where there are not several levels."""
    found: dict[str, list[str]] = {}
    for problem, known in (facts.get("problems") or {}).items():
        if known["level"] is not None:
            found.setdefault(known["level"], []).append(problem)
    names = sorted(found, key=lambda level: (not level.isdigit(), int(level) if level.isdigit() else 0, level))
    return {level: found[level] for level in names} if len(found) > 1 else {}


def _compute_level_means(grids: Mapping[str, ResultGrid], facts: Mapping) -> dict[str, Interval]:
    found = {}
    for level, problems in group_problems_by_level(facts).items():
        for method, grid in grids.items():
            scores = grid.get_problem_values("accuracy")
            own = [scores[problem] for problem in problems if problem in scores]
            if own:
                found[f"level.{level}.{method}"] = statistics.mean_interval(np.array(own))
    return found


def _compute_paired_differences(grids: Mapping[str, ResultGrid], reference_method: str | None) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    pairs = [
        *_list_search_pairs(grids),
        *_list_training_pairs(grids, reference_method),
        *_list_overoptimization_pairs(grids),
    ]
    for a, b in dict.fromkeys(pairs):
        gap = statistics.paired_difference(
            grids[a].get_problem_values("accuracy"), grids[b].get_problem_values("accuracy")
        )
        found[f"paired.{a}-{b}"] = gap
        found[f"p_value.{a}-{b}"] = Interval.exact(gap.p_value, gap.num_seeds, gap.num_problems)
    return found


def _list_search_pairs(grids: Mapping[str, ResultGrid]) -> list[tuple[str, str]]:
    ours = [name for name in grids if parse_family(name)[0] == "nabla"]
    searches = [name for name in grids if parse_family(split_label(name)[1])[0] == "nabla"]
    wanted = [(name, name.replace("nabla", "control")) for name in searches]
    wanted += [(name, rival) for name in ours for rival in _list_baselines(name)]
    wanted += [("nabla", "greedy"), ("nabla", REWARD_MODEL_SAMPLING)]
    if "nabla" not in grids and ours:
        wanted += [(ours[-1], "greedy"), (ours[-1], REWARD_MODEL_SAMPLING)]
    return [(a, b) for a, b in wanted if a in grids and b in grids]


def _list_baselines(search: str) -> list[str]:
    """What a search is compared with: best_of_16, what sets its budget, and the searches over steps at that budget."""
    share = search.partition("@")[2]
    setter = share if share.startswith("best_of_") else "best_of_16"
    return ["best_of_16", setter, f"weighted_{setter}", *(f"{method}@{share}" for method in STEP_SEARCHES if share)]


def _list_training_pairs(grids: Mapping[str, ResultGrid], reference_method: str | None) -> list[tuple[str, str]]:
    """Every method of a trained policy against the same of the base; greedy decodes against nabla, the best method
    without training (`goal`) and each other; that method against base greedy."""
    tuned = [join_label(label, "greedy") for label in list_policy_labels(grids)]
    wanted = [(name, split_label(name)[1]) for name in grids if split_label(name)[0]]
    wanted += [(own, rival) for own in tuned for rival in ("nabla", reference_method or "nabla")]
    wanted += combinations(tuned, 2)
    wanted += [(reference_method, "greedy")] if tuned and reference_method else []
    return [(a, b) for a, b in wanted if a in grids and b in grids]


def _list_overoptimization_pairs(grids: Mapping[str, ResultGrid]) -> list[tuple[str, str]]:
    """For best-of-N, control and nabla: the costliest run against the cheapest and against the best."""
    pairs = []
    for name in ("best_of", "control", "nabla"):
        curve = [method for method in grids if parse_family(method)[0] == name]
        curve.sort(key=lambda method: grids[method].columns["flops"].mean())
        if len(curve) > 1:
            best = max(curve, key=lambda method: grids[method].columns["accuracy"].mean())
            pairs += [(curve[-1], other) for other in dict.fromkeys([curve[0], best]) if other != curve[-1]]
    return pairs


def _compute_training_entries(
    grids: Mapping[str, ResultGrid], trained: Mapping[str, compute_tradeoff.TrainingCost], reference_method: str | None
) -> dict[str, Interval]:
    found: dict[str, Interval] = {}
    for name, whole in (("recovered", "nabla"), ("way", reference_method)):
        found |= {f"{name}.{label}_greedy": one for label, one in compute_tradeoff.compute_pgr(grids, whole).items()}
    for label, one in trained.items():
        for cost, spent in (("flops", one.train_flops), ("seconds", one.train_seconds)):
            found |= {} if spent is None else {f"{cost}.training.{label}": Interval.exact(spent)}
    crossings = compute_tradeoff.compute_break_even(grids, trained).items()
    return found | {f"break_even.{own}-{rival}": queries for (own, rival), queries in crossings}


def has_fact(facts: Mapping, name: str) -> bool:
    """Whether the facts of a run hold a value of that name."""
    return facts.get(name) is not None


def compute_cost_ratio(summary: Summary, cost: str, a: str, b: str) -> float:
    """The cost (flops or seconds) of method a over that of b; NaN where either is not known."""
    top, bottom = summary.get(f"{cost}.{a}"), summary.get(f"{cost}.{b}")
    return top["value"] / bottom["value"] if top and bottom and bottom["value"] else math.nan


def find_pareto_front(summary: Summary, cost: str) -> list[str]:
    """The Pareto front: methods of higher mean accuracy than all that cost no more, cheapest first."""
    costs = {
        method: summary[name]["value"] for method in list_methods(summary) if (name := f"{cost}.{method}") in summary
    }
    best: list[str] = []
    for method in sorted(costs, key=lambda one: (costs[one], -summary[f"accuracy.{one}"]["value"])):
        if not best or summary[f"accuracy.{method}"]["value"] > summary[f"accuracy.{best[-1]}"]["value"]:
            best.append(method)
    return best


def find_unmeasured(summary: Summary, *names: str) -> list[str]:
    """Those of the named methods that the summary lacks."""
    return [name for name in names if f"accuracy.{name}" not in summary]


def find_nabla_within_flops_share(summary: Summary) -> str | None:
    """The costliest nabla run within the target's share: chosen by cost, so that luck can't choose."""
    ours = [m for m in list_methods(summary) if parse_family(m)[0] == "nabla"]
    within = [m for m in ours if compute_cost_ratio(summary, "flops", m, "best_of_16") <= MAX_FLOPS_SHARE]
    return max(within, key=lambda m: summary[f"flops.{m}"]["value"], default=None)
