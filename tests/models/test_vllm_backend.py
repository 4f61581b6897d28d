"""Drawing from a vLLM server: what transformers would draw, checked at both ends, and nothing lost on the way."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import worlds
from vllm_server import FakeVllm, serving

from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.cli.main import main
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, prepare_prompt_caches
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import TokenStatistic, make_rng
from nabla_trl.models.vllm_backend import HttpClient, VllmBackend, VllmSession, connect_vllm
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.batches import TraceTotals, find_unfinished_problems, search_to_folder
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.reasoner import NablaReasoner
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces

GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling()
ROWS = len(worlds.TOKENS)


@pytest.fixture
def fake(policy: Policy) -> Iterator[FakeVllm]:
    """A server of the policy that gives as many log-probabilities as there are tokens."""
    with serving(FakeVllm(policy.model, policy.tokenizer, policy.name, max_logprobs=ROWS)) as server:
        yield server


@pytest.fixture
def served(policy: Policy, fake: FakeVllm) -> Policy:
    return _served(policy, fake)


def _served(policy: Policy, fake: FakeVllm, **options: Any) -> Policy:
    """The policy, drawing from the server; the requests of the probe are forgotten."""
    served = connect_vllm(policy, fake.url, **{"retries": 3, "backoff": 0.0, **options})
    fake.requests.clear()
    return served


def _hasty(served: Policy, timeout: float, retries: int) -> Policy:
    """The same policy and server, with less patience."""
    assert served.backend is not None
    client = HttpClient(served.backend.clients[0].url, timeout=timeout, retries=retries, backoff=0.0)
    return replace(served, backend=replace(served.backend, clients=(client,)))


def _make_requests(
    policy: Policy, problems: Sequence[Problem], limit: int = 8, draws: int = 1
) -> list[GenerationRequest]:
    return [
        GenerationRequest(p.id, policy.encode(p), make_rng(0, p.id, draw), limit)
        for p in problems
        for draw in range(draws)
    ]


def _config(**options: Any) -> SearchConfig:
    return SearchConfig(**{"max_new_tokens": 8, "max_rounds": 3, "top_k_candidates": ROWS, **options})


def _same(ones: Sequence[Trace], others: Sequence[Trace]) -> None:
    """The same search: every proposal of it, and what it scored."""
    for one, other in zip(ones, others, strict=True):
        for name in ("problem_id", "response_ids", "initial_ids", "stop_reason", "finished", "error"):
            assert getattr(one, name) == getattr(other, name), name
        for a, b in zip(one.revisions, other.revisions, strict=True):
            assert (a.position, a.new_token, a.suffix, a.accepted) == (b.position, b.new_token, b.suffix, b.accepted)
            assert a.reward_after == pytest.approx(b.reward_after, rel=1e-4, abs=1e-4)


# --- outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_greedy_drafts_are_those_of_transformers(architecture: str, problems: list[Problem]) -> None:
    """Ids, stops and the whole table of log-probabilities, with rows of the head that no token has."""
    policy = worlds.tiny_policy(architecture, vocab=40, seed=3)
    requests = _make_requests(policy, problems, limit=12)
    with serving(FakeVllm(policy.model, policy.tokenizer, policy.name, max_logprobs=40)) as fake:
        outputs = generate_continuations(
            _served(policy, fake), requests, GREEDY, flop_counter=FlopCounter(), top_k_candidates=40, return_cache=True
        )
    expected = generate_continuations(policy, requests, GREEDY, flop_counter=FlopCounter(), top_k_candidates=40)
    assert any(output.finished for output in expected)
    for one, other in zip(outputs, expected, strict=True):
        assert (one.ids, one.finished) == (other.ids, other.finished)
        assert one.candidates.shape == other.candidates.shape
        assert (one.candidates.dtype, one.logp.dtype) == (other.candidates.dtype, other.logp.dtype)
        assert (one.logp[:, 1:] <= one.logp[:, :-1]).all()
        by_token = [output.logp.gather(1, output.candidates.argsort(dim=-1)) for output in (one, other)]
        torch.testing.assert_close(*by_token, rtol=0, atol=1e-4)
        assert one.get_cache().length == 0


def test_the_drawn_token_is_a_candidate_and_log_probabilities_are_unwarped(
    policy: Policy, served: Policy, problems: list[Problem]
) -> None:
    """Drawn hot, so that the drawn token is often not among the three likeliest."""
    strangers = 0
    for request, output in zip(
        _make_requests(policy, problems),
        generate_continuations(
            served,
            _make_requests(policy, problems),
            Sampling(temperature=2.0),
            flop_counter=FlopCounter(),
            top_k_candidates=3,
        ),
        strict=True,
    ):
        assert output.candidates.shape == output.logp.shape == (len(output.ids), 3)
        logits = policy.model(torch.tensor([request.prefix_ids + output.ids])).logits[
            0, len(request.prefix_ids) - 1 : -1
        ]
        logp = logits.log_softmax(-1).masked_fill(policy.forbidden_mask, -torch.inf)
        torch.testing.assert_close(output.logp, logp.gather(1, output.candidates), rtol=1e-4, atol=1e-4)
        for row, drawn in enumerate(output.ids):
            assert drawn in output.candidates[row]
            strangers += drawn not in logits[row].topk(3).indices
    assert strangers > 3


def test_a_server_draws_no_steps(served: Policy, problems: list[Problem]) -> None:
    requests = [replace(request, should_stop=lambda token: True) for request in _make_requests(served, problems)]
    worlds.refused(
        lambda: generate_continuations(served, requests, GREEDY, flop_counter=FlopCounter()),
        "after a step",
        "vllm_url",
    )


def test_what_may_be_proposed_does_not_depend_on_the_drawn_token(policy: Policy, fake: FakeVllm) -> None:
    """… where forbidden tokens are among the server's likeliest, too: only the last place may be the drawn token's."""
    problem = Problem(id="p", question="1+2")
    likely = policy.model(torch.tensor([policy.encode(problem)])).logits[0, -1].topk(5).indices
    forbidden = policy.forbidden_mask.clone()
    forbidden[likely[[0, 2]]] = True
    served = _served(replace(policy, forbidden_mask=forbidden), fake)
    requests = _make_requests(served, [problem], limit=1, draws=30)
    outputs = generate_continuations(
        served, requests, Sampling(temperature=2.0), flop_counter=FlopCounter(), top_k_candidates=5
    )
    drawn = {output.ids[0] for output in outputs}
    assert drawn & set(likely.tolist()) and drawn - set(likely.tolist())
    allowed = [token for token in likely.tolist() if not forbidden[token]]
    for output in outputs:
        ids, logp = output.candidates[0], output.logp[0]
        assert ids[:-1][logp[:-1].isfinite()].tolist() == allowed
        assert (ids == output.ids[0]).sum() == 1 and logp[ids == output.ids[0]].isfinite().all()
        assert not logp[forbidden[ids]].isfinite().any()


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(temperature=1.3, top_k=9, top_p=0.95, min_p=0.01)])
def test_a_draw_does_not_depend_on_batch_order_or_concurrency(
    policy: Policy, served: Policy, problems: list[Problem], sampling: Sampling
) -> None:
    def ids(policy: Policy, order: int = 1, **options: Any) -> list[list[int]]:
        outputs = generate_continuations(
            policy, _make_requests(policy, problems, draws=3)[::order], sampling, flop_counter=FlopCounter(), **options
        )
        return [output.ids for output in outputs][::order]

    together = ids(served)
    single = replace(served, backend=replace(served.backend, max_concurrent_requests=1))
    assert len({tuple(row) for row in together}) > 6
    assert ids(single, order=-1) == ids(served, batch_size=5) == together


def test_stop_tokens_and_limits_are_ours(policy: Policy, served: Policy, problems: list[Problem]) -> None:
    endless = replace(served, stop_ids=frozenset({ROWS}))  # a token that no row of the head has
    long = generate_continuations(
        endless, _make_requests(policy, problems, limit=12), SAMPLED, flop_counter=FlopCounter()
    )
    assert [len(output.ids) for output in long] == [12] * 4 and not any(output.finished for output in long)
    stops = frozenset({long[0].ids[2], long[1].ids[5]})
    requests = [
        replace(request, max_new_tokens=n)
        for request, n in zip(_make_requests(policy, problems), (12, 12, 1, 4), strict=True)
    ]
    outputs = generate_continuations(replace(served, stop_ids=stops), requests, SAMPLED, flop_counter=FlopCounter())
    assert outputs[0].finished and len(outputs[0].ids) <= 3 and len(outputs[2].ids) == 1
    for whole, output in zip(long, outputs, strict=True):
        assert output.ids == whole.ids[: len(output.ids)]
        assert output.finished == (output.ids[-1] in stops) and not stops & {*output.ids[:-1]}


def test_nothing_is_left_to_the_servers_defaults(policy: Policy, served: Policy, fake: FakeVllm) -> None:
    """A generation config may bring its own repetition penalty, filters and stop tokens."""
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01)
    [request] = _make_requests(policy, worlds.tiny_problems(["1+2"]), limit=3)
    generate_continuations(served, [request], sampling, flop_counter=FlopCounter(), top_k_candidates=4)
    [body] = fake.requests
    assert 0 <= body.pop("seed") < 2**63
    assert body == {
        "model": "policy",
        "prompt": request.prefix_ids,
        "max_tokens": 3,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [policy.tokenizer.eos_token_id],
        "logit_bias": {str(policy.tokenizer.pad_token_id): -100.0},
        "logprobs": 4,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def test_costs_are_charged_as_for_a_policy_that_draws_here(
    policy: Policy, served: Policy, problems: list[Problem]
) -> None:
    costs = []
    for one in (policy, served):
        counter = FlopCounter()
        prompts = [(problem.id, policy.encode(problem)) for problem in problems]
        caches = prepare_prompt_caches(one, prompts, counter)
        requests = [
            replace(request, cache=cache)
            for request, cache in zip(_make_requests(policy, problems), caches, strict=True)
        ]
        generate_continuations(one, [*requests, *_make_requests(policy, problems)], GREEDY, flop_counter=counter)
        costs.append(counter.get_total_cost())
        assert costs[-1].seconds > 0
    assert costs[0].tokens == costs[1].tokens and costs[0].flops == costs[1].flops


def test_a_server_knows_the_confidence_of_a_token_and_nothing_of_the_whole_distribution(
    policy: Policy, served: Policy, problems: list[Problem]
) -> None:
    ours, theirs = (
        generate_continuations(
            one, _make_requests(one, problems), GREEDY, flop_counter=FlopCounter(), statistics_top_k=5
        )
        for one in (policy, served)
    )
    for here, there in zip(ours, theirs, strict=True):
        assert here.statistics is not None and there.statistics is not None
        assert there.statistics[:, TokenStatistic.TOP_LOGP] == pytest.approx(
            here.statistics[:, TokenStatistic.TOP_LOGP], abs=1e-4
        )
        assert there.statistics[:, 1:].isnan().all() and there.candidates.shape[1] == 1


def test_sampling_without_a_stream_is_refused(policy: Policy, served: Policy) -> None:
    worlds.refused(
        lambda: generate_continuations(
            served, [GenerationRequest("q", [1, 2], None, 3)], SAMPLED, flop_counter=FlopCounter()
        ),
        "random stream",
    )


# --- whole methods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", ["global", "sequential"])
@pytest.mark.parametrize("solver", ["none", "mirror", "ste"])
def test_a_greedy_search_is_that_of_transformers(
    solver: str, proposals: str, policy: Policy, served: Policy, logratio_reward: Reward, problems: list[Problem]
) -> None:
    """Every proposal, gradient and score: the search needs nothing of the policy but outputs."""
    large_steps = {"steps": 4, "learning_rate": 1.5, "final_learning_rate": 1.0} if solver == "ste" else {}
    config = _config(solver={"name": solver, **large_steps}, proposals=proposals, temperature=0.0)
    here, there = (run_search(problems, policy=one, reward=logratio_reward, config=config) for one in (policy, served))
    _same(there, here)
    assert sum(revision.accepted for trace in here for revision in trace.revisions) > 0
    assert all(trace.meta["version/vllm"] == "0.32.0" for trace in there)
    for one, other in zip(there, here, strict=True):
        tokens = other.cost.tokens | {"policy/prefill": one.cost.tokens["policy/prefill"]}
        assert one.cost.tokens == tokens
        more = tokens["policy/prefill"] - other.cost.tokens["policy/prefill"]
        assert (more > 0) == (solver == "ste")  # its gradient needs the prompt in the policy here


@pytest.mark.parametrize("solver", ["none", "mirror", "ste"])
def test_a_sampled_search_goes_up(
    solver: str, policy: Policy, served: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    config = _config(solver=solver, top_k_candidates=8)
    traces = run_search(problems, policy=served, reward=scalar_reward, config=config)
    assert [trace.error for trace in traces] == [None] * 4
    assert all(trace.reward >= trace.reward_initial for trace in traces)
    assert any(revision.accepted for trace in traces for revision in trace.revisions)
    [alone] = run_search(problems[2:3], policy=served, reward=scalar_reward, config=config)
    _same([alone], traces[2:3])


def test_a_pool_holds_distinct_scored_draws(
    policy: Policy, served: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    sampling = Sampling(max_new_tokens=8)
    pool = draw_pool(problems, 4, policy=served, reward=scalar_reward, sampling=sampling, batch_size=8)
    for entry in pool.entries:
        assert len({tuple(draw.response_ids) for draw in entry.responses}) > 1
        assert all(-100 < draw.reward < 100 and draw.generation_cost.flops > 0 for draw in entry.responses)
    traces = run_search(problems, policy=served, reward=scalar_reward, config=_config(max_rounds=1))
    assert [trace.initial_ids for trace in traces] == [entry.responses[0].response_ids for entry in pool.entries]


def test_a_prompt_that_the_server_has_no_room_for_fails_alone(
    policy: Policy, fake: FakeVllm, scalar_reward: Reward
) -> None:
    fake.context = 48
    served = _served(policy, fake)
    assert (policy.context_length, served.context_length) == (128, 48)
    long, short = worlds.tiny_problems(["1+" * 30 + "1", "1+2"])
    traces = run_search([long, short], policy=served, reward=scalar_reward, config=_config(max_new_tokens=64))
    assert "the context of policy 48" in traces[0].error and traces[1].error is None
    assert len(traces[1].prompt_ids) + len(traces[1].response_ids) <= 48


# --- retries ----------------------------------------------------------------------------------------------


def _fail_first(times: int, answer: Any) -> Callable[[int, dict[str, Any]], Any]:
    return lambda number, body: answer if number <= times else None


@pytest.mark.parametrize("answer", [(500, {}), (502, b"<html>"), (503, {}), (429, {}), "hang up"])
def test_what_may_pass_is_tried_again(
    answer: Any, policy: Policy, served: Policy, fake: FakeVllm, problems: list[Problem]
) -> None:
    undisturbed = generate_continuations(served, _make_requests(policy, problems), SAMPLED, flop_counter=FlopCounter())
    fake.requests.clear()
    fake.before = _fail_first(3, answer)
    outputs = generate_continuations(served, _make_requests(policy, problems), SAMPLED, flop_counter=FlopCounter())
    assert [output.ids for output in outputs] == [output.ids for output in undisturbed]
    assert len(fake.requests) == 4 + 3


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(served: Policy, fake: FakeVllm) -> None:
    [expected] = _draw(served)
    ready, over = (200, {"choices": [fake.complete(fake.requests.pop())]}), Event()
    fake.before = lambda number, body: "hang up" if number == 1 and over.wait(10) else ready
    [output] = _draw(_hasty(served, 0.3, retries=1))
    over.set()
    assert output.ids == expected.ids and fake.requests[0] == fake.requests[1]


def test_pauses_double_and_stop_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Told(Event):  # told to stop in the third pause
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return len(pauses) == 3

    client = HttpClient(_closed_port(), retries=9, backoff=8.0)
    with pytest.raises(ConnectionError, match="tried 3 times"):
        client.request_json("/v1/models", stop_event=Told())
    assert len(pauses) == 3
    for pause, base in zip(pauses, (8, 16, 32), strict=True):
        assert min(0.5 * base, 30) <= pause <= min(1.5 * base, 30)


class StubClient:
    """Answers as `answer` says; equal to itself alone."""

    def __init__(self, name: str, answer: Callable[[dict[str, Any], Event], Any]):
        self.url, self.answer, self.num_calls = name, answer, 0

    def request_json(self, path: str, body: dict[str, Any], stop_event: Event) -> Any:
        self.num_calls += 1
        return self.answer(body, stop_event)


def open_session(policy: Policy, *clients: Any, **options: Any) -> VllmSession:
    backend = VllmBackend(clients, policy.name, 64, "0", **options)
    return backend.open_session(policy, SAMPLED)


def test_the_first_error_stops_what_has_not_begun(policy: Policy, problems: list[Problem]) -> None:
    def refuse(body: dict[str, Any], stop_event: Event) -> Any:
        time.sleep(0.02)
        raise ValueError("no such model")

    client = StubClient("only", refuse)
    served = replace(policy, backend=VllmBackend((client,), policy.name, 64, "0", max_concurrent_requests=1))
    with pytest.raises(ValueError, match="no such model"):
        generate_continuations(served, _make_requests(policy, problems, draws=9), SAMPLED, flop_counter=FlopCounter())
    time.sleep(0.1)
    assert client.num_calls < 12, "most of the requests had not begun"


def test_an_error_does_not_wait_for_requests_under_way(policy: Policy, problems: list[Problem]) -> None:
    hanging = Event()

    def answer(body: dict[str, Any], stop_event: Event) -> Any:
        if client.num_calls > 1:
            raise ConnectionError("gone")
        return hanging.wait(60)

    client = StubClient("only", answer)
    session = open_session(policy, client)
    first, second = _make_requests(policy, problems)[:2]
    session.submit("hangs", first)
    while not client.num_calls:
        time.sleep(0.001)
    session.submit("fails", second)
    ended = session.step()
    assert [tag for tag, _ in ended] == ["fails"] and isinstance(ended[0][1], ConnectionError)
    session.cancel(["hangs"])
    assert session.num_unfinished == 0
    hanging.set()


def test_requests_of_a_dead_server_go_to_the_others(policy: Policy, served: Policy, problems: list[Problem]) -> None:
    def die(body: dict[str, Any], stop_event: Event) -> Any:
        raise ConnectionError("dead")

    [alive] = served.backend.clients
    dead = StubClient("dead", die)
    requests = _make_requests(policy, problems, draws=3)
    both = replace(served, backend=replace(served.backend, clients=(dead, alive)))
    outputs = generate_continuations(both, requests, SAMPLED, flop_counter=FlopCounter())
    again = _make_requests(policy, problems, draws=3)
    expected = generate_continuations(served, again, SAMPLED, flop_counter=FlopCounter())
    assert [output.ids for output in outputs] == [output.ids for output in expected]
    assert 1 <= dead.num_calls < len(requests)
    nobody = replace(served, backend=replace(served.backend, clients=(dead,)))
    with pytest.raises(ConnectionError, match="dead"):
        generate_continuations(nobody, _make_requests(policy, problems), SAMPLED, flop_counter=FlopCounter())


def test_servers_share_the_requests(policy: Policy, served: Policy, problems: list[Problem]) -> None:
    [alive] = served.backend.clients
    calls = {"a": 0, "b": 0}

    def count_as(name: str) -> Callable[[dict[str, Any], Event], Any]:
        def answer(body: dict[str, Any], stop_event: Event) -> Any:
            calls[name] += 1
            time.sleep(0.01)
            return alive.request_json("/v1/completions", body, stop_event)

        return answer

    clients = tuple(StubClient(name, count_as(name)) for name in calls)
    shared = replace(served, backend=replace(served.backend, clients=clients))
    generate_continuations(shared, _make_requests(policy, problems, draws=4), SAMPLED, flop_counter=FlopCounter())
    assert sum(calls.values()) == 16 and min(calls.values()) >= 5


# --- refusals ---------------------------------------------------------------------------------------------


def _closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def _fails(action: Callable[[], Any], *words: str) -> None:
    """The one-line ConnectionError of `action`, which names all `words`."""
    with pytest.raises(ConnectionError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


def _draw(served: Policy, **options: Any) -> Any:
    return generate_continuations(
        served, _make_requests(served, worlds.tiny_problems(["1+2"])), SAMPLED, flop_counter=FlopCounter(), **options
    )


def test_a_server_that_fails_for_ever(served: Policy, fake: FakeVllm) -> None:
    fake.before = lambda number, body: (500, {"error": {"message": "EngineCore\nencountered an issue"}})
    _fails(lambda: _draw(served), fake.url, "status 500 (EngineCore encountered an issue)", "tried 4 times")
    assert len(fake.requests) == 4


def test_a_server_that_never_answers(served: Policy, fake: FakeVllm) -> None:
    over = Event()
    fake.before = lambda number, body: "hang up" if over.wait(10) else None
    hasty = _hasty(served, 0.05, retries=1)
    _fails(lambda: _draw(hasty), f"{fake.url}/v1/completions", "no answer within 0.05 s", "tried 2 times")
    over.set()


def test_a_server_that_is_not_there(policy: Policy) -> None:
    url = _closed_port()
    _fails(lambda: connect_vllm(policy, url, retries=0), url, "refused", "tried 1 time")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://[::1", ""])
def test_what_is_no_url(policy: Policy, url: str) -> None:
    worlds.refused(lambda: connect_vllm(policy, url), repr(url), "URL")


def test_a_request_that_is_refused_is_not_sent_again(policy: Policy, served: Policy, fake: FakeVllm) -> None:
    requests = _make_requests(policy, worlds.tiny_problems(["1+2"]))
    worlds.refused(
        lambda: generate_continuations(served, requests, Sampling(temperature=2.5), flop_counter=FlopCounter()),
        "status 400",
        "in [0, 2], got 2.5",
    )
    assert len(fake.requests) == 1


def test_fewer_log_probabilities_than_candidates(served: Policy, fake: FakeVllm) -> None:
    fake.max_logprobs = 20
    worlds.refused(lambda: _draw(served, top_k_candidates=21), "max allowed: 20", "vllm serve --max-logprobs 21")


def test_another_model(policy: Policy, fake: FakeVllm) -> None:
    fake.name = "Qwen/Qwen3-0.6B"
    worlds.refused(
        lambda: connect_vllm(policy, fake.url), "serves Qwen/Qwen3-0.6B, not 'policy'", "--served-model-name policy"
    )


@pytest.mark.parametrize("kind", ["permuted", "longer"])
def test_another_tokenizer(policy: Policy, fake: FakeVllm, kind: str) -> None:
    if kind == "permuted":
        fake.tokenizer, _ = worlds.permuted_tokenizer(policy.tokenizer)
    else:
        fake.tokenizer = worlds.char_tokenizer((*worlds.TOKENS, "W"))
    worlds.refused(
        lambda: connect_vllm(policy, fake.url), fake.url, "another tokenizer than policy", "there and", "here"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights(policy: Policy, fake: FakeVllm, dtype: torch.dtype) -> None:
    mine = worlds.tiny_policy(dtype=dtype)
    fake.model = worlds.tiny_model(seed=7, dtype=dtype)
    kind = str(dtype).removeprefix("torch.")
    worlds.refused(lambda: connect_vllm(mine, fake.url), f"policy in {kind}", "apart on average", "other weights")
    fake.model = worlds.tiny_model(dtype=dtype)
    assert _served(mine, fake).backend is not None


def test_another_dtype(policy: Policy, fake: FakeVllm) -> None:
    fake.model = worlds.tiny_model(dtype=torch.bfloat16)
    worlds.refused(lambda: connect_vllm(policy, fake.url), "--dtype float32")


def test_processed_log_probabilities(policy: Policy, fake: FakeVllm) -> None:
    fake.raw = False
    worlds.refused(lambda: connect_vllm(policy, fake.url), "--logprobs-mode raw_logprobs")


def _changed(fake: FakeVllm, change: Callable[[dict[str, Any]], None]) -> None:
    """Have the server's answers changed on their way."""

    def before(number: int, body: dict[str, Any]) -> Any:
        choice = fake.complete(body)
        change(choice)
        return 200, {"choices": [choice]}

    fake.before = before


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ids": (lambda choice: choice.pop("token_ids"), "does not answer as vLLM does: KeyError 'token_ids'"),
    "no table": (lambda choice: choice.update(logprobs=None), "does not answer as vLLM does: TypeError"),
    "ids out of range": (lambda choice: choice["token_ids"].__setitem__(0, 999), "does not answer as vLLM does"),
    "another prompt": (lambda choice: choice["prompt_token_ids"].insert(0, 1), "prompt that came back"),
    "cut short": (lambda choice: choice.update(token_ids=[3], finish_reason="abort"), "no stop token (abort)"),
    "empty": (lambda choice: choice.update(token_ids=[]), "0 of 8 tokens"),
    "padding": (
        lambda choice: choice["token_ids"].__setitem__(0, worlds.TOKENS.index(worlds.PAD)),
        "a token that must not be sampled",
    ),
    "logits": (
        lambda choice: choice["logprobs"]["top_logprobs"][0].update({"token_id:3": 4.5}),
        "--logprobs-mode must be raw_logprobs",
    ),
    "NaN": (lambda choice: choice["logprobs"]["top_logprobs"][0].update({"token_id:3": float("nan")}), "NaN"),
    "text for ids": (lambda choice: choice["logprobs"]["top_logprobs"][0].update({"+": -0.1}), "'+'"),
    "short table": (lambda choice: choice["logprobs"]["top_logprobs"].pop(), "of 7 positions came back for 8 tokens"),
    "few candidates": (
        lambda choice: choice["logprobs"]["top_logprobs"].__setitem__(0, {"token_id:1": -1.0}),
        f"1 candidates came back of {ROWS}",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_answers_that_are_not_what_was_asked_for(name: str, served: Policy, fake: FakeVllm) -> None:
    change, words = CHANGES[name]
    _changed(fake, change)
    worlds.refused(lambda: _draw(replace(served, stop_ids=frozenset({99})), top_k_candidates=ROWS), fake.url, words)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("content", [b"<html>nginx</html>", b'{"choices": [', b"", b"\xff\xfe"])
def test_malformed_json(content: bytes, served: Policy, fake: FakeVllm) -> None:
    fake.before = lambda number, body: (200, content)
    worlds.refused(lambda: _draw(served), fake.url, "did not answer in JSON")


@pytest.mark.parametrize("answer", [[], {}, {"choices": []}, {"choices": 3}, None, 5])
def test_json_of_another_kind(answer: Any, served: Policy, fake: FakeVllm) -> None:
    fake.before = lambda number, body: (200, answer)
    worlds.refused(lambda: _draw(served), fake.url)


def test_another_kind_of_server(policy: Policy, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "answer", lambda path, body: (404, {"detail": "Not Found"}))
    worlds.refused(lambda: connect_vllm(policy, fake.url), "/v1/models refused with status 404")
    monkeypatch.setattr(fake, "answer", lambda path, body: (200, {"models": []}))
    worlds.refused(lambda: connect_vllm(policy, fake.url), "does not answer as vLLM does: no 'data'")


def test_a_key_goes_along(policy: Policy, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    _draw(_served(policy, fake))
    assert fake.headers["Authorization"] == "Bearer sesame"


# --- nothing finished is lost -----------------------------------------------------------------------------


def test_a_server_that_dies_half_way_loses_nothing_finished(
    tmp_path: Path, served: Policy, fake: FakeVllm, scalar_reward: Reward, problems: list[Problem]
) -> None:
    config = _config(batch_size=2, max_rounds=2, top_k_candidates=8)

    def run(folder: Path, checker: AnswerChecker) -> TraceTotals:
        todo, settings = (
            find_unfinished_problems(problems, folder, 0),
            {"config": config, "seed": 0, "show_progress": False},
        )
        return search_to_folder(todo, folder, policy=served, reward=scalar_reward, checker=checker, **settings)

    with AnswerChecker() as checker:
        assert run(tmp_path / "whole", checker).num_traces == 4
        half = len(fake.requests) // 2 + 1
        fake.requests.clear()
        fake.before = lambda number, body: (500, {}) if number > half else None
        _fails(lambda: run(tmp_path / "torn", checker), "status 500")
        assert len(read_traces(tmp_path / "torn")) == 2
        fake.before = lambda number, body: None
        assert run(tmp_path / "torn", checker).num_traces == 2
    by_id = [{t.problem_id: t for t in read_traces(tmp_path / name)} for name in ("torn", "whole")]
    assert by_id[0].keys() == by_id[1].keys() == {problem.id for problem in problems}
    _same([by_id[0][p.id] for p in problems], [by_id[1][p.id] for p in problems])


# --- commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> Path:
    """policy/, better/ and problems.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("policy", 0), ("better", 2)):
        one = worlds.tiny_policy(seed=seed)
        one.model.save_pretrained(folder / name)
        one.tokenizer.save_pretrained(folder / name)
    (folder / "problems.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "7", "answer": "7"}\n')
    return folder


@pytest.fixture
def options(world: Path, fake: FakeVllm) -> list[str]:
    fake.name = str(world / "policy")
    models = ["--policy", fake.name, "--reward", f"logratio:{world / 'better'}", "--vllm_url", f"{fake.url}/v1/"]
    return [*models, "--max_rounds", "2", "--max_new_tokens", "6"]


def test_solve_draws_from_the_server(capsys, options: list[str], fake: FakeVllm) -> None:
    assert main(["solve", "1+2", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["revisions"]) == 2 and found["meta"]["version/vllm"] == "0.32.0"
    branches = [revision["position"] + 1 < 6 and revision["suffix"][1:] != [] for revision in found["revisions"]]
    assert len(fake.requests) == 2 + sum(branches)  # the probe, the response, suffixes


def test_commands_say_in_one_line_what_is_wrong(capsys, options: list[str], world: Path, fake: FakeVllm) -> None:
    fake.max_logprobs = 8
    assert main(["solve", "1+2", *options]) == 1
    assert "vllm serve --max-logprobs 16" in _error_line(capsys)
    assert main(["solve", "1+2", *options, "--adapter", "some/adapter"]) == 2
    assert "leave out --vllm_url or --adapter" in capsys.readouterr().err


def test_traces_of_two_samplers_do_not_mix(capsys, options: list[str], world: Path, tmp_path: Path) -> None:
    command = ["traces", *options, "--dataset", str(world / "problems.jsonl"), "--output_dir", str(tmp_path)]
    assert main(command) == 0
    made = read_traces(tmp_path / "traces")
    assert [trace.error for trace in made] == [None, None]
    capsys.readouterr()
    at = command.index("--vllm_url")
    assert main(command[:at] + command[at + 2 :]) == 2
    assert "sampler None (was 'vllm')" in _error_line(capsys)


def test_the_door_for_users_takes_a_server(world: Path, fake: FakeVllm) -> None:
    fake.name = str(world / "policy")
    reasoner = NablaReasoner.from_pretrained(
        fake.name, reward=f"logratio:{world / 'better'}", vllm_url=fake.url, max_rounds=1, max_new_tokens=4
    )
    assert reasoner.solve("1+2").meta["version/vllm"] == "0.32.0"
    assert len(fake.requests) == 3  # the probe, the response, a branch


def _error_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err
