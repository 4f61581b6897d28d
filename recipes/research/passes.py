"""One gradient pass, measured: its peak memory, beside a plain forward and backward, and its speed.

`bench.py` calls this. Peak memory on a CPU is that of a whole process, so every figure comes from a fresh one:

    python recipes/research/passes.py '[{"work": "gradient", "kind": "scalar"}, ...]'    # prints bytes, a line each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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

MODEL_KINDS = ("scalar", "log-likelihood")
PASS_TYPES = ("plain", "gradient")


@dataclass(frozen=True)
class PassSpec:
    """One gradient pass over a random model.

    Attributes:
        work: "plain" (the body through inputs_embeds, forward and backward: no head) or "gradient" (`token_gradient`).
        rows, prompt, length: B responses of T tokens after prompts.
        alpha: share of the candidates in the input; 0 = the hard tokens.
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
            raise ValueError(f"width must be a multiple of 64, the width of a head, not {self.hidden_size}")


def make_random_model(spec: PassSpec) -> PreTrainedModel:
    """A Qwen2 in the proportions of its smallest release: heads of 64, two of keys, and an MLP 5.4 times as wide."""
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
    mapping, size = torch.arange(spec.vocab_size), measure_model_size(model, "model")
    if spec.model_kind == "log-likelihood":
        return LikelihoodObjective(model, size, vocab_map=mapping, encode_prompt=lambda problem, prompt: prompt)
    return ScoreObjective(
        model,
        size,
        mapping=mapping,
        encode_prompt=lambda problem, prompt: prompt,
        turn_end_ids=[],
        stop_ids=frozenset(),
    )


def make_random_samples(spec: PassSpec) -> tuple[list[Sample], list[Tensor]]:
    """B responses and their candidates [T, K], a response's own token the first."""
    generator = torch.Generator().manual_seed(1)
    samples, tables = [], []
    for row in range(spec.batch_size):
        table = torch.randint(spec.vocab_size, (spec.response_length, spec.num_candidates), generator=generator)
        prompt = torch.randint(spec.vocab_size, (spec.prompt_length,), generator=generator).tolist()
        samples.append(Sample(Problem(id=str(row), question="?"), prompt, table[:, 0].tolist()))
        tables.append(table)
    return samples, tables


def run_plain_pass(spec: PassSpec, model: PreTrainedModel) -> None:
    """Forward and backward of the model's body through inputs_embeds [B, prompt + T, d]."""
    ids = torch.randint(
        spec.vocab_size, (spec.batch_size, spec.prompt_length + spec.response_length), device=model.device
    )
    embeds = model.get_input_embeddings()(ids).requires_grad_(True)
    model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()


def prepare_gradient_pass(spec: PassSpec, model: PreTrainedModel) -> Callable[[FlopCounter], list[Tensor]]:
    """`token_gradient` ready to be called: prompts are in their caches."""
    term = make_random_objective(spec, model)
    samples, tables = make_random_samples(spec)
    memos: list[list[ScoreCache]] = [[memo] for memo in term.compute_prompt_caches(samples, FlopCounter())]
    flat = torch.zeros(spec.response_length, spec.num_candidates)
    points = [
        build_mixture(one.response_ids, table, flat, spec.mixture_share)
        for one, table in zip(samples, tables, strict=True)
    ]
    relaxed = points if spec.mixture_share else None
    return lambda meter: compute_token_gradient(
        [term], samples, memos, tables, flop_counter=meter, relaxed_responses=relaxed
    )


def run_pass(spec: PassSpec, model: PreTrainedModel) -> None:
    if spec.pass_type == "plain":
        run_plain_pass(spec, model)
    else:
        prepare_gradient_pass(spec, model)(FlopCounter())


# --- memory ------------------------------------------------------------------------------------------------


def read_memory_status(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is held now, VmHWM was the most ever.

    getrusage would do for the most, but begins at what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("the peak memory of a pass on a CPU is read from /proc: measure on Linux, or on a GPU")
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measure_peak_memory(spec: PassSpec) -> int:
    """Most bytes that a pass holds beside the model: of this process, which must be fresh, or of a GPU's allocator."""
    model = make_random_model(spec)
    run_pass(
        replace(spec, batch_size=1, prompt_length=2, response_length=4), model
    )  # libraries take some memory for good when first used
    if spec.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(spec.device)
        before = torch.cuda.memory_allocated(spec.device)
        run_pass(spec, model)
        return torch.cuda.max_memory_allocated(spec.device) - before
    before = read_memory_status("VmRSS")
    run_pass(spec, model)
    return read_memory_status("VmHWM") - before


def measure_peaks_in_processes(specs: Sequence[PassSpec]) -> list[int]:
    """`peak_above_model` of every spec, each in a process of its own."""
    # Freed blocks go back to the system at once, so that the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, json.dumps([asdict(spec) for spec in specs])]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    peaks = [int(line) for line in done.stdout.split()]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed, perhaps for want of memory"])[-1]
        raise ValueError(f"measuring {specs[len(peaks)]} failed: {reason}")
    return peaks


def measure_memory_ratios(specs: Sequence[PassSpec]) -> list[dict[str, float]]:
    """Per spec the peak bytes beside the model of a plain pass and of a token gradient, and their ratio."""
    peaks = measure_peaks_in_processes([replace(spec, pass_type=work) for spec in specs for work in PASS_TYPES])
    pairs = zip(peaks[::2], peaks[1::2], strict=True)
    return [{"plain": plain, "gradient": ours, "ratio": ours / plain} for plain, ours in pairs]


def main(argument: str) -> int:
    """Print the peak of every spec, in children that begin with the libraries loaded and nothing else."""
    for spec in json.loads(argument):
        child = os.fork()
        if not child:
            print(measure_peak_memory(PassSpec(**spec)), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            return 1
    return 0


# --- speed -------------------------------------------------------------------------------------------------


def read_timer(device: str) -> float:
    """A clock to take differences of: wall time on a GPU; on a CPU the process's own, which neighbours slow less."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure_best_seconds(function: Callable[[], object], device: str, num_repeats: int) -> float:
    """The quickest of `repeats` calls, after one that is not timed."""
    function()
    taken = []
    for _ in range(num_repeats):
        begun = read_timer(device)
        function()
        taken.append(read_timer(device) - begun)
    return min(taken)


def measure_matmul_rate(dtype: str, device: str, num_repeats: int) -> float:
    """FLOPs per second of one large square product."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / measure_best_seconds(lambda: a @ b, device, num_repeats)


def measure_gradient_speed(spec: PassSpec, num_repeats: int) -> dict[str, float]:
    """FLOPs by formula, seconds and the share of the measured matmul rate, of the pass and of a plain one."""
    model, meter = make_random_model(spec), FlopCounter()
    call = prepare_gradient_pass(spec, model)
    call(meter)
    flops = meter.get_total_cost().flops
    rate = measure_matmul_rate(spec.dtype, spec.device, num_repeats)
    taken = measure_best_seconds(lambda: call(FlopCounter()), spec.device, num_repeats)
    size, length = measure_model_size(model, "body"), spec.prompt_length + spec.response_length
    body = spec.batch_size * (size.compute_forward_flops(0, length, 0) + size.compute_backward_flops(0, length, 0))
    plain = measure_best_seconds(lambda: run_plain_pass(spec, model), spec.device, num_repeats)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "flops": flops,
        "seconds": taken,
        "rate": flops / taken,
        "matmul_rate": rate,
        "share": flops / taken / rate,
        "plain_seconds": plain,
        "plain_share": body / plain / rate,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
