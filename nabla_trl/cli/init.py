"""`nabla-trl init`: write a commented configuration to begin with, or the files of the demo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nabla_trl
from nabla_trl.cli.parsing import Parser
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import check_choices, option, split_names
from nabla_trl.utils.files import write_atomic

TEMPLATE_FILE = Path(__file__).with_name("init_template.yaml")
# What the demo needs, relative to the repository, and to the folder `demo` of an installed package.
DEMO_PATTERNS = ("data/tiny/**/*", "recipes/*.py", "recipes/*/*.yaml")


@dataclass
class InitArguments:
    """Options of `nabla-trl init`."""

    policy: str = option(
        "Qwen/Qwen2.5-0.5B-Instruct", "Causal language model to refine and to train, as a hub id or path."
    )
    reward: str = option(
        "logratio:Qwen/Qwen2.5-1.5B-Instruct",
        "Reward to search with: a reward model with one label, or logratio:BETTER_MODEL of the policy's family.",
    )
    dataset: str = option(
        "gsm8k", "Data set: the name of a benchmark, or a .jsonl, .csv, .json, .parquet or .yaml file of your own."
    )
    train_methods: list[str] = option(
        ["sft"],
        "Training methods, separated by commas or spaces: sft, reward-weighted, dpo, soft-targets, rloo, grpo, "
        "on-policy-distillation.",
    )
    output_file: str = option("distill.yaml", "File to write. One that exists is never overwritten.")
    demo: bool = option(
        False,
        "Write data/tiny (an embedded policy and reward, 4 MB) and recipes/ into the current folder, in place of a "
        "configuration (default: false).",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [InitArguments],
        prog="nabla-trl init",
        usage="nabla-trl init [--policy P] [--reward R] [--dataset D] [--output_file FILE]\n"
        "       nabla-trl init --demo",
        description="Write a commented YAML file for nabla-trl distill, or the files of the demo.",
    )
    args = parser.parse_options(argv)[0]
    if args.demo:
        write_demo(Path())
    else:
        write_config(args)
    return 0


def write_config(args: InitArguments) -> None:
    """Write the configuration and say how to use it.

    Raises:
        ValueError: the file exists, an unknown training method, or a data set that cannot be read.
    """
    from nabla_trl.training.offline import SOFT_TARGETS, TRAIN_METHODS

    path, train_methods = Path(args.output_file), split_names(args.train_methods)
    checks = Checks()
    checks.require(not path.exists(), f"{path} exists: choose another --output_file, or delete it")
    checks.call(check_choices, "training method", train_methods, TRAIN_METHODS)
    size = ""
    if Path(args.dataset).suffix:  # a file: a benchmark of the hub is not downloaded here
        with checks.collect():
            problems = load_problems(args.dataset, split="train")
            num_graded = sum(problem.answer is not None for problem in problems)
            size = f"{args.dataset}: {len(problems)} problems, {num_graded} with a gold answer"
    checks.raise_faults()
    text = TEMPLATE_FILE.read_text(encoding="utf-8")
    values = {
        "FILE": str(path),
        "POLICY": json.dumps(args.policy),
        "REWARD": json.dumps(args.reward),
        "DATASET": json.dumps(args.dataset),
        "TRAIN_METHODS": json.dumps(train_methods),
        "SOFT_TARGETS": "soft_target_top_k: 16" if SOFT_TARGETS in train_methods else "# soft_target_top_k: 0",
        "OUTPUT_DIR": json.dumps(f"outputs/{path.stem}"),
    }
    for name, value in values.items():
        text = text.replace(f"<{name}>", value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    print(*filter(None, [size, f"{path} is written. Read it, then run: nabla-trl distill --config {path}"]), sep="\n")


def write_demo(folder: Path) -> None:
    """Write the files of the demo and say how to start it. Files that are there already stay as they are.

    Raises:
        ValueError: files with other contents are in the way. None is written then.
    """
    source = find_demo_files()
    names = [path.relative_to(source) for pattern in DEMO_PATTERNS for path in source.glob(pattern) if path.is_file()]
    new = [name for name in names if not (folder / name).exists()]
    in_the_way = [
        str(name)
        for name in names
        if name not in new
        and not ((folder / name).is_file() and (folder / name).read_bytes() == (source / name).read_bytes())
    ]
    if in_the_way:
        more = f" and {len(in_the_way) - 3} more" if len(in_the_way) > 3 else ""
        raise ValueError(
            f"{', '.join(in_the_way[:3])}{more} exist here with other contents: run this command in another folder"
        )
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{name}.tmp"
        shutil.copyfile(source / name, draft)  # contents alone: an installed package may be read-only
        draft.rename(folder / name)
    print(f"{len(new)} files written to data/tiny and recipes, {len(names) - len(new)} were there. Try:")
    print('  nabla-trl solve "9-5*4+7*2-6" --config recipes/tiny/search.yaml')
    print("  nabla-trl distill --config recipes/tiny/distill.yaml")


def find_demo_files() -> Path:
    """Return the folder that holds data/tiny and recipes: in an installed package, or the repository."""
    package = Path(nabla_trl.__file__).parent
    bundled = package / "demo"
    return bundled if bundled.is_dir() else package.parent
