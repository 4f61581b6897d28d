"""Votes without a reward, against the authors' formulas: what they read, what they charge, and whom they choose."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import worlds
from scipy.stats import beta

from nabla_trl.baselines import confidence
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.sampling import PooledResponse, PoolEntry, ResponsePool, draw_pool
from nabla_trl.baselines.votes import (
    STATISTICS_VOTES,
    VOTES,
    compute_lead_probability,
    compute_majority_probability,
    count_responses_in_budget,
    count_responses_to_read,
    vote_in_pool,
)
from nabla_trl.evaluation.method import VOTE_METHODS, Method, parse_methods
from nabla_trl.evaluation.plan import EvaluationSetup, check_methods
from nabla_trl.grading.voting import vote
from nabla_trl.models.flops import Cost, FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import compute_distribution_statistics
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem

WINDOWS = BaselineConfig(confidence_top_k=5, confidence_window=3, deepconf_keep=0.5, deepconf_warmup=4)


@pytest.fixture(scope="module")
def pool(policy: Policy) -> ResponsePool:
    problems = [Problem(id=f"p{number}", question=text) for number, text in enumerate(("1+2", "7", "12-3"))]
    sampling = Sampling(max_new_tokens=6)
    return draw_pool(problems, 12, policy=policy, reward=None, sampling=sampling, seed=3, statistics_top_k=5)


def response(answer: str | None, confidences: list[float] = [1.0], certainty: float = 0.0) -> PooledResponse:  # noqa: B006
    """A response whose tokens have these confidences."""
    statistics = torch.tensor([[-value, certainty, 0.0] for value in confidences])
    return PooledResponse([1] * len(confidences), math.nan, answer, -1.0, Cost(), Cost(), statistics)


# --- adaptive consistency -------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (4, 0), (7, 3), (20, 19), (40, 5)])
def test_the_probability_of_a_majority_is_that_of_the_beta_distribution(first: int, second: int) -> None:
    assert compute_majority_probability([first, second]) == pytest.approx(beta.sf(0.5, first + 1, second + 1))


@pytest.mark.parametrize(("first", "second"), [(700, 650), (900, 899), (3000, 2950)])
def test_many_votes_neither_overflow_nor_vanish(first: int, second: int) -> None:
    expected = pytest.approx(beta.sf(0.5, first + 1, second + 1), abs=1e-4)
    assert compute_majority_probability((first, second)) == expected
    assert compute_lead_probability((first, second)) == expected


@pytest.mark.parametrize("votes", [[1], [5], [4, 2], [3, 2, 2], [6, 3, 1, 1], [200, 180, 5]])
def test_the_probability_of_a_lead_is_that_of_the_dirichlet_distribution(votes: list[int]) -> None:
    parameters = np.array([*votes, 0] if len(votes) == 1 else votes) + 1
    draws = np.random.default_rng(0).dirichlet(parameters, size=200_000)
    assert compute_lead_probability(tuple(votes)) == pytest.approx((draws.argmax(1) == 0).mean(), abs=4e-3)
    if len(votes) < 3:  # then it is the Beta criterion, as in the authors' code
        assert compute_lead_probability(tuple(votes)) == pytest.approx(compute_majority_probability(votes), abs=1e-4)


@pytest.mark.parametrize(
    ("answers", "num_read"),
    [
        (["1"] * 9, 4),  # 1 - 2**-5 > 0.95
        (["1", "2", "1", "1", "1", "1", "1", "1"], 7),  # six to one
        (["1", "2"] * 4, 8),  # never safe
        ([None, None, "1", "1", "1", "1"], 6),
        ([None] * 3, 3),
        ([], 0),
    ],
)
def test_reading_stops_once_the_lead_is_safe(answers: list[str | None], num_read: int) -> None:
    assert count_responses_to_read(answers, compute_majority_probability) == num_read
    assert count_responses_to_read(answers, compute_lead_probability) == num_read


def test_many_rare_answers_keep_the_dirichlet_criterion_reading() -> None:
    answers = ["1", "2", "3", "4", "5", "6", *["1"] * 12]
    first, second = (
        count_responses_to_read(answers, rule) for rule in (compute_majority_probability, compute_lead_probability)
    )
    assert first < second < len(answers)


# --- confidence -----------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_authors_formulas(policy: Policy, pool: ResponsePool) -> None:
    """… from a plain forward pass: vLLM's top-k means (DeepConf), KL from uniform (self-certainty), entropy."""
    allowed = ~policy.forbidden_mask
    for entry in pool.entries:
        for one in entry.responses[:3]:
            ids = torch.tensor([entry.prompt_ids + one.response_ids])
            logits = policy.model(input_ids=ids).logits[0, len(entry.prompt_ids) - 1 : -1].double()
            every = logits.log_softmax(-1)
            logp = every[:, allowed]
            expected = [
                [
                    float(top.values[allowed[top.indices]].mean()),
                    float(-(row + math.log(len(row))).mean()),
                    float(-(row.exp() * row).sum()),
                ]
                for row, top in zip(logp, map(lambda one: one.topk(5), every), strict=True)
            ]
            assert one.get_statistics() == pytest.approx(np.array(expected), abs=1e-4)


def test_statistics_leave_out_impossible_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    forbidden = torch.tensor([True, False, False, False])
    [[top, certainty, entropy]] = compute_distribution_statistics(logits, forbidden, 3).tolist()
    one, two = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)[1:].tolist()
    assert top == pytest.approx((one + two) / 2)
    assert certainty == pytest.approx(-(one + two) / 2 - math.log(2))
    assert entropy == pytest.approx(-(one * math.exp(one) + two * math.exp(two)))


def test_groups_are_sliding_windows() -> None:
    """As `compute_least_grouped` of the authors' code, and the 10% lowest and the last ones of the paper."""
    values = np.array([4.0, 1.0, 1.0, 4.0, 7.0])
    assert confidence.compute_group_confidence(values, 2).tolist() == [2.5, 1.0, 2.5, 5.5]
    assert confidence.compute_group_confidence(values, 9).tolist() == [3.4]
    assert confidence.compute_lowest_group_confidence(values, 2) == 1.0
    assert confidence.compute_bottom_group_confidence(np.arange(21.0), 2) == pytest.approx(np.mean([0.5, 1.5]))
    assert confidence.compute_tail_confidence(values, 2) == 5.5
    assert confidence.find_early_stop(values, 2, 2.0) == 3
    assert confidence.find_early_stop(values, 2, 0.5) is None and confidence.find_early_stop(values, 9, 9.0) is None


def test_deepconf_filters_and_weighs_by_confidence() -> None:
    """Three responses are less confident than the other two, so they do not vote; then the weights decide."""
    responses = [response("7", [1.0, 1.0, 1.0])] * 3 + [response("8", [1.0, 3.0, 3.0]), response("9", [9.0, 2.0, 2.0])]
    config = replace(WINDOWS, confidence_window=2, deepconf_keep=0.4)
    assert VOTES["deepconf_tail"](responses, config).chosen == 3
    assert (
        VOTES["deepconf_bottom"](responses, config).chosen == 3
        and VOTES["self_consistency"](responses, config).chosen == 0
    )
    assert VOTES["deepconf_tail"](responses, replace(config, deepconf_keep=1.0)).chosen == 0
    without_answer = [replace(one, answer=None) for one in responses]
    assert VOTES["deepconf_tail"](without_answer, config).chosen == 3


def test_deepconf_online_is_the_released_algorithm() -> None:
    """Threshold: a percentile of the warm-up's lowest groups. Later responses end at the first group below it."""
    warmup = [response("7", [2.0, value, value]) for value in (1.0, 2.0, 3.0, 4.0)]
    later = [response("8", [5.0, 5.0, 0.0, 9.0, 9.0]), response("9", [9.0, 9.0, 9.0]), response("9", [9.0, 9.0, 9.0])]
    config = replace(WINDOWS, confidence_window=2, deepconf_keep=0.5, deepconf_warmup=4)
    lowest = [1.5, 2.0, 2.5, 3.0]  # of two-token groups, so the threshold is their 50th percentile
    assert float(np.percentile(lowest, 50)) == 2.25
    undecided = [*warmup[:3], replace(warmup[3], answer="9")]
    reading = VOTES["deepconf_online"]([*undecided, *later], config)
    # The response with answer 8 averages 2.5 over its second and third token, and the fourth and fifth are fine.
    assert reading.num_read == 7 and reading.stopped_lengths == {}
    strict = replace(config, deepconf_keep=0.25)
    reading = VOTES["deepconf_online"]([*undecided, *later], strict)  # 75th percentile: 2.625
    assert reading.stopped_lengths == {4: 3} and [*undecided, *later][reading.chosen].answer == "9"
    agreed = VOTES["deepconf_online"]([*warmup, *later], config)  # the warm-up agrees: nothing else is drawn
    assert (agreed.num_read, agreed.chosen) == (4, 2)


def test_self_certainty_gives_borda_votes() -> None:
    """N = 4 and p: the ranks have 4^p, 3^p, 2^p and 1 votes, as in the authors' code."""
    responses = [response("1", certainty=value) for value in (0.1, 0.2)]
    responses += [response("2", certainty=0.9), response("3", certainty=0.5)]
    assert VOTES["self_certainty"](responses, replace(WINDOWS, borda_power=0.0)).chosen == 0
    assert VOTES["self_certainty"](responses, replace(WINDOWS, borda_power=0.5)).chosen == 0  # 1 + √2 > 2
    assert VOTES["self_certainty"](responses, replace(WINDOWS, borda_power=2.0)).chosen == 2  # 16 > 9 > 5


def test_a_confidence_vote_weighs_answers_by_likelihood_per_token(pool: ResponsePool) -> None:
    for entry, trace in zip(pool.entries, vote_in_pool(pool, "confidence_vote", 8), strict=True):
        responses = entry.responses[:8]
        winners = vote([one.answer for one in responses], [one.mean_logp for one in responses])
        if winners:
            assert trace.response_ids == responses[winners[0]].response_ids
    softmax = BaselineConfig(confidence_temperature=0.01)
    sure = [replace(response("1"), mean_logp=-0.5)] * 3 + [replace(response("2"), mean_logp=-0.1)]
    assert VOTES["confidence_vote"](sure, BaselineConfig()).chosen == 0
    assert VOTES["confidence_vote"](sure, softmax).chosen == 3, "exp(0.9/0.01) outweighs three times exp(0.61/0.01)"


# --- costs ----------------------------------------------------------------------------------------------


def test_every_method_charges_what_it_reads(policy: Policy, pool: ResponsePool) -> None:
    for name in VOTES:
        for entry, trace in zip(pool.entries, vote_in_pool(pool, name, 12, config=WINDOWS), strict=True):
            assert trace.error is None and trace.method == f"{name}_12"
            reading = VOTES[name](entry.responses, WINDOWS)
            tokens = sum(
                reading.stopped_lengths.get(index, len(one.response_ids))
                for index, one in enumerate(entry.responses[: reading.num_read])
            )
            assert trace.cost.tokens == {"policy/prefill": len(entry.prompt_ids) - 1, "policy/decode": tokens}
            counter = FlopCounter()
            for index, one in enumerate(entry.responses[: reading.num_read]):
                length = reading.stopped_lengths.get(index, len(one.response_ids))
                counter.add_flops("all", policy.size, "decode", len(entry.prompt_ids) - 1, length)
            expected = counter.get_cost("all").flops + entry.policy_prefill_cost.flops
            assert trace.cost.flops == pytest.approx(expected)


def test_only_what_was_read_is_charged(pool: ResponsePool) -> None:
    entry = pool.entries[0]
    agreed = replace(pool, entries=[replace(entry, responses=[replace(one, answer="7") for one in entry.responses])])
    for name in ("adaptive_consistency", "dirichlet_consistency"):
        [trace], [four] = (vote_in_pool(agreed, *which) for which in ((name, 12), ("self_consistency", 4)))
        assert (trace.response_ids, trace.cost.flops) == (four.response_ids, four.cost.flops)


@pytest.mark.parametrize("name", ["self_consistency", "deepconf_online", "adaptive_consistency"])
def test_a_budget_draws_while_another_response_is_expected_to_fit(name: str, policy: Policy) -> None:
    problems = [Problem(id=f"p{number}", question=text) for number, text in enumerate(("1+2", "7"))]
    sampling = Sampling(max_new_tokens=4)
    [whole, _] = draw_pool(problems, 9, policy=policy, reward=None, sampling=sampling, statistics_top_k=5).entries
    budget = whole.policy_prefill_cost.flops + sum(one.generation_cost.flops for one in whole.responses[:7])
    seen: Counter[str] = Counter()

    def count_missing(entry: PoolEntry) -> int:
        seen[entry.problem.id] += 1
        count = count_responses_in_budget(entry, name, WINDOWS, policy, budget)
        return int(count > len(entry.responses))

    pool = draw_pool(problems, 2, policy=policy, reward=None, sampling=sampling, statistics_top_k=5,
                     count_missing=count_missing)  # fmt: skip
    assert seen["p0"] >= 1
    [first, _] = pool.entries
    assert [one.response_ids for one in first.responses] == [
        one.response_ids for one in whole.responses[: len(first.responses)]
    ], "response i is the same in every pool"
    [trace, _] = vote_in_pool(pool, name, None, config=WINDOWS, max_flops=budget, method_name="x")
    mean = budget / 7
    assert trace.cost.flops < budget + 2 * mean
    if name == "self_consistency":
        assert trace.cost.flops > budget - 2 * mean


def test_the_methods_have_names() -> None:
    assert tuple(VOTES) == VOTE_METHODS and set(STATISTICS_VOTES) <= set(VOTES)
    names = [name + size for name in VOTES for size in ("_16", "@0.5", "@best_of_8")]
    for name in names:
        assert Method.parse(name).is_runnable and str(Method.parse(name)) == name
    assert not any(
        Method.parse(name).is_runnable for name in ("self_consistency", "deepconf_tail_4@0.5", "deepconf_4")
    )


def test_wrong_options_are_refused() -> None:
    for options in (
        {"confidence_top_k": 0},
        {"confidence_window": 0},
        {"deepconf_keep": 0.0},
        {"deepconf_warmup": 0},
        {"borda_power": -1.0},
        {"confidence_temperature": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            BaselineConfig(**options)


def test_votes_at_one_budget_share_a_pool_of_an_evaluation(policy: Policy, scalar_reward: Reward) -> None:
    votes = ["self_consistency@best_of_4", "deepconf_online@best_of_4", "self_certainty@best_of_4"]
    names = parse_methods(",".join(["best_of_4", "deepconf_tail_4", *votes]))
    config = SearchConfig(max_new_tokens=6, batch_size=4)
    setup = EvaluationSetup(policy, scalar_reward, config, (0,), baseline_config=WINDOWS)
    problems = [Problem(id=f"p{number}", question=text, answer="1") for number, text in enumerate(("1+2", "7"))]
    flops, methods, _ = worlds.run_plan(names, setup, problems)
    assert methods == [("best_of_4", "deepconf_tail_4"), tuple(votes)]
    assert 0.6 < flops["self_certainty@best_of_4"] / flops["best_of_4"] < 1.2
    assert flops["deepconf_tail_4"] < flops["best_of_4"], "no reward is charged"
    served = replace(policy, backend=SimpleNamespace(knows_distributions=False))
    with pytest.raises(ValueError, match=r"self_certainty@best_of_4 reads whole distributions.*vllm_url"):
        check_methods(names, replace(setup, policy=served), {})
