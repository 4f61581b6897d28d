"""Laws over responses that can all be written down: the KL-regularised optimum, best-of-N, and how far others are from
them. Numpy only.

With π the policy's law over the responses to one prompt, r their rewards and β > 0,

    J(q) = E_q[r] − β·KL(q‖π)  is largest at  π*(y) = π(y)·exp(r(y)/β)/Z,  and  β·KL(q‖π*) = β·log Z − J(q)

for every law q: to sample π* and to maximise J over q are one problem. Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class DistributionMetrics:
    """How a law q stands to π and to π*.

    Attributes:
        reward: E_q[r]; `objective`: J(q).
        kl_policy: KL(q‖π); `kl`: KL(q‖π*); `tv`: total variation between q and π*.
    """

    reward: float
    kl_policy: float
    kl_optimum: float
    tv_optimum: float
    regularized_reward: float


@dataclass(frozen=True)
class EnumeratedCase:
    """One prompt with all its responses.

    Attributes:
        logp: [N] log π, of which the probabilities sum to 1.
        rewards: [N]
        beta: KL coefficient β.

    Raises:
        ValueError: rewards that are not finite, or probabilities that do not sum to 1.
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
        """Of a law q [N]."""
        reward, moved = float(probs @ self.rewards), compute_kl(probs, self.logp)
        return DistributionMetrics(
            reward=reward,
            kl_policy=moved,
            kl_optimum=compute_kl(probs, self.optimum_logp),
            tv_optimum=compute_total_variation(probs, self.optimum_probs),
            regularized_reward=reward - self.beta * moved,
        )

    def compute_best_of_n_distribution(self, num_samples: int) -> np.ndarray:
        """[N] the law of the response of the highest reward among `count` draws, the first drawn among equals.

        With F(r) the chance that one draw has at most reward r: the best has exactly r with F(r)^N − F(<r)^N, and is
        then a draw of π among the responses of that reward.
        """
        levels, where = np.unique(self.rewards, return_inverse=True)
        mass = np.bincount(where, weights=self.policy_probs, minlength=len(levels))
        up_to = np.minimum(mass.cumsum(), 1.0)
        below = up_to - mass
        chance = np.diff(up_to**num_samples, prepend=0.0)
        small = (below > 0) & (mass < 1e-3 * below)  # where powers would cancel
        chance[small] = below[small] ** num_samples * np.expm1(num_samples * np.log1p(mass[small] / below[small]))
        share = np.divide(chance, mass, out=np.zeros_like(mass), where=mass > 0)
        law = self.policy_probs * share[where]
        return law / law.sum()


def compute_kl(probs: np.ndarray, logp: np.ndarray) -> float:
    """KL(q‖p) of a law q [N] and log p [N]; infinite where q goes where p never does."""
    there = probs > 0
    return float(probs[there] @ (np.log(probs[there]) - logp[there]))


def compute_total_variation(probs: np.ndarray, other_probs: np.ndarray) -> float:
    return float(np.abs(probs - other_probs).sum()) / 2


def compute_mean_metrics(cases: Sequence[EnumeratedCase], distributions: Sequence[np.ndarray]) -> DistributionMetrics:
    """Over prompts, of one law for each."""
    found = [case.compute_metrics(law) for case, law in zip(cases, distributions, strict=True)]
    names = DistributionMetrics.__dataclass_fields__
    return DistributionMetrics(**{name: float(np.mean([getattr(one, name) for one in found])) for name in names})


def compute_frontier_reward(cases: Sequence[EnumeratedCase], kl_policy: float) -> float:
    """The largest mean reward within a mean KL(q‖π) of `moved`: that of π·exp(r/β') with one β' for all prompts."""

    def at(log_beta: float) -> DistributionMetrics:
        tilted = [EnumeratedCase(case.logp, case.rewards, math.exp(log_beta)) for case in cases]
        return compute_mean_metrics(tilted, [case.optimum_probs for case in tilted])

    low, high = -12.0, 12.0  # a smaller β moves further
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).kl_policy > kl_policy else (low, middle)
    return at(high).reward


@dataclass(frozen=True)
class NoiseFloor:
    """What as many independent draws of π* as a law was counted from measure, by chance alone.

    Attributes:
        kl, tv: [R] means over prompts of KL(q‖π*) and total variation of the counted law, per resample.
    """

    kl: np.ndarray
    tv: np.ndarray

    def compute_p_value(self, kl: float) -> float:
        """One-sided Monte Carlo test that a counted law is one of π* (Davison and Hinkley 1997, 4.2.1)."""
        return (1 + int((self.kl >= kl).sum())) / (1 + len(self.kl))


def estimate_noise_floor(
    cases: Sequence[EnumeratedCase], draws: int, *, resamples: int = 199, seed: int = 0
) -> NoiseFloor:
    """Counted laws are off by chance, and their KL is biased upwards: so far are `draws` draws of π* per prompt."""
    rng = np.random.default_rng(seed)
    kl, tv = np.zeros((2, resamples, len(cases)))
    for column, case in enumerate(cases):
        optimum = case.optimum_probs / case.optimum_probs.sum()
        for row in range(resamples):
            law = rng.multinomial(draws, optimum) / draws
            kl[row, column] = compute_kl(law, case.optimum_logp)
            tv[row, column] = compute_total_variation(law, case.optimum_probs)
    return NoiseFloor(kl.mean(1), tv.mean(1))


def compute_empirical_distribution(counts: np.ndarray) -> np.ndarray:
    """Counts [N] as a law."""
    return counts / counts.sum()
