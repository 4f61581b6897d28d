"""What a search costs, and where the rest goes: measured against the plain way, on one machine, in one run.

    python recipes/research/bench.py --policy P --reward R --output bench.json
    python recipes/research/bench.py --policy P --parts plain --problems 32 --plain_problems 4      # reward: a random head
    python recipes/research/bench.py --parts gradient --dtype bfloat16 --widths 896 1536 --layers 24    # on a GPU

Parts: `plain` (the published algorithm: the engine over a batch against `plain.py`, one problem at a time; decisions,
FLOPs, seconds), `memory` (peak of a token gradient against a plain forward and backward), `gradient` (share of the
device's matmul rate), `scaling` (FLOPs and seconds against problems and rounds). On a CPU take the process's own
seconds, which other work on the machine disturbs less than those on the wall; both are shown.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from figures import profile, slope, table
from passes import KINDS, Pass, gradient_speed, memory_ratios, seconds
from plain import PlainSearch, PlainTrace, differing
from transformers import AutoModelForSequenceClassification

from nabla_trl.cli.arguments import DATASETS, REWARDS
from nabla_trl.cli.parsing import parse, quiet_libraries, run_main
from nabla_trl.models.loading import load_policy, usable_device
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.loop import solve
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.traces.build import versions
from nabla_trl.traces.schema import Trace

PARTS = ("plain", "memory", "gradient", "scaling")
RANDOM = "random"
SHOWN = ("cpu", "wall", "flops_ratio", "model_flops_ratio", "cpu_ratio", "wall_ratio")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BenchArguments:
    """Models, problems and sizes. Part plain searches with the preset paper, part scaling with the defaults."""

    policy: str = _option("data/tiny/policy", "hub id or path of the policy, a causal LM")
    reward: str = _option(RANDOM, f"random (the policy's body, a random head: enough for speed), or {REWARDS}")
    dataset: str = _option("chains", DATASETS)
    split: str = _option("test", "split of the dataset")
    parts: str = _option(",".join(PARTS), "comma-separated parts to measure")
    problems: int = _option(32, "plain: problems that the engine refines together, at most")
    plain_problems: int = _option(4, "plain: problems that the plain way refines too, one at a time")
    rollouts: int = _option(8, "plain: most responses per problem")
    answer_tokens: int = _option(64, "plain, scaling: longest response")
    sizes: list[int] = field(default_factory=lambda: [8, 16, 32], metadata={"help": "scaling: numbers of problems"})
    rounds: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "scaling: numbers of rounds"})
    vocabulary: int = _option(151936, "memory, gradient: rows of the embedding")
    rows: int = _option(8, "memory, gradient: responses B")
    length: int = _option(1024, "memory, gradient: tokens T of a response, after prompt_length others")
    prompt_length: int = _option(64, "memory, gradient: tokens of a prompt, which are in the cache")
    layers: int = _option(4, "memory, gradient: layers")
    widths: list[int] = field(
        default_factory=lambda: [256],
        metadata={"help": "memory (the first), gradient: widths of the hidden states, multiples of 64"},
    )
    repeats: int = _option(3, "gradient: timed calls, of which the quickest counts")
    dtype: str = _option("float32", "weights: float32, bfloat16 or float16")
    device: str | None = _option(None, "where to run, as cpu or cuda:1; a GPU if there is one")
    seed: int = _option(0, "seed of the searches")
    output: str = _option("", "file for the figures, as JSON")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts.split(",") if part not in PARTS]
        if unknown:
            raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
        for name in (
            "plain_problems",
            "rollouts",
            "answer_tokens",
            "rows",
            "length",
            "prompt_length",
            "layers",
            "repeats",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.problems < self.plain_problems:
            raise ValueError("problems must be at least plain_problems, which are the first of them")
        if min(self.sizes + self.rounds + self.widths, default=0) < 1 or not (
            self.sizes and self.rounds and self.widths
        ):
            raise ValueError("sizes, rounds and widths must be lists of whole numbers of at least 1")


class Bench:
    """One run: its settings and, once asked for, its models."""

    def __init__(self, args: BenchArguments):
        self.args, self.device = args, usable_device(args.device)
        self._models: tuple[Policy, Reward] | None = None

    def models(self) -> tuple[Policy, Reward]:
        if self._models is None:
            policy = load_policy(self.args.policy, dtype=self.args.dtype, device=self.device)
            with tempfile.TemporaryDirectory() as folder:
                name = random_reward(policy, self.args, folder) if self.args.reward == RANDOM else self.args.reward
                reward = load_reward(name, policy=policy, dtype=self.args.dtype, device=self.device)
            self._models = policy, reward
        return self._models

    def problems(self, count: int) -> list[Problem]:
        problems = load_problems(self.args.dataset, split=self.args.split, limit=count)
        if len(problems) < count:
            raise ValueError(f"{self.args.dataset} has {len(problems)} problems, not {count}")
        return problems

    # --- parts ------------------------------------------------------------------------------------------

    def part_plain(self) -> dict[str, Any]:
        """The engine over batches of problems against the plain way on the first of them."""
        args = self.args
        policy, reward = self.models()
        problems = self.problems(args.problems)
        config = ReasonerConfig.preset(
            "paper", rollouts=args.rollouts, max_new_tokens=args.answer_tokens, batch_size=args.problems
        )
        few = problems[: args.plain_problems]
        search = PlainSearch(policy, reward, config, args.seed)
        plain: list[PlainTrace] = []
        plain_spent = self.timed(lambda: plain.extend(search.solve(problem) for problem in few))
        rows = []
        for count in sorted({1, len(few), args.problems, *(size for size in args.sizes if size < args.problems)}):
            traces, spent = self.searched(problems[:count], config)
            common = min(count, len(few))
            same = sum(trace.cost.flops for trace in traces[:common])
            row: dict[str, Any] = {"problems": count, "flops": sum(trace.cost.flops for trace in traces) / count}
            row |= {name: value / count for name, value in spent.items()}
            row |= {f"{name}_ratio": plain_spent[name] / len(few) / row[name] for name in spent}
            for name, with_onehot in (("flops_ratio", True), ("model_flops_ratio", False)):
                row[name] = sum(search.flops(one.id, with_onehot) for one in few[:common]) / same
            rows.append(row | {"compared": common, "different": differing(traces[:common], plain[:common])})
        facts = {name: value / len(few) for name, value in plain_spent.items()}
        facts["flops"] = sum(search.flops(one.id) for one in few) / len(few)
        facts["gradients"] = sum(one.gradients for one in plain) / len(few)
        facts["revisions"] = sum(len(one.moves) for one in plain) / len(few)
        table(
            [
                "problems",
                "GFLOPs",
                "CPU s",
                "wall s",
                "× FLOPs",
                "(model alone)",
                "× CPU",
                "× wall",
                "other decisions",
            ],
            [
                ["plain, 1", facts["flops"] / 1e9, facts["cpu"], facts["wall"], *[""] * 5],
                *([row["problems"], row["flops"] / 1e9, *(row[name] for name in SHOWN), others(row)] for row in rows),
            ],
        )
        print(f"figures are per problem; the plain way computed {facts['gradients']:.1f} gradients each")
        if args.reward == RANDOM:
            print("the reward's head is random: what is measured is speed, at the shapes of a trained one")
        stages = profile(lambda: self.searched(problems, config))
        table(["where the engine's seconds go", "s"], list(stages.items()))
        return {"plain": facts, "engine": rows, "profile": stages}

    def part_memory(self) -> dict[str, Any]:
        """Peak memory of a token gradient, each in a fresh process, against the plain pass of the same model."""
        specs = [self.spec(self.args.widths[0], kind, alpha) for kind in KINDS for alpha in (0.0, 0.5)]
        rows: list[dict[str, Any]] = [
            {"kind": spec.kind, "alpha": spec.alpha, **ratio}
            for spec, ratio in zip(specs, memory_ratios(specs), strict=True)
        ]
        header = ["gradient of", "share of candidates", "plain MB", "token gradient MB", "ratio"]
        sizes = [(row, row["plain"] / 1e6, row["gradient"] / 1e6) for row in rows]
        table(header, [[row["kind"], row["alpha"], plain, ours, row["ratio"]] for row, plain, ours in sizes])
        return {"passes": rows, "shape": asdict(specs[0])}

    def part_gradient(self) -> dict[str, Any]:
        """The gradient pass against the device's own matmul rate in the same dtype."""
        rows = []
        for width in self.args.widths:
            for kind in KINDS:
                spec = self.spec(width, kind, 0.0)
                rows.append({"kind": kind, "width": width, **gradient_speed(spec, self.args.repeats)})
        names = ("seconds", "flops", "rate", "matmul_rate", "share", "plain_share")
        header = ["gradient of", "parameters", "s", "FLOPs", "FLOP/s", "matmul FLOP/s", "share", "share of plain pass"]
        table(header, [[row["kind"], row["parameters"], *(row[name] for name in names)] for row in rows])
        return {"passes": rows, "shape": asdict(self.spec(self.args.widths[0], KINDS[0], 0.0))}

    def part_scaling(self) -> dict[str, Any]:
        """The search of the defaults against the number of problems and of rounds."""
        args, found = self.args, dict[str, Any]()
        most = max(args.sizes)
        config = ReasonerConfig(rounds=max(args.rounds), max_new_tokens=args.answer_tokens, batch_size=most)
        by_size = [(size, config) for size in args.sizes]
        by_rounds = [(rounds, replace(config, rounds=rounds)) for rounds in args.rounds]
        self.searched(self.problems(min(args.sizes)), by_rounds[0][1])  # first calls are slow
        for name, runs in (("problems", by_size), ("rounds", by_rounds)):
            rows = []
            for number, config in runs:
                traces, spent = self.searched(self.problems(number if name == "problems" else most), config)
                rows.append({name: number, "flops": sum(trace.cost.flops for trace in traces), **spent})
            table(
                [name, "GFLOPs", "CPU s", "wall s"],
                [[row[name], row["flops"] / 1e9, row["cpu"], row["wall"]] for row in rows],
            )
            slopes = {what: slope(rows, name, what) for what in ("flops", "cpu", "wall")} if len(rows) > 1 else {}
            if slopes:
                print(f"cost grows as {name} to the power", ", ".join(f"{v:.2f} ({k})" for k, v in slopes.items()))
            found[name] = {"runs": rows, "slopes": slopes}
        return found

    # --- measuring --------------------------------------------------------------------------------------

    def spec(self, width: int, kind: str, alpha: float) -> Pass:
        args = self.args
        return Pass(
            kind=kind,
            vocabulary=args.vocabulary,
            layers=args.layers,
            width=width,
            rows=args.rows,
            prompt=args.prompt_length,
            length=args.length,
            alpha=alpha,
            dtype=args.dtype,
            device=self.device,
        )

    def searched(self, problems: Sequence[Problem], config: ReasonerConfig) -> tuple[list[Trace], dict[str, float]]:
        policy, reward = self.models()
        traces: list[Trace] = []
        spent = self.timed(
            lambda: traces.extend(solve(problems, policy=policy, reward=reward, config=config, seed=self.args.seed))
        )
        failed = [trace for trace in traces if trace.error is not None]
        if failed:
            raise ValueError(f"{failed[0].problem_id}: {failed[0].error}")
        return traces, spent

    def timed(self, call: Callable[[], object]) -> dict[str, float]:
        """Seconds of this process ("cpu"; on a GPU those of the wall) and on the wall."""
        begun, wall = seconds(self.device), time.perf_counter()
        call()
        return {"cpu": seconds(self.device) - begun, "wall": time.perf_counter() - wall}


def others(row: dict[str, Any]) -> str:
    """Problems on which the two searches decided differently."""
    return ", ".join(row["different"]) or f"none of {row['compared']}"


def random_reward(policy: Policy, args: BenchArguments, folder: str) -> str:
    """The policy's weights under a random score head, saved with its tokenizer as a reward is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(args.policy, num_labels=1)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    [args] = parse([BenchArguments], argv)
    bench = Bench(args)
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(bench.device) if bench.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "arguments": asdict(args),
    }
    for part in args.parts.split(","):
        print(f"\n{part}")
        found[part] = getattr(bench, f"part_{part}")()
        if args.output:  # after every part: what is measured is not lost
            Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main, again=""))
