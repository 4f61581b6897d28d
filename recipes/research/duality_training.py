"""Train policies to compare with π*: every method from the same π, with the same r and β, with full fine-tuning.

The methods train on

- sft: Metropolis samples of π*.
- reward-weighted: samples of π, weighted by exp(r/β).
- dpo: pairs of samples of π, of which the one with the higher reward is chosen.
- dpo, Bradley-Terry labels: the same pairs, chosen with probability σ(r − r'), as DPO's loss assumes.
- soft-targets: the distributions of the mirror step along Metropolis chains, with the KL in both directions.
- rloo, grpo: samples of the policy in training.
- on-policy-distillation: the distributions of the mirror step along samples of the policy in training.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from trl import SFTConfig

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import GreedyAcceptance
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.datasets import TrainingRows, build_sft_rows, build_soft_target_rows, build_weighted_rows
from nabla_trl.traces.schema import Trace
from nabla_trl.training.offline import (
    FORWARD_KL,
    ONLINE_METHODS,
    REVERSE_KL,
    SOFT_TARGETS,
    TrainingResult,
    TrainOptions,
    train_on_traces,
)
from nabla_trl.training.online import train_online
from nabla_trl.training.peft import LoraArguments
from nabla_trl.utils.fields import option, split_names
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.identity import claim_settings

SOFT_DPO = "dpo, Bradley-Terry labels"
REVERSE_SOFT_TARGETS = "soft-targets, reverse KL"
# Methods that are trained in two ways, and the second one.
VARIANTS = {"dpo": SOFT_DPO, SOFT_TARGETS: REVERSE_SOFT_TARGETS}
TRAINED_METHODS = ("sft", "reward-weighted", "dpo", SOFT_DPO, SOFT_TARGETS, REVERSE_SOFT_TARGETS, *ONLINE_METHODS)


@dataclass
class DualityTrainingArguments:
    """How the policies are trained."""

    train_methods: list[str] = option(
        [],
        "Training methods: sft, reward-weighted, dpo (with both kinds of labels), soft-targets (with both "
        "divergences), rloo, grpo, on-policy-distillation (default: none).",
    )
    train_samples_per_prompt: int = option(
        8000, "Responses per prompt for methods that train on traces. Increase it for less sampling noise."
    )
    train_max_rounds: int = option(
        12,
        "Number of rounds of each Metropolis chain whose last state sft trains on. Increase it if the chains have not "
        "mixed.",
    )
    train_steps: int = option(1024, "Optimizer steps of each method.")
    train_batch_size: int = option(
        192,
        "Responses per optimizer step. dpo uses half as many pairs. Must be a multiple of --train_num_generations.",
    )
    train_num_generations: int = option(32, "Responses per prompt and step in rloo and grpo.")
    train_learning_rate: float = option(1e-3, "First learning rate. It decays linearly to 0.")
    train_num_checkpoints: int = option(
        5, "Checkpoints evaluated along each training run, at steps/2^k, …, steps/2, steps."
    )

    def __post_init__(self) -> None:
        self.train_methods = split_names(self.train_methods)
        for method in self.train_methods:
            if method in VARIANTS.values() or method not in TRAINED_METHODS:
                raise ValueError(f"train_methods: unknown method {method!r}")
        for name in ("samples_per_prompt", "max_rounds", "steps", "batch_size", "num_checkpoints"):
            if getattr(self, f"train_{name}") < 1:
                raise ValueError(f"train_{name} must be at least 1")
        if self.train_steps % 2 ** (self.train_num_checkpoints - 1):
            raise ValueError("train_steps must be a multiple of 2^(train_num_checkpoints − 1), to halve it so often")
        if self.train_batch_size % self.train_num_generations:
            raise ValueError("train_batch_size must be a multiple of train_num_generations")

    def list_methods(self) -> list[str]:
        """Return the methods in a fixed order, with the variants of those that have one."""
        methods = {*self.train_methods, *(VARIANTS[method] for method in self.train_methods if method in VARIANTS)}
        return [method for method in TRAINED_METHODS if method in methods]


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A policy at one point of its training, and the FLOPs so far, including those of samples and rewards."""

    method: str
    folder: str
    flops: float


class DualityTrainer:
    """A trainer of the policies of one world. Policies that exist in the folder are kept."""

    def __init__(
        self,
        folder: Path,
        args: DualityTrainingArguments,
        *,
        policy: Policy,
        reward: Reward,
        problems: Sequence[Problem],
        search_config: SearchConfig,
        gradient_config: SearchConfig,
        seed: int,
    ):
        self.gradient_config = gradient_config
        self.folder, self.args, self.policy, self.reward = folder, args, policy, reward
        self.problems, self.search_config, self.seed = list(problems), search_config, seed
        self._traces_by_name: dict[str, list[Trace]] = {}

    def train(self, method: str) -> list[PolicyCheckpoint]:
        """Train one method and return its checkpoints."""
        method_dir = self.folder / method.replace(", ", "-").replace(" ", "-")
        settings = asdict(self.args) | {"seed": self.seed, "beta": self.beta, "train_method": method}
        claim_settings(method_dir / "settings.json", {name: str(value) for name, value in settings.items()})
        results_file = method_dir / "train.json"
        if not results_file.exists():
            result, trace_cost = self._train_method(method, method_dir)
            write_atomic(results_file, json.dumps(asdict(result) | {"trace_flops": trace_cost.flops}, indent=1))
        facts = read_json_file(results_file)
        return [
            PolicyCheckpoint(
                method,
                str(method_dir / "trainer" / f"checkpoint-{step}"),
                facts["trace_flops"] + facts["flops"] * step / facts["steps"],
            )
            for step in self._list_checkpoint_steps()
        ]

    @property
    def beta(self) -> float:
        """The KL coefficient β of every method."""
        return 1 / self.search_config.reward_weight

    def _list_checkpoint_steps(self) -> list[int]:
        return [self.args.train_steps >> power for power in reversed(range(self.args.train_num_checkpoints))]

    def _train_method(self, method: str, method_dir: Path) -> tuple[TrainingResult, Cost]:
        config = self._make_trainer_config(method_dir)
        lora = LoraArguments()
        if method in ONLINE_METHODS:
            options = TrainOptions(tuning="full", num_generations=self.args.train_num_generations)
            with AnswerChecker() as checker:
                result = train_online(
                    method,
                    self.policy,
                    self.problems,
                    method_dir / "model",
                    reward=self.reward,
                    checker=checker,
                    beta=self.beta,
                    sampling=self.search_config.get_sampling(),
                    search_config=self.gradient_config,
                    options=options,
                    lora=lora,
                    config=config,
                    dtype="float32",
                )
            return result, Cost()
        rows, traces = self._make_rows(method)
        result = train_on_traces(
            next((name for name, variant in VARIANTS.items() if variant == method), method),
            self.policy.name,
            rows,
            method_dir / "model",
            beta=self.beta,
            tuning="full",
            lora=lora,
            config=config,
            dtype="float32",
            divergence=REVERSE_KL if method == REVERSE_SOFT_TARGETS else FORWARD_KL,
        )
        return result, sum((trace.cost for trace in traces), Cost())

    def _make_rows(self, method: str) -> tuple[TrainingRows, list[Trace]]:
        """Return rows and their traces. Responses that were cut at the maximum length belong to the distributions."""
        if method == "sft":
            traces = self._draw_traces("samples", replace(self.search_config, max_rounds=self.args.train_max_rounds))
            return build_sft_rows(traces, "samples", include_unfinished=True), traces
        if method in (SOFT_TARGETS, REVERSE_SOFT_TARGETS):
            rounds, top_k = self.args.train_max_rounds, self.gradient_config.top_k_candidates
            config = replace(self.gradient_config, max_rounds=rounds, soft_target_top_k=top_k)
            traces = self._draw_traces("refined", config)
            return build_soft_target_rows(traces), traces
        traces = self._draw_traces(
            "draws",
            replace(
                self.search_config.with_no_gradient(), acceptance=GreedyAcceptance(), max_rounds=0, max_rollouts=1
            ),
        )
        if method == "reward-weighted":
            return build_weighted_rows(traces, self.beta, include_unfinished=True), traces
        return _make_preference_rows(traces, bradley_terry_labels=method == SOFT_DPO, seed=self.seed), traces

    def _draw_traces(self, name: str, config: SearchConfig) -> list[Trace]:
        """Run as many independent chains of every prompt as training needs. The traces have the prompt's own id."""
        if name not in self._traces_by_name:
            copies = [
                replace(problem, id=f"{problem.id}/train/{number}")
                for problem in self.problems
                for number in range(self.args.train_samples_per_prompt)
            ]
            traces = run_search(copies, policy=self.policy, reward=self.reward, config=config, seed=self.seed)
            self._traces_by_name[name] = [
                replace(trace, problem_id=trace.problem_id.partition("/train/")[0]) for trace in traces
            ]
        return self._traces_by_name[name]

    def _make_trainer_config(self, method_dir: Path) -> SFTConfig:
        # The curves need checkpoints at steps/2^k, so all multiples of the smallest are saved.
        return SFTConfig(
            str(method_dir / "trainer"),
            max_steps=self.args.train_steps,
            per_device_train_batch_size=self.args.train_batch_size,
            learning_rate=self.args.train_learning_rate,
            lr_scheduler_type="linear",
            max_length=None,
            save_strategy="steps",
            save_steps=self._list_checkpoint_steps()[0],
            save_only_model=False,
            logging_steps=max(1, self.args.train_steps // 50),
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.policy.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            seed=self.seed,
        )


def _make_preference_rows(traces: Sequence[Trace], *, bradley_terry_labels: bool, seed: int) -> TrainingRows:
    """Return preference rows of every two neighboring samples of a prompt.

    Args:
        bradley_terry_labels: choose a sample with probability σ(r − r'), the Bradley-Terry model of DPO
            (arXiv 2305.18290), under which its optimum is π*. Else choose the sample with the higher reward.
    """
    rng = random.Random(seed)
    rows, skipped = [], build_sft_rows([], "samples").skipped
    for first, second in list(pairwise(traces))[::2]:
        gap = first.reward - second.reward
        if first.problem_id != second.problem_id or gap == 0:  # equal responses have equal rewards
            skipped["undecided"] += 1
            continue
        is_first_chosen = rng.random() < 1 / (1 + math.exp(-gap)) if bradley_terry_labels else gap > 0
        chosen, rejected = (first, second) if is_first_chosen else (second, first)
        rows.append(
            {"prompt_ids": first.prompt_ids, "chosen_ids": chosen.response_ids, "rejected_ids": rejected.response_ids}
        )
    return TrainingRows(rows, skipped)
