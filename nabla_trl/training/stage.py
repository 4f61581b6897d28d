"""Train one policy per method, each in its own folder of a run, and resume where training was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from trl import SFTConfig

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import DEFAULT_BETA, SearchConfig
from nabla_trl.search.options import MetropolisAcceptance
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.datasets import build_soft_target_rows
from nabla_trl.traces.schema import STORED_FIELDS
from nabla_trl.traces.storage import TRACES_DIR, describe_missing_shards, list_trace_files, read_traces
from nabla_trl.training.callbacks import EvaluationCallback
from nabla_trl.training.checkpoints import CONFIG_FILE, hash_traces
from nabla_trl.training.offline import (
    DEFAULT_DIVERGENCES,
    OFFLINE_METHODS,
    ON_POLICY,
    ONLINE_METHODS,
    SOFT_TARGETS,
    TrainingResult,
    TrainOptions,
    build_training_rows,
    check_tokenizer,
    train_on_traces,
)
from nabla_trl.training.online import check_online_options, check_teacher_options, train_online
from nabla_trl.training.peft import LoraArguments, check_precision, check_reference_model, find_last_checkpoint
from nabla_trl.training.rollouts import RolloutOptions
from nabla_trl.training.trainers import check_amounts, check_seeds
from nabla_trl.training.trl_options import list_trl_faults, select_trl_options
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.identity import check_settings, claim_settings

# TRL's options that change the trained weights.
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

# TRL's default learning rate of each method, for full weights. An adapter needs about ten times as much.
DEFAULT_LEARNING_RATES = {
    **dict.fromkeys(("sft", "reward-weighted", SOFT_TARGETS), 2e-5),
    **dict.fromkeys(("dpo", *ONLINE_METHODS), 1e-6),
}
ADAPTER_LEARNING_RATE_FACTOR = 10


@dataclass
class TrainStage:
    """What every training method needs.

    Attributes:
        run_dir: folder of the run, which holds traces/ and will hold trained/<method>/.
        policy: name of the policy.
        problems: of training. None: those of the traces, for methods that learn from traces.
        callback_problems: training problems that are held out for evaluations during training.
        load_models: loads the frozen policy and the reward, once.
        search_settings: of the models and the search, which decide the traces and the rewards.
        command_options: the options of this call, as `--config` takes them. They are stored with the weights, since
            later calls on the folder may have others.
        command: the command line of this call, stored with the weights, too.
        traces_run_dir: folder of the run that holds traces/. None: `run_dir`.
        trl_options: further options of TRL's trainers (see `collect_trl_options`).
        only_traces_of_problems: leave out traces of other problems, which the folder may hold.
    """

    run_dir: Path
    policy: str
    dtype: str
    problems: Sequence[Problem] | None
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
    traces_run_dir: Path | None = None
    trl_options: Mapping[str, Any] = field(default_factory=dict)
    only_traces_of_problems: bool = True

    @property
    def beta(self) -> float:
        """β of the search, and `DEFAULT_BETA` where a KL target sets the steps of the search."""
        return self.search_config.beta or DEFAULT_BETA

    def build_config(self, method: str) -> SFTConfig:
        """Return the trainer's options for a method, whose learning rate depends on it unless one was given."""
        config = copy(self.sft_config)
        config.output_dir = str(self.run_dir / "trained" / method / "trainer")
        if "learning_rate" not in self.command_options:
            factor = 1 if self.options.tuning == "full" else ADAPTER_LEARNING_RATE_FACTOR
            config.learning_rate = factor * DEFAULT_LEARNING_RATES[method]
        return config

    def describe_defaults(self, method: str) -> str:
        """Return what was not given and is chosen for a method, with its source. Empty where all was given."""
        parts = []
        if method in DEFAULT_DIVERGENCES and self.options.divergence is None:
            parts.append(f"divergence {DEFAULT_DIVERGENCES[method]}")
        if method not in ("sft", SOFT_TARGETS) and self.search_config.beta is None:
            parts.append(f"beta {DEFAULT_BETA:g} (the search has a KL target, and no beta for the training)")
        if "learning_rate" not in self.command_options:
            source = f"TRL's for {method}" if method in ("dpo", *ONLINE_METHODS) else "TRL's for sft"
            times = "" if self.options.tuning == "full" else f", × {ADAPTER_LEARNING_RATE_FACTOR} for an adapter"
            parts.append(f"learning_rate {self.build_config(method).learning_rate:g} ({source}{times})")
        return ", ".join(parts)

    def train_method(self, method: str) -> TrainingResult | None:
        """Train a policy, or continue an interrupted training. Returns None where the training is finished already.

        Raises:
            ValueError: other settings than those of the interrupted training (the differing ones are named), shards
                whose traces are missing, and what the methods refuse.
        """
        self.check_method(method)
        folder = self.run_dir / "trained" / method
        config, settings_file = self.build_config(method), folder / "settings.json"
        is_finished = (folder / "train.json").exists()
        has_begun = is_finished or find_last_checkpoint(Path(config.output_dir)) is not None
        if not has_begun and self.process_state.is_main_process:
            settings_file.unlink(missing_ok=True)  # of an attempt that left nothing
        self.process_state.wait_for_everyone()
        self.check_traces(method)
        traces_hash = hash_traces(self._get_traces_run_dir()) if method in OFFLINE_METHODS else None
        settings = self._collect_settings(method) | ({} if traces_hash is None else {"traces_hash": traces_hash})
        claim_settings(settings_file, settings)
        if is_finished:
            return None
        if self.process_state.is_main_process:
            write_atomic(folder / CONFIG_FILE, yaml.safe_dump(dict(self.command_options), sort_keys=False))
        output_dir = folder / ("model" if self.options.tuning == "full" else "adapter")
        result, trace_cost = self._train_policy(method, output_dir, config)
        if self.process_state.is_main_process:
            record = asdict(result) | {
                "trace_flops": trace_cost.flops,
                "trace_seconds": trace_cost.seconds,
                "traces_hash": traces_hash,
                "command": self.command,
                "processes": self.process_state.num_processes,
            }
            write_atomic(folder / "train.json", json.dumps(record, indent=1))
        return result

    def check_settings(self, method: str) -> None:
        """Refuse to continue the training of other settings, before anything is written. The traces may still change.

        Raises:
            ValueError: a finished or interrupted training has other settings. The differing ones are named.
        """
        folder = self.run_dir / "trained" / method
        if (folder / "train.json").exists() or find_last_checkpoint(folder / "trainer") is not None:
            check_settings(folder / "settings.json", self._collect_settings(method), ignored_names=["traces_hash"])

    def check_method(self, method: str) -> None:
        """Refuse what a method cannot be trained with, before anything is loaded or searched.

        Raises:
            ValueError: options that do not fit the method, or fewer problems for evaluations than asked for.
        """
        checks = Checks()
        with checks.collect():
            check_seeds(self.sft_config)
        with checks.collect():
            check_amounts(self.sft_config)
        checks.add(list_trl_faults([method], select_trl_options(method, self.trl_options)))
        trains_on_samples = method == "sft" and self.options.sft_selection == "samples"
        checks.require(
            not trains_on_samples or isinstance(self.search_config.acceptance, MetropolisAcceptance),
            "sft_selection samples takes samples of π*: set acceptance metropolis",
        )
        if method == "dpo" or method in ONLINE_METHODS:
            with checks.collect():
                check_reference_model(self.policy, self.options.tuning)
        if method in ONLINE_METHODS:
            with checks.collect():
                check_online_options(method, self.sft_config, self.search_config.temperature, self.options)
            with checks.collect():
                self.options.check(self.policy, self.process_state.num_processes)
        if method == ON_POLICY:
            checks.call(check_teacher_options, self.search_config)
        if method in ("reward-weighted", SOFT_TARGETS):
            joined = [name for name in ("packing", "padding_free") if getattr(self.sft_config, name, False)]
            checks.require(not joined, f"{method} trains on rows of their own, without {' or '.join(joined)}")
        with checks.collect():
            check_precision(self.options.tuning, self.dtype, self.sft_config)
        with checks.collect():
            self._select_callback_problems()
        checks.raise_faults()

    def check_traces(self, method: str) -> None:
        """Refuse traces of some shards only, or of another tokenizer, for a method that has still to learn from them.

        Raises:
            ValueError: missing traces of shards, a damaged file, or ids that mean other tokens than the policy's.
        """
        is_finished = (self.run_dir / "trained" / method / "train.json").exists()
        if method not in OFFLINE_METHODS or is_finished:
            return
        if missing := describe_missing_shards(self._get_traces_run_dir(), self._get_problem_ids()):
            raise ValueError(
                f"{self._get_traces_run_dir()} lacks the traces of {missing}: run nabla-trl traces again with these "
                "values of --shard, or let the stage traces make them"
            )
        if files := list_trace_files(self._get_traces_run_dir()):
            traces = read_traces(files[:1])  # the training reads the others
            check_tokenizer(traces, self.policy)
            if method == SOFT_TARGETS and any(trace.error is None for trace in traces):
                build_soft_target_rows(traces)  # refuses traces without soft targets

    def _get_traces_run_dir(self) -> Path:
        return self.traces_run_dir or self.run_dir

    def _get_problem_ids(self) -> set[str] | None:
        if self.problems is None or not self.only_traces_of_problems:
            return None
        return {problem.id for problem in self.problems}

    def _collect_settings(self, method: str) -> dict[str, str]:
        config = self.build_config(method)
        trainer_options = {name: getattr(config, name) for name in TRAINER_OPTIONS}
        trl_options = select_trl_options(method, self.trl_options)
        options = {**trainer_options, **trl_options, **asdict(self.lora), **asdict(self.options), "method": method}
        del options["divergence"]
        if method in DEFAULT_DIVERGENCES:
            options["divergence"] = self.options.get_divergence(method)
        for name in (item.name for item in fields(RolloutOptions)):
            del options[name]  # where responses are sampled does not matter, only by what
        if self.options.use_vllm and method in ONLINE_METHODS:
            options["rollouts"] = "vllm"
        num_problems = "all" if self.problems is None else len(self.problems)
        counts = {"problems": num_problems, "processes": self.process_state.num_processes}
        return {name: str(value) for name, value in {**options, **counts}.items()} | self.search_settings

    def _train_policy(self, method: str, output_dir: Path, config: SFTConfig) -> tuple[TrainingResult, Cost]:
        """Return the record of a training, and the cost of its traces."""
        shared: dict[str, Any] = {
            "beta": self.beta,
            "lora": self.lora,
            "config": config,
            "dtype": self.dtype,
            "callback": self._build_callback(),
            "trl_options": select_trl_options(method, self.trl_options),
        }
        if method in OFFLINE_METHODS:
            # The folder may hold traces of other problems, also of those that are held out now.
            problem_ids, traces_run_dir = self._get_problem_ids(), self._get_traces_run_dir()
            files = list_trace_files(traces_run_dir)
            # Soft targets are larger than all other columns together.
            columns = None if method == SOFT_TARGETS else [name for name in STORED_FIELDS if name != "soft_targets"]
            traces = [
                trace
                for trace in read_traces(files or traces_run_dir / TRACES_DIR, columns)
                if problem_ids is None or trace.problem_id in problem_ids
            ]
            check_tokenizer(traces, self.policy)
            rows = build_training_rows(method, traces, sft_selection=self.options.sft_selection, beta=self.beta)
            if method == SOFT_TARGETS:
                shared["divergence"] = self.options.get_divergence(method)
            result = train_on_traces(method, self.policy, rows, output_dir, tuning=self.options.tuning, **shared)
            return result, sum((trace.cost for trace in traces), Cost())
        base_policy, reward = self.load_models()
        result = train_online(
            method,
            base_policy,
            self.problems or (),
            output_dir,
            reward=reward,
            checker=self.checker,
            sampling=self.search_config.get_sampling(),
            options=self.options,
            search_config=self.search_config,
            **shared,
        )
        return result, Cost()

    def _select_callback_problems(self) -> list[Problem]:
        problems = [problem for problem in self.callback_problems if problem.answer]
        if len(problems) < self.options.max_callback_problems:
            raise ValueError(
                f"only {len(problems)} training problems with a gold answer are left for max_callback_problems "
                f"{self.options.max_callback_problems}: lower max_train_problems or max_callback_problems"
            )
        return problems

    def _build_callback(self) -> EvaluationCallback | None:
        problems = self._select_callback_problems()
        if not problems:
            return None
        base_policy, reward = self.load_models()
        return EvaluationCallback(
            problems,
            base_policy=base_policy,
            reward=reward,
            max_new_tokens=self.search_config.max_new_tokens,
            callback_steps=self.options.callback_steps,
            stop_on_overoptimization=self.options.stop_on_overoptimization,
            checker=self.checker,
        )
