"""Training the policies of the duality: every method from the same π, on the same r, at the same β, all weights.

sft              Metropolis samples of π*, which it projects into weights
reward-weighted  draws of π, weighted by exp(r/β)
dpo              pairs of draws of π, the one with the higher reward chosen
dpo, Bradley-Terry labels   the same pairs, chosen with probability σ(r − r'): what DPO's loss assumes
rloo, grpo       what the policy draws as it is trained
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
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
from nabla_trl.traces.datasets import TrainingRows, build_sft_rows, build_weighted_rows
from nabla_trl.traces.schema import Trace
from nabla_trl.training.offline import ONLINE_METHODS, TrainingResult, TrainOptions, train_on_traces
from nabla_trl.training.online import train_online
from nabla_trl.training.peft import LoraArguments
from nabla_trl.utils.fields import option
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.identity import claim_settings

SOFT_DPO = "dpo, Bradley-Terry labels"
TRAINED_METHODS = ("sft", "reward-weighted", "dpo", SOFT_DPO, "rloo", "grpo")


@dataclass
class DualityTrainingArguments:
    """How the trained policies of the duality are made."""

    train_methods: list[str] = field(
        default_factory=list,
        metadata={"help": "trained policies: sft, reward-weighted, dpo (both kinds of labels), rloo, grpo"},
    )
    train_samples_per_prompt: int = option(8000, "responses per prompt that methods on traces are trained on")
    train_max_rounds: int = option(12, "sft: steps of each chain that gives one of them")
    train_steps: int = option(1024, "optimiser steps")
    train_batch_size: int = option(192, "responses per step (pairs of dpo: half as many)")
    train_num_generations: int = option(32, "rloo, grpo: responses per prompt and step")
    train_learning_rate: float = option(1e-3, "first learning rate, decaying linearly to 0")
    train_num_checkpoints: int = option(5, "points of each curve: steps/2^k, …, steps/2, steps")

    def __post_init__(self) -> None:
        unknown = [
            name for name in self.train_methods if name not in ("sft", "reward-weighted", "dpo", "rloo", "grpo")
        ]
        if unknown:
            raise ValueError(f"train: unknown method {unknown[0]!r}")
        if (
            min(
                self.train_samples_per_prompt,
                self.train_max_rounds,
                self.train_steps,
                self.train_batch_size,
                self.train_num_checkpoints,
            )
            < 1
        ):
            raise ValueError("samples, rounds, steps, batch and checkpoints of training must be at least 1")
        if self.train_steps % 2 ** (self.train_num_checkpoints - 1):
            raise ValueError("train_steps must be a multiple of 2^(train_checkpoints − 1), so that curves have points")
        if self.train_batch_size % self.train_num_generations:
            raise ValueError("train_batch must be a multiple of train_generations")

    def list_methods(self) -> list[str]:
        asked = {*self.train_methods, *([SOFT_DPO] if "dpo" in self.train_methods else [])}
        return [name for name in TRAINED_METHODS if name in asked]


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A trained policy at one point of its training, and what had been spent by then, samples and rewards included."""

    method: str
    folder: str
    flops: float


class DualityTrainer:
    """Trains policies of one world into `folder`; what is there is not trained again."""

    def __init__(
        self,
        folder: Path,
        args: DualityTrainingArguments,
        *,
        policy: Policy,
        reward: Reward,
        problems: Sequence[Problem],
        search_config: SearchConfig,
        seed: int,
    ):
        self.folder, self.args, self.policy, self.reward = folder, args, policy, reward
        self.problems, self.search_config, self.seed = list(problems), search_config, seed
        self._traces_by_name: dict[str, list[Trace]] = {}

    def train(self, method: str) -> list[PolicyCheckpoint]:
        """The policies along the training of a method."""
        home = self.folder / method.replace(", ", "-").replace(" ", "-")
        settings = asdict(self.args) | {"seed": self.seed, "beta": self.beta, "train": method}
        claim_settings(home / "settings.json", {name: str(value) for name, value in settings.items()})
        note = home / "train.json"
        if not note.exists():
            trained, spent = self._train_method(method, home)
            facts = asdict(trained) | {"trace_flops": spent.flops}
            write_atomic(note, json.dumps(facts, indent=1))
        facts = json.loads(note.read_text(encoding="utf-8"))
        found = []
        for step in self._list_checkpoint_steps():
            place = home / "trainer" / f"checkpoint-{step}"
            spent = facts["trace_flops"] + facts["flops"] * step / facts["steps"]
            found.append(PolicyCheckpoint(method, str(place), spent))
        return found

    @property
    def beta(self) -> float:
        return 1 / self.search_config.reward_weight

    def _list_checkpoint_steps(self) -> list[int]:
        return [self.args.train_steps >> power for power in reversed(range(self.args.train_num_checkpoints))]

    def _train_method(self, method: str, method_dir: Path) -> tuple[TrainingResult, Cost]:
        config = self._make_trainer_config(method_dir)
        lora = LoraArguments()
        if method in ONLINE_METHODS:
            options = TrainOptions(tuning="full", num_generations=self.args.train_num_generations)
            with AnswerChecker() as checker:
                trained = train_online(
                    method,
                    self.policy,
                    self.problems,
                    method_dir / "model",
                    reward=self.reward,
                    checker=checker,
                    beta=self.beta,
                    sampling=self.search_config.get_sampling(),
                    options=options,
                    lora=lora,
                    config=config,
                    dtype="float32",
                )
            return trained, Cost()
        found, traces = self._make_rows(method)
        kind = "dpo" if method == SOFT_DPO else method
        trained = train_on_traces(
            kind,
            self.policy.name,
            found,
            method_dir / "model",
            beta=self.beta,
            tuning="full",
            lora=lora,
            config=config,
            dtype="float32",
        )
        return trained, sum((trace.cost for trace in traces), Cost())

    def _make_rows(self, method: str) -> tuple[TrainingRows, list[Trace]]:
        """Rows, and the traces that they were made of. Responses that were cut at the limit are part of these laws."""
        if method == "sft":
            traces = self._draw_traces("samples", replace(self.search_config, max_rounds=self.args.train_max_rounds))
            return build_sft_rows(traces, "samples", include_unfinished=True), traces
        traces = self._draw_traces(
            "draws",
            replace(
                self.search_config.with_no_gradient(),
                acceptance=GreedyAcceptance(),
                max_rounds=0,
                max_rollouts=1,
            ),
        )
        if method == "reward-weighted":
            return build_weighted_rows(traces, self.beta, include_unfinished=True), traces
        return _make_preference_rows(traces, bradley_terry_labels=method == SOFT_DPO, seed=self.seed), traces

    def _draw_traces(self, name: str, config: SearchConfig) -> list[Trace]:
        """As many independent chains, or draws, of every prompt as training takes, under the prompt's own name."""
        if name not in self._traces_by_name:
            copies = [
                replace(problem, id=f"{problem.id}/train/{number}")
                for problem in self.problems
                for number in range(self.args.train_samples_per_prompt)
            ]
            made = run_search(copies, policy=self.policy, reward=self.reward, config=config, seed=self.seed)
            self._traces_by_name[name] = [
                replace(one, problem_id=one.problem_id.partition("/train/")[0]) for one in made
            ]
        return self._traces_by_name[name]

    def _make_trainer_config(self, method_dir: Path) -> SFTConfig:
        # Curves are read from checkpoints at powers of two: all multiples of the smallest are kept.
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
    """Every two neighbouring draws to a prompt as chosen and rejected.

    Args:
        soft: chosen with probability σ(r − r'), the Bradley-Terry model of DPO (arXiv 2305.18290), under which its
            optimum is π*; else always the one with the higher reward.
    """
    stream = random.Random(seed)
    rows, skipped = [], build_sft_rows([], "samples").skipped
    for one, other in list(pairwise(traces))[::2]:
        gap = one.reward - other.reward
        if one.problem_id != other.problem_id or gap == 0:  # equal responses have equal rewards
            skipped["undecided"] += 1
            continue
        first = stream.random() < 1 / (1 + math.exp(-gap)) if bradley_terry_labels else gap > 0
        chosen, rejected = (one, other) if first else (other, one)
        rows.append(
            {
                "prompt_ids": one.prompt_ids,
                "chosen_ids": chosen.response_ids,
                "rejected_ids": rejected.response_ids,
            }
        )
    return TrainingRows(rows, skipped)
