"""Best-of-N, self-consistency and greedy over one pool."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import worlds

from nabla_trl.baselines import sampling
from nabla_trl.baselines.votes import vote_in_pool
from nabla_trl.evaluation.method import parse_methods
from nabla_trl.evaluation.plan import EvaluationSetup, plan_jobs
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.flops import Cost, FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.rewards.loading import build_power_reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search

SAMPLING = Sampling(max_new_tokens=8)


def pool(problems, count, policy, reward, **kwargs):
    return sampling.draw_pool(problems, count, policy=policy, reward=reward, sampling=SAMPLING, **kwargs)


def ids(made):
    return [[draw.response_ids for draw in entry.responses] for entry in made.entries]


def test_a_smaller_pool_is_a_prefix_whatever_the_batch(problems, policy, reward):
    large = pool(problems, 6, policy, reward, seed=3)
    small = pool(list(reversed(problems)), 2, policy, reward, seed=3, batch_size=3)
    assert ids(small)[::-1] == [row[:2] for row in ids(large)]
    assert ids(pool(problems, 6, policy, reward, seed=4)) != ids(large)


def test_draws_of_one_problem_differ(problems, policy, reward):
    for row in ids(pool(problems, 6, policy, reward)):
        assert len(set(map(tuple, row))) > 1


def test_best_of_n_is_the_highest_reward_among_the_first_n(problems, policy, reward):
    made = pool(problems, 5, policy, reward)
    for count in (1, 3, 5):
        for entry, trace in zip(made.entries, sampling.select_best_of_n(made, count), strict=True):
            assert trace.method == f"best_of_{count}"
            assert trace.reward == max(draw.reward for draw in entry.responses[:count])
            assert trace.response_ids in [
                draw.response_ids for draw in entry.responses[:count] if draw.reward == trace.reward
            ]


def test_a_likelihood_of_the_policy_itself_costs_nothing(problems, policy):
    """Drawing has read the prompt and knows the likelihood of every response, so neither is computed again."""
    power = build_power_reward(policy, 3.0, "power:3")
    for entry in pool(problems, 3, policy, power).entries:
        assert entry.reward_prefill_cost.flops == 0
        for draw in entry.responses:
            assert draw.scoring_cost.flops == 0
            fresh = [Sample(entry.problem, entry.prompt_ids, draw.response_ids)]
            caches = power.compute_prompt_caches(fresh, FlopCounter())
            assert draw.reward == pytest.approx(power.score(fresh, caches, flop_counter=FlopCounter())[0][0], abs=1e-4)


def test_recorded_rewards_are_those_of_the_responses(problems, policy, reward):
    made = pool(problems, 3, policy, reward)
    for trace, problem in zip(sampling.select_best_of_n(made, 3), problems, strict=True):
        fresh = [Sample(problem, trace.prompt_ids, trace.response_ids)]
        values, _ = reward.score(fresh, reward.compute_prompt_caches(fresh, FlopCounter()), flop_counter=FlopCounter())
        assert trace.reward == pytest.approx(values[0], abs=1e-4)


def test_cost_adds_up_and_best_of_1_pays_for_no_reward(problems, policy, reward):
    made = pool(problems, 4, policy, reward)
    one, four = sampling.select_best_of_n(made, 1), sampling.select_best_of_n(made, 4)
    for entry, single, several in zip(made.entries, one, four, strict=True):
        drawn = sum(len(draw.response_ids) for draw in entry.responses)
        assert set(single.cost.tokens) == {"policy/prefill", "policy/decode"}
        assert single.cost.tokens["policy/decode"] == len(entry.responses[0].response_ids)
        assert several.cost.tokens["policy/decode"] == drawn
        assert several.cost.tokens["policy/prefill"] == len(entry.prompt_ids) - 1
        parts = [entry.policy_prefill_cost, entry.reward_prefill_cost]
        parts += [cost for draw in entry.responses for cost in (draw.generation_cost, draw.scoring_cost)]
        assert several.cost.flops == pytest.approx(sum(parts, Cost()).flops)
        assert single.cost.flops < several.cost.flops


def test_self_consistency_takes_the_commonest_answer(problems, policy, reward):
    made = pool(problems, 9, policy, reward, seed=1)
    for entry, trace in zip(made.entries, vote_in_pool(made, "self_consistency", 9), strict=True):
        votes = Counter(normalize_answer(draw.answer) for draw in entry.responses if draw.answer is not None)
        assert votes, "the world gives answers"
        assert votes[normalize_answer(trace.answer)] == max(votes.values())
        assert not any(name.startswith("re") for name in trace.cost.tokens)


def test_greedy_takes_the_likeliest_tokens(problems, policy, reward):
    for trace in sampling.decode_greedily(problems, policy=policy, reward=reward, max_new_tokens=8):
        ids = torch.tensor([trace.prompt_ids + trace.response_ids])
        logits = policy.model(input_ids=ids).logits[0].masked_fill(policy.forbidden_mask, -torch.inf)
        begin = len(trace.prompt_ids) - 1
        assert trace.response_ids == logits[begin:-1].argmax(-1).tolist()


def test_the_first_draw_is_the_start_of_the_search(problems, policy, reward):
    """Best-of-1 and the reasoner begin alike, so that their comparison is paired."""
    config = SearchConfig(solver="none", max_rounds=1, max_new_tokens=8)
    traces = run_search(problems, policy=policy, reward=reward, config=config, seed=5)
    single = sampling.select_best_of_n(pool(problems, 2, policy, reward, seed=5), 1)
    assert [trace.initial_ids for trace in traces] == [trace.response_ids for trace in single]


def test_without_a_reward_only_votes_and_samples_work(problems, policy):
    made = pool(problems, 2, policy, None)
    assert all(trace.error is None for trace in vote_in_pool(made, "self_consistency", 2))
    assert all("gave nan" in trace.error for trace in sampling.select_best_of_n(made, 2))


def test_a_problem_that_cannot_run_is_an_error_row_beside_the_others(problems, policy, reward):
    bad = replace(problems[1], question="?" * 3)
    made = pool([problems[0], bad, problems[2]], 2, policy, reward)
    traces = sampling.select_best_of_n(made, 2)
    assert [trace.error is None for trace in traces] == [True, False, True]
    assert "does not know" in traces[1].error
    assert math.isnan(traces[1].reward)
    good = pool([problems[0], problems[2]], 2, policy, reward)
    assert [traces[0].response_ids, traces[2].response_ids] == [
        t.response_ids for t in sampling.select_best_of_n(good, 2)
    ]


def test_prompts_are_read_once(policy, reward):
    problem = worlds.tiny_problems()[:1]
    entry = pool(problem, 6, policy, reward).entries[0]
    assert entry.policy_prefill_cost.tokens == {"policy/prefill": len(entry.prompt_ids) - 1}
    assert all("policy/prefill" not in draw.generation_cost.tokens for draw in entry.responses)


def test_a_reference_that_drew_the_response_is_not_asked_again(problems, policy, logratio_reward):
    """Its likelihood is known from drawing: the same reward, at the cost of the other model alone."""
    made = pool(problems, 2, policy, logratio_reward)
    for entry in made.entries:
        for draw in entry.responses:
            afresh = [Sample(entry.problem, entry.prompt_ids, draw.response_ids)]
            values, _ = logratio_reward.score(
                afresh, logratio_reward.compute_prompt_caches(afresh, FlopCounter()), flop_counter=FlopCounter()
            )
            assert draw.reward == pytest.approx(values[0], abs=1e-4)
            assert set(draw.scoring_cost.tokens) == {"reward/forward"}


def test_what_another_policy_showed_does_not_count(problems, policy, logratio_reward):
    other = worlds.tiny_policy(seed=7)
    made = pool(problems, 1, other, logratio_reward)
    for entry in made.entries:
        assert set(entry.responses[0].scoring_cost.tokens) == {"reward/forward", "reference/forward"}


def test_a_reward_that_fails_costs_only_the_methods_that_need_it(problems, policy, scalar_reward, monkeypatch):
    monkeypatch.setattr(
        type(scalar_reward),
        "score",
        lambda self, samples, memos, **_: ([math.nan] * len(samples), [[] for _ in samples]),
    )
    made = pool(problems, 2, policy, scalar_reward)
    for single, several in zip(sampling.select_best_of_n(made, 1), sampling.select_best_of_n(made, 2), strict=True):
        assert single.error is None and math.isnan(single.reward)
        assert "gave nan" in several.error
        assert several.cost.flops > single.cost.flops, "work that came to nothing is paid for"


def test_a_rival_of_another_vocabulary_is_only_drawn_from(problems, policy):
    shuffled, new_ids = worlds.permuted_tokenizer(policy.tokenizer)
    model = worlds.permuted_model(worlds.tiny_model(seed=2), new_ids, len(shuffled) + 6)
    rival = worlds.freeze_policy(model, shuffled, "rival")
    reward = worlds.build_log_ratio_reward(policy, rival, policy, "ratio")
    bench = EvaluationSetup(policy, reward, SearchConfig(max_new_tokens=8), (0,))
    (step,) = plan_jobs(["reward_model_sampling"], bench, {}, lambda method: 0.0)
    for trace in step.run(problems, 0):
        assert trace.error is None and trace.method == "reward_model_sampling"
        assert trace.prompt_ids == rival.encode(next(p for p in problems if p.id == trace.problem_id))


# --- weighted best-of-N -----------------------------------------------------------------------------------


def made_pool(policy, *written, problem=None):
    """A pool of one problem whose responses and rewards are given; each costs another number of FLOPs."""
    problem = problem or worlds.tiny_problems()[0]
    draws = []
    for number, (text, reward) in enumerate(written):
        ids = worlds.sample(policy, problem, text).response_ids
        answer = extract_answer(policy.decode(ids))
        cost = [Cost(flops=10.0**number), Cost(flops=2 * 10.0**number)]
        draws.append(sampling.PooledResponse(ids, reward, answer, -1.0, *cost))
    entry = sampling.PoolEntry(problem, policy.encode(problem), draws, Cost(flops=0.25), Cost(flops=0.5))
    return sampling.ResponsePool(policy, "r", 0, "h", [entry])


def chosen(made, count, beta=1.0):
    (trace,) = sampling.select_weighted_best_of_n(made, count, beta)
    assert trace.error is None and trace.method == f"weighted_best_of_{count}"
    return made.policy.decode(trace.response_ids), trace.reward


MAJORITY_WRONG = (("1+2=4#4", -1.0), ("3#3", 2.0), ("4#4", -0.5), ("1+2=3#3", 2.5), ("2+2=4#4", -2.0))
REWARDS_WRONG = (("3#3", 0.6), ("1+2=3#3", 0.9), ("4#4", 1.0), ("1+2=3;#3", 0.8))


def test_a_few_responses_of_high_reward_outweigh_a_majority(policy):
    made = made_pool(policy, *MAJORITY_WRONG)
    assert chosen(made, 5) == ("1+2=3#3", 2.5)
    assert vote_in_pool(made, "self_consistency", 5)[0].answer == "4"
    assert chosen(made, 1) == ("1+2=4#4", -1.0)  # a plain sample


def test_a_majority_outweighs_one_response_of_the_highest_reward(policy):
    made = made_pool(policy, *REWARDS_WRONG)
    assert chosen(made, 4) == ("1+2=3#3", 0.9)
    assert sampling.select_best_of_n(made, 4)[0].answer == "4"
    assert chosen(made, 3) == ("1+2=3#3", 0.9)  # e^0.6 + e^0.9 > e^1


def test_negative_rewards_do_not_favour_what_is_rare(policy):
    """A plain sum of rewards would: −3 against −2 − 2."""
    made = made_pool(policy, ("4#4", -3.0), ("3#3", -2.0), ("1+2=3#3", -2.0))
    assert chosen(made, 3) == ("3#3", -2.0)


@pytest.mark.parametrize("written", [MAJORITY_WRONG, REWARDS_WRONG])
def test_only_differences_in_units_of_beta_count(policy, written):
    count = len(written)
    wanted = chosen(made_pool(policy, *written), count)[0]
    for shift, scale in ((1e4, 1.0), (-1e4, 1.0), (0.0, 1e-3), (7.0, 50.0)):
        moved = [(text, scale * reward + shift) for text, reward in written]
        assert chosen(made_pool(policy, *moved), count, beta=scale)[0] == wanted


@pytest.mark.parametrize("written", [MAJORITY_WRONG, REWARDS_WRONG])
def test_between_best_of_n_and_self_consistency(policy, written):
    made, count = made_pool(policy, *written), len(written)
    cold, hot = (sampling.select_weighted_best_of_n(made, count, beta)[0] for beta in (1e-6, 1e6))
    assert cold.response_ids == sampling.select_best_of_n(made, count)[0].response_ids
    assert hot.answer == vote_in_pool(made, "self_consistency", count)[0].answer
    assert cold.answer != hot.answer


def test_the_answer_is_the_likeliest_under_the_tilted_policy(policy):
    """Against the definition: a pool that holds responses as often as π draws them."""
    counts = {"3#3": 5, "1+2=3#3": 1, "4#4": 4, "5#5": 1}
    rewards = {"3#3": 0.1, "1+2=3#3": 0.3, "4#4": 1.2, "5#5": 1.9}
    made = made_pool(policy, *[(text, rewards[text]) for text, many in counts.items() for _ in range(many)])
    winners = set()
    for beta in (0.2, 0.5, 1.0, 2.0, 5.0):
        tilted: Counter[str] = Counter()
        for text, many in counts.items():
            tilted[text[-1]] += many * math.exp(rewards[text] / beta)
        winner = max(tilted, key=tilted.__getitem__)
        assert chosen(made, 11, beta)[0][-1] == winner
        winners.add(winner)
    assert len(winners) == 3


def test_ties_go_to_what_was_seen_first(policy):
    made = made_pool(policy, ("4#4", 1.0), ("1+2=3#3", 1.0), ("3#3", 1.0), ("2+2=4#4", 1.0))
    assert chosen(made, 2) == chosen(made, 4) == ("4#4", 1.0)
    assert chosen(made, 3) == ("1+2=3#3", 1.0)


def test_answers_are_those_of_self_consistency(policy):
    """Grouped after normalisation, however they are written."""
    made = made_pool(policy, ("#+3", 0.0), ("#4", 0.5), ("#3", 0.1))
    assert chosen(made, 3) == ("#3", 0.1)
    assert vote_in_pool(made, "self_consistency", 3)[0].response_ids == made.entries[0].responses[0].response_ids


def test_without_a_vote_the_highest_reward_counts(policy):
    made = made_pool(policy, ("a;b", 0.0), ("ab;cd", 3.0), ("a", -math.inf))
    assert all(draw.answer is None for draw in made.entries[0].responses)
    assert chosen(made, 3) == ("ab;cd", 3.0)
    assert chosen(made_pool(policy, ("3#3", -math.inf), ("ab;cd", 1.0)), 2) == ("ab;cd", 1.0)  # its answer is not read


def test_responses_without_an_answer_do_not_vote(policy):
    """… and a reward far above those that do leaves their weights apart."""
    made = made_pool(policy, ("ab;cd", 1e6), ("4#4", 0.0), ("3#3", 1.0))
    assert chosen(made, 3) == ("3#3", 1.0)


def test_rewards_that_are_not_finite(policy):
    unreadable = made_pool(policy, ("4#4", -math.inf), ("2+2=4#4", -math.inf), ("3#3", -1e9))
    assert chosen(unreadable, 3) == ("3#3", -1e9)
    endless = made_pool(policy, ("4#4", 5.0), ("3#3", math.inf), ("2+2=4#4", 5.0))
    assert policy.decode(sampling.select_weighted_best_of_n(endless, 3, 1.0)[0].response_ids) == "3#3"
    for bad, word in ((math.nan, "gave nan"), (-math.inf, "cannot read")):
        made = made_pool(policy, ("4#4", bad), ("3#3", bad))
        (weighted,), (best,) = sampling.select_weighted_best_of_n(made, 2, 1.0), sampling.select_best_of_n(made, 2)
        assert weighted.error == best.error and word in weighted.error
        assert weighted.cost == best.cost
    mixed = made_pool(policy, ("4#4", math.nan), ("3#3", 1.0))
    assert "gave nan" in sampling.select_weighted_best_of_n(mixed, 2, 1.0)[0].error


@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_costs_what_best_of_n_costs(problems, policy, reward, count):
    made = [made_pool(policy, *REWARDS_WRONG), pool(problems, 4, policy, reward)]
    for one in made:
        for weighted, best in zip(
            sampling.select_weighted_best_of_n(one, count, 1.0), sampling.select_best_of_n(one, count), strict=True
        ):
            assert weighted.cost == best.cost and weighted.cost.flops > 0


def test_it_reads_the_pool_of_the_others(problems, policy, reward):
    """One step for all methods of a pool, with the configuration's β."""
    names = ["best_of_2", "self_consistency_4", "weighted_best_of_4"]
    for beta in (1e-6, 1e6):
        bench = EvaluationSetup(policy, reward, SearchConfig(max_new_tokens=8, beta=beta), (0,))
        (step,) = plan_jobs(names, bench, {}, lambda: 0.0)
        assert step.methods == tuple(names)
        found = {trace.method: trace for trace in step.run(problems[:1], 3)}
        made = pool(problems[:1], 4, policy, reward, seed=3)
        (expected,) = sampling.select_weighted_best_of_n(made, 4, beta)
        assert found["weighted_best_of_4"].response_ids == expected.response_ids
        assert found["best_of_2"].response_ids == sampling.select_best_of_n(made, 2)[0].response_ids


@pytest.mark.parametrize("name", ["weighted_best_of", "weighted_best_of_0", "weighted_self_consistency_4"])
def test_names_that_mean_nothing(name):
    worlds.refused(lambda: parse_methods(name), f"unknown method {name!r}")
