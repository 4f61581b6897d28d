"""The benchmark: the plain search it measures against decides as the engine does, and its parts run."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from nabla_trl.gradient import likelihood, relaxation, token_gradient
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search

ROOT = Path(__file__).parents[2]


def recipe(name: str) -> Any:
    return importlib.import_module(name)


# --- the same decisions ------------------------------------------------------------------------------------

LARGE = {"steps": 4, "learning_rate": 1.5, "final_learning_rate": 1.0, "confidence": 0.8}  # tokens flip on the way


@pytest.mark.parametrize(
    ("architecture", "kind", "options"),
    [
        ("llama", "scalar", {}),
        ("qwen2", "log-ratio", {}),
        ("qwen2", "scalar", {**LARGE, "beta": 2.0}),
        ("llama", "log-ratio", {**LARGE, "optimize_positions": "first", "likelihood_token_grad": False}),
    ],
)
def test_the_plain_search_takes_the_engines_decisions(architecture: str, kind: str, options: dict[str, Any]) -> None:
    """The same revisions and responses, for more FLOPs: at the paper's settings, and where large steps flip tokens."""
    plain = recipe("plain")
    policy = worlds.tiny_policy(architecture, dtype=torch.float64)
    reward = (worlds.tiny_scalar if kind == "scalar" else worlds.tiny_logratio)(policy, architecture)
    problems = worlds.tiny_problems()
    config = SearchConfig.from_preset("paper", max_new_tokens=8, **worlds.search_options(**options))
    traces = run_search(problems, policy=policy, reward=reward, config=config, seed=5)
    search = plain.PlainSearch(policy, reward, config, seed=5)
    others = [search.solve(problem) for problem in problems]
    assert plain.list_differing_problems(traces, others) == []
    for trace, other in zip(traces, others, strict=True):
        assert trace.reward == pytest.approx(other.reward, rel=1e-6)
        assert (
            search.compute_flops(trace.problem_id)
            > search.compute_flops(trace.problem_id, include_one_hot=False)
            > trace.cost.flops
        )
    assert sum(len(trace.revisions) for trace in traces) > len(problems)
    assert {decision[4] for other in others for decision in other.decisions} == {True, False}
    # Anything else than the same would show.
    changed = run_search(problems, policy=policy, reward=reward, config=config, seed=6)
    assert plain.list_differing_problems(changed, others) != []


def test_the_plain_search_refuses_other_algorithms(policy: Policy, scalar_reward: Reward) -> None:
    plain = recipe("plain")
    for config in (SearchConfig(), SearchConfig.from_preset("paper", patience=3)):
        worlds.refused(lambda: plain.PlainSearch(policy, scalar_reward, config), "preset paper")  # noqa: B023


# --- one pass ----------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Records the largest floating tensor made, in elements; views of weights are not made."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.largest = max(self.largest, storage.nbytes() // tensor.itemsize)
        return made


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["scalar", "log-likelihood"])
def test_no_gradient_pass_makes_a_matrix_of_response_times_vocabulary(
    kind: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One response's T × V would be 12 times what is made; without candidates it is made, and seen."""
    passes = recipe("passes")
    spec = passes.PassSpec(
        model_kind=kind,
        mixture_share=alpha,
        vocab_size=20000,
        num_layers=1,
        hidden_size=64,
        batch_size=2,
        prompt_length=3,
        response_length=48,
    )
    for module in (likelihood, token_gradient, relaxation):
        for name in ("MAX_HEAD_LOGITS", "MAX_GATHERED_VALUES"):
            monkeypatch.setattr(module, name, 2**16, raising=False)
    model = passes.make_random_model(spec)
    call = passes.prepare_gradient_pass(spec, model)
    with Made(model) as seen:
        measurements = call(FlopCounter())
    assert [part.shape for part in measurements] == [(48, 16)] * 2 and all(part.any() for part in measurements)
    assert seen.largest <= 80000 < 48 * 20000 / 10
    if kind == "log-likelihood":
        assert seen.largest >= 20000  # the recorder sees logits
        samples, _ = passes.make_random_samples(spec)
        objective = passes.make_random_objective(spec, model)
        with Made(model) as seen:
            compute_token_gradient(
                [objective],
                samples,
                [[cache] for cache in objective.compute_prompt_caches(samples, FlopCounter())],
                None,
                flop_counter=FlopCounter(),
            )
        assert seen.largest >= 48 * 20000


def test_a_slice_of_logits_never_decides_the_peak_and_never_falls_below_its_floor() -> None:
    """Its size follows the hidden states of the batch: one logit matrix is at most four times their size."""
    passes = recipe("passes")
    spec = passes.PassSpec(model_kind="log-likelihood", vocab_size=50000, num_layers=1, hidden_size=64)
    objective = passes.make_random_objective(spec, passes.make_random_model(spec))
    assert objective._get_slice_size(torch.zeros(1, 10, 64)) == likelihood.MAX_HEAD_LOGITS // 50000 > 1
    wide = torch.zeros(1, 1, 1).expand(64, 2048, 64)
    assert objective._get_slice_size(wide) * 50000 <= 4 * wide.numel() < (objective._get_slice_size(wide) + 1) * 50000


# --- the recipe --------------------------------------------------------------------------------------------


def test_the_recipe_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    bench, output = recipe("bench"), tmp_path / "bench.json"
    small = "--max_problems 3 --max_plain_problems 2 --max_rollouts 3 --max_new_tokens 12 --problem_counts 1 2 "
    small += "--round_counts 1 2 --vocab_size 300 --batch_size 2 --response_length 16 --prompt_length 3 "
    small += "--num_layers 1 --hidden_sizes 64 --num_repeats 1 --device cpu"
    monkeypatch.setattr(
        bench, "measure_memory_ratios", lambda specs: [{"plain": 1, "gradient": 1, "ratio": 1}] * len(specs)
    )
    bench.main([*small.split(), "--output_file", str(output)])
    measurements = json.loads(output.read_text())
    assert [row["problems"] for row in measurements["plain"]["engine"]] == [1, 2, 3]
    for row in measurements["plain"]["engine"]:
        assert row["different"] == [] and row["flops_ratio"] > row["model_flops_ratio"] > 1
    assert {"decoding", "scoring", "gradients", "the rest of the search"} < set(measurements["plain"]["profile"])
    assert min(measurements["plain"]["profile"].values()) > 0
    for one in measurements["gradient"]["passes"]:
        assert 0 < one["share"] < 1.5 and one["flops"] > 0
    for name in ("problems", "rounds"):
        assert 0 < measurements["scaling"][name]["slopes"]["flops"] < 1.6
    assert [(one["model_kind"], one["mixture_share"]) for one in measurements["memory"]["passes"]] == [
        *(("scalar", alpha) for alpha in (0, 0.5)),
        *(("log-likelihood", alpha) for alpha in (0, 0.5)),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")
@pytest.mark.slow
def test_peaks_are_of_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of T × V floats more, and nothing of what this process holds; a failure is one line."""
    passes = recipe("passes")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = passes.PassSpec(
        model_kind="log-likelihood",
        vocab_size=1000,
        num_layers=1,
        hidden_size=64,
        batch_size=4,
        prompt_length=2,
        response_length=256,
    )
    small, large = passes.measure_peaks_in_processes([spec, replace(spec, batch_size=32)])
    grown = 28 * 256 * 64 * 4  # bytes of the hidden states added
    assert 5 * grown < large - small < 60 * grown
    monkeypatch.setattr(passes.sys, "executable", "/bin/false")
    worlds.refused(
        lambda: passes.measure_peaks_in_processes([spec]), "response_length=256", "failed", "want of memory"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parts", "plain,speed"], "unknown part 'speed'"),
        (["--max_problems", "2", "--max_plain_problems", "3"], "max_problems must be at least max_plain_problems"),
        (["--hidden_sizes", "100", "--parts", "gradient"], "hidden_size must be a multiple of 64"),
        (["--problem_counts", "0"], "problem_counts, round_counts and hidden_sizes"),
        (["--device", "cuda:77"], "cannot use device"),
    ],
)
def test_the_recipe_refuses_in_one_line(flags: list[str], words: str) -> None:
    worlds.refused(lambda: recipe("bench").main(flags), words)


def test_the_gpu_benchmark_runs_all_parts_and_a_failing_one_leaves_its_error(tmp_path: Path, monkeypatch) -> None:
    """At tiny size on a CPU. No figure is checked, as they depend on the machine."""
    gpu_bench = recipe("gpu_bench")

    def fail(self: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_bench.GpuBenchmark, "part_precision", fail)
    output_file = tmp_path / "gpu.json"
    sizes = {"max_problems": 2, "max_new_tokens": 8, "max_rounds": 2, "parts": "decode,throughput,precision,plain"}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    gpu_bench.main(["--device", "cpu", "--slot_counts", "1", "2", "--output_file", str(output_file), *options])
    parts = json.loads(output_file.read_text())["parts"]
    assert list(parts) == list(gpu_bench.GPU_PARTS[:-1])  # the last one is tested above, and slow
    assert parts.pop("precision")["error"] == "out of memory"
    assert all(part["result"] for part in parts.values())
    assert all(row["slots_rate"] > 0 and row["generate_rate"] > 0 for row in parts["decode"]["result"])


def test_the_gpu_benchmark_fails_if_every_part_does(tmp_path: Path) -> None:
    gpu_bench = recipe("gpu_bench")
    worlds.refused(lambda: gpu_bench.main(["--parts", "decode,cook"]), "unknown part 'cook'")
    (tmp_path / "one.jsonl").write_text('{"question": "1+2", "answer": "3"}\n')
    with pytest.raises(ValueError, match="every part failed"):
        gpu_bench.main(["--device", "cpu", "--parts", "throughput", "--dataset", str(tmp_path / "one.jsonl")])
