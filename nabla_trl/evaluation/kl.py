"""How far a method's responses lie from the base policy: KL divergences in nats per response, where one is known.

The likelihoods that this needs are a measurement and no part of a method: no row is charged for them.
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

# The problems of one batch and their traces to nats per trace; None where nothing is known.
KLMeasure = Callable[[Sequence[Problem], Sequence[Trace]], "list[float | None]"]


def skip_kl(problems: Sequence[Problem], traces: Sequence[Trace]) -> list[float | None]:
    """Of greedy decodes (which have no density) and of searches (whose density nobody can write down)."""
    return [None] * len(traces)


def build_sample_kl_measure(
    counts: Mapping[str, int], policy: Policy, base_policy: Policy, *, batch_size: int
) -> KLMeasure:
    """KL(q ‖ base) = KL(q ‖ π) + E_q[log π − log base] for q = best-of-N of samples from π.

    The first part is at most `best_of_bound`; the second is estimated without bias by log π(y|x) − log base(y|x), both
    at temperature 1, of the response y that was kept. So a row of N = 1 is an estimate, one of the base policy itself
    a bound, and any other the estimate of a bound.

    Args:
        counts: method -> N; of other methods nothing is known.
        policy: π; the base policy itself is not asked for likelihoods.
        batch_size: responses read together.
    """
    ratio = None
    if policy is not base_policy:
        ratio = build_log_ratio_reward(base_policy, policy, base_policy, f"{policy.name} against {base_policy.name}")
        ratio.batch_size = batch_size

    def measure(problems: Sequence[Problem], traces: Sequence[Trace]) -> list[float | None]:
        found: list[float | None] = [None] * len(traces)
        known = [row for row, trace in enumerate(traces) if trace.method in counts and trace.error is None]
        moved = [0.0] * len(known)
        if ratio is not None and known:
            asked = {problem.id: problem for problem in problems}
            kept = [traces[row] for row in known]
            samples = [Sample(asked[trace.problem_id], trace.prompt_ids, trace.response_ids) for trace in kept]
            moved, _ = ratio.score(
                samples, ratio.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter()
            )
        for row, nats in zip(known, moved, strict=True):
            found[row] = compute_best_of_n_kl_bound(counts[traces[row].method]) + nats if math.isfinite(nats) else None
        return found

    return measure


def compute_best_of_n_kl_bound(num_samples: int) -> float:
    """The most that best-of-N moves away from π: KL ≤ log N − (N − 1)/N (Beirami et al., arXiv 2401.01879); 0 for one
    draw, which is π."""
    return math.log(num_samples) - (num_samples - 1) / num_samples
