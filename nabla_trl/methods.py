"""Method names as users write them, and the steps of an evaluation that make their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nabla_trl.config import PRESETS, ReasonerConfig
from nabla_trl.evaluate import Bench, Step
from nabla_trl.models import Policy

RIVAL = "reward_model_sampling"
SYNTAX = (
    "greedy, best_of_N, weighted_best_of_N, self_consistency_N; the searches nabla, control (without the gradient), "
    "shuffled (its rows in disorder), paper and released (presets), each also as nabla@best_of_N (at that method's "
    f"FLOPs) or nabla@F (at F times best_of_16's); {RIVAL} (log-ratio rewards); distilled_greedy, distilled_best_of_N "
    "(need an adapter)"
)
SEARCHES = ("nabla", "control", "shuffled", "paper", "released")
_FORMS = re.compile(
    rf"greedy|{RIVAL}|distilled_greedy|(distilled_|weighted_)?best_of_[1-9]\d*|self_consistency_[1-9]\d*"
    rf"|({'|'.join(SEARCHES)})(@(\d*[1-9]\d*(\.\d*)?|\d*\.\d*[1-9]\d*|best_of_[1-9]\d*))?"
)


def method_names(text: str) -> list[str]:
    """Names from a comma-separated list.

    Raises:
        ValueError: none, an unknown one, or a budget without the method that sets it.
    """
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise ValueError(f"no methods: give some of {SYNTAX}")
    unknown = next((name for name in names if not _FORMS.fullmatch(name)), None)
    if unknown is not None:
        raise ValueError(f"unknown method {unknown!r}: known are {SYNTAX}")
    for name in names:
        setter = budget(name)[0] if "@" in name else name
        if setter not in names:
            raise ValueError(f"the budget of {name} is set by {setter}'s FLOPs: add {setter} to the methods")
    return names


def budget(name: str) -> tuple[str, float]:
    """The method that sets the budget of a search, and how many times its FLOPs: nabla@0.5 -> (best_of_16, 0.5)."""
    share = name.partition("@")[2]
    return (share, 1.0) if share.startswith("best_of") else ("best_of_16", float(share))


def searches(names: Sequence[str]) -> bool:
    """Some of these methods refine responses, as the reward says."""
    return any(name.partition("@")[0] in SEARCHES for name in names)


def chosen_among(names: Sequence[str]) -> int:
    """The most samples that one of these methods chooses among by the reward; 1 where none does."""
    sizes = [_sizes(names, prefix) for prefix in ("best_of_", "weighted_best_of_", "distilled_best_of_")]
    return max([1, *(size for some in sizes for size in some)])


def steps(
    names: Sequence[str], bench: Bench, tuned: Policy | None, flops_of: Callable[[str], float]
) -> Iterator[Step]:
    """The steps of these methods; each must have run before the next is asked for.

    Args:
        tuned: the policy of distilled_* methods.
        flops_of: mean FLOPs per problem of a method whose rows are there.

    Raises:
        ValueError: before the first step, where a method lacks the policy, solver or better model it needs.
    """
    check(names, bench, tuned)
    best_of, majority = _sizes(names, "best_of_"), _sizes(names, "self_consistency_")
    weighted = _sizes(names, "weighted_best_of_")
    if best_of or majority or weighted:
        yield bench.pool(best_of, majority, weighted)
    if "greedy" in names:
        yield bench.greedy()
    for name in names:
        method, _, share = name.partition("@")
        if method in SEARCHES:
            config = _config(method, bench.config)
            if share:
                setter, times = budget(name)
                config = _at_budget(method, bench.config, times * flops_of(setter))
            yield bench.search(name, config)
    if RIVAL in names:
        yield bench.pool([1], policy=bench.reward.rival, names={1: RIVAL}, scored=False)
    if "distilled_greedy" in names:
        yield bench.greedy(tuned, "distilled_greedy")
    sizes = _sizes(names, "distilled_best_of_")
    if sizes:
        yield bench.pool(sizes, policy=tuned, names={size: f"distilled_best_of_{size}" for size in sizes})


def budgeted(config: ReasonerConfig, flops: float) -> ReasonerConfig:
    """A configuration with FLOPs per problem as its only limit."""
    return replace(config, flops=flops, rounds=0, rollouts=0, patience=0)


def _at_budget(method: str, config: ReasonerConfig, flops: float) -> ReasonerConfig:
    """A search at a budget. A preset, by itself one response scanned once, begins anew until its budget is spent."""
    made = budgeted(_config(method, config), flops)
    return replace(made, restart=True) if method in PRESETS else made


def _config(method: str, config: ReasonerConfig) -> ReasonerConfig:
    """The configuration of a search, from that of nabla."""
    if method in PRESETS:
        shared = {name: getattr(config, name) for name in ("candidates", "max_new_tokens", "batch_size")}
        return ReasonerConfig.preset(method, **shared)
    return {"nabla": lambda: config, "control": config.control, "shuffled": config.shuffled}[method]()


def check(names: Sequence[str], bench: Bench, tuned: Policy | None) -> None:
    """Refuse methods that cannot be run, before any work.

    Raises:
        ValueError: a method lacks the policy, solver or better model it needs, or cannot be given a budget.
    """
    distilled = next((name for name in names if name.startswith("distilled_")), None)
    if distilled is not None and tuned is None:
        raise ValueError(f"{distilled} needs an adapter")
    if distilled is None and tuned is not None:
        raise ValueError("there is an adapter, but no distilled_ method that uses it")
    if RIVAL in names and bench.reward.rival is None:
        raise ValueError(f"{RIVAL} needs a log-ratio reward: {bench.reward.name} has no model to sample from")
    if bench.config.solver == "none" and any(name.startswith("nabla") for name in names):
        raise ValueError("solver none is the control: ask for control instead of nabla, or choose another solver")
    if bench.config.solver != "mirror" and any(name.startswith("shuffled") for name in names):
        raise ValueError(f"shuffled is a control of solver mirror, not of {bench.config.solver}")
    for name in names:
        method, _, share = name.partition("@")
        if method in SEARCHES and share:
            _at_budget(method, bench.config, 1.0)


def _sizes(names: Sequence[str], prefix: str) -> list[int]:
    return [int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)]
