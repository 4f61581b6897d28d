"""Shards of a data set: which problems are whose, and who has not done its share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import worlds

from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.shards import Shard, ShardPlan, check_same_settings, list_run_folders, read_shard_plan

PROBLEMS = [Problem(id=f"q{n}", question=str(n)) for n in range(7)]


def test_shards_share_out_the_problems() -> None:
    for count in (1, 3, 7, 20):
        shares = [Shard(index, count).select(PROBLEMS) for index in range(count)]
        assert sorted(problem.id for share in shares for problem in share) == [problem.id for problem in PROBLEMS]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_shard_is_read_as_it_is_written() -> None:
    assert Shard.parse(None) == Shard(0, 1) == Shard.parse("0/1")
    assert Shard.parse("2/4") == Shard(2, 4) and str(Shard(2, 4)) == "2/4"


@pytest.mark.parametrize(
    "text", ["", "4/4", "5/4", "-1/4", "1", "1/", "/4", "a/b", "1/4/2", "0/0", "1.0/4", " 1/4", "١/4x"]
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    worlds.refused(lambda: Shard.parse(text), "shard must be I/N with I from 0 to N-1", repr(text))


def test_a_plan_names_the_shards_that_are_missing(tmp_path: Path) -> None:
    plan = ShardPlan.build(Shard(1, 3), PROBLEMS, [0, 1], ["greedy"])
    plan.write(tmp_path / "plan.json")
    assert ShardPlan.read(tmp_path / "plan.json") == plan == ShardPlan.build(Shard(0, 3), PROBLEMS, [0, 1], ["greedy"])
    done = {("custom", f"q{n}") for n in (0, 1, 2, 3, 6)}
    assert plan.describe_missing(done) == "shard 1/3 (1 of 2 problems), shard 2/3 (1 of 2 problems)"
    assert plan.describe_missing(set(plan.problems)) == ""


def test_a_plan_of_other_problems_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ShardPlan.build(Shard(0, 3), PROBLEMS, [0]).write(path)
    ShardPlan.build(Shard(1, 2), PROBLEMS, [0, 1]).write(path)  # the same problems in other shares
    for others, count in ((PROBLEMS[:3], "3"), (PROBLEMS[::-1], "other ones")):
        plan = ShardPlan.build(Shard(0, 2), others, [0])
        worlds.refused(lambda plan=plan: plan.write(path), f"shards of 7 problems, and this command has {count}")
    assert ShardPlan.read(path).problems == tuple((problem.task, problem.id) for problem in PROBLEMS)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_shards": 2, "problems": [1], "seeds": [], "methods": []}'])
def test_what_is_no_plan_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    worlds.refused(lambda: ShardPlan.read(tmp_path / "plan.json"), str(tmp_path / "plan.json"))


def test_shards_in_folders_of_their_own(tmp_path: Path) -> None:
    for index in (0, 1):
        folder = tmp_path / f"shard-{index}"
        ShardPlan.build(Shard(index, 2), PROBLEMS, [0]).write(folder / "rows/shards.json")
        (folder / "eval.settings.json").write_text(json.dumps({"policy": "p", "seed": "0"}))
    (tmp_path / "elsewhere/rows").mkdir(parents=True)
    folders = list_run_folders(tmp_path)
    assert folders == [tmp_path, tmp_path / "shard-0", tmp_path / "shard-1"]
    plan = read_shard_plan(folder / "rows/shards.json" for folder in folders)
    assert plan is not None and plan.num_shards == 2
    check_same_settings(folders, "*.settings.json")
    (tmp_path / "shard-1/eval.settings.json").write_text(json.dumps({"policy": "q", "seed": "0"}))
    worlds.refused(lambda: check_same_settings(folders, "*.settings.json"), "differ in policy: they are shards of")
    (tmp_path / "shard-1/rows/shards.json").unlink()
    ShardPlan.build(Shard(0, 2), PROBLEMS[:3], [0]).write(tmp_path / "shard-1/rows/shards.json")
    worlds.refused(
        lambda: read_shard_plan(folder / "rows/shards.json" for folder in folders), "another plan of shards"
    )
