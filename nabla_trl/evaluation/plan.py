"""Method names as users write them, and the steps of an evaluation that make their rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from nabla_trl.baselines.step_tree import create_step_finder
from nabla_trl.evaluation.method import (
    METHOD_SYNTAX,
    POLICY_LABELS,
    REWARD_MODEL_SAMPLING,
    SEARCHES,
    STEP_SEARCHES,
    get_main_search,
    list_policy_labels,
    parse_family,
    split_label,
)
from nabla_trl.evaluation.runner import EvaluationSetup, Job
from nabla_trl.models.policy import Policy
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.options import MirrorSolver, NoGradient

_BUDGET_PATTERN = r"@(\d*[1-9]\d*(\.\d*)?|\d*\.\d*[1-9]\d*|best_of_[1-9]\d*)"
_SAMPLES_PATTERN = r"samples_[1-9]\d{0,2}"  # further ones overflow the estimators
_METHOD_PATTERN = re.compile(
    rf"greedy|{REWARD_MODEL_SAMPLING}|(weighted_)?best_of_[1-9]\d*|self_consistency_[1-9]\d*|{_SAMPLES_PATTERN}"
    rf"|({'|'.join(SEARCHES)})({_BUDGET_PATTERN})?|({'|'.join(STEP_SEARCHES)})(_[1-9]\d*|{_BUDGET_PATTERN})"
    rf"|({'|'.join(POLICY_LABELS)})_(greedy|best_of_[1-9]\d*|{_SAMPLES_PATTERN}|(nabla|control)({_BUDGET_PATTERN})?)"
)


def parse_methods(text: str) -> list[str]:
    """Names from a comma-separated list.

    Raises:
        ValueError: none, an unknown one, or a budget without the method that sets it.
    """
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise ValueError(f"no methods: give some of {METHOD_SYNTAX}")
    unknown = next((name for name in names if not _METHOD_PATTERN.fullmatch(name)), None)
    if unknown is not None:
        raise ValueError(f"unknown method {unknown!r}: known are {METHOD_SYNTAX}")
    for name in names:
        setter = parse_budget(name)[0] if "@" in name else name
        if setter not in names:
            raise ValueError(f"the budget of {name} is set by {setter}'s FLOPs: add {setter} to the methods")
    return names


def parse_budget(name: str) -> tuple[str, float]:
    """The method that sets the budget of a search, and how many times its FLOPs: nabla@0.5 -> (best_of_16, 0.5).

    It is the base policy's, whoever searches: budgets are equal across policies.
    """
    share = name.partition("@")[2]
    return (share, 1.0) if share.startswith("best_of") else ("best_of_16", float(share))


def has_search(names: Sequence[str]) -> bool:
    """Some of these methods refine responses, as the reward says."""
    return any(_get_search_name(split_label(name)[1]) for name in names)


def get_max_selection_size(names: Sequence[str]) -> int:
    """The most samples that one of these methods chooses among by the reward; 1 where none does."""
    rests = [split_label(name)[1] for name in names]
    sizes = [_parse_sizes(rests, prefix) for prefix in ("best_of_", "weighted_best_of_")]
    sizes.append([_get_step_search_size(name) for name in rests if _get_step_search_name(name)])
    return max([1, *(size for some in sizes for size in some)])


def get_step_search_settings(names: Sequence[str], setup: EvaluationSetup) -> dict[str, str]:
    """What the rows of searches over steps depend on beside the rest, for `claim_settings`; empty without any.

    Raises:
        ValueError: the policy cannot make such steps.
    """
    if not any(map(_get_step_search_name, names)):
        return {}
    create_step_finder(setup.policy, setup.step_search.resolve_delimiter(setup.reward.step_delimiter))
    return setup.step_search.get_settings(setup.reward.step_delimiter)


def plan_jobs(
    names: Sequence[str],
    setup: EvaluationSetup,
    trained_policies: Mapping[str, Policy],
    flops_of: Callable[[str], float],
) -> Iterator[Job]:
    """The steps of these methods; each must have run before the next is asked for.

    Args:
        tuned: label -> trained policy, for the methods that begin with its label.
        flops_of: mean FLOPs per problem of a method whose rows are there.

    Raises:
        ValueError: before the first step, where a method lacks the policy, solver or better model it needs.
    """
    check_methods(names, setup, trained_policies)
    yield from _plan_policy_jobs(_select_by_label("", names), setup, flops_of)
    for label, policy in trained_policies.items():
        yield from _plan_policy_jobs(
            _select_by_label(label, names), setup.with_trained_policy(label, policy), flops_of
        )


def _select_by_label(label: str, names: Sequence[str]) -> list[str]:
    """The methods of one policy, without its label."""
    return [rest for whose, rest in map(split_label, names) if whose == label]


def _plan_policy_jobs(names: Sequence[str], setup: EvaluationSetup, flops_of: Callable[[str], float]) -> Iterator[Job]:
    """The steps of one policy; names without its label."""
    best_of, majority = _parse_sizes(names, "best_of_"), _parse_sizes(names, "self_consistency_")
    weighted, samples = _parse_sizes(names, "weighted_best_of_"), _parse_sizes(names, "samples_")
    if best_of or majority or weighted or samples:
        yield setup.plan_sample_pool(best_of, majority, weighted, samples)
    if "greedy" in names:
        yield setup.plan_greedy()
    main = get_main_search(names)
    for name in names:
        method = _get_search_name(name)
        if method:
            config = _build_search_config(method, setup.config)
            if "@" in name:
                setter, times = parse_budget(name)
                config = _build_budget_config(method, setup.config, times * flops_of(setter))
            yield setup.plan_search(name, config, keep_traces=not setup.label and name == main)
        elif stepwise := _get_step_search_name(name):
            setter, times = parse_budget(name) if "@" in name else ("", 0.0)
            size = None if setter else _get_step_search_size(name)
            yield setup.plan_step_search(
                name, stepwise, size, times * flops_of(setter) if setter else 0.0, _get_step_search_size(name)
            )
    if REWARD_MODEL_SAMPLING in names:
        yield setup.plan_reward_model_sampling()


def _get_search_name(name: str) -> str:
    """The search that a method without a label is, at whatever budget; empty for others."""
    method = name.partition("@")[0]
    return method if method in SEARCHES else ""


def _get_step_search_name(name: str) -> str:
    """The search over steps that a method is, at whatever size or budget; empty for others."""
    method = parse_family(name)[0]
    return method if method in STEP_SEARCHES else ""


def _get_step_search_size(name: str) -> int:
    """The size of a search over steps; at a budget, of how many samples that is the price."""
    size = parse_family(name)[1]
    return math.ceil(16 * size) if "@" in name else int(size)


def limit_to_flops(config: SearchConfig, max_flops: float) -> SearchConfig:
    """A configuration with FLOPs per problem as its only limit."""
    return replace(config, max_flops=max_flops, max_rounds=0, max_rollouts=0, patience=0)


def _build_budget_config(method: str, config: SearchConfig, max_flops: float) -> SearchConfig:
    """A search at a budget. A preset, by itself one response scanned once, begins anew until its budget is spent."""
    made = limit_to_flops(_build_search_config(method, config), max_flops)
    return replace(made, restarts=True) if method in PRESETS else made


def _build_search_config(method: str, config: SearchConfig) -> SearchConfig:
    """The configuration of a search, from that of nabla."""
    if method in PRESETS:
        shared = {name: getattr(config, name) for name in ("top_k_candidates", "max_new_tokens", "batch_size")}
        return SearchConfig.from_preset(method, **shared)
    return {"nabla": lambda: config, "control": config.with_no_gradient, "shuffled": config.with_shuffled_gradient}[
        method
    ]()


def check_methods(names: Sequence[str], setup: EvaluationSetup, trained_policies: Mapping[str, Policy]) -> None:
    """Refuse methods that cannot be run, before any work.

    Raises:
        ValueError: a method lacks the policy, solver or better model it needs, cannot be given a budget, or searches
            over steps that the policy cannot make.
    """
    for name in names:
        label = split_label(name)[0]
        if label and label not in trained_policies:
            raise ValueError(
                f"{name} needs {'an adapter: give --adapter' if label == 'distilled' else _describe_missing_policy(label)}"
            )
    unused = [label for label in trained_policies if label not in list_policy_labels(names)]
    if unused:
        raise ValueError(f"there is an adapter, but no {unused[0]}_ method that uses it")
    if REWARD_MODEL_SAMPLING in names:
        setup.plan_reward_model_sampling()
    rests = [split_label(name)[1] for name in names]
    asked = {_get_search_name(rest) for rest in rests}
    if isinstance(setup.config.solver, NoGradient) and "nabla" in asked:
        raise ValueError("solver none is the control: ask for control instead of nabla, or choose another solver")
    if not isinstance(setup.config.solver, MirrorSolver) and "shuffled" in asked:
        raise ValueError(f"shuffled is a control of solver mirror, not of {setup.config.solver.name}")
    get_step_search_settings(names, setup)
    for rest in rests:
        if _get_search_name(rest) and "@" in rest:
            _build_budget_config(_get_search_name(rest), setup.config, 1.0)


def _describe_missing_policy(label: str) -> str:
    return f"a policy trained by {label.replace('_', '-')}, which recipes/distill.py makes; there is none here"


def _parse_sizes(names: Sequence[str], prefix: str) -> list[int]:
    return [int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)]
