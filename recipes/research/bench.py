"""What a search costs, and where the rest goes: measured against the plain way, on one machine, in one run.

    python recipes/research/bench.py --policy P --reward R --output_file bench.json
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
from figures import fit_power_law_exponent, print_table, profile_stages
from passes import MODEL_KINDS, PassSpec, measure_gradient_speed, measure_memory_ratios, read_timer
from plain import PlainSearch, PlainTrace, list_differing_problems
from transformers import AutoModelForSequenceClassification

from nabla_trl.cli.arguments import DATASET_HELP, REWARD_HELP
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.loading import load_policy, resolve_device
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.traces.build import get_package_versions
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import option

BENCHMARK_PARTS = ("plain", "memory", "gradient", "scaling")
RANDOM_REWARD = "random"
TABLE_COLUMNS = ("cpu", "wall", "flops_ratio", "model_flops_ratio", "cpu_ratio", "wall_ratio")


@dataclass
class BenchArguments:
    """Models, problems and sizes. Part plain searches with the preset paper, part scaling with the defaults."""

    policy: str = option("data/tiny/policy", "hub id or path of the policy, a causal LM")
    reward: str = option(
        RANDOM_REWARD, f"random (the policy's body, a random head: enough for speed), or {REWARD_HELP}"
    )
    dataset: str = option("digit_chains", DATASET_HELP)
    split: str = option("test", "split of the dataset")
    parts: str = option(",".join(BENCHMARK_PARTS), "comma-separated parts to measure")
    max_problems: int = option(32, "plain: problems that the engine refines together, at most")
    max_plain_problems: int = option(4, "plain: problems that the plain way refines too, one at a time")
    max_rollouts: int = option(8, "plain: most responses per problem")
    max_new_tokens: int = option(64, "plain, scaling: longest response")
    problem_counts: list[int] = field(
        default_factory=lambda: [8, 16, 32], metadata={"help": "scaling: numbers of problems"}
    )
    round_counts: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "scaling: numbers of rounds"}
    )
    vocab_size: int = option(151936, "memory, gradient: rows of the embedding")
    batch_size: int = option(8, "memory, gradient: responses B")
    response_length: int = option(1024, "memory, gradient: tokens T of a response, after prompt_length others")
    prompt_length: int = option(64, "memory, gradient: tokens of a prompt, which are in the cache")
    num_layers: int = option(4, "memory, gradient: layers")
    hidden_sizes: list[int] = field(
        default_factory=lambda: [256],
        metadata={"help": "memory (the first), gradient: widths of the hidden states, multiples of 64"},
    )
    num_repeats: int = option(3, "gradient: timed calls, of which the quickest counts")
    dtype: str = option("float32", "weights: float32, bfloat16 or float16")
    device: str | None = option(None, "where to run, as cpu or cuda:1; a GPU if there is one")
    seed: int = option(0, "seed of the searches")
    output_file: str = option("", "file for the figures, as JSON")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts.split(",") if part not in BENCHMARK_PARTS]
        if unknown:
            raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(BENCHMARK_PARTS)}")
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
        if self.max_problems < self.max_plain_problems:
            raise ValueError("problems must be at least plain_problems, which are the first of them")
        if min(self.problem_counts + self.round_counts + self.hidden_sizes, default=0) < 1 or not (
            self.problem_counts and self.round_counts and self.hidden_sizes
        ):
            raise ValueError("sizes, rounds and widths must be lists of whole numbers of at least 1")


class Benchmark:
    """One run: its settings and, once asked for, its models."""

    def __init__(self, args: BenchArguments):
        self.args, self.device = args, resolve_device(args.device)
        self._models: tuple[Policy, Reward] | None = None

    def load_models(self) -> tuple[Policy, Reward]:
        if self._models is None:
            policy = load_policy(self.args.policy, dtype=self.args.dtype, device=self.device)
            with tempfile.TemporaryDirectory() as folder:
                name = (
                    save_random_reward(policy, self.args, folder)
                    if self.args.reward == RANDOM_REWARD
                    else self.args.reward
                )
                reward = load_reward(name, policy=policy, dtype=self.args.dtype, device=self.device)
            self._models = policy, reward
        return self._models

    def load_first_problems(self, count: int) -> list[Problem]:
        problems = load_problems(self.args.dataset, split=self.args.split, max_problems=count)
        if len(problems) < count:
            raise ValueError(f"{self.args.dataset} has {len(problems)} problems, not {count}")
        return problems

    # --- parts ------------------------------------------------------------------------------------------

    def part_plain(self) -> dict[str, Any]:
        """The engine over batches of problems against the plain way on the first of them."""
        args = self.args
        policy, reward = self.load_models()
        problems = self.load_first_problems(args.max_problems)
        config = SearchConfig.from_preset(
            "paper", rollouts=args.max_rollouts, max_new_tokens=args.max_new_tokens, batch_size=args.max_problems
        )
        few = problems[: args.max_plain_problems]
        search = PlainSearch(policy, reward, config, args.seed)
        plain: list[PlainTrace] = []
        plain_spent = self.measure_call(lambda: plain.extend(search.solve(problem) for problem in few))
        rows = []
        for count in sorted(
            {1, len(few), args.max_problems, *(size for size in args.problem_counts if size < args.max_problems)}
        ):
            traces, spent = self.run_search(problems[:count], config)
            common = min(count, len(few))
            same = sum(trace.cost.flops for trace in traces[:common])
            row: dict[str, Any] = {"problems": count, "flops": sum(trace.cost.flops for trace in traces) / count}
            row |= {name: value / count for name, value in spent.items()}
            row |= {f"{name}_ratio": plain_spent[name] / len(few) / row[name] for name in spent}
            for name, with_onehot in (("flops_ratio", True), ("model_flops_ratio", False)):
                row[name] = sum(search.compute_flops(one.id, with_onehot) for one in few[:common]) / same
            rows.append(
                row | {"compared": common, "different": list_differing_problems(traces[:common], plain[:common])}
            )
        facts = {name: value / len(few) for name, value in plain_spent.items()}
        facts["flops"] = sum(search.compute_flops(one.id) for one in few) / len(few)
        facts["gradients"] = sum(one.num_gradients for one in plain) / len(few)
        facts["revisions"] = sum(len(one.decisions) for one in plain) / len(few)
        print_table(
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
                *(
                    [
                        row["problems"],
                        row["flops"] / 1e9,
                        *(row[name] for name in TABLE_COLUMNS),
                        format_differing_problems(row),
                    ]
                    for row in rows
                ),
            ],
        )
        print(f"figures are per problem; the plain way computed {facts['gradients']:.1f} gradients each")
        if args.reward == RANDOM_REWARD:
            print("the reward's head is random: what is measured is speed, at the shapes of a trained one")
        stages = profile_stages(lambda: self.run_search(problems, config))
        print_table(["where the engine's seconds go", "s"], list(stages.items()))
        return {"plain": facts, "engine": rows, "profile": stages}

    def part_memory(self) -> dict[str, Any]:
        """Peak memory of a token gradient, each in a fresh process, against the plain pass of the same model."""
        specs = [
            self.make_pass_spec(self.args.hidden_sizes[0], kind, alpha) for kind in MODEL_KINDS for alpha in (0.0, 0.5)
        ]
        rows: list[dict[str, Any]] = [
            {"kind": spec.model_kind, "alpha": spec.mixture_share, **ratio}
            for spec, ratio in zip(specs, measure_memory_ratios(specs), strict=True)
        ]
        header = ["gradient of", "share of candidates", "plain MB", "token gradient MB", "ratio"]
        sizes = [(row, row["plain"] / 1e6, row["gradient"] / 1e6) for row in rows]
        print_table(header, [[row["kind"], row["alpha"], plain, ours, row["ratio"]] for row, plain, ours in sizes])
        return {"passes": rows, "shape": asdict(specs[0])}

    def part_gradient(self) -> dict[str, Any]:
        """The gradient pass against the device's own matmul rate in the same dtype."""
        rows = []
        for width in self.args.hidden_sizes:
            for kind in MODEL_KINDS:
                spec = self.make_pass_spec(width, kind, 0.0)
                rows.append({"kind": kind, "width": width, **measure_gradient_speed(spec, self.args.num_repeats)})
        names = ("seconds", "flops", "rate", "matmul_rate", "share", "plain_share")
        header = ["gradient of", "parameters", "s", "FLOPs", "FLOP/s", "matmul FLOP/s", "share", "share of plain pass"]
        print_table(header, [[row["kind"], row["parameters"], *(row[name] for name in names)] for row in rows])
        return {"passes": rows, "shape": asdict(self.make_pass_spec(self.args.hidden_sizes[0], MODEL_KINDS[0], 0.0))}

    def part_scaling(self) -> dict[str, Any]:
        """The search of the defaults against the number of problems and of rounds."""
        args, found = self.args, dict[str, Any]()
        most = max(args.problem_counts)
        config = SearchConfig(max_rounds=max(args.round_counts), max_new_tokens=args.max_new_tokens, batch_size=most)
        by_size = [(size, config) for size in args.problem_counts]
        by_rounds = [(rounds, replace(config, max_rounds=rounds)) for rounds in args.round_counts]
        self.run_search(self.load_first_problems(min(args.problem_counts)), by_rounds[0][1])  # first calls are slow
        for name, runs in (("problems", by_size), ("rounds", by_rounds)):
            rows = []
            for number, config in runs:
                traces, spent = self.run_search(
                    self.load_first_problems(number if name == "problems" else most), config
                )
                rows.append({name: number, "flops": sum(trace.cost.flops for trace in traces), **spent})
            print_table(
                [name, "GFLOPs", "CPU s", "wall s"],
                [[row[name], row["flops"] / 1e9, row["cpu"], row["wall"]] for row in rows],
            )
            slopes = (
                {what: fit_power_law_exponent(rows, name, what) for what in ("flops", "cpu", "wall")}
                if len(rows) > 1
                else {}
            )
            if slopes:
                print(f"cost grows as {name} to the power", ", ".join(f"{v:.2f} ({k})" for k, v in slopes.items()))
            found[name] = {"runs": rows, "slopes": slopes}
        return found

    # --- measuring --------------------------------------------------------------------------------------

    def make_pass_spec(self, hidden_size: int, kind: str, mixture_share: float) -> PassSpec:
        args = self.args
        return PassSpec(
            model_kind=kind,
            vocab_size=args.vocab_size,
            num_layers=args.num_layers,
            hidden_size=hidden_size,
            batch_size=args.batch_size,
            prompt_length=args.prompt_length,
            response_length=args.response_length,
            mixture_share=mixture_share,
            dtype=args.dtype,
            device=self.device,
        )

    def run_search(self, problems: Sequence[Problem], config: SearchConfig) -> tuple[list[Trace], dict[str, float]]:
        policy, reward = self.load_models()
        traces: list[Trace] = []
        spent = self.measure_call(
            lambda: traces.extend(
                run_search(problems, policy=policy, reward=reward, config=config, seed=self.args.seed)
            )
        )
        failed = [trace for trace in traces if trace.error is not None]
        if failed:
            raise ValueError(f"{failed[0].problem_id}: {failed[0].error}")
        return traces, spent

    def measure_call(self, function: Callable[[], object]) -> dict[str, float]:
        """Seconds of this process ("cpu"; on a GPU those of the wall) and on the wall."""
        begun, wall = read_timer(self.device), time.perf_counter()
        function()
        return {"cpu": read_timer(self.device) - begun, "wall": time.perf_counter() - wall}


def format_differing_problems(row: dict[str, Any]) -> str:
    """Problems on which the two searches decided differently."""
    return ", ".join(row["different"]) or f"none of {row['compared']}"


def save_random_reward(policy: Policy, args: BenchArguments, folder: str) -> str:
    """The policy's weights under a random score head, saved with its tokenizer as a reward is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(args.policy, num_labels=1)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    [args] = parse_dataclasses([BenchArguments], argv)
    bench = Benchmark(args)
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(bench.device) if bench.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "versions": get_package_versions(),
        "arguments": asdict(args),
    }
    for part in args.parts.split(","):
        print(f"\n{part}")
        found[part] = getattr(bench, f"part_{part}")()
        if args.output:  # after every part: what is measured is not lost
            Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main, resume_command=""))
