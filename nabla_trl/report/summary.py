"""From result rows and run facts to the numbers of a report, each under a name.

`nabla_trl.report.text` documents rows and facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.grids import METRICS, ResultGrid, build_grids
from nabla_trl.evaluation.method import REWARD_MODEL_SAMPLING, STEP_SEARCHES, Method, list_methods, list_policy_labels
from nabla_trl.evaluation.rows import Row
from nabla_trl.report.paper_claim import compute_paper_claims, list_claim_intervals
from nabla_trl.report.prices import (
    SECONDS_PER_HOUR,
    UNITS,
    Price,
    TrainingCost,
    compute_break_even,
    read_reward_price,
    read_training_costs,
)
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Interval

Summary = dict[str, dict[str, float]]

REWARD_LABEL = "reward"  # of the entry flops.training.reward
MAX_FLOPS_SHARE = 1 / 3  # target: nabla reaches best_of_16 with at most this share of its FLOPs
KIND_BASE, KIND_TEST_TIME, KIND_OTHER_MODEL, KIND_TRAINED, KIND_TRAINED_TEST_TIME = METHOD_KINDS = (
    "base",
    "test-time",
    "other model",
    "trained",
    "trained + test-time",
)
_SINGLE_SAMPLE_METHODS = ("greedy", "best_of_1")  # one response per query, no search


def summarize(rows: Sequence[Row], facts: Mapping) -> Summary:
    """Return the content of summary.json: name -> {"value", "low", "high", "seeds", "problems"}.

    An entry whose rows or facts are missing is left out. The names are:

    - accuracy., accuracy_strict., flops., seconds., dollars., tokens., calls., reward., kl. and errors.<method>: means
      per problem, in FLOPs, seconds, generated tokens, calls of models as the paper counts them
      (`nabla_trl.models.flops`) and nats. The strict accuracy counts only answers in the form of the task. Dollars
      are seconds at the price of a GPU hour, where the facts name one.
    - level.<level>.<method>: accuracy on the problems of one level, where the facts name several levels.
    - paired.<a>-<b>: accuracy of a minus accuracy of b. p_value.<a>-<b>: p-value of this difference.
      p_adjusted.<a>-<b>: the same, adjusted for the number of all these differences (Holm).
    - pgr_nabla.<label>_greedy and pgr_best.<label>_greedy: performance gap recovered by a trained policy's greedy
      decode, between base greedy and nabla, or between base greedy and the best test-time method.
    - break_even.<trained method>-<method>: number of queries, by FLOPs. break_even_seconds. and break_even_dollars.:
      the same by seconds and dollars. break_even_with_reward. and so on: the same with the training of the reward
      among the costs of training.
    - flops.training., seconds.training. and dollars.training.<label>, the same of the reward (label "reward"),
      seconds.setup and seconds.total.
    - calls_ratio.<search>-<best_of_N> and accuracy_ratio.<search>-greedy: ratios of means
      (`nabla_trl.report.paper_claim`).
    - pass@<k>., maj@<k>. and avg@<n>.<policy> of samples_n (`nabla_trl.evaluation.metrics`).

    Raises:
        ValueError: Rows are incomplete, repeated or of several tasks, or the facts of a training are incomplete.
    """
    grids = build_grids(rows)
    training_costs = read_training_costs(facts)
    rate = facts.get("dollars_per_gpu_hour")
    summary = {name: interval.to_dict() for name, interval in _compute_means(grids, rate).items()}
    best = find_best_test_time(summary)
    intervals = (
        _compute_level_means(grids, facts)
        | _compute_paired_differences(grids, best)
        | _compute_training_entries(grids, training_costs, best, read_reward_price(facts), rate)
        | list_claim_intervals(compute_paper_claims(grids))
        | metrics.estimate_sample_metrics(rows)
    )
    for name in ("setup", "total"):
        if facts.get(f"{name}_seconds") is not None:
            intervals[f"seconds.{name}"] = Interval.exact(facts[f"{name}_seconds"])
    return summary | {name: interval.to_dict() for name, interval in intervals.items()}


def _compute_means(grids: Mapping[str, ResultGrid], dollars_per_gpu_hour: float | None) -> dict[str, Interval]:
    means = {
        f"{metric}.{method}": mean
        for metric in METRICS
        for method, grid in grids.items()
        if (mean := grid.compute_mean(metric)) is not None
    }
    if dollars_per_gpu_hour is not None:
        for method in grids:
            if (seconds := means.get(f"seconds.{method}")) is not None:  # an lm-eval log may not know them
                means[f"dollars.{method}"] = _scale(seconds, dollars_per_gpu_hour / SECONDS_PER_HOUR)
    errors = {
        f"errors.{method}": Interval.exact(grid.num_errors, len(grid.seeds), len(grid.problems))
        for method, grid in grids.items()
    }
    return means | errors


def _scale(interval: Interval, factor: float) -> Interval:
    ends = {name: getattr(interval, name) * factor for name in ("value", "low", "high")}
    return replace(interval, **ends)


def group_problems_by_level(facts: Mapping) -> dict[str, list[str]]:
    """Return level -> its held-out problems, lowest level first. Empty where there are fewer than two levels."""
    levels: dict[str, list[str]] = {}
    for problem, problem_facts in (facts.get("problems") or {}).items():
        if problem_facts["level"] is not None:
            levels.setdefault(problem_facts["level"], []).append(problem)
    names = sorted(levels, key=lambda level: (not level.isdigit(), int(level) if level.isdigit() else 0, level))
    return {level: levels[level] for level in names} if len(levels) > 1 else {}


def _compute_level_means(grids: Mapping[str, ResultGrid], facts: Mapping) -> dict[str, Interval]:
    means = {}
    for level, problems in group_problems_by_level(facts).items():
        for method, grid in grids.items():
            accuracies = grid.get_problem_values("accuracy")
            values = [accuracies[problem] for problem in problems if problem in accuracies]
            if values:
                means[f"level.{level}.{method}"] = statistics.proportion_interval(np.array(values))
    return means


def _compute_paired_differences(grids: Mapping[str, ResultGrid], best: str | None) -> dict[str, Interval]:
    pairs = [*_list_search_pairs(grids), *_list_training_pairs(grids, best), *_list_overoptimization_pairs(grids)]
    gaps = {(a, b): compare_grids(grids, "accuracy", a, b) for a, b in pairs}
    adjusted = statistics.adjust_p_values({pair: gap.p_value for pair, gap in gaps.items()})
    differences: dict[str, Interval] = {}
    for (a, b), gap in gaps.items():
        differences[f"paired.{a}-{b}"] = gap
        for name, p_value in (("p_value", gap.p_value), ("p_adjusted", adjusted[a, b])):
            differences[f"{name}.{a}-{b}"] = Interval.exact(p_value, gap.num_seeds, gap.num_problems)
    return differences


def compare_grids(grids: Mapping[str, ResultGrid], metric: str, a: str, b: str) -> statistics.PairedDifference:
    """Return the paired difference of a metric, method a minus method b."""
    return grids[a].compute_difference(metric, grids[b])


def _list_search_pairs(grids: Mapping[str, ResultGrid]) -> list[tuple[str, str]]:
    searches = [name for name in grids if Method.parse(name).name == "nabla"]
    base_searches = [name for name in searches if not Method.parse(name).policy]
    main = "nabla" if "nabla" in grids or not base_searches else base_searches[-1]
    pairs = [(name, name.replace("nabla", "control")) for name in searches]
    pairs += [(name, baseline) for name in base_searches for baseline in _list_baselines(name)]
    pairs += [(main, "greedy"), (main, REWARD_MODEL_SAMPLING)]
    return [(a, b) for a, b in pairs if a in grids and b in grids]


def _list_baselines(search: str) -> list[str]:
    """Return best_of_16, the method that sets the budget of a search, and the step-level searches at this budget."""
    method = Method.parse(search)
    step_searches = [f"{name}@{method.budget}" for name in STEP_SEARCHES if method.budget]
    votes = [f"self_consistency@{method.budget}"] if method.budget else []
    return ["best_of_16", method.budget_reference, f"weighted_{method.budget_reference}", *votes, *step_searches]


def _list_training_pairs(grids: Mapping[str, ResultGrid], best: str | None) -> list[tuple[str, str]]:
    """Return the pairs that training is judged by.

    They are every method of a trained policy against the same method of the base policy, trained greedy decodes
    against nabla, `best` and each other, and `best` against base greedy.
    """
    trained = [f"{label}_greedy" for label in list_policy_labels(grids)]
    pairs = [(str(method), str(method.base_method)) for method in map(Method.parse, grids) if method.policy]
    pairs += [(greedy, baseline) for greedy in trained for baseline in ("nabla", best or "nabla")]
    pairs += combinations(trained, 2)
    pairs += [(best, "greedy")] if trained and best else []
    return [(a, b) for a, b in pairs if a in grids and b in grids]


def _list_overoptimization_pairs(grids: Mapping[str, ResultGrid]) -> list[tuple[str, str]]:
    """Return for best-of-N, control and nabla the most expensive run against the cheapest and the best run."""
    pairs = []
    for family in ("best_of", "control", "nabla"):
        curve = [method for method in grids if Method.parse(method).family == family]
        curve.sort(key=lambda method: grids[method].columns["flops"].mean())
        if len(curve) > 1:
            best = max(curve, key=lambda method: grids[method].columns["accuracy"].mean())
            pairs += [(curve[-1], other) for other in dict.fromkeys([curve[0], best]) if other != curve[-1]]
    return pairs


def _compute_training_entries(
    grids: Mapping[str, ResultGrid],
    training_costs: Mapping[str, TrainingCost],
    best: str | None,
    reward_price: Price,
    dollars_per_gpu_hour: float | None,
) -> dict[str, Interval]:
    entries = _compute_pgr(grids, "pgr_nabla", "nabla") | _compute_pgr(grids, "pgr_best", best)
    prices = {label: cost.price for label, cost in training_costs.items()}
    for label, price in {**prices, REWARD_LABEL: reward_price}.items():
        for unit in UNITS:
            if (amount := price.get_amount(unit, dollars_per_gpu_hour)) is not None:
                entries[f"{unit}.training.{label}"] = Interval.exact(amount)
    entries |= _compute_break_evens(grids, prices, "", dollars_per_gpu_hour)
    with_reward = {label: price + reward_price for label, price in prices.items()}
    return entries | _compute_break_evens(grids, with_reward, "_with_reward", dollars_per_gpu_hour)


def _compute_pgr(grids: Mapping[str, ResultGrid], name: str, reference_method: str | None) -> dict[str, Interval]:
    """Return the performance gap recovered (PGR) by every trained greedy decode.

    PGR = (accuracy of the decode − accuracy of base greedy) / (accuracy of the reference method − accuracy of base
    greedy). Empty without the rows, and where the reference method may be no better than greedy.
    """
    if reference_method is None or not grids.keys() >= {"greedy", reference_method}:
        return {}
    shares = {}
    for method in grids:
        if _is_trained_greedy(method):
            accuracies = [grids[name].get_problem_values("accuracy") for name in (method, reference_method, "greedy")]
            shares[f"{name}.{method}"] = statistics.performance_gap_recovered(*accuracies)
    return {name: share for name, share in shares.items() if share is not None}


def _compute_break_evens(
    grids: Mapping[str, ResultGrid], prices: Mapping[str, Price], suffix: str, dollars_per_gpu_hour: float | None
) -> dict[str, Interval]:
    """Return break_even<suffix>.<a>-<b>, and the same by seconds and dollars, where method a of a trained policy pays.

    A pair is left out where the saving per query may be zero or the cost of training is not known.
    """
    entries = {}
    for method in grids:
        price = prices.get(Method.parse(method).policy)
        if price is None:
            continue
        for baseline in [name for name in grids if not Method.parse(name).policy]:
            for unit in UNITS:
                amount = price.get_amount(unit, dollars_per_gpu_hour)
                result = compute_break_even(grids[method], grids[baseline], unit, amount, dollars_per_gpu_hour)
                if result.queries is not None:
                    name = get_break_even_name(unit, suffix)
                    entries[f"{name}.{method}-{baseline}"] = result.queries
    return entries


def get_break_even_name(unit: str, suffix: str = "") -> str:
    """Return the name of the break-even by FLOPs, seconds or dollars. Suffix "_with_reward": the reward included."""
    return f"break_even{suffix}" if unit == "flops" else f"break_even_{unit}{suffix}"


# --- queries on a summary -----------------------------------------------------------------------------


def get_value(summary: Summary, metric: str, method: str) -> float:
    """Return the value of an entry, NaN where the summary lacks it."""
    return summary.get(f"{metric}.{method}", {"value": math.nan})["value"]


def compute_cost_ratio(summary: Summary, cost: str, a: str, b: str) -> float:
    """Return the cost (flops, seconds or tokens) of method a over that of b. NaN where either is not known."""
    divisor = get_value(summary, cost, b)
    return get_value(summary, cost, a) / divisor if divisor else math.nan


def parse_pairs(summary: Summary, prefix: str) -> list[tuple[str, str]]:
    """Return (a, b) of every entry <prefix>.<a>-<b>. Method names hold no hyphen."""
    names = [name.removeprefix(f"{prefix}.") for name in summary if name.startswith(f"{prefix}.")]
    return [(a, b) for a, _, b in (name.partition("-") for name in names)]


def find_unmeasured(summary: Summary, *methods: str) -> list[str]:
    """Return those of the methods that the summary lacks."""
    return [method for method in methods if f"accuracy.{method}" not in summary]


def find_pareto_front(summary: Summary, cost: str) -> list[str]:
    """Return the methods of higher mean accuracy than all that cost no more, cheapest first."""
    methods = [method for method in list_methods(summary) if f"{cost}.{method}" in summary]
    front: list[str] = []
    for method in sorted(methods, key=lambda m: (get_value(summary, cost, m), -get_value(summary, "accuracy", m))):
        if not front or get_value(summary, "accuracy", method) > get_value(summary, "accuracy", front[-1]):
            front.append(method)
    return front


def find_nabla_within_flops_share(summary: Summary) -> str | None:
    """Return the most expensive nabla run within the target's share of FLOPs. None without one.

    The run is selected by cost and not by accuracy, so that a lucky run has no advantage.
    """
    searches = [method for method in list_methods(summary) if Method.parse(method).family == "nabla"]
    within = [m for m in searches if compute_cost_ratio(summary, "flops", m, "best_of_16") <= MAX_FLOPS_SHARE]
    return max(within, key=lambda method: get_value(summary, "flops", method), default=None)


def get_method_kind(method: str) -> str:
    """Return which of `METHOD_KINDS` a method is."""
    parsed = Method.parse(method)
    single = str(parsed.base_method) in _SINGLE_SAMPLE_METHODS
    if parsed.policy:
        return KIND_TRAINED if single else KIND_TRAINED_TEST_TIME
    if method == REWARD_MODEL_SAMPLING:
        return KIND_OTHER_MODEL
    return KIND_BASE if single else KIND_TEST_TIME


def select_methods_of_kind(summary: Summary, *kinds: str) -> list[str]:
    """Return the methods of these kinds, in the order of the report."""
    return [method for method in list_methods(summary) if get_method_kind(method) in kinds]


def list_trained_greedy(summary: Summary) -> list[str]:
    """Return the greedy decodes of trained policies, <label>_greedy."""
    return [method for method in list_methods(summary) if _is_trained_greedy(method)]


def _is_trained_greedy(method: str) -> bool:
    return bool(Method.parse(method).policy) and Method.parse(method).name == "greedy"


def find_best_test_time(summary: Summary) -> str | None:
    """Return the base policy's search or sampling with the highest mean accuracy, the cheapest among equals."""
    return _find_most_accurate(summary, select_methods_of_kind(summary, KIND_TEST_TIME))


def find_best_trained(summary: Summary) -> str | None:
    """Return the trained greedy decode with the highest mean accuracy, the cheapest among equals."""
    return _find_most_accurate(summary, list_trained_greedy(summary))


def _find_most_accurate(summary: Summary, methods: Iterable[str]) -> str | None:
    def rank(method: str) -> tuple[float, float]:
        return get_value(summary, "accuracy", method), -get_value(summary, "flops", method)

    return max(methods, key=rank, default=None)
