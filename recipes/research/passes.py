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

from nabla_trl.gradient.likelihood import LikelihoodTerm
from nabla_trl.gradient.objectives import Memo, Sample, Term
from nabla_trl.gradient.relaxation import mixture
from nabla_trl.gradient.score import ScoreTerm
from nabla_trl.gradient.token_gradient import token_gradient
from nabla_trl.models.flops import Meter, model_size
from nabla_trl.models.loading import DTYPES
from nabla_trl.tasks.problem import Problem

KINDS = ("scalar", "log-likelihood")
WORKS = ("plain", "gradient")


@dataclass(frozen=True)
class Pass:
    """One gradient pass over a random model.

    Attributes:
        work: "plain" (the body through inputs_embeds, forward and backward: no head) or "gradient" (`token_gradient`).
        rows, prompt, length: B responses of T tokens after prompts.
        alpha: share of the candidates in the input; 0 = the hard tokens.
    """

    work: str = "gradient"
    kind: str = "scalar"
    vocabulary: int = 151936
    layers: int = 4
    width: int = 256
    rows: int = 8
    prompt: int = 64
    length: int = 1024
    candidates: int = 16
    alpha: float = 0.0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.work not in WORKS:
            raise ValueError(f"a pass is one of {', '.join(WORKS)} and {', '.join(KINDS)}")
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width must be a multiple of 64, the width of a head, not {self.width}")


def random_model(spec: Pass) -> PreTrainedModel:
    """A Qwen2 in the proportions of its smallest release: heads of 64, two of keys, and an MLP 5.4 times as wide."""
    heads = spec.width // 64
    config = Qwen2Config(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        intermediate_size=spec.width * 38 // 7,
        num_hidden_layers=spec.layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=spec.prompt + spec.length + 1,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
    )
    auto = AutoModelForCausalLM if spec.kind == "log-likelihood" else AutoModelForSequenceClassification
    with torch.random.fork_rng(), torch.device(spec.device):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=DTYPES[spec.dtype])
    return model.eval().requires_grad_(False)


def random_term(spec: Pass, model: PreTrainedModel) -> Term:
    mapping, size = torch.arange(spec.vocabulary), model_size(model, "model")
    if spec.kind == "log-likelihood":
        return LikelihoodTerm(model, size, mapping=mapping, encode_prompt=lambda problem, prompt: prompt)
    return ScoreTerm(
        model, size, mapping=mapping, encode_prompt=lambda problem, prompt: prompt, tail=[], stop_ids=frozenset()
    )


def random_samples(spec: Pass) -> tuple[list[Sample], list[Tensor]]:
    """B responses and their candidates [T, K], a response's own token the first."""
    generator = torch.Generator().manual_seed(1)
    samples, tables = [], []
    for row in range(spec.rows):
        table = torch.randint(spec.vocabulary, (spec.length, spec.candidates), generator=generator)
        prompt = torch.randint(spec.vocabulary, (spec.prompt,), generator=generator).tolist()
        samples.append(Sample(Problem(id=str(row), question="?"), prompt, table[:, 0].tolist()))
        tables.append(table)
    return samples, tables


def plain_pass(spec: Pass, model: PreTrainedModel) -> None:
    """Forward and backward of the model's body through inputs_embeds [B, prompt + T, d]."""
    ids = torch.randint(spec.vocabulary, (spec.rows, spec.prompt + spec.length), device=model.device)
    embeds = model.get_input_embeddings()(ids).requires_grad_(True)
    model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()


def gradient_pass(spec: Pass, model: PreTrainedModel) -> Callable[[Meter], list[Tensor]]:
    """`token_gradient` ready to be called: prompts are in their caches."""
    term = random_term(spec, model)
    samples, tables = random_samples(spec)
    memos: list[list[Memo]] = [[memo] for memo in term.prompt_memos(samples, Meter())]
    flat = torch.zeros(spec.length, spec.candidates)
    points = [mixture(one.response, table, flat, spec.alpha) for one, table in zip(samples, tables, strict=True)]
    relaxed = points if spec.alpha else None
    return lambda meter: token_gradient([term], samples, memos, tables, meter=meter, relaxed=relaxed)


def run(spec: Pass, model: PreTrainedModel) -> None:
    if spec.work == "plain":
        plain_pass(spec, model)
    else:
        gradient_pass(spec, model)(Meter())


# --- memory ------------------------------------------------------------------------------------------------


def memory_status(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is held now, VmHWM was the most ever.

    getrusage would do for the most, but begins at what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("the peak memory of a pass on a CPU is read from /proc: measure on Linux, or on a GPU")
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def peak_above_model(spec: Pass) -> int:
    """Most bytes that a pass holds beside the model: of this process, which must be fresh, or of a GPU's allocator."""
    model = random_model(spec)
    run(replace(spec, rows=1, prompt=2, length=4), model)  # libraries take some memory for good when first used
    if spec.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(spec.device)
        before = torch.cuda.memory_allocated(spec.device)
        run(spec, model)
        return torch.cuda.max_memory_allocated(spec.device) - before
    before = memory_status("VmRSS")
    run(spec, model)
    return memory_status("VmHWM") - before


def measured_peaks(specs: Sequence[Pass]) -> list[int]:
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


def memory_ratios(specs: Sequence[Pass]) -> list[dict[str, float]]:
    """Per spec the peak bytes beside the model of a plain pass and of a token gradient, and their ratio."""
    peaks = measured_peaks([replace(spec, work=work) for spec in specs for work in WORKS])
    pairs = zip(peaks[::2], peaks[1::2], strict=True)
    return [{"plain": plain, "gradient": ours, "ratio": ours / plain} for plain, ours in pairs]


def main(argument: str) -> int:
    """Print the peak of every spec, in children that begin with the libraries loaded and nothing else."""
    for spec in json.loads(argument):
        child = os.fork()
        if not child:
            print(peak_above_model(Pass(**spec)), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            return 1
    return 0


# --- speed -------------------------------------------------------------------------------------------------


def seconds(device: str) -> float:
    """A clock to take differences of: wall time on a GPU; on a CPU the process's own, which neighbours slow less."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def best_seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The quickest of `repeats` calls, after one that is not timed."""
    call()
    taken = []
    for _ in range(repeats):
        begun = seconds(device)
        call()
        taken.append(seconds(device) - begun)
    return min(taken)


def matmul_rate(dtype: str, device: str, repeats: int) -> float:
    """FLOPs per second of one large square product."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, device, repeats)


def gradient_speed(spec: Pass, repeats: int) -> dict[str, float]:
    """FLOPs by formula, seconds and the share of the measured matmul rate, of the pass and of a plain one."""
    model, meter = random_model(spec), Meter()
    call = gradient_pass(spec, model)
    call(meter)
    flops = meter.total().flops
    rate = matmul_rate(spec.dtype, spec.device, repeats)
    taken = best_seconds(lambda: call(Meter()), spec.device, repeats)
    size, length = model_size(model, "body"), spec.prompt + spec.length
    body = spec.rows * (size.forward_flops(0, length, 0) + size.backward_flops(0, length, 0))
    plain = best_seconds(lambda: plain_pass(spec, model), spec.device, repeats)
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
