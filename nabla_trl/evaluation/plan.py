"""Method names as users write them, and the steps of an evaluation that make their rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from nabla_trl.baselines.step_tree import step_finder
from nabla_trl.evaluation.method import LABELS, RIVAL, SEARCHES, STEPWISE, SYNTAX, family, labels, main_search, split
from nabla_trl.evaluation.runner import Bench, Step
from nabla_trl.models.policy import Policy
from nabla_trl.search.config import PRESETS, ReasonerConfig

_BUDGET = r"@(\d*[1-9]\d*(\.\d*)?|\d*\.\d*[1-9]\d*|best_of_[1-9]\d*)"
_SAMPLES = r"samples_[1-9]\d{0,2}"  # further ones overflow the estimators
_FORMS = re.compile(
    rf"greedy|{RIVAL}|(weighted_)?best_of_[1-9]\d*|self_consistency_[1-9]\d*|{_SAMPLES}"
    rf"|({'|'.join(SEARCHES)})({_BUDGET})?|({'|'.join(STEPWISE)})(_[1-9]\d*|{_BUDGET})"
    rf"|({'|'.join(LABELS)})_(greedy|best_of_[1-9]\d*|{_SAMPLES}|(nabla|control)({_BUDGET})?)"
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
    """The method that sets the budget of a search, and how many times its FLOPs: nabla@0.5 -> (best_of_16, 0.5).

    It is the base policy's, whoever searches: budgets are equal across policies.
    """
    share = name.partition("@")[2]
    return (share, 1.0) if share.startswith("best_of") else ("best_of_16", float(share))


def searches(names: Sequence[str]) -> bool:
    """Some of these methods refine responses, as the reward says."""
    return any(_search(split(name)[1]) for name in names)


def chosen_among(names: Sequence[str]) -> int:
    """The most samples that one of these methods chooses among by the reward; 1 where none does."""
    rests = [split(name)[1] for name in names]
    sizes = [_sizes(rests, prefix) for prefix in ("best_of_", "weighted_best_of_")]
    sizes.append([_breadth(name) for name in rests if _stepwise(name)])
    return max([1, *(size for some in sizes for size in some)])


def stepwise_settings(names: Sequence[str], bench: Bench) -> dict[str, str]:
    """What the rows of searches over steps depend on beside the rest, for `claim_settings`; empty without any.

    Raises:
        ValueError: the policy cannot make such steps.
    """
    if not any(map(_stepwise, names)):
        return {}
    step_finder(bench.policy, bench.stepwise.delimiter(bench.reward.delimiter))
    return bench.stepwise.settings(bench.reward.delimiter)


def steps(
    names: Sequence[str], bench: Bench, tuned: Mapping[str, Policy], flops_of: Callable[[str], float]
) -> Iterator[Step]:
    """The steps of these methods; each must have run before the next is asked for.

    Args:
        tuned: label -> trained policy, for the methods that begin with its label.
        flops_of: mean FLOPs per problem of a method whose rows are there.

    Raises:
        ValueError: before the first step, where a method lacks the policy, solver or better model it needs.
    """
    check(names, bench, tuned)
    yield from _steps(_of("", names), bench, flops_of)
    for label, policy in tuned.items():
        yield from _steps(_of(label, names), bench.trained(label, policy), flops_of)


def _of(label: str, names: Sequence[str]) -> list[str]:
    """The methods of one policy, without its label."""
    return [rest for whose, rest in map(split, names) if whose == label]


def _steps(names: Sequence[str], bench: Bench, flops_of: Callable[[str], float]) -> Iterator[Step]:
    """The steps of one policy; names without its label."""
    best_of, majority = _sizes(names, "best_of_"), _sizes(names, "self_consistency_")
    weighted, samples = _sizes(names, "weighted_best_of_"), _sizes(names, "samples_")
    if best_of or majority or weighted or samples:
        yield bench.pool(best_of, majority, weighted, samples)
    if "greedy" in names:
        yield bench.greedy()
    main = main_search(names)
    for name in names:
        method = _search(name)
        if method:
            config = _config(method, bench.config)
            if "@" in name:
                setter, times = budget(name)
                config = _at_budget(method, bench.config, times * flops_of(setter))
            yield bench.search(name, config, traced=not bench.label and name == main)
        elif stepwise := _stepwise(name):
            setter, times = budget(name) if "@" in name else ("", 0.0)
            size = None if setter else _breadth(name)
            yield bench.by_steps(name, stepwise, size, times * flops_of(setter) if setter else 0.0, _breadth(name))
    if RIVAL in names:
        yield bench.rival()


def _search(name: str) -> str:
    """The search that a method without a label is, at whatever budget; empty for others."""
    method = name.partition("@")[0]
    return method if method in SEARCHES else ""


def _stepwise(name: str) -> str:
    """The search over steps that a method is, at whatever size or budget; empty for others."""
    method = family(name)[0]
    return method if method in STEPWISE else ""


def _breadth(name: str) -> int:
    """The size of a search over steps; at a budget, of how many samples that is the price."""
    size = family(name)[1]
    return math.ceil(16 * size) if "@" in name else int(size)


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


def check(names: Sequence[str], bench: Bench, tuned: Mapping[str, Policy]) -> None:
    """Refuse methods that cannot be run, before any work.

    Raises:
        ValueError: a method lacks the policy, solver or better model it needs, cannot be given a budget, or searches
            over steps that the policy cannot make.
    """
    for name in names:
        label = split(name)[0]
        if label and label not in tuned:
            raise ValueError(f"{name} needs {'an adapter: give --adapter' if label == 'distilled' else _train(label)}")
    unused = [label for label in tuned if label not in labels(names)]
    if unused:
        raise ValueError(f"there is an adapter, but no {unused[0]}_ method that uses it")
    if RIVAL in names:
        bench.rival()
    rests = [split(name)[1] for name in names]
    asked = {_search(rest) for rest in rests}
    if bench.config.solver == "none" and "nabla" in asked:
        raise ValueError("solver none is the control: ask for control instead of nabla, or choose another solver")
    if bench.config.solver != "mirror" and "shuffled" in asked:
        raise ValueError(f"shuffled is a control of solver mirror, not of {bench.config.solver}")
    stepwise_settings(names, bench)
    for rest in rests:
        if _search(rest) and "@" in rest:
            _at_budget(_search(rest), bench.config, 1.0)


def _train(label: str) -> str:
    return f"a policy trained by {label.replace('_', '-')}, which recipes/distill.py makes; there is none here"


def _sizes(names: Sequence[str], prefix: str) -> list[int]:
    return [int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)]
