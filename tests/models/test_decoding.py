"""Continuous decoding: a sequence does not depend on its slot, its neighbors or how often tokens are read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nabla_trl.models import decoding
from nabla_trl.models.decoding import SlotDecoder
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import prefill_prompts
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng

SAMPLING = Sampling(max_new_tokens=90)


def make_requests(count: int = 9, **options: Any) -> list[GenerationRequest]:
    """Prompts of different lengths and limits of different sizes."""
    limits = [1, 3, 84, 7, 2, 40, 5, 11, 30]
    return [
        GenerationRequest(
            f"q{index}", [3 + index % 5] * (1 + index % 4), make_rng(0, f"q{index}", "suffix"), limit, **options
        )
        for index, limit in enumerate(limits[:count])
    ]


def decode(policy: Policy, requests: Sequence[GenerationRequest], **options: Any) -> list[GenerationOutput]:
    prompts = [(request.cost_key, request.prefix_ids) for request in requests]
    caches = prefill_prompts(policy, prompts, FlopCounter())
    decoder = SlotDecoder(policy, SAMPLING, top_k_candidates=4, return_cache=True, **options)
    for index, (request, cache) in enumerate(zip(requests, caches, strict=True)):
        decoder.submit(index, replace(request, cache=cache))
    outputs: dict[Any, Any] = {}
    while decoder.num_unfinished:
        outputs |= dict(decoder.step())
    return [outputs[index] for index in range(len(requests))]


def assert_same(outputs: Sequence[GenerationOutput], others: Sequence[GenerationOutput]) -> None:
    for output, other in zip(outputs, others, strict=True):
        assert (output.ids, output.finished) == (other.ids, other.finished)
        assert torch.equal(output.candidates, other.candidates)
        torch.testing.assert_close(output.logp, other.logp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.get_cache().tokens, other.get_cache().tokens, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CAPACITY_STEP", 8)  # so that they grow while sequences are decoded


@pytest.fixture(scope="module")
def singles(policy: Policy) -> list[GenerationOutput]:
    return [decode(policy, [request])[0] for request in make_requests()]


@pytest.mark.parametrize("max_sequences", [1, 2, 5, 16])
@pytest.mark.parametrize("tokens_per_read", [1, 4, 7])
def test_slots_and_reads_change_nothing(
    max_sequences: int, tokens_per_read: int, policy: Policy, singles: list[GenerationOutput]
) -> None:
    outputs = decode(policy, make_requests(), max_sequences=max_sequences, tokens_per_read=tokens_per_read)
    assert_same(outputs, singles)
    lengths = {len(output.ids) for output in outputs}
    assert len(lengths) > 4 and max(lengths) > 2 * decoding.CAPACITY_STEP, "sequences of one length would show nothing"


def test_a_sequence_that_comes_later_joins_the_others(policy: Policy, singles: list[GenerationOutput]) -> None:
    requests = make_requests()
    caches = prefill_prompts(policy, [(one.cost_key, one.prefix_ids) for one in requests], FlopCounter())
    decoder = SlotDecoder(policy, SAMPLING, top_k_candidates=4, return_cache=True)
    outputs: dict[Any, Any] = {}
    for index, (request, cache) in enumerate(zip(requests, caches, strict=True)):
        decoder.submit(index, replace(request, cache=cache))
        outputs |= dict(decoder.step())
    while decoder.num_unfinished:
        outputs |= dict(decoder.step())
    assert_same([outputs[index] for index in range(len(requests))], singles)


def test_a_cancelled_sequence_leaves_the_others_alone(policy: Policy, singles: list[GenerationOutput]) -> None:
    requests = make_requests()
    caches = prefill_prompts(policy, [(one.cost_key, one.prefix_ids) for one in requests], FlopCounter())
    decoder = SlotDecoder(policy, SAMPLING, top_k_candidates=4, return_cache=True, max_sequences=6)
    for index, (request, cache) in enumerate(zip(requests, caches, strict=True)):
        decoder.submit(index, replace(request, cache=cache))
    outputs = dict(decoder.step())
    dropped = {2, 5, 8} - outputs.keys()
    decoder.cancel(dropped)
    while decoder.num_unfinished:
        outputs |= dict(decoder.step())
    left = [index for index in range(len(requests)) if index not in dropped]
    assert len(left) < len(requests) and sorted(outputs) == left
    assert_same([outputs[index] for index in left], [singles[index] for index in left])


@pytest.mark.parametrize("tokens_per_read", [1, 4])
def test_every_token_is_told_once_and_none_past_the_end(tokens_per_read: int, policy: Policy) -> None:
    told: dict[str, list[int]] = {}

    def listener(key: str) -> Any:
        told[key] = []

        def should_stop(token: int) -> bool:
            told[key].append(token)
            return len(told[key]) == 6

        return should_stop

    requests = make_requests()
    for request in requests:
        request.should_stop = listener(request.cost_key)
    outputs = decode(policy, requests, tokens_per_read=tokens_per_read)
    assert [output.ids for output in outputs] == [told[request.cost_key] for request in requests]
    assert max(len(output.ids) for output in outputs) == 6


def test_a_model_that_gives_nan_fails_its_sequences_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = policy.model.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = plain(*args, **options)
        output.logits[options["input_ids"][:, 0] == 5] = torch.nan
        return output

    requests = make_requests(4)
    requests[2].prefix_ids = [4, 5]  # its first step is fed the token that breaks
    monkeypatch.setattr(policy.model, "forward", forward)
    caches = prefill_prompts(policy, [(one.cost_key, one.prefix_ids) for one in requests], FlopCounter())
    decoder = SlotDecoder(policy, SAMPLING)
    for index, (request, cache) in enumerate(zip(requests, caches, strict=True)):
        decoder.submit(index, replace(request, cache=cache))
    first = dict(decoder.step())
    assert isinstance(first[2], ValueError) and "NaN or infinite logits" in str(first[2])
    assert not any(isinstance(output, ValueError) for index, output in first.items() if index != 2)


def test_an_accelerator_is_not_waited_for() -> None:
    """In a process of its own: a pretended device cannot be taken back."""
    script = Path(__file__).parents[1] / "accelerator_checks.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=script.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
