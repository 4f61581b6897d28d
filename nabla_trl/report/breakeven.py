"""After how many queries does training pay, compared with methods that need none? From the rows of any evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nabla_trl.evaluation.grids import ResultGrid, build_grids
from nabla_trl.evaluation.lm_eval_logs import has_lm_eval_logs, read_lm_eval_rows
from nabla_trl.evaluation.method import Method, sort_methods
from nabla_trl.evaluation.results import load_results
from nabla_trl.evaluation.rows import Row, read_rows
from nabla_trl.evaluation.run_facts import compute_reward_training_cost
from nabla_trl.report.prices import (
    UNIT_WORDS,
    UNITS,
    BreakEven,
    Price,
    compute_break_even,
    format_queries,
    read_reward_price,
    read_training_costs,
)
from nabla_trl.report.text import check_facts
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import finite_or_none, format_names
from nabla_trl.utils.statistics import Interval, PairedDifference, adjust_differences, proportion_interval

_REASONS = {
    "never": "a query costs no less",
    "unsure": "the saving per query may be zero",
    "not known": "a cost is not known",
}


@dataclass(frozen=True)
class Source:
    """Rows with what is known of the trainings behind them.

    Attributes:
        prices: price of the training, by label of the policy. `reward_price`: of the reward.
        methods_with_means: methods whose rows all hold the mean cost, so that the spread of costs is not known.
    """

    rows: list[Row]
    prices: dict[str, Price] = field(default_factory=dict)
    reward_price: Price = field(default_factory=Price)
    dollars_per_gpu_hour: float | None = None
    methods_with_means: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PairBreakEven:
    """A method of a trained policy against a baseline that needs no training.

    Attributes:
        gap: accuracy of the trained one minus the baseline's. Its p-value is adjusted for the number of pairs.
        num_problems: problems that both have.
        baseline_costs: mean FLOPs and seconds of the baseline per query. None: not known.
        by_unit: "flops", "seconds" and "dollars" -> break-even. `by_unit_with_reward`: the training of the reward
            included.
    """

    trained: str
    baseline: str
    accuracy: Interval
    baseline_accuracy: Interval
    gap: PairedDifference
    num_problems: int
    baseline_costs: dict[str, float | None]
    by_unit: dict[str, BreakEven]
    by_unit_with_reward: dict[str, BreakEven]

    @property
    def is_less_accurate(self) -> bool:
        """Return whether the trained one is less accurate beyond chance. Then the training pays for nothing."""
        return self.gap.side == "behind"


def compute_breakeven(
    results: str | Path | Sequence[str | Path] | Sequence[Row],
    *,
    trained: Sequence[str] = (),
    baselines: Sequence[str] = (),
    training: Price | None = None,
    reward_training: Price | None = None,
    dollars_per_gpu_hour: float | None = None,
    **lm_eval_options: str,
) -> list[PairBreakEven]:
    """Return for each trained method and each baseline after how many queries the training has paid for itself.

    Args:
        results: rows, or one or several of: the folder of an evaluation, a rows.jsonl, and a folder that lm-eval wrote
            with --log_samples. NAME=PATH names the method of an lm-eval log, and prefixes an evaluation's methods.
        trained: methods that needed the training (default: the greedy decodes of trained policies).
        baselines: methods to compare with (default: all methods of policies that were not trained).
        training: price of the training, with its traces and the audit. What it leaves out is taken from facts.json
            beside the rows, if there is one.
        reward_training: price of training the reward. What it leaves out is taken from facts.json or the reward's
            folder.
        dollars_per_gpu_hour: price of an hour of the device of one process (default: that of facts.json).
        lm_eval_options: `task`, `metric` and `filter_name` of `read_lm_eval_rows`.

    Raises:
        ValueError: rows that cannot be read, unknown methods, methods without a common problem, or a price that is not
            positive.
    """
    if dollars_per_gpu_hour is not None and not 0 < dollars_per_gpu_hour < math.inf:
        raise ValueError(f"dollars_per_gpu_hour must be positive, not {dollars_per_gpu_hour:g}")
    source = load_sources(results, **lm_eval_options)
    trained, baselines = _select_methods(source.rows, trained, baselines)
    rate = source.dollars_per_gpu_hour if dollars_per_gpu_hour is None else dollars_per_gpu_hour
    reward_price = (reward_training or Price()).fill_unknown(source.reward_price)
    grids = {(a, b): _build_pair(source.rows, a, b) for a in trained for b in baselines}
    gaps = adjust_differences({pair: a.compute_difference("accuracy", b) for pair, (a, b) in grids.items()})
    pairs = []
    for (a, b), (grid, baseline_grid) in grids.items():
        price = (training or Price()).fill_unknown(source.prices.get(Method.parse(a).policy))
        has_spread = source.methods_with_means.isdisjoint((a, b))
        by_unit, with_reward = (
            {
                unit: _compute_unit(grid, baseline_grid, unit, own_price.get_amount(unit, rate), rate, has_spread)
                for unit in UNITS
            }
            for own_price in (price, price + reward_price)
        )
        pairs.append(
            PairBreakEven(
                trained=a,
                baseline=b,
                accuracy=proportion_interval(grid.columns["accuracy"]),
                baseline_accuracy=proportion_interval(baseline_grid.columns["accuracy"]),
                gap=gaps[a, b],
                num_problems=len(grid.problems),
                baseline_costs={
                    unit: finite_or_none(float(baseline_grid.columns[unit].mean())) for unit in ("flops", "seconds")
                },
                by_unit=by_unit,
                by_unit_with_reward=with_reward,
            )
        )
    return pairs


def _select_methods(
    rows: Sequence[Row], trained: Sequence[str], baselines: Sequence[str]
) -> tuple[list[str], list[str]]:
    known = sort_methods(row.method for row in rows)
    known = [name for name in known if not Method.parse(name).num_samples]  # samples_N has no single answer
    trained = list(dict.fromkeys(trained))
    trained = trained or [name for name in known if Method.parse(name).policy and Method.parse(name).name == "greedy"]
    baselines = list(dict.fromkeys(baselines))
    baselines = baselines or [name for name in known if not Method.parse(name).policy and name not in trained]
    if unknown := [name for name in (*trained, *baselines) if name not in known]:
        raise ValueError(f"no rows of {', '.join(unknown)}: choose from {', '.join(known)}")
    if not trained or not baselines:
        missing = "trained method" if not trained else "baseline"
        raise ValueError(f"name a {missing}: the rows hold {', '.join(known) or 'no methods with single answers'}")
    if both := sorted(set(trained) & set(baselines)):
        raise ValueError(f"{', '.join(both)} cannot be trained method and baseline at once")
    return trained, baselines


def _compute_unit(
    grid: ResultGrid, baseline: ResultGrid, unit: str, amount: float | None, rate: float | None, has_spread: bool
) -> BreakEven:
    result = compute_break_even(grid, baseline, unit, amount, rate)
    if result.queries is None or has_spread:
        return result
    return replace(result, queries=replace(result.queries, low=-math.inf, high=math.inf))


def _build_pair(rows: Sequence[Row], a: str, b: str) -> tuple[ResultGrid, ResultGrid]:
    """Return the results of two methods on the problems that both have."""
    by_method = {name: [row for row in rows if row.method == name] for name in (a, b)}
    problems = {name: {(row.task, row.problem) for row in own} for name, own in by_method.items()}
    common = problems[a] & problems[b]
    if not common:
        examples = [f"{name} has {format_names([p for _, p in sorted(own)], 2)}" for name, own in problems.items()]
        raise ValueError(f"{a} and {b} have no problem in common: {', '.join(examples)}")
    grids = build_grids([row for own in by_method.values() for row in own if (row.task, row.problem) in common])
    return grids[a], grids[b]


# --- sources ------------------------------------------------------------------------------------------


def load_sources(results: str | Path | Sequence[str | Path] | Sequence[Row], **lm_eval_options: str) -> Source:
    """Return the rows of all sources, as `compute_breakeven` takes them, with the prices that their facts name.

    Raises:
        ValueError: a source that cannot be read, or two with rows of the same method.
    """
    if isinstance(results, str | Path):
        results = [results]
    rows = [item for item in results if isinstance(item, Row)]
    sources = [Source(rows)] if rows else []
    sources += [_load_source(item, lm_eval_options) for item in results if isinstance(item, str | Path)]
    methods = [name for source in sources for name in {row.method for row in source.rows}]
    if repeated := sorted({name for name in methods if methods.count(name) > 1}):
        raise ValueError(f"several sources hold rows of {', '.join(repeated)}: tell them apart with NAME=PATH")
    prices: dict[str, Price] = {}
    for source in sources:
        if clash := next((label for label, price in source.prices.items() if prices.get(label, price) != price), None):
            raise ValueError(f"two sources name different costs of training {clash}: give the cost as an option")
        prices |= source.prices
    return Source(
        [row for source in sources for row in source.rows],
        prices,
        next((source.reward_price for source in sources if source.reward_price != Price()), Price()),
        next((rate for source in sources if (rate := source.dollars_per_gpu_hour) is not None), None),
        frozenset().union(*(source.methods_with_means for source in sources)),
    )


def _load_source(item: str | Path, lm_eval_options: Mapping[str, str]) -> Source:
    name, _, path_text = str(item).rpartition("=")
    path = Path(path_text)
    if name and Path(item).exists():  # a path with an equals sign
        name, path = "", Path(item)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not (path / "rows.jsonl").exists() and has_lm_eval_logs(path):
        rows = read_lm_eval_rows(path, name, **lm_eval_options)
        return Source(rows, methods_with_means=frozenset(row.method for row in rows))
    rows, facts = _load_evaluation(path)
    if name:
        rows = [replace(row, method=f"{name}_{row.method}") for row in rows]
    prices = {label: cost.price for label, cost in read_training_costs(facts).items()}
    return Source(rows, prices, read_reward_price(facts), facts.get("dollars_per_gpu_hour"))


def _load_evaluation(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return rows, and the facts beside them if there are any."""
    facts: dict[str, Any] = {}
    if path.is_dir():
        rows, facts = load_results(path)
    else:
        rows = read_rows(path)
        facts_path = path.with_name("facts.json")
        facts = read_json_file(facts_path) if facts_path.exists() else {}
    if facts:
        check_facts(facts)
    if facts and not read_reward_price(facts).flops:  # of an earlier version, or evaluated without it
        with suppress(ValueError, OSError):
            facts = facts | compute_reward_training_cost(facts["reward"])
    return rows, facts


# --- words --------------------------------------------------------------------------------------------


def describe_breakeven(pairs: Sequence[PairBreakEven]) -> list[str]:
    """Return a sentence for each trained method: against which baseline of equal accuracy it pays, and when."""
    by_method: dict[str, list[PairBreakEven]] = {}
    for pair in pairs:
        by_method.setdefault(pair.trained, []).append(pair)
    return [_describe_method(name, own) for name, own in by_method.items()]


def _describe_method(name: str, pairs: Sequence[PairBreakEven]) -> str:
    """Compare with the cheapest of the baselines whose accuracy does not differ, else with the most accurate one."""
    head = f"{name} ({pairs[0].accuracy.value:.3f})"
    not_behind = [pair for pair in pairs if not pair.is_less_accurate]
    if not not_behind:
        return f"{head} never pays: every baseline is more accurate beyond chance."
    equal = [pair for pair in not_behind if not pair.gap.side]
    if equal:
        pair, role = min(equal, key=_get_sort_cost), "the cheapest baseline that is as accurate within chance"
    else:
        pair = max(not_behind, key=lambda pair: pair.baseline_accuracy.value)
        role = "the most accurate baseline, which is less accurate"
    baseline = f"{pair.baseline} ({pair.baseline_accuracy.value:.3f}), {role}"
    plain, full = (_describe_units(units) for units in (pair.by_unit, pair.by_unit_with_reward))
    if not plain:
        outcomes = [result.outcome for result in pair.by_unit.values()]
        outcome = next((outcome for outcome in outcomes if outcome != "not known"), "not known")
        return f"{head} does not pay against {baseline}: {_REASONS[outcome]}."
    with_reward = f". With the training of the reward: after {full}" if full else ""
    return f"{head} pays against {baseline}: after {plain}{with_reward}."


def _get_sort_cost(pair: PairBreakEven) -> tuple[float, float]:
    """Return FLOPs, then seconds, of the baseline. What is not known comes last."""
    flops, seconds = (math.inf if cost is None else cost for cost in pair.baseline_costs.values())
    return flops, seconds


def _describe_units(by_unit: Mapping[str, BreakEven]) -> str:
    texts = []
    for unit, result in by_unit.items():
        if result.queries is not None:
            count = "the first query" if result.outcome == "at once" else f"{format_queries(result)} queries"
            texts.append(f"{count} by {UNIT_WORDS[unit]}")
    return ", ".join(texts)
