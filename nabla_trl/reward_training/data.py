"""Data to train a reward on: the policy's own responses and those that a search accepted, with labels.

A response is labeled by the verifier (is the final answer correct?) and, where the task has step labels, token by
token. The policy's candidates at each position are stored beside it, for inputs that are mixtures of them. All data
ends as rows of ids in the reward's vocabulary and chat template. Text is not tokenized again.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_trl.baselines.sampling import ResponsePool, draw_pool
from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import DrawInfo, Objective, Sample
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import compute_top_candidates
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.rewards.reward import Verifier
from nabla_trl.states.batch import pad_sequences
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.files import write_atomic

logger = logging.getLogger(__name__)

# Most logits (float32) in memory at once.
MAX_FORWARD_LOGITS = 2**26


@dataclass(frozen=True)
class LabeledResponse:
    """A response with the policy's candidates along it, and whether its final answer is correct."""

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
    """Return `num_samples` responses of the policy to each problem. Problems that fail are left out.

    Raises:
        ValueError: all problems fail. The message names the first error.
    """
    pool = draw_pool(
        problems, num_samples, policy=policy, reward=None, sampling=sampling, seed=seed, batch_size=batch_size
    )
    errors = [entry.error for entry in pool.entries if entry.error is not None]
    if len(errors) == len(problems):
        raise ValueError(f"none of {len(problems)} problems can be run: {errors[0] if errors else 'there are none'}")
    return [
        Sample(entry.problem, entry.prompt_ids, draw.response_ids)
        for entry in pool.entries
        if entry.error is None
        for draw in entry.responses
    ]


def collect_accepted_responses(traces: Iterable[Trace], problems: Mapping[str, Problem]) -> list[Sample]:
    """Return the responses that searches accepted: every incumbent of every trace except the first response."""
    return [
        Sample(problems[trace.problem_id], list(trace.prompt_ids), list(ids))
        for trace in traces
        if trace.error is None
        for ids, _ in trace.list_incumbents()[1:]
    ]


def select_highest_reward(pool: ResponsePool, num_responses: int) -> list[Sample]:
    """Return the `num_responses` responses of highest reward to each problem of a scored pool."""
    return [
        Sample(entry.problem, entry.prompt_ids, draw.response_ids)
        for entry in pool.entries
        for draw in sorted(entry.responses, key=lambda draw: -draw.reward)[:num_responses]
    ]


def label_responses(
    samples: Sequence[Sample], *, policy: Policy, checker: AnswerChecker, top_k_candidates: int, batch_size: int = 256
) -> list[LabeledResponse]:
    """Return the distinct responses with the correctness of their answers and the policy's candidates along them.

    Args:
        top_k_candidates: number of candidates. 0 leaves them out, and takes no pass of the policy.
    """
    distinct = list({(sample.problem.id, *sample.response_ids): sample for sample in samples}.values())
    texts = [
        policy.decode_response(sample.response_ids, policy.get_stop_strings(sample.problem)) for sample in distinct
    ]
    answers = Verifier(checker)([sample.problem for sample in distinct], texts)
    with_candidates = add_draw_info(policy, distinct, top_k_candidates, batch_size) if top_k_candidates else distinct
    return [
        LabeledResponse(sample, result.is_correct)
        for sample, (_, result) in zip(with_candidates, answers, strict=True)
    ]


def check_both_classes(labeled_responses: Sequence[LabeledResponse]) -> None:
    """Refuse labels of a single class."""
    num_correct = sum(response.correct for response in labeled_responses)
    if not 0 < num_correct < len(labeled_responses):
        label = "correct" if num_correct else "wrong"
        raise ValueError(f"a reward needs correct and wrong responses, but all {len(labeled_responses)} are {label}")


def filter_encodable(
    labeled_responses: Sequence[LabeledResponse], objective: Objective, model_name: str, *, quiet: bool = False
) -> list[LabeledResponse]:
    """Return the responses that a model can read, and print a warning with the number of the others.

    Raises:
        ValueError: the model can read no response, or those of a single class.
    """
    readable = [response for response in labeled_responses if _is_encodable(objective, response.sample)]
    total, num_unreadable = len(labeled_responses), len(labeled_responses) - len(readable)
    if not num_unreadable:
        return readable
    if not readable:
        raise ValueError(
            f"{model_name} lacks tokens of the policy in each of {total} responses or their prompts: choose a base "
            "with the policy's vocabulary"
        )
    if not quiet:
        logger.warning(
            "%d of %d responses hold tokens that %s lacks: they are left out", num_unreadable, total, model_name
        )
    check_both_classes(readable)
    return readable


def _is_encodable(objective: Objective, sample: Sample) -> bool:
    try:
        return min(objective.encode(sample).response_ids, default=0) >= 0
    except ValueError:  # the prompt
        return False


def write_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Write samples as JSON lines, whole or not at all."""
    rows = (
        {"problem_id": sample.problem.id, "prompt_ids": sample.prompt_ids, "response_ids": sample.response_ids}
        for sample in samples
    )
    write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_samples(file: Path, problems: Mapping[str, Problem]) -> list[Sample]:
    """Return the samples that `write_samples` wrote.

    Raises:
        ValueError: a line that is no sample, or a sample of an unknown problem.
    """
    samples = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                samples.append(Sample(problems[row["problem_id"]], row["prompt_ids"], row["response_ids"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number} is not a sample of these problems: {error}") from error
    return samples


@torch.no_grad()
def add_draw_info(policy: Policy, samples: Sequence[Sample], top_k: int, batch_size: int) -> list[Sample]:
    """Return the samples with the policy's `top_k` likeliest tokens along them, as if the policy had drawn them.

    Long responses make batches smaller than `batch_size`.
    """
    lengths = [len(sample.prompt_ids + sample.response_ids) for sample in samples]
    max_tokens = max(1, MAX_FORWARD_LOGITS // policy.forbidden_mask.shape[0])
    order = sorted(range(len(samples)), key=lambda index: lengths[index])
    completed: dict[int, Sample] = {}
    while order:
        size = max(1, min(batch_size, max_tokens // lengths[order[-1]]))
        batch, order = order[-size:], order[:-size]
        draw_infos = _compute_draw_info(policy, [samples[index] for index in batch], top_k)
        for index, draw_info in zip(batch, draw_infos, strict=True):
            completed[index] = replace(samples[index], draw_info=draw_info)
    return [completed[index] for index in range(len(samples))]


def _compute_draw_info(policy: Policy, samples: Sequence[Sample], top_k: int) -> list[DrawInfo]:
    ids, mask = pad_sequences(
        [sample.prompt_ids + sample.response_ids for sample in samples], policy.device, left=False
    )
    logits = policy.model(input_ids=ids, attention_mask=mask).logits.float()
    draw_infos = []
    for row, sample in enumerate(samples):
        begin = len(sample.prompt_ids)
        logits_TV = logits[row, begin - 1 : begin + len(sample.response_ids) - 1]
        response = torch.tensor(sample.response_ids, device=logits_TV.device)
        candidates, logp = compute_top_candidates(logits_TV, response, policy.forbidden_mask, top_k)
        draw_infos.append(DrawInfo(policy.model, candidates.cpu(), logp.cpu()))
    return draw_infos


@torch.no_grad()
def compute_hidden_states(policy: Policy, samples: Sequence[Sample], batch_size: int) -> list[Tensor]:
    """Return per sample [T, d] the policy's last hidden states that predict the response's tokens.

    The policy reads the prompt of consecutive responses to one problem once.
    """
    objective = policy_likelihood(policy)
    counter, states = FlopCounter(), []
    for begin in range(0, len(samples), batch_size):
        batch = samples[begin : begin + batch_size]
        distinct = {tuple(sample.prompt_ids): sample for sample in batch}
        caches = dict(zip(distinct, objective.compute_prompt_caches(list(distinct.values()), counter), strict=True))
        encoded = [objective.encode(sample) for sample in batch]
        prompt_caches = [caches[tuple(sample.prompt_ids)] for sample in batch]
        forward_batch = objective.build_batch(encoded, prompt_caches, [0] * len(batch))
        hidden, _ = objective.compute_hidden_states(forward_batch)
        states += [hidden[row, :count].float() for row, count in enumerate(forward_batch.num_tokens)]
    return states


def build_token_rows(
    labeled_responses: Sequence[LabeledResponse],
    objective: ScoreObjective,
    *,
    token_labels: TokenLabeler | None,
    min_p: float,
) -> list[dict[str, Any]]:
    """Return rows for `TokenRewardTrainer`, in the reward's ids.

    Args:
        labeled_responses: the data. Repeated responses are encoded once.
        token_labels: step labels. None = only the correctness of the answer is known.
        min_p: candidates below this fraction of the position's likeliest are left out of mixtures.

    Returns:
        per response

        - `input_ids`: prompt, response and turn end.
        - `response_start`: index of the first response token.
        - `candidate_ids`, `candidate_weights` [T, K+1]: the response's own tokens first, then the policy's plausible
          ones with its probabilities.
        - `correct` [T, K+1] 0/1: free of error. Empty without step labels.
        - `answer_correct` 0/1.
        - `ends_with_stop` 0/1: the response ends with a stop token, where it may end.
    """
    distinct = {id(response): response for response in labeled_responses}
    rows = {key: _build_token_row(response, objective, token_labels, min_p) for key, response in distinct.items()}
    return [rows[id(response)] for response in labeled_responses]


def _build_token_row(
    labeled_response: LabeledResponse, objective: ScoreObjective, token_labels: TokenLabeler | None, min_p: float
) -> dict[str, Any]:
    sample = labeled_response.sample
    if sample.draw_info is None:
        raise ValueError(f"{sample.problem.id}: the policy's candidates along the response are not known")
    encoded = objective.encode(sample)
    length = len(encoded.response_ids)
    relaxed = sample.relax(1.0, min_p)
    mapped = objective.map_to_model_ids(relaxed, slice(length))
    # Most positions have few plausible candidates: columns without any weight are dropped.
    is_used = (mapped.weights > 0).any(0)
    is_used[0] = True
    correct, ends_with_stop = [], sample.response_ids[-1] in objective.stop_ids
    if token_labels is not None:
        labels = token_labels.label_candidates(sample.problem, sample.response_ids, relaxed.ids[:, is_used.cpu()])
        correct = labels[:length].float().tolist()
        # A stop token that the template drops may come too early.
        ends_with_stop = ends_with_stop and bool(labels[length:, 0].all())
    return {
        "input_ids": encoded.sequence_ids,
        "response_start": len(encoded.prompt_ids),
        "candidate_ids": mapped.ids[:, is_used].tolist(),
        "candidate_weights": mapped.weights[:, is_used].tolist(),
        "correct": correct,
        "answer_correct": float(labeled_response.correct),
        "ends_with_stop": float(ends_with_stop),
    }


def build_pair_rows(
    labeled_responses: Sequence[LabeledResponse],
    objective: ScoreObjective,
    *,
    pairs_per_problem: int,
    margin: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return rows for TRL's RewardTrainer: `choose_pairs` in the reward's ids.

    Args:
        margin: by which the correct response should win, in units of reward. 0 = none.

    Returns:
        `chosen_ids` and `rejected_ids` (prompt, response, turn end), and `margin` unless it is 0.
    """
    rows = [
        {"chosen_ids": objective.encode(chosen).sequence_ids, "rejected_ids": objective.encode(rejected).sequence_ids}
        for chosen, rejected in choose_pairs(labeled_responses, pairs_per_problem, seed)
    ]
    return [row | ({"margin": margin} if margin else {}) for row in rows]


def choose_pairs(
    labeled_responses: Sequence[LabeledResponse], pairs_per_problem: int, seed: int = 0
) -> list[tuple[Sample, Sample]]:
    """Return at most `pairs_per_problem` pairs of a correct and a wrong response to each problem.

    Pairs are drawn without repetition, also where responses are repeated.

    Raises:
        ValueError: no problem has both a correct and a wrong response.
    """
    by_problem: dict[str, tuple[list[Sample], list[Sample]]] = {}
    for response in {id(response): response for response in labeled_responses}.values():
        correct, wrong = by_problem.setdefault(response.sample.problem.id, ([], []))
        (correct if response.correct else wrong).append(response.sample)
    rng = random.Random(seed)
    pairs = []
    for correct, wrong in by_problem.values():
        all_pairs = [(chosen, rejected) for chosen in correct for rejected in wrong]
        pairs += rng.sample(all_pairs, min(pairs_per_problem, len(all_pairs)))
    if not pairs:
        raise ValueError("no problem has both a correct and a wrong response: raise samples_per_problem")
    return pairs
