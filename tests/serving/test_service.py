"""service: requests of many threads, batched, each answered as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import worlds
from watched_reward import PATIENCE, Gate, Watched

from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import PromptTooLong
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.serving.prompts import make_request_problem
from nabla_trl.serving.service import (
    SEARCH_SEED,
    QueueFull,
    SearchFailed,
    SearchProgress,
    SearchService,
    ServerStopping,
)
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

CONFIG = SearchConfig(max_new_tokens=6, max_rounds=3)


@pytest.fixture
def watched(scalar_reward: Reward) -> Watched:
    return Watched(scalar_reward)


@contextmanager
def running(policy: Policy, reward: Reward, **options: Any) -> Iterator[SearchService]:
    service = SearchService(policy, reward, **options)
    try:
        yield service
    finally:
        service.stop()
        service.join()


def problem(question: str, seed: int = 0) -> Problem:
    return make_request_problem([{"role": "user", "content": question}], seed)


def ask(
    service: SearchService, question: str, seed: int = 0, config: SearchConfig = CONFIG, **more: Any
) -> Future[Trace]:
    return service.submit_request(problem(question, seed), config, **more)


def answer(future: Future[Trace]) -> Trace:
    return future.result(PATIENCE)


def moves(trace: Trace) -> list[Any]:
    return [(r.round, r.position, r.new_token, r.suffix, r.accepted) for r in trace.revisions]


def alone(policy: Policy, reward: Reward, problem: Problem, config: SearchConfig = CONFIG) -> Trace:
    return run_search([problem], policy=policy, reward=reward, config=config, seed=SEARCH_SEED)[0]


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_requests_that_run_together_get_what_each_gets_alone(architecture: str) -> None:
    policy = worlds.tiny_policy(architecture)
    reward = Watched(worlds.tiny_scalar(policy, architecture))
    requests = [(question, seed) for question in worlds.QUESTIONS[:3] for seed in (0, 1, 2)]
    reward.before = gate = Gate(requests[0][0])
    with running(policy, reward) as service:
        futures = [ask(service, *requests[0])]
        assert gate.reached.wait(PATIENCE)
        futures += [ask(service, *request) for request in requests[1:]]
        gate.opened.set()
        traces = [answer(future) for future in futures]
    assert max(map(len, reward.scored)) > 1
    for request, trace in zip(requests, traces, strict=True):
        single = alone(policy, reward, problem(*request))
        assert trace.response_ids == single.response_ids and moves(trace) == moves(single)
        assert trace.cost.flops == pytest.approx(single.cost.flops, rel=1e-9)
    assert len({tuple(trace.response_ids) for trace in traces[:3]}) > 1  # seeds differ


def test_requests_of_other_options_join_at_once(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    other = SearchConfig(max_new_tokens=6, max_rounds=1)
    with running(policy, watched) as service:
        first = ask(service, "1+2")
        assert gate.reached.wait(PATIENCE)
        mixed = [ask(service, f"{n}*{n}", config=other if n % 2 else CONFIG) for n in range(6)]
        assert service.count_requests() == (6, 1)
        gate.opened.set()
        traces = [answer(future) for future in [first, *mixed]]
    assert all(trace.error is None for trace in traces)
    assert any({"0*0", "1*1"} <= set(questions) for questions in watched.scored)
    assert [len(trace.revisions) for trace in traces[1:]] == [3, 1] * 3


def test_no_more_searches_run_than_may(policy, watched) -> None:
    with running(policy, watched, max_running=2) as service:
        futures = [ask(service, f"{n}*{n}") for n in range(6)]
        assert all(answer(future).error is None for future in futures)
    assert max(len(set(questions)) for questions in watched.scored) <= 2


def test_a_client_with_many_requests_does_not_keep_another_one_waiting(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    ended: list[str] = []
    with running(policy, watched, max_running=1) as service:
        first = ask(service, "1+2", client="crowd")
        assert gate.reached.wait(PATIENCE)
        crowd = [ask(service, f"{n}*{n}", client="crowd") for n in range(5)]
        for future in crowd:
            future.add_done_callback(lambda _: ended.append("crowd"))
        small = ask(service, "7", client="small")
        small.add_done_callback(lambda _: ended.append("small"))
        gate.opened.set()
        assert all(answer(future).error is None for future in [first, *crowd, small])
    assert ended.index("small") <= 1


def test_a_small_request_ends_beside_a_huge_one(policy, watched) -> None:
    """Its own steps are what it waits for, and not the other's budget."""
    huge = SearchConfig(max_new_tokens=6, max_rounds=0, max_rollouts=3000, num_starts=300, num_chains=300)
    with running(policy, watched, num_slots=8) as service:
        large = ask(service, "12-3+4*5", config=huge)
        small = ask(service, "1+2")
        assert len(answer(small).revisions) == 3
        assert not large.done()
        large.cancel()


def test_requests_of_other_betas_are_solved_together_and_get_what_each_gets_alone(
    policy, watched, monkeypatch
) -> None:
    together: list[int] = []
    compute_gradient = watched.compute_gradient

    def count_and_compute(samples: Any, *args: Any, **options: Any) -> Any:
        together.append(len(samples))
        return compute_gradient(samples, *args, **options)

    monkeypatch.setattr(watched, "compute_gradient", count_and_compute)
    watched.before = gate = Gate("7")
    configs = [replace(CONFIG, beta=0.1 + 0.1 * n, solver={"target_kl": None}) for n in range(5)]
    with running(policy, watched) as service:
        held = ask(service, "7")
        assert gate.reached.wait(PATIENCE)
        futures = [ask(service, "12-3+4*5", config=config) for config in configs]
        gate.opened.set()
        traces = [answer(future) for future in [*futures, held]]
    assert max(together) >= 5
    for trace, config in zip(traces, configs, strict=False):
        single = alone(policy, watched, problem("12-3+4*5"), config)
        assert trace.response_ids == single.response_ids and moves(trace) == moves(single)
        assert trace.cost.flops == pytest.approx(single.cost.flops, rel=1e-9)


def test_the_size_of_a_request_is_what_it_may_take(policy, scalar_reward) -> None:
    with running(policy, scalar_reward) as service:

        def size(**options: Any) -> float:
            return service.estimate_tokens(problem("7"), replace(CONFIG, **options))

        assert size() == 6 * 4 and size(max_rounds=1) == 6 * 2 and size(max_new_tokens=60) == 60 * 4
        assert size(num_starts=5, num_chains=2) == 6 * (5 + 6) and size(max_rollouts=2) == 12
        assert size(max_flops=1e12) > 1e5 and size(max_rounds=0, patience=3) == math.inf


def test_an_engine_that_fails_fails_its_searches_and_the_next_ones_get_another(policy, watched, caplog) -> None:
    with running(policy, watched) as service:
        broken = service.engine

        def work() -> bool:
            raise RuntimeError("out of memory")

        broken.work = work  # type: ignore[method-assign]
        with pytest.raises(SearchFailed, match="out of memory"):
            answer(ask(service, "7"))
        assert answer(ask(service, "7")).error is None and service.is_alive and service.engine is not broken
    assert "the engine failed" in caplog.text


def test_equal_requests_share_one_search(policy, watched) -> None:
    watched.before = gate = Gate("3*4-5")
    with running(policy, watched) as service:
        held = ask(service, "3*4-5")
        assert gate.reached.wait(PATIENCE)
        futures = [ask(service, "1+2", 5) for _ in range(20)] + [ask(service, "7", 5)]
        gate.opened.set()
        traces = [answer(future) for future in [*futures, held]]
    assert all(one is traces[0] for one in traces[:20]) and traces[20] is not traces[0]
    assert sum(questions.count("1+2") for questions in watched.scored) == 4  # the first response and three rounds


# --- failures ---------------------------------------------------------------------------------------------


def test_a_request_that_cannot_be_read_leaves_the_others_untouched(policy, watched) -> None:
    questions = ["1+2", "what is love", "1" * 200, "7"]
    with running(policy, watched) as service:
        config = SearchConfig(max_new_tokens=6, max_rounds=3, batch_size=4)
        futures = [ask(service, question, config=config) for question in questions]
        good, unknown, long, last = [future.exception(PATIENCE) for future in futures]
        assert good is None and last is None
        assert type(unknown) is ValueError and "does not know some characters" in str(unknown)
        assert isinstance(long, PromptTooLong) and "context" in str(long)
    assert answer(futures[0]).response_ids == alone(policy, watched, problem("1+2")).response_ids


def test_a_search_that_breaks_breaks_for_the_culprit_alone(policy, watched, caplog) -> None:
    def broken(questions: list[str]) -> None:
        if "7" in questions:
            raise RuntimeError("no such luck")

    watched.before = broken
    with running(policy, watched) as service:
        config = SearchConfig(max_new_tokens=6, max_rounds=3, batch_size=4)
        futures = [ask(service, question, config=config) for question in worlds.QUESTIONS]
        with pytest.raises(SearchFailed, match="no such luck"):
            answer(futures[2])
        others = [answer(futures[index]) for index in (0, 1, 3)]
    assert "no such luck" in caplog.text
    watched.before = lambda questions: None
    for trace, question in zip(others, ("1+2", "3*4-5", "12-3+4*5"), strict=True):
        assert trace.response_ids == alone(policy, watched, problem(question)).response_ids


def test_a_reward_that_is_not_a_number_fails_its_request_alone(policy, scalar_reward) -> None:
    class Odd(Watched):
        def score(self, samples: Any, *args: Any, **options: Any) -> Any:
            values, caches = super().score(samples, *args, **options)
            questions = [sample.problem.question for sample in samples]
            pairs = zip(values, questions, strict=True)
            return [math.nan if question == "7" else value for value, question in pairs], caches

    with running(policy, Odd(scalar_reward)) as service:
        config = SearchConfig(max_new_tokens=6, max_rounds=3, batch_size=2)
        good, bad = ask(service, "1+2", config=config), ask(service, "7", config=config)
        with pytest.raises(SearchFailed, match="nan"):
            answer(bad)
        assert answer(good).response_ids == alone(policy, scalar_reward, problem("1+2")).response_ids


def test_a_generating_server_that_is_gone_is_not_asked_for_each_alone(policy, watched) -> None:
    def gone(questions: list[str]) -> None:
        raise ConnectionError("no answer")

    watched.before = gone
    with running(policy, watched) as service:
        config = SearchConfig(max_new_tokens=6, max_rounds=3, batch_size=4)
        for future in [ask(service, question, config=config) for question in worlds.QUESTIONS]:
            assert isinstance(future.exception(PATIENCE), SearchFailed)
    assert len(watched.scored) <= len(worlds.QUESTIONS)


# --- who waits --------------------------------------------------------------------------------------------


def test_a_cancelled_request_is_dropped_from_the_queue(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    with running(policy, watched, max_queue=2) as service:
        first = ask(service, "1+2")
        assert gate.reached.wait(PATIENCE)
        dropped, waiting = ask(service, "7"), ask(service, "9*9")
        assert dropped.cancel()
        again = ask(service, "8*8")  # there is room for it
        gate.opened.set()
        assert all(answer(future).error is None for future in (first, waiting, again))
    assert not any("7" in questions for questions in watched.scored)


def test_a_cancelled_search_ends_at_the_next_round_and_the_others_go_on(policy, watched) -> None:
    rounds, gate = count(), Gate("7")
    watched.before = lambda questions: gate(questions) if "7" in questions and next(rounds) == 2 else None
    config = SearchConfig(max_new_tokens=6, max_rounds=8, batch_size=2)
    with running(policy, watched) as service:
        going, left = ask(service, "1+2", config=config), ask(service, "7", config=config)
        assert gate.reached.wait(PATIENCE)
        assert left.cancel() and service.count_requests() == (0, 1)
        gate.opened.set()
        assert len(answer(going).revisions) == 8
    assert sum("7" in questions for questions in watched.scored) == 3  # the first response and two rounds


def test_a_search_goes_on_while_one_of_equal_requests_waits_for_it(policy, watched) -> None:
    watched.before = gate = Gate("7")
    config = SearchConfig(max_new_tokens=6, max_rounds=3, batch_size=2)
    with running(policy, watched) as service:
        left, waits, _ = (ask(service, question, config=config) for question in ("7", "7", "1+2"))
        assert gate.reached.wait(PATIENCE) and left.cancel()
        gate.opened.set()
        assert len(answer(waits).revisions) == 3


def test_more_than_may_wait_are_refused(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    with running(policy, watched, max_queue=3) as service:
        futures = [ask(service, "1+2")]
        assert gate.reached.wait(PATIENCE)
        futures += [ask(service, f"{n}") for n in range(3)]
        with pytest.raises(QueueFull, match="3 requests"):
            ask(service, "3")
        gate.opened.set()
        assert all(answer(future).error is None for future in futures)


def test_stopping_finishes_what_runs_and_refuses_what_waits(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    service = SearchService(policy, watched)
    runs = ask(service, "1+2")
    assert gate.reached.wait(PATIENCE)
    waits = ask(service, "7")
    service.stop()
    with pytest.raises(ServerStopping):
        answer(waits)
    with pytest.raises(ServerStopping):
        ask(service, "9")
    assert not service.is_alive
    gate.opened.set()
    service.join()
    assert len(answer(runs).revisions) == 3


# --- progress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_starts": 3, "num_chains": 2, "proposals": {"proposals_per_round": 2}}])
def test_progress_tells_of_every_incumbent(policy, watched, options: dict[str, int]) -> None:
    config = SearchConfig(max_new_tokens=8, max_rounds=6, **options)
    updates: list[SearchProgress] = []
    with running(policy, watched) as service:
        trace = answer(ask(service, "12-3+4*5", config=config, on_progress=updates.append))
    accepted = [revision for revision in trace.revisions if revision.accepted]
    assert accepted
    best_chains = {update.chain for update in updates if update.reward == trace.reward}
    best_updates = [update for update in updates if update.chain in best_chains]
    assert [(policy.decode(ids), reward) for ids, reward in trace.list_incumbents()] == [
        (p.text, p.reward) for p in best_updates
    ]
    assert best_updates[0].round is None and best_updates[0].reward_before is None
    expected = [(r.round, r.position, r.reward_before, r.cumulative_flops) for r in accepted]
    assert [(p.round, p.position, p.reward_before, p.flops) for p in best_updates[1:]] == expected
    assert len({update.chain for update in updates if update.round is None}) == config.num_chains
