"""`--shard I/N`: any number of processes that know nothing of each other make the rows and traces of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds

from nabla_trl.cli.main import main
from nabla_trl.evaluation.results import load_results
from nabla_trl.evaluation.rows import Row, read_rows
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import describe_missing_shards, list_trace_files, read_traces
from nabla_trl.utils.locks import FolderInUse, lock_folder

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
METHODS = "greedy,best_of_2,control@best_of_2,control"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of models and problems on disk."""
    flags = worlds.save_world(tmp_path_factory.mktemp("world"), 7)
    return [*flags, "--max_rounds", "2", "--max_new_tokens", "8", "--batch_size", "2"]


def run_eval(world: list[str], folder: Path, *more: str, methods: str = METHODS) -> int:
    return main(["eval", *world, "--eval_methods", methods, "--seeds", "0", "1", "--output_dir", str(folder), *more])


def run_traces(world: list[str], folder: Path, *more: str) -> int:
    return main(["traces", *world, "--output_dir", str(folder), *more])


def comparable_rows(folder: Path) -> list[Row]:
    """The merged rows without seconds, and rewards and KL to the precision of another batch's rounding."""
    rows = read_rows(folder / "rows.jsonl")
    assert [row.key for row in rows] == sorted(row.key for row in rows)
    return [
        replace(
            row,
            seconds=0.0,
            reward=round(row.reward or 0.0, 4),
            kl=None if row.kl is None else round(row.kl, 4),
            reward_by_round=[round(reward, 4) for reward in row.reward_by_round],
        )
        for row in rows
    ]


def comparable_trace(trace: Trace) -> tuple[Any, ...]:
    revisions = [(r.round, r.position, r.suffix, r.accepted) for r in trace.revisions]
    return trace.problem_id, trace.seed, trace.response_ids, revisions, trace.correct, trace.meta, trace.cost.flops


@pytest.fixture(scope="module")
def one_process(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert run_eval(world, folder) == run_traces(world, folder) == 0
    return folder


# --- rows -------------------------------------------------------------------------------------------------


def test_shards_in_one_folder_make_the_rows_of_one_process(
    world: list[str], one_process: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run_eval(world, tmp_path, "--shard", "0/3") == 1, "the budget is the mean over all problems"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a budget is the mean cost of best_of_2 over all problems")
    assert "shard 1/3 (2 of 2 problems), shard 2/3 (2 of 2 problems)" in error and "shard 0/3" not in error
    before = (tmp_path / "rows/rows-00000.jsonl").read_text()
    assert before.count('"control"') and not before.count("control@"), "all that needs no budget is done"
    assert main(["report", str(tmp_path)]) == 1
    assert "lacks rows of shard 0/3 (3 of 3 problems), shard 1/3" in capsys.readouterr().err
    assert run_eval(world, tmp_path, "--shard", "1/3") == 1
    assert run_eval(world, tmp_path, "--shard", "2/3") == 0
    out = capsys.readouterr().out
    assert "rows are still missing of shard 0/3 (3 of 3 problems), shard 1/3 (2 of 2 problems)" in out
    for index in (0, 1):
        assert run_eval(world, tmp_path, "--shard", f"{index}/3") == 0
    assert comparable_rows(tmp_path) == comparable_rows(one_process)
    budgets = [json.loads((folder / "rows/budgets.json").read_text()) for folder in (tmp_path, one_process)]
    assert budgets[0] == budgets[1]
    (tmp_path / "rows.jsonl").unlink()
    load_results(tmp_path)
    assert comparable_rows(tmp_path) == comparable_rows(one_process)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert "--shard I/3" in facts["command"] and len(facts["problems"]) == 7


def test_shards_in_folders_of_their_own_are_merged_by_the_report(
    world: list[str], one_process: Path, tmp_path: Path
) -> None:
    methods = METHODS.replace(",control@best_of_2", "")
    for index in range(2):
        assert run_eval(world, tmp_path / f"part-{index}", "--shard", f"{index}/2", methods=methods) == 0
    load_results(tmp_path)
    expected = [row for row in comparable_rows(one_process) if "@" not in row.method]
    assert [replace(row, settings_hash="") for row in comparable_rows(tmp_path)] == [
        replace(row, settings_hash="") for row in expected
    ]
    shutil.rmtree(tmp_path / "part-1/rows")
    (tmp_path / "rows.jsonl").unlink()
    worlds.refused(lambda: load_results(tmp_path), "lacks rows of shard 1/2 (3 of 3 problems): run these values")


def test_another_number_of_shards_goes_on(world: list[str], one_process: Path, tmp_path: Path) -> None:
    methods = METHODS.replace(",control@best_of_2", "")
    assert run_eval(world, tmp_path, "--shard", "1/3", methods=methods) == 0
    for index in range(2):
        assert run_eval(world, tmp_path, "--shard", f"{index}/2", methods=methods) == 0
    assert run_eval(world, tmp_path) == 0, "and one process without shards makes the rest"
    assert not (tmp_path / "rows/shards.json").exists()
    assert comparable_rows(tmp_path) == comparable_rows(one_process)


def test_a_shard_without_problems_has_nothing_to_do(world: list[str], tmp_path: Path, capsys: Any) -> None:
    assert run_eval(world, tmp_path, "--shard", "8/9", methods="greedy") == 0
    assert "shard 8/9: rows of 0 problems" in capsys.readouterr().out
    assert run_traces(world, tmp_path, "--shard", "8/9") == 0


@pytest.mark.parametrize("name", ["eval", "traces"])
def test_what_is_no_shard_is_one_line(world: list[str], tmp_path: Path, capsys: Any, name: str) -> None:
    assert main([name, *world, "--output_dir", str(tmp_path / "new"), "--shard", "4/4"]) == 2
    assert capsys.readouterr().err.startswith("error: shard must be I/N with I from 0 to N-1, such as 0/4")
    assert not (tmp_path / "new").exists()


# --- traces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_folders", [False, True])
def test_shards_make_the_traces_of_one_process(
    world: list[str], one_process: Path, tmp_path: Path, capsys: Any, own_folders: bool
) -> None:
    for index in (2, 0):
        folder = tmp_path / f"part-{index}" if own_folders else tmp_path
        assert run_traces(world, folder, "--shard", f"{index}/3") == 0
    assert "traces are still missing of shard 1/3 (2 of 2 problems)" in capsys.readouterr().out
    assert describe_missing_shards(tmp_path) == "shard 1/3 (2 of 2 problems)"
    assert describe_missing_shards(tmp_path, {"problems/0"}) == describe_missing_shards(tmp_path, {"none"}) == ""
    assert run_traces(world, tmp_path / "part-1" if own_folders else tmp_path, "--shard", "1/3") == 0
    assert describe_missing_shards(tmp_path) == ""
    merged = read_traces(list_trace_files(tmp_path))
    assert list(map(comparable_trace, merged)) == list(map(comparable_trace, read_traces(one_process / "traces")))


def test_problems_that_share_a_budget_are_in_one_shard(world: list[str], tmp_path: Path, capsys: Any) -> None:
    """Of 7 problems, 3, 3 and 1 share a budget. Two shards have the first and the last, and the second one."""
    questions = tmp_path / "questions.jsonl"  # without answers, whose grading starts a process
    questions.write_text("\n".join(json.dumps({"question": f"{n}+{n}"}) for n in range(7)))
    budget = ["--shared_flops", "2e6", "--problems_per_budget", "3", "--dataset", str(questions)]
    assert run_traces(world, tmp_path / "one", *budget) == 0
    assert run_traces(world, tmp_path / "two", *budget, "--shard", "0/2") == 0
    assert "traces are still missing of shard 1/2 (3 of 3 problems)" in capsys.readouterr().out
    assert run_traces(world, tmp_path / "two", *budget, "--shard", "1/2") == 0
    one, two = (list(map(comparable_trace, read_traces(tmp_path / name / "traces"))) for name in ("one", "two"))
    assert one == two and len(one) == 7


# --- locks ------------------------------------------------------------------------------------------------


def test_a_shard_is_refused_while_it_runs_and_other_shards_are_not(tmp_path: Path) -> None:
    with lock_folder(tmp_path, 1, 4):
        for rank, count in ((1, 4), (0, 1), (0, 2), (2, 8)):  # the same, one process, and other divisions
            with (
                pytest.raises(FolderInUse, match=r"is in use by process \d+ .*, shard 1/4"),
                lock_folder(tmp_path, rank, count),
            ):
                pass
        with lock_folder(tmp_path, 0, 4), lock_folder(tmp_path, 3, 4):
            pass
    with lock_folder(tmp_path), pytest.raises(FolderInUse), lock_folder(tmp_path, 1, 4):
        pass
    with lock_folder(tmp_path, 0, 2):
        pass


# --- real processes ---------------------------------------------------------------------------------------

TINY = ["--policy", "data/tiny/policy", "--reward", "data/tiny/reward", "--dataset", "digit_chains"]
TINY += ["--batch_size", "2", "--max_new_tokens", "48", "--candidate_min_p", "0.02", "--max_rounds", "3"]


def command(name: str, folder: Path, *more: str) -> list[str]:
    more = ("--max_problems", "24", *more)
    if name == "traces with shared budgets":
        name, more = "traces", (*more, "--shared_flops", "1.9e8", "--problems_per_budget", "3")
    if name == "eval":
        more += ("--seeds", "0", "--eval_methods", "greedy,best_of_4,nabla,control@best_of_4")
    return [sys.executable, "-m", "nabla_trl.cli.main", name, *TINY, *more, "--output_dir", str(folder)]


def count_results(name: str, folder: Path, shard: int) -> int:
    if name != "eval":
        return len(list(folder.glob(f"traces/traces-{shard:05d}-*.parquet")))
    path = folder / f"rows/rows-{shard:05d}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "traces", "traces with shared budgets"])
def test_four_processes_of_which_one_is_killed(tmp_path: Path, name: str) -> None:
    """Four at once on one folder. Shard 2 is killed (-9), a second process on shard 3 is refused."""
    quiet: dict[str, Any] = {"cwd": ROOT, "env": ENV, "text": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(name, whole), check=True, capture_output=True, **quiet)
    processes = [
        subprocess.Popen(command(name, parts, "--shard", f"{index}/4"), stderr=subprocess.PIPE, **quiet)
        for index in range(4)
    ]
    while not (count_results(name, parts, 2) and count_results(name, parts, 3)):
        time.sleep(0.02)
        assert processes[2].poll() is None
    processes[2].send_signal(signal.SIGKILL)
    processes[3].send_signal(signal.SIGSTOP)
    second = subprocess.run(command(name, parts, "--shard", "3/4"), check=False, capture_output=True, **quiet)
    processes[3].send_signal(signal.SIGCONT)
    assert second.returncode == 1 and f"is in use by process {processes[3].pid} on " in second.stderr
    assert ", shard 3/4: wait for it" in second.stderr
    for process in processes:
        process.communicate()
    assert processes[2].returncode == -9
    if name != "eval":
        assert "shard 2/4" in describe_missing_shards(parts)
    for index in (2, 0, 1, 3):  # those that waited for the budget go on as well
        subprocess.run(command(name, parts, "--shard", f"{index}/4"), check=True, capture_output=True, **quiet)
    if name == "eval":
        subprocess.run([sys.executable, "-m", "nabla_trl.cli.main", "report", str(parts)], check=True, **quiet)
        assert comparable_rows(parts) == comparable_rows(whole)
    else:
        assert describe_missing_shards(parts) == ""
        both = [list(map(comparable_trace, read_traces(folder / "traces"))) for folder in (parts, whole)]
        assert both[0] == both[1]
