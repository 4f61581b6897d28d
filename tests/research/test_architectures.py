"""Architectures of transformers: what runs gives the model's own tokens, likelihoods and gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import worlds
from architectures import build_model, list_architectures
from torch import Tensor, nn

from nabla_trl import NablaReasoner
from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import Sample
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.loading import freeze_policy
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.rewards.loading import build_log_ratio_reward, build_scalar_reward
from nabla_trl.states import prefix
from nabla_trl.states.layout import find_backbone
from nabla_trl.states.probe import get_layout

PROBLEMS = worlds.tiny_problems(("1+2", "3*4-5", "12-3+4*5"))
TEXTS = ("4-5=9;#9", "7", "1+2=3;3*4=2;#2")  # longer than the windows, and one token
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
# Relative error of gradients. Parts of many models compute in float32 (norms, softmax, delta rules), also in float64.
TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-3}
# Where a step of one token of transformers differs from its pass over several, in any precision.
STEP_ERRORS = {"nemotron_h": 1e-2}
# One architecture for each kind of layer.
KINDS = {
    "bloom": "position biases",
    "ctrl": "inputs that it writes into",
    "deepseek_v3": "keys and values of different widths",
    "deepseek_v32": "an index",
    "falcon_h1": "attention and a recurrent state in one layer, embeddings scaled beside the table",
    "gemma3_text": "windows",
    "gemma4_text": "shared keys and values, embeddings per layer",
    "lfm2": "convolutions",
    "llama4_text": "chunks",
    "qwen3_next": "linear attention",
}
RUNNING = {line.split(" | ")[0].strip("| ") for line in architectures.read_table() if line.endswith("| runs |")}


@pytest.fixture(autouse=True)
def frequent_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SNAPSHOT_INTERVAL", 3)


def make_policy(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    return freeze_policy(build_model(name).to(dtype), worlds.char_tokenizer(), name)


def make_precise_policy(name: str) -> Policy:
    """Return a policy in float64, or in float32 where the model has kernels for that alone."""
    try:
        policy = make_policy(name, torch.float64)
        policy.model(torch.tensor([[1, 2, 3]]))
    except (ValueError, RuntimeError):
        return make_policy(name)
    return policy


def check_greedy(policy: Policy) -> None:
    """Greedy tokens are those of `model.generate`, for prompts of different lengths and past the windows."""
    prompts = [policy.encode(problem) for problem in PROBLEMS]
    requests = [GenerationRequest(problem.id, ids, None, 12) for problem, ids in zip(PROBLEMS, prompts, strict=True)]
    outputs = generate_continuations(policy, requests, GREEDY, flop_counter=FlopCounter(), return_cache=True)
    forbidden = [[index] for index in policy.forbidden_mask.nonzero().flatten().tolist()]
    for ids, output in zip(prompts, outputs, strict=True):
        expected = policy.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            bad_words_ids=forbidden,
            pad_token_id=architectures.PAD_ID,
        )[0, len(ids) :].tolist()
        assert output.ids == expected, (output.ids, expected)
    # A branch goes on from the cache as it goes on from scratch, and what it reads again is charged.
    for problem, ids, output in zip(PROBLEMS, prompts, outputs, strict=True):
        kept = output.ids[: len(output.ids) // 2]
        begun, state = [*ids, *kept, 4], output.get_cache().cut(len(ids) + len(kept))
        counters = FlopCounter(), FlopCounter()
        branches = [
            generate_continuations(
                policy,
                [GenerationRequest(problem.id, begun, None, 6, cache)],
                GREEDY,
                flop_counter=counter,
                top_k_candidates=4,
            )[0]
            for cache, counter in zip((state, None), counters, strict=True)
        ]
        assert branches[0].ids == branches[1].ids
        tolerance = STEP_ERRORS.get(policy.name, 1e-3)
        torch.testing.assert_close(branches[0].logp, branches[1].logp, rtol=tolerance, atol=tolerance)
        num_read_again = counters[0].get_total_cost().tokens.get("policy/prefill", 0)
        assert num_read_again == state.length - state.resume_length < 3 + (not get_layout(policy.model).is_recurrent)


@contextmanager
def relaxed_embeddings(model: nn.Module, change: Tensor) -> Iterator[None]:
    """Add Σ_v change[t, v]·E_v to every look-up of token t in an embedding table of the vocabulary."""
    tables = [
        module
        for module in find_backbone(model).modules()
        if isinstance(module, nn.Embedding)
        and (module.num_embeddings == architectures.VOCAB_SIZE or module is model.get_input_embeddings())
    ]
    inside = False

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal inside
        if inside or output.shape[-2] != len(change):
            return output
        inside = True
        table = module(torch.arange(architectures.VOCAB_SIZE))
        inside = False
        return output + change.to(table) @ table

    handles = [table.register_forward_hook(add) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def differentiate(policy: Policy, sample: Sample) -> Tensor:
    """Return ∂ log π(Y)/∂Y at the response's one-hot Y by autograd through a plain forward of the whole sequence."""
    ids, begin = sample.prompt_ids + sample.response_ids, len(sample.prompt_ids)
    one_hot = torch.nn.functional.one_hot(torch.tensor(sample.response_ids), architectures.VOCAB_SIZE)
    weights = one_hot.to(policy.model.dtype).requires_grad_()
    change = torch.cat((torch.zeros(begin, architectures.VOCAB_SIZE, dtype=weights.dtype), weights - one_hot))
    with torch.enable_grad(), relaxed_embeddings(policy.model, change):
        logits = policy.model(torch.tensor([ids]), use_cache=False).logits[0, begin - 1 : -1]
        value = (logits.log_softmax(-1)[:, : architectures.VOCAB_SIZE] * weights).sum()
        return torch.autograd.grad(value, weights)[0]


def check_close(gradient: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((gradient[:, : architectures.VOCAB_SIZE] - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"relative error of the gradient {error:.1e}"


def check_likelihood(policy: Policy) -> None:
    """Gradients are autograd's; a batch scores as its rows alone; a shared prefix scores as read from scratch."""
    objective = policy_likelihood(policy)
    samples = [worlds.sample(policy, problem, text) for problem, text in zip(PROBLEMS, TEXTS, strict=True)]
    counter = FlopCounter()
    caches = objective.compute_prompt_caches(samples, counter)
    gradients = compute_token_gradient([objective], samples, [[cache] for cache in caches], None, flop_counter=counter)
    tolerance = TOLERANCES[policy.model.dtype]
    for sample, gradient in zip(samples, gradients, strict=True):
        expected = differentiate(policy, sample)
        check_close(gradient, expected, tolerance)
    # One token alone: some layers have another path for it.
    expected = differentiate(policy, samples[1])
    (gradient,) = compute_token_gradient([objective], samples[1:2], [[caches[1]]], None, flop_counter=counter)
    check_close(gradient, expected, tolerance)
    together, kept = objective.score(samples, caches, [0] * 3, counter, return_caches=True)
    alone = [objective.score([s], [c], [0], counter)[0][0] for s, c in zip(samples, caches, strict=True)]
    assert together == pytest.approx(alone, rel=tolerance)
    proposals = [
        Sample(s.problem, s.prompt_ids, [*s.response_ids[:shared], 5, 10, 6])
        for s, shared in zip(samples, (5, 1, 8), strict=True)
    ]
    reused, _ = objective.score(proposals, kept, [5, 1, 8], counter)
    afresh, _ = objective.score(proposals, caches, [0] * 3, counter)
    assert reused == pytest.approx(afresh, rel=tolerance)


def check_searches(name: str) -> None:
    """Every solver searches without an error, with a log-ratio and, where there is one, a scalar reward."""
    policy, tokenizer = make_policy(name), worlds.char_tokenizer()
    better = freeze_policy(build_model(name, seed=1), tokenizer, "better")
    rewards = [build_log_ratio_reward(policy, better, policy, "ratio")]
    scorer = None
    with suppress(Exception):  # transformers has no classification head for it
        scorer = build_model(name, kind="score", seed=2)
    if hasattr(scorer, "score"):  # encoders name their head differently
        rewards.append(build_scalar_reward(policy, scorer, tokenizer, "scorer"))
    for reward in rewards:
        for options in (
            {"gradient_at": "hard"},
            {"gradient_at": "mixture:0.5"},
            {"solver": "ste", "steps": 3},
            {"solver": "none"},
            *([{"gradient_at": "direct"}] if reward is rewards[0] else []),
        ):
            config = worlds.search_config(max_rounds=2, max_new_tokens=12, top_k_candidates=6, **options)
            traces = NablaReasoner(policy, reward, config).solve(PROBLEMS)
            assert not [trace.error for trace in traces if trace.error], options


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_layer(name: str) -> None:
    policy = make_precise_policy(name)
    check_likelihood(policy)
    check_greedy(policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUNNING))
def test_an_architecture_that_runs(name: str) -> None:
    check_likelihood(make_precise_policy(name))
    check_greedy(make_policy(name))
    check_searches(name)


@pytest.mark.parametrize("name", [*KINDS, "mamba", "bart"])
def test_the_table_is_that_of_the_code(name: str) -> None:
    assert architectures.format_row(name) in architectures.read_table()


def test_the_table_has_all_architectures() -> None:
    names = [line.split(" | ")[0].strip("| ") for line in architectures.read_table()]
    assert names == list_architectures()


@pytest.mark.slow
def test_the_whole_table_is_that_of_the_code() -> None:
    script = Path(architectures.__file__)
    command = [sys.executable, str(script), *list_architectures()]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert rows == architectures.read_table()
