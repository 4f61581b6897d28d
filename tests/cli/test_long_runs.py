"""Runs of hours: killed, stopped, resumed by others, on a full disk; at the end the rows of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from lock_holder import holder

from nabla_trl.cli.main import main
from nabla_trl.evaluation.plan import EvaluationSetup
from nabla_trl.evaluation.rows import Row, RowStore, read_rows, select_complete_rows
from nabla_trl.evaluation.runner import get_budget_flops, run_job
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.batches import find_unfinished_problems, search_to_folder
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces
from nabla_trl.utils import interrupts
from nabla_trl.utils.interrupts import StoppedBySignal, handle_stop_signals

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CONFIG = SearchConfig(max_rounds=2, max_new_tokens=8, batch_size=2)
QUESTIONS = ("1+2", "3*4-5", "7", "12-3+4*5", "2*2", "9-1", "6+6*6", "5-4")


@pytest.fixture
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker() as checker:
        yield checker


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    return [replace(problem, answer=str(index)) for index, problem in enumerate(worlds.tiny_problems(QUESTIONS))]


@pytest.fixture(scope="module")
def bench(policy: Policy, scalar_reward: Reward) -> EvaluationSetup:
    return EvaluationSetup(policy, scalar_reward, CONFIG, (0,))


class Run:
    """An evaluation and a folder of traces in one folder, by as many processes as are asked for."""

    def __init__(self, folder: Path, bench: EvaluationSetup, problems: Sequence[Problem]):
        self.folder, self.bench, self.problems, self.config = folder, bench, problems, CONFIG

    def rows(self, rank: int = 0, processes: int = 1, problems: Sequence[Problem] | None = None) -> None:
        share = list(self.problems if problems is None else problems)[rank::processes]
        store = RowStore(self.folder / "rows", "run", rank)
        with AnswerChecker() as checker:
            for job in (self.bench.plan_greedy(), self.bench.plan_search("nabla", self.config)):
                run_job(job, share, store, checker)

    def traces(self, rank: int = 0, processes: int = 1, problems: Sequence[Problem] | None = None) -> None:
        share = list(self.problems if problems is None else problems)[rank::processes]
        folder = self.folder / "traces"
        todo = find_unfinished_problems(share, folder, 0)
        with AnswerChecker() as checker:
            search_to_folder(
                todo,
                folder,
                policy=self.bench.policy,
                reward=self.bench.reward,
                config=self.config,
                seed=0,
                checker=checker,
                rank=rank,
                show_progress=False,
            )

    def made(self, what: str) -> list[Any]:
        """What is there, but for seconds and for what another batch rounds differently."""
        if what == "rows":
            return [comparable(row) for row in RowStore(self.folder / "rows", "run").read()]
        return [told(trace) for trace in read_traces(self.folder / "traces")]


def comparable(row: Row) -> Row:
    curve = [round(reward, 4) for reward in row.reward_by_round]
    return replace(row, seconds=0.0, reward=round(row.reward or 0.0, 4), reward_by_round=curve)


def told(trace: Trace) -> tuple:
    revisions = [(r.round, r.position, r.suffix, r.accepted) for r in trace.revisions]
    return trace.problem_id, trace.seed, trace.response_ids, revisions, trace.correct, trace.meta, trace.cost.flops


@pytest.fixture
def run(tmp_path: Path, bench: EvaluationSetup, asked: list[Problem]) -> Run:
    return Run(tmp_path, bench, asked)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, bench: EvaluationSetup, asked: list[Problem]
) -> dict[str, list[Any]]:
    """What an undisturbed run makes."""
    run = Run(tmp_path_factory.mktemp("whole"), bench, asked)
    run.rows()
    run.traces()
    return {what: run.made(what) for what in ("rows", "traces")}


# --- other processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["rows", "traces"])
@pytest.mark.parametrize("processes", [1, 3])
def test_what_two_processes_began_any_number_ends(
    run: Run, whole: dict, asked: list[Problem], what: str, processes: int
) -> None:
    for rank in range(2):  # the first came further
        getattr(run, what)(problems=asked[rank::2][: 3 - rank], rank=rank)
    before = len(run.made(what))
    for rank in range(processes):
        getattr(run, what)(rank, processes)
    assert 0 < before < len(whole[what])
    assert run.made(what) == whole[what]
    assert len(list(run.folder.glob(f"{what}/{what}-0*.*"))) > 1


@pytest.mark.parametrize("what", ["rows", "traces"])
def test_order_limit_and_batch_size_change_no_row(run: Run, whole: dict, asked: list[Problem], what: str) -> None:
    getattr(run, what)(problems=asked[:3])
    run.config = replace(CONFIG, batch_size=5)
    getattr(run, what)(problems=asked[::-1])
    assert run.made(what) == whole[what]


@pytest.mark.parametrize("change", [{"question": "8+8"}, {"answer": "77"}])
@pytest.mark.parametrize("what", ["rows", "traces"])
def test_another_problem_of_the_same_id_is_refused(run: Run, asked: list[Problem], what: str, change: dict) -> None:
    getattr(run, what)(problems=asked[:2])
    changed = [asked[0], replace(asked[1], **change)]
    worlds.refused(lambda: getattr(run, what)(problems=changed), "another problem 'q1'", "use another --output_dir")
    getattr(run, what)(
        problems=[replace(problem, level="hard", solution="so") for problem in asked[:2]]
    )  # no row tells


def test_the_hash_of_a_problem_is_of_what_is_asked_and_its_answer(asked: list[Problem]) -> None:
    first = asked[0]
    chat = ({"role": "user", "content": "otherwise"},)
    others = [replace(first, question="2"), replace(first, answer=None), replace(first, messages=chat)]
    assert len({compute_content_hash(problem) for problem in [first, *others]}) == 4
    assert compute_content_hash(replace(first, id="x", level="1", solution="s")) == compute_content_hash(first)


# --- budgets ------------------------------------------------------------------------------------------


def test_a_budget_stays_what_it_was(
    bench: EvaluationSetup, asked: list[Problem], checker: AnswerChecker, tmp_path: Path
) -> None:
    """More problems change the mean cost of what sets a budget, which rows at that budget would not notice."""
    store = RowStore(tmp_path, "run")
    run_job(bench.plan_sample_pool(best_of=[2]), asked[:6], store, checker)
    first = get_budget_flops(store, "best_of_2")
    path = store.path
    text = path.read_text()
    cost = re.search(r'"flops": [^,]+', text)
    path.write_text(text.replace(cost[0], '"flops": 1.0', 1))  # one cost next to nothing
    worlds.refused(
        lambda: get_budget_flops(RowStore(tmp_path, "run"), "best_of_2"), "rows at a budget of", "best_of_2"
    )
    path.write_text(text.replace(cost[0], f'"flops": {first * 1.01}', 1))
    assert get_budget_flops(RowStore(tmp_path, "run"), "best_of_2") == first
    assert json.loads((tmp_path / "budgets.json").read_text()) == {"best_of_2": first}
    (tmp_path / "budgets.json").write_text('{"best_of_2": 0.0}')
    worlds.refused(
        lambda: get_budget_flops(RowStore(tmp_path, "run"), "best_of_2"), "budgets.json", "no budget of FLOPs"
    )


def test_what_could_not_be_run_sets_no_budget(bench: EvaluationSetup, checker: AnswerChecker, tmp_path: Path) -> None:
    store = RowStore(tmp_path, "run")
    run_job(bench.plan_sample_pool(best_of=[2]), [Problem(id="bad", question="?!", answer="1")], store, checker)
    worlds.refused(lambda: get_budget_flops(store, "best_of_2"), "best_of_2 can set no budget")
    assert not (tmp_path / "budgets.json").exists()


def test_rows_that_cover_the_problems(asked: list[Problem]) -> None:
    def row(method: str, seed: int, problem: Problem) -> Row:
        costs = {"correct": True, "flops": 1.0, "seconds": 1.0}
        return Row(method=method, task=problem.task, problem=problem.id, seed=seed, **costs)

    rows = [row("greedy", 0, problem) for problem in asked]
    rows += [row("nabla", seed, problem) for seed, count in ((0, 3), (1, 2)) for problem in asked[:count]]
    rows += [row("old", 0, replace(asked[0], task="another"))]
    whole, left_out = select_complete_rows(rows, asked[:3])
    assert {(row.method, row.seed) for row in whole} == {("greedy", 0), ("nabla", 0)} and len(whole) == 6
    assert left_out == "left out, as their rows are not complete: nabla, seed 1 (2 of 3 problems)"
    assert select_complete_rows(rows, asked[:2])[1] == "" and len(select_complete_rows(rows, asked[:2])[0]) == 6


# --- kill -9 and full disks ---------------------------------------------------------------------------


def killed(action: Callable[[], None], draw: random.Random, folder: Path) -> bool:
    """Run `action` in a child that dies by a signal: at one of its first syncs, or in the middle of a write."""
    longest = max((path.stat().st_size for path in folder.glob("rows/*.jsonl")), default=0)
    at_sync, room = draw.choice([(draw.randint(1, 3), None), (None, longest + draw.randint(0, 3000))])
    child = os.fork()
    if not child:
        code = 1
        try:
            if room is not None:  # the system ends a process that writes past its limit, after the part that fits
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            else:
                _die_at_sync(at_sync)
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _die_at_sync(number: int) -> None:
    sync, calls = os.fsync, []

    def fsync(handle: Any) -> None:
        calls.append(handle)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = fsync


@pytest.mark.parametrize("what", ["rows", "traces"])
def test_a_run_that_is_killed_at_any_write_ends_with_the_same(run: Run, whole: dict, what: str) -> None:
    draw, kills, seen = random.Random(0), 0, 0
    for _ in range(8):
        kills += killed(getattr(run, what), draw, run.folder)
        made = run.made(what) if (run.folder / what).exists() else []
        assert seen <= len(made) and all(entry in whole[what] for entry in made), "what was there stays, and is right"
        seen = len(made)
    assert kills >= 5
    getattr(run, what)()
    assert run.made(what) == whole[what]


def test_half_a_character_of_another_process_is_no_row(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "run", 1)
    costs = {"correct": True, "flops": 1.0, "seconds": 1.0}
    row = Row(method="m", task="t", problem="∇", seed=0, settings_hash="run", **costs)
    store.append([row, replace(row, seed=1)])
    data = store.path.read_bytes()
    store.path.write_bytes(data[: data.rindex("∇".encode()) + 1])
    assert [row.seed for row in RowStore(tmp_path, "run", 0).read()] == [0]
    again = RowStore(tmp_path, "run", 1)
    again.append([row, replace(row, seed=1)])
    assert store.path.read_bytes() == data


def test_a_full_disk_keeps_whole_rows_and_the_store_goes_on(
    bench: EvaluationSetup, asked: list[Problem], checker: AnswerChecker, tmp_path: Path
) -> None:
    store = RowStore(tmp_path, "run")
    rows = run_job(bench.plan_greedy(), asked, RowStore(tmp_path / "other", "run"), checker)
    store.append(rows[:2])
    before = store.path.read_bytes()
    with (
        worlds.full_disk(len(before) + 100),
        pytest.raises(OSError, match=r"rows until here are kept, free disk space.*rows-00000"),
    ):
        store.append(rows[2:])
    assert store.path.read_bytes() == before, "no part of a row is left"
    store.append(rows[2:])
    assert len(store.read()) == len(rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of an evaluation by `nabla-trl` of models on disk, but for the folder."""
    flags = worlds.save_world(tmp_path_factory.mktemp("world"), 8)
    return [*flags, "--max_rounds", "1", "--max_new_tokens", "8"]


def evaluation(world: list[str], folder: Path, *more: str) -> list[str]:
    flags = ["--eval_methods", "greedy,control", "--seeds", "0", "--batch_size", "2", "--output_dir", str(folder)]
    return ["eval", *world, *flags, *more]


def rows_of(folder: Path) -> list[Row]:
    return [comparable(row) for row in read_rows(folder / "rows.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(evaluation(world, folder)) == 0
    return rows_of(folder)


def test_eval_on_a_full_disk_is_one_line_and_goes_on(
    capsys: Any, world: list[str], undisturbed: list[Row], tmp_path: Path
) -> None:
    with worlds.full_disk(5_000):
        assert main(evaluation(world, tmp_path)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: [Errno 27]") and "free disk space and run again" in last
    assert 0 < len((tmp_path / "rows/rows-00000.jsonl").read_text().splitlines()) < len(undisturbed)
    assert main(evaluation(world, tmp_path)) == 0
    assert rows_of(tmp_path) == undisturbed


def test_traces_on_a_full_disk_are_one_line_and_go_on(capsys: Any, world: list[str], tmp_path: Path) -> None:
    argv = ["traces", *world, "--output_dir", str(tmp_path), "--batch_size", "4"]
    with worlds.full_disk(5_000):
        assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "earlier shards are kept, free disk space and run again" in err
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["tokens.json"]
    assert main(argv) == 0
    assert len(read_traces(tmp_path / "traces")) == 8


@pytest.mark.parametrize("name", ["eval", "traces"])
def test_a_second_launch_on_a_folder_is_refused_in_one_line(
    capsys: Any, world: list[str], tmp_path: Path, name: str
) -> None:
    argv = evaluation(world, tmp_path) if name == "eval" else ["traces", *world, "--output_dir", str(tmp_path)]
    with holder(tmp_path) as process:
        assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {tmp_path} is in use by process {process.pid} on ")
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


def test_eval_of_more_and_of_fewer_problems(capsys: Any, world: list[str], tmp_path: Path) -> None:
    assert main(evaluation(world, tmp_path, "--max_problems", "4")) == 0
    stamp = (tmp_path / "rows/rows-00000.jsonl").stat().st_size
    assert (
        main(evaluation(world, tmp_path, "--max_problems", "8", "--eval_methods", "greedy", "--batch_size", "3")) == 0
    )
    assert {(row.method, row.problem[-1]) for row in rows_of(tmp_path)} == {("greedy", str(n)) for n in range(8)}
    assert "left out, as their rows are not complete: control, seed 0 (4 of 8 problems)" in capsys.readouterr().out
    grown = (tmp_path / "rows/rows-00000.jsonl").stat().st_size
    assert stamp < grown
    assert main(evaluation(world, tmp_path, "--max_problems", "2")) == 0
    assert len(rows_of(tmp_path)) == 4 and (tmp_path / "rows/rows-00000.jsonl").stat().st_size == grown


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the second batch of the search send this process a signal, so many times."""
    real = EvaluationSetup.plan_search

    def install(number: int, times: int = 1) -> None:
        calls: list[int] = []

        def plan_search(self: EvaluationSetup, method: str, config: SearchConfig, **options: Any) -> Any:
            step = real(self, method, config, **options)

            def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
                calls.append(len(problems))
                for _ in range(times if len(calls) == 2 else 0):
                    os.kill(os.getpid(), number)
                return step.run(problems, seed)

            return replace(step, run=work)

        monkeypatch.setattr(EvaluationSetup, "plan_search", plan_search)

    return install


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_batch_in_hand_is_finished_and_the_command_that_goes_on_is_said(
    capfd: Any,
    world: list[str],
    undisturbed: list[Row],
    tmp_path: Path,
    sent: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context():
        sent(number, times=2)  # a scheduler's comes twice: from itself and by way of the launcher
        assert main(evaluation(world, tmp_path)) == code
    monkeypatch.undo()
    out, err = capfd.readouterr()
    first, last = [line for line in err.splitlines() if line.startswith("stop")]
    assert out == "" and first.startswith("stopping after the 2 problems of control in hand, about 0:00:0")
    assert last == f"stopped at control: 4 of 8; to go on: {shlex.join(['nabla-trl', *evaluation(world, tmp_path)])}"
    rows = (tmp_path / "rows/rows-00000.jsonl").read_text().splitlines()
    assert len(rows) == 8 + 4 and signal.getsignal(number) == before
    assert main(shlex.split(last.partition("to go on: nabla-trl ")[2])) == 0
    assert rows_of(tmp_path) == undisturbed


def test_a_second_ctrl_c_stops_at_once(
    capfd: Any, world: list[str], tmp_path: Path, sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "_ECHO_SECONDS", 0.0)
    sent(signal.SIGINT, times=2)
    assert main(evaluation(world, tmp_path)) == 130
    assert capfd.readouterr().err.splitlines()[-1].startswith("stopped; to go on: nabla-trl eval")
    assert len((tmp_path / "rows/rows-00000.jsonl").read_text().splitlines()) == 8 + 2


def test_a_signal_between_batches_stops_at_once() -> None:
    with pytest.raises(StoppedBySignal) as stop, handle_stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")
    assert stop.value.signal_number == signal.SIGTERM and isinstance(stop.value, KeyboardInterrupt)


def test_the_command_of_a_script_is_as_it_was_typed(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(
        "from nabla_trl.utils.interrupts import get_current_command\nprint(get_current_command())"
    )
    typed = [sys.executable, "it.py", "--title", "two words"]
    ran = subprocess.run(typed, cwd=tmp_path, env=ENV, capture_output=True, text=True, check=True)
    assert shlex.split(ran.stdout) == typed


def test_the_command_of_a_module_is_that_of_its_launcher(tmp_path: Path) -> None:
    """A launcher names the module, and the process sees the path of its file."""
    (tmp_path / "it.py").write_text(
        "from nabla_trl.utils.interrupts import get_current_command\nprint(get_current_command())"
    )
    launcher = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[2:]]).returncode)"
    typed = [sys.executable, "-c", launcher, "launch", "-m", "it", "--title", "two words"]
    ran = subprocess.run(typed, cwd=tmp_path, env=ENV, capture_output=True, text=True, check=True)
    assert shlex.split(ran.stdout) == typed


def test_what_is_ignored_stays_ignored() -> None:
    """As of a shell's background job, or under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handle_stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_of_the_checker_outlives_a_signal_to_all(checker: AnswerChecker) -> None:
    """A scheduler signals every process: a comparison that died of it would pass for a wrong answer."""
    assert checker.check([(r"\sqrt{50}", r"5\sqrt{2}")])[0].is_correct
    for worker in checker._workers:
        assert worker is not None
        worker.process.send_signal(signal.SIGTERM)
        worker.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        assert worker.process.poll() is None
    assert checker.check([(r"\sqrt{98}", r"7\sqrt{2}")])[0].is_correct


# --- real runs ----------------------------------------------------------------------------------------

TINY = [
    "--policy",
    "data/tiny/policy",
    "--reward",
    "data/tiny/reward",
    "--dataset",
    "digit_chains",
    "--batch_size",
    "2",
]
TINY += ["--max_new_tokens", "48", "--candidate_min_p", "0.02", "--max_rounds", "3"]
KILLS = 20


def command(name: str, folder: Path) -> list[str]:
    more = ["--max_problems", "150"]
    if name == "eval":
        more = [
            "--max_problems",
            "40",
            "--seeds",
            "0",
            "1",
            "--eval_methods",
            "greedy,best_of_1,best_of_4,nabla,control@best_of_4",
        ]
    return [sys.executable, "-m", "nabla_trl.cli.main", name, *TINY, *more, "--output_dir", str(folder)]


def amount(name: str, folder: Path) -> int:
    """Rows, or shards, on disk."""
    if name == "traces":
        return len(list(folder.glob("traces/*.parquet")))
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("rows/rows-*.jsonl"))


def result(name: str, folder: Path) -> list[Any]:
    if name == "traces":
        return [told(trace) for trace in read_traces(folder / "traces")]
    return rows_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval", "traces"])
def test_a_real_run_killed_twenty_times_ends_with_the_same(tmp_path: Path, name: str) -> None:
    """Each life ends at a random moment: while it starts, or some time after its first batch."""
    draw, cut = random.Random(name), tmp_path / "cut"
    quiet = {"cwd": ROOT, "env": ENV, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(name, tmp_path / "whole"), check=True, **quiet)
    kills, losses = 0, 0
    while kills < KILLS:
        before, early = amount(name, cut), draw.random() < 0.2
        with subprocess.Popen(command(name, cut), **quiet) as process:
            if early:
                time.sleep(draw.uniform(0, 5))
            else:
                while amount(name, cut) == before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.7))
            process.kill()
        assert process.returncode == -9, "it was done before it was killed: make it longer"
        assert amount(name, cut) >= before, "what was on disk is still there"
        kills += 1
        losses += amount(name, cut) == before
    assert losses < KILLS / 2
    subprocess.run(command(name, cut), check=True, **quiet)
    assert result(name, cut) == result(name, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_are_stopped_refuse_others_and_are_resumed_by_one(tmp_path: Path) -> None:
    recipe = ["recipes/distill.py", "--config", "recipes/tiny/distill.yaml", "--output_dir", str(tmp_path)]
    recipe += ["--stages", "traces", "--max_train_problems", "160", "--batch_size", "4", "--max_audit_problems", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    two = [*launch, "recipes/accelerate/multi_cpu.yaml", "--main_process_port", "0", *recipe]
    quiet = {"cwd": ROOT, "env": ENV, "text": True}
    with subprocess.Popen(two, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **quiet) as process:
        while len({path.name[:12] for path in tmp_path.glob("traces/*.parquet")}) < 2 and process.poll() is None:
            time.sleep(0.05)
        for other in (two, [sys.executable, *recipe]):
            refused = subprocess.run(other, capture_output=True, check=False, timeout=120, **quiet)
            said = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
            assert refused.returncode == 1 and len(said) == 1 and "is in use by process" in said[0]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    (last,) = [line for line in err.splitlines() if line.startswith("stopped at traces: ")]
    assert last.endswith(f"to go on: {shlex.join(two)}")
    done = len(read_traces(tmp_path / "traces"))
    assert 0 < done < 160
    ended = subprocess.run([sys.executable, *recipe], capture_output=True, check=True, timeout=300, **quiet)
    assert "traces: " in ended.stdout
    assert len(read_traces(tmp_path / "traces")) == 160  # which refuses a trace that is there twice
