"""Names of methods: which policy runs, what it does, at which size or budget, and the order of methods in a report.

A method is written `greedy`, `best_of_8`, `nabla@0.33`, … The name of a method of a trained policy begins with the
policy's label, as in `sft_greedy` or `dpo_nabla@0.33`. This module handles text only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache

from nabla_trl.engine.allocation import MAX_ALLOCATION_RATIO
from nabla_trl.utils.faults import Faults
from nabla_trl.utils.fields import split_names

REWARD_MODEL_SAMPLING = "reward_model_sampling"
BUDGET_FORCING = "budget_forcing"
# Metropolis chains on π^α, which need no reward. They differ in how they choose where to cut a response.
POWER_SEARCHES = ("power_gradient", "power_jump", "power_entropy", "power_uniform")
SEARCHES = ("nabla", "control", "shuffled", "paper", "released", "qalign")
# Step-level searches. Their sizes are beams, subtrees, states, rollouts, particles and candidates per segment.
STEP_SEARCHES = (
    *("beam_search", "dvts", "tot", "rap", "particle_filter", "entropic_particle_filter"),
    *("entropy_branching", "ggro"),
)
# Samplers of π^α that draw responses from the beginning. Their sizes are samples and particles.
POWER_SAMPLERS = ("low_temperature", "power_smc")
# Methods that vote among the responses of one pool, without a reward.
VOTE_METHODS = (
    *("self_consistency", "adaptive_consistency", "dirichlet_consistency", "confidence_vote", "self_certainty"),
    *("deepconf_tail", "deepconf_bottom", "deepconf_online"),
)
# Methods that choose among the responses of one pool, or keep them all.
POOL_METHODS = ("best_of", *VOTE_METHODS, "weighted_best_of", "samples")
# Methods that spread one budget over all problems: a vote, best-of-N, weighted best-of-N, the search and its control.
ALLOCATED_SEARCHES = ("allocated_nabla", "allocated_control")
ALLOCATED_METHODS = ("allocated_vote", "allocated_best_of", "allocated_weighted_best_of", *ALLOCATED_SEARCHES)
# Trained policies: one from an adapter made elsewhere, and one for each way to train.
POLICY_LABELS = (
    *("distilled", "sft", "reward_weighted", "dpo", "soft_targets", "rloo", "grpo", "on_policy_distillation"),
)
_REWARD_FREE_METHODS = (
    *("greedy", "samples", "allocated_vote", BUDGET_FORCING, REWARD_MODEL_SAMPLING),
    *(*VOTE_METHODS, *POWER_SAMPLERS, *POWER_SEARCHES),
)

METHOD_SYNTAX = (
    "greedy, best_of_N, weighted_best_of_N and samples_N (N up to 999, for pass@k, maj@k and avg@N). The votes "
    f"without a reward {', '.join(VOTE_METHODS)}, each as self_consistency_N, self_consistency@best_of_N (at that "
    "method's FLOPs) or self_consistency@F (at F times best_of_16's). The searches nabla, control (without the "
    "gradient), shuffled (its gradient rows shuffled), paper, released and qalign (presets), each also with such a "
    "budget, as nabla@F. The step-level searches beam_search, dvts and entropy_branching (N beams), tot (N states), "
    "rap (N rollouts), particle_filter and entropic_particle_filter (N particles) and ggro (N candidates), each as "
    "tot_N, tot@best_of_N or tot@F. Samplers of π^α without a reward: low_temperature and power_smc (N particles), "
    "each as power_smc_N or power_smc@F, and the "
    f"chains {', '.join(POWER_SEARCHES)}, each also with a budget. "
    f"{BUDGET_FORCING}_N (thinking models, N more thoughts) or {BUDGET_FORCING}@F. "
    f"{', '.join(ALLOCATED_METHODS)}, each as allocated_vote@best_of_N or allocated_vote@F (one budget, spread over "
    f"all problems by what they gain). {REWARD_MODEL_SAMPLING} (for log-ratio rewards). Of a trained policy L_greedy, "
    "L_best_of_N, L_samples_N, and L_nabla and L_control, also with a budget, where L is one of "
    f"{', '.join(POLICY_LABELS)}"
)

MAX_SAMPLES = 999  # the estimators of pass@k and maj@k overflow with more
_TRAINED_POLICY_METHODS = ("greedy", "best_of", "samples", "nabla", "control")
_REPORT_ORDER = (
    *("greedy", BUDGET_FORCING, *VOTE_METHODS, *POWER_SAMPLERS, *reversed(POWER_SEARCHES)),
    *("best_of", "weighted_best_of", *ALLOCATED_METHODS, *STEP_SEARCHES, *reversed(SEARCHES)),
)
_METHOD = re.compile(
    rf"(?:(?P<policy>{'|'.join(POLICY_LABELS)})_)?(?P<name>.*?)(?:_(?P<n>0|[1-9]\d*))?(?:@(?P<budget>.+))?", re.DOTALL
)
_BUDGET = re.compile(r"\d*[1-9]\d*(\.\d*)?|\d*\.\d*[1-9]\d*|best_of_[1-9]\d*")


@dataclass(frozen=True)
class Method:
    """A method of an evaluation. `str(method)` is its name in rows, reports and options.

    Attributes:
        name: what the policy does, without a number: greedy, best_of, nabla, …
        n: samples, beams, states or rollouts per problem. None: the name has no number.
        budget: FLOPs per problem, either as a multiple of best_of_16's ("0.33") or as the method that costs as much
            ("best_of_8"). Empty: no budget.
        policy: label of the trained policy. Empty: the base policy.
    """

    name: str
    n: int | None = None
    budget: str = ""
    policy: str = ""

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return the method of a name: sft_best_of_8 is Method("best_of", n=8, policy="sft").

        Names that `is_runnable` refuses are parsed too, so that a report can show rows of any method.

        Raises:
            ValueError: the budget is neither a number nor best_of_N.
        """
        return _parse(text)

    def __str__(self) -> str:
        text = self.name + (f"_{self.n}" if self.n is not None else "") + (f"@{self.budget}" if self.budget else "")
        return f"{self.policy}_{text}" if self.policy else text

    @property
    def family(self) -> str:
        """Return the name without size and budget. Methods of one family form a curve in a report."""
        return f"{self.policy}_{self.name}" if self.policy else self.name

    @property
    def size(self) -> float:
        """Return the number of the method, or its budget as a multiple of best_of_16's FLOPs.

        A method without either runs at the budget of the configuration. Its size is infinite.
        """
        if self.budget.startswith("best_of_"):
            return float(self.budget.removeprefix("best_of_")) / 16  # best_of_N costs about N/16 of best_of_16
        if self.budget:
            return float(self.budget)
        return math.inf if self.n is None else float(self.n)

    @property
    def base_method(self) -> Method:
        """Return the same method of the base policy."""
        return replace(self, policy="")

    @property
    def budget_reference(self) -> str:
        """Return the method whose FLOPs set the budget: the base policy's, so that all policies have equal budgets."""
        return self.budget if self.budget.startswith("best_of_") else "best_of_16"

    @property
    def budget_factor(self) -> float:
        """Return the budget divided by the FLOPs of `budget_reference`."""
        return 1.0 if self.budget.startswith("best_of_") else float(self.budget)

    @property
    def is_search(self) -> bool:
        return self.name in SEARCHES or self.is_power_search

    @property
    def is_power_search(self) -> bool:
        return self.name in POWER_SEARCHES

    @property
    def is_power_sampler(self) -> bool:
        return self.name in POWER_SAMPLERS

    @property
    def is_step_search(self) -> bool:
        return self.name in STEP_SEARCHES

    @property
    def is_vote(self) -> bool:
        return self.name in VOTE_METHODS

    @property
    def is_allocated(self) -> bool:
        """Return whether the method spreads one budget over all problems."""
        return self.name in ALLOCATED_METHODS

    @property
    def num_samples(self) -> int:
        """Return how many independent samples a row of the method holds. 0: a row holds one answer."""
        return self.n or 0 if self.name == "samples" else 0

    @property
    def selection_size(self) -> int:
        """Return among how many samples the method chooses by the reward. 1: the method does not choose."""
        if self.is_step_search:
            return self.population_size
        if self.name in ("allocated_best_of", "allocated_weighted_best_of"):
            return MAX_ALLOCATION_RATIO * math.ceil(16 * self.size)
        return self.n or 1 if self.name in ("best_of", "weighted_best_of") else 1

    @property
    def needs_reward(self) -> bool:
        """Return whether the method reads rewards, or its policy was trained with them."""
        if self.policy:
            return True
        return self.selection_size > 1 if self.name == "best_of" else self.name not in _REWARD_FREE_METHODS

    @property
    def population_size(self) -> int:
        """Return about how many responses a method draws side by side."""
        return math.ceil(16 * self.size) if self.budget else self.n or 1

    @property
    def is_runnable(self) -> bool:
        """Return whether an evaluation can run the method (`METHOD_SYNTAX`)."""
        if self.policy and self.name not in _TRAINED_POLICY_METHODS:
            return False
        if self.n == 0 or (self.budget and not _BUDGET.fullmatch(self.budget)):
            return False
        if self.is_step_search:
            return (self.n is None) == bool(self.budget)
        if self.is_search:
            return self.n is None
        if self.is_vote or self.is_power_sampler or self.name == BUDGET_FORCING:
            return (self.n is None) == bool(self.budget)
        if self.is_allocated:
            return self.n is None and bool(self.budget)
        if self.name in POOL_METHODS:
            return self.n is not None and not self.budget and (self.name != "samples" or self.n <= MAX_SAMPLES)
        return self.n is None and not self.budget and self.name in ("greedy", REWARD_MODEL_SAMPLING)


@cache
def _parse(text: str) -> Method:
    match = _METHOD.fullmatch(text)
    assert match is not None  # the pattern matches every text
    if len(match["n"] or "") > 18:
        raise ValueError(f"{text[:60]!r} is no method: its size has {len(match['n'])} digits")
    n = None if match["n"] is None else int(match["n"])
    method = Method(match["name"], n, match["budget"] or "", match["policy"] or "")
    try:
        _ = method.size
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:60]!r} is no method: its budget is no number") from None
    return method


def parse_methods(methods: str | Iterable[str]) -> list[str]:
    """Return the names of methods, each once.

    Args:
        methods: one or several texts, in which commas or spaces separate names.

    Raises:
        ValueError: no name, unknown ones, or a budget without the method that sets it. The message has all mistakes.
    """
    names = list(dict.fromkeys(split_names(methods)))
    if not names:
        raise ValueError(f"no methods: choose from {METHOD_SYNTAX}")
    mistakes = []
    unknown = [name for name in names if not _is_runnable_name(name)]
    for method in (Method.parse(name) for name in names if _is_runnable_name(name)):
        if method.budget and method.budget_reference not in names:
            reference = method.budget_reference
            mistakes.append(f"the FLOP budget of {method} equals {reference}'s FLOPs: add {reference} to the methods")
    incomplete = {name: reason for name in unknown if (reason := _describe_incomplete(name))}
    mistakes += [f"unknown method {name!r}: {reason}" for name, reason in incomplete.items()]
    unknown = [name for name in unknown if name not in incomplete]
    replacements = {name: similar for name in unknown if (similar := _find_similar_method(name))}
    mistakes += [f"unknown method {name!r} (did you mean {similar}?)" for name, similar in replacements.items()]
    if others := [repr(name) for name in unknown if name not in replacements]:
        plural = "s" if len(others) > 1 else ""
        mistakes.append(f"unknown method{plural} {', '.join(others)}: choose from {METHOD_SYNTAX}")
    if mistakes:
        raise Faults(*mistakes, replacements=replacements)
    return names


def _describe_incomplete(text: str) -> str:
    """Return how a method of a known name is written, where its size or budget is missing or wrong. Empty: unknown."""
    try:
        method = Method.parse(text)
    except ValueError:
        return ""
    if method.name not in (*_REPORT_ORDER, "samples", REWARD_MODEL_SAMPLING):
        return ""
    if method.policy and method.name not in _TRAINED_POLICY_METHODS:
        return f"of a trained policy there are {', '.join(_TRAINED_POLICY_METHODS)}"
    if method.name == "samples" and (method.n or 0) > MAX_SAMPLES:
        return f"at most samples_{MAX_SAMPLES}"
    bare = replace(method, n=None, budget="")
    forms = (bare, replace(bare, n=8), replace(bare, budget="best_of_8"), replace(bare, budget="0.5"))
    return f"write {' or '.join(str(form) for form in forms if form.is_runnable)}"


def _find_similar_method(name: str) -> str:
    """Return a method whose name is similar, at the same size or budget. Empty without any."""
    try:
        method = Method.parse(name)
    except ValueError:
        return ""
    names = (*POOL_METHODS, *ALLOCATED_METHODS, *STEP_SEARCHES, *SEARCHES, *POWER_SAMPLERS, *POWER_SEARCHES)
    match = get_close_matches(method.name, ("greedy", BUDGET_FORCING, *names), n=1, cutoff=0.7)
    similar = replace(method, name=match[0]) if match else method
    return str(similar) if similar.is_runnable else ""


def _is_runnable_name(name: str) -> bool:
    try:
        return Method.parse(name).is_runnable
    except ValueError:
        return False


def has_search(names: Iterable[str]) -> bool:
    """Return whether one of these methods refines responses by the reward, other than step by step."""
    methods = [Method.parse(name) for name in names]
    return any(
        (method.is_search and not method.is_power_search) or method.name in ALLOCATED_SEARCHES for method in methods
    )


def get_max_selection_size(names: Iterable[str]) -> int:
    """Return the most samples among which one of these methods chooses by the reward."""
    return max([1, *(Method.parse(name).selection_size for name in names)])


def list_policy_labels(names: Iterable[str]) -> list[str]:
    """Return the labels of the trained policies that these methods need, in the order of the report."""
    labels = {Method.parse(name).policy for name in names}
    return [label for label in POLICY_LABELS if label in labels]


def list_methods(summary: Iterable[str]) -> list[str]:
    """Return the methods that a summary has an accuracy of, in its order."""
    return [name.partition(".")[2] for name in summary if name.startswith("accuracy.")]


def sort_methods(names: Iterable[str]) -> list[str]:
    """Return methods in the order of the report: the base policy's first, unknown ones last in the order given."""

    def get_rank(name: str) -> tuple[int, int, float]:
        method = Method.parse(name)
        if method.name not in _REPORT_ORDER:
            return len(POLICY_LABELS) + 1, 0, 0.0
        policy_rank = POLICY_LABELS.index(method.policy) + 1 if method.policy else 0
        return policy_rank, _REPORT_ORDER.index(method.name), method.size

    return sorted(dict.fromkeys(names), key=get_rank)


def get_main_search(names: Sequence[str]) -> str | None:
    """Return the search that a report is about: the base policy's nabla run that comes last. None: there is no run."""
    searches = [name for name in sort_methods(names) if Method.parse(name).family == "nabla"]
    return searches[-1] if searches else None
