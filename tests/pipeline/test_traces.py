"""Traces and data sets from Python, with models in memory."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from datasets import Dataset, DatasetDict

import nabla_trl
from nabla_trl import generate_traces, to_preference_dataset, to_sft_dataset
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import batches
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces

CONFIG = {"max_rounds": 4, "max_new_tokens": 8}
QUESTIONS = [{"question": f"{n}+{n}"} for n in range(1, 5)]  # without answers, whose grading starts a process
ROWS = [{"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(1, 5)]


@pytest.fixture(scope="module")
def traces(policy: Policy, scalar_reward: Reward) -> list[Trace]:
    return generate_traces(ROWS, policy, scalar_reward, config=CONFIG, show_progress=False)


def test_rows_in_memory_give_graded_traces_in_their_order(traces: list[Trace]) -> None:
    assert [trace.problem_id for trace in traces] == [f"custom/{n}" for n in range(4)]
    assert all(trace.correct is not None and trace.error is None for trace in traces)


def test_a_folder_is_filled_once_and_read_back_with_its_texts(
    traces: list[Trace], policy: Policy, scalar_reward: Reward, tmp_path: Path, caplog: Any
) -> None:
    def run(rows: Any, **options: Any) -> list[Trace]:
        return generate_traces(rows, policy, scalar_reward, output_dir=tmp_path, show_progress=False, **options)

    first = run(Dataset.from_list(ROWS[:2]), config=CONFIG)
    with caplog.at_level(logging.INFO, "nabla_trl"):
        again = run(DatasetDict(train=Dataset.from_list(ROWS)), config=CONFIG)
    assert "2 traces written, 2 existed" in caplog.text
    for trace, stored, in_memory in zip(first, again, traces, strict=False):
        assert trace == stored and stored.response_ids == in_memory.response_ids
    assert repr(again[3]).count("[-") == repr(traces[3]).count("[-") and "⟨1" not in repr(again)
    message = worlds.refused(lambda: run(ROWS, config={**CONFIG, "max_rounds": 3, "top_k": 5}), "other settings")
    assert "max_rounds '3' (was '4')" in message and "top_k '5' (was '0')" in message
    worlds.refused(lambda: run([{"question": "9", "answer": "1"}], config=CONFIG), "another problem 'custom/0'")


def test_problems_share_budgets_and_a_budget_that_was_cut_off_begins_again(
    traces: list[Trace], policy: Policy, scalar_reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**options: Any) -> list[Trace]:
        options = {"config": CONFIG, "problems_per_budget": 2, "show_progress": False, **options}
        return generate_traces(QUESTIONS, policy, scalar_reward, **options)

    def compare(found: list[Trace]) -> list[Any]:
        return [(trace.problem_id, trace.response_ids, trace.cost.flops) for trace in found]

    share = 1.5 * sum(trace.cost.flops for trace in traces) / len(traces)
    whole = run(shared_flops=share)
    assert compare(whole) != compare(traces) and "max_rounds" not in {trace.stop_reason for trace in whole}
    for pair in (whole[:2], whole[2:]):
        assert 0.7 * 2 * share < sum(trace.cost.flops for trace in pair) <= 1.1 * 2 * share

    search, calls = batches.run_search_with_shared_budget, []

    def fail_later(*args: Any, **options: Any) -> list[Trace]:
        calls.append(options["max_flops"])
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return search(*args, **options)

    monkeypatch.setattr(batches, "run_search_with_shared_budget", fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(shared_flops=share, output_dir=tmp_path)
    assert compare(read_traces(tmp_path / "traces")) == compare(whole[:2])
    assert compare(run(shared_flops=share, output_dir=tmp_path)) == compare(whole)
    assert calls == [2 * share] * 3 and len(list(tmp_path.glob("traces/*.parquet"))) == 2
    other = worlds.refused(lambda: run(shared_flops=2 * share, output_dir=tmp_path), "made with other settings")
    assert f"shared_flops '{2 * share}' (was '{share}')" in other
    worlds.refused(lambda: run(output_dir=tmp_path), "problems_per_budget None (was '2')")


def test_a_budget_that_leads_past_the_validated_rounds_is_said(
    policy: Policy, scalar_reward: Reward, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = replace(scalar_reward, validated_limits=ValidatedLimits(max_samples=1, max_rounds=1))
    options: dict[str, Any] = {"config": {**CONFIG, "max_rounds": 9}, "shared_flops": 6e6}
    traces = generate_traces(QUESTIONS, policy, reward, **options)
    num_rounds = max(trace.revisions[-1].round + 1 for trace in traces if trace.revisions)
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "validated" in line]
    assert f"up to 1 rounds, but the shared budget led to a search of {num_rounds} rounds" in warning
    assert num_rounds > 1


def test_a_running_loop_is_no_hindrance(traces: list[Trace], policy: Policy, scalar_reward: Reward) -> None:
    async def notebook() -> list[Trace]:
        return generate_traces(ROWS[:1], policy, scalar_reward, config=CONFIG, show_progress=False)

    assert asyncio.run(notebook())[0].response_ids == traces[0].response_ids


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, ["there are no problems"]),
        (Dataset.from_list([]), {}, ["there are no problems"]),
        (
            Dataset.from_list([{"Problem": "1", "gold": "1"}]),
            {},
            ["row 0 of the problems: no question", "Its columns are Problem, gold", "columns={'question': COLUMN"],
        ),
        ([7], {}, ["Problem objects or dicts with a question, and not int"]),
        (ROWS[0], {}, ["one problem is a dict in a list"]),
        ({"question": ["1"]}, {}, ["not a dict of columns"]),
        ({"test": ROWS}, {}, ["has the splits test, and not 'train'"]),
        ([*ROWS, ROWS[0]], {}, ["the question is already on row 0"]),
        ([{"question": "1", "answer": 1.5}], {}, ["answer must be a string"]),
        ("no/such/task", {}, ["no/such/task"]),
        (ROWS, {"config": "papr"}, ["unknown preset 'papr'"]),
        (ROWS, {"config": {"max_round": 1}}, ["max_round", "did you mean max_rounds?"]),
        (ROWS, {"config": 3}, ["config is a SearchConfig"]),
        (ROWS, {"max_rounds": 1}, ["unknown option 'max_rounds'", "config={'max_rounds': …}"]),
        (ROWS, {"tokeniser": 1}, ["unknown option 'tokeniser' (did you mean tokenizer?)"]),
        (ROWS, {"shard": "0/2"}, ["shard needs output_dir"]),
        (ROWS, {"shared_flops": -1}, ["shared_flops must be from 0 to 1e+30, not -1"]),
        (ROWS, {"shared_flops": 1e308}, ["shared_flops must be from 0 to 1e+30, not 1e+308"]),
        (ROWS, {"shared_flops": "a lot"}, ["shared_flops must be a number, not 'a lot'"]),
        (ROWS, {"shared_flops": 1e9, "problems_per_budget": 1}, ["problems_per_budget must be at least 2, not 1"]),
        (ROWS, {"shared_flops": 1e9, "config": {"acceptance": "metropolis"}}, ["set shared_flops 0: metropolis"]),
        (ROWS, {"tokenizer": "x"}, ["is loaded already"]),
        (ROWS, {"seed": "a"}, ["seed must be a whole number, not 'a'"]),
        (ROWS, {"max_problem": 1}, ["unknown option 'max_problem' (did you mean max_problems?)"]),
        (ROWS, {"dtype": "bfloat16"}, ["dtype: nothing is loaded by name here"]),
    ],
)
def test_what_is_wrong_is_one_line(
    policy: Policy, scalar_reward: Reward, rows: Any, options: dict[str, Any], words: list[str]
) -> None:
    worlds.refused(lambda: generate_traces(rows, policy, scalar_reward, **options), *words)


def test_columns_may_have_other_names() -> None:
    rows = Dataset.from_list([{"Problem": "1+1", "gold": "2", "topic": "sums"}])
    [problem] = nabla_trl.load_problems(rows, columns={"question": "Problem", "answer": "gold"})
    assert (problem.question, problem.answer, problem.columns) == ("1+1", "2", {"topic": "sums"})
    worlds.refused(lambda: nabla_trl.load_problems(rows, columns={"qestion": "Problem"}), "did you mean question?")
    worlds.refused(lambda: nabla_trl.load_problems(rows, columns={"question": "problem"}), "no column 'problem'")
    chat = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}]  # as in TRL's data sets
    assert nabla_trl.load_problems(chat)[0].messages == ({"role": "user", "content": "1+1"},)


# --- data sets --------------------------------------------------------------------------------------------


def test_rows_for_sft_are_those_of_the_package(traces: list[Trace], tmp_path: Path) -> None:
    rows = to_sft_dataset(traces, include_unfinished=True)
    assert rows.column_names == ["input_ids", "labels"] and len(rows) == len(traces)
    first, trace = rows[0], traces[0]
    assert first["input_ids"] == trace.prompt_ids + trace.response_ids
    assert first["labels"] == [-100] * len(trace.prompt_ids) + trace.response_ids
    worlds.refused(lambda: to_sft_dataset([]), "there are no traces")
    worlds.refused(lambda: to_sft_dataset(None), "Trace objects or the folder of a run, not NoneType")  # type: ignore[arg-type]
    worlds.refused(lambda: to_sft_dataset([{"response": "1"}]), "Trace.from_dict")
    worlds.refused(lambda: to_sft_dataset(traces, selection="bast"), "selection", "bast")


def test_pairs_have_the_tokens_that_trl_reads_from_their_texts(traces: list[Trace], policy: Policy) -> None:
    pairs = to_preference_dataset(traces)
    for pair in pairs:
        for name in ("chosen", "rejected"):
            ids = policy.tokenizer(pair["prompt"] + pair[name])["input_ids"]
            assert ids == pair["prompt_ids"] + pair[f"{name}_ids"]
            assert pair[name].endswith(policy.tokenizer.eos_token)
    copies = [Trace.from_dict(trace.to_dict()) for trace in traces]
    assert to_preference_dataset(copies, policy.tokenizer)[:] == pairs[:]
    worlds.refused(lambda: to_preference_dataset(copies), "cannot load a tokenizer from 'policy'")
    other, _ = worlds.permuted_tokenizer(policy.tokenizer)
    worlds.refused(lambda: to_preference_dataset(traces, other), "made with another tokenizer")


def test_pairs_of_stored_traces_know_the_tokenizer_of_a_model_without_a_name(
    policy: Policy, scalar_reward: Reward, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"config": CONFIG, "output_dir": tmp_path, "show_progress": False}
    stored = generate_traces(ROWS, policy.model, scalar_reward, tokenizer=policy.tokenizer, **options)
    assert to_preference_dataset(stored)[:] == to_preference_dataset(tmp_path, policy.tokenizer)[:]
    words = ["give to_preference_dataset the tokenizer of the policy", "LlamaForCausalLM"]
    worlds.refused(lambda: to_preference_dataset(tmp_path), *words)


@pytest.mark.slow
def test_plain_trainers_of_trl_take_both(traces: list[Trace], policy: Policy, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = worlds.TRAINER | {"max_steps": 1, "output_dir": str(tmp_path)}
    common: dict[str, Any] = {"processing_class": policy.tokenizer}
    sft, pairs = to_sft_dataset(traces, include_unfinished=True), to_preference_dataset(traces)
    trainer = SFTTrainer(worlds.tiny_model(), args=SFTConfig(**options), train_dataset=sft, **common)
    assert [row["labels"] for row in trainer.train_dataset] == [row["labels"] for row in sft]
    trainer.train()
    dpo = DPOTrainer(
        worlds.tiny_model(), worlds.tiny_model(), args=DPOConfig(**options), train_dataset=pairs, **common
    )
    assert [row["chosen_ids"] for row in dpo.train_dataset] == [row["chosen_ids"] for row in pairs]
    dpo.train()
