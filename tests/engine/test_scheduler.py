"""The scheduler: coroutines of one problem each, what they ask for batched, nobody left waiting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from nabla_trl.engine import scheduler as scheduler_module
from nabla_trl.engine.engine import Engine
from nabla_trl.engine.scheduler import MAX_IDLE_SESSIONS, MAX_SESSIONS, Scheduler, Task
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


def test_requests_of_other_lengths_are_decoded_together(policy: Policy) -> None:
    engine = Engine(policy, None)

    async def work(index: int) -> list[int]:
        [output] = await engine.generate(make_requests(policy, [str(index)]), Sampling(max_new_tokens=9 + index))
        return output.ids

    finish(engine, {str(index): work(index) for index in range(5)})
    assert len(engine._sessions) == 1


def test_no_more_buffers_are_open_than_may_and_all_requests_are_answered(policy: Policy) -> None:
    engine = Engine(policy, None, num_slots=2)
    most = 0

    async def work(index: int) -> list[int]:
        nonlocal most
        sampling = Sampling(max_new_tokens=20, temperature=1 + index / 10)
        [output] = await engine.generate(make_requests(policy, [str(index)]), sampling)
        most = max(most, len(engine._sessions))
        return output.ids

    results = finish(engine, {str(index): work(index) for index in range(MAX_SESSIONS + 4)})
    assert all(results.values()) and len(results) == MAX_SESSIONS + 4 and most == MAX_SESSIONS


def test_a_task_may_be_cancelled_while_all_its_sequences_wait(policy: Policy) -> None:
    engine = Engine(policy, None, num_slots=1)

    async def work(names: list[str]) -> int:
        return len(await engine.generate(make_requests(policy, names), SAMPLING))

    first, second, third = (Task(name, work([name]), owner=name) for name in "abc")
    for task in (first, second, third):
        engine.add(task)
    engine.work()
    engine.cancel(second)
    while engine.work():
        pass
    assert (first.result, second.result, third.result) == (1, None, 1)


def test_one_client_leaves_slots_to_the_others(policy: Policy) -> None:
    engine = Engine(policy, None, num_slots=4)

    async def work(names: list[str]) -> int:
        return len(await engine.generate(make_requests(policy, names), SAMPLING))

    crowd = [Task(f"c{n}", work([f"c{n}-{i}" for i in range(4)]), owner=n, client="crowd") for n in range(6)]
    for task in crowd:
        engine.add(task)
    engine.work()
    engine.work()
    [session] = engine._sessions.values()
    assert session.num_unfinished == 3
    small = Task("small", work(["s0"]), owner="small", client="small")
    engine.add(small)
    engine.work()
    assert session.num_unfinished == 4 and "s0" in [request.cost_key for _, request in session.list_requests()]
    while engine.work():
        pass
    assert small.result == 1 and all(task.result == 4 for task in crowd)


# --- sizes ------------------------------------------------------------------------------------------------


class Clock:
    """A time that only work takes: a call costs 1, and each of its rows `row_seconds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, row_seconds: float = 1.0):
        self.now, self.row_seconds = 0.0, row_seconds
        monkeypatch.setattr(scheduler_module, "perf_counter", lambda: self.now)

    def __call__(self, items: list[int]) -> list[int]:
        self.now += 1 + self.row_seconds * len(items)
        return items


@pytest.mark.parametrize("share_time", [False, True])
@pytest.mark.parametrize("num_large", [1, 25])
def test_a_small_task_takes_less_than_twice_its_lone_time_beside_large_ones(
    monkeypatch, num_large: int, share_time: bool
) -> None:
    """Where each row costs as much as a call, and nothing is gained by batches."""
    scheduler, clock, seconds = Scheduler(share_time=share_time), Clock(monkeypatch), dict[str, float]()

    async def work(steps: int) -> None:
        for _ in range(steps):
            await scheduler.batch("work", clock, [1])

    def run_small(key: str) -> float:
        began = clock.now
        scheduler.add(small := Task(key, work(40), size=40))
        while not small.ended:
            scheduler.work()
        return clock.now - began

    lone = run_small("lone")
    large = [Task(f"large {n}", work(300), size=300) for n in range(num_large)]
    for task in large:
        scheduler.add(task)
    for _ in range(50):
        scheduler.work()
    seconds["beside"] = run_small("beside")
    assert not any(task.ended for task in large)
    before = clock.now
    if share_time:
        assert seconds["beside"] < 2 * lone
    else:
        assert seconds["beside"] > (2 if num_large > 1 else 1) * lone
    while scheduler.work():
        pass
    assert all(task.ended for task in large) and clock.now > before


def test_large_tasks_go_on_beside_an_endless_row_of_small_ones(monkeypatch) -> None:
    scheduler, clock = Scheduler(share_time=True), Clock(monkeypatch)
    done = {"small": 0, "large": 0}

    async def work(kind: str, steps: int) -> None:
        for _ in range(steps):
            await scheduler.batch("work", clock, [1])
            done[kind] += 1

    scheduler.add(large := Task("large", work("large", 100), size=100))
    while not large.ended:
        if not any(task.key == "small" for task in scheduler.tasks):
            scheduler.add(Task("small", work("small", 3), size=3))
        scheduler.work()
    assert done["small"] < 8 * done["large"]


def test_tasks_of_about_the_same_size_are_batched_as_ever(monkeypatch) -> None:
    scheduler, clock = Scheduler(share_time=True), Clock(monkeypatch, row_seconds=0.0)

    async def work() -> None:
        for _ in range(10):
            await scheduler.batch("work", clock, [1])

    for number in range(8):
        scheduler.add(Task(str(number), work(), size=10 + number))
    while scheduler.work():
        pass
    assert clock.now == 10


def test_sequences_of_small_tasks_are_decoded_apart_and_stay_the_same(policy: Policy) -> None:
    names = [f"q{index}" for index in range(6)]
    plain = generate_continuations(policy, make_requests(policy, names), SAMPLING, flop_counter=FlopCounter())
    engine = Engine(policy, None, share_time=True)

    async def work(index: int) -> list[int]:
        [output] = await engine.generate([make_requests(policy, names)[index]], SAMPLING)
        return output.ids

    tasks = [Task(str(index), work(index), size=1 + 99 * (index % 2)) for index in range(6)]
    for task in tasks:
        engine.add(task)
    engine.work()
    assert [task.size for task in engine.small_tasks] == [1, 1, 1]
    while engine.work():
        pass
    assert [task.result for task in tasks] == [output.ids for output in plain]
    assert len(engine._sessions) == 2
