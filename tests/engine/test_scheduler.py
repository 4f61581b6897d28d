"""The scheduler: coroutines of one problem each, what they ask for batched, nobody left waiting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from nabla_trl.engine.engine import Engine
from nabla_trl.engine.scheduler import MAX_IDLE_SESSIONS, Scheduler, Task
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, prefill_prompts
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng

SAMPLING = Sampling(max_new_tokens=20)


def finish(scheduler: Scheduler, coroutines: dict[str, Any], max_concurrent: int = 100) -> dict[str, Any]:
    tasks = [Task(key, coroutine) for key, coroutine in coroutines.items()]
    return {task.key: task.result for task in scheduler.run(tasks, max_concurrent=max_concurrent)}


class Doubler:
    """Doubles numbers, and notes which ones it was given together."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.batches = scheduler, list[list[int]]()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        if 13 in items:
            raise ValueError("13 cannot be doubled")
        return [2 * item for item in items]

    async def double(self, *items: int) -> list[int]:
        return await self.scheduler.batch("double", self, items)


def test_requests_of_many_tasks_run_together_and_each_gets_its_own() -> None:
    scheduler = Scheduler()
    doubler = Doubler(scheduler)

    async def work(number: int) -> int:
        [first, second] = await doubler.double(number, number + 100)
        [third] = await doubler.double(first + second)
        return third

    results = finish(scheduler, {str(number): work(number) for number in range(5)})
    assert results == {str(number): 2 * (4 * number + 200) for number in range(5)}
    assert [len(batch) for batch in doubler.batches] == [10, 5]


def test_two_requests_can_be_asked_for_before_either_is_awaited() -> None:
    scheduler = Scheduler()
    doubler = Doubler(scheduler)

    async def work() -> list[int]:
        first = scheduler.batch("double", doubler, [1])
        second = scheduler.batch("other", lambda items: [-item for item in items], [5, 6])
        return [*await second, *await first, *await scheduler.batch("double", doubler, [])]

    assert finish(scheduler, {"a": work()}) == {"a": [-5, -6, 2]}


def test_a_limit_holds_tasks_back() -> None:
    scheduler, running, most = Scheduler(), set[int](), [0]
    doubler = Doubler(scheduler)

    async def work(number: int) -> None:
        running.add(number)
        most[0] = max(most[0], len(running))
        await doubler.double(number)
        running.discard(number)

    finish(scheduler, {str(number): work(number) for number in range(12) if number != 13}, max_concurrent=3)
    assert most == [3] and not running


def test_one_failing_item_fails_its_own_task_alone() -> None:
    scheduler = Scheduler()
    doubler = Doubler(scheduler)
    tasks = [Task(str(number), doubler.double(number)) for number in (12, 13, 14)]
    for task in tasks:
        scheduler.add(task)
    while scheduler.work():
        pass
    assert [task.result for task in tasks] == [[24], None, [28]]
    assert isinstance(tasks[1].error, ValueError) and not scheduler.tasks


def test_an_error_ends_a_run_and_the_other_tasks() -> None:
    scheduler = Scheduler()
    doubler = Doubler(scheduler)
    closed: list[int] = []

    async def endless(number: int) -> None:
        try:
            while True:
                await doubler.double(number)
        finally:
            closed.append(number)

    with pytest.raises(ValueError, match="13 cannot be doubled"):
        finish(scheduler, {"1": endless(1), "13": doubler.double(13), "2": endless(2)})
    assert sorted(closed) == [1, 2] and not scheduler.tasks


def test_a_task_can_ask_only_while_it_runs() -> None:
    scheduler = Scheduler()
    with pytest.raises(RuntimeError, match="only a coroutine that the engine runs"):
        scheduler.batch("double", lambda items: items, [1])


# --- sequences ------------------------------------------------------------------------------------------


def make_requests(policy: Policy, names: Sequence[str]) -> list[GenerationRequest]:
    prompts = [(name, [3 + index % 4, 5]) for index, name in enumerate(names)]
    caches = prefill_prompts(policy, prompts, FlopCounter())
    return [
        GenerationRequest(name, ids, make_rng(0, name, "suffix"), 12, cache)
        for (name, ids), cache in zip(prompts, caches, strict=True)
    ]


@pytest.mark.parametrize("num_slots", [1, 3, 50])
def test_sequences_are_those_of_a_plain_call_whatever_runs_beside_them(num_slots: int, policy: Policy) -> None:
    names = [f"q{index}" for index in range(8)]
    plain = generate_continuations(policy, make_requests(policy, names), SAMPLING, flop_counter=FlopCounter())
    engine = Engine(policy, None, num_slots=num_slots)
    requests = make_requests(policy, names)

    async def work(index: int) -> list[int]:
        for _ in range(index % 3):
            await engine.batch("nothing", lambda items: items, [index])
        [output] = await engine.generate([requests[index]], SAMPLING)
        return output.ids

    order = list(range(8))
    random.Random(0).shuffle(order)
    results = finish(engine, {str(index): work(index) for index in order}, max_concurrent=5)
    assert [results[str(index)] for index in range(8)] == [output.ids for output in plain]
    for name, output in zip(names, plain, strict=True):
        cost = engine.flop_counter.get_cost(name)
        assert cost.tokens == {"policy/decode": len(output.ids)} and cost.seconds > 0


def test_owners_share_the_slots_evenly(policy: Policy) -> None:
    """One owner with many sequences does not keep another one waiting for all of them."""
    engine = Engine(policy, None, num_slots=2)
    ended: list[str] = []

    async def work(names: list[str]) -> None:
        for request in make_requests(policy, names):
            request.max_new_tokens = 4
        await engine.generate(make_requests(policy, names), SAMPLING)

    crowd = Task(
        "crowd", work([f"c{index}" for index in range(30)]), owner="crowd", on_end=lambda t: ended.append(t.key)
    )
    engine.add(crowd)
    for _ in range(3):
        engine.work()
    engine.add(Task("small", work(["s0"]), owner="small", on_end=lambda task: ended.append(task.key)))
    steps = 0
    while not ended:
        engine.work()
        steps += 1
    assert ended == ["small"] and steps < 40


def test_a_cancelled_task_frees_its_slots(policy: Policy) -> None:
    engine = Engine(policy, None, num_slots=2)

    async def work(names: list[str]) -> int:
        return len(await engine.generate(make_requests(policy, names), SAMPLING))

    first, second = Task("a", work([f"a{index}" for index in range(6)])), Task("b", work(["b0"]))
    engine.add(first)
    engine.work()
    engine.add(second)
    engine.work()
    engine.cancel(first)
    assert first.ended and first.result is None
    while engine.work():
        pass
    assert second.result == 1 and not engine.tasks


def test_buffers_of_options_that_nobody_uses_any_more_are_dropped(policy: Policy) -> None:
    engine = Engine(policy, None, num_slots=2)

    async def work(index: int) -> list[int]:
        sampling = Sampling(max_new_tokens=20, temperature=1 + index / 10)
        [output] = await engine.generate(make_requests(policy, [str(index)]), sampling)
        return output.ids

    results = finish(engine, {str(index): work(index) for index in range(9)})
    assert all(results.values()) and len(results) == 9 and len(engine._sessions) == MAX_IDLE_SESSIONS
