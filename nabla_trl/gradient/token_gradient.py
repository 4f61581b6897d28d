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

from nabla_trl.gradient.likelihood import LikelihoodTerm
from nabla_trl.gradient.objectives import Feed, Memo, Sample, Term
from nabla_trl.gradient.relaxation import GATHER_BUDGET, Relaxed, hard
from nabla_trl.models.flops import Meter

# [terms, B] values -> [terms, B] factors of the terms' gradients
Weigh = Callable[[Tensor], Tensor]


def token_gradient(
    terms: Sequence[Term],
    samples: Sequence[Sample],
    memos: Sequence[Sequence[Memo]],
    candidates: Sequence[Tensor] | None,
    *,
    meter: Meter,
    relaxed: Sequence[Relaxed] | None = None,
    weigh: Weigh | None = None,
    direct: bool = True,
    postfix: bool = True,
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
    if not terms:
        raise ValueError("an objective needs at least one term")
    points = [hard(sample.response) for sample in samples] if relaxed is None else relaxed
    values, parts = [], []
    for index, term in enumerate(terms):
        rows = [memo[index] for memo in memos]
        through = postfix or not isinstance(term, LikelihoodTerm)
        value, part = _term_gradient(term, samples, rows, candidates, points, meter, direct, through)
        values.append(value)
        parts.append(part)
    if weigh is None:
        factors = torch.tensor([[term.weight] for term in terms], dtype=torch.float64).expand(-1, len(samples))
    else:
        factors = weigh(torch.stack(values))
    shares = [
        [float(factor) * part for factor, part in zip(*pair, strict=True)] for pair in zip(factors, parts, strict=True)
    ]
    return [sum(column[1:], start=column[0]) for column in zip(*shares, strict=True)]


def direct_gradient(
    terms: Sequence[LikelihoodTerm],
    samples: Sequence[Sample],
    memos: Sequence[Sequence[Memo]],
    candidates: Sequence[Tensor],
    *,
    meter: Meter,
) -> list[Tensor]:
    """The direct part of G alone, read from the memos of scored responses: no forward, no backward, only heads.

    It leaves out how a token changes the likelihood of the later ones that stand now. A branch draws those anew.

    Args:
        memos: per sample one memo per term, of the response itself.

    Returns:
        per sample [T_i, K] on the CPU.
    """
    results = []
    for sample, remembered, table in zip(samples, memos, candidates, strict=True):
        total = torch.zeros(table.shape)
        for term, memo in zip(terms, remembered, strict=True):
            total = total + term.weight * _direct(term, sample, memo, table, meter)
        results.append(total)
    return results


def _direct(term: LikelihoodTerm, sample: Sample, memo: Memo, table: Tensor, meter: Meter) -> Tensor:
    if sample.known is not None and term.knows(sample) and torch.equal(sample.known.candidates, table):
        return sample.known.logp.nan_to_num(neginf=0.0)
    mapped = term.mapping[table.to(term.mapping.device)]
    meter.charge(sample.key, term.size, "forward", len(sample.prompt) - 1, 0, head=len(table))
    return term.direct(memo, mapped.clamp(min=0)).masked_fill(mapped < 0, 0.0).cpu()


def _term_gradient(
    term: Term,
    samples: Sequence[Sample],
    memos: Sequence[Memo],
    candidates: Sequence[Tensor] | None,
    points: Sequence[Relaxed],
    meter: Meter,
    direct: bool,
    through: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Values [B] of one term and, per sample, its gradient at the candidates."""
    encoded = [term.encode(sample) for sample in samples]
    shared = [0] * len(samples)
    feed = term.feed(encoded, memos, shared)
    _charge(term, samples, feed, meter, through)
    mapped = _mapped(term, samples, candidates)
    # A response whose stop token the term drops has one row less here than in the sample.
    spans = [slice(len(code.response)) for code in encoded]
    targets = [term.read(point, span) for point, span in zip(points, spans, strict=True)]
    embeds = term.relaxed_embeds(feed, targets).requires_grad_(through)
    with torch.enable_grad():
        hidden, _ = term.hidden(feed, embeds)
    tables = None if candidates is None else [m.clamp(min=0)[span] for m, span in zip(mapped, spans, strict=True)]
    seeded = term.seed(hidden, feed, encoded, shared, targets, tables)
    precision = torch.promote_types(seeded.by_hidden.dtype, torch.float32)
    slopes = torch.autograd.grad(hidden, embeds, seeded.by_hidden)[0] if through else None
    results = []
    for row, (sample, span) in enumerate(zip(samples, spans, strict=True)):
        total = torch.zeros(len(sample.response), mapped[row].shape[-1], dtype=precision, device=hidden.device)
        own = total[span]
        if slopes is not None:
            # The first token is fed at index 1; a last token that is not fed has no effect on later ones.
            slope = slopes[row, 1 : min(feed.counts[row], len(own) + 1)]
            own[: len(slope)] += _through_embedding(term, slope, mapped[row], span, full=candidates is None)
        if direct and seeded.direct is not None:
            part = seeded.direct[row]
            own += part if candidates is not None else part[:, mapped[row][0].clamp(min=0)]
        results.append(total.masked_fill(mapped[row] < 0, 0.0).cpu())
    past = [term.past(*one).double().sum().cpu() for one in zip(memos, encoded, shared, strict=True)]
    return seeded.values.cpu() + torch.stack(past), results


def _mapped(term: Term, samples: Sequence[Sample], candidates: Sequence[Tensor] | None) -> list[Tensor]:
    """The term's ids of the candidates: [T, K], or the whole mapping as [1, policy rows]."""
    if candidates is None:
        return [term.mapping[None]] * len(samples)
    return [term.mapping[table.to(term.mapping.device)] for table in candidates]


def _through_embedding(term: Term, slope: Tensor, mapped: Tensor, span: slice, full: bool) -> Tensor:
    """(∂f/∂e_t)·E_v for slopes of a span's first positions and ids [T, K] (or one row of ids for all t)."""
    if full:
        return slope @ term.embed(mapped[0].clamp(min=0)).T
    ids = mapped[span][: len(slope)].clamp(min=0)
    size = max(1, GATHER_BUDGET // max(1, ids.shape[1] * slope.shape[1]))
    chunks = zip(slope.split(size), ids.split(size), strict=True)
    parts = [torch.einsum("td,tkd->tk", some, term.embed(table)) for some, table in chunks]
    return torch.cat(parts) if parts else slope.new_zeros(ids.shape)


def _charge(term: Term, samples: Sequence[Sample], feed: Feed, meter: Meter, through: bool) -> None:
    for sample, start, count in zip(samples, feed.starts, feed.counts, strict=True):
        head = term.charge_head(count)
        meter.charge(sample.key, term.size, "forward", start, count, head=head)
        if through:
            meter.charge(sample.key, term.size, "backward", start, count, head=head)
