"""Result rows and run facts -> the numbers of a report, by name. `nabla_trl.report` tells what rows and facts hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nabla_trl import stats
from nabla_trl.stats import Grid, Interval

Summary = dict[str, dict[str, float]]

FLOPS_SHARE = 1 / 3  # target: nabla reaches best-of-16 at no more than this share of its FLOPs
RIVAL = "reward_model_sampling"


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
        if is_known(facts, fact):
            found[f"seconds.{name}"] = Interval.exact(facts[fact])
    return {name: one.entry() for name, one in found.items()}


def methods(summary: Summary) -> list[str]:
    """The methods of a summary, in the order of the report."""
    return [name.partition(".")[2] for name in summary if name.startswith("accuracy.")]


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
    if not is_known(facts, "train_flops"):
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


def is_known(facts: Mapping, name: str) -> bool:
    """Whether the facts of a run hold a value of that name."""
    return facts.get(name) is not None


def cost_ratio(summary: Summary, cost: str, a: str, b: str) -> float:
    """The cost (flops or seconds) of method a over that of b; NaN where either is not known."""
    top, bottom = summary.get(f"{cost}.{a}"), summary.get(f"{cost}.{b}")
    return top["value"] / bottom["value"] if top and bottom and bottom["value"] else math.nan


def unmeasured(summary: Summary, *names: str) -> list[str]:
    """Those of the named methods that the summary lacks."""
    return [name for name in names if f"accuracy.{name}" not in summary]


def main_nabla(summary: Summary) -> str | None:
    """The last nabla run in the order of the report; None without one."""
    ours = [method for method in methods(summary) if stats.family(method)[0] == "nabla"]
    return ours[-1] if ours else None


def nabla_within(summary: Summary) -> str | None:
    """The costliest nabla run within the target's share: chosen by cost, so that luck can't choose."""
    ours = [m for m in methods(summary) if stats.family(m)[0] == "nabla"]
    within = [m for m in ours if cost_ratio(summary, "flops", m, "best_of_16") <= FLOPS_SHARE]
    return max(within, key=lambda m: summary[f"flops.{m}"]["value"], default=None)
