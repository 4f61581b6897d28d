"""Compare what a gradient predicts of single-token swaps with what they do to the reward.

A swap (t, v) puts candidate v in place of token t of a sampled response and leaves all later tokens as they are. The
gradient G predicts that it changes the reward by G[t, v] − G[t, y_t].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.gradient.relaxation import compute_replaceable_mask
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.options import GradientPoint, Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import find_token_columns, make_rng
from nabla_trl.rewards.reward import Reward, encode_prompt
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class SampledResponse:
    """One sampled response of T tokens, with K candidates at each position.

    Attributes:
        finished: whether it ends with a stop token.
        allowed_swaps: [T, K] bool, candidates that a search may put in place of its tokens.
        prompt_caches: what the reward computed of its prompt.
    """

    sample: Sample
    draw_info: DrawInfo
    problem_index: int
    finished: bool
    allowed_swaps: Tensor
    prompt_caches: list[ScoreCache]


@dataclass(frozen=True)
class TokenSwap:
    """Candidate `candidate_index` in place of token `position` of response `response_index`."""

    response_index: int
    position: int
    candidate_index: int


@dataclass(frozen=True)
class SwapMeasurements:
    """Measured and predicted changes of the reward.

    Attributes:
        rewards: [B] of the responses.
        reward_changes: [n] measured change of the reward by each swap.
        predicted_changes: gradient point → per response [T, K] predicted change of every swap.
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
    """Sample responses to each problem that policy and reward can read.

    Args:
        top_k_candidates: candidates per position.
        candidate_min_p: how likely a candidate must be, relative to the likeliest, for a search to propose it.

    Raises:
        ValueError: no problem can be read, with the first one's reason.
    """
    prompts, limits, errors = [], [], []
    for problem in problems:
        try:
            ids, limit = encode_prompt(problem, policy, reward, sampling.max_new_tokens)
        except ValueError as error:
            errors.append(str(error))
        else:
            prompts.append((problem, ids))
            limits.append(limit)
    if not prompts:
        raise ValueError(f"no problem can be run: {errors[0] if errors else 'there are none'}")
    requests = [
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
    outputs = generate_continuations(
        policy,
        requests,
        sampling,
        flop_counter=FlopCounter(),
        top_k_candidates=top_k_candidates,
        batch_size=batch_size,
    )
    caches = reward.compute_prompt_caches([Sample(problem, ids, []) for problem, ids in prompts], FlopCounter())
    responses = []
    for number, output in enumerate(outputs):
        index = number // responses_per_problem
        draw_info = DrawInfo(policy.model, output.candidates, output.logp)
        sample = Sample(*prompts[index], output.ids, draw_info=draw_info)
        allowed_swaps = compute_replaceable_mask(
            output.ids, output.candidates, output.logp, reward.in_vocabulary, candidate_min_p
        )
        responses.append(SampledResponse(sample, draw_info, index, output.finished, allowed_swaps, caches[index]))
    return responses


def choose_swaps(responses: Sequence[SampledResponse], num_swaps: int, rng: np.random.Generator) -> list[TokenSwap]:
    """Choose at most `num_swaps` distinct swaps, uniformly over all allowed ones, sorted by response.

    A response gives at most twice its even share, so that long ones do not crowd out the others.

    Raises:
        ValueError: no response allows a swap.
    """
    allowed = [torch.nonzero(response.allowed_swaps).numpy() for response in responses]
    response_indices = np.repeat(np.arange(len(allowed)), [len(swaps) for swaps in allowed])
    if not len(response_indices):
        raise ValueError("no swap is possible: the policy gives no token of its responses a plausible alternative")
    max_per_response = math.ceil(2 * num_swaps / len(np.unique(response_indices)))
    counts = np.zeros(len(allowed), dtype=int)
    picks: list[int] = []
    for pick in rng.permutation(len(response_indices)):
        if len(picks) < num_swaps and counts[response_indices[pick]] < max_per_response:
            counts[response_indices[pick]] += 1
            picks.append(int(pick))
    swaps = np.concatenate(allowed)
    return [TokenSwap(int(response_indices[pick]), int(swaps[pick, 0]), int(swaps[pick, 1])) for pick in sorted(picks)]


def measure_swaps(
    responses: Sequence[SampledResponse],
    swaps: Sequence[TokenSwap],
    gradient_points: Mapping[str, GradientPoint],
    *,
    reward: Reward,
    batch_size: int = 256,
) -> SwapMeasurements:
    """Measure the rewards of responses and the changes by swaps, and predict all changes by each gradient.

    Args:
        swaps: sorted by response.
        batch_size: responses whose score caches are held at once.

    Raises:
        ValueError: a reward, a changed reward or a gradient that is not finite.
    """
    rewards: list[float] = []
    changes: list[float] = []
    predicted: dict[str, list[Tensor]] = {name: [] for name in gradient_points}
    for begin in range(0, len(responses), batch_size):
        batch = responses[begin : begin + batch_size]
        prompt_caches = [response.prompt_caches for response in batch]
        # Without draw_info: an objective that reads it would cache the prompt alone.
        samples = [replace(response.sample, draw_info=None) for response in batch]
        values, caches = reward.score(samples, prompt_caches, flop_counter=FlopCounter(), return_caches=True)
        _check_finite(values, f"the reward {reward.name} of a response")
        rewards += values
        batch_swaps = [swap for swap in swaps if begin <= swap.response_index < begin + len(batch)]
        swap_caches = [caches[swap.response_index - begin] for swap in batch_swaps]
        swapped_values = _score_swaps(responses, batch_swaps, swap_caches, reward)
        changes += [
            value - rewards[swap.response_index] for value, swap in zip(swapped_values, batch_swaps, strict=True)
        ]
        for name, point in gradient_points.items():
            gradients = reward.compute_gradient(
                [response.sample for response in batch],
                prompt_caches,
                caches,
                [response.draw_info.candidates for response in batch],
                flop_counter=FlopCounter(),
                gradient_at=point,
            )
            for response, gradient in zip(batch, gradients, strict=True):
                if not gradient.isfinite().all():
                    raise ValueError(f"the gradient of {reward.name} at {name} is not finite")
                columns = find_token_columns(response.draw_info.candidates, response.sample.response_ids)
                predicted[name].append(gradient - gradient.gather(1, columns[:, None]))
    return SwapMeasurements(np.array(rewards), np.array(changes), predicted)


def _score_swaps(
    responses: Sequence[SampledResponse],
    swaps: Sequence[TokenSwap],
    caches: Sequence[list[ScoreCache]],
    reward: Reward,
) -> list[float]:
    samples = []
    for swap in swaps:
        response = responses[swap.response_index]
        ids = list(response.sample.response_ids)
        ids[swap.position] = int(response.draw_info.candidates[swap.position, swap.candidate_index])
        samples.append(replace(response.sample, response_ids=ids, draw_info=None))
    values, _ = reward.score(samples, caches, flop_counter=FlopCounter(), num_shared=[swap.position for swap in swaps])
    _check_finite(values, f"the reward {reward.name} of a response with one token swapped")
    return values


def _check_finite(values: Sequence[float], what: str) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{what} is {value}: the gradient audit needs finite numbers")
