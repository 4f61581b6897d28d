"""Groups of methods, in which tables and figures show them, and what each method does in a few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from nabla_trl.evaluation.method import (
    ALLOCATED_METHODS,
    ALLOCATED_SEARCHES,
    BUDGET_FORCING,
    POOL_METHODS,
    POWER_SAMPLERS,
    POWER_SEARCHES,
    REWARD_MODEL_SAMPLING,
    SEARCHES,
    STEP_SEARCHES,
    Method,
)

Groups = Mapping["MethodGroup", list[str]]  # group -> its methods


class MethodGroup(NamedTuple):
    """Methods that are compared with each other first."""

    title: str
    description: str


SINGLE_PASS = MethodGroup("Single pass", "one response, nothing to choose from")
VOTES = MethodGroup("Votes and best-of-N", "many independent responses, then a choice or a vote")
STEP_LEVEL = MethodGroup("Step-level searches", "the reward steers while a response is written, step by step")
SAMPLERS = MethodGroup("Samplers without a reward", "chains that sharpen the policy's own distribution")
TOKEN_LEVEL = MethodGroup("nabla and its controls", "whole responses are revised, token by token")
TRAINED = MethodGroup("Trained policies", "the policy was trained first, then it answers")
OTHER = MethodGroup("Other methods", "")
METHOD_GROUPS = (SINGLE_PASS, VOTES, STEP_LEVEL, SAMPLERS, TOKEN_LEVEL, TRAINED, OTHER)

_DESCRIPTIONS = {
    "greedy": "the most likely token at each place",
    "best_of": "N samples, the one with the highest reward",
    "weighted_best_of": "N samples, a vote weighted by the reward",
    "self_consistency": "N samples, the most frequent answer",
    "adaptive_consistency": "a vote that stops when its result is clear",
    BUDGET_FORCING: "one response whose thought is made longer",
    "dirichlet_consistency": "a vote that stops when its result is clear, whatever the other answers are",
    "confidence_vote": "N samples, a vote weighted by the policy's likelihood",
    "allocated_vote": "a vote, more samples where they may change the answer, one budget for all problems",
    "allocated_best_of": "best-of-N, more samples where the reward may still rise, one budget for all problems",
    "allocated_weighted_best_of": "the same with a vote weighted by the reward",
    "allocated_nabla": "the search, more rounds where the reward may still rise, one budget for all problems",
    "allocated_control": "the same without the gradient",
    "self_certainty": "N samples, a vote ranked by how far the policy is from guessing",
    "deepconf_tail": "a vote of the samples that end most confidently",
    "deepconf_bottom": "a vote of the samples whose weakest passages are most confident",
    "deepconf_online": "the same, and samples that lose confidence are stopped",
    "low_temperature": "N samples at a low temperature, the most frequent answer",
    "power_smc": "a population that sharpens the policy's distribution while it writes",
    "power_uniform": "a chain on the sharpened distribution that cuts at any place",
    "power_entropy": "the same chain, cut where the policy is uncertain",
    "power_jump": "the same chain, cut where the policy becomes uncertain",
    "power_gradient": "the same chain, cut where the gradient of its likelihood points to",
    REWARD_MODEL_SAMPLING: "one sample of the better model behind the reward",
    "beam_search": "keeps the best partial responses after each step",
    "dvts": "diverse verifier tree search: beam search in separate subtrees",
    "tot": "tree of thoughts: keeps the best states after each step",
    "rap": "reasoning via planning: Monte Carlo tree search",
    "particle_filter": "resamples partial responses by their reward",
    "entropic_particle_filter": "the same, but keeps them diverse at the beginning",
    "entropy_branching": "beam search that branches where the policy is uncertain",
    "ggro": "writes segments, each behind the token that the reward's gradient prefers",
    "nabla": "the search: changes tokens where the gradient of the reward points to",
    "control": "the same search without the gradient",
    "shuffled": "the same search, its gradient shuffled over the positions",
    "paper": "the search with the settings of the paper",
    "released": "the search with the settings of the paper's code",
    "qalign": "QAlign: a chain that samples the end of the response again",
}
_TRAININGS = {
    "distilled": "an adapter that was trained elsewhere",
    "sft": "SFT on the responses that the search selected",
    "reward_weighted": "SFT weighted by the reward",
    "dpo": "DPO on pairs from the traces",
    "soft_targets": "distillation of the search's refined distributions",
    "rloo": "RLOO on the reward",
    "grpo": "GRPO on the reward",
    "on_policy_distillation": "distillation of the refined distributions at the policy's own prefixes",
}


def get_method_group(method: str) -> MethodGroup:
    """Return the group of a method. Names that nothing is known about are `OTHER`."""
    parsed = Method.parse(method)
    if parsed.policy:
        return TRAINED
    if method == "best_of_1" or parsed.name in ("greedy", BUDGET_FORCING, REWARD_MODEL_SAMPLING):
        return SINGLE_PASS
    groups = {
        TOKEN_LEVEL: (*SEARCHES, *ALLOCATED_SEARCHES),
        STEP_LEVEL: STEP_SEARCHES,
        VOTES: (*POOL_METHODS, *ALLOCATED_METHODS),
        SAMPLERS: (*POWER_SAMPLERS, *POWER_SEARCHES),
    }
    return next((group for group, names in groups.items() if parsed.name in names), OTHER)


def group_methods(methods: Iterable[str]) -> dict[MethodGroup, list[str]]:
    """Return group -> its methods in the order given. Groups without a method are left out."""
    by_group: dict[MethodGroup, list[str]] = {group: [] for group in METHOD_GROUPS}
    for method in methods:
        by_group[get_method_group(method)].append(method)
    return {group: names for group, names in by_group.items() if names}


def describe_method(method: str) -> str:
    """Return what a method does in a few words. Empty for names that nothing is known about."""
    parsed = Method.parse(method)
    words = _DESCRIPTIONS.get(parsed.name, "")
    if method == "best_of_1" or (parsed.policy and str(parsed.base_method) == "best_of_1"):
        words = "one sample"
    return f"{_TRAININGS[parsed.policy]}; {words}" if parsed.policy and words else words


def list_families(methods: Iterable[str]) -> dict[str, list[str]]:
    """Return family -> its methods, in the order of first appearance."""
    families: dict[str, list[str]] = {}
    for method in methods:
        families.setdefault(Method.parse(method).family, []).append(method)
    return families
