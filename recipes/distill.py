"""From a policy and a reward to traces, trained weights and an honest comparison.

    accelerate launch recipes/distill.py --config recipes/tiny/distill.yaml
    accelerate launch recipes/distill.py --config recipes/gsm8k/distill.yaml \
        --policy Qwen/Qwen2.5-0.5B-Instruct --reward PATH_OR_HUB_ID --dataset gsm8k --train_methods sft rloo

Stages: traces (audit the reward, refine the training problems), train (one policy per `--train_methods`: sft, reward-weighted
and dpo on the traces, rloo and grpo on what the policy draws), evaluate (every method on held-out problems), report.
Each resumes where it was stopped and is skipped when its output is there; `--stages evaluate,report` runs only those.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from trl import SFTConfig

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.audit.ranking import audit_reward
from nabla_trl.baselines.step_config import StepSearchConfig
from nabla_trl.cli.arguments import get_sampler_settings
from nabla_trl.cli.distill_arguments import DistillArguments
from nabla_trl.cli.parsing import collect_given_options, parse_dataclasses, quiet_libraries, run_main
from nabla_trl.evaluation.method import (
    REWARD_MODEL_SAMPLING,
    Method,
    get_max_selection_size,
    has_search,
    list_policy_labels,
    parse_methods,
)
from nabla_trl.evaluation.plan import EvaluationSetup
from nabla_trl.evaluation.results import list_remarks, store_results
from nabla_trl.evaluation.run_facts import RunStopwatch, build_run_facts, collect_training_facts, describe_reward_cost
from nabla_trl.evaluation.runner import Evaluation
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.models.vllm_backend import connect_vllm
from nabla_trl.report.text import print_summary_table, write_report
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import compute_reward_identity
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.generate_traces import find_unfinished_problems, generate_traces, get_search_settings
from nabla_trl.tasks.problem import Problem, check_disjoint, filter_with_gold_answer
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.training.checkpoints import CONFIG_FILE, find_trained_weights, get_policy_label, list_trained_methods
from nabla_trl.training.offline import OFFLINE_METHODS, TrainOptions
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.stage import TrainStage
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.identity import claim_settings, hash_weights
from nabla_trl.utils.interrupts import get_current_command
from nabla_trl.utils.locks import lock_folder


class DistillRun:
    """One run: its settings, its output folder and, once asked for, its models."""

    def __init__(
        self,
        given_options: Mapping[str, Any],
        args: DistillArguments,
        search_config: SearchConfig,
        step_search_config: StepSearchConfig,
        train_options: TrainOptions,
        lora_arguments: LoraArguments,
        sft_config: SFTConfig,
    ):
        self.given_options = given_options  # options, as `--config` takes them
        self.command = get_current_command()
        self.args, self.search_config, self.step_search_config = args, search_config, step_search_config
        self.train_options, self.lora_arguments, self.sft_config = train_options, lora_arguments, sft_config
        self.state = PartialState()
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if self.state.num_processes != asked:
            raise ValueError(f"{asked} processes were asked for, but {self.state.num_processes} started")
        self.output_dir = Path(sft_config.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.traces_dir = self.output_dir / "traces"
        self.checker = AnswerChecker()
        self._models: tuple[Policy, Reward] | None = None
        self.stopwatch = RunStopwatch(self.output_dir, START_TIME, float(os.environ.get("NABLA_SETUP_SECONDS", "0")))
        self.train_problems, self.callback_problems, self.held_out_problems = self._load_problems()

    def _load_problems(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """Those of training, of the probe in training, and the held-out ones."""
        args = self.args
        limit = args.max_train_problems + self.train_options.max_callback_problems
        train = load_problems(args.dataset, split=args.train_split, max_problems=limit)
        held_out = load_problems(
            args.eval_dataset or args.dataset, split=args.eval_split, max_problems=args.max_eval_problems
        )
        args.get_prompt_options().check_problems([*train, *held_out])
        check_disjoint(train, held_out)
        held_out = filter_with_gold_answer(held_out, verbose=self.state.is_main_process)
        return train[: args.max_train_problems], train[args.max_train_problems :], held_out

    def load_models(self) -> tuple[Policy, Reward]:
        if self._models is None:
            device = str(self.state.device)
            policy = load_policy(
                self.args.policy, dtype=self.args.dtype, device=device, prompt_options=self.args.get_prompt_options()
            )
            if self.args.vllm_url:
                policy = connect_vllm(policy, self.args.vllm_url, timeout=self.args.vllm_timeout)
            rows = 4 * self.search_config.batch_size
            reward = load_reward(
                self.args.reward, policy=policy, dtype=self.args.dtype, device=device, batch_size=rows
            )
            if self.state.is_main_process:
                among = (
                    get_max_selection_size(parse_methods(self.args.eval_methods))
                    if "evaluate" in self.args.stages
                    else 1
                )
                warn_past_limits(reward, self.search_config if self._needs_search() else None, among)
            self._models = policy, reward
        return self._models

    def _needs_search(self) -> bool:
        stages = self.args.stages.split(",")
        return "traces" in stages or ("evaluate" in stages and has_search(parse_methods(self.args.eval_methods)))

    def print_once(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)

    def write_config(self) -> None:
        """config.yaml: what this run was called with, as `--config` takes it."""
        if self.state.is_main_process:
            write_atomic(self._get_path(CONFIG_FILE), yaml.safe_dump(self.given_options, sort_keys=False))

    # --- stages ---------------------------------------------------------------------------------------

    def stage_traces(self) -> None:
        """Audit the reward on training problems, then refine them; one shard per process and batch."""
        if self.state.is_main_process and self.args.max_audit_problems and not self._get_path("audit.json").exists():
            self._audit_reward()
        self.state.wait_for_everyone()
        if not any(method in OFFLINE_METHODS for method in self.args.train_methods):
            self.print_once(f"traces: {', '.join(self.args.train_methods)} need none")
            return
        mine = self._select_process_share(self.train_problems)
        seeds = range(self.args.seeds[0], self.args.seeds[0] + self.args.traces_per_problem)
        todo = {seed: find_unfinished_problems(mine, self.traces_dir, seed) for seed in seeds}
        if any(todo.values()):
            self.load_models()  # first: what cannot be loaded must not claim the folder
        settings = self._collect_search_settings() | {"adapter": "", "split": self.args.train_split}
        claim_settings(self._get_path("traces.settings.json"), settings | get_task_settings(self.args.dataset))
        for seed, problems in todo.items():
            if not problems:
                self.print_once(f"traces: {len(mine)} problems are there already")
                continue
            policy, reward = self.load_models()
            tally = generate_traces(
                problems,
                self.traces_dir,
                policy=policy,
                reward=reward,
                config=self.search_config,
                seed=seed,
                checker=self.checker,
                rank=self.state.process_index,
                show_progress=self.state.is_main_process,
                num_done=len(mine) - len(problems),
            )
            here = " of this process" if self.state.num_processes > 1 else ""
            self.print_once(f"traces{here}: {tally}")

    def _collect_search_settings(self) -> dict[str, str]:
        reward = compute_reward_identity(self.args.reward)
        models = {"policy": self.args.policy, "reward": reward, "dtype": self.args.dtype}
        models |= get_sampler_settings(self.args.vllm_url) | self.args.get_prompt_options().get_changed_settings()
        return models | get_search_settings(self.search_config)

    def _audit_reward(self) -> None:
        policy, reward = self.load_models()
        found = audit_reward(
            [problem for problem in self.train_problems if problem.answer][: self.args.max_audit_problems],
            self.args.audit_samples,
            policy=policy,
            reward=reward,
            sampling=self.search_config.get_sampling(),
            batch_size=4 * self.search_config.batch_size,
            checker=self.checker,
        )
        write_atomic(self._get_path("audit.json"), json.dumps(found, indent=1))
        self.print_once(f"audit: {found['verdict']}")

    def check_train_methods(self) -> None:
        """Refuse what could not be trained, before hours of traces."""
        if "train" in self.args.stages.split(","):
            for method in self.args.train_methods:
                self._make_train_stage().check_method(method)

    def _make_train_stage(self) -> TrainStage:
        return TrainStage(
            run_dir=self.output_dir,
            policy=self.args.policy,
            dtype=self.args.dtype,
            problems=self.train_problems,
            callback_problems=self.callback_problems,
            search_config=self.search_config,
            options=self.train_options,
            lora=self.lora_arguments,
            sft_config=self.sft_config,
            load_models=self.load_models,
            search_settings=self._collect_search_settings() | get_task_settings(self.args.dataset),
            checker=self.checker,
            process_state=self.state,
            command_options=self.given_options,
            command=self.command,
        )

    def stage_train(self) -> None:
        """One policy per method; adapters, or whole models."""
        stage = self._make_train_stage()
        for method in self.args.train_methods:
            made = stage.train_method(method)
            if made is None:
                self.print_once(f"train {method}: it is there already")
                continue
            self.print_once(
                f"train {method}: {made.rows} rows, {made.steps} steps, loss {made.loss:.3f}, {made.seconds:.0f} s"
            )
            if made.stop_reason:
                self.print_once(f"train {method}: {made.stop_reason}")

    def stage_evaluate(self) -> None:
        """Every method on the held-out problems; budgets are fractions of best-of-16's measured FLOPs."""
        policy, reward = self.load_models()  # first: what cannot be loaded must not claim the folder
        evaluation = self._open_evaluation()
        setup = EvaluationSetup(
            policy, reward, self.search_config, tuple(self.args.seeds), step_search=self.step_search_config
        )
        names = parse_methods(self.args.eval_methods)
        trained_policies = self._load_trained_policies(names, evaluation)
        absent = [name for name in names if Method.parse(name).policy not in ("", *trained_policies)]
        absent += [] if reward.preferred_model else [name for name in names if name == REWARD_MODEL_SAMPLING]
        if absent:
            self.print_once(
                f"evaluate: without {', '.join(absent)}: not trained here, or no better model to sample from"
            )

        def get_flops(method: str) -> float:
            self.state.wait_for_everyone()  # the rows of all processes
            return evaluation.get_budget_flops(method)

        jobs = evaluation.plan([name for name in names if name not in absent], setup, trained_policies, get_flops)
        evaluation.run(
            jobs,
            self.checker,
            problems=self._select_process_share(self.held_out_problems),
            keep_traces=True,
            show_progress=self.state.is_main_process,
        )

    def _load_trained_policies(self, eval_methods: Sequence[str], evaluation: Evaluation) -> dict[str, Policy]:
        """The trained policies that these methods ask for, by label."""
        tuned = {}
        for method in list_trained_methods(self.output_dir):
            if get_policy_label(method) in list_policy_labels(eval_methods):
                path = find_trained_weights(self.output_dir, method)
                # Rows of an earlier training must not pass for those of this one.
                evaluation.claim(method, {"weights": hash_weights(path)})
                model, adapter = (str(path), None) if path.name == "model" else (self.args.policy, str(path))
                tuned[get_policy_label(method)] = load_policy(
                    model,
                    dtype=self.args.dtype,
                    device=str(self.state.device),
                    adapter=adapter,
                    prompt_options=self.args.get_prompt_options(),
                )
        return tuned

    def _select_process_share(self, problems: list[Problem]) -> list[Problem]:
        """The share of this process."""
        return problems[self.state.process_index :: self.state.num_processes]

    def stage_report(self) -> None:
        if not self.state.is_main_process:
            return
        rows, left_out = self._open_evaluation().select_rows()
        if not rows:
            raise ValueError(f"{self.output_dir} holds no rows of all its problems: finish the stage evaluate first")
        if left_out:
            self.print_once(left_out)
        facts = self.build_facts()
        store_results(self.output_dir, rows, facts)
        print_summary_table(write_report(self.output_dir, rows, facts))
        for remark in list_remarks(self.output_dir, rows):
            print(remark)
        for name, path in self.list_files().items():
            print(f"{name:>10}: {path}")

    # --- facts and files ------------------------------------------------------------------------------

    def build_facts(self) -> dict[str, Any]:
        args, audit = self.args, self._get_path("audit.json")
        audited = read_json_file(audit) if audit.exists() else None
        facts = build_run_facts(
            title=args.title,
            command=self.command,
            policy=args.policy,
            reward=args.reward,
            task=args.eval_dataset or args.dataset,
            seeds=args.seeds,
            sampling=self.search_config.get_sampling(),
            problems=self.held_out_problems,
        )
        sizes = f"{len(self.train_problems)} training and {len(self.held_out_problems)} held-out problems, disjoint"
        return facts | {
            "setup_seconds": self.stopwatch.setup_seconds,
            "total_seconds": self.stopwatch.total_seconds,
            "audit": audited,
            "trained": collect_training_facts(self.output_dir, audited or {}),
            "files": self.list_files(),
            "notes": [sizes, *describe_reward_cost(args.reward)],
        }

    def list_files(self) -> dict[str, str]:
        names = {
            "report": "report.md",
            "page": "report.html",
            "summary": "summary.json",
            "rows": "rows.jsonl",
            "traces": "traces",
            "trained": "trained",
            "plots": "plots",
        }
        return {label: str(self._get_path(name)) for label, name in names.items()}

    def _open_evaluation(self) -> Evaluation:
        settings = self._collect_search_settings() | {"split": self.args.eval_split}
        settings |= get_task_settings(self.args.eval_dataset or self.args.dataset)
        return Evaluation(
            self.output_dir,
            settings,
            self.held_out_problems,
            settings_file="rows/eval.settings.json",
            rank=self.state.process_index,
        )

    def _get_path(self, name: str) -> Path:
        return self.output_dir / name


START_TIME = time.perf_counter()


def main(argv: Sequence[str]) -> None:
    # First of all: whatever made a state before would choose the back end.
    # A process may wait for hours for another one that has longer answers to draw.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    quiet_libraries()
    dataclasses = [DistillArguments, SearchConfig, StepSearchConfig, TrainOptions, LoraArguments, SFTConfig]
    filled = parse_dataclasses(dataclasses, argv, presets=PRESETS)
    run = DistillRun(collect_given_options(argv, filled, PRESETS), *filled)
    run.check_train_methods()
    with ExitStack() as open_:
        with run.state.main_process_first():
            open_.enter_context(lock_folder(run.output_dir, run.state.process_index))
        open_.enter_context(run.checker)
        run.write_config()
        for stage in run.args.stages.split(","):
            getattr(run, f"stage_{stage}")()
            run.state.wait_for_everyone()
            if run.state.is_main_process:
                run.stopwatch.save()


if __name__ == "__main__":
    sys.exit(run_main(main))
