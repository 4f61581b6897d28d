"""generate: equal to transformers' own loop, sampling by the book, caches that can be cut, exact costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nabla_trl.models.decoding import SlotDecoder, TransformersBackend
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, prepare_prompt_caches
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.sampling import build_warpers, make_rng, sample_tokens
from nabla_trl.states.batch import pad_sequences, prefill_sequences
from nabla_trl.states.probe import get_layout

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=12)


def _prompts(policy: Policy) -> list[list[int]]:
    return [policy.encode(problem) for problem in worlds.tiny_problems()]


def _make_requests(prompts: Sequence[list[int]], limit: int = 12, seed: int = 0) -> list[GenerationRequest]:
    return [GenerationRequest(f"q{i}", ids, make_rng(seed, f"q{i}"), limit) for i, ids in enumerate(prompts)]


def _ids(outputs: Sequence[GenerationOutput]) -> list[list[int]]:
    return [output.ids for output in outputs]


def _without_stops(policy: Policy) -> Policy:
    """A policy that never stops, so that every continuation fills its limit."""
    return replace(policy, stop_ids=frozenset({policy.model.get_output_embeddings().weight.shape[0]}))


# --- equal to transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_equals_model_generate_on_a_left_padded_batch(architecture: str, tied: bool) -> None:
    policy = worlds.tiny_policy(architecture, tied=tied, seed=5)
    prompts = _prompts(policy)
    assert len({len(ids) for ids in prompts}) > 2
    ids, mask = pad_sequences(prompts, policy.device, left=True)
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=policy.tokenizer.pad_token_id,
        suppress_tokens=[policy.tokenizer.pad_token_id],  # ours never draws it either
    )
    stop = policy.tokenizer.eos_token_id
    expected = []
    for row in out[:, ids.shape[1] :].tolist():
        expected.append(row[: row.index(stop) + 1] if stop in row else row)
    outputs = generate_continuations(policy, _make_requests(prompts), GREEDY, flop_counter=FlopCounter())
    assert _ids(outputs) == expected
    assert [output.finished for output in outputs] == [stop in row for row in expected]


# --- drawing ----------------------------------------------------------------------------------------------

WARPED = {
    "plain": (Sampling(), []),
    "temperature": (Sampling(temperature=0.5), [TemperatureLogitsWarper(0.5)]),
    "top-k": (Sampling(top_k=3), [TopKLogitsWarper(3)]),
    "top-p": (Sampling(top_p=0.7), [TopPLogitsWarper(0.7)]),
    "min-p": (Sampling(min_p=0.3), [MinPLogitsWarper(0.3)]),
    "all": (
        Sampling(temperature=1.5, top_k=5, top_p=0.9, min_p=0.1),
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)],
    ),
}


@pytest.mark.parametrize("name", WARPED)
def test_draw_inverts_the_cdf_of_the_warped_softmax(name: str) -> None:
    """On an even grid of uniforms each token comes up as often as its mass says, to one grid step."""
    sampling, warpers = WARPED[name]
    logits = torch.tensor([[0.3, -torch.inf, 2.0, 1.1, -1.0, 1.7, 0.0, -torch.inf]])
    expected = (
        LogitsProcessorList(warpers)(torch.zeros(1, 0, dtype=torch.long), logits.clone()).double().softmax(-1)[0]
    )
    steps = 20_000
    uniforms = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    drawn = sample_tokens(logits.expand(steps, -1), uniforms, build_warpers(sampling), sampling)
    counts = torch.bincount(drawn, minlength=8)
    assert (counts - steps * expected).abs().max() < 1.01
    assert (counts[expected == 0] == 0).all()


def test_draw_never_takes_a_token_without_mass_at_the_edges() -> None:
    logits = torch.full((2, 9), -torch.inf)
    logits[:, 3], logits[:, 5] = 0.0, -60.0  # 5 is possible, yet too small to move a float64 sum
    edges = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    sampling = Sampling()
    assert sample_tokens(logits, edges, build_warpers(sampling), sampling).tolist() == [3, 3]
    thirds = torch.full((64, 9), -torch.inf)
    thirds[:, 1:4] = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    last = torch.full((64,), np.nextafter(1.0, 0.0), dtype=torch.float64)
    assert set(sample_tokens(thirds, last, build_warpers(sampling), sampling).tolist()) == {3}


def test_all_equal_logits_are_drawn_evenly() -> None:
    sampling = Sampling()
    uniforms = (torch.arange(70, dtype=torch.float64) + 0.5) / 70
    drawn = sample_tokens(torch.zeros(70, 7), uniforms, build_warpers(sampling), sampling)
    assert torch.bincount(drawn).tolist() == [10] * 7


def test_first_tokens_of_many_continuations_follow_the_model(policy: Policy) -> None:
    """The whole path (streams, batch, forbidden tokens): frequencies of 4000 draws against softmax."""
    prompt = _prompts(policy)[0]
    logits = policy.model(torch.tensor([prompt])).logits[0, -1].masked_fill(policy.forbidden_mask, -torch.inf)
    expected = (logits / 0.8).double().softmax(-1)
    requests = [GenerationRequest("q", prompt, make_rng(0, "q", n), 1) for n in range(4000)]
    outputs = generate_continuations(
        policy, requests, Sampling(temperature=0.8), flop_counter=FlopCounter(), batch_size=4000
    )
    counts = torch.bincount(torch.tensor([output.ids[0] for output in outputs]), minlength=len(expected))
    deviation = (counts - 4000 * expected).abs() / (4000 * expected * (1 - expected)).sqrt().clamp(min=1)
    assert deviation.max() < 4.5
    assert (counts > 0).sum() > 5  # the check above saw more than one token


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(temperature=1.3, top_k=9, top_p=0.95)])
def test_batch_equals_singles_in_any_order_and_batch_size(policy: Policy, sampling: Sampling) -> None:
    prompts = _prompts(policy) * 2

    def run(order: Sequence[int], batch_size: int) -> list[list[int]]:
        requests = _make_requests(prompts)
        outputs = generate_continuations(
            policy, [requests[i] for i in order], sampling, flop_counter=FlopCounter(), batch_size=batch_size
        )
        return [output.ids for _, output in sorted(zip(order, outputs, strict=True), key=lambda pair: pair[0])]

    singles = run(range(8), 1)
    shuffled = random.Random(0).sample(range(8), 8)
    assert len({tuple(ids) for ids in singles}) > 2
    for order, size in ((range(8), 8), (shuffled, 8), (shuffled, 3)):
        assert run(order, size) == singles


@pytest.mark.parametrize("batch_size", [64, 4, 3])
@pytest.mark.parametrize("order", ["grouped", "interleaved"])
def test_continuations_of_one_prompt_share_its_prefill(policy: Policy, order: str, batch_size: int) -> None:
    prompts, counter = _prompts(policy)[:2], FlopCounter()
    requests = [
        GenerationRequest(f"q{i}", ids, make_rng(0, f"q{i}", n), 6) for i, ids in enumerate(prompts) for n in range(5)
    ]
    requests = (
        requests
        if order == "grouped"
        else requests[::5] + [request for n in range(1, 5) for request in requests[n::5]]
    )
    outputs = generate_continuations(policy, requests, Sampling(), flop_counter=counter, batch_size=batch_size)
    for index, prompt in enumerate(prompts):
        tokens = counter.get_cost(f"q{index}").tokens
        drawn = sum(
            len(d.ids) for request, d in zip(requests, outputs, strict=True) if request.cost_key == f"q{index}"
        )
        assert tokens == {"policy/prefill": len(prompt) - 1, "policy/decode": drawn}


def test_a_prompt_under_two_keys_is_charged_to_each(policy: Policy) -> None:
    """No problem's cost may depend on which others are in its batch."""
    prompt, counter = _prompts(policy)[0], FlopCounter()
    generate_continuations(
        policy, [GenerationRequest(key, prompt, None, 2) for key in "ab"], GREEDY, flop_counter=counter
    )
    assert counter.get_cost("a").flops == counter.get_cost("b").flops > 0
    assert counter.get_cost("a").tokens == counter.get_cost("b").tokens


def test_every_forward_token_is_charged(policy: Policy) -> None:
    prompt, counter = _prompts(policy)[3], FlopCounter()
    policy = _without_stops(policy)
    [output] = generate_continuations(policy, [GenerationRequest("q", prompt, None, 5)], GREEDY, flop_counter=counter)
    assert len(output.ids) == 5
    prefill = policy.size.compute_forward_flops(0, len(prompt) - 1, num_head_positions=0)
    decode = policy.size.compute_forward_flops(len(prompt) - 1, 5)
    assert counter.get_cost("q").flops == prefill + decode
    assert counter.get_cost("q").seconds > 0


# --- caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_kept_caches_equal_a_fresh_prefill(architecture: str) -> None:
    policy = worlds.tiny_policy(architecture)
    prompts = _prompts(policy)
    requests = [
        replace(request, max_new_tokens=limit)
        for request, limit in zip(_make_requests(prompts), (12, 1, 5, 9), strict=True)
    ]
    outputs = generate_continuations(policy, requests, SAMPLED, flop_counter=FlopCounter(), return_cache=True)
    assert len({len(output.ids) for output in outputs}) > 1  # rows end at different steps
    for prompt, output in zip(prompts, outputs, strict=True):
        [fresh] = prefill_sequences(policy.model, get_layout(policy.model), [prompt + output.ids[:-1]])
        torch.testing.assert_close(output.get_cache().tokens, fresh.tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_continuing_from_a_cropped_cache_equals_continuing_from_scratch(architecture: str) -> None:
    policy = _without_stops(worlds.tiny_policy(architecture))
    prompts = _prompts(policy)
    firsts = generate_continuations(
        policy, _make_requests(prompts), SAMPLED, flop_counter=FlopCounter(), return_cache=True
    )

    def branches(cached: bool) -> list[GenerationRequest]:
        requests = []
        for number, (prompt, first) in enumerate(zip(prompts, firsts, strict=True)):
            for cut in (0, 3, 11):
                cache = first.get_cache().cut(len(prompt) + cut) if cached else None
                prefix = [*prompt, *first.ids[:cut], (first.ids[cut] + 1) % len(worlds.CHARS)]
                requests.append(
                    GenerationRequest(f"q{number}", prefix, make_rng(7, f"q{number}", cut), 12 - cut, cache)
                )
        return requests

    counter = FlopCounter()
    from_cache = generate_continuations(policy, branches(True), SAMPLED, flop_counter=counter, top_k_candidates=4)
    scratch = generate_continuations(policy, branches(False), SAMPLED, flop_counter=FlopCounter(), top_k_candidates=4)
    assert _ids(from_cache) == _ids(scratch)
    assert "policy/prefill" not in counter.get_total_cost().tokens
    for one, two in zip(from_cache, scratch, strict=True):
        torch.testing.assert_close(one.logp, two.logp, rtol=1e-4, atol=1e-4)


def test_generating_does_not_change_the_caches_it_starts_from(policy: Policy) -> None:
    prompt = _prompts(policy)[0]
    [cache] = prepare_prompt_caches(policy, [("q", prompt)], FlopCounter())
    before = [tensor.clone() for tensor in cache.tokens]
    generate_continuations(
        policy,
        [GenerationRequest("q", prompt, None, 4, cache)] * 2,
        GREEDY,
        flop_counter=FlopCounter(),
        return_cache=True,
    )
    assert all(map(torch.equal, cache.tokens, before))


def test_a_backend_gets_every_request_with_its_cache(policy: Policy) -> None:
    """Any object with the methods of `GenerationBackend` will do."""
    seen: list[GenerationRequest] = []

    class RecordingSession(SlotDecoder):
        def submit(self, tag: Any, request: GenerationRequest) -> None:
            seen.append(request)
            super().submit(tag, request)

    class Recorder(TransformersBackend):
        def open_session(self, policy: Policy, sampling: Sampling, **options: Any) -> SlotDecoder:
            return RecordingSession(policy, sampling, **options)

    recorded = replace(policy, backend=Recorder())
    outputs = generate_continuations(
        recorded, _make_requests(_prompts(policy)), SAMPLED, flop_counter=FlopCounter(), batch_size=3
    )
    assert _ids(outputs) == _ids(
        generate_continuations(policy, _make_requests(_prompts(policy)), SAMPLED, flop_counter=FlopCounter())
    )
    assert [request.get_cache().length for request in seen] == [len(ids) - 1 for ids in _prompts(policy)]


# --- candidates -------------------------------------------------------------------------------------------


def test_candidates_are_the_likeliest_tokens_with_unwarped_log_probabilities(policy: Policy) -> None:
    """Drawn hot, so that the drawn token is often not among the likeliest, and recorded at temperature 1."""
    prompts = _prompts(policy)
    hot = Sampling(temperature=20.0, max_new_tokens=12)
    outputs = generate_continuations(
        policy, _make_requests(prompts), hot, flop_counter=FlopCounter(), top_k_candidates=3
    )
    strangers = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        length = len(output.ids)
        assert output.candidates.shape == output.logp.shape == (length, 3)
        logits = policy.model(torch.tensor([prompt + output.ids])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)  # over all rows: a padded row takes its share
        torch.testing.assert_close(output.logp, logp.gather(1, output.candidates), rtol=1e-4, atol=1e-4)
        best = logp.masked_fill(policy.forbidden_mask, -torch.inf).topk(3).indices
        for row, drawn in enumerate(output.ids):
            known = best[row].tolist()
            strangers += drawn not in known
            expected = known if drawn in known else [*known[:-1], drawn]
            assert output.candidates[row].tolist() == expected
    assert strangers > 3


def test_more_candidates_than_tokens_gives_all_of_them_and_marks_the_forbidden(policy: Policy) -> None:
    [output] = generate_continuations(
        policy, _make_requests(_prompts(policy))[:1], GREEDY, flop_counter=FlopCounter(), top_k_candidates=999
    )
    rows = len(policy.forbidden_mask)
    assert (output.candidates.sort(-1).values == torch.arange(rows)).all()
    assert torch.equal(output.logp.isinf(), policy.forbidden_mask[output.candidates])


# --- ends -------------------------------------------------------------------------------------------------


def test_any_of_several_stop_tokens_ends_a_row(policy: Policy) -> None:
    endless = _without_stops(policy)
    prompts = _prompts(policy)
    long = generate_continuations(endless, _make_requests(prompts), SAMPLED, flop_counter=FlopCounter())
    stops = frozenset({long[0].ids[2], long[1].ids[5]})
    outputs = generate_continuations(
        replace(policy, stop_ids=stops), _make_requests(prompts), SAMPLED, flop_counter=FlopCounter()
    )
    for whole, output in zip(long, outputs, strict=True):
        ends = [index for index, token in enumerate(whole.ids) if token in stops]
        assert output.ids == (whole.ids[: ends[0] + 1] if ends else whole.ids)
        assert output.finished == bool(ends)
    assert len({len(output.ids) for output in outputs}) > 1


def test_each_row_has_a_limit_of_its_own(policy: Policy) -> None:
    endless = _without_stops(policy)
    prompts = _prompts(policy)
    long = _ids(generate_continuations(endless, _make_requests(prompts), SAMPLED, flop_counter=FlopCounter()))
    requests = [
        replace(request, max_new_tokens=limit)
        for request, limit in zip(_make_requests(prompts), (1, 12, 4, 7), strict=True)
    ]
    outputs = generate_continuations(endless, requests, SAMPLED, flop_counter=FlopCounter(), return_cache=True)
    assert _ids(outputs) == [ids[:limit] for ids, limit in zip(long, (1, 12, 4, 7), strict=True)]
    assert not any(output.finished for output in outputs)
    assert [output.get_cache().length for output in outputs] == [
        len(prompt) + limit - 1 for prompt, limit in zip(prompts, (1, 12, 4, 7), strict=True)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_of_one_token(architecture: str) -> None:
    policy = worlds.tiny_policy(architecture)
    prompts = [[3], _prompts(policy)[0], [7]]
    counter = FlopCounter()
    together = generate_continuations(policy, _make_requests(prompts), SAMPLED, flop_counter=counter)
    alone = [
        generate_continuations(policy, [request], SAMPLED, flop_counter=FlopCounter())[0]
        for request in _make_requests(prompts)
    ]
    assert _ids(together) == _ids(alone)
    assert counter.get_cost("q0").tokens["policy/prefill"] == 0


def test_padding_is_not_drawn_unless_it_is_the_stop_token() -> None:
    """Logits that want nothing but the padding token and a row without a token string."""
    separate = worlds.tiny_policy(vocab=40)
    pad = separate.tokenizer.pad_token_id
    same = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(pad=worlds.END), vocab=40)
    assert same.tokenizer.pad_token_id in same.stop_ids
    for policy, wanted in ((separate, pad), (same, same.tokenizer.pad_token_id)):

        def biased(logits: Tensor, wanted: int = wanted) -> Tensor:
            logits[..., 35] += 200
            logits[..., wanted] += 100
            return logits

        with _head(policy, biased):
            outputs = generate_continuations(
                policy, _make_requests(_prompts(policy)), SAMPLED, flop_counter=FlopCounter()
            )
        drawn = {token for output in outputs for token in output.ids}
        assert max(drawn) < len(worlds.TOKENS)
        assert (wanted in drawn) == (wanted in policy.stop_ids)
        assert policy is separate or _ids(outputs) == [[wanted]] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_logits_are_refused(bad: float) -> None:
    policy = worlds.tiny_policy(name="broken")

    def spoil(logits: Tensor) -> Tensor:
        logits[-1, :, 4] = bad
        return logits

    with _head(policy, spoil), pytest.raises(ValueError, match="broken gave NaN or infinite logits"):
        generate_continuations(policy, _make_requests(_prompts(policy)), SAMPLED, flop_counter=FlopCounter())


def test_impossible_tokens_are_no_error(policy: Policy) -> None:
    def forbid(logits: Tensor) -> Tensor:
        logits[..., 4:] = -torch.inf
        return logits

    with _head(policy, forbid):
        outputs = generate_continuations(policy, _make_requests(_prompts(policy)), SAMPLED, flop_counter=FlopCounter())
    assert {token for output in outputs for token in output.ids} == {0, 1, 2, 3}


def test_sampling_without_a_stream_is_refused_and_greedy_needs_none(policy: Policy) -> None:
    request = GenerationRequest("q", [1, 2], None, 3)
    generate_continuations(policy, [request], GREEDY, flop_counter=FlopCounter())
    with pytest.raises(ValueError, match="random stream"):
        generate_continuations(policy, [request], SAMPLED, flop_counter=FlopCounter())


class _head:
    """Rewrite a policy's logits inside a `with` block."""

    def __init__(self, policy: Policy, change: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.change = policy.model.get_output_embeddings(), change

    def __enter__(self) -> None:
        self.hook = self.layer.register_forward_hook(lambda module, args, logits: self.change(logits))

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()


# --- randomness -------------------------------------------------------------------------------------------


def test_random_streams_are_stable() -> None:
    """Golden numbers: traces made on any machine and version repeat."""
    expected = [0.7777115781210772, 0.3243153779398592, 0.6041725795951802]
    assert make_rng(0, "chains/test/1", "suffix", 0).random(3).tolist() == expected


def test_random_streams_depend_on_every_argument_and_nothing_else() -> None:
    arguments = [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", "0"),
        (0, "a", "x", 1),
        (0, "a", 1, "x"),
    ]
    firsts = [make_rng(*args).random() for args in arguments]
    assert len(set(firsts)) == len(arguments)
    np.random.seed(3)
    assert [make_rng(*args).random() for args in reversed(arguments)] == firsts[::-1]


def test_a_continuation_ends_where_its_job_says_and_costs_what_was_drawn(policy: Policy) -> None:
    """It is the beginning of what is drawn otherwise, whatever stands beside it in the batch; its cache goes on."""
    never = _without_stops(policy)
    prompts = _prompts(policy)
    whole = generate_continuations(never, _make_requests(prompts), SAMPLED, flop_counter=FlopCounter())
    told: list[list[int]] = [[] for _ in prompts]

    def third(row: int) -> Callable[[int], bool]:
        def ends(token: int) -> bool:
            told[row].append(token)
            return len(told[row]) == 3 + row

        return ends

    counter = FlopCounter()
    requests = [
        replace(request, should_stop=third(row) if row else None)
        for row, request in enumerate(_make_requests(prompts))
    ]
    cut = generate_continuations(never, requests, SAMPLED, flop_counter=counter, return_cache=True)
    assert cut[0].ids == whole[0].ids and not told[0]
    for row in (1, 2, 3):
        assert cut[row].ids == told[row] == whole[row].ids[: 3 + row]
        assert not cut[row].finished and cut[row].logp.shape == (3 + row, 1)
        assert counter.get_cost(f"q{row}").tokens["policy/decode"] == 3 + row
        prefix = prompts[row] + cut[row].ids
        rest = GenerationRequest(f"q{row}", prefix, None, 4, cut[row].get_cache())
        fresh = replace(rest, cache=None)
        assert _ids(generate_continuations(never, [rest], GREEDY, flop_counter=FlopCounter())) == _ids(
            generate_continuations(never, [fresh], GREEDY, flop_counter=FlopCounter())
        )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"min_p": -0.1},
    ],
)
def test_sampling_refuses_values_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        Sampling(**options)
    assert "\n" not in str(error.value)
