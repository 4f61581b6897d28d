"""Particles: resampling, annealing against its_hub, and samples of π^α against an enumerated world."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import worlds

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.particles import (
    Particle,
    compute_annealed_exponent,
    compute_effective_size,
    power_smc,
    resample,
    resample_particles,
)
from nabla_trl.baselines.step_tree import StepDrawing, StepNode, run_step_search
from nabla_trl.evaluation.method import POWER_SAMPLERS, Method, has_search, parse_methods
from nabla_trl.evaluation.plan import EvaluationSetup, check_methods, get_baseline_settings
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import build_power_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999])
def test_every_particle_is_drawn_as_often_as_its_weight_says_give_or_take_one(uniform: float) -> None:
    weights = [0.5, 0.0, 0.3, 0.15, 0.05]
    counts = Counter(resample([math.log(w) if w else -math.inf for w in weights], 10, uniform))
    assert sum(counts.values()) == 10 and counts[1] == 0
    for index, weight in enumerate(weights):
        assert math.floor(10 * weight - 1e-9) <= counts[index] <= math.ceil(10 * weight + 1e-9)


def test_the_mean_number_of_draws_is_proportional_to_the_weight() -> None:
    logs = [-1000.0, -1001.5, -999.0]
    total: Counter[int] = Counter()
    for number in range(1000):
        total.update(resample(logs, 3, (number + 0.5) / 1000))
    norm = sum(math.exp(log + 1000) for log in logs)
    for index, log in enumerate(logs):
        assert total[index] / 3000 == pytest.approx(math.exp(log + 1000) / norm, abs=2e-3)


def particle(log_weight: float, length: int = 0) -> Particle:
    return Particle(StepNode((), [0] * length, torch.zeros(0), "", False, None, []), log_weight)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_resampling_keeps_what_the_particles_say_on_average(exponent: float) -> None:
    """The mean over the random number of Σ w f is what it was before, whatever is resampled by."""
    population = [particle(log) for log in (-3.0, -1.0, -0.5, -2.0)]
    weights, number = np.zeros(4), {id(one.node): index for index, one in enumerate(population)}
    for uniform in (np.arange(4000) + 0.5) / 4000:
        for one in resample_particles(population, exponent, uniform):
            weights[number[id(one.node)]] += math.exp(one.log_weight) / 4000
    assert weights == pytest.approx([math.exp(one.log_weight) for one in population], rel=5e-3)


def test_annealing_is_that_of_its_hub() -> None:
    """T = max(1, N/ESS·(1 − progress)) below an ESS of half the particles, in the first half of the response."""
    assert compute_effective_size([math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]) == pytest.approx(1 / 0.3)
    tree: Any = SimpleNamespace(max_new_tokens=10)
    alone = [particle(0.0, 2), *[particle(-100.0, 2)] * 4]  # ESS/N = 0.2, progress 0.2: T = 4
    assert compute_annealed_exponent(alone, tree) == pytest.approx(1 / 4)
    assert compute_annealed_exponent([particle(one.log_weight, 5) for one in alone], tree) == 1.0
    assert compute_annealed_exponent([particle(-float(i) / 10, 2) for i in range(5)], tree) == 1.0


# --- π^α ------------------------------------------------------------------------------------------------

ALPHA, LENGTH, COUNT = 4.0, 3, 100


@pytest.fixture(scope="module")
def small() -> Policy:
    tokens = ["1", "2", worlds.PAD, worlds.USER, worlds.ASSISTANT, worlds.END, worlds.UNK]
    return worlds.tiny_policy(tokenizer=worlds.char_tokenizer(tokens), dtype=torch.float64)


@pytest.fixture(scope="module")
def target(small: Policy) -> dict[tuple[int, ...], float]:
    """All responses of at most three tokens with their share of π^4."""
    prompt = small.encode(Problem(id="p", question="12"))
    drawable = [index for index in range(len(small.forbidden_mask)) if not small.forbidden_mask[index]]
    going = [index for index in drawable if index not in small.stop_ids]
    [stop] = small.stop_ids
    responses = [(*head, stop) for size in range(LENGTH) for head in product(going, repeat=size)]
    responses += list(product(going, repeat=LENGTH))
    shares = {}
    for response in responses:
        logits = small.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)
        allowed = logp.masked_fill(small.forbidden_mask, -torch.inf).log_softmax(-1)
        rows, ids = torch.arange(len(response)), torch.tensor(response)
        # The power reward is (α − 1)·log π of the model, on top of samples from π over the tokens that can be drawn.
        shares[response] = math.exp(float(allowed[rows, ids].sum() + (ALPHA - 1) * logp[rows, ids].sum()))
    total = sum(shares.values())
    return {response: share / total for response, share in shares.items()}


def total_variation(counts: Counter[tuple[int, ...]], target: dict[tuple[int, ...], float]) -> float:
    assert set(counts) <= set(target)
    return 0.5 * sum(abs(counts[response] / counts.total() - share) for response, share in target.items())


def noise_floor(target: dict[tuple[int, ...], float], samples: int) -> float:
    shares, rng = np.array(list(target.values())), np.random.default_rng(0)
    drawn = rng.multinomial(samples, shares, size=50) / samples
    return float(0.5 * np.abs(drawn - shares).sum(1).mean())


def run_smc(policy: Policy, size: int | None, count: int, **options: Any) -> Counter[tuple[int, ...]]:
    max_flops = options.pop("max_flops", 0.0)
    config = BaselineConfig(**{"power_alpha": ALPHA, "power_select": "sample", "smc_block_tokens": 1, **options})
    traces = run_step_search(
        [Problem(id=f"p{number}", question="12") for number in range(count)],
        method=power_smc,
        size=size,
        policy=policy,
        reward=build_power_reward(policy, ALPHA, "power:4"),
        sampling=Sampling(1 / ALPHA, max_new_tokens=LENGTH),
        step_config=config,
        method_name="power_smc",
        max_flops=max_flops,
        drawing=StepDrawing(is_power_sampling=True),
    )
    assert all(trace.error is None for trace in traces)
    assert {name for trace in traces for name in trace.cost.tokens} == {"policy/prefill", "policy/decode"}
    return Counter(tuple(trace.response_ids) for trace in traces)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"smc_ramp_tokens": 3, "smc_ess_threshold": 1.0},
        pytest.param({"smc_ess_threshold": 1.0}, marks=pytest.mark.slow),
        pytest.param({"smc_block_tokens": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_power_smc_samples_the_power_of_the_policy(
    options: dict[str, Any], small: Policy, target: dict[tuple[int, ...], float]
) -> None:
    assert total_variation(run_smc(small, 24, COUNT, **options), target) < 1.5 * noise_floor(target, COUNT)


def test_one_particle_is_a_sample_at_a_low_temperature_and_not_of_the_power(
    small: Policy, target: dict[tuple[int, ...], float]
) -> None:
    """The gap that the particles close."""
    assert total_variation(run_smc(small, 1, COUNT), target) > 3 * noise_floor(target, COUNT)


@pytest.mark.slow
def test_populations_at_a_budget_are_joined_by_their_evidence(
    small: Policy, target: dict[tuple[int, ...], float]
) -> None:
    """A first population of one particle and one of what fits. Unweighted, the first would be half of the result."""
    budget = 25 * 3.5 * small.size.compute_forward_flops(8, 1)
    found = run_smc(small, None, COUNT, max_flops=budget)
    assert total_variation(found, target) < 1.5 * noise_floor(target, COUNT)


def test_the_vote_of_a_population_returns_its_heaviest_answer(small: Policy) -> None:
    counts = run_smc(small, 8, 10, power_select="vote")
    assert len(counts) < 6, "most populations agree"


# --- in an evaluation -----------------------------------------------------------------------------------


def test_samplers_of_one_target_run_side_by_side_at_equal_flops(policy: Policy, scalar_reward: Reward) -> None:
    budgets = [f"{name}@best_of_4" for name in (*POWER_SAMPLERS, "power_uniform", "power_gradient")]
    names = parse_methods(",".join(["best_of_4", "low_temperature_1", "low_temperature_3", "power_smc_3", *budgets]))
    config = SearchConfig(max_new_tokens=6, batch_size=4, max_rounds=3)
    setup = EvaluationSetup(policy, scalar_reward, config, (0,))
    problems = [Problem(id=f"p{number}", question=text, answer="1") for number, text in enumerate(("1+2", "7"))]
    flops, jobs, traces = worlds.run_plan(names, setup, problems)
    assert ("low_temperature_1", "low_temperature_3") in jobs, "one pool"
    assert all(0.5 < flops[name] / flops["best_of_4"] < 1.25 for name in budgets), flops
    assert flops["low_temperature_1"] < flops["low_temperature_3"] < flops["best_of_4"]
    assert not any("reward" in name for one in traces if one.method != "best_of_4" for name in one.cost.tokens)
    assert get_baseline_settings(budgets, setup)["power"]["power_alpha"] == "4.0"


def test_what_a_sampler_of_the_power_cannot_do_is_refused(policy: Policy, scalar_reward: Reward) -> None:
    assert not has_search(["power_uniform", "power_smc_4"]) and has_search(["power_uniform", "nabla"])
    for name in ("power_smc", "low_temperature", "power_uniform_4", "sft_power_smc_4"):
        assert not Method.parse(name).is_runnable
    single = BaselineConfig(power_select="sample")
    setup = EvaluationSetup(policy, scalar_reward, SearchConfig(max_new_tokens=6), (0,), baseline_config=single)
    check_methods(["power_uniform", "power_smc_4"], setup, {})
    worlds.refused(lambda: check_methods(["best_of_2", "power_jump@best_of_2"], setup, {}), "biased", "max_rounds")
    served = replace(setup, policy=replace(policy, backend=SimpleNamespace(knows_distributions=False)))
    worlds.refused(lambda: check_methods(["power_smc_4"], served, {}), "power_smc_4", "vllm_url")
    for options in (
        {"power_alpha": 1.0},
        {"power_select": "all"},
        {"smc_ess_threshold": 2.0},
        {"smc_ramp_tokens": -1},
        {"smc_block_tokens": 0},
        {"particle_potential": "sum"},
    ):
        worlds.refused(lambda options=options: BaselineConfig(**options), next(iter(options)))
