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
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces
from nabla_trl.training.callbacks import Probe
from nabla_trl.training.checkpoints import CONFIG, traces_hash
from nabla_trl.training.offline import (
    OFFLINE,
    ONLINE,
    Trained,
    TrainOptions,
    check_tokenizer,
    select_rows,
    train_on_traces,
)
from nabla_trl.training.online import check_online, train_online
from nabla_trl.training.peft import LoraArguments, check_precision, check_reference, last_checkpoint
from nabla_trl.utils.files import write_whole
from nabla_trl.utils.identity import claim_settings

# TRL's options that decide what training makes of a policy.
TRAINING = (
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

    folder: Path
    policy: str
    dtype: str
    problems: Sequence[Problem]
    probed: Sequence[Problem]
    reasoner: ReasonerConfig
    options: TrainOptions
    lora: LoraArguments
    config: SFTConfig
    models: Callable[[], tuple[Policy, Reward]]
    settings: dict[str, str]
    checker: AnswerChecker
    state: PartialState
    called: Mapping[str, Any]
    command: str

    def run(self, method: str) -> Trained | None:
        """Train, or go on training; None where it is done already.

        Raises:
            ValueError: other settings than those the folder was begun with (the differing ones are named), and what
                the methods refuse.
        """
        self.check(method)
        home = self.folder / "trained" / method
        trainer, mark = home / "trainer", home / "settings.json"
        finished = (home / "train.json").exists()
        if not finished and last_checkpoint(trainer) is None and self.state.is_main_process:
            mark.unlink(missing_ok=True)  # of an attempt that left nothing
        self.state.wait_for_everyone()
        traces = traces_hash(self.folder) if method in OFFLINE else None
        claim_settings(mark, self._settings(method) | ({} if traces is None else {"traces": traces}))
        if finished:
            return None
        if self.state.is_main_process:
            write_whole(home / CONFIG, yaml.safe_dump(dict(self.called), sort_keys=False))
        config = copy(self.config)
        config.output_dir = str(trainer)
        output = home / ("model" if self.options.tuning == "full" else "adapter")
        trained, spent = self._train(method, output, config)
        if self.state.is_main_process:
            facts = asdict(trained) | {"trace_flops": spent.flops, "trace_seconds": spent.seconds}
            facts |= {"traces": traces, "command": self.command}
            facts["processes"] = self.state.num_processes
            write_whole(home / "train.json", json.dumps(facts, indent=1))
        return trained

    def check(self, method: str) -> None:
        """Refuse what a method cannot be trained with, before anything is loaded or searched."""
        if method != "sft" and self.reasoner.beta is None:
            raise ValueError(
                f"method {method} needs beta, which search and training share: set beta (kl sizes the search alone)"
            )
        if method == "sft" and self.options.select == "samples" and self.reasoner.acceptance != "metropolis":
            raise ValueError("select samples takes samples of π*: set acceptance metropolis")
        if method == "dpo" or method in ONLINE:
            check_reference(self.policy, self.options.tuning)
        if method in ONLINE:
            check_online(self.config, self.reasoner.sampling(), self.options)
        check_precision(self.options.tuning, self.dtype, self.config)
        self._graded()

    def _settings(self, method: str) -> dict[str, str]:
        found = {name: str(getattr(self.config, name)) for name in TRAINING}
        found |= {name: str(value) for name, value in {**asdict(self.lora), **asdict(self.options)}.items()}
        found |= {"method": method, "problems": str(len(self.problems)), "processes": str(self.state.num_processes)}
        return found | self.settings

    def _train(self, method: str, output: Path, config: SFTConfig) -> tuple[Trained, Cost]:
        probe = self._probe()
        beta = 1 / self.reasoner.lam
        shared: dict[str, Any] = {
            "beta": beta,
            "lora": self.lora,
            "config": config,
            "dtype": self.dtype,
            "probe": probe,
        }
        if method in OFFLINE:
            made = self._traces()
            check_tokenizer(made, self.policy)
            found = select_rows(method, made, select=self.options.select, beta=beta)
            trained = train_on_traces(method, self.policy, found, output, tuning=self.options.tuning, **shared)
            return trained, sum((trace.cost for trace in made), Cost())
        base, reward = self.models()
        trained = train_online(
            method,
            base,
            self.problems,
            output,
            reward=reward,
            checker=self.checker,
            sampling=self.reasoner.sampling(),
            options=self.options,
            **shared,
        )
        return trained, Cost()

    def _traces(self) -> list[Trace]:
        """Those of the problems of training: the folder may hold more, of the probe too, from before there was one."""
        asked = {problem.id for problem in self.problems}
        return [trace for trace in read_traces(self.folder / "traces") if trace.problem_id in asked]

    def _graded(self) -> list[Problem]:
        """The problems of the probe.

        Raises:
            ValueError: fewer than asked for.
        """
        problems = [problem for problem in self.probed if problem.answer]
        if len(problems) < self.options.probe_problems:
            raise ValueError(
                f"only {len(problems)} training problems with a gold answer are left for probe_problems "
                f"{self.options.probe_problems}: lower train_limit or probe_problems"
            )
        return problems

    def _probe(self) -> Probe | None:
        problems = self._graded()
        if not problems:
            return None
        base, reward = self.models()
        return Probe(
            problems,
            base=base,
            reward=reward,
            max_new_tokens=self.reasoner.max_new_tokens,
            every=self.options.probe_steps,
            stop=self.options.stop_on_overoptimisation,
            checker=self.checker,
        )
