"""Token gradients: ∂(objective)/∂Y for a few candidates per position or for all tokens.

Y is the matrix (T × V) of a response's token weights: one-hot rows, or a mixture (`relax`). For a term with input
embeddings E and value f, the derivative is (∂f/∂e_t)·E_v, plus log π(v | y_<t) where f is a log-likelihood (DESIGN:
"direct" and "postfix" parts; paper: arXiv 2603.04948, the straight-through gradient with a hard forward). It depends
on the tokens alone, so callers compute it once per distinct response. Memory: the T × V matrix is never formed when
candidates are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.objectives import ForwardBatch, Objective, Sample, ScoreCache
from nabla_trl.gradient.relaxation import MAX_GATHERED_VALUES, RelaxedResponse, build_one_hot
from nabla_trl.models.flops import FlopCounter

# [terms, B] values -> [terms, B] factors of the terms' gradients
ObjectiveGradFn = Callable[[Tensor], Tensor]


def compute_token_gradient(
    objectives: Sequence[Objective],
    samples: Sequence[Sample],
    caches: Sequence[Sequence[ScoreCache]],
    candidates: Sequence[Tensor] | None,
    *,
    flop_counter: FlopCounter,
    relaxed_responses: Sequence[RelaxedResponse] | None = None,
    objective_grad_fn: ObjectiveGradFn | None = None,
    likelihood_token_grad: bool = True,
    likelihood_suffix_grad: bool = True,
) -> list[Tensor]:
    """G = ∂(Σ weight·term)/∂Y for each sample, in one forward and one backward per term.

    Args:
        terms: the objective.
        samples: B responses, none empty.
        memos: per sample one memo per term, of its prompt (`Term.prompt_memos`).
        candidates: per sample [T_i, K] policy ids, or None for the whole vocabulary.
        relaxed: per sample the Y at which to differentiate, in policy ids; None = the hard tokens.
        weigh: factors of the terms' gradients from their values; None = the terms' weights.
        direct: include the direct part of log-likelihood terms.
        postfix: include the part through the input embeddings of log-likelihood terms.

    Returns:
        per sample [T_i, K] (or [T_i, policy rows]) float tensors on the CPU; 0 where a term lacks the token.
    """
    if not objectives:
        raise ValueError("an objective needs at least one term")
    points = (
        [build_one_hot(sample.response_ids) for sample in samples] if relaxed_responses is None else relaxed_responses
    )
    values, parts = [], []
    for index, term in enumerate(objectives):
        rows = [memo[index] for memo in caches]
        through = likelihood_suffix_grad or not isinstance(term, LikelihoodObjective)
        value, part = _compute_objective_gradient(
            term, samples, rows, candidates, points, flop_counter, likelihood_token_grad, through
        )
        values.append(value)
        parts.append(part)
    if objective_grad_fn is None:
        factors = torch.tensor([[term.weight] for term in objectives], dtype=torch.float64).expand(-1, len(samples))
    else:
        factors = objective_grad_fn(torch.stack(values))
    shares = [
        [float(factor) * part for factor, part in zip(*pair, strict=True)] for pair in zip(factors, parts, strict=True)
    ]
    return [sum(column[1:], start=column[0]) for column in zip(*shares, strict=True)]


def compute_direct_likelihood_gradient(
    objectives: Sequence[LikelihoodObjective],
    samples: Sequence[Sample],
    caches: Sequence[Sequence[ScoreCache]],
    candidates: Sequence[Tensor],
    *,
    flop_counter: FlopCounter,
) -> list[Tensor]:
    """The direct part of G alone, read from the memos of scored responses: no forward, no backward, only heads.

    It leaves out how a token changes the likelihood of the later ones that stand now. A branch draws those anew.

    Args:
        memos: per sample one memo per term, of the response itself.

    Returns:
        per sample [T_i, K] on the CPU.
    """
    results = []
    for sample, remembered, table in zip(samples, caches, candidates, strict=True):
        total = torch.zeros(table.shape)
        for term, memo in zip(objectives, remembered, strict=True):
            total = total + term.weight * _get_candidate_logp(term, sample, memo, table, flop_counter)
        results.append(total)
    return results


def _get_candidate_logp(
    objective: LikelihoodObjective, sample: Sample, cache: ScoreCache, table: Tensor, flop_counter: FlopCounter
) -> Tensor:
    if (
        sample.draw_info is not None
        and objective.has_draw_logp(sample)
        and torch.equal(sample.draw_info.candidates, table)
    ):
        return sample.draw_info.logp.nan_to_num(neginf=0.0)
    mapped = objective.vocab_map[table.to(objective.vocab_map.device)]
    flop_counter.add_flops(
        sample.cost_key, objective.model_size, "forward", len(sample.prompt_ids) - 1, 0, num_head_positions=len(table)
    )
    return objective.compute_candidate_logp(cache, mapped.clamp(min=0)).masked_fill(mapped < 0, 0.0).cpu()


def _compute_objective_gradient(
    objective: Objective,
    samples: Sequence[Sample],
    caches: Sequence[ScoreCache],
    candidates: Sequence[Tensor] | None,
    relaxed_responses: Sequence[RelaxedResponse],
    flop_counter: FlopCounter,
    likelihood_token_grad: bool,
    through_embeddings: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Values [B] of one term and, per sample, its gradient at the candidates."""
    encoded = [objective.encode(sample) for sample in samples]
    shared = [0] * len(samples)
    feed = objective.build_batch(encoded, caches, shared)
    _charge_flops(objective, samples, feed, flop_counter, through_embeddings)
    mapped = _map_candidates(objective, samples, candidates)
    # A response whose stop token the term drops has one row less here than in the sample.
    spans = [slice(len(code.response_ids)) for code in encoded]
    targets = [objective.map_to_model_ids(point, span) for point, span in zip(relaxed_responses, spans, strict=True)]
    embeds = objective.embed_relaxed(feed, targets).requires_grad_(through_embeddings)
    with torch.enable_grad():
        hidden, _ = objective.compute_hidden_states(feed, embeds)
    tables = None if candidates is None else [m.clamp(min=0)[span] for m, span in zip(mapped, spans, strict=True)]
    seeded = objective.compute_gradient_seed(hidden, feed, encoded, shared, targets, tables)
    precision = torch.promote_types(seeded.hidden_grad.dtype, torch.float32)
    slopes = torch.autograd.grad(hidden, embeds, seeded.hidden_grad)[0] if through_embeddings else None
    results = []
    for row, (sample, span) in enumerate(zip(samples, spans, strict=True)):
        total = torch.zeros(len(sample.response_ids), mapped[row].shape[-1], dtype=precision, device=hidden.device)
        own = total[span]
        if slopes is not None:
            # The first token is fed at index 1; a last token that is not fed has no effect on later ones.
            slope = slopes[row, 1 : min(feed.num_tokens[row], len(own) + 1)]
            own[: len(slope)] += _compute_embedding_gradient(
                objective, slope, mapped[row], span, whole_vocabulary=candidates is None
            )
        if likelihood_token_grad and seeded.token_grads is not None:
            part = seeded.token_grads[row]
            own += part if candidates is not None else part[:, mapped[row][0].clamp(min=0)]
        results.append(total.masked_fill(mapped[row] < 0, 0.0).cpu())
    past = [
        objective.get_cached_values(*one).double().sum().cpu() for one in zip(caches, encoded, shared, strict=True)
    ]
    return seeded.values.cpu() + torch.stack(past), results


def _map_candidates(
    objective: Objective, samples: Sequence[Sample], candidates: Sequence[Tensor] | None
) -> list[Tensor]:
    """The term's ids of the candidates: [T, K], or the whole mapping as [1, policy rows]."""
    if candidates is None:
        return [objective.vocab_map[None]] * len(samples)
    return [objective.vocab_map[table.to(objective.vocab_map.device)] for table in candidates]


def _compute_embedding_gradient(
    objective: Objective, embedding_grads: Tensor, mapped: Tensor, span: slice, whole_vocabulary: bool
) -> Tensor:
    """(∂f/∂e_t)·E_v for slopes of a span's first positions and ids [T, K] (or one row of ids for all t)."""
    if whole_vocabulary:
        return embedding_grads @ objective.embed_ids(mapped[0].clamp(min=0)).T
    ids = mapped[span][: len(embedding_grads)].clamp(min=0)
    size = max(1, MAX_GATHERED_VALUES // max(1, ids.shape[1] * embedding_grads.shape[1]))
    chunks = zip(embedding_grads.split(size), ids.split(size), strict=True)
    parts = [torch.einsum("td,tkd->tk", some, objective.embed_ids(table)) for some, table in chunks]
    return torch.cat(parts) if parts else embedding_grads.new_zeros(ids.shape)


def _charge_flops(
    objective: Objective,
    samples: Sequence[Sample],
    batch: ForwardBatch,
    flop_counter: FlopCounter,
    through_embeddings: bool,
) -> None:
    for sample, start, count in zip(samples, batch.start_positions, batch.num_tokens, strict=True):
        head = objective.count_head_positions(count)
        flop_counter.add_flops(sample.cost_key, objective.model_size, "forward", start, count, num_head_positions=head)
        if through_embeddings:
            flop_counter.add_flops(
                sample.cost_key, objective.model_size, "backward", start, count, num_head_positions=head
            )
