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
from nabla_trl.gradient.objectives import Known, Memo, Sample
from nabla_trl.models.flops import Meter
from nabla_trl.models.generation import generate, random_stream
from nabla_trl.models.options import Point, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import Job
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.proposals import replaceable
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class Response:
    """One drawn response of T tokens.

    Attributes:
        sample: the response, its K candidates per position known.
        problem: index of its problem.
        finished: it ends with a stop token.
        allowed: [T, K] bool, candidates that a search may put in place of its tokens.
        memos: the reward's memos of its prompt.
    """

    sample: Sample
    known: Known
    problem: int
    finished: bool
    allowed: Tensor
    memos: list[Memo]

    def choice(self) -> Tensor:
        """[T] column of each response token among the candidates."""
        return (self.known.candidates == torch.tensor(self.sample.response)[:, None]).int().argmax(-1)


@dataclass(frozen=True)
class Swap:
    """Candidate `column` in place of token `position` of response `row`."""

    row: int
    position: int
    column: int


@dataclass(frozen=True)
class Measured:
    """What swaps do, and what gradients say.

    Attributes:
        rewards: [B] of the responses.
        changes: [n] true change of the reward by each swap.
        predicted: point → per response [T, K] predicted change of every swap.
    """

    rewards: np.ndarray
    changes: np.ndarray
    predicted: dict[str, list[Tensor]]


def draw_responses(
    problems: Sequence[Problem],
    count: int,
    *,
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    candidates: int,
    min_p: float,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Response]:
    """`count` responses to each problem; a problem that policy or reward cannot read has none.

    Raises:
        ValueError: no problem can be read; the first one's reason.
    """
    prompts, limits, errors = encode_prompts(problems, policy, reward, sampling)
    if not prompts:
        raise ValueError(f"no problem can be run: {next(iter(errors.values()), 'there are none')}")
    jobs = [
        Job(problem.id, ids, random_stream(seed, problem.id, "swaps", draw), limit, stop=policy.stops(problem))
        for (problem, ids), limit in zip(prompts, limits, strict=True)
        for draw in range(count)
    ]
    drafts = generate(policy, jobs, sampling, meter=Meter(), candidates=candidates, batch_size=batch_size)
    memos = reward.prompt_memos([Sample(problem, ids, []) for problem, ids in prompts], Meter())
    responses = []
    for number, draft in enumerate(drafts):
        row = number // count
        known = Known(policy.model, draft.candidates, draft.logp)
        sample = Sample(*prompts[row], draft.ids, known=known)
        allowed = replaceable(draft.ids, draft.candidates, draft.logp, reward.readable, min_p)
        responses.append(Response(sample, known, row, draft.finished, allowed, memos[row]))
    return responses


def choose_swaps(responses: Sequence[Response], count: int, rng: np.random.Generator) -> list[Swap]:
    """At most `count` distinct swaps, uniformly over all allowed ones; sorted by response.

    A response gives at most twice its even share, so that long ones do not crowd out the others.

    Raises:
        ValueError: no response allows a swap.
    """
    places = [torch.nonzero(one.allowed).numpy() for one in responses]
    rows = np.repeat(np.arange(len(places)), [len(place) for place in places])
    if not len(rows):
        raise ValueError("no swap is possible: the policy gives no token of its responses a plausible alternative")
    most = math.ceil(2 * count / len(np.unique(rows)))
    taken = np.zeros(len(places), dtype=int)
    picks: list[int] = []
    for pick in rng.permutation(len(rows)):
        if len(picks) < count and taken[rows[pick]] < most:
            taken[rows[pick]] += 1
            picks.append(int(pick))
    flat = np.concatenate(places)
    return [Swap(int(rows[pick]), int(flat[pick, 0]), int(flat[pick, 1])) for pick in sorted(picks)]


def measure(
    responses: Sequence[Response],
    swaps: Sequence[Swap],
    points: Mapping[str, Point],
    *,
    reward: Reward,
    batch_size: int = 256,
) -> Measured:
    """Rewards, true changes and predicted ones.

    Args:
        swaps: sorted by response.
        batch_size: responses whose memos are held at once.

    Raises:
        ValueError: a reward, a changed reward or a gradient that is not finite.
    """
    rewards: list[float] = []
    changes: list[float] = []
    predicted: dict[str, list[Tensor]] = {name: [] for name in points}
    for begin in range(0, len(responses), batch_size):
        some = responses[begin : begin + batch_size]
        # What is known of the drawing is put aside: a term that reads it would remember the prompt alone.
        bare = [replace(one.sample, known=None) for one in some]
        values, memos = reward.score(bare, [one.memos for one in some], meter=Meter(), keep=True)
        _refuse_infinite(values, f"the reward {reward.name} of a response")
        rewards += values
        here = [swap for swap in swaps if begin <= swap.row < begin + len(some)]
        after = _swapped_rewards(responses, here, [memos[swap.row - begin] for swap in here], reward)
        changes += [value - rewards[swap.row] for value, swap in zip(after, here, strict=True)]
        for name, gradients in _gradients(some, memos, points, reward).items():
            predicted[name] += _predicted(some, gradients, f"the gradient of {reward.name} at {name}")
    return Measured(np.array(rewards), np.array(changes), predicted)


def _swapped_rewards(
    responses: Sequence[Response], swaps: Sequence[Swap], memos: Sequence[list[Memo]], reward: Reward
) -> list[float]:
    samples = []
    for swap in swaps:
        one = responses[swap.row]
        ids = list(one.sample.response)
        ids[swap.position] = int(one.known.candidates[swap.position, swap.column])
        samples.append(replace(one.sample, response=ids, known=None))
    values, _ = reward.score(samples, memos, meter=Meter(), shared=[swap.position for swap in swaps])
    _refuse_infinite(values, f"the reward {reward.name} of a response with one token swapped")
    return values


def _gradients(
    responses: Sequence[Response], memos: Sequence[list[Memo]], points: Mapping[str, Point], reward: Reward
) -> dict[str, list[Tensor]]:
    """Point → per response ∂r/∂Y [T, K] at the candidates."""
    samples, tables = [one.sample for one in responses], [one.known.candidates for one in responses]
    prompts = [one.memos for one in responses]
    return {
        name: reward.slope(samples, prompts, memos, tables, meter=Meter(), point=point)
        for name, point in points.items()
    }


def _predicted(responses: Sequence[Response], gradients: Sequence[Tensor], what: str) -> list[Tensor]:
    for gradient in gradients:
        if not gradient.isfinite().all():
            raise ValueError(f"{what} is not finite")
    pairs = zip(responses, gradients, strict=True)
    return [gradient - gradient.gather(1, one.choice()[:, None]) for one, gradient in pairs]


def _refuse_infinite(values: Sequence[float], what: str) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{what} is {value}: the gradient audit needs finite numbers")
