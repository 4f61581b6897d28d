"""Distributions over responses that can be enumerated: the KL-regularized optimum and best-of-N. Numpy only.

Let π be the policy's distribution over the responses to one prompt, r their rewards and β > 0. Then

    J(q) = E_q[r] − β·KL(q‖π)  is largest at  π*(y) = π(y)·exp(r(y)/β)/Z,  and  β·KL(q‖π*) = β·log Z − J(q)

for every distribution q. So sampling π* and maximizing J over q are the same problem. Entropies and KL are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class DistributionMetrics:
    """Metrics of a distribution q.

    Attributes:
        reward: E_q[r].
        kl_policy: KL(q‖π).
        kl_optimum: KL(q‖π*).
        tv_optimum: total variation between q and π*.
        regularized_reward: J(q).
    """

    reward: float
    kl_policy: float
    kl_optimum: float
    tv_optimum: float
    regularized_reward: float


@dataclass(frozen=True)
class EnumeratedCase:
    """One prompt with all its N responses.

    Attributes:
        logp: [N] log π. The probabilities sum to 1.
        rewards: [N]
        beta: KL coefficient β.

    Raises:
        ValueError: if a reward is not finite, or the probabilities do not sum to 1.
    """

    logp: np.ndarray
    rewards: np.ndarray
    beta: float

    def __post_init__(self) -> None:
        if not np.isfinite(self.rewards).all():
            raise ValueError(f"{(~np.isfinite(self.rewards)).sum()} responses have no finite reward")
        if abs(self.policy_probs.sum() - 1) > 1e-6:
            raise ValueError(f"the responses' probabilities sum to {self.policy_probs.sum():.6f}, not to 1")

    @cached_property
    def policy_probs(self) -> np.ndarray:
        """[N] π."""
        return np.exp(self.logp)

    @cached_property
    def log_partition(self) -> float:
        """log Z."""
        return float(np.logaddexp.reduce(self.logp + self.rewards / self.beta))

    @cached_property
    def optimum_logp(self) -> np.ndarray:
        """[N] log π*."""
        return self.logp + self.rewards / self.beta - self.log_partition

    @cached_property
    def optimum_probs(self) -> np.ndarray:
        """[N] π*."""
        return np.exp(self.optimum_logp)

    def compute_metrics(self, probs: np.ndarray) -> DistributionMetrics:
        """Return the metrics of a distribution q [N]."""
        reward, kl_policy = float(probs @ self.rewards), compute_kl(probs, self.logp)
        return DistributionMetrics(
            reward=reward,
            kl_policy=kl_policy,
            kl_optimum=compute_kl(probs, self.optimum_logp),
            tv_optimum=compute_total_variation(probs, self.optimum_probs),
            regularized_reward=reward - self.beta * kl_policy,
        )

    def compute_best_of_n_distribution(self, num_samples: int) -> np.ndarray:
        """Return the distribution [N] of the best of several samples. The first sample wins a tie.

        Let F(r) be the probability that one sample has at most reward r. The best has exactly reward r with
        probability F(r)^N − F(<r)^N, and is then distributed as π among the responses of that reward.
        """
        levels, level_index = np.unique(self.rewards, return_inverse=True)
        mass = np.bincount(level_index, weights=self.policy_probs, minlength=len(levels))
        up_to = np.minimum(mass.cumsum(), 1.0)
        below = up_to - mass
        best_probs = np.diff(up_to**num_samples, prepend=0.0)
        small = (below > 0) & (mass < 1e-3 * below)  # where the difference of powers would cancel
        best_probs[small] = below[small] ** num_samples * np.expm1(num_samples * np.log1p(mass[small] / below[small]))
        ratios = np.divide(best_probs, mass, out=np.zeros_like(mass), where=mass > 0)
        probs = self.policy_probs * ratios[level_index]
        return probs / probs.sum()


def compute_kl(probs: np.ndarray, logp: np.ndarray) -> float:
    """Return KL(q‖p) of q [N] and log p [N]. It is infinite if q is positive where p is zero."""
    support = probs > 0
    return float(probs[support] @ (np.log(probs[support]) - logp[support]))


def compute_total_variation(probs: np.ndarray, other_probs: np.ndarray) -> float:
    """Return the total variation distance of two distributions [N]."""
    return float(np.abs(probs - other_probs).sum()) / 2


def compute_mean_metrics(cases: Sequence[EnumeratedCase], distributions: Sequence[np.ndarray]) -> DistributionMetrics:
    """Return the means over prompts of the metrics of one distribution per prompt."""
    metrics = [asdict(case.compute_metrics(probs)) for case, probs in zip(cases, distributions, strict=True)]
    return DistributionMetrics(**{name: float(np.mean([row[name] for row in metrics])) for name in metrics[0]})


def compute_frontier_reward(cases: Sequence[EnumeratedCase], kl_policy: float) -> float:
    """Return the largest mean reward of all distributions whose mean KL(q‖π) is at most `kl_policy`.

    The maximum is at π·exp(r/β') with the same β' for all prompts, which bisection finds.
    """

    def compute_optimum_metrics(log_beta: float) -> DistributionMetrics:
        tilted = [EnumeratedCase(case.logp, case.rewards, math.exp(log_beta)) for case in cases]
        return compute_mean_metrics(tilted, [case.optimum_probs for case in tilted])

    low, high = -12.0, 12.0  # of log β'. A smaller β' gives a larger KL.
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if compute_optimum_metrics(middle).kl_policy > kl_policy else (low, middle)
    return compute_optimum_metrics(high).reward


@dataclass(frozen=True)
class NoiseFloor:
    """The KL and total variation that sampling noise alone produces, for empirical distributions of samples of π*.

    Attributes:
        kl, tv: [resamples] means over prompts of KL(q‖π*) and of the total variation.
    """

    kl: np.ndarray
    tv: np.ndarray

    def compute_p_value(self, kl: float) -> float:
        """Return the one-sided Monte Carlo p-value of "the samples are from π*" (Davison and Hinkley 1997, 4.2.1)."""
        return (1 + int((self.kl >= kl).sum())) / (1 + len(self.kl))


def estimate_noise_floor(
    cases: Sequence[EnumeratedCase], draws: int, *, resamples: int = 199, seed: int = 0
) -> NoiseFloor:
    """Return the KL and total variation that sampling noise alone produces.

    We draw `draws` samples of π* per prompt and measure their empirical distribution against π*. An empirical
    distribution always has KL > 0, so results of a search must be compared with these values and not with zero.
    """
    rng = np.random.default_rng(seed)
    kl, tv = np.zeros((2, resamples, len(cases)))
    for column, case in enumerate(cases):
        optimum = case.optimum_probs / case.optimum_probs.sum()
        for row in range(resamples):
            probs = rng.multinomial(draws, optimum) / draws
            kl[row, column] = compute_kl(probs, case.optimum_logp)
            tv[row, column] = compute_total_variation(probs, case.optimum_probs)
    return NoiseFloor(kl.mean(1), tv.mean(1))


def compute_empirical_distribution(counts: np.ndarray) -> np.ndarray:
    """Return counts [N] as a distribution."""
    return counts / counts.sum()
