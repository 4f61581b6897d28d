"""Swaps of single tokens: what a gradient predicts of them, and what they truly do to the reward.

A swap (t, v) puts candidate v in place of token t of a drawn response and leaves all later tokens as they are. The
gradient G predicts that it changes the reward by G[t, v] − G[t, y_t].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nabla_trl.baselines.sampling import encode_prompts
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import find_token_columns, generate_continuations, make_rng
from nabla_trl.models.options import GradientPoint, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationRequest
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.proposals import compute_replaceable_mask
from nabla_trl.search.solvers import compute_advantages
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class SampledResponse:
    """One drawn response of T tokens.

    Attributes:
        sample: the response, its K candidates per position known.
        problem: index of its problem.
        finished: it ends with a stop token.
        allowed: [T, K] bool, candidates that a search may put in place of its tokens.
        memos: the reward's memos of its prompt.
    """

    sample: Sample
    draw_info: DrawInfo
    problem_index: int
    finished: bool
    allowed_swaps: Tensor
    prompt_caches: list[ScoreCache]


@dataclass(frozen=True)
class TokenSwap:
    """Candidate `column` in place of token `position` of response `row`."""

    response_index: int
    position: int
    candidate_index: int


@dataclass(frozen=True)
class SwapMeasurements:
    """What swaps do, and what gradients say.

    Attributes:
        rewards: [B] of the responses.
        changes: [n] true change of the reward by each swap.
        predicted: point → per response [T, K] predicted change of every swap.
    """

    rewards: np.ndarray
    reward_changes: np.ndarray
    predicted_changes: dict[str, list[Tensor]]


def draw_responses(
    problems: Sequence[Problem],
    responses_per_problem: int,
    *,
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    top_k_candidates: int,
    candidate_min_p: float,
    seed: int = 0,
    batch_size: int = 256,
) -> list[SampledResponse]:
    """`count` responses to each problem; a problem that policy or reward cannot read has none.

    Raises:
        ValueError: no problem can be read; the first one's reason.
    """
    prompts, limits, errors = encode_prompts(problems, policy, reward, sampling)
    if not prompts:
        raise ValueError(f"no problem can be run: {next(iter(errors.values()), 'there are none')}")
    jobs = [
        GenerationRequest(
            problem.id,
            ids,
            make_rng(seed, problem.id, "swaps", draw),
            limit,
            stop_strings=policy.get_stop_strings(problem),
        )
        for (problem, ids), limit in zip(prompts, limits, strict=True)
        for draw in range(responses_per_problem)
    ]
    drafts = generate_continuations(
        policy, jobs, sampling, flop_counter=FlopCounter(), top_k_candidates=top_k_candidates, batch_size=batch_size
    )
    memos = reward.compute_prompt_caches([Sample(problem, ids, []) for problem, ids in prompts], FlopCounter())
    responses = []
    for number, draft in enumerate(drafts):
        row = number // responses_per_problem
        known = DrawInfo(policy.model, draft.candidates, draft.logp)
        sample = Sample(*prompts[row], draft.ids, draw_info=known)
        allowed = compute_replaceable_mask(
            draft.ids, draft.candidates, draft.logp, reward.in_vocabulary, candidate_min_p
        )
        responses.append(SampledResponse(sample, known, row, draft.finished, allowed, memos[row]))
    return responses


def choose_swaps(responses: Sequence[SampledResponse], num_swaps: int, rng: np.random.Generator) -> list[TokenSwap]:
    """At most `count` distinct swaps, uniformly over all allowed ones; sorted by response.

    A response gives at most twice its even share, so that long ones do not crowd out the others.

    Raises:
        ValueError: no response allows a swap.
    """
    places = [torch.nonzero(one.allowed_swaps).numpy() for one in responses]
    rows = np.repeat(np.arange(len(places)), [len(place) for place in places])
    if not len(rows):
        raise ValueError("no swap is possible: the policy gives no token of its responses a plausible alternative")
    most = math.ceil(2 * num_swaps / len(np.unique(rows)))
    taken = np.zeros(len(places), dtype=int)
    picks: list[int] = []
    for pick in rng.permutation(len(rows)):
        if len(picks) < num_swaps and taken[rows[pick]] < most:
            taken[rows[pick]] += 1
            picks.append(int(pick))
    flat = np.concatenate(places)
    return [TokenSwap(int(rows[pick]), int(flat[pick, 0]), int(flat[pick, 1])) for pick in sorted(picks)]


def measure_swaps(
    responses: Sequence[SampledResponse],
    swaps: Sequence[TokenSwap],
    gradient_points: Mapping[str, GradientPoint],
    *,
    reward: Reward,
    batch_size: int = 256,
) -> SwapMeasurements:
    """Rewards, true changes and predicted ones.

    Args:
        swaps: sorted by response.
        batch_size: responses whose memos are held at once.

    Raises:
        ValueError: a reward, a changed reward or a gradient that is not finite.
    """
    rewards: list[float] = []
    changes: list[float] = []
    predicted: dict[str, list[Tensor]] = {name: [] for name in gradient_points}
    for begin in range(0, len(responses), batch_size):
        some = responses[begin : begin + batch_size]
        # What is known of the drawing is put aside: a term that reads it would remember the prompt alone.
        bare = [replace(one.sample, draw_info=None) for one in some]
        values, memos = reward.score(
            bare, [one.prompt_caches for one in some], flop_counter=FlopCounter(), return_caches=True
        )
        _check_finite(values, f"the reward {reward.name} of a response")
        rewards += values
        here = [swap for swap in swaps if begin <= swap.response_index < begin + len(some)]
        after = _score_swaps(responses, here, [memos[swap.response_index - begin] for swap in here], reward)
        changes += [value - rewards[swap.response_index] for value, swap in zip(after, here, strict=True)]
        for name, gradients in _compute_gradients(some, memos, gradient_points, reward).items():
            predicted[name] += _predict_changes(some, gradients, f"the gradient of {reward.name} at {name}")
    return SwapMeasurements(np.array(rewards), np.array(changes), predicted)


def _score_swaps(
    responses: Sequence[SampledResponse], swaps: Sequence[TokenSwap], memos: Sequence[list[ScoreCache]], reward: Reward
) -> list[float]:
    samples = []
    for swap in swaps:
        one = responses[swap.response_index]
        ids = list(one.sample.response_ids)
        ids[swap.position] = int(one.draw_info.candidates[swap.position, swap.candidate_index])
        samples.append(replace(one.sample, response_ids=ids, draw_info=None))
    values, _ = reward.score(samples, memos, flop_counter=FlopCounter(), num_shared=[swap.position for swap in swaps])
    _check_finite(values, f"the reward {reward.name} of a response with one token swapped")
    return values


def _compute_gradients(
    responses: Sequence[SampledResponse],
    memos: Sequence[list[ScoreCache]],
    gradient_points: Mapping[str, GradientPoint],
    reward: Reward,
) -> dict[str, list[Tensor]]:
    """Point → per response ∂r/∂Y [T, K] at the candidates."""
    samples, tables = [one.sample for one in responses], [one.draw_info.candidates for one in responses]
    prompts = [one.prompt_caches for one in responses]
    return {
        name: reward.compute_gradient(samples, prompts, memos, tables, flop_counter=FlopCounter(), gradient_at=point)
        for name, point in gradient_points.items()
    }


def _predict_changes(responses: Sequence[SampledResponse], gradients: Sequence[Tensor], what: str) -> list[Tensor]:
    for gradient in gradients:
        if not gradient.isfinite().all():
            raise ValueError(f"{what} is not finite")
    return [
        compute_advantages(gradient, find_token_columns(one.draw_info.candidates, one.sample.response_ids))
        for one, gradient in zip(responses, gradients, strict=True)
    ]


def _check_finite(values: Sequence[float], what: str) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{what} is {value}: the gradient audit needs finite numbers")
