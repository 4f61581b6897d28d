"""`nabla-trl init`: a configuration that loads, the demo's files, and what an installed wheel can do with them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nabla_trl.cli.distill import run as distill
from nabla_trl.cli.init import DEMO_PATTERNS, find_demo_files
from nabla_trl.cli.main import main
from nabla_trl.planning.machine import Machine

ROOT = Path(__file__).parents[2]
LAPTOP = Machine("cpu", 16e9, has_bfloat16=False, num_processes=1, num_gpus=0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*argv: str) -> tuple[Any, ...]:
    return distill.build_parser(LAPTOP).parse_options(argv)


def test_the_configuration_loads_and_its_comments_name_options_and_defaults(here: Path, capsys: Any) -> None:
    problems = [{"question": f"{n}+{n}", "answer": 2 * n} for n in range(3)] + [{"question": "open"}]
    (here / "mine.jsonl").write_text("\n".join(map(json.dumps, problems)))
    flags = ["--policy", "my/policy", "--reward", 'logratio:"odd": name', "--dataset", "mine.jsonl"]
    assert main(["init", *flags, "--train_methods", "sft", "dpo", "--output_file", "runs/mine.yaml"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "mine.jsonl: 4 problems, 3 with a gold answer"
    assert out[1].endswith("nabla-trl distill --config runs/mine.yaml")
    args, search, _, train, _, config, *_ = parse("--config", "runs/mine.yaml")
    assert (args.policy, args.reward, args.dataset) == ("my/policy", 'logratio:"odd": name', "mine.jsonl")
    assert args.train_methods == ["sft", "dpo"] and train.tuning == "lora"
    assert (search.max_rounds, config.output_dir) == (8, "outputs/mine")
    text = (here / "runs/mine.yaml").read_text()
    assert "<" not in text.replace("<=", ""), "a place was not filled"
    optional = yaml.safe_load("\n".join(re.findall(r"^# (\w+: [\w./-]+)$", text, re.MULTILINE)))
    assert {"eval_dataset", "beta", "batch_size", "report_to", "test_fraction"} <= set(optional)
    (here / "all.yaml").write_text(yaml.safe_dump(optional))
    parse("--policy", "p", "--reward", "r", "--config", "all.yaml")
    assert args.test_fraction == optional["test_fraction"]


def test_without_options_there_is_an_example_to_change(here: Path) -> None:
    assert main(["init"]) == 0
    assert parse("--config", "distill.yaml")[0].dataset == "gsm8k"


def test_a_method_that_needs_an_option_of_the_search_gets_it(here: Path) -> None:
    assert main(["init", "--train_methods", "soft-targets"]) == 0
    assert parse("--config", "distill.yaml")[1].soft_target_top_k == 16


def test_everything_in_the_way_is_said_at_once_and_nothing_is_written(here: Path, capsys: Any) -> None:
    (here / "distill.yaml").write_text("mine: true\n")
    flags = ["--dataset", "nowhere.jsonl", "--train_methods", "ppo"]
    assert main(["init", *flags]) != 0
    err = capsys.readouterr().err
    for fault in ("distill.yaml exists", "unknown training method 'ppo'", "nowhere.jsonl"):
        assert fault in err
    assert (here / "distill.yaml").read_text() == "mine: true\n"


def test_the_demo_is_written_once_and_never_over_other_files(here: Path, capsys: Any) -> None:
    assert main(["init", "--demo"]) == 0
    written = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert {"recipes/distill.py", "recipes/tiny/distill.yaml", "data/tiny/policy/model.safetensors"} <= written
    assert all((here / name).read_bytes() == (ROOT / name).read_bytes() for name in written)
    assert main(["init", "--demo"]) == 0
    assert capsys.readouterr().out.count("0 files written") == 1
    (here / "recipes/tiny/distill.yaml").write_text("policy: mine\n")
    (here / "recipes/distill.py").unlink()
    assert main(["init", "--demo"]) != 0
    assert "recipes/tiny/distill.yaml exist here with other contents" in capsys.readouterr().err
    assert not (here / "recipes/distill.py").exists(), "whole or not at all"


# --- an installed wheel ------------------------------------------------------------------------------------


def run(command: list[str], folder: Path, **variables: str) -> str:
    ran = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demo_from_an_empty_folder(tmp_path: Path) -> None:
    """The wheel is built from the sdist, and installed into a folder that cannot be written to."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    python = sys.executable
    run([python, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)], ROOT)
    (tmp_path / "source").mkdir()
    run(["tar", "xzf", str(next(tmp_path.glob("*.tar.gz"))), "-C", str(tmp_path / "source")], tmp_path)
    source = next((tmp_path / "source").iterdir())
    run([python, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], source)
    site, work = tmp_path / "site", tmp_path / "work"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    run([*pip, str(next(tmp_path.glob("*.whl")))], tmp_path)
    subprocess.run(["chmod", "-R", "a-w", str(site)], check=True)
    work.mkdir()
    here = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    found = run([python, "-c", "import nabla_trl; print(nabla_trl.__file__)"], work, **here)
    assert Path(found.strip()).is_relative_to(site)
    command = [python, "-m", "nabla_trl.cli"]
    run([*command, "init", "--demo"], work, **here)
    bundled = [path for pattern in DEMO_PATTERNS for path in find_demo_files().glob(pattern) if path.is_file()]
    names = {path.relative_to(work) for path in work.rglob("*") if path.is_file()}
    assert names == {path.relative_to(ROOT) for path in bundled}
    assert "0" in run([*command, "solve", "9-5*4+7*2-6", "--config", "recipes/tiny/search.yaml"], work, **here)
    small = ["--max_train_problems", "16", "--max_eval_problems", "4", "--max_audit_problems", "4", "--seeds", "0"]
    small += ["--eval_methods", "greedy,nabla,sft_greedy", "--max_rounds", "3", "--num_train_epochs", "20"]
    run([*command, "distill", "--config", "recipes/tiny/distill.yaml", *small], work, **here)
    summary = json.loads((work / "outputs/tiny/summary.json").read_text())
    assert {"accuracy.greedy", "accuracy.nabla", "accuracy.sft_greedy"} <= set(summary)
    launch = [python, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    options = ["--config", "recipes/tiny/distill.yaml", *small]
    again = run([*launch, "-m", "nabla_trl.distill", *options, "--stages", "traces,train"], work, **here)
    assert "16 problems are already done" in again and "train sft: already done" in again
