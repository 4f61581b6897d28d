"""Particle filtering over reasoning steps: a population that is resampled by the reward after every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nabla_trl.baselines.step_tree import StepNode, StepTree, run_with_size
from nabla_trl.models.sampling import make_rng


async def particle_filter(tree: StepTree, size: int | None) -> None:
    """Run particle filtering with `size` particles (Puri et al., arXiv 2502.01618, algorithm 1).

    All particles draw their next step. Then as many particles are drawn from them, with weights that follow the
    reward. A complete response stays a particle. At a budget the population is what fits, and another population
    begins while one more response fits.

    Differences from the paper: A weight is exp((r(new prefix) − r(old prefix))/β), so that the particles approach
    π·exp(r/β), the target of all searches here, for any kind of reward. The paper multiplies a process reward's
    probabilities. Resampling is systematic, which has less noise than the paper's multinomial draws. β is
    `particle_beta`.
    """
    await run_with_size(tree, size, lambda num_particles: _run_population(tree, num_particles))


async def _run_population(tree: StepTree, num_particles: int) -> None:
    particles = [tree.start_attempt()] * num_particles
    rng = make_rng(tree.settings.seed, tree.problem.id, "particles", tree.num_attempts - 1)
    while any(not particle.is_complete for particle in particles):
        moving = [particle for particle in particles if not particle.is_complete]
        moving = moving[: tree.count_affordable_responses(moving)]
        if not moving:
            return
        children = await tree.draw_steps(moving)
        complete = [particle for particle in particles if particle.is_complete]
        log_weights = [0.0] * len(complete)
        log_weights += [
            compute_log_weight(parent, child, tree.config.particle_beta)
            for parent, child in zip(moving, children, strict=True)
        ]
        population = complete + children
        if max(log_weights) == -math.inf:  # the reward can read none of them
            return
        kept = [population[index] for index in resample(log_weights, len(population), rng.random())]
        for node in {*particles, *population} - set(kept):
            node.release_caches()
        particles = kept


def compute_log_weight(parent: StepNode, child: StepNode, beta: float) -> float:
    """Return (r(child) − r(parent))/β. The root, whose reward is not known, counts as 0: all particles share it."""
    return (child.reward - (0.0 if math.isnan(parent.reward) else parent.reward)) / beta


def resample(log_weights: Sequence[float], count: int, uniform: float) -> list[int]:
    """Return the indices of `count` systematic draws: index i about count·w_i/Σw times (Kitagawa 1996).

    Args:
        log_weights: log of each weight, at least one of them above −∞.
        uniform: a random number in [0, 1), shared by all draws.
    """
    weights = np.exp(np.array(log_weights) - max(log_weights))
    positions = (uniform + np.arange(count)) / count
    edges = np.cumsum(weights / weights.sum())
    return np.minimum(np.searchsorted(edges, positions, side="right"), len(weights) - 1).tolist()
