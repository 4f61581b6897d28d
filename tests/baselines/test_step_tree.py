"""Searches over steps, against the same searches written out by hand on draws and rewards that share nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import worlds

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.step_methods import STEP_SEARCH_METHODS, _NodeValues
from nabla_trl.baselines.step_tree import StepNode, create_step_finder, run_step_search
from nabla_trl.engine.engine import Engine
from nabla_trl.evaluation.method import Method, get_max_selection_size, parse_methods, sort_methods
from nabla_trl.evaluation.plan import EvaluationSetup, check_methods, get_baseline_settings, plan_jobs
from nabla_trl.evaluation.rows import Row, RowStore
from nabla_trl.evaluation.runner import compute_mean_flops, run_job
from nabla_trl.gradient.objectives import Sample
from nabla_trl.gradient.step_ends import StepFinder
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.loading import build_process_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# Tokens few enough that steps end often and that draws coincide; one that may not be drawn, one that ends.
FEW = ["1", ";", worlds.PAD, worlds.USER, worlds.ASSISTANT, worlds.END, worlds.UNK]
PROBLEMS = [Problem(id=f"q{number}", question=text) for number, text in enumerate(["1", "11;1", ";1;", "111"])]
ROOM = 10
SAMPLING = Sampling(max_new_tokens=ROOM)
STEPS = BaselineConfig(step_delimiter=";", max_step_tokens=4, steps_per_prefix=3)
SIZES = {"beam_search": 7, "dvts": 7, "tot": 2, "rap": 5, "particle_filter": 6, "entropic_particle_filter": 7}


def small(architecture: str = "llama", seed: int = 0) -> Policy:
    return worlds.tiny_policy(
        architecture, tokenizer=worlds.char_tokenizer(FEW), dtype=torch.float64, seed=seed, context=64
    )


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return small()


def reward_of(kind: str, policy: Policy) -> Reward:
    if kind == "scalar":
        return worlds.tiny_scalar(policy, context=64)
    if kind == "log-ratio":
        return worlds.tiny_logratio(policy, context=64)
    [term] = worlds.tiny_scalar(policy, context=64).objectives
    return build_process_reward(policy, term.model, policy.tokenizer, "steps", step_delimiter=";")


@pytest.fixture(scope="module", params=["scalar", "process", "log-ratio"])
def made(request: pytest.FixtureRequest, tiny: Policy) -> Reward:
    return reward_of(request.param, tiny)


def run(name: str, policy: Policy, reward: Reward, problems=PROBLEMS, **options) -> list[Trace]:
    size = options.pop("size", None if "max_flops" in options else SIZES[name])
    how = {"sampling": SAMPLING, "step_config": STEPS, "method_name": name} | options
    return run_step_search(problems, method=STEP_SEARCH_METHODS[name], size=size, policy=policy, reward=reward, **how)


# --- by hand --------------------------------------------------------------------------------------------

Place = tuple[int, ...]
Prefix = tuple[int, ...]
Step = Callable[[Problem, Place, Prefix], Prefix]


@pytest.fixture(scope="module")
def step(tiny: Policy) -> Step:
    """The prefix after the step drawn at a place: a continuation is drawn from nothing, and cut."""
    finder = StepFinder(tiny.tokenizer, ";")

    @cache
    def prefix_after(problem: Problem, place: Place, prefix: Prefix) -> Prefix:
        stream = make_rng(0, problem.id, "step", *place)
        job = GenerationRequest("p", [*tiny.encode(problem), *prefix], stream, min(4, ROOM - len(prefix)))
        [draft] = generate_continuations(tiny, [job], SAMPLING, flop_counter=FlopCounter())
        tokens = [*prefix, *draft.ids]
        return tuple(
            tokens[: next((at + 1 for at in finder.find_step_ends(tokens) if at >= len(prefix)), len(tokens))]
        )

    return prefix_after


class Hand:
    """The searches of one problem, written out; rewards have no memory.

    Attributes:
        seen: every prefix that was scored, with its reward, in order.
    """

    def __init__(self, step: Step, policy: Policy, reward: Reward, problem: Problem, width: int = 3):
        self.step, self.policy, self.reward, self.problem, self.width = step, policy, reward, problem, width
        self.seen: dict[Prefix, float] = {}

    def ended(self, prefix: Prefix) -> bool:
        return len(prefix) == ROOM or (bool(prefix) and prefix[-1] in self.policy.stop_ids)

    def value(self, prefix: Prefix) -> float:
        if prefix not in self.seen:
            prompt = self.policy.encode(self.problem)
            one = Sample(self.problem, prompt, list(prefix), is_partial=not self.ended(prefix))
            [self.seen[prefix]], _ = self.reward.score(
                [one], self.reward.compute_prompt_caches([one], FlopCounter()), flop_counter=FlopCounter()
            )
        return self.seen[prefix]

    def best(self) -> Prefix:
        return max((prefix for prefix in self.seen if self.ended(prefix)), key=self.value)

    def draws(self, place: Place, prefix: Prefix, count: int) -> list[tuple[Place, Prefix]]:
        """Distinct children, each at the place of the first draw that gave it."""
        found: dict[Prefix, Place] = {}
        for number in range(count):
            found.setdefault(self.step(self.problem, (*place, number), prefix), (*place, number))
        return [(own, child) for child, own in found.items() if math.isfinite(self.value(child))]

    def levels(self, attempt: int, keep: int, width: int, total: int | None = None) -> None:
        kept: list[tuple[Place, Prefix]] = [((attempt,), ())]
        while live := [one for one in kept if not self.ended(one[1])]:
            done = [one for one in kept if self.ended(one[1])]
            count = len(live) * width if total is None else total - len(done) * width
            shares = [count // len(live) + (at < count % len(live)) for at in range(len(live))]
            fresh = [child for one, share in zip(live, shares, strict=True) for child in self.draws(*one, share)]
            kept = sorted(done + fresh, key=lambda one: -self.value(one[1]))[:keep]

    def beam_search(self, size: int, attempt: int = 0) -> None:
        width = min(size, self.width)
        self.levels(attempt, size // width, width, size)

    def dvts(self, size: int) -> None:
        for attempt in range(size // self.width):
            self.beam_search(self.width, attempt)
        if size % self.width:
            self.beam_search(size % self.width, size // self.width)

    def tot(self, size: int) -> None:
        self.levels(0, size, self.width)

    def rap(self, size: int) -> None:
        attempt = -1
        while size:
            attempt += 1
            children: dict[Prefix, list[tuple[Place, Prefix]]] = {}
            values: dict[Prefix, list[float]] = {}
            while size and not self.known((), children):
                path: list[tuple[Place, Prefix]] = [((attempt,), ())]
                while path[-1][1] in children:
                    open_ = [one for one in children[path[-1][1]] if not self.known(one[1], children)]
                    path.append(max(open_, key=lambda one: self.uct(one[1], path[-1][1], children, values)))
                while not self.ended(path[-1][1]):
                    new = children[path[-1][1]] = self.draws(*path[-1], self.width)
                    path.append(max(new, key=lambda one: self.value(one[1])))
                for _, prefix in path:
                    values.setdefault(prefix, []).append(self.value(path[-1][1]))
                size -= 1

    def entropic_particle_filter(self, size: int) -> None:
        self.particle_filter(size, anneal=True)

    def particle_filter(self, size: int, anneal: bool = False, score: bool = False) -> None:
        """Weights of the last step, or with `score` of the whole prefix, as in its_hub: softmax of the scores."""
        rest: dict[int, float] = {}
        particles: list[tuple[Place, Prefix]] = [((0,), ())] * size
        rng = make_rng(0, self.problem.id, "particles", 0)
        while not all(self.ended(prefix) for _, prefix in particles):
            new, logs, drawn, children = [], [], Counter[Place](), {}
            for place, prefix in particles:
                if self.ended(prefix):
                    new.append((place, prefix))
                    logs.append(self.value(prefix) if score else 0.0)
            moving = [number for number, (_, prefix) in enumerate(particles) if not self.ended(prefix)]
            order = [number for number in range(len(particles)) if number not in moving] + moving
            for place, prefix in particles:
                if not self.ended(prefix):
                    child_place = (*place, drawn[place])
                    drawn[place] += 1
                    child = self.step(self.problem, child_place, prefix)
                    new.append((children.setdefault((place, child), child_place), child))
                    logs.append(self.value(child) - (self.value(prefix) if prefix and not score else 0.0))
            logs = [log + (0.0 if score else rest.get(number, 0.0)) for number, log in zip(order, logs, strict=True)]
            weights, temperature = [math.exp(log - max(logs)) for log in logs], 1.0
            if anneal:  # its_hub: T = max(1, N/ESS · (1 − progress)) where ESS/N and progress are below one half
                ess = sum(weights) ** 2 / sum(weight**2 for weight in weights) / len(weights)
                progress = sum(len(prefix) for _, prefix in new) / len(new) / ROOM
                if ess < 0.5 and progress < 0.5:
                    temperature = max(1.0, (1 - progress) / ess)
            weights, left = [weight ** (1 / temperature) for weight in weights], list(logs)
            uniform, total, particles, rest = rng.random(), sum(weights), [], {}
            for number in range(size):
                goal, mass = (uniform + number) / size, 0.0
                for particle, weight, log in zip(new, weights, left, strict=True):
                    mass += weight / total
                    if mass > goal:
                        rest[len(particles)] = (1 - 1 / temperature) * log
                        particles.append(particle)
                        break

    def known(self, prefix: Prefix, children: dict) -> bool:
        return self.ended(prefix) or (
            prefix in children and all(self.known(child, children) for _, child in children[prefix])
        )

    def uct(self, prefix: Prefix, parent: Prefix, children: dict, values: dict[Prefix, list[float]]) -> float:
        seen = [self.value(child) for new in children.values() for _, child in new]
        low, high = min(seen), max(seen)
        own = values.get(prefix, [self.value(prefix)])
        mean = (sum(own) / len(own) - low) / (high - low) if high > low else 0.0
        return mean + math.sqrt(math.log(len(values[parent])) / len(own))


@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_the_search_by_hand(name: str, step: Step, tiny: Policy, made: Reward) -> None:
    steps = []
    for trace, problem in zip(run(name, tiny, made, PROBLEMS[:3]), PROBLEMS, strict=False):
        hand = Hand(step, tiny, made, problem)
        getattr(hand, name)(SIZES[name])
        best = hand.best()
        assert tuple(trace.response_ids) == best, problem.id
        assert trace.reward == pytest.approx(hand.value(best), abs=1e-5)
        assert (trace.error, trace.method, trace.stop_reason) == (None, name, "single")
        steps.append(max(prefix.count(FEW.index(";")) for prefix in hand.seen))
    assert max(steps) > 2, "responses of several steps"


@pytest.mark.parametrize("problem", PROBLEMS[:3], ids=lambda problem: problem.id)
def test_particles_weighed_by_their_whole_score(problem: Problem, step: Step, tiny: Policy, made: Reward) -> None:
    [trace] = run("particle_filter", tiny, made, [problem], step_config=replace(STEPS, particle_potential="score"))
    hand = Hand(step, tiny, made, problem)
    hand.particle_filter(SIZES["particle_filter"], score=True)
    assert tuple(trace.response_ids) == hand.best()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "qwen3"])
def test_architectures(architecture: str) -> None:
    """One beam that draws once a step is a plain sample, step by step."""
    policy = small(architecture)
    reward = reward_of("process", policy)
    [trace] = run("beam_search", policy, reward, PROBLEMS[:1], size=1)
    prompt, tokens, place = policy.encode(PROBLEMS[0]), list[int](), (0,)
    finder = create_step_finder(policy, ";")
    while len(tokens) < ROOM and tokens[-1:] != [min(policy.stop_ids)]:
        place += (0,)
        job = GenerationRequest("p", prompt + tokens, make_rng(0, "q0", "step", *place), min(4, ROOM - len(tokens)))
        [draft] = generate_continuations(policy, [job], SAMPLING, flop_counter=FlopCounter())
        whole = tokens + draft.ids
        tokens = whole[: next((at + 1 for at in finder.find_step_ends(whole) if at >= len(tokens)), len(whole))]
    assert trace.response_ids == tokens
    hand = Hand(lambda *_: (), policy, reward, PROBLEMS[0])
    assert trace.reward == pytest.approx(hand.value(tuple(tokens)), rel=1e-9)
    assert trace.cost.tokens["policy/decode"] == len(tokens)


# --- exact ends -----------------------------------------------------------------------------------------

TWO = Sampling(temperature=100.0, top_k=2, max_new_tokens=4)  # the two likeliest tokens, as good as evenly


def every_response(policy: Policy, problem: Problem, prefix: Prefix = ()) -> list[Prefix]:
    """All that `TWO` can draw, by plain forwards."""
    if len(prefix) == 4 or (prefix and prefix[-1] in policy.stop_ids):
        return [prefix]
    logits = policy.model(torch.tensor([[*policy.encode(problem), *prefix]])).logits[0, -1]
    top = logits.masked_fill(policy.forbidden_mask, -torch.inf).topk(2).indices.tolist()
    return [response for token in top for response in every_response(policy, problem, (*prefix, token))]


@pytest.mark.parametrize(("name", "size"), [("beam_search", 40 * 16), ("tot", 16), ("rap", 16)])
def test_as_wide_as_the_world_it_finds_the_best_response(name: str, size: int, tiny: Policy, made: Reward) -> None:
    wide = replace(STEPS, steps_per_prefix=40)
    traces = run(name, tiny, made, PROBLEMS[:2], size=size, sampling=TWO, step_config=wide)
    for trace, problem in zip(traces, PROBLEMS[:2], strict=True):
        samples = [Sample(problem, tiny.encode(problem), list(ids)) for ids in every_response(tiny, problem)]
        values, _ = made.score(samples, made.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter())
        assert 5 <= len(samples) <= 16
        assert trace.reward == pytest.approx(max(values), abs=1e-5)
        assert trace.response_ids == samples[values.index(max(values))].response_ids


def node(reward: float, *children: StepNode, ended: bool = False) -> StepNode:
    made = StepNode((), [], torch.zeros(0), "", ended, None, [], reward)
    made.children += children
    return made


def test_uct_by_hand() -> None:
    """Means are brought to [0, 1] by rewards from −2 to 2; a child that was never visited is worth its own reward."""
    good, fair, fresh, over, dead = node(2.0), node(0.0), node(1.0), node(2.0, ended=True), node(-math.inf)
    root, values = node(math.nan, good, fair, fresh, over, dead), _NodeValues()
    values.record_nodes([*root.children, node(-2.0)])
    assert (values.min_reward, values.max_reward, values.exhausted_nodes) == (-2.0, 2.0, {over, dead})
    values.rollout_values[root], values.rollout_values[good], values.rollout_values[fair] = (
        [2.0, -1.0, 1.0],
        [-1.0, 1.0],
        [2.0],
    )
    # good: 0.5 + w √(ln 3 / 2) = 0.5 + 0.741 w;  fair: 1 + 1.048 w;  fresh: 0.75 + 1.048 w
    assert values.select_child(root, 1.0) is fair
    values.rollout_values[fair] = [0.0]  # 0.5 + 1.048 w
    assert values.select_child(root, 1.0) is fresh
    values.rollout_values[good] = [2.0, 1.0]  # 0.875 + 0.741 w: ahead of 0.75 + 1.048 w below w = 0.407
    assert values.select_child(root, 0.40) is good and values.select_child(root, 0.41) is fresh
    assert values.select_child(root, 0.0) is good


def test_a_value_goes_back_to_all_nodes_on_the_way_and_closes_what_is_known() -> None:
    end, other = node(3.0, ended=True), node(1.0, ended=True)
    inner, beside = node(2.0, end), node(0.0)
    root, values = node(math.nan, inner, beside), _NodeValues()
    values.record_nodes([inner, beside, end, other])
    values.backpropagate([root, inner, end])
    assert [values.rollout_values[one] for one in (root, inner, end, beside)] == [[3.0], [3.0], [3.0], []]
    assert (
        inner in values.exhausted_nodes
        and root not in values.exhausted_nodes
        and values.select_child(root, 1.0) is beside
    )
    beside.children.append(other)
    values.backpropagate([root, beside, other])
    assert values.rollout_values[root] == [3.0, 1.0] and {root, beside} <= values.exhausted_nodes


# --- what does not matter -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_flops": 1.5e6}], ids=["size", "budget"])
@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_batch_and_order_do_not_matter_and_seeds_do(name: str, options: dict, tiny: Policy) -> None:
    reward = reward_of("process", tiny)
    whole = run(name, tiny, reward, **options)
    for rows, problems in ((1, PROBLEMS[1:2]), (5, PROBLEMS[::-1])):
        for trace in run(name, tiny, reward, problems, batch_size=rows, **options):
            [same] = [one for one in whole if one.problem_id == trace.problem_id]
            assert trace.response_ids == same.response_ids
            assert trace.reward == pytest.approx(same.reward, rel=1e-9)
            assert (trace.cost.tokens, trace.cost.flops) == (same.cost.tokens, same.cost.flops)
    other = run(name, tiny, reward, seed=1, **options)
    assert [one.cost.tokens for one in other] != [one.cost.tokens for one in whole]


def test_equal_draws_are_paid_for_and_scored_once(tiny: Policy, made: Reward) -> None:
    """Greedy decoding: all draws of a step are one, and a search is the greedy response."""
    cold = Sampling(temperature=0.0, max_new_tokens=ROOM)
    [one] = run("beam_search", tiny, made, PROBLEMS[:1], size=1, sampling=cold)
    [greedy] = generate_continuations(
        tiny, [GenerationRequest("p", tiny.encode(PROBLEMS[0]), None, ROOM)], cold, flop_counter=FlopCounter()
    )
    assert one.response_ids == greedy.ids
    for name, times in {"beam_search": 6, "dvts": 6, "tot": 3, "rap": 6}.items():
        size = {"rap": 2}.get(name, 6)
        [trace] = run(name, tiny, made, PROBLEMS[:1], size=size, sampling=cold)
        assert trace.response_ids == one.response_ids
        assert trace.cost.tokens["policy/decode"] == times * len(greedy.ids)
        scored = 2 if name in ("dvts", "rap") else 1  # attempts know nothing of each other
        for kind in ("reward/forward", "reference/forward"):
            assert trace.cost.tokens.get(kind, 0) == scored * one.cost.tokens.get(kind, 0)


# --- what it costs --------------------------------------------------------------------------------------


class Watch:
    """What was drawn and scored, as it happens; `before`: FLOPs of each problem when a step was begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: Policy, reward: Reward):
        self.flops: dict[str, float] = {}
        self.before: dict[str, list[float]] = {}
        score, size, generate = reward.score, policy.size, Engine.generate

        def add(key: str, flops: float) -> None:
            self.flops[key] = self.flops.get(key, 0.0) + flops

        async def watched_generate(engine, requests, sampling, **options):
            for key in {request.cost_key for request in requests}:
                self.before.setdefault(key, []).append(engine.flop_counter.get_cost(key).flops)
            outputs = await generate(engine, requests, sampling, **options)
            for request, output in zip(requests, outputs, strict=True):
                assert request.cache is not None and request.cache.length == len(request.prefix_ids) - 1
                add(request.cost_key, size.compute_forward_flops(len(request.prefix_ids) - 1, len(output.ids)))
            return outputs

        def watched_score(samples, memos, *, flop_counter, num_shared, return_caches):
            for sample, begin in zip(samples, num_shared, strict=True):
                for term in reward.objectives:
                    if not term.has_draw_logp(sample):
                        encoded = term.encode(sample)
                        end = len(encoded.prompt_ids) + len(encoded.response_ids) + len(encoded.turn_end_ids)
                        start = len(encoded.prompt_ids) - 1 + begin
                        count = (
                            end - start - (term.model is not None and reward.has_dense_gradient)
                        )  # the last is not fed
                        add(sample.cost_key, term.model_size.compute_forward_flops(start, count, count))
            return score(samples, memos, flop_counter=flop_counter, num_shared=num_shared, return_caches=return_caches)

        monkeypatch.setattr(Engine, "generate", watched_generate)
        monkeypatch.setattr(reward, "score", watched_score)

    def bare(self, policy: Policy, reward: Reward, problem: Problem) -> float:
        """Of reading the prompt."""
        prompt = policy.encode(problem)
        total = policy.size.compute_forward_flops(0, len(prompt) - 1, 0)
        for term in reward.objectives:
            encoded = term.encode(Sample(problem, prompt, []))
            total += term.model_size.compute_forward_flops(0, len(encoded.prompt_ids) - 1, 0)
        return total


@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_flops_are_those_of_what_was_drawn_and_scored(name: str, tiny: Policy, made: Reward, monkeypatch) -> None:
    watch = Watch(monkeypatch, tiny, made)
    for trace, problem in zip(run(name, tiny, made, PROBLEMS[:2]), PROBLEMS, strict=False):
        expected = watch.bare(tiny, made, problem) + watch.flops[problem.id]
        assert trace.cost.flops == pytest.approx(expected, rel=1e-12)
        assert trace.cost.seconds > 0


@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_a_budget_is_spent_and_kept(name: str, tiny: Policy, monkeypatch) -> None:
    """No step begins above it; in the end not one more response fits."""
    reward = reward_of("process", tiny)
    [one] = run("beam_search", tiny, reward, PROBLEMS[:1], size=1)
    watch = Watch(monkeypatch, tiny, reward)
    shares = []
    for times in (3, 16):
        watch.before.clear()
        flops = times * one.cost.flops
        for trace in run(name, tiny, reward, PROBLEMS[:3], max_flops=flops):
            assert (trace.stop_reason, trace.error) == ("max_flops", None)
            assert max(watch.before[trace.problem_id]) < flops
            shares.append(trace.cost.flops / flops)
    assert max(shares) < 1.3 and min(shares[:3]) > 0.4 and min(shares[3:]) > 0.85


@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_from_one_response_to_many(name: str, tiny: Policy) -> None:
    """A budget below one response draws one all the same; a large one finds more reward."""
    reward = reward_of("log-ratio", tiny)
    singles = run("beam_search", tiny, reward, size=1)
    fewest, most = run(name, tiny, reward, max_flops=1.0), run(name, tiny, reward, max_flops=4e6)
    for trace, single in zip(fewest, singles, strict=True):
        assert (trace.response_ids, trace.cost.tokens) == (single.response_ids, single.cost.tokens)
    assert all(many.reward >= few.reward for many, few in zip(most, fewest, strict=True))
    assert sum(many.reward > few.reward for many, few in zip(most, fewest, strict=True)) > 2


# --- what cannot be run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_a_reward_that_is_no_number_fails_its_problem_alone(name: str, bad: float, tiny: Policy, monkeypatch) -> None:
    reward = reward_of("scalar", tiny)
    whole, score = run(name, tiny, reward), reward.score

    def broken(samples, memos, **options):
        values, kept = score(samples, memos, **options)
        poor = [sample.problem.id == "q1" and len(sample.response_ids) > 2 for sample in samples]
        return [bad if one else value for one, value in zip(poor, values, strict=True)], kept

    monkeypatch.setattr(reward, "score", broken)
    traces = run(name, tiny, reward)
    assert traces[1].error == f"the reward scorer gave {bad}" and traces[1].cost.flops > 0
    assert traces[1].response_ids == [] and traces[1].stop_reason == "error"
    for at in (0, 2, 3):
        assert (traces[at].error, traces[at].response_ids) == (None, whole[at].response_ids)


@pytest.mark.parametrize("options", [{}, {"max_flops": 1.5e6}], ids=["size", "budget"])
@pytest.mark.parametrize("name", STEP_SEARCH_METHODS)
def test_what_the_reward_cannot_read_is_dropped(name: str, options: dict, tiny: Policy) -> None:
    reward = reward_of("scalar", tiny)
    unknown, readable = FEW.index(worlds.USER), reward.in_vocabulary.clone()
    assert any(unknown in trace.response_ids for trace in run(name, tiny, reward, **options))
    readable[unknown] = False
    found = run(name, tiny, replace(reward, in_vocabulary=readable), **options)
    assert any(trace.error is None for trace in found)
    assert all(unknown not in trace.response_ids for trace in found)
    readable[:] = False
    for trace in run(
        name, tiny, replace(reward, in_vocabulary=readable, stop_ids=frozenset()), PROBLEMS[:1], **options
    ):
        assert "cannot read any response" in str(trace.error) and trace.cost.flops > 0


def test_a_prompt_that_leaves_no_room(tiny: Policy, made: Reward) -> None:
    long = Problem(id="long", question="1" * 70)
    traces = run("beam_search", tiny, made, [PROBLEMS[0], long])
    assert traces[0].error is None and "long" in str(traces[1].error) and traces[1].cost.flops == 0


def test_refusals(tiny: Policy, made: Reward) -> None:
    worlds.refused(lambda: run("rap", tiny, made, size=None), "rap", "size or a budget")
    worlds.refused(lambda: run("rap", tiny, made, size=2, max_flops=1e6), "rap", "size or a budget")
    strange = replace(STEPS, step_delimiter="x")
    worlds.refused(lambda: run("tot", tiny, made, step_config=strange), "no step could end", "'x'", "step_delimiter")
    served = replace(tiny, backend=SimpleNamespace(supports_should_stop=False))
    worlds.refused(lambda: run("tot", served, made), "vLLM server", "vllm_url")
    for options in ({"max_step_tokens": 0}, {"steps_per_prefix": 0}, {"exploration": -1.0}, {"exploration": math.inf}):
        worlds.refused(lambda options=options: BaselineConfig(**options), next(iter(options)))
    worlds.refused(lambda: BaselineConfig(step_delimiter=r"\q"), "step_delimiter")


def test_a_process_reward_says_what_ends_a_step(tiny: Policy) -> None:
    assert BaselineConfig().resolve_delimiter(reward_of("process", tiny).step_delimiter) == ";"
    assert BaselineConfig().resolve_delimiter(reward_of("scalar", tiny).step_delimiter) == "\n\n"
    assert BaselineConfig(step_delimiter=r"\x3b\n").resolve_delimiter(";") == ";\n"
    assert BaselineConfig().get_settings(";") == BaselineConfig(step_delimiter=";").get_settings("")
    reward, bare = reward_of("process", tiny), replace(STEPS, step_delimiter=None)
    ours, theirs = (run("dvts", tiny, reward, step_config=step_config) for step_config in (bare, STEPS))
    assert [one.response_ids for one in ours] == [one.response_ids for one in theirs]


# --- in an evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def bench(tiny: Policy) -> EvaluationSetup:
    config = SearchConfig(max_new_tokens=ROOM, batch_size=2)
    return EvaluationSetup(tiny, reward_of("process", tiny), config, (0, 1), baseline_config=STEPS)


def test_rows_at_sizes_and_budgets_survive_a_kill(bench: EvaluationSetup, tmp_path: Path) -> None:
    names = parse_methods("best_of_8,beam_search_7,dvts@best_of_8,rap_5")
    asked = [replace(problem, answer="1") for problem in PROBLEMS[:3]]

    def run_all(store: RowStore) -> list[Row]:
        with AnswerChecker() as checker:
            for job in plan_jobs(names, bench, {}, lambda name: compute_mean_flops(store.read(), name)):
                run_job(job, asked, store, checker)
        rows = [replace(row, seconds=0.0, reward_by_round=[]) for row in store.read()]
        return [replace(row, reward=round(row.reward, 6)) for row in rows]

    rows = run_all(whole := RowStore(tmp_path / "whole", "run"))
    assert len(rows) == len(names) * len(asked) * 2
    assert {row.stop_reason for row in rows if "@" in row.method} == {"max_flops"}
    lines = whole.path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = RowStore(tmp_path / "cut", "run").path
    cut.write_text("".join(lines[: len(lines) * 2 // 3]) + lines[-1][:20], encoding="utf-8")
    assert run_all(RowStore(tmp_path / "cut", "run")) == rows
    flops = {name: compute_mean_flops(whole.read(), name) for name in names}
    assert 0.75 < flops["dvts@best_of_8"] / flops["best_of_8"] < 1.05
    direct = run("rap", bench.policy, bench.reward, asked, seed=1)
    found = [row.reward for row in rows if (row.method, row.seed) == ("rap_5", 1)]
    assert found == pytest.approx([trace.reward for trace in direct], abs=1e-6)


@pytest.mark.parametrize(
    "name", ["beam_search", "tot_0", "rap@0", "dvts_4@0.5", "sft_tot_4", "mcts_4", "rap@best_of_0"]
)
def test_names_that_mean_nothing(name: str) -> None:
    worlds.refused(lambda: parse_methods(name), f"unknown method {name!r}")


def test_names_that_mean_something(bench: EvaluationSetup) -> None:
    names = ["best_of_4", "weighted_best_of_4", "beam_search_8", "dvts@0.5", "tot_4", "rap@best_of_4", "control"]
    assert sort_methods(reversed(names)) == names
    assert Method.parse("beam_search_8") == Method("beam_search", n=8) and Method.parse("rap@best_of_4").size == 0.25
    worlds.refused(lambda: parse_methods("dvts@0.5"), "add best_of_16")
    assert [get_max_selection_size([name]) for name in ("tot_40", "dvts@0.5", "rap@best_of_4", "greedy")] == [
        40,
        8,
        4,
        1,
    ]
    assert get_baseline_settings(["greedy", "nabla"], bench) == {}
    assert get_baseline_settings(["rap_2"], bench) == {"step_search": STEPS.get_settings("")}
    for broken in (
        replace(bench, baseline_config=replace(STEPS, step_delimiter="x")),
        replace(bench, policy=replace(bench.policy, backend=SimpleNamespace(supports_should_stop=False))),
    ):
        check_methods(["nabla"], broken, {})
        worlds.refused(lambda broken=broken: check_methods(["rap_2"], broken, {}), "step")
        worlds.refused(lambda broken=broken: get_baseline_settings(["rap_2"], broken), "step")
