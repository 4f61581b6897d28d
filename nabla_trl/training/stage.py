"""The stage of a run that trains: one policy per method, each in a folder of its own, resumable, never mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from trl import SFTConfig

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import MetropolisAcceptance
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces
from nabla_trl.training.callbacks import EvaluationCallback
from nabla_trl.training.checkpoints import CONFIG_FILE, hash_traces
from nabla_trl.training.offline import (
    OFFLINE_METHODS,
    ONLINE_METHODS,
    TrainingResult,
    TrainOptions,
    build_training_rows,
    check_tokenizer,
    train_on_traces,
)
from nabla_trl.training.online import check_online_options, train_online
from nabla_trl.training.peft import LoraArguments, check_precision, check_reference_model, find_last_checkpoint
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.identity import claim_settings

# TRL's options that decide what training makes of a policy.
TRAINER_OPTIONS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "loss_type",
    "packing",
    "max_length",
    "seed",
    "data_seed",
)


@dataclass
class TrainStage:
    """Everything a method needs.

    Attributes:
        folder: of the run; traces/ is in it, and trained/<method>/ will be.
        problems: of training; `probed`: those kept apart for the probe.
        models: loads the frozen policy and the reward, once.
        settings: of the models and the search, which decide what the traces are and what is rewarded.
        called: the options of this call, as `--config` takes them; `command`: how it was called. Both are kept with
            the weights, as later calls on the folder may be others.
    """

    run_dir: Path
    policy: str
    dtype: str
    problems: Sequence[Problem]
    callback_problems: Sequence[Problem]
    search_config: SearchConfig
    options: TrainOptions
    lora: LoraArguments
    sft_config: SFTConfig
    load_models: Callable[[], tuple[Policy, Reward]]
    search_settings: dict[str, str]
    checker: AnswerChecker
    process_state: PartialState
    command_options: Mapping[str, Any]
    command: str

    def train_method(self, method: str) -> TrainingResult | None:
        """Train, or go on training; None where it is done already.

        Raises:
            ValueError: other settings than those the folder was begun with (the differing ones are named), and what
                the methods refuse.
        """
        self.check_method(method)
        home = self.run_dir / "trained" / method
        trainer, mark = home / "trainer", home / "settings.json"
        finished = (home / "train.json").exists()
        if not finished and find_last_checkpoint(trainer) is None and self.process_state.is_main_process:
            mark.unlink(missing_ok=True)  # of an attempt that left nothing
        self.process_state.wait_for_everyone()
        traces = hash_traces(self.run_dir) if method in OFFLINE_METHODS else None
        claim_settings(mark, self._collect_settings(method) | ({} if traces is None else {"traces": traces}))
        if finished:
            return None
        if self.process_state.is_main_process:
            write_atomic(home / CONFIG_FILE, yaml.safe_dump(dict(self.command_options), sort_keys=False))
        config = copy(self.sft_config)
        config.output_dir = str(trainer)
        output = home / ("model" if self.options.tuning == "full" else "adapter")
        trained, spent = self._train_policy(method, output, config)
        if self.process_state.is_main_process:
            facts = asdict(trained) | {"trace_flops": spent.flops, "trace_seconds": spent.seconds}
            facts |= {"traces": traces, "command": self.command}
            facts["processes"] = self.process_state.num_processes
            write_atomic(home / "train.json", json.dumps(facts, indent=1))
        return trained

    def check_method(self, method: str) -> None:
        """Refuse what a method cannot be trained with, before anything is loaded or searched."""
        if method != "sft" and self.search_config.beta is None:
            raise ValueError(
                f"method {method} needs beta, which search and training share: set beta (target_kl sets the step of the search alone)"
            )
        if (
            method == "sft"
            and self.options.sft_selection == "samples"
            and not isinstance(self.search_config.acceptance, MetropolisAcceptance)
        ):
            raise ValueError("select samples takes samples of π*: set acceptance metropolis")
        if method == "dpo" or method in ONLINE_METHODS:
            check_reference_model(self.policy, self.options.tuning)
        if method in ONLINE_METHODS:
            check_online_options(self.sft_config, self.search_config.get_sampling(), self.options)
        check_precision(self.options.tuning, self.dtype, self.sft_config)
        self._select_callback_problems()

    def _collect_settings(self, method: str) -> dict[str, str]:
        found = {name: str(getattr(self.sft_config, name)) for name in TRAINER_OPTIONS}
        found |= {name: str(value) for name, value in {**asdict(self.lora), **asdict(self.options)}.items()}
        found |= {
            "method": method,
            "problems": str(len(self.problems)),
            "processes": str(self.process_state.num_processes),
        }
        return found | self.search_settings

    def _train_policy(self, method: str, output: Path, config: SFTConfig) -> tuple[TrainingResult, Cost]:
        probe = self._build_callback()
        beta = 1 / self.search_config.reward_weight
        shared: dict[str, Any] = {
            "beta": beta,
            "lora": self.lora,
            "config": config,
            "dtype": self.dtype,
            "probe": probe,
        }
        if method in OFFLINE_METHODS:
            made = self._read_training_traces()
            check_tokenizer(made, self.policy)
            found = build_training_rows(method, made, sft_selection=self.options.sft_selection, beta=beta)
            trained = train_on_traces(method, self.policy, found, output, tuning=self.options.tuning, **shared)
            return trained, sum((trace.cost for trace in made), Cost())
        base, reward = self.load_models()
        trained = train_online(
            method,
            base,
            self.problems,
            output,
            reward=reward,
            checker=self.checker,
            sampling=self.search_config.get_sampling(),
            options=self.options,
            **shared,
        )
        return trained, Cost()

    def _read_training_traces(self) -> list[Trace]:
        """Those of the problems of training: the folder may hold more, of the probe too, from before there was one."""
        asked = {problem.id for problem in self.problems}
        return [trace for trace in read_traces(self.run_dir / "traces") if trace.problem_id in asked]

    def _select_callback_problems(self) -> list[Problem]:
        """The problems of the probe.

        Raises:
            ValueError: fewer than asked for.
        """
        problems = [problem for problem in self.callback_problems if problem.answer]
        if len(problems) < self.options.max_callback_problems:
            raise ValueError(
                f"only {len(problems)} training problems with a gold answer are left for probe_problems "
                f"{self.options.max_callback_problems}: lower train_limit or probe_problems"
            )
        return problems

    def _build_callback(self) -> EvaluationCallback | None:
        problems = self._select_callback_problems()
        if not problems:
            return None
        base, reward = self.load_models()
        return EvaluationCallback(
            problems,
            base_policy=base,
            reward=reward,
            max_new_tokens=self.search_config.max_new_tokens,
            callback_steps=self.options.callback_steps,
            stop_on_overoptimization=self.options.stop_on_overoptimization,
            checker=self.checker,
        )
