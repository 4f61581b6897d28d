"""Particle filtering: a population of responses that is resampled by weight while it is written.

A particle has the weight γ(prefix)/q(prefix), where q is what it was drawn from and γ is the target of the prefix.
With a reward γ = q·exp(r/β), and without one γ = π^α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nabla_trl.baselines.step_tree import StepNode, StepTree, run_with_size
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.grading.voting import vote
from nabla_trl.models.sampling import make_rng

ANNEALED_ESS = 0.5  # entropic particle filtering: share of the particles below which the weights are annealed
ANNEALED_PHASE = 0.5  # … and the share of the response up to which they are


@dataclass(frozen=True)
class Particle:
    """A prefix with the log of its weight. Weights of all populations of a problem can be compared."""

    node: StepNode
    log_weight: float = 0.0


# A population and the tree -> the exponent of the weights in resampling: 1 as they are, 0 not at all.
ChooseExponent = Callable[[Sequence[Particle], StepTree], float]


async def particle_filter(tree: StepTree, size: int | None) -> None:
    """Run particle filtering with `size` particles (Puri et al., arXiv 2502.01618, algorithm 1).

    All particles draw their next step. Then as many particles are drawn from them, with weights that follow the
    reward. A complete response stays a particle. The result is the response with the highest reward. At a budget the
    population is what fits, and another population begins while one more response fits.

    Differences from the paper: A weight is exp((r(new prefix) − r(old prefix))/β), so that the particles approach
    π·exp(r/β), the target of all searches here, for any kind of reward. The paper and its code (its_hub) resample by
    the score of the whole prefix at every step, those of complete responses too. With `particle_potential` score this
    does the same: weights exp(r(prefix)/β), where their r is the logit of a process reward. Resampling is systematic,
    which has less noise than multinomial draws.
    """
    await run_with_size(tree, size, lambda count: _run_population(tree, count, lambda population, tree: 1.0))


async def entropic_particle_filter(tree: StepTree, size: int | None) -> None:
    """Run particle filtering with entropic annealing (Giannone et al., arXiv 2510.05825).

    It is particle filtering, apart from populations that lose their diversity too early. While the response is less
    than half written and the effective sample size is below half of the particles, weights are resampled at a
    temperature T = max(1, N/ESS·(1 − progress)), as in its_hub. Progress is the mean length of the particles divided
    by the longest response, where its_hub counts steps.

    Differences from the paper: What an annealed draw leaves out of the weights stays with the particles, so that the
    target is kept. Look-ahead modulation, which scores successors before resampling, is not offered.
    """
    await run_with_size(tree, size, lambda count: _run_population(tree, count, compute_annealed_exponent))


async def power_smc(tree: StepTree, size: int | None) -> None:
    """Sample the power distribution π^α with `size` particles and no reward (Power-SMC, arXiv 2602.10273).

    This is sequential Monte Carlo whose target of a prefix is π(prefix)^α. Tokens are drawn at temperature 1/α, the
    proposal of the smallest weight variance, in blocks of `smc_block_tokens`. After a block a particle has the weight
    π^α/q. The population is resampled where the effective sample size is below `smc_ess_threshold` of the particles.
    With `smc_ramp_tokens` the exponent rises from 1 to α over the first tokens (the paper's bridging). Complete
    responses always have the exponent α.

    The particles are weighted samples, exact for many particles. With `power_select` sample one of them is drawn by
    weight, as in the paper. With vote the answer with the largest weight is returned. At a budget the populations are
    joined by their evidence.
    """
    final: list[Particle] = []

    async def search(count: int) -> None:
        final.extend(await _run_population(tree, count, _skip_even_populations))

    await run_with_size(tree, size, search)
    tree.chosen = choose_particle(tree, [particle for particle in final if particle.node.is_complete])


async def _run_population(tree: StepTree, num_particles: int, choose_exponent: ChooseExponent) -> list[Particle]:
    """Return the particles when all are complete, or when no further step fits into the budget."""
    particles = [Particle(tree.start_attempt())] * num_particles
    rng = make_rng(tree.settings.seed, tree.problem.id, "particles", tree.num_attempts - 1)
    while any(not particle.node.is_complete for particle in particles):
        moving = [particle for particle in particles if not particle.node.is_complete]
        moving = moving[: tree.count_affordable_responses([particle.node for particle in moving])]
        if not moving:
            break
        children = await tree.draw_steps([particle.node for particle in moving])
        population = [particle for particle in particles if particle.node.is_complete]
        population += [
            Particle(child, particle.log_weight + compute_log_weight(particle.node, child, tree))
            for particle, child in zip(moving, children, strict=True)
        ]
        if tree.config.particle_potential == "score" and not tree.settings.drawing.is_power_sampling:
            population = [Particle(one.node, one.node.reward / tree.config.particle_beta) for one in population]
        if max(particle.log_weight for particle in population) == -math.inf:  # the reward can read none of them
            return []
        kept = resample_particles(population, choose_exponent(population, tree), rng.random())
        dropped = {one.node for one in [*particles, *population]} - {one.node for one in kept}
        for node in dropped:
            node.release_caches()
        particles = kept
    return particles


def compute_log_weight(parent: StepNode, child: StepNode, tree: StepTree) -> float:
    """Return by how much a step changes the log weight: of the target, minus that of what the step was drawn from.

    The root, whose reward is not known, counts as 0: all particles share it.
    """
    if not tree.settings.drawing.is_power_sampling:
        return (child.reward - (0.0 if math.isnan(parent.reward) else parent.reward)) / tree.config.particle_beta
    ramp = tree.config.smc_ramp_tokens

    def compute_potential(node: StepNode) -> float:  # (α_t − 1)·log π of the prefix; the reward is (α − 1)·log π
        share = 1.0 if node.is_complete or not ramp else min(1.0, len(node.token_ids) / ramp)
        return 0.0 if math.isnan(node.reward) else share * node.reward

    return compute_potential(child) - compute_potential(parent) + child.log_importance_weight


def compute_effective_size(log_weights: Sequence[float]) -> float:
    """Return the effective sample size (Σw)²/Σw²."""
    weights = np.exp(np.array(log_weights) - max(log_weights))
    return float(weights.sum() ** 2 / np.square(weights).sum())


def compute_annealed_exponent(population: Sequence[Particle], tree: StepTree) -> float:
    """Return 1/T of entropic annealing."""
    share = compute_effective_size([particle.log_weight for particle in population]) / len(population)
    progress = float(np.mean([len(particle.node.token_ids) for particle in population])) / tree.max_new_tokens
    if share >= ANNEALED_ESS or progress >= ANNEALED_PHASE:
        return 1.0
    return 1 / max(1.0, (1 - progress) / share)


def _skip_even_populations(population: Sequence[Particle], tree: StepTree) -> float:
    """Return 1 if the effective sample size is below the threshold, else 0: no resampling."""
    effective_size = compute_effective_size([particle.log_weight for particle in population])
    return float(effective_size < tree.config.smc_ess_threshold * len(population))


def resample_particles(population: Sequence[Particle], exponent: float, uniform: float) -> list[Particle]:
    """Return as many particles, drawn by weight^exponent. The rest of the weight stays with them.

    Together the particles keep the mean of what they were drawn by, so that the weights of several populations can be
    compared (the estimate of the target's normalizing constant).
    """
    if exponent == 0:
        return list(population)
    drawn_by = [exponent * particle.log_weight for particle in population]
    largest = max(drawn_by)
    log_mean = largest + math.log(math.fsum(math.exp(value - largest) for value in drawn_by) / len(drawn_by))
    return [
        Particle(population[index].node, (1 - exponent) * population[index].log_weight + log_mean)
        for index in resample(drawn_by, len(population), uniform)
    ]


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


def choose_particle(tree: StepTree, particles: Sequence[Particle]) -> StepNode | None:
    """Return a particle drawn by weight, or that of the largest weight with the winning answer. None: no particles."""
    if not particles:
        return None
    log_weights = [particle.log_weight for particle in particles]
    uniform = make_rng(tree.settings.seed, tree.problem.id, "chosen particle").random()
    [drawn] = resample(log_weights, 1, uniform)
    if tree.config.power_select == "sample":
        return particles[drawn].node
    policy = tree.settings.engine.policy
    stops = policy.get_stop_strings(tree.problem)
    answers = [extract_answer(policy.decode_response(particle.node.token_ids, stops)) for particle in particles]
    winners = vote(answers, log_weights)
    return particles[max(winners, key=lambda index: log_weights[index]) if winners else drawn].node
