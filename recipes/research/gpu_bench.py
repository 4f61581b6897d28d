"""Measure on one large GPU what the engine is worth there, in one command of at most nine minutes.

    python recipes/research/gpu_bench.py --policy P --output_file gpu.json
    python recipes/research/gpu_bench.py --device cpu --slot_counts 1 4 --max_problems 4 --max_new_tokens 16  # a trial

The parts are

- `decode`: tokens per second at each number of slots, with and without CUDA graphs, beside `model.generate` of
  transformers. Twice as many sequences as slots are drawn.
- `throughput`: problems per hour of the search and of best-of-16 at the same policy and reward.
- `precision`: how many problems end with another response in bfloat16 than in float32, and in bfloat16 with another
  batch.
- `plain`: the published algorithm, by the engine and by `plain.py` one problem at a time (see `bench.py`).
- `gradient`: speed of a token gradient as a fraction of the device's matmul rate (see `bench.py`).

Every part has peak memory. A part that fails leaves its error in its place, and the parts after it still run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench import RANDOM_REWARD, BenchArguments, Benchmark
from figures import print_table

from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.cli.arguments import DATASET_HELP, REWARD_HELP
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.decoding import SlotDecoder
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import prefill_prompts
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest
from nabla_trl.models.sampling import make_rng
from nabla_trl.search.config import SearchConfig
from nabla_trl.traces.build import get_package_versions
from nabla_trl.utils.fields import option
from nabla_trl.utils.formatting import format_error

GPU_PARTS = ("decode", "throughput", "precision", "plain", "gradient")


@dataclass
class GpuBenchArguments:
    """Models, problems and sizes."""

    policy: str = option("data/tiny/policy", "Hub id or path of the policy, a causal language model.")
    reward: str = option(RANDOM_REWARD, f"random (the policy's body with a random score head), or {REWARD_HELP}")
    dataset: str = option("digit_chains", DATASET_HELP)
    parts: str = option(",".join(GPU_PARTS), "Parts to measure, separated by commas.")
    slot_counts: list[int] = option([1, 16, 64, 256], "Part decode: numbers of slots to measure.")
    max_problems: int = option(64, "Parts throughput, precision and plain: number of problems.")
    max_new_tokens: int = option(256, "Maximum length of a response in tokens.")
    max_rounds: int = option(8, "Parts throughput and precision: maximum number of rounds of a search.")
    num_layers: int = option(24, "Part gradient: number of layers of the random model.")
    hidden_size: int = option(896, "Part gradient: hidden size of the random model, a multiple of 64.")
    dtype: str = option("bfloat16", "Data type of the model weights, except in part precision.")
    device: str | None = option(None, "Device to run on (default: a GPU if there is one, else the CPU).")
    output_file: str = option("", "JSON file to write the measurements to (default: no file).")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts.split(",") if part not in GPU_PARTS]
        if unknown:
            raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(GPU_PARTS)}")
        if min(self.max_problems, self.max_new_tokens, self.max_rounds, *self.slot_counts) < 1:
            raise ValueError("max_problems, max_new_tokens, max_rounds and slot_counts must be at least 1")


class GpuBenchmark:
    """One run. The models of each data type are loaded once."""

    def __init__(self, args: GpuBenchArguments):
        self.args = args
        self._benchmarks: dict[str, Benchmark] = {}

    def get_benchmark(self, dtype: str) -> Benchmark:
        """Return the benchmark of `bench.py` with its models in this data type."""
        args = self.args
        if dtype not in self._benchmarks:
            bench_args = BenchArguments(
                policy=args.policy,
                reward=args.reward,
                dataset=args.dataset,
                max_problems=args.max_problems,
                max_plain_problems=min(2, args.max_problems),
                problem_counts=[1],
                max_new_tokens=args.max_new_tokens,
                num_layers=args.num_layers,
                hidden_sizes=[args.hidden_size],
                dtype=dtype,
                device=args.device,
            )
            self._benchmarks[dtype] = Benchmark(bench_args)
        return self._benchmarks[dtype]

    # --- parts -------------------------------------------------------------------------------------------

    def part_decode(self) -> list[dict[str, Any]]:
        """Draw the same number of sequences by the slots, by the slots with CUDA graphs, and by `model.generate`."""
        rows = []
        for num_slots in self.args.slot_counts:
            row: dict[str, Any] = {"slots": num_slots}
            row["slots_rate"] = self._measure_slots(num_slots, use_graphs=False)
            if self.get_benchmark(self.args.dtype).device.startswith("cuda"):
                row["graphs_rate"] = self._measure_slots(num_slots, use_graphs=True)
            row["generate_rate"] = self._measure_generate(num_slots)
            rows.append(row)
        names = ("slots_rate", "graphs_rate", "generate_rate")
        print_table(
            ["slots", "tokens/s", "with graphs", "model.generate"],
            [[row["slots"], *(row.get(name, "") for name in names)] for row in rows],
        )
        return rows

    def part_throughput(self) -> dict[str, float]:
        """Measure problems per hour of the search and of best-of-16."""
        benchmark = self.get_benchmark(self.args.dtype)
        policy, reward = benchmark.load_models()
        problems = benchmark.load_first_problems(self.args.max_problems)
        benchmark.run_search(problems[:2], self._make_config(2))  # first calls are slow
        traces, seconds = benchmark.run_search(problems, self._make_config(len(problems)))
        sampling = Sampling(max_new_tokens=self.args.max_new_tokens)
        best_seconds = benchmark.measure_call(
            lambda: draw_pool(problems, 16, policy=policy, reward=reward, sampling=sampling)
        )
        result = {
            "nabla": 3600 * len(problems) / seconds["wall"],
            "best_of_16": 3600 * len(problems) / best_seconds["wall"],
            "nabla_flops": sum(trace.cost.flops for trace in traces) / len(problems),
        }
        print_table(["problems per hour", ""], [[name, value] for name, value in result.items()])
        return result

    def part_precision(self) -> dict[str, int]:
        """Count the problems whose response depends on the data type, or in bfloat16 on the batch."""
        problems = self.get_benchmark("float32").load_first_problems(self.args.max_problems)
        together = self._make_config(len(problems))
        single, _ = self.get_benchmark("float32").run_search(problems, together)
        half, _ = self.get_benchmark("bfloat16").run_search(problems, together)
        half_apart, _ = self.get_benchmark("bfloat16").run_search(problems, replace(together, batch_size=1))
        result = {
            "problems": len(problems),
            "bfloat16_against_float32": sum(
                a.response_ids != b.response_ids for a, b in zip(single, half, strict=True)
            ),
            "bfloat16_alone_against_batch": sum(
                a.response_ids != b.response_ids for a, b in zip(half_apart, half, strict=True)
            ),
        }
        print_table(["other responses", "problems"], [[name, value] for name, value in result.items()])
        return result

    def part_plain(self) -> dict[str, Any]:
        """Measure the published algorithm by the engine and by `plain.py`."""
        return self.get_benchmark(self.args.dtype).part_plain()

    def part_gradient(self) -> dict[str, Any]:
        """Measure the speed of a token gradient against the device's matmul rate."""
        return self.get_benchmark(self.args.dtype).part_gradient()

    # --- helpers -----------------------------------------------------------------------------------------

    def _make_config(self, batch_size: int) -> SearchConfig:
        args = self.args
        return SearchConfig(max_rounds=args.max_rounds, max_new_tokens=args.max_new_tokens, batch_size=batch_size)

    def _make_prompts(self, count: int) -> list[list[int]]:
        benchmark = self.get_benchmark(self.args.dtype)
        policy, _ = benchmark.load_models()
        problems = benchmark.load_first_problems(min(count, self.args.max_problems))
        prompts = [policy.encode(problem) for problem in problems]
        return [prompts[index % len(prompts)] for index in range(count)]

    def _measure_slots(self, num_slots: int, use_graphs: bool) -> float:
        """Return the tokens per second of drawing 2 x `num_slots` sequences."""
        policy, _ = self.get_benchmark(self.args.dtype).load_models()
        prompts = [(str(index), ids) for index, ids in enumerate(self._make_prompts(2 * num_slots))]
        caches = prefill_prompts(policy, prompts, FlopCounter())
        sampling = Sampling(max_new_tokens=self.args.max_new_tokens)
        decoder = SlotDecoder(policy, sampling, max_sequences=num_slots)
        decoder.use_graphs = use_graphs
        rate = 0.0
        for _ in range(1 + use_graphs):  # the first time records the graphs
            for (name, ids), cache in zip(prompts, caches, strict=True):
                rng = make_rng(0, name, "gpu_bench")
                decoder.submit(name, GenerationRequest(name, ids, rng, self.args.max_new_tokens, cache))
            start, num_tokens = self._read_time(), 0
            while decoder.num_unfinished:
                for _, output in decoder.step():
                    if isinstance(output, Exception):
                        raise output
                    num_tokens += len(output.ids)
            rate = num_tokens / (self._read_time() - start)
        return rate

    def _measure_generate(self, batch_size: int) -> float:
        """Return the tokens per second of `model.generate` for two batches of `batch_size` sequences."""
        policy, _ = self.get_benchmark(self.args.dtype).load_models()
        pad = policy.tokenizer.pad_token_id if policy.tokenizer.pad_token_id is not None else min(policy.stop_ids)
        start, num_tokens = self._read_time(), 0
        all_prompts = self._make_prompts(2 * batch_size)
        for prompts in (all_prompts[:batch_size], all_prompts[batch_size:]):
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            output = policy.model.generate(
                input_ids=ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                max_new_tokens=self.args.max_new_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=pad,
                eos_token_id=sorted(policy.stop_ids),
            )
            for row in output[:, width:].tolist():
                ends = [index for index, token in enumerate(row) if token in policy.stop_ids]
                num_tokens += ends[0] + 1 if ends else len(row)
        return num_tokens / (self._read_time() - start)

    def _read_time(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    [args] = parse_dataclasses([GpuBenchArguments], argv)
    benchmark = GpuBenchmark(args)
    device = benchmark.get_benchmark(args.dtype).device
    measurements: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "versions": get_package_versions(),
        "arguments": asdict(args),
        "parts": {},
    }
    for part in args.parts.split(","):
        print(f"\n{part}", flush=True)
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        entry: dict[str, Any] = {}
        try:
            entry["result"] = getattr(benchmark, f"part_{part}")()
        except (RuntimeError, ValueError) as error:  # a device is lent for minutes: the other parts still count
            entry["error"] = format_error(error)
            print(f"error: {entry['error']}", file=sys.stderr)
        entry["seconds"] = time.perf_counter() - start
        if device.startswith("cuda"):
            entry["peak_bytes"] = torch.cuda.max_memory_allocated()
        measurements["parts"][part] = entry
        if args.output_file:
            Path(args.output_file).write_text(json.dumps(measurements, indent=1) + "\n")
    if all("error" in entry for entry in measurements["parts"].values()):
        raise ValueError("every part failed")


if __name__ == "__main__":
    sys.exit(run_main(main, resume_command=""))
