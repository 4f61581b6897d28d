"""Libraries are quiet in a normal run, people hear what concerns them, and --verbose brings the rest back."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from nabla_trl.cli import quiet
from nabla_trl.cli.distill.launcher import split_launch_options, start_processes
from nabla_trl.cli.parsing import run_main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(quiet.VERBOSE_VARIABLE, "0")
    yield
    quiet.log_to_folder(None)


def test_warnings_of_libraries_go_to_the_log_of_the_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def main(argv: object) -> None:
        quiet.log_to_folder(tmp_path)
        for name in ("transformers.models.some", "datasets.builder", "torch.distributed", "bitsandbytes.cextension"):
            logging.getLogger(name).handle(record(name, logging.WARNING, quiet.__file__))
        logging.getLogger("transformers").handle(record("transformers.x", logging.ERROR, quiet.__file__))
        logging.getLogger("nabla_trl.search").warning("ours")
        logging.getLogger("my_model").handle(record("my_model", logging.WARNING, "/home/me/modeling_mine.py"))
        for file in (logging.__file__, "/home/me/modeling_mine.py"):
            warnings.warn_explicit("old\nname", FutureWarning, file, 7)

    assert run_main(main, [], resume_command="") == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "error: transformers: said",
        "warning: ours",
        "warning: my_model: said",
        "warning: /home/me/modeling_mine.py:7: FutureWarning: old name",
    ]
    log = (tmp_path / quiet.LOG_FILE).read_text()
    for name in ("transformers.models.some", "datasets.builder", "torch.distributed", "FutureWarning: old"):
        assert name in log, log


def record(name: str, level: int, path: str) -> logging.LogRecord:
    return logging.LogRecord(name, level, path, 1, "said", (), None)


def test_verbose_lets_libraries_speak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environ: dict[str, str] = {}
    quiet.prepare_environment(["--verbose"], environ)
    assert environ == {quiet.VERBOSE_VARIABLE: "1"}
    show = warnings.showwarning
    monkeypatch.setenv(quiet.VERBOSE_VARIABLE, "1")
    quiet.quiet_libraries()
    assert warnings.showwarning is show
    quiet.prepare_environment([], environ)
    assert environ == {quiet.VERBOSE_VARIABLE: "1"}


def test_nothing_is_logged_before_a_folder_is_known(tmp_path: Path) -> None:
    quiet._write_to_log("lost")
    quiet.log_to_folder(tmp_path / "not_made")
    quiet._write_to_log("lost")
    assert not list(tmp_path.iterdir())


# Lines of a run, by what they begin with.
OUR_LINES = re.compile(
    r"running on |audit: |train (sft|rloo): |loading |auditing |writing |(traces|greedy|nabla|sft_greedy)\b|method  |"
    r"\s+(report|page|summary|rows|traces|trained|plots): "
)


SMALL_RUN = (
    *("--config", "recipes/tiny/distill.yaml", "--max_train_problems", "8", "--max_eval_problems", "4"),
    *("--max_audit_problems", "4", "--audit_samples", "4", "--max_rounds", "2", "--seeds", "0", "--max_steps", "3"),
    *("--eval_methods", "greedy,nabla,sft_greedy", "--train_methods", "sft", "rloo", "--num_generations", "4"),
    *("--per_device_train_batch_size", "4"),
)
LAUNCHERS = {
    "accelerate": [
        *("accelerate.commands.launch", "--config_file", "recipes/accelerate/multi_cpu.yaml"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0", "recipes/distill.py"),
    ],
    "ours": ["nabla_trl.cli.main", "distill", "--accelerate_config", "recipes/accelerate/multi_cpu.yaml"],
}


def launch(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != quiet.VERBOSE_VARIABLE}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCHERS[name], *SMALL_RUN, *options]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_real_launch_prints_lines_of_ours_only(name: str, tmp_path: Path) -> None:
    ran = launch(name, "--output_dir", str(tmp_path))
    lines = [*ran.stdout.splitlines(), *ran.stderr.splitlines()]
    assert ran.returncode == 0, ran.stderr
    strange = [line for line in lines if not OUR_LINES.match(line)]
    assert not strange, "\n".join(strange)
    assert any(line.startswith("train rloo: ") for line in lines)


@pytest.mark.slow
def test_a_refused_launch_ends_without_a_traceback(tmp_path: Path) -> None:
    ran = launch("ours", "--output_dir", str(tmp_path / "out"), "--max_ruonds", "3", "--top_p", "7")
    lines = ran.stderr.splitlines()
    assert ran.returncode == 2 and ran.stdout == "" and len(lines) == 4, ran.stderr
    assert lines[0] == "error: unknown option --max_ruonds (did you mean --max_rounds?)"
    assert "--max_rounds 3" in lines[-1] and not (tmp_path / "out").exists()


def test_options_of_the_launch_are_split_off() -> None:
    argv = ["--num-processes", "2", "--beta", "1", "--accelerate_config=a.yaml", "--config", "b.yaml"]
    assert split_launch_options(argv) == (
        ["--num_processes", "2", "--config_file", "a.yaml"],
        ["--beta", "1", "--config", "b.yaml"],
    )
    assert split_launch_options(["--beta", "1"]) == ([], ["--beta", "1"])


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (130, 130), (-9, 137)])
def test_the_exit_code_of_a_process_is_that_of_the_launch(
    monkeypatch: pytest.MonkeyPatch, code: int, expected: int
) -> None:
    import accelerate.commands.launch as accelerate_launch

    def fail(args: object) -> None:
        raise subprocess.CalledProcessError(code, "x")

    monkeypatch.setattr(accelerate_launch, "launch_command", fail)
    assert start_processes(["--num_processes", "2"], ["--beta", "1"]) == expected


def test_a_full_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    assert run_main(main, [], resume_command="") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: CUDA out of memory. Tried to allocate 20.00 GiB. To fit: lower batch_size")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, "loading torch, transformers and trl …\n"), (False, "")])
def test_a_slow_start_is_said_on_a_terminal_until_torch_is_there(
    is_terminal: bool, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet._Startup, "timer", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    quiet.announce_startup(seconds=60)
    quiet.quiet_libraries()  # torch is there
    if quiet._Startup.timer is not None:
        quiet._Startup.timer.join(timeout=5)
        assert not quiet._Startup.timer.is_alive()
    assert capsys.readouterr().err == ""
    quiet.announce_startup(seconds=0)
    if quiet._Startup.timer is not None:
        quiet._Startup.timer.join(timeout=5)
    assert capsys.readouterr().err == expected
    quiet.stop_announcing_startup()
