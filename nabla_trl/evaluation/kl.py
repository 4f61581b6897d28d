"""How far a method's responses lie from the base policy, as KL divergence in nats per response.

The likelihoods that this needs are a measurement and no part of a method, so no row is charged for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import build_log_ratio_reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# The problems of one batch and their traces -> nats per trace. None: unknown.
KLMeasure = Callable[[Sequence[Problem], Sequence[Trace]], "list[float | None]"]


def skip_kl(problems: Sequence[Problem], traces: Sequence[Trace]) -> list[float | None]:
    """Return None for every trace: a greedy decode has no density, and nobody can write down that of a search."""
    return [None] * len(traces)


def build_sample_kl_measure(
    counts: Mapping[str, int], policy: Policy, base_policy: Policy, *, batch_size: int
) -> KLMeasure:
    """Return a measure of KL(q ‖ base) = KL(q ‖ π) + E_q[log π − log base], where q is best-of-N of samples from π.

    The first part is at most `compute_best_of_n_kl_bound(N)`. The second part is estimated without bias by
    log π(y|x) − log base(y|x) of the chosen response y, both at temperature 1. So the value is an estimate for N = 1,
    a bound for the base policy itself, and otherwise the estimate of a bound.

    Args:
        counts: method -> N. The KL of other methods is unknown.
        policy: π. If it is the base policy itself, no likelihoods are computed.
        batch_size: responses read together.
    """
    ratio = None
    if policy is not base_policy:
        ratio = build_log_ratio_reward(base_policy, policy, base_policy, f"{policy.name} against {base_policy.name}")
        ratio.batch_size = batch_size

    def measure(problems: Sequence[Problem], traces: Sequence[Trace]) -> list[float | None]:
        divergences: list[float | None] = [None] * len(traces)
        indices = [i for i, trace in enumerate(traces) if trace.method in counts and trace.error is None]
        log_ratios = [0.0] * len(indices)
        if ratio is not None and indices:
            problem_by_id = {problem.id: problem for problem in problems}
            samples = [
                Sample(problem_by_id[traces[i].problem_id], traces[i].prompt_ids, traces[i].response_ids)
                for i in indices
            ]
            prompt_caches = ratio.compute_prompt_caches(samples, FlopCounter())
            log_ratios, _ = ratio.score(samples, prompt_caches, flop_counter=FlopCounter())
        for i, nats in zip(indices, log_ratios, strict=True):
            if math.isfinite(nats):
                divergences[i] = compute_best_of_n_kl_bound(counts[traces[i].method]) + nats
        return divergences

    return measure


def compute_best_of_n_kl_bound(num_samples: int) -> float:
    """Return an upper bound of the KL of best-of-N from π: log N − (N − 1)/N (Beirami et al., arXiv 2401.01879)."""
    return math.log(num_samples) - (num_samples - 1) / num_samples
