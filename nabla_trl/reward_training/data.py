"""Data to train a reward on: the policy's own responses with verdicts, and what the search made of them.

A response is labelled by the verifier (is the final answer right?) and, where the task has step labels, token by
token. Beside each position stand the policy's candidates there, for inputs that are mixtures of them. Everything
ends as rows of ids in the vocabulary and the template of the reward: text is not tokenised again.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nabla_trl.baselines.sampling import ResponsePool, draw_pool
from nabla_trl.gradient.objectives import DrawInfo, Objective, Sample
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models import kv_cache
from nabla_trl.models.generation import compute_top_candidates
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.rewards.reward import Verifier
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# Most logits (floats) held at once.
MAX_FORWARD_LOGITS = 2**26


@dataclass(frozen=True)
class LabeledResponse:
    """A response with the policy's candidates along it, and whether its final answer is right."""

    sample: Sample
    correct: bool


def sample_responses(
    problems: Sequence[Problem],
    num_samples: int,
    *,
    policy: Policy,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Sample]:
    """`count` responses of the policy to each problem; problems that cannot be run are left out.

    Raises:
        ValueError: no problem can be run; the first error is named.
    """
    pool = draw_pool(
        problems, num_samples, policy=policy, reward=None, sampling=sampling, seed=seed, batch_size=batch_size
    )
    failed = [entry.error for entry in pool.entries if entry.error is not None]
    if len(failed) == len(problems):
        raise ValueError(f"none of {len(problems)} problems can be run: {failed[0] if failed else 'there are none'}")
    return [
        Sample(entry.problem, entry.prompt_ids, draw.response_ids)
        for entry in pool.entries
        if entry.error is None
        for draw in entry.responses
    ]


def collect_accepted_responses(traces: Iterable[Trace], problems: Mapping[str, Problem]) -> list[Sample]:
    """What a search accepted: every incumbent of every trace but the first response."""
    return [
        Sample(problems[trace.problem_id], list(trace.prompt_ids), list(ids))
        for trace in traces
        if trace.error is None
        for ids, _ in trace.list_incumbents()[1:]
    ]


def select_highest_reward(pool: ResponsePool, num_responses: int) -> list[Sample]:
    """The `count` responses of highest reward to each problem of a scored pool."""
    return [
        Sample(entry.problem, entry.prompt_ids, draw.response_ids)
        for entry in pool.entries
        for draw in sorted(entry.responses, key=lambda draw: -draw.reward)[:num_responses]
    ]


def label_responses(
    samples: Sequence[Sample], *, policy: Policy, checker: AnswerChecker, top_k_candidates: int, batch_size: int = 256
) -> list[LabeledResponse]:
    """Distinct responses with the verdict on their answers and the policy's candidates along them."""
    distinct = list({(sample.problem.id, *sample.response_ids): sample for sample in samples}.values())
    texts = [
        policy.decode_response(sample.response_ids, policy.get_stop_strings(sample.problem)) for sample in distinct
    ]
    verdicts = Verifier(checker)([sample.problem for sample in distinct], texts)
    known = add_draw_info(policy, distinct, top_k_candidates, batch_size)
    return [LabeledResponse(sample, verdict.is_correct) for sample, (_, verdict) in zip(known, verdicts, strict=True)]


def check_both_classes(labeled_responses: Sequence[LabeledResponse]) -> None:
    """Refuse labels of one class only.

    Raises:
        ValueError: no responses, or all of them right or all wrong.
    """
    right = sum(one.correct for one in labeled_responses)
    if not 0 < right < len(labeled_responses):
        kind = "right" if right else "wrong"
        raise ValueError(f"a reward needs right and wrong responses, but all {len(labeled_responses)} are {kind}")


def filter_encodable(
    labeled_responses: Sequence[LabeledResponse], objective: Objective, model_name: str, *, quiet: bool = False
) -> list[LabeledResponse]:
    """Those that a model can read; how many are left out is said on stderr, unless `quiet`.

    Args:
        term: a term of the model `name`.

    Raises:
        ValueError: it can read none of them, or right or wrong ones alone.
    """
    kept = [one for one in labeled_responses if _is_encodable(objective, one.sample)]
    if len(kept) < len(labeled_responses):
        if not kept:
            raise ValueError(
                f"{model_name} lacks tokens of the policy in each of {len(labeled_responses)} responses or their prompts: choose a "
                "base of the policy's vocabulary"
            )
        if not quiet:
            print(
                f"warning: {len(labeled_responses) - len(kept)} of {len(labeled_responses)} responses hold tokens that {model_name} lacks: "
                "they are left out",
                file=sys.stderr,
            )
        check_both_classes(kept)
    return kept


def _is_encodable(objective: Objective, sample: Sample) -> bool:
    try:
        return min(objective.encode(sample).response_ids, default=0) >= 0
    except ValueError:  # the prompt
        return False


def write_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Samples as JSON lines, whole or not at all."""
    draft = file.with_name(file.name + ".tmp")
    with draft.open("w", encoding="utf-8") as out:
        for one in samples:
            row = {"problem_id": one.problem.id, "prompt_ids": one.prompt_ids, "response_ids": one.response_ids}
            out.write(json.dumps(row) + "\n")
    draft.replace(file)


def read_samples(file: Path, problems: Mapping[str, Problem]) -> list[Sample]:
    """The inverse of `write_samples`.

    Raises:
        ValueError: a line that is no sample, or one of an unknown problem.
    """
    samples = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                problem = problems[row["problem_id"]]
                samples.append(Sample(problem, row["prompt_ids"], row["response_ids"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number} is not a sample of these problems: {error}") from error
    return samples


@torch.no_grad()
def add_draw_info(policy: Policy, samples: Sequence[Sample], top_k: int, batch_size: int) -> list[Sample]:
    """The samples with the policy's `width` likeliest tokens along them, as if it had drawn them."""
    rows = max(1, MAX_FORWARD_LOGITS // policy.forbidden_mask.shape[0])
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].prompt_ids + samples[index].response_ids))
    found: dict[int, Sample] = {}
    while order:
        longest = len(samples[order[-1]].prompt_ids + samples[order[-1]].response_ids)
        size = max(1, min(batch_size, rows // longest))
        batch, order = order[-size:], order[:-size]
        for index, known in zip(batch, _compute_draw_info(policy, [samples[i] for i in batch], top_k), strict=True):
            found[index] = replace(samples[index], draw_info=known)
    return [found[index] for index in range(len(samples))]


def _compute_draw_info(policy: Policy, samples: Sequence[Sample], top_k: int) -> list[DrawInfo]:
    ids, mask = kv_cache.pad_sequences(
        [sample.prompt_ids + sample.response_ids for sample in samples], policy.device, left=False
    )
    logits = policy.model(input_ids=ids, attention_mask=mask).logits.float()
    tables = []
    for row, sample in enumerate(samples):
        begin = len(sample.prompt_ids)
        along = logits[row, begin - 1 : begin + len(sample.response_ids) - 1]
        drawn = torch.tensor(sample.response_ids, device=along.device)
        candidates, logp = compute_top_candidates(along, drawn, policy.forbidden_mask, top_k)
        tables.append(DrawInfo(policy.model, candidates.cpu(), logp.cpu()))
    return tables


def build_token_rows(
    labeled_responses: Sequence[LabeledResponse],
    objective: ScoreObjective,
    *,
    token_labels: TokenLabeler | None,
    min_p: float,
) -> list[dict[str, Any]]:
    """Rows for `TokenRewardTrainer`, in the reward's ids.

    Args:
        term: the reward's term, which knows its template and the vocabulary map.
        labels: step labels; None = only the verdict on the answer is known.
        min_p: candidates below this fraction of the position's likeliest are left out of mixtures.

    Returns:
        per response `input_ids` (prompt, response, tail), `start` (index of the first response token), `ids` and
        `weights` [T, K+1] (the response's own tokens first, then the policy's plausible ones, with its probabilities),
        `right` [T, K+1] 0/1 (empty without step labels), `outcome` 0/1 and `closed` 0/1 (it ends with a stop
        token, where it may).
    """
    rows = {
        id(one): _build_token_row(one, objective, token_labels, min_p) for one in labeled_responses
    }  # repeated ones are worked out once
    return [rows[id(one)] for one in labeled_responses]


def _build_token_row(
    labeled_response: LabeledResponse, objective: ScoreObjective, token_labels: TokenLabeler | None, min_p: float
) -> dict[str, Any]:
    sample = labeled_response.sample
    if sample.draw_info is None:
        raise ValueError(f"{sample.problem.id}: the policy's candidates along the response are not known")
    encoded = objective.encode(sample)
    length = len(encoded.response_ids)
    relaxed = sample.relax(1.0, min_p)
    read = objective.map_to_model_ids(relaxed, slice(length))
    # Most positions have few plausible candidates: columns without any weight are dropped.
    used = (read.weights > 0).any(0)
    used[0] = True
    right, closed = [], sample.response_ids[-1] in objective.stop_ids
    if token_labels is not None:
        table = token_labels.label_candidates(sample.problem, sample.response_ids, relaxed.ids[:, used.cpu()])
        right = table[:length].float().tolist()
        closed = closed and bool(table[length:, 0].all())  # a stop token that the template drops may come too early
    return {
        "input_ids": encoded.prompt_ids + encoded.response_ids + encoded.turn_end_ids,
        "start": len(encoded.prompt_ids),
        "ids": read.ids[:, used].tolist(),
        "weights": read.weights[:, used].tolist(),
        "right": right,
        "outcome": float(labeled_response.correct),
        "closed": float(closed),
    }


def build_pair_rows(
    labeled_responses: Sequence[LabeledResponse],
    objective: ScoreObjective,
    *,
    pairs_per_problem: int,
    margin: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows for TRL's RewardTrainer, `choose_pairs` in the reward's ids.

    Args:
        margin: by which the right response should win, in units of reward; 0 = none.

    Returns:
        `chosen_ids` and `rejected_ids` (prompt, response, tail), and `margin` unless it is 0.
    """
    pairs = choose_pairs(labeled_responses, pairs_per_problem, seed)
    rows = [
        {"chosen_ids": _encode_sequence(objective, good), "rejected_ids": _encode_sequence(objective, bad)}
        for good, bad in pairs
    ]
    return [row | ({"margin": margin} if margin else {}) for row in rows]


def choose_pairs(
    labeled_responses: Sequence[LabeledResponse], pairs_per_problem: int, seed: int = 0
) -> list[tuple[Sample, Sample]]:
    """A right and a wrong response to one problem; at most `per_problem` pairs each, drawn without repetition.

    Raises:
        ValueError: no problem has both a right and a wrong response.
    """
    by_problem: dict[str, tuple[list[Sample], list[Sample]]] = {}
    for one in {id(one): one for one in labeled_responses}.values():  # data may be repeated, pairs are not
        by_problem.setdefault(one.sample.problem.id, ([], []))[0 if one.correct else 1].append(one.sample)
    rng = random.Random(seed)
    pairs = []
    for good, bad in by_problem.values():
        every = [(a, b) for a in good for b in bad]
        pairs += rng.sample(every, min(pairs_per_problem, len(every)))
    if not pairs:
        raise ValueError("no problem has both a right and a wrong response: raise the samples per problem")
    return pairs


def _encode_sequence(objective: ScoreObjective, sample: Sample) -> list[int]:
    encoded = objective.encode(sample)
    return encoded.prompt_ids + encoded.response_ids + encoded.turn_end_ids
