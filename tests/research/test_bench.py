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

from nabla_trl.gradient import likelihood as heads
from nabla_trl.gradient import relaxation as relax
from nabla_trl.gradient import token_gradient as token_gradient_module
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
    assert plain.differing(traces, others) == []
    for trace, other in zip(traces, others, strict=True):
        assert trace.reward == pytest.approx(other.reward, rel=1e-6)
        assert search.flops(trace.problem_id) > search.flops(trace.problem_id, onehot=False) > trace.cost.flops
    assert sum(len(trace.revisions) for trace in traces) > len(problems)
    assert {move[4] for other in others for move in other.moves} == {True, False}
    # Anything else than the same would show.
    changed = run_search(problems, policy=policy, reward=reward, config=config, seed=6)
    assert plain.differing(changed, others) != []


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
    spec = passes.Pass(kind=kind, alpha=alpha, vocabulary=20000, layers=1, width=64, rows=2, prompt=3, length=48)
    for room in (heads, token_gradient_module, relax):
        for name in ("LOGIT_BUDGET", "GATHER_BUDGET"):
            monkeypatch.setattr(room, name, 2**16, raising=False)
    model = passes.random_model(spec)
    call = passes.gradient_pass(spec, model)
    with Made(model) as seen:
        found = call(FlopCounter())
    assert [part.shape for part in found] == [(48, 16)] * 2 and all(part.any() for part in found)
    assert seen.largest <= 80000 < 48 * 20000 / 10
    if kind == "log-likelihood":
        assert seen.largest >= 20000  # the recorder sees logits
        samples, _ = passes.random_samples(spec)
        term = passes.random_term(spec, model)
        with Made(model) as seen:
            compute_token_gradient(
                [term],
                samples,
                [[memo] for memo in term.prompt_memos(samples, FlopCounter())],
                None,
                flop_counter=FlopCounter(),
            )
        assert seen.largest >= 48 * 20000


def test_a_slice_of_logits_never_decides_the_peak_and_never_falls_below_its_floor() -> None:
    """Its size follows the hidden states of the batch: one logit matrix is at most four times their size."""
    passes = recipe("passes")
    spec = passes.Pass(kind="log-likelihood", vocabulary=50000, layers=1, width=64)
    term = passes.random_term(spec, passes.random_model(spec))
    assert term._slice_size(torch.zeros(1, 10, 64)) == heads.MAX_HEAD_LOGITS // 50000 > 1
    wide = torch.zeros(1, 1, 1).expand(64, 2048, 64)
    assert term._slice_size(wide) * 50000 <= 4 * wide.numel() < (term._slice_size(wide) + 1) * 50000


# --- the recipe --------------------------------------------------------------------------------------------


def test_the_recipe_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    bench, output = recipe("bench"), tmp_path / "bench.json"
    small = ["--max_problems", "3", "--max_plain_problems", "2", "--max_rollouts", "3", "--max_new_tokens", "12"]
    small += [
        "--problem_counts",
        "1",
        "2",
        "--round_counts",
        "1",
        "2",
        "--vocab_size",
        "300",
        "--batch_size",
        "2",
        "--response_length",
        "16",
    ]
    small += [
        "--prompt_length",
        "3",
        "--num_layers",
        "1",
        "--hidden_sizes",
        "64",
        "--num_repeats",
        "1",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(bench, "memory_ratios", lambda specs: [{"plain": 1, "gradient": 1, "ratio": 1}] * len(specs))
    bench.main([*small, "--output_file", str(output)])
    found = json.loads(output.read_text())
    assert [row["problems"] for row in found["plain"]["engine"]] == [1, 2, 3]
    for row in found["plain"]["engine"]:
        assert row["different"] == [] and row["flops_ratio"] > row["model_flops_ratio"] > 1
    assert {"decoding", "scoring", "gradients", "the rest of the search"} < set(found["plain"]["profile"])
    assert min(found["plain"]["profile"].values()) > 0
    for one in found["gradient"]["passes"]:
        assert 0 < one["share"] < 1.5 and one["flops"] > 0
    for name in ("problems", "rounds"):
        assert 0 < found["scaling"][name]["slopes"]["flops"] < 1.6
    assert [(one["kind"], one["alpha"]) for one in found["memory"]["passes"]] == [
        *(("scalar", alpha) for alpha in (0, 0.5)),
        *(("log-likelihood", alpha) for alpha in (0, 0.5)),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")
def test_peaks_are_of_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of T × V floats more, and nothing of what this process holds; a failure is one line."""
    passes = recipe("passes")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = passes.Pass(kind="log-likelihood", vocabulary=1000, layers=1, width=64, rows=4, prompt=2, length=256)
    small, large = passes.measured_peaks([spec, replace(spec, batch_size=32)])
    grown = 28 * 256 * 64 * 4  # bytes of the hidden states added
    assert 5 * grown < large - small < 60 * grown
    monkeypatch.setattr(passes.sys, "executable", "/bin/false")
    worlds.refused(lambda: passes.measured_peaks([spec]), "length=256", "failed", "want of memory")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parts", "plain,speed"], "unknown part 'speed'"),
        (["--max_problems", "2", "--max_plain_problems", "3"], "problems must be at least plain_problems"),
        (["--hidden_sizes", "100", "--parts", "gradient"], "width must be a multiple of 64"),
        (["--problem_counts", "0"], "sizes, rounds and widths"),
        (["--device", "cuda:77"], "cannot use device"),
    ],
)
def test_the_recipe_refuses_in_one_line(flags: list[str], words: str) -> None:
    worlds.refused(lambda: recipe("bench").main(flags), words)
