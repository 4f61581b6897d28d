"""Token gradients: ∂f/∂Y for a few candidates per position, or for all tokens.

Y [T, V] holds the token weights of a response: one-hot rows, or a mixture (relaxation.py). The model reads the input
embeddings e_t = Σ_v Y[t, v]·E_v, where E is its embedding table. By the chain rule

    G[t, v] = ∂f/∂Y[t, v] = (∂f/∂e_t)·E_v    the part through the embeddings, by one backward pass
                          + log p_t(v)       the part at fixed hidden states, for log-likelihoods only

For a log-likelihood the first part tells how token t changes the likelihood of the suffix after it
(`likelihood_suffix_grad`), the second is that of the token itself (`likelihood_token_grad`).

At the one-hot Y of a response, G is the straight-through gradient with a hard forward (arXiv 2603.04948). It depends
on the tokens alone, so callers compute it once per distinct response. The matrix T × V is never formed when candidates
are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.objectives import Objective, Sample, ScoreCache, widen_dtype
from nabla_trl.gradient.relaxation import MAX_GATHERED_VALUES, RelaxedResponse, build_one_hot
from nabla_trl.models.flops import FlopCounter

# [objectives, B] values -> [objectives, B] factors of the objectives' gradients
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
    """Return G = ∂F/∂Y of each sample, for F a function of the objectives f (their weighted sum by default).

    It takes one forward and one backward per objective.

    Args:
        samples: B responses, none empty.
        caches: per sample one cache per objective, of its prompt (`Objective.compute_prompt_caches`).
        candidates: per sample [T, K] policy ids. None: the whole vocabulary.
        relaxed_responses: per sample the Y at which to differentiate, in policy ids. None: the hard tokens.
        objective_grad_fn: ∂F/∂f of the values f. None: the objectives' weights.
        likelihood_token_grad: include the part at fixed hidden states.
        likelihood_suffix_grad: include the part of log-likelihoods through the embeddings.

    Returns:
        per sample [T, K] (or [T, policy rows]) floats on the CPU, 0 where an objective's model lacks the token.
    """
    if not objectives:
        raise ValueError("a token gradient needs at least one objective")
    if relaxed_responses is None:
        relaxed_responses = [build_one_hot(sample.response_ids) for sample in samples]
    values, gradients = [], []  # per objective
    for index, objective in enumerate(objectives):
        objective_values, objective_gradients = _compute_objective_gradient(
            objective,
            samples,
            [sample_caches[index] for sample_caches in caches],
            candidates,
            relaxed_responses,
            flop_counter,
            likelihood_token_grad,
            through_embeddings=likelihood_suffix_grad or not isinstance(objective, LikelihoodObjective),
        )
        values.append(objective_values)
        gradients.append(objective_gradients)
    if objective_grad_fn is None:
        weights = torch.tensor([[objective.weight] for objective in objectives], dtype=torch.float64)
        factors = weights.expand(-1, len(samples))
    else:
        factors = objective_grad_fn(torch.stack(values))
    # ∂F/∂Y = Σ_f ∂F/∂f · ∂f/∂Y
    weighted = [
        [float(factor) * gradient for factor, gradient in zip(*row, strict=True)]
        for row in zip(factors, gradients, strict=True)
    ]
    return [sum(terms[1:], start=terms[0]) for terms in zip(*weighted, strict=True)]


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
    """Return the values [B] of one objective and, per sample, its gradient at the candidates."""
    encoded = [objective.encode(sample) for sample in samples]
    caches, num_shared = objective.fit_caches(samples, encoded, caches, [0] * len(samples), flop_counter)
    batch = objective.build_batch(encoded, caches, num_shared)
    for sample, start, count in zip(samples, batch.start_positions, batch.num_tokens, strict=True):
        for kind in ("forward", "backward") if through_embeddings else ("forward",):
            flop_counter.add_flops(sample.cost_key, objective.model_size, kind, start, count)

    # A response whose stop token the objective drops is one token shorter in the objective's ids.
    spans = [slice(len(row.response_ids)) for row in encoded]
    relaxed = [objective.map_to_model_ids(Y, span) for Y, span in zip(relaxed_responses, spans, strict=True)]
    tables = None  # per sample the candidates in the objective's ids, −1 where its model lacks one
    if candidates is not None:
        tables = [objective.vocab_map[table.to(objective.vocab_map.device)] for table in candidates]

    # Forward from e = Y·E to the last hidden states h, and ∂f/∂h.
    embeds = objective.embed_relaxed(batch, relaxed).requires_grad_(through_embeddings)
    with torch.enable_grad():
        hidden, _ = objective.compute_hidden_states(batch, embeds)
    span_tables = None if tables is None else [t.clamp(min=0)[span] for t, span in zip(tables, spans, strict=True)]
    seed = objective.compute_gradient_seed(hidden, batch, relaxed, span_tables)
    # Backward from ∂f/∂h to ∂f/∂e [B, R, d].
    embed_grads = torch.autograd.grad(hidden, embeds, seed.hidden_grad)[0] if through_embeddings else None

    gradients = []
    for row, (sample, span) in enumerate(zip(samples, spans, strict=True)):
        ids = objective.vocab_map[None] if tables is None else tables[row]
        gradient = torch.zeros(
            len(sample.response_ids), ids.shape[-1], dtype=widen_dtype(seed.hidden_grad), device=hidden.device
        )
        span_gradient = gradient[span]  # a view
        if embed_grads is not None:
            # Response token t is input t + 1. A last token that is not read has no effect on later ones.
            grads = embed_grads[row, 1 : min(batch.num_tokens[row], len(span_gradient) + 1)]
            span_gradient[: len(grads)] += _project_on_embeddings(
                objective, grads, None if tables is None else ids[span]
            )
        if likelihood_token_grad and seed.token_grads is not None:
            token_grads = seed.token_grads[row]
            span_gradient += token_grads if tables is not None else token_grads[:, ids[0].clamp(min=0)]
        gradients.append(gradient.masked_fill(ids < 0, 0.0).cpu())
    return seed.values.cpu(), gradients


def _project_on_embeddings(objective: Objective, embed_grads: Tensor, ids: Tensor | None) -> Tensor:
    """Return (∂f/∂e_t)·E_v for gradients [S, d] of the first positions.

    Args:
        ids: [T, K] candidates v of the objective's model, −1 where it lacks one. None: its id of every policy token.
    """
    if ids is None:
        return embed_grads @ objective.embed_ids(objective.vocab_map.clamp(min=0)).T
    ids = ids[: len(embed_grads)].clamp(min=0)
    size = max(1, MAX_GATHERED_VALUES // max(1, ids.shape[1] * embed_grads.shape[1]))
    products = [
        torch.einsum("td,tkd->tk", grads, objective.embed_ids(ids_slice))
        for grads, ids_slice in zip(embed_grads.split(size), ids.split(size), strict=True)
    ]
    return torch.cat(products) if products else embed_grads.new_zeros(ids.shape)


def compute_direct_likelihood_gradient(
    objectives: Sequence[LikelihoodObjective],
    samples: Sequence[Sample],
    caches: Sequence[Sequence[ScoreCache]],
    candidates: Sequence[Tensor],
    *,
    flop_counter: FlopCounter,
) -> list[Tensor]:
    """Return log p_t(v), the part of G at fixed hidden states, from scored responses: heads only, no backward.

    It leaves out how a token changes the likelihood of the tokens after it, which a branch regenerates anyway.

    Args:
        caches: per sample one cache per objective, of the response itself.

    Returns:
        per sample [T, K] on the CPU.
    """
    gradients = []
    for sample, sample_caches, table in zip(samples, caches, candidates, strict=True):
        gradient = torch.zeros(table.shape)
        for objective, cache in zip(objectives, sample_caches, strict=True):
            gradient = gradient + objective.weight * _get_candidate_logp(objective, sample, cache, table, flop_counter)
        gradients.append(gradient)
    return gradients


def _get_candidate_logp(
    objective: LikelihoodObjective, sample: Sample, cache: ScoreCache, candidates: Tensor, flop_counter: FlopCounter
) -> Tensor:
    info = sample.draw_info
    if info is not None and objective.has_draw_logp(sample) and torch.equal(info.candidates, candidates):
        return info.logp.nan_to_num(neginf=0.0)
    ids = objective.vocab_map[candidates.to(objective.vocab_map.device)]
    start, num_positions = len(sample.prompt_ids) - 1, len(candidates)
    flop_counter.add_flops(
        sample.cost_key, objective.model_size, "forward", start, 0, num_head_positions=num_positions
    )
    return objective.compute_candidate_logp(cache, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).cpu()
