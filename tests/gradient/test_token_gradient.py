"""gradient: token gradients against plain autograd through the one-hot matrix of the whole sequence.

The reference (`relaxed`) knows nothing of the package: one-hot rows times the embedding table, one full
forward without a cache or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, PreTrainedTokenizerFast

from nabla_trl.gradient import likelihood as likelihood_module
from nabla_trl.gradient import token_gradient as token_gradient_module
from nabla_trl.gradient.likelihood import LikelihoodObjective, policy_likelihood
from nabla_trl.gradient.objectives import Objective, Sample
from nabla_trl.gradient.relaxation import RelaxedResponse
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import freeze_policy
from nabla_trl.models.options import GradientPoint
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import build_log_ratio_reward, build_scalar_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem

DOUBLE = torch.float64
END, PAD = worlds.TOKENS.index(worlds.END), worlds.TOKENS.index(worlds.PAD)
PROBLEM = Problem(id="p", question="3*4-5")


# --- references --------------------------------------------------------------------------------------------


def relaxed(
    model: PreTrainedModel, one_hot: Tensor, begin: int, end: int, direct: bool = True, postfix: bool = True
) -> Tensor:
    """A classifier's score of the sequence, or a causal LM's Σ Y·log p over its rows begin .. end − 1."""
    fed = one_hot if postfix else one_hot.detach()
    table = model.get_input_embeddings()(torch.arange(one_hot.shape[1]))
    logits = model(inputs_embeds=(fed @ table)[None]).logits[0]
    if model.get_output_embeddings() is None:
        return logits.squeeze()
    picked = one_hot if direct else one_hot.detach()
    return (picked[begin:end] * logits.log_softmax(-1)[begin - 1 : end - 1]).sum()


def one_hot(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    rows = model.get_input_embeddings().weight.shape[0]
    return F.one_hot(torch.tensor(ids), rows).to(model.dtype).requires_grad_(True)


def reference(
    model: PreTrainedModel, prompt: list[int], response: list[int], tail: Sequence[int] = (), **parts: bool
) -> Tensor:
    """∂(relaxed)/∂Y [T, V] of the response rows."""
    rows = one_hot(model, [*prompt, *response, *tail])
    span = len(prompt), len(prompt) + len(response)
    value = relaxed(model, rows, *span, **parts)
    if not value.requires_grad:
        return torch.zeros(len(response), rows.shape[1], dtype=rows.dtype)
    return torch.autograd.grad(value, rows)[0][slice(*span)]


def gradients(
    parts: Sequence[Objective], samples: Sequence[Sample], candidates: Sequence[Tensor] | None = None, **switches: Any
) -> list[Tensor]:
    """`token_gradient` with fresh prompt caches."""
    columns = [term.compute_prompt_caches(samples, FlopCounter()) for term in parts]
    caches = list(zip(*columns, strict=True))
    return compute_token_gradient(parts, samples, caches, candidates, flop_counter=FlopCounter(), **switches)


def scores(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    return reward.score(samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter())[0]


def assert_close(ours: Tensor, theirs: Tensor, relative: float = 1e-9) -> None:
    """Largest difference against the largest entry."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = float(theirs.abs().max())
    assert scale > 1e-3, "nothing to compare"
    assert float((ours - theirs).abs().max()) <= relative * scale


def drawn(*lengths: int, seed: int = 0, prompts: Sequence[int] = ()) -> list[Sample]:
    """Unfinished random responses of given lengths, after random prompts of given lengths."""
    generator = torch.Generator().manual_seed(seed)
    numbers = iter(torch.randint(0, len(worlds.CHARS), (999,), generator=generator).tolist())

    def ids(count: int) -> list[int]:
        return [next(numbers) for _ in range(count)]

    sizes = list(prompts) or [6] * len(lengths)
    return [
        Sample(Problem(id=f"p{i}", question="1"), ids(before), ids(count))
        for i, (before, count) in enumerate(zip(sizes, lengths, strict=True))
    ]


def take_prompts(parts: Sequence[Objective]) -> list[Objective]:
    """Make terms read the sample's own prompt ids, whatever their template would write."""
    for term in parts:
        term.encode_prompt = lambda problem, prompt: prompt
    return list(parts)


def all_terms(policy: Policy, architecture: str = "llama", tied: bool = False) -> list[Objective]:
    """A scalar reward, both terms of a log-ratio and the policy's likelihood, of different weights."""
    parts = [
        *worlds.tiny_scalar(policy, architecture, tied=tied).objectives,
        *worlds.tiny_logratio(policy, architecture, tied=tied).objectives,
        policy_likelihood(policy),
    ]
    for term, weight in zip(parts, (1.5, 0.7, -0.4, 1.0), strict=True):
        term.weight = weight
    return parts


@pytest.fixture(scope="module")
def double() -> Policy:
    return worlds.tiny_policy(dtype=DOUBLE)


# --- equal to autograd and to finite differences -----------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_equals_autograd_through_the_one_hot(architecture: str, tied: bool) -> None:
    policy = worlds.tiny_policy(architecture, tied=tied, dtype=DOUBLE)
    shared = policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    assert shared == tied
    item = worlds.sample(policy, PROBLEM, "12-5=7;#7", finished=True)
    open_item = worlds.sample(policy, PROBLEM, "12-5=7;#7", finished=False)
    prompt = item.prompt_ids

    reward = worlds.tiny_scalar(policy, architecture, tied=tied)
    model = reward.objectives[0].model
    expected = reference(model, prompt, item.response_ids)  # the stop token opens, and here is, the template's tail
    assert_close(gradients(reward.objectives, [item])[0], expected)
    assert_close(gradients(reward.objectives, [open_item])[0], expected[:-1])  # the same sequence, its end not ours

    reward = worlds.tiny_logratio(policy, architecture, tied=tied)
    better = reward.objectives[0].model
    assert better is not policy.model and reward.objectives[1].model is policy.model
    expected = reference(better, prompt, item.response_ids) - reference(policy.model, prompt, item.response_ids)
    assert_close(gradients(reward.objectives, [item])[0], expected)

    likelihood = [policy_likelihood(policy)]
    for direct, postfix in ((True, True), (True, False), (False, True)):
        parts = {"direct": direct, "postfix": postfix}
        switches = {"likelihood_token_grad": direct, "likelihood_suffix_grad": postfix}
        expected = reference(policy.model, prompt, item.response_ids, **parts)
        assert_close(gradients(likelihood, [item], **switches)[0], expected)
    assert not gradients(likelihood, [item], likelihood_token_grad=False, likelihood_suffix_grad=False)[0].any()


def test_embeddings_that_the_model_scales() -> None:
    """Gemma multiplies the rows of its table by √d (its norms compute in float32, hence the tolerance)."""
    config = Gemma3TextConfig(
        vocab_size=len(worlds.TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        layer_types=["full_attention"] * 2,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = freeze_policy(Gemma3ForCausalLM(config).double(), worlds.char_tokenizer(), "gemma")
    item = worlds.sample(policy, PROBLEM, "12-5=7")
    expected = reference(policy.model, item.prompt_ids, item.response_ids, direct=False)
    table = torch.arange(0, 9).expand(len(item.response_ids), -1)
    assert_close(
        gradients([policy_likelihood(policy)], [item], likelihood_token_grad=False)[0], expected, relative=1e-4
    )
    ours = gradients([policy_likelihood(policy)], [item], [table], likelihood_token_grad=False)[0]
    assert_close(ours, expected[:, :9], relative=1e-4)


def test_switches_leave_rewards_alone(double: Policy) -> None:
    """direct and postfix belong to log-likelihoods; a scalar reward acts through its embeddings always."""
    item = worlds.sample(double, PROBLEM, "12-5")
    terms_ = worlds.tiny_scalar(double).objectives
    assert torch.equal(
        gradients(terms_, [item], likelihood_token_grad=False, likelihood_suffix_grad=False)[0],
        gradients(terms_, [item])[0],
    )


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_equals_central_differences_of_the_relaxed_objective(architecture: str) -> None:
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    parts = all_terms(policy, architecture)
    item = worlds.sample(policy, PROBLEM, "4-5=9;#9")
    ours = gradients(parts, [item])[0]
    begin, end = len(item.prompt_ids), len(item.prompt_ids) + len(item.response_ids)
    rows = one_hot(policy.model, item.prompt_ids + item.response_ids).detach()
    generator = torch.Generator().manual_seed(3)
    step = 1e-4

    @torch.no_grad()
    def objective(row: int, token: int, by: float) -> float:
        moved = rows.clone()
        moved[begin + row, token] += by
        return float(sum(term.weight * relaxed(term.model, moved, begin, end) for term in parts))

    for _ in range(12):
        row = int(torch.randint(0, end - begin, (), generator=generator))
        token = int(torch.randint(0, rows.shape[1], (), generator=generator))
        slope = (objective(row, token, step) - objective(row, token, -step)) / (2 * step)
        assert slope == pytest.approx(float(ours[row, token]), abs=1e-6 * float(ours.abs().max()))


# --- at a mixture ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_p", [0.0, 0.3])
@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_at_a_mixture_equals_autograd_there(architecture: str, min_p: float) -> None:
    """For scores and log-likelihoods, direct parts included; each sample of the batch at a mixture of its own."""
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    parts = all_terms(policy, architecture)
    samples = [worlds.known(policy, worlds.sample(policy, PROBLEM, text), 6) for text in ("12-5=7;#7", "4")]
    points = [item.relax(alpha, min_p) for item, alpha in zip(samples, (0.7, 1.0), strict=True)]
    ours = gradients(parts, samples, relaxed_responses=points)
    for item, alpha, found in zip(samples, (0.7, 1.0), ours, strict=True):
        rows = one_hot(policy.model, item.prompt_ids + item.response_ids).detach()
        begin = len(item.prompt_ids)
        rows[begin:] = worlds.mixed(item, alpha, rows.shape[1], min_p)
        rows.requires_grad_(True)
        value = sum(term.weight * relaxed(term.model, rows, begin, len(rows)) for term in parts)
        assert_close(found, torch.autograd.grad(value, rows)[0][begin:], relative=1e-6)  # π is float32


def test_share_zero_is_the_hard_point_and_needs_no_candidates(double: Policy) -> None:
    item = worlds.sample(double, PROBLEM, "4-5=9;#9")
    parts = all_terms(double)
    assert torch.equal(gradients(parts, [item], relaxed_responses=[item.relax(0.0)])[0], gradients(parts, [item])[0])
    worlds.refused(lambda: item.relax(0.5), "p:", "candidates")


def test_the_mean_over_shares(double: Policy) -> None:
    reward = worlds.tiny_scalar(double)
    items = [worlds.known(double, worlds.sample(double, PROBLEM, text), 5) for text in ("4-5=9;#9", "7")]
    caches = reward.compute_prompt_caches(items, FlopCounter())
    one, two, both = (
        reward.compute_backward_gradient(
            items, caches, None, flop_counter=FlopCounter(), gradient_at=GradientPoint(alphas)
        )
        for alphas in ((0.2,), (0.8,), (0.2, 0.8))
    )
    for a, b, mean in zip(one, two, both, strict=True):
        assert float((a - b).abs().max()) > 1e-3 * float(a.abs().max())
        assert_close(mean, (a + b) / 2)


def test_a_mixture_over_shuffled_ids(double: Policy) -> None:
    model = worlds.tiny_model(kind="score", seed=6, dtype=DOUBLE)
    plain = build_scalar_reward(double, model, double.tokenizer, "plain")
    moved = build_scalar_reward(double, *shuffled(model, double.tokenizer, len(double.tokenizer) + 5), "moved")
    item = worlds.known(double, worlds.sample(double, PROBLEM, "4-5=9;#9"), 6)
    table = [item.draw_info.candidates]
    ours, theirs = (
        gradients(r.objectives, [item], table, relaxed_responses=[item.relax(0.5)])[0] for r in (moved, plain)
    )
    assert_close(ours, theirs)


def test_candidates_the_reward_lacks_leave_the_mixture(double: Policy) -> None:
    """Their weight goes to the others of their position."""
    parts = worlds.tiny_scalar(double).objectives
    item = worlds.known(double, worlds.sample(double, PROBLEM, "4-5"), 4)
    point = item.relax(0.5)
    lost = int(next(v for v in item.draw_info.candidates[1].tolist() if v not in item.response_ids))
    rows, columns = (point.ids == lost).nonzero(as_tuple=True)
    weights = point.weights.clone()
    weights[rows, columns] = 0
    expected = RelaxedResponse(point.ids, weights / weights.sum(-1, keepdim=True))
    kept = torch.arange(len(worlds.CHARS)).expand(len(item.response_ids), -1)
    theirs = gradients(parts, [item], [kept], relaxed_responses=[expected])[0]
    parts[0].vocab_map = parts[0].vocab_map.clone()
    parts[0].vocab_map[lost] = -1
    ours = gradients(parts, [item], [kept], relaxed_responses=[point])[0]
    usable = kept[0] != lost
    assert_close(ours[:, usable], theirs[:, usable], relative=1e-6)
    assert not ours[:, ~usable].any()


# --- cache, batch, candidates ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_prefix_cache_changes_nothing(architecture: str) -> None:
    """Prompt tokens may as well be the response's first ones, behind a prompt of one token: no cache then.

    The likelihood has more summands that way, but no response token influences those of the prompt.
    """
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    parts = take_prompts(all_terms(policy, architecture))
    (item,) = drawn(7, prompts=[9])
    long = Sample(item.problem, item.prompt_ids[:1], item.prompt_ids[1:] + item.response_ids)
    for term in parts:
        cached, bare = (term.compute_prompt_caches([some], FlopCounter())[0].state.length for some in (item, long))
        assert (cached, bare) == (8, 0)
        assert_close(gradients([term], [item])[0], gradients([term], [long])[0][-7:])


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_batch_of_mixed_lengths_equals_singles(architecture: str) -> None:
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    parts = take_prompts(all_terms(policy, architecture))
    samples = drawn(5, 1, 11, 3, prompts=[1, 12, 4, 7])
    generator = torch.Generator().manual_seed(5)
    tables = [torch.randint(0, len(worlds.CHARS), (len(s.response_ids), 4), generator=generator) for s in samples]
    for candidates in (None, tables):
        together = gradients(parts, samples, candidates)
        for index, item in enumerate(samples):
            alone = gradients(parts, [item], None if candidates is None else [candidates[index]])[0]
            assert_close(together[index], alone)


def test_candidates_equal_the_full_gradient_there(double: Policy) -> None:
    parts = all_terms(double)
    samples = [worlds.sample(double, PROBLEM, text) for text in ("4-5=9;#9", "7")]
    full = gradients(parts, samples)
    generator = torch.Generator().manual_seed(7)
    tables = [torch.randint(0, full[0].shape[1], (len(rows), 5), generator=generator) for rows in full]
    for ours, rows, table in zip(gradients(parts, samples, tables), full, tables, strict=True):
        assert_close(ours, rows.gather(1, table))


# --- vocabularies ------------------------------------------------------------------------------------------


def shuffled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    other, new_ids = worlds.permuted_tokenizer(tokenizer, seed=4)
    assert (new_ids != torch.arange(len(new_ids))).sum() > 20
    return worlds.permuted_model(model, new_ids, rows), other


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_scalar_reward_over_shuffled_ids(double: Policy, tied: bool, padding: int) -> None:
    tokenizer, size = double.tokenizer, len(double.tokenizer)
    model = worlds.tiny_model(kind="score", seed=6, tied=tied, dtype=DOUBLE)
    plain = build_scalar_reward(double, model, tokenizer, "plain")
    moved = build_scalar_reward(double, *shuffled(model, tokenizer, size + padding), "moved")
    compare_rewards(double, plain, moved, columns=size)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_log_ratio_over_shuffled_ids(double: Policy, tied: bool, padding: int) -> None:
    """Rows of an output head that no token owns take probability: without them (−∞ bias) both agree."""
    tokenizer, size = double.tokenizer, len(double.tokenizer)
    better = worlds.tiny_policy(seed=6, tied=tied, dtype=DOUBLE)
    model, other = shuffled(better.model, tokenizer, size + padding)
    moved = freeze_policy(silence(model, other), other, "moved")
    compare_rewards(
        double,
        build_log_ratio_reward(double, better, double, "plain"),
        build_log_ratio_reward(double, moved, double, "moved"),
        size,
    )


def silence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype)
    bias[len(tokenizer) :] = -torch.inf
    head.bias = torch.nn.Parameter(bias)
    return model


def compare_rewards(policy: Policy, plain: Reward, moved: Reward, columns: int) -> None:
    samples = [worlds.sample(policy, PROBLEM, text) for text in ("4-5=9;#9", "7")]
    assert scores(moved, samples) == pytest.approx(scores(plain, samples), rel=1e-9)
    tables = [torch.arange(0, columns, 3).expand(len(item.response_ids), -1) for item in samples]
    for candidates in (None, tables):
        ours, theirs = (gradients(reward.objectives, samples, candidates) for reward in (moved, plain))
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def test_tokens_the_reward_lacks_get_zero() -> None:
    """Rows beyond the policy's tokenizer, and special tokens of its own, have no counterpart."""
    extra = "<|tool|>"
    own = worlds.char_tokenizer([*worlds.TOKENS[:5], extra, *worlds.TOKENS[5:]])
    policy = worlds.tiny_policy(tokenizer=own, dtype=DOUBLE, vocab=len(own) + 3)
    reward = worlds.tiny_scalar(policy, tokenizer=worlds.char_tokenizer())
    item = worlds.sample(policy, PROBLEM, "4-5=9;#9")
    full = gradients(reward.objectives, [item])[0]
    absent = torch.zeros(len(own) + 3, dtype=torch.bool)
    absent[[5, len(own), len(own) + 1, len(own) + 2]] = True
    blank = absent.clone()
    blank[own.pad_token_id] = True  # transformers starts its embedding at zero
    assert not full[:, absent].any() and full[:, ~blank].abs().min() > 0
    assert reward.in_vocabulary.logical_not().equal(absent)
    table = torch.tensor([[5, 4, len(own)]]).expand(len(item.response_ids), -1)
    assert_close(gradients(reward.objectives, [item], [table])[0], full.gather(1, table))


# --- buffers and memory ------------------------------------------------------------------------------------


def test_frozen_weights_get_no_gradient_buffers(double: Policy) -> None:
    parts = all_terms(double)
    gradients(parts, [worlds.sample(double, PROBLEM, "4-5")])
    for weight in (weight for term in parts for weight in term.model.parameters()):
        assert weight.grad is None and not weight.requires_grad


class Largest(TorchDispatchMode):
    """Records the size of the largest floating tensor made, weights and views of weights aside."""

    def __init__(self, models: Sequence[PreTrainedModel]):
        super().__init__()
        self.weights = {w.untyped_storage().data_ptr() for model in models for w in model.parameters()}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.untyped_storage().data_ptr() not in self.weights:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_never_holds_a_whole_response_times_vocabulary(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    vocab, budget = 4096, 4 * 4096
    policy = worlds.tiny_policy(vocab=vocab, tied=tied, dtype=DOUBLE)
    parts = take_prompts(
        [
            *worlds.tiny_scalar(policy, vocab=vocab).objectives,
            LikelihoodObjective(
                policy.model, policy.size, vocab_map=torch.arange(vocab), encode_prompt=lambda problem, prompt: prompt
            ),
        ]
    )
    samples = drawn(24, 9, prompts=[5, 1])
    generator = torch.Generator().manual_seed(9)
    tables = [torch.randint(0, vocab, (len(item.response_ids), 64), generator=generator) for item in samples]

    def largest(candidates: Sequence[Tensor] | None) -> tuple[list[Tensor], int]:
        with Largest([term.model for term in parts]) as seen:
            return gradients(parts, samples, candidates), seen.elements

    plain, _ = largest(tables)
    full, without_candidates = largest(None)
    assert without_candidates >= 24 * vocab  # the recorder sees what it is to find
    monkeypatch.setattr(likelihood_module, "MAX_HEAD_LOGITS", budget)
    monkeypatch.setattr(token_gradient_module, "MAX_GATHERED_VALUES", budget)
    sliced, elements = largest(tables)
    assert elements <= budget < 9 * vocab
    for ours, whole, table, before in zip(sliced, full, tables, plain, strict=True):
        assert_close(ours, before)
        assert_close(ours, whole.gather(1, table))
    likelihood = parts[1]
    with Largest([likelihood.model]) as seen:
        _, caches = likelihood.score(
            samples,
            likelihood.compute_prompt_caches(samples, FlopCounter()),
            [0, 0],
            FlopCounter(),
            return_caches=True,
        )
        for score_cache, table in zip(caches, tables, strict=True):
            likelihood.compute_candidate_logp(score_cache, table)
    assert vocab <= seen.elements <= budget


def test_half_precision_weights_keep_log_likelihoods_in_float32() -> None:
    """log π of a token is as large as 10 or 20, where bfloat16 steps by a sixteenth."""
    policy = worlds.tiny_policy(dtype=torch.bfloat16)
    item = worlds.sample(policy, PROBLEM, "4-5=9;#9")
    ours = gradients([policy_likelihood(policy)], [item], likelihood_suffix_grad=False)[0]
    logits = policy.model(torch.tensor([item.prompt_ids + item.response_ids])).logits[0, len(item.prompt_ids) - 1 : -1]
    assert_close(ours.bfloat16(), logits.float().log_softmax(-1).bfloat16(), relative=0.02)
    assert ours.dtype == torch.float32 and not torch.equal(ours, ours.bfloat16().float())
    assert torch.allclose(ours.exp().sum(-1), torch.ones(len(ours)), atol=1e-5)


# --- the scalar reward's last words ------------------------------------------------------------------------

CLOSE = "<|close|>"


def closing(policy: Policy, tail: str, knows_stop: bool = True) -> tuple[Reward, PreTrainedTokenizerFast]:
    """A scalar reward whose template closes the assistant's turn with `tail` ("": it has no template)."""
    tokens = [*worlds.TOKENS, CLOSE]
    if not knows_stop:
        tokens.remove(worlds.END)
    template = worlds.TEMPLATE.replace(worlds.END, tail) if tail else None
    own = worlds.char_tokenizer(tokens, template=template, eos=CLOSE)
    reward = worlds.tiny_scalar(policy, tokenizer=own)
    take_prompts(reward.objectives)
    return reward, own


@pytest.mark.parametrize(
    ("tail", "knows_stop", "finished", "own_stop", "read"),
    [
        ("<|end|>;", True, True, True, ["<|end|>", ";"]),  # the stop token opens the tail, and is the response's
        ("<|end|>;", True, False, False, ["<|end|>", ";"]),  # cut off at the limit: the template closes the turn
        ("<|close|>;", True, True, False, ["<|close|>", ";"]),  # a stop token of which the template knows nothing
        ("<|close|>;", False, True, False, ["<|close|>", ";"]),  # one that the reward cannot even read
        ("<|close|>;", False, False, False, ["<|close|>", ";"]),
        ("", True, True, True, ["<|end|>"]),  # no template: the stop token is a token like others
        ("", False, True, False, []),
    ],
)
@pytest.mark.parametrize("words", ["4-5=9", ""], ids=["words", "stop alone"])
def test_last_token_and_tail_of_a_scalar_reward(
    double: Policy, words: str, tail: str, knows_stop: bool, finished: bool, own_stop: bool, read: list[str]
) -> None:
    """The reward reads `words` and `read`; of these, `words` and perhaps the stop token are the response."""
    words = words if finished or words else "4"  # a response is never empty
    reward, own = closing(double, tail, knows_stop)
    model = reward.objectives[0].model
    prompt = own.convert_tokens_to_ids([worlds.USER, "1", worlds.ASSISTANT])
    item = replace(worlds.sample(double, PROBLEM, words, finished=finished), prompt_ids=prompt)
    sequence = prompt + own.convert_tokens_to_ids([*words, *read])
    begin, end = len(prompt), len(prompt) + len(words) + own_stop

    rows = one_hot(model, sequence)
    value = relaxed(model, rows, begin, end)
    assert scores(reward, [item]) == pytest.approx([value.item()], rel=1e-9)
    expected = torch.zeros(len(item.response_ids), len(worlds.TOKENS), dtype=DOUBLE)
    known = [token in own.get_vocab() for token in worlds.TOKENS]
    columns = own.convert_tokens_to_ids([t for t in worlds.TOKENS if t in own.get_vocab()])
    expected[: end - begin, known] = torch.autograd.grad(value, rows)[0][begin:end, columns]
    ours = gradients(reward.objectives, [item])[0]
    assert float((ours - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert expected.any() == (end > begin)
    table = torch.tensor([[0, END, 3]]).expand(len(item.response_ids), -1)
    assert torch.allclose(gradients(reward.objectives, [item], [table])[0], ours.gather(1, table), rtol=1e-9, atol=0)


# --- cost --------------------------------------------------------------------------------------------------


def test_charges_a_forward_and_a_backward_per_term(double: Policy) -> None:
    parts = [*worlds.tiny_scalar(double).objectives, policy_likelihood(double)]
    samples = [
        worlds.sample(double, Problem(id="a", question="1+2"), "4-5", finished=False),
        worlds.sample(double, Problem(id="b", question="12-3"), "9", finished=True),
    ]
    caches = list(zip(*(term.compute_prompt_caches(samples, FlopCounter()) for term in parts), strict=True))
    for switches, terms_back in (({}, (True, True)), ({"likelihood_suffix_grad": False}, (True, False))):
        counter = FlopCounter()
        compute_token_gradient(parts, samples, caches, None, flop_counter=counter, **switches)
        for item, tail in zip(samples, (1, 0), strict=True):
            begin, length = len(item.prompt_ids) - 1, len(item.response_ids)
            total = 0.0
            for term, count, head, back in zip(
                parts, (1 + length + tail, length), (1 + length + tail, length), terms_back, strict=True
            ):
                total += term.model_size.compute_forward_flops(begin, count, head)
                total += term.model_size.compute_backward_flops(begin, count, head) * back
            assert counter.get_cost(item.problem.id).flops == total > 0


def test_the_direct_part_is_read_from_memory_at_the_price_of_the_heads(double: Policy) -> None:
    """Also where the better model has shuffled ids, and where the memory was made through another response's."""
    better = worlds.tiny_policy(seed=6, dtype=DOUBLE)
    model, other = shuffled(better.model, double.tokenizer, len(double.tokenizer))
    reward = build_log_ratio_reward(double, freeze_policy(model, other, "moved"), double, "ratio")
    begun, item = (worlds.sample(double, PROBLEM, text) for text in ("4-5=2", "4-5=9;#9"))
    bare = reward.compute_prompt_caches([begun], FlopCounter())
    _, first = reward.score([begun], bare, flop_counter=FlopCounter(), return_caches=True)
    _, second = reward.score([item], first, num_shared=[4], flop_counter=FlopCounter(), return_caches=True)
    table = torch.arange(0, len(double.tokenizer), 2).expand(len(item.response_ids), -1)
    counter = FlopCounter()
    ours = reward.compute_direct_gradient([item], second, [table], flop_counter=counter)[0]
    assert_close(ours, gradients(reward.objectives, [item], [table], likelihood_suffix_grad=False)[0])
    heads = sum(term.model_size.compute_forward_flops(0, 0, len(item.response_ids)) for term in reward.objectives)
    assert counter.get_total_cost().flops == heads > 0


@pytest.mark.parametrize(
    ("tail", "knows_stop", "reads_stop"),
    [
        ("<|end|>;", True, True),
        ("<|close|>;", True, False),
        ("<|close|>;", False, False),
        ("", True, True),
        ("", False, False),
    ],
)
def test_the_direct_part_of_a_score_is_what_each_token_added(
    double: Policy, tail: str, knows_stop: bool, reads_stop: bool
) -> None:
    """0 elsewhere, for the first token, and for a stop token that is not the reward's; in the reward's own ids, and
    where the memory was made through another response's. It costs nothing."""
    reward, own = closing(double, tail, knows_stop)
    model, kept = reward.objectives[0].model, "4-5=9;#9"
    prompt = [own.convert_tokens_to_ids(token) for token in (worlds.USER, "1", worlds.ASSISTANT)]
    begun, item = (replace(worlds.sample(double, PROBLEM, text), prompt_ids=prompt) for text in ("4-5=2", kept))
    _, first = reward.score(
        [begun], reward.compute_prompt_caches([begun], FlopCounter()), flop_counter=FlopCounter(), return_caches=True
    )
    _, second = reward.score([item], first, num_shared=[4], flop_counter=FlopCounter(), return_caches=True)
    table = torch.arange(len(worlds.TOKENS)).expand(len(item.response_ids), -1)
    counter = FlopCounter()
    [ours] = reward.compute_direct_gradient([item], second, [table], flop_counter=counter)
    assert counter.get_total_cost().flops == 0

    expected = torch.zeros(ours.shape, dtype=DOUBLE)
    read = [*kept, worlds.END] if reads_stop else [*kept]
    for at in range(1, len(read)):
        before, after = (
            plain_score(model, prompt + own.convert_tokens_to_ids(read[:count])) for count in (at, at + 1)
        )
        expected[at, item.response_ids[at]] = after - before
    assert int(expected.count_nonzero()) == len(read) - 1
    assert_close(ours.double(), expected, relative=1e-6)  # it is handed on in float32
    some = table[:, ::2]
    assert torch.equal(
        reward.compute_direct_gradient([item], second, [some], flop_counter=counter)[0], ours.gather(1, some)
    )


def plain_score(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """A classifier's own forward of the whole sequence; given embeddings, it pools at the last position."""
    return float(model(inputs_embeds=model.get_input_embeddings()(torch.tensor([ids]))).logits.detach())


@pytest.mark.parametrize("text", ["direct", "hard", "mixture:0.2,0.8", "direct+hard", "direct+mixture:0.6"])
@pytest.mark.parametrize("kind", ["scalar", "log-ratio"])
def test_the_slope_is_the_sum_of_what_its_point_names(double: Policy, kind: str, text: str) -> None:
    """The direct part counts once: backward passes leave that of log-likelihoods out where it is there already."""
    reward = (worlds.tiny_scalar if kind == "scalar" else worlds.tiny_logratio)(double)
    items = [worlds.known(double, worlds.sample(double, PROBLEM, words), 6) for words in ("4-5=9;#9", "7")]
    prompts, tables = reward.compute_prompt_caches(items, FlopCounter()), [item.draw_info.candidates for item in items]
    _, scored = reward.score(
        [replace(i, draw_info=None) for i in items], prompts, flop_counter=FlopCounter(), return_caches=True
    )
    point, counter = GradientPoint.parse(text), FlopCounter()
    found = reward.compute_gradient(items, prompts, scored, tables, flop_counter=counter, gradient_at=point)
    again, expected = FlopCounter(), [torch.zeros(table.shape, dtype=DOUBLE) for table in tables]
    if point.direct:
        parts = reward.compute_direct_gradient(items, scored, tables, flop_counter=again)
        expected = [a + b for a, b in zip(expected, parts, strict=True)]
    for alpha in point.alphas:
        at, caches = [item.relax(alpha) for item in items], prompts
        parts = compute_token_gradient(
            reward.objectives,
            items,
            caches,
            tables,
            flop_counter=again,
            relaxed_responses=at,
            likelihood_token_grad=not point.direct,
        )
        expected = [a + b / len(point.alphas) for a, b in zip(expected, parts, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.double(), theirs, relative=1e-6)
    assert (
        counter.get_total_cost().tokens == again.get_total_cost().tokens
        and counter.get_total_cost().flops == again.get_total_cost().flops
    )
    assert ("reward/backward" in counter.get_total_cost().tokens) == bool(point.alphas)
    if kind == "log-ratio" and text == "direct+hard":  # both parts at the same tokens: the whole gradient
        whole = reward.compute_backward_gradient(items, prompts, tables, flop_counter=FlopCounter())
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(found, whole, strict=True))


# --- memory of the incumbent -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["scalar", "scalar, unknown stop", "log-ratio"])
def test_scoring_through_the_incumbent_equals_scoring_afresh(kind: str, architecture: str) -> None:
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    if kind == "log-ratio":
        reward = worlds.tiny_logratio(policy, architecture)
    else:
        unknown = "unknown" in kind
        reward, _ = closing(policy, "<|close|>;" if unknown else "<|end|>;", knows_stop=not unknown)
    take_prompts(reward.objectives)
    digits = worlds.sample(policy, PROBLEM, "123", finished=False).response_ids
    for finished in (True, False):
        incumbents = drawn(6, 3, prompts=[1, 5])
        for item in incumbents:
            item.response_ids.extend([END] * finished)
        branches = [(row, t) for row, item in enumerate(incumbents) for t in range(len(item.response_ids))]
        suffixes = [[], [END], digits, [*digits, *digits, END]]
        proposals, owners = [], []
        for number, (row, t) in enumerate(branches):
            item = incumbents[row]
            new = (item.response_ids[t] + 1) % len(worlds.CHARS)
            response = [*item.response_ids[:t], new, *suffixes[number % len(suffixes)]]
            proposals.append(Sample(item.problem, item.prompt_ids, response))
            owners.append(row)
        # A branch may also be the stop token itself.
        proposals += [Sample(item.problem, item.prompt_ids, [*item.response_ids[:2], END]) for item in incumbents]
        branches += [(row, 2) for row in range(len(incumbents))]
        owners += range(len(incumbents))
        compare_scores(reward, incumbents, proposals, owners, [t for _, t in branches])


def compare_scores(
    reward: Reward, incumbents: list[Sample], proposals: list[Sample], owners: list[int], shared: list[int]
) -> None:
    bare = reward.compute_prompt_caches(incumbents, FlopCounter())
    _, kept = reward.score(incumbents, bare, flop_counter=FlopCounter(), return_caches=True)
    before = [
        [
            (
                [tensor.clone() for tensor in score_cache.state.tokens],
                score_cache.logp.clone(),
                score_cache.prefix_scores.clone(),
            )
            for score_cache in row
        ]
        for row in kept
    ]
    saved, whole = FlopCounter(), FlopCounter()
    through, caches = reward.score(
        proposals, [kept[row] for row in owners], flop_counter=saved, num_shared=shared, return_caches=True
    )
    afresh, fresh_memos = reward.score(
        proposals, [bare[row] for row in owners], flop_counter=whole, return_caches=True
    )
    assert through == pytest.approx(afresh, rel=1e-9)
    assert saved.get_total_cost().flops < whole.get_total_cost().flops
    for row, copies in zip(kept, before, strict=True):
        for score_cache, (cache, logp, levels) in zip(row, copies, strict=True):
            assert all(map(torch.equal, score_cache.state.tokens, cache)) and torch.equal(score_cache.logp, logp)
            assert torch.equal(score_cache.prefix_scores, levels)
    for item, ours, theirs in zip(proposals, caches, fresh_memos, strict=True):
        for term, a, b in zip(
            reward.objectives, ours, theirs, strict=True
        ):  # an accepted proposal's memory is as good
            torch.testing.assert_close(a.state.tokens, b.state.tokens, rtol=0, atol=1e-9)
            assert torch.allclose(a.logp, b.logp, rtol=0, atol=1e-9)
            assert torch.allclose(a.hidden_states, b.hidden_states, rtol=0, atol=1e-9)
            assert (
                torch.allclose(a.prefix_scores, b.prefix_scores, rtol=0, atol=1e-9) and a.prefix_scores.dtype == DOUBLE
            )
            read = 0 if isinstance(term, LikelihoodObjective) else len(term.encode(item).response_ids) + 1
            assert len(a.prefix_scores) == len(b.prefix_scores) == read
