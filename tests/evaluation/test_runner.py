"""Rows: made once, kept through kills, the same whatever the batch."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import worlds

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.kl import compute_best_of_n_kl_bound
from nabla_trl.evaluation.plan import EvaluationSetup, check_methods, plan_jobs
from nabla_trl.evaluation.results import describe_failed_comparisons, list_extraction_differences
from nabla_trl.evaluation.rows import Row, RowStore, build_row, compute_reward_by_round
from nabla_trl.evaluation.runner import Evaluation, compute_mean_flops, run_job
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult
from nabla_trl.models.flops import Cost
from nabla_trl.report.html.viewer import TokenTable, iterate_traces
from nabla_trl.report.summary import summarize
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.shards import Shard
from nabla_trl.traces.build import build_error_trace, build_response_trace, grade_traces

CONFIG = SearchConfig(max_rounds=3, max_new_tokens=8, batch_size=2)


@pytest.fixture
def checker():
    with AnswerChecker() as one:
        yield one


@pytest.fixture
def asked(problems):
    return [replace(problem, answer=str(index)) for index, problem in enumerate(problems)]


@pytest.fixture
def bench(policy, scalar_reward):
    return EvaluationSetup(policy, scalar_reward, CONFIG, (0, 1))


def comparable(rows: list[Row]) -> list[Row]:
    """Rows without what differs from run to run; rewards to the precision of another batch's rounding."""
    return [
        replace(
            row,
            seconds=0.0,
            reward=round(row.reward, 4),
            reward_by_round=[round(value, 4) for value in row.reward_by_round],
        )
        for row in rows
    ]


def test_one_row_for_each_method_problem_and_seed(bench, asked, checker, tmp_path):
    store = RowStore(tmp_path, "run")
    for step in (
        bench.plan_greedy(),
        bench.plan_sample_pool(best_of=[1, 2], self_consistency=[2]),
        bench.plan_search("nabla", CONFIG),
    ):
        run_job(step, asked, store, checker)
    rows = store.read()
    assert len({row.key for row in rows}) == len(rows) == 4 + 3 * 8 + 8
    assert {row.method for row in rows} == {"greedy", "best_of_1", "best_of_2", "self_consistency_2", "nabla"}
    for row in rows:
        assert row.flops > 0 and row.correct in (True, False) and row.error is None
        assert row.reward_by_round[-1] == pytest.approx(row.reward)


def test_no_seed_has_to_be_the_first(bench, asked, checker, tmp_path):
    """The greedy decode is stored under the first seed that was asked for, and is not made again."""
    store = RowStore(tmp_path, "run")
    elsewhere = replace(bench, seeds=(3, 5))
    for step in (elsewhere.plan_greedy(), elsewhere.plan_sample_pool(best_of=[1])):
        assert run_job(step, asked, store, checker) and not run_job(step, asked, store, checker)
    assert {(row.method, row.seed) for row in store.read()} == {("greedy", 3), ("best_of_1", 3), ("best_of_1", 5)}


def test_samples_are_the_pool_that_others_choose_from(bench, asked, checker, tmp_path):
    store = RowStore(tmp_path, "run")
    bad = replace(asked[0], id="bad", question="?!")
    names = ["best_of_1", "best_of_4", "self_consistency_4", "samples_4"]
    for step in plan_jobs(names, bench, {}, lambda name: 0.0):
        run_job(step, [*asked, bad], store, checker)
    cells = {(row.method, row.problem, row.seed): row for row in store.read()}
    assert len(cells) == len(names) * 5 * 2
    for (method, problem, seed), row in cells.items():
        if method != "samples_4":
            continue
        if problem == "bad":
            assert row.error and row.samples == []
            continue
        first, best, voted = (cells[name, problem, seed] for name in names[:3])
        answers, verdicts = zip(*row.samples, strict=True)
        assert len(answers) == 4 and row.correct == sum(verdicts) / 4
        assert (first.answer, first.correct) == tuple(row.samples[0])
        assert [best.answer, best.correct] in row.samples
        assert voted.answer in answers
        assert row.flops == pytest.approx(voted.flops)  # neither reads the reward
    found = metrics.estimate_sample_metrics(store.read())
    shares = [row.correct or 0.0 for row in cells.values() if row.method == "samples_4"]
    assert found["avg@4.base"].value == pytest.approx(np.mean(shares))


def test_the_traces_of_the_main_search_are_kept_with_its_rows(bench, asked, checker, tmp_path):
    names = ["best_of_16", "nabla@0.5", "nabla", "control"]
    store, folder = RowStore(tmp_path / "rows", "run"), tmp_path / "held"
    kept = replace(bench, seeds=(0,), config=replace(CONFIG, max_rounds=1))
    for step in plan_jobs(names, kept, {}, lambda name: compute_mean_flops(store.read(), name)):
        run_job(step, asked[:3], store, checker, eval_traces_dir=folder)
    rows = {row.problem: row for row in store.read() if row.method == "nabla"}
    traces = list(iterate_traces(folder))
    assert {trace.problem_id for trace in traces} == set(rows) and len(traces) == 3
    for trace in traces:
        row = rows[trace.problem_id]
        assert (trace.method, trace.reward, trace.correct) == ("nabla", row.reward, row.correct)
    assert TokenTable.read(folder).matches(traces[0])


def test_rows_hold_both_verdicts_where_a_form_is_asked_for(policy, checker):
    texts = ["1+2=3;#3", "1+2=3", "1+2=3;#4", "=;"]
    problems = [
        Problem(f"q{n}", "1+2", "3", answer_format="hash", task_version="7", task="sums") for n in range(len(texts))
    ]
    problems.append(replace(problems[0], id="free", answer_format=None))
    problems.append(replace(problems[0], id="ungraded", answer=None))
    traces = []
    for problem, text in zip(problems, [*texts, *texts[:2]], strict=True):
        ids = worlds.sample(policy, problem, text).response_ids
        traces.append(traced(policy, problem, ids))
    traces.append(build_error_trace(replace(problems[0], id="failed"), "greedy", 0, "it failed", {}))
    rows = {row.problem: row for row in (build_row(trace, "run") for trace in grade_traces(traces, checker))}
    names = ("answer", "answer_strict", "correct", "correct_strict")
    assert [[getattr(rows[key], name) for name in names] for key in rows] == [
        ["3", "3", True, True],
        ["3", None, True, False],
        ["4", "4", False, False],
        [None, None, False, False],
        ["3", None, True, None],
        ["3", None, None, None],
        [None, None, False, False],
    ]
    assert {row.task_version for row in rows.values()} == {"7"}
    assert [key for key, row in rows.items() if row.tail is not None] == ["q1", "ungraded"]
    assert rows["q1"].tail == "1+2=3"
    assert [rows[key].match_result for key in ("q0", "q2", "q3", "ungraded")] == [
        "correct",
        "incorrect",
        "no_answer",
        "no_gold",
    ]
    assert [entry["problem"] for entry in list_extraction_differences(list(rows.values()))] == ["q1", "ungraded"]
    found = summarize([row for key, row in rows.items() if key.startswith("q")], {})
    assert found["accuracy.greedy"]["value"] == 0.5 and found["accuracy_strict.greedy"]["value"] == 0.25
    free = summarize([rows["free"]], {})
    assert "accuracy_strict.greedy" not in free


def test_comparisons_that_hang_or_crash_are_counted(policy, checker):
    class Lost(AnswerChecker):
        def check(self, pairs):
            return [[MatchResult.TIMEOUT, MatchResult.ERROR, MatchResult.CORRECT][n % 3] for n, _ in enumerate(pairs)]

    problems = [Problem(f"q{n}", "1+2", "3") for n in range(5)]
    traces = [traced(policy, one, worlds.sample(policy, one, "3").response_ids) for one in problems]
    rows = [build_row(trace, "run") for trace in grade_traces(traces, Lost())]
    assert [row.correct for row in rows] == [False, False, True, False, False]
    assert describe_failed_comparisons(rows) == (
        "Of the comparisons with gold answers 2 timed out and 2 ended their worker: they count as wrong."
    )
    assert describe_failed_comparisons(rows[2:3]) == ""


def traced(policy, problem, ids):
    return build_response_trace(
        policy,
        problem,
        method="greedy",
        seed=0,
        prompt_ids=policy.encode(problem),
        response_ids=ids,
        reward=0.0,
        cost=Cost(),
        meta={},
    )


def test_a_pool_of_many_samples_batches_problems_and_equals_one_of_few_rows(bench, asked, checker, tmp_path):
    found = []
    for rows in (1, 2, 8):
        step = replace(bench, config=replace(CONFIG, batch_size=rows)).plan_sample_pool(
            best_of=[1, 5], self_consistency=[5]
        )
        assert step.batch_size == max(1, 4 * rows // 5)
        store = RowStore(tmp_path / str(rows), "run")
        run_job(step, asked, store, checker)
        found.append(comparable(store.read()))
    assert found[0] == found[1] == found[2]


def test_what_is_there_is_not_run_again(bench, asked, checker, tmp_path):
    step = bench.plan_search("nabla", CONFIG)
    first = run_job(step, asked, RowStore(tmp_path, "run"), checker)
    assert len(first) == 8
    assert run_job(step, asked, RowStore(tmp_path, "run"), checker) == []


def test_a_run_cut_off_in_a_row_ends_with_the_same_rows(bench, asked, checker, tmp_path):
    step = bench.plan_sample_pool(best_of=[1, 2])
    whole = RowStore(tmp_path / "whole", "run")
    run_job(step, asked, whole, checker)
    torn = RowStore(tmp_path / "torn", "run")
    run_job(step, asked[:3], torn, checker)
    data = torn.path.read_bytes()
    torn.path.write_bytes(data[: len(data) - 37])
    again = RowStore(tmp_path / "torn", "run")
    assert len(again.stored_rows) == 11
    run_job(step, list(reversed(asked)), again, checker)
    assert comparable(again.read()) == comparable(whole.read())


ALLOCATED = ["best_of_4", "allocated_best_of@best_of_4"]


def test_problems_that_share_a_budget_run_together_and_again_after_a_kill(bench, asked, checker, tmp_path):
    """A batch holds two problems, but the budget is that of all four. Rows that a kill took come back the same."""
    evaluation = Evaluation(tmp_path, {"policy": "p"}, asked)
    evaluation.run(evaluation.plan(ALLOCATED, bench), checker, show_progress=False)
    whole = evaluation.store.read()
    totals = {name: sum(row.flops for row in whole if row.method == name) for name in ALLOCATED}
    assert totals["allocated_best_of@best_of_4"] <= 1.1 * totals["best_of_4"]
    path = evaluation.store.path
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    again = Evaluation(tmp_path, {"policy": "p"}, asked)
    again.run(again.plan(ALLOCATED, bench), checker, show_progress=False)
    assert comparable(again.store.read()) == comparable(whole)
    beside = Evaluation(tmp_path, {"policy": "p"}, asked, rank=1)
    beside.run(beside.plan(ALLOCATED, bench), checker, problems=asked[:1], show_progress=False)
    assert not beside.store.path.exists(), "the first process runs it for all"


def test_rows_that_shared_a_budget_with_other_problems_are_refused(bench, asked, checker, tmp_path):
    Evaluation(tmp_path, {"policy": "p"}, asked).plan(ALLOCATED, bench)
    worlds.refused(lambda: Evaluation(tmp_path, {"policy": "p"}, asked[:2]).plan(ALLOCATED, bench), "share a budget")
    shard = Evaluation(tmp_path / "shard", {"policy": "p"}, asked, shard=Shard(0, 2))
    worlds.refused(lambda: shard.plan(ALLOCATED, bench), "allocated_best_of@best_of_4", "leave out --shard")


def test_rows_of_other_settings_are_refused(bench, asked, checker, tmp_path):
    run_job(bench.plan_greedy(), asked, RowStore(tmp_path, "one"), checker)
    with pytest.raises(ValueError, match="other settings"):
        RowStore(tmp_path, "two")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "does not hold a JSON object"),
        ('{"settings_hash": "run"}', "lacks method, task"),
        ('{"run": "run"}', "unknown key 'run': it is now 'settings_hash'"),
        ('{"flops": null}', "flops must be a number, not None"),
        ('{"method": 5}', "method must be text, not 5"),
        ('{"correct": "yes"}', "correct must be a number or null, not 'yes'"),
    ],
)
def test_a_corrupt_line_is_named(line, words, bench, asked, checker, tmp_path):
    store = RowStore(tmp_path, "run")
    run_job(bench.plan_greedy(), asked, store, checker)
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    worlds.refused(lambda: RowStore(tmp_path, "run"), "rows-00000.jsonl, line 2", words)


def test_rows_of_several_processes_are_read_together(bench, asked, checker, tmp_path):
    step = bench.plan_greedy()
    for rank in range(2):
        run_job(step, asked[rank::2], RowStore(tmp_path, "run", rank), checker)
    alone = RowStore(tmp_path / "alone", "run")
    run_job(step, asked, alone, checker)
    assert comparable(RowStore(tmp_path, "run").read()) == comparable(alone.read())


def test_an_error_is_a_row(bench, asked, checker, tmp_path):
    bad = [*asked[:1], replace(asked[1], question="?!")]
    rows = run_job(bench.plan_search("nabla", CONFIG), bad, RowStore(tmp_path, "run"), checker)
    assert [bool(row.error) for row in rows] == [False, True] * 2
    assert [row.correct for row in rows if row.error] == [False, False]
    json.dumps([row.to_dict() for row in rows], allow_nan=False)


def test_a_missing_gold_answer_is_neither_right_nor_wrong(bench, problems, checker, tmp_path):
    rows = run_job(bench.plan_greedy(), problems, RowStore(tmp_path, "run"), checker)
    assert [row.correct for row in rows] == [None] * 4


def test_reward_by_round_follows_the_incumbent(bench, asked):
    for trace in bench.plan_search("nabla", replace(CONFIG, proposals={"proposals_per_round": 2})).run(asked, 0):
        curve = compute_reward_by_round(trace)
        assert curve[0] == trace.reward_initial and curve[-1] == trace.reward
        assert len(curve) == 1 + len({revision.round for revision in trace.revisions})
        assert curve == sorted(curve)


def test_mean_flops_needs_rows():
    with pytest.raises(ValueError, match="no rows of best_of_16"):
        compute_mean_flops([], "best_of_16")


# --- trained policies ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned():
    return worlds.tiny_policy(seed=7, name="tuned")


def test_methods_of_a_trained_policy_are_the_base_ones_on_its_weights(bench, tuned, asked):
    """Every step of a trained policy makes what the same step makes with that policy as the base."""
    alone, own = replace(bench, policy=tuned), bench.with_trained_policy("sft", tuned)
    config = replace(CONFIG, max_rounds=1)
    for plain, labelled in (
        (alone.plan_greedy(), own.plan_greedy()),
        (
            alone.plan_sample_pool(best_of=[1, 2], self_consistency=[2]),
            own.plan_sample_pool(best_of=[1, 2], self_consistency=[2]),
        ),
        (alone.plan_search("nabla", config), own.plan_search("nabla", config)),
    ):
        assert labelled.methods == tuple(f"sft_{method}" for method in plain.methods)
        for one, other in zip(plain.run(asked[:2], 0), labelled.run(asked[:2], 0), strict=True):
            assert (other.method, other.response_ids) == (f"sft_{one.method}", one.response_ids)
            assert other.cost.flops == one.cost.flops


def test_steps_of_several_policies(bench, tuned):
    names = ["greedy", "best_of_2", "sft_greedy", "sft_best_of_1", "dpo_nabla@best_of_2", "dpo_control"]
    asked_for = []

    def flops_of(method):
        asked_for.append(method)
        return 1e6

    made = [step.methods for step in plan_jobs(names, bench, {"sft": tuned, "dpo": tuned}, flops_of)]
    expected = [("best_of_2",), ("greedy",), ("sft_best_of_1",), ("sft_greedy",)]
    assert made == [*expected, ("dpo_nabla@best_of_2",), ("dpo_control",)]
    assert asked_for == ["best_of_2"], "budgets are the base policy's"


def test_a_label_without_a_policy_and_a_policy_without_a_method(bench, tuned):
    worlds.refused(
        lambda: check_methods(["grpo_greedy"], bench, {"sft": tuned}), "grpo_greedy needs a policy trained by grpo"
    )
    worlds.refused(lambda: check_methods(["greedy"], bench, {"sft": tuned}), "no sft_ method that uses it")
    none = replace(bench, config=CONFIG.with_no_gradient())
    worlds.refused(lambda: check_methods(["sft_nabla"], none, {"sft": tuned}), "solver none is the control")


def log_likelihood(policy, trace):
    """log π(y|x) by one plain forward of the whole sequence."""
    ids = torch.tensor([trace.prompt_ids + trace.response_ids])
    with torch.no_grad():
        logp = policy.model(ids).logits[0].log_softmax(-1)
    at = range(len(trace.prompt_ids) - 1, ids.shape[1] - 1)
    return float(sum(logp[place, ids[0, place + 1]] for place in at))


def test_the_divergence_of_a_sample_is_its_log_ratio(bench, tuned, policy, asked, checker, tmp_path):
    step = bench.with_trained_policy("sft", tuned).plan_sample_pool(best_of=[1, 2])
    rows = {row.key: row for row in run_job(step, asked, RowStore(tmp_path, "run"), checker)}
    for seed in step.seeds:
        for trace in step.run(asked, seed):
            row = rows[trace.method, trace.task, trace.problem_id, seed]
            ratio = log_likelihood(tuned, trace) - log_likelihood(policy, trace)
            bound = 0.0 if trace.method == "sft_best_of_1" else compute_best_of_n_kl_bound(2)
            assert row.kl == pytest.approx(bound + ratio, abs=1e-4)
            assert row.flops == trace.cost.flops, "measuring is not charged"


def test_divergences_of_the_base_policy_and_where_none_is_known(bench, asked, checker, tmp_path):
    store = RowStore(tmp_path, "run")
    for step in (
        bench.plan_greedy(),
        bench.plan_sample_pool(best_of=[1, 4], self_consistency=[2], weighted_best_of=[2]),
        bench.plan_search("nabla", replace(CONFIG, max_rounds=1)),
    ):
        run_job(step, [*asked[:1], replace(asked[1], question="?!")], store, checker)
    found = {row.method: row.kl for row in store.read() if not row.error}
    unknown = dict.fromkeys(("greedy", "self_consistency_2", "weighted_best_of_2", "nabla"))
    assert found == unknown | {"best_of_1": 0.0, "best_of_4": compute_best_of_n_kl_bound(4)}
    assert {row.kl for row in store.read() if row.error} == {None}


def test_the_bound_holds_of_every_best_of_n():
    """Exactly, for a policy of six responses of rising reward: and with another base, by the chain rule."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 4, 16):
        policy, base = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
        below = np.concatenate([[0.0], policy.cumsum()])
        best = np.diff(below**count)
        own, moved = best @ np.log(best / policy), best @ np.log(policy / base)
        assert -1e-12 < own <= compute_best_of_n_kl_bound(count) + 1e-12
        assert best @ np.log(best / base) == pytest.approx(own + moved)
    assert compute_best_of_n_kl_bound(1) == 0
