"""Measure the peak memory and the speed of a gradient pass, and those of a plain forward and backward pass.

`bench.py` uses this module. On a CPU, peak memory is that of a whole process, so every measurement has its own:

    python recipes/research/passes.py '[{"pass_type": "gradient", "model_kind": "scalar"}, ...]'  # prints bytes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, Qwen2Config

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.objectives import Objective, Sample, ScoreCache
from nabla_trl.gradient.relaxation import build_mixture
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter, measure_model_size
from nabla_trl.models.loading import DTYPES
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.fields import coerce_fields
from nabla_trl.utils.files import parse_json

MODEL_KINDS = ("scalar", "log-likelihood")
PASS_TYPES = ("plain", "gradient")


@dataclass(frozen=True)
class PassSpec:
    """One gradient pass over a random model.

    Attributes:
        pass_type: "plain" (forward and backward pass of the body through inputs_embeds, without a head) or "gradient"
            (`compute_token_gradient`).
        batch_size: number of responses.
        prompt_length, response_length: lengths in tokens.
        mixture_share: weight of the candidates in the input embeddings. 0 means the response's own tokens.

    Raises:
        ValueError: if a value is not allowed.
    """

    pass_type: str = "gradient"
    model_kind: str = "scalar"
    vocab_size: int = 151936
    num_layers: int = 4
    hidden_size: int = 256
    batch_size: int = 8
    prompt_length: int = 64
    response_length: int = 1024
    num_candidates: int = 16
    mixture_share: float = 0.0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model_kind not in MODEL_KINDS or self.pass_type not in PASS_TYPES:
            raise ValueError(f"a pass is one of {', '.join(PASS_TYPES)} and {', '.join(MODEL_KINDS)}")
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64, the size of a head, not {self.hidden_size}")


def make_random_model(spec: PassSpec) -> PreTrainedModel:
    """Return a Qwen2 with the proportions of its smallest release: heads of 64, two for keys, an MLP of 5.4 d."""
    heads = spec.hidden_size // 64
    config = Qwen2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.hidden_size * 38 // 7,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=spec.prompt_length + spec.response_length + 1,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
    )
    auto = AutoModelForCausalLM if spec.model_kind == "log-likelihood" else AutoModelForSequenceClassification
    with torch.random.fork_rng(), torch.device(spec.device):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=DTYPES[spec.dtype])
    return model.eval().requires_grad_(False)


def make_random_objective(spec: PassSpec, model: PreTrainedModel) -> Objective:
    """Return the reward's objective with a random model, whose prompts are given as ids."""
    size = measure_model_size(model, "model")
    options: dict[str, Any] = {
        "vocab_map": torch.arange(spec.vocab_size),
        "encode_prompt": lambda problem, prompt_ids: prompt_ids,
    }
    if spec.model_kind == "log-likelihood":
        return LikelihoodObjective(model, size, **options)
    return ScoreObjective(model, size, turn_end_ids=[], stop_ids=frozenset(), **options)


def make_random_samples(spec: PassSpec) -> tuple[list[Sample], list[Tensor]]:
    """Return B samples and their candidates [T, K], of which the first is the response's own token."""
    generator = torch.Generator().manual_seed(1)
    samples, tables = [], []
    for row in range(spec.batch_size):
        table = torch.randint(spec.vocab_size, (spec.response_length, spec.num_candidates), generator=generator)
        prompt = torch.randint(spec.vocab_size, (spec.prompt_length,), generator=generator).tolist()
        samples.append(Sample(Problem(id=str(row), question="?"), prompt, table[:, 0].tolist()))
        tables.append(table)
    return samples, tables


def run_plain_pass(spec: PassSpec, model: PreTrainedModel) -> None:
    """Run a forward and a backward pass of the model's body through inputs_embeds [B, prompt + T, d]."""
    ids = torch.randint(
        spec.vocab_size, (spec.batch_size, spec.prompt_length + spec.response_length), device=model.device
    )
    embeds = model.get_input_embeddings()(ids).requires_grad_(True)
    model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()


def prepare_gradient_pass(spec: PassSpec, model: PreTrainedModel) -> Callable[[FlopCounter], list[Tensor]]:
    """Return a call of `compute_token_gradient` whose prompts are already cached."""
    objective = make_random_objective(spec, model)
    samples, tables = make_random_samples(spec)
    caches: list[list[ScoreCache]] = [[cache] for cache in objective.compute_prompt_caches(samples, FlopCounter())]
    uniform = torch.zeros(spec.response_length, spec.num_candidates)
    mixtures = [
        build_mixture(sample.response_ids, table, uniform, spec.mixture_share)
        for sample, table in zip(samples, tables, strict=True)
    ]
    relaxed = mixtures if spec.mixture_share else None
    return lambda flop_counter: compute_token_gradient(
        [objective], samples, caches, tables, flop_counter=flop_counter, relaxed_responses=relaxed
    )


def run_pass(spec: PassSpec, model: PreTrainedModel) -> None:
    """Run one pass."""
    if spec.pass_type == "plain":
        run_plain_pass(spec, model)
    else:
        prepare_gradient_pass(spec, model)(FlopCounter())


# --- memory ------------------------------------------------------------------------------------------------


def read_memory_status(name: str) -> int:
    """Return a value of /proc/self/status in bytes: VmRSS is the current memory, VmHWM its maximum so far.

    `getrusage` has a maximum too, but that one begins at the memory of the parent when it forked.

    Raises:
        ValueError: if there is no such file.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("the peak memory of a pass on a CPU is read from /proc: measure on Linux, or on a GPU")
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measure_peak_memory(spec: PassSpec) -> int:
    """Return the peak memory of a pass in bytes, without the model. On a CPU the process must be new."""
    model = make_random_model(spec)
    # Libraries keep some memory after their first use.
    run_pass(replace(spec, batch_size=1, prompt_length=2, response_length=4), model)
    if spec.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(spec.device)
        before = torch.cuda.memory_allocated(spec.device)
        run_pass(spec, model)
        return torch.cuda.max_memory_allocated(spec.device) - before
    before = read_memory_status("VmRSS")
    run_pass(spec, model)
    return read_memory_status("VmHWM") - before


def measure_peaks_in_processes(specs: Sequence[PassSpec]) -> list[int]:
    """Return `measure_peak_memory` of every spec, each in its own process.

    Raises:
        ValueError: if a process failed.
    """
    # Return freed blocks to the system at once, so that the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, json.dumps([asdict(spec) for spec in specs])]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    peaks = [int(line) for line in done.stdout.split()]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed, perhaps for want of memory"])[-1]
        raise ValueError(f"measuring {specs[len(peaks)]} failed: {reason}")
    return peaks


def measure_memory_ratios(specs: Sequence[PassSpec]) -> list[dict[str, float]]:
    """Return for every spec the peak memory of a plain pass and of a token gradient in bytes, and their ratio."""
    peaks = measure_peaks_in_processes([replace(spec, pass_type=kind) for spec in specs for kind in PASS_TYPES])
    return [
        {"plain": plain, "gradient": gradient, "ratio": gradient / plain}
        for plain, gradient in zip(peaks[::2], peaks[1::2], strict=True)
    ]


def main(argv: Sequence[str]) -> int:
    """Print the peak memory of every spec, measured in child processes that begin with loaded libraries only."""
    parser = argparse.ArgumentParser(
        description="Print the peak memory in bytes of gradient passes, one a line. bench.py calls this script.",
        epilog=f"Keys of a pass and their defaults: {json.dumps(asdict(PassSpec()))}",
    )
    parser.add_argument("passes", help='JSON list of passes, such as [{"pass_type": "gradient", "batch_size": 8}]')
    for spec in _parse_passes(parser.parse_args(argv).passes):
        child = os.fork()
        if not child:
            print(measure_peak_memory(spec), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            return 1
    return 0


def _parse_passes(text: str) -> list[PassSpec]:
    """Return the passes of a JSON list.

    Raises:
        ValueError: not a list of objects, or unknown keys or values.
    """
    values = parse_json(text)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("the passes must be a JSON list of objects")
    return [PassSpec(**coerce_fields(value, [PassSpec], source="pass")) for value in values]


# --- speed -------------------------------------------------------------------------------------------------


def read_timer(device: str) -> float:
    """Return a time in seconds, of which differences have a meaning.

    On a CPU it is the CPU time of this process, which other processes affect less than wall time. On a GPU it is the
    wall time after the GPU's work has ended.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure_best_seconds(function: Callable[[], object], device: str, num_repeats: int) -> float:
    """Return the seconds of the fastest of several calls, after one that is not timed."""
    function()
    seconds = []
    for _ in range(num_repeats):
        start = read_timer(device)
        function()
        seconds.append(read_timer(device) - start)
    return min(seconds)


def measure_matmul_rate(dtype: str, device: str, num_repeats: int) -> float:
    """Return the FLOPs per second of one large square matrix product."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / measure_best_seconds(lambda: a @ b, device, num_repeats)


def measure_gradient_speed(spec: PassSpec, num_repeats: int) -> dict[str, float]:
    """Return FLOPs by formula, seconds and the share of the measured matmul rate, for the pass and for a plain one."""
    model, flop_counter = make_random_model(spec), FlopCounter()
    call = prepare_gradient_pass(spec, model)
    call(flop_counter)
    flops = flop_counter.get_total_cost().flops
    rate = measure_matmul_rate(spec.dtype, spec.device, num_repeats)
    seconds = measure_best_seconds(lambda: call(FlopCounter()), spec.device, num_repeats)
    size, length = measure_model_size(model, "body"), spec.prompt_length + spec.response_length
    passes = size.compute_forward_flops(0, length, 0) + size.compute_backward_flops(0, length, 0)
    plain_seconds = measure_best_seconds(lambda: run_plain_pass(spec, model), spec.device, num_repeats)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "flops": flops,
        "seconds": seconds,
        "rate": flops / seconds,
        "matmul_rate": rate,
        "share": flops / seconds / rate,
        "plain_seconds": plain_seconds,
        "plain_share": spec.batch_size * passes / plain_seconds / rate,
    }


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
