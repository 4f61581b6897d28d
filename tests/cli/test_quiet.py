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


@pytest.mark.slow
def test_a_real_launch_prints_lines_of_ours_only(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "recipes/accelerate/multi_cpu.yaml",
    ]
    command += ["--num_cpu_threads_per_process", "1"]
    command += ["--main_process_port", "0", "recipes/distill.py"]
    command += ["--config", "recipes/tiny/distill.yaml", "--output_dir", str(tmp_path), "--max_train_problems", "8"]
    command += ["--max_eval_problems", "4", "--max_audit_problems", "4", "--audit_samples", "4", "--max_rounds", "2"]
    command += ["--seeds", "0", "--eval_methods", "greedy,nabla,sft_greedy", "--train_methods", "sft", "rloo"]
    command += ["--max_steps", "3", "--num_generations", "4", "--per_device_train_batch_size", "4"]
    environ = {name: value for name, value in os.environ.items() if name != quiet.VERBOSE_VARIABLE}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    lines = [*ran.stdout.splitlines(), *ran.stderr.splitlines()]
    assert ran.returncode == 0, ran.stderr
    strange = [line for line in lines if not OUR_LINES.match(line)]
    assert not strange, "\n".join(strange)
    assert any(line.startswith("train rloo: ") for line in lines)
