"""Several chains per problem, fresh starts within a budget, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import worlds

from nabla_trl.baselines.sampling import draw_pool, select_best_of_n
from nabla_trl.evaluation.plan import EvaluationSetup, plan_jobs
from nabla_trl.evaluation.rows import build_row
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace


def config(**options: Any) -> SearchConfig:
    return worlds.search_config(**{"solver": "none", "max_new_tokens": 8, "max_rounds": 4, **options})


def moves(trace: Trace) -> list[tuple]:
    return [(r.round, r.position, r.new_token, r.suffix, r.accepted) for r in trace.revisions]


def test_starts_without_rounds_are_best_of_n(policy: Policy, reward: Reward, problems: list[Problem]) -> None:
    """The same responses under the same seed, the same choice, the same cost."""
    settings = config(num_starts=5, max_rollouts=5)
    pool = draw_pool(problems, 5, policy=policy, reward=reward, sampling=settings.get_sampling(), seed=7)
    traces = run_search(problems, policy=policy, reward=reward, config=settings, seed=7)
    for one, two in zip(traces, select_best_of_n(pool, 5), strict=True):
        assert (one.response_ids, one.stop_reason, one.revisions) == (two.response_ids, "max_rollouts", [])
        assert one.reward == pytest.approx(two.reward, abs=1e-4)
        assert one.cost.flops == pytest.approx(two.cost.flops)


@pytest.mark.parametrize(
    "options", [{"num_starts": 3, "num_chains": 2}, {"max_flops": 3e7, "max_rounds": 0, "patience": 2}], ids=str
)
def test_several_chains_in_a_batch_equal_singles(
    options: dict[str, Any], policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    settings = config(**{"solver": "mirror", "gradient_at": "hard", **options})
    run = {"policy": policy, "reward": scalar_reward, "seed": 2}
    together = run_search(problems, config=settings, **run)
    for problem, trace in zip(problems, together, strict=True):
        trace.validate()
        [single] = run_search([problem], config=replace(settings, batch_size=1), **run)
        assert moves(single) == moves(trace) and single.response_ids == trace.response_ids
        assert single.cost.flops == pytest.approx(trace.cost.flops)


def test_the_best_chain_is_kept_and_all_are_paid_for(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    run = {"policy": policy, "reward": scalar_reward, "seed": 4}
    one, two = (run_search(problems, config=config(num_starts=4, num_chains=chains), **run) for chains in (1, 3))
    for single, several in zip(one, two, strict=True):
        assert several.reward > single.reward - 1e-4  # the first chain is the same
        assert several.cost.flops > 1.5 * single.cost.flops
        assert len(several.revisions) == 4
    assert any(several.reward > single.reward + 1e-3 for single, several in zip(one, two, strict=True))


def test_a_budget_of_rollouts_counts_every_response(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    """… so many decoded tokens as responses and suffixes have, and no chain takes more than is left."""
    for chains in (1, 2, 3):
        settings = config(num_starts=3, num_chains=chains, max_rounds=0, max_rollouts=9, restarts=False)
        for trace in run_search(problems, policy=policy, reward=scalar_reward, config=settings):
            assert trace.stop_reason in ("max_rollouts", "exhausted")
            assert len(trace.revisions) <= (9 - 3 + chains - 1) // chains


def test_fresh_starts_spend_what_is_left_of_a_budget(policy: Policy, reward: Reward, problems: list[Problem]) -> None:
    settings = config(top_k_candidates=2, max_rounds=0, max_new_tokens=4, max_flops=4e7, patience=2)
    run = {"policy": policy, "reward": reward, "seed": 1}
    without, spent = (run_search(problems, config=replace(settings, restarts=again), **run) for again in (False, True))
    for one, two in zip(without, spent, strict=True):
        two.validate()
        assert two.reward >= one.reward and one.stop_reason in ("patience", "exhausted")
        assert one.cost.flops < two.cost.flops <= 4.8e7  # suffixes may be longer than the last ones
    assert sum(two.reward > one.reward for one, two in zip(without, spent, strict=True)) >= 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_starts_that_a_budget_cannot_pay_for_are_not_drawn(
    batch_size: int, policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    """The others are those of a search that can."""
    run = {"policy": policy, "reward": scalar_reward, "seed": 1}
    rich = run_search(problems, config=config(num_starts=12, max_flops=1e12, max_rollouts=12), **run)
    for trace in run_search(problems, config=config(num_starts=12, max_flops=4e6, batch_size=batch_size), **run):
        whole = next(one for one in rich if one.problem_id == trace.problem_id)
        assert whole.meta["starts"] == "12" and whole.cost.flops > 6e6
        assert 1 < int(trace.meta["starts"]) < 12 and 2.4e6 < trace.cost.flops < 5.2e6
        assert trace.error is None and trace.reward_initial <= whole.reward_initial + 1e-4


def test_what_all_chains_and_starts_did_is_counted(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    run = {"policy": policy, "reward": scalar_reward, "seed": 1}
    for trace in run_search(problems, config=config(num_starts=3, num_chains=2), **run):
        assert (trace.meta["starts"], trace.meta["proposals"]) == ("3", "8") and len(trace.revisions) == 4
    settings = config(top_k_candidates=2, max_rounds=0, max_new_tokens=4, max_rollouts=12, patience=2)
    for trace in run_search(problems, config=settings, **run):
        row = build_row(trace, "run")
        assert int(trace.meta["starts"]) > 1 and row.revisions <= row.proposals
        assert int(trace.meta["starts"]) + row.proposals == 12
        assert row.accepted <= row.proposals_accepted <= row.proposals


def test_a_preset_begins_anew_until_its_budget_is_spent(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    """By itself it is one response, scanned once."""
    bench = EvaluationSetup(policy, scalar_reward, config(max_new_tokens=4), (0,))
    [step] = plan_jobs(["paper"], bench, {}, lambda method: 0.0)
    [once] = step.run(problems[:1], 0)
    assert once.stop_reason in ("scanned", "max_rollouts") and once.meta["starts"] == "1"
    budget = 4 * once.cost.flops
    [step] = plan_jobs(["paper@best_of_16"], bench, {}, lambda method: budget)
    [again] = step.run(problems[:1], 0)
    assert int(again.meta["starts"]) > 1 and 0.6 * budget < again.cost.flops < 1.2 * budget


def test_a_sample_of_the_optimum_is_not_chosen_among_starts() -> None:
    assert config(max_flops=1e9).restarts_enabled and config(max_rollouts=9).restarts_enabled
    assert not config().restarts_enabled and not config(max_flops=1e9, restarts=False).restarts_enabled
    assert not config(max_rollouts=9, acceptance="metropolis", beta=1.0).restarts_enabled
    worlds.refused(
        lambda: config(max_flops=1e9, acceptance="metropolis"),
        "metropolis samples are biased",
        "limit it by max_rounds",
    )
    worlds.refused(lambda: config(max_rollouts=2, num_starts=3), "max_rollouts 2 is less", "num_starts 3")


def test_an_unreadable_start_is_no_error_while_another_can_be_read() -> None:
    template = "{% for m in messages %}{{ '#' + m['content'] + '<|end|>' }}{% endfor %}"
    policy = worlds.tiny_policy()
    tokens = [*worlds.CHARS, worlds.PAD, worlds.END, worlds.UNK]
    reward = worlds.tiny_scalar(policy, tokenizer=worlds.char_tokenizer(tokens, template=template))
    problems = worlds.tiny_problems([str(number) for number in range(16)])
    run = {"policy": policy, "reward": reward}
    single, several = (run_search(problems, config=config(num_starts=n, num_chains=n), **run) for n in (1, 4))
    assert sum(trace.error is not None for trace in single) > sum(trace.error is not None for trace in several)
    for trace in several:
        trace.validate()
        assert trace.error is None or "cannot read" in trace.error
