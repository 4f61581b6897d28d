"""Measure what a search costs and where its time goes, against a plain implementation, on one machine in one run.

    python recipes/research/bench.py --policy P --reward R --output_file bench.json
    python recipes/research/bench.py --policy P --parts plain --max_plain_problems 4       # a random reward
    python recipes/research/bench.py --parts gradient --dtype bfloat16 --hidden_sizes 896 --num_layers 24  # on a GPU

The parts are

- `plain`: the published algorithm, by the engine over a batch and by `plain.py` one problem at a time. Compares
  decisions, FLOPs and seconds.
- `memory`: peak memory of a token gradient against that of a plain forward and backward pass.
- `gradient`: speed of a token gradient as a fraction of the device's matmul rate.
- `scaling`: FLOPs and seconds against the numbers of problems and of rounds.

On a CPU use the CPU seconds of the process, because other work on the machine affects them less than wall time. Both
are printed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from figures import fit_power_law_exponent, print_table, profile_stages
from passes import MODEL_KINDS, PassSpec, measure_gradient_speed, measure_memory_ratios, read_timer
from plain import PlainSearch, PlainTrace, list_differing_problems
from transformers import AutoModelForSequenceClassification

from nabla_trl.cli.arguments import DATASET_HELP, REWARD_HELP
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.loading import load_model, load_policy, resolve_device
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import CAUSAL_HEAD_WEIGHTS, SCORE_HEAD_WEIGHT, load_reward
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
    """Models, problems and sizes. Part plain searches with the preset paper, and part scaling with the defaults."""

    policy: str = option("data/tiny/policy", "Hub id or path of the policy, a causal language model.")
    reward: str = option(
        RANDOM_REWARD,
        f"random (the policy's body with a random score head, enough to measure speed), or {REWARD_HELP}",
    )
    dataset: str = option("digit_chains", DATASET_HELP)
    split: str = option("test", "Split of the data set.")
    parts: str = option(",".join(BENCHMARK_PARTS), "Parts to measure, separated by commas.")
    max_problems: int = option(32, "Part plain: maximum number of problems that the engine refines together.")
    max_plain_problems: int = option(
        4,
        "Part plain: maximum number of problems that the plain implementation refines too, one at a time. It is slow.",
    )
    max_rollouts: int = option(8, "Part plain: maximum number of responses per problem.")
    max_new_tokens: int = option(64, "Parts plain and scaling: maximum length of a response in tokens.")
    problem_counts: list[int] = option([8, 16, 32], "Part scaling: numbers of problems to measure.")
    round_counts: list[int] = option([1, 2, 4, 8], "Part scaling: numbers of rounds to measure.")
    vocab_size: int = option(151936, "Parts memory and gradient: vocabulary size of the random models.")
    batch_size: int = option(8, "Parts memory and gradient: responses per batch.")
    response_length: int = option(
        1024, "Parts memory and gradient: length of a response in tokens, without the prompt."
    )
    prompt_length: int = option(
        64, "Parts memory and gradient: length of a prompt in tokens. Prompts are in the key-value cache."
    )
    num_layers: int = option(4, "Parts memory and gradient: number of layers of the random models.")
    hidden_sizes: list[int] = option(
        [256],
        "Hidden sizes of the random models, multiples of 64. Part memory uses the first, part gradient all of them.",
    )
    num_repeats: int = option(3, "Part gradient: number of timed calls. The fastest one counts.")
    dtype: str = option(
        "float32",
        "Data type of the model weights: float32, bfloat16 or float16. Use bfloat16 on a GPU to save memory.",
    )
    device: str | None = option(
        None, "Device to run on, such as cpu or cuda:1 (default: a GPU if there is one, else the CPU)."
    )
    seed: int = option(0, "Random seed of the searches.")
    output_file: str = option("", "JSON file to write the measurements to (default: no file).")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts.split(",") if part not in BENCHMARK_PARTS]
        if unknown:
            raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(BENCHMARK_PARTS)}")
        for name in (
            *("max_plain_problems", "max_rollouts", "max_new_tokens", "batch_size", "response_length"),
            *("prompt_length", "num_layers", "num_repeats"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_problems < self.max_plain_problems:
            raise ValueError("max_problems must be at least max_plain_problems, which are the first of them")
        lists = self.problem_counts, self.round_counts, self.hidden_sizes
        if any(not values or min(values) < 1 for values in lists):
            raise ValueError(
                "problem_counts, round_counts and hidden_sizes must be lists of whole numbers of at least 1"
            )


class Benchmark:
    """One run with its models, which are loaded when a part first needs them."""

    def __init__(self, args: BenchArguments):
        self.args, self.device = args, resolve_device(args.device)
        self._models: tuple[Policy, Reward] | None = None

    def load_models(self) -> tuple[Policy, Reward]:
        """Return policy and reward. Later calls return the same objects."""
        if self._models is None:
            args = self.args
            policy = load_policy(args.policy, dtype=args.dtype, device=self.device)
            with tempfile.TemporaryDirectory() as folder:
                is_random = args.reward == RANDOM_REWARD
                name = save_random_reward(policy, args, folder) if is_random else args.reward
                reward = load_reward(name, policy=policy, dtype=args.dtype, device=self.device)
            self._models = policy, reward
        return self._models

    def load_first_problems(self, count: int) -> list[Problem]:
        """Return exactly so many problems.

        Raises:
            ValueError: if the data set has fewer.
        """
        problems = load_problems(self.args.dataset, split=self.args.split, max_problems=count)
        if len(problems) < count:
            raise ValueError(f"{self.args.dataset} has {len(problems)} problems, not {count}")
        return problems

    # --- parts ------------------------------------------------------------------------------------------

    def part_plain(self) -> dict[str, Any]:
        """Measure the engine over batches of problems, and the plain implementation on the first of them."""
        args = self.args
        policy, reward = self.load_models()
        problems = self.load_first_problems(args.max_problems)
        config = SearchConfig.from_preset(
            "paper", max_rollouts=args.max_rollouts, max_new_tokens=args.max_new_tokens, batch_size=args.max_problems
        )
        search = PlainSearch(policy, reward, config, args.seed)
        plain_problems = problems[: args.max_plain_problems]
        num_plain = len(plain_problems)
        plain_traces: list[PlainTrace] = []
        plain_seconds = self.measure_call(lambda: plain_traces.extend(map(search.solve, plain_problems)))
        rows = []
        smaller = [count for count in args.problem_counts if count < args.max_problems]
        for count in sorted({1, num_plain, args.max_problems, *smaller}):
            traces, seconds = self.run_search(problems[:count], config)
            num_common = min(count, num_plain)
            common_flops = sum(trace.cost.flops for trace in traces[:num_common])
            row: dict[str, Any] = {"problems": count, "flops": sum(trace.cost.flops for trace in traces) / count}
            row |= {name: value / count for name, value in seconds.items()}
            row |= {f"{name}_ratio": plain_seconds[name] / num_plain / row[name] for name in seconds}
            for name, include_one_hot in (("flops_ratio", True), ("model_flops_ratio", False)):
                plain_flops = [
                    search.compute_flops(problem.id, include_one_hot) for problem in plain_problems[:num_common]
                ]
                row[name] = sum(plain_flops) / common_flops
            different = list_differing_problems(traces[:num_common], plain_traces[:num_common])
            rows.append(row | {"compared": num_common, "different": different})
        facts = {name: value / num_plain for name, value in plain_seconds.items()}
        facts["flops"] = sum(search.compute_flops(problem.id) for problem in plain_problems) / num_plain
        facts["gradients"] = sum(trace.num_gradients for trace in plain_traces) / num_plain
        facts["revisions"] = sum(len(trace.decisions) for trace in plain_traces) / num_plain
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
                        ", ".join(row["different"]) or f"none of {row['compared']}",
                    ]
                    for row in rows
                ),
            ],
        )
        print(f"numbers are per problem; the plain search computed {facts['gradients']:.1f} gradients per problem")
        if args.reward == RANDOM_REWARD:
            print("the reward's head is random: this measures speed, with the shapes of a trained reward")
        stages = profile_stages(lambda: self.run_search(problems, config))
        print_table(["time of the engine", "s"], list(stages.items()))
        return {"plain": facts, "engine": rows, "profile": stages}

    def part_memory(self) -> dict[str, Any]:
        """Measure the peak memory of a token gradient and of a plain pass, each in a new process."""
        hidden_size = self.args.hidden_sizes[0]
        specs = [self.make_pass_spec(hidden_size, kind, share) for kind in MODEL_KINDS for share in (0.0, 0.5)]
        rows: list[dict[str, Any]] = [
            {"model_kind": spec.model_kind, "mixture_share": spec.mixture_share, **ratio}
            for spec, ratio in zip(specs, measure_memory_ratios(specs), strict=True)
        ]
        print_table(
            ["gradient of", "share of candidates", "plain MB", "token gradient MB", "ratio"],
            [
                [row["model_kind"], row["mixture_share"], row["plain"] / 1e6, row["gradient"] / 1e6, row["ratio"]]
                for row in rows
            ],
        )
        return {"passes": rows, "shape": asdict(specs[0])}

    def part_gradient(self) -> dict[str, Any]:
        """Measure the speed of a token gradient against the device's matmul rate in the same data type."""
        rows = []
        for hidden_size in self.args.hidden_sizes:
            for kind in MODEL_KINDS:
                speed = measure_gradient_speed(self.make_pass_spec(hidden_size, kind, 0.0), self.args.num_repeats)
                rows.append({"model_kind": kind, "hidden_size": hidden_size, **speed})
        names = ("seconds", "flops", "rate", "matmul_rate", "share", "plain_share")
        header = ["gradient of", "parameters", "s", "FLOPs", "FLOP/s", "matmul FLOP/s", "share", "share of plain pass"]
        print_table(header, [[row["model_kind"], row["parameters"], *(row[name] for name in names)] for row in rows])
        return {"passes": rows, "shape": asdict(self.make_pass_spec(self.args.hidden_sizes[0], MODEL_KINDS[0], 0.0))}

    def part_scaling(self) -> dict[str, Any]:
        """Measure the default search against the number of problems and of rounds."""
        args = self.args
        most_problems = max(args.problem_counts)
        config = SearchConfig(
            max_rounds=max(args.round_counts), max_new_tokens=args.max_new_tokens, batch_size=most_problems
        )
        by_problems = [(count, count, config) for count in args.problem_counts]
        by_rounds = [(count, most_problems, replace(config, max_rounds=count)) for count in args.round_counts]
        self.run_search(self.load_first_problems(min(args.problem_counts)), by_rounds[0][2])  # first calls are slow
        measurements = {}
        for name, runs in (("problems", by_problems), ("rounds", by_rounds)):
            rows = []
            for count, num_problems, run_config in runs:
                traces, seconds = self.run_search(self.load_first_problems(num_problems), run_config)
                rows.append({name: count, "flops": sum(trace.cost.flops for trace in traces), **seconds})
            print_table(
                [name, "GFLOPs", "CPU s", "wall s"],
                [[row[name], row["flops"] / 1e9, row["cpu"], row["wall"]] for row in rows],
            )
            slopes = {}
            if len(rows) > 1:
                slopes = {cost: fit_power_law_exponent(rows, name, cost) for cost in ("flops", "cpu", "wall")}
                print(f"cost grows as {name} to the power", ", ".join(f"{v:.2f} ({k})" for k, v in slopes.items()))
            measurements[name] = {"runs": rows, "slopes": slopes}
        return measurements

    # --- helpers ----------------------------------------------------------------------------------------

    def make_pass_spec(self, hidden_size: int, model_kind: str, mixture_share: float) -> PassSpec:
        """Return the description of a pass with the options' sizes."""
        args = self.args
        return PassSpec(
            model_kind=model_kind,
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
        """Run the engine's search and return its traces and the seconds of `measure_call`.

        Raises:
            ValueError: if a problem failed.
        """
        policy, reward = self.load_models()
        traces: list[Trace] = []
        seconds = self.measure_call(
            lambda: traces.extend(
                run_search(problems, policy=policy, reward=reward, config=config, seed=self.args.seed)
            )
        )
        for trace in traces:
            if trace.error is not None:
                raise ValueError(f"{trace.problem_id}: {trace.error}")
        return traces, seconds

    def measure_call(self, function: Callable[[], object]) -> dict[str, float]:
        """Call a function and return its CPU seconds ("cpu", on a GPU wall time) and its wall time ("wall")."""
        cpu_start, wall_start = read_timer(self.device), time.perf_counter()
        function()
        return {"cpu": read_timer(self.device) - cpu_start, "wall": time.perf_counter() - wall_start}


def save_random_reward(policy: Policy, args: BenchArguments, folder: str) -> str:
    """Save the policy's weights with a random score head as a reward, and return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model(
            AutoModelForSequenceClassification,
            args.policy,
            dtype="float32",
            device="cpu",
            allowed_missing=SCORE_HEAD_WEIGHT,
            allowed_unexpected=CAUSAL_HEAD_WEIGHTS,
            num_labels=1,
        )
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    [args] = parse_dataclasses([BenchArguments], argv)
    benchmark = Benchmark(args)
    measurements: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(benchmark.device) if benchmark.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "versions": get_package_versions(),
        "arguments": asdict(args),
    }
    for part in args.parts.split(","):
        print(f"\n{part}")
        measurements[part] = getattr(benchmark, f"part_{part}")()
        if args.output_file:  # after every part, so that nothing is lost if a later part fails
            Path(args.output_file).write_text(json.dumps(measurements, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main, resume_command=""))
