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

from nabla_trl.baselines.sampling import Pool, draw_pool
from nabla_trl.gradient.objectives import Known, Sample, Term
from nabla_trl.gradient.score import ScoreTerm
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models import kv_cache
from nabla_trl.models.generation import top_candidates
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabels
from nabla_trl.rewards.reward import Verifier
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# Most logits (floats) held at once.
LOGIT_BUDGET = 2**26


@dataclass(frozen=True)
class Labelled:
    """A response with the policy's candidates along it, and whether its final answer is right."""

    sample: Sample
    right: bool


def draw_samples(
    problems: Sequence[Problem],
    count: int,
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
    pool = draw_pool(problems, count, policy=policy, reward=None, sampling=sampling, seed=seed, batch_size=batch_size)
    failed = [entry.error for entry in pool.entries if entry.error is not None]
    if len(failed) == len(problems):
        raise ValueError(f"none of {len(problems)} problems can be run: {failed[0] if failed else 'there are none'}")
    return [
        Sample(entry.problem, entry.prompt, draw.ids)
        for entry in pool.entries
        if entry.error is None
        for draw in entry.draws
    ]


def accepted(traces: Iterable[Trace], problems: Mapping[str, Problem]) -> list[Sample]:
    """What a search accepted: every incumbent of every trace but the first response."""
    return [
        Sample(problems[trace.problem_id], list(trace.prompt_ids), list(ids))
        for trace in traces
        if trace.error is None
        for ids, _ in trace.incumbents()[1:]
    ]


def highest(pool: Pool, count: int) -> list[Sample]:
    """The `count` responses of highest reward to each problem of a scored pool."""
    return [
        Sample(entry.problem, entry.prompt, draw.ids)
        for entry in pool.entries
        for draw in sorted(entry.draws, key=lambda draw: -draw.reward)[:count]
    ]


def label(
    samples: Sequence[Sample], *, policy: Policy, checker: AnswerChecker, candidates: int, batch_size: int = 256
) -> list[Labelled]:
    """Distinct responses with the verdict on their answers and the policy's candidates along them."""
    distinct = list({(sample.problem.id, *sample.response): sample for sample in samples}.values())
    texts = [policy.said(sample.response, policy.stops(sample.problem)) for sample in distinct]
    verdicts = Verifier(checker)([sample.problem for sample in distinct], texts)
    known = with_candidates(policy, distinct, candidates, batch_size)
    return [Labelled(sample, verdict.right) for sample, (_, verdict) in zip(known, verdicts, strict=True)]


def check_classes(labelled: Sequence[Labelled]) -> None:
    """Refuse labels of one class only.

    Raises:
        ValueError: no responses, or all of them right or all wrong.
    """
    right = sum(one.right for one in labelled)
    if not 0 < right < len(labelled):
        kind = "right" if right else "wrong"
        raise ValueError(f"a reward needs right and wrong responses, but all {len(labelled)} are {kind}")


def legible(labelled: Sequence[Labelled], term: Term, name: str, *, quiet: bool = False) -> list[Labelled]:
    """Those that a model can read; how many are left out is said on stderr, unless `quiet`.

    Args:
        term: a term of the model `name`.

    Raises:
        ValueError: it can read none of them, or right or wrong ones alone.
    """
    kept = [one for one in labelled if _reads(term, one.sample)]
    if len(kept) < len(labelled):
        if not kept:
            raise ValueError(
                f"{name} lacks tokens of the policy in each of {len(labelled)} responses or their prompts: choose a "
                "base of the policy's vocabulary"
            )
        if not quiet:
            print(
                f"warning: {len(labelled) - len(kept)} of {len(labelled)} responses hold tokens that {name} lacks: "
                "they are left out",
                file=sys.stderr,
            )
        check_classes(kept)
    return kept


def _reads(term: Term, sample: Sample) -> bool:
    try:
        return min(term.encode(sample).response, default=0) >= 0
    except ValueError:  # the prompt
        return False


def write_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Samples as JSON lines, whole or not at all."""
    draft = file.with_name(file.name + ".tmp")
    with draft.open("w", encoding="utf-8") as out:
        for one in samples:
            row = {"problem_id": one.problem.id, "prompt_ids": one.prompt, "response_ids": one.response}
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
def with_candidates(policy: Policy, samples: Sequence[Sample], width: int, batch_size: int) -> list[Sample]:
    """The samples with the policy's `width` likeliest tokens along them, as if it had drawn them."""
    rows = max(1, LOGIT_BUDGET // policy.forbidden.shape[0])
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].prompt + samples[index].response))
    found: dict[int, Sample] = {}
    while order:
        longest = len(samples[order[-1]].prompt + samples[order[-1]].response)
        size = max(1, min(batch_size, rows // longest))
        batch, order = order[-size:], order[:-size]
        for index, known in zip(batch, _known(policy, [samples[i] for i in batch], width), strict=True):
            found[index] = replace(samples[index], known=known)
    return [found[index] for index in range(len(samples))]


def _known(policy: Policy, samples: Sequence[Sample], width: int) -> list[Known]:
    ids, mask = kv_cache.pad([sample.prompt + sample.response for sample in samples], policy.device, left=False)
    logits = policy.model(input_ids=ids, attention_mask=mask).logits.float()
    tables = []
    for row, sample in enumerate(samples):
        begin = len(sample.prompt)
        along = logits[row, begin - 1 : begin + len(sample.response) - 1]
        drawn = torch.tensor(sample.response, device=along.device)
        candidates, logp = top_candidates(along, drawn, policy.forbidden, width)
        tables.append(Known(policy.model, candidates.cpu(), logp.cpu()))
    return tables


def token_rows(
    labelled: Sequence[Labelled], term: ScoreTerm, *, labels: TokenLabels | None, min_p: float
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
    rows = {id(one): _token_row(one, term, labels, min_p) for one in labelled}  # repeated ones are worked out once
    return [rows[id(one)] for one in labelled]


def _token_row(one: Labelled, term: ScoreTerm, labels: TokenLabels | None, min_p: float) -> dict[str, Any]:
    sample = one.sample
    if sample.known is None:
        raise ValueError(f"{sample.problem.id}: the policy's candidates along the response are not known")
    encoded = term.encode(sample)
    length = len(encoded.response)
    relaxed = sample.relaxed(1.0, min_p)
    read = term.read(relaxed, slice(length))
    # Most positions have few plausible candidates: columns without any weight are dropped.
    used = (read.weights > 0).any(0)
    used[0] = True
    right, closed = [], sample.response[-1] in term.stop_ids
    if labels is not None:
        table = labels.right(sample.problem, sample.response, relaxed.ids[:, used.cpu()])
        right = table[:length].float().tolist()
        closed = closed and bool(table[length:, 0].all())  # a stop token that the template drops may come too early
    return {
        "input_ids": encoded.prompt + encoded.response + encoded.tail,
        "start": len(encoded.prompt),
        "ids": read.ids[:, used].tolist(),
        "weights": read.weights[:, used].tolist(),
        "right": right,
        "outcome": float(one.right),
        "closed": float(closed),
    }


def pair_rows(
    labelled: Sequence[Labelled], term: ScoreTerm, *, per_problem: int, margin: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for TRL's RewardTrainer, `choose_pairs` in the reward's ids.

    Args:
        margin: by which the right response should win, in units of reward; 0 = none.

    Returns:
        `chosen_ids` and `rejected_ids` (prompt, response, tail), and `margin` unless it is 0.
    """
    pairs = choose_pairs(labelled, per_problem, seed)
    rows = [{"chosen_ids": _closed(term, good), "rejected_ids": _closed(term, bad)} for good, bad in pairs]
    return [row | ({"margin": margin} if margin else {}) for row in rows]


def choose_pairs(labelled: Sequence[Labelled], per_problem: int, seed: int = 0) -> list[tuple[Sample, Sample]]:
    """A right and a wrong response to one problem; at most `per_problem` pairs each, drawn without repetition.

    Raises:
        ValueError: no problem has both a right and a wrong response.
    """
    by_problem: dict[str, tuple[list[Sample], list[Sample]]] = {}
    for one in {id(one): one for one in labelled}.values():  # data may be repeated, pairs are not
        by_problem.setdefault(one.sample.problem.id, ([], []))[0 if one.right else 1].append(one.sample)
    rng = random.Random(seed)
    pairs = []
    for good, bad in by_problem.values():
        every = [(a, b) for a in good for b in bad]
        pairs += rng.sample(every, min(per_problem, len(every)))
    if not pairs:
        raise ValueError("no problem has both a right and a wrong response: raise the samples per problem")
    return pairs


def _closed(term: ScoreTerm, sample: Sample) -> list[int]:
    encoded = term.encode(sample)
    return encoded.prompt + encoded.response + encoded.tail
