r"""Distill test-time gradient search into a policy, and compare both at equal cost.

The run has four stages:

    traces     audit the reward, and refine the answers to the training problems
    train      train one policy per training method: sft, reward-weighted, dpo and soft-targets on the traces, rloo,
               grpo and on-policy-distillation on responses that the policy draws
    evaluate   run every method on the held-out problems
    report     write tables, plots and conclusions

Each stage continues where it was interrupted and skips finished work. `--stages evaluate,report` runs two of them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.cli.distill.arguments import (
    COMMON_TRAIN_OPTIONS,
    DEFAULT_OUTPUT_DIR,
    DEFAULT_SPLITS,
    DistillArguments,
)
from nabla_trl.cli.distill.launcher import LAUNCH_OPTIONS, split_launch_options, start_processes
from nabla_trl.cli.launch import join_launch
from nabla_trl.cli.parsing import Parser, UsageError, collect_given_options, quiet_libraries
from nabla_trl.cli.quiet import log_to_folder
from nabla_trl.evaluation.method import (
    REWARD_MODEL_SAMPLING,
    Method,
    get_max_selection_size,
    has_search,
    list_policy_labels,
    parse_methods,
)
from nabla_trl.evaluation.plan import check_baselines, check_method_options
from nabla_trl.evaluation.results import list_remarks, store_results
from nabla_trl.evaluation.run_facts import RunStopwatch, collect_training_facts
from nabla_trl.evaluation.runner import Evaluation
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import DTYPES, get_dtype_name, set_trust_remote_code
from nabla_trl.models.policy import Policy
from nabla_trl.pipeline.audit import audit_samples
from nabla_trl.pipeline.evaluation import collect_eval_settings, open_evaluation
from nabla_trl.pipeline.traces import TraceRun, collect_trace_settings
from nabla_trl.pipeline.train import run_training
from nabla_trl.planning.machine import Machine, choose_batches
from nabla_trl.planning.preflight import check_output_dir, list_frozen_models
from nabla_trl.planning.training import collect_training_faults
from nabla_trl.report.text import print_summary_table, write_report_files
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import PRESETS, SearchConfig, SharedBudget
from nabla_trl.tasks.problem import Problem, check_disjoint, divide_problems, filter_with_gold_answer
from nabla_trl.tasks.registry import get_task_settings, is_one_split, load_problems
from nabla_trl.tasks.shards import Shard
from nabla_trl.tasks.templates import use_recorded_date
from nabla_trl.tasks.yaml_task import ALL_PROBLEMS
from nabla_trl.traces.storage import list_trace_files
from nabla_trl.training.checkpoints import CONFIG_FILE, find_trained_weights, get_policy_label, list_trained_methods
from nabla_trl.training.offline import OFFLINE_METHODS, SOFT_TARGETS, TrainOptions
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.reporting import list_trackers, track_metrics
from nabla_trl.training.stage import TrainStage
from nabla_trl.training.trl_options import TrainerConfig, TrlOptions, collect_trl_options
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.formatting import hide_userinfo, pluralize
from nabla_trl.utils.identity import check_settings, hash_weights, is_same_model
from nabla_trl.utils.interrupts import get_current_command
from nabla_trl.utils.locks import lock_folder
from nabla_trl.utils.progress import announce

START_TIME = time.perf_counter()
EVAL_SETTINGS_FILE = "rows/eval.settings.json"


DATACLASSES = (
    *(DistillArguments, SearchConfig, BaselineConfig, TrainOptions, LoraArguments, TrainerConfig, TrlOptions),
    SharedBudget,
)


def main(argv: Sequence[str]) -> int:
    """Run the stages of a command line in this process, alone or one of those that a launcher started.

    With --num_processes or --accelerate_config, start these processes and return the exit code.
    """
    launch_words, argv = split_launch_options(argv)
    if launch_words and "WORLD_SIZE" not in os.environ and not {"-h", "--help", "--help-all"} & {*argv}:
        return start_processes(launch_words, argv)
    with join_launch() as stall_watch:
        machine = Machine.detect(PartialState())
        quiet_libraries()
        parser = build_parser(machine)
        checks = Checks()
        options = parser.parse_options(argv, checks)[: len(DATACLASSES)]
        given_options: dict[str, Any] = {}
        with checks.collect():
            given_options = collect_given_options(argv, options, PRESETS)
        run = DistillRun(given_options, machine, *options, checks=checks)
        run.collect_faults(checks)
        checks.raise_faults(UsageError)
        if stall_watch:
            stall_watch.limit_seconds = 60 * run.args.stall_minutes
        run.print_once(machine.describe(run.dtype, run.search_config.batch_size, run.sft_config))
        with run.lock_output_dir(), run.checker:
            run.check_settings()
            log_to_folder(run.output_dir)
            run.write_config()
            for stage in run.args.stages:
                run.run_stage(stage)
    return 0


def build_parser(machine: Machine) -> Parser:
    """Return the parser of a run's options, with the defaults for this machine."""
    usage = (
        "nabla-trl distill --policy P --reward R --dataset D [options]\n"
        "       accelerate launch -m nabla_trl.distill --config FILE [options]"
    )
    parser = Parser(DATACLASSES, presets=PRESETS, common=COMMON_TRAIN_OPTIONS, usage=usage, description=__doc__)
    for name, (_, text) in LAUNCH_OPTIONS.items():
        parser.add_argument(name, help=text)
    parser.set_defaults_with_config(output_dir=DEFAULT_OUTPUT_DIR, max_length=None, **machine.get_defaults())
    return parser


class DistillRun:
    """A run with its options, its output folder, its problems and its models."""

    def __init__(
        self,
        given_options: Mapping[str, Any],
        machine: Machine,
        args: DistillArguments,
        search_config: SearchConfig,
        baseline_config: BaselineConfig,
        train_options: TrainOptions,
        lora_arguments: LoraArguments,
        sft_config: Any,  # TrainerConfig, whose base is untyped for mypy
        trl_options: Any,
        budget: SharedBudget,
        *,
        checks: Checks,
    ):
        self.given_options = hide_userinfo(given_options)  # as `--config` takes them
        self.command = get_current_command()
        self.args, self.search_config, self.budget, self.baseline_config = args, search_config, budget, baseline_config
        self.train_options, self.lora_arguments, self.sft_config = train_options, lora_arguments, sft_config
        self.trl_options = collect_trl_options(trl_options, sft_config, given_options)
        set_trust_remote_code(sft_config.trust_remote_code)
        self.state = PartialState()
        self.dtype = get_dtype_name(args.dtype, self.state.device)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.state.num_processes != world_size:
            raise ValueError(f"WORLD_SIZE is {world_size}, but {self.state.num_processes} processes started")
        self.output_dir = Path(sft_config.output_dir)
        checks.call(use_recorded_date, self.output_dir, args.template_date)
        self.checker = AnswerChecker()
        with checks.collect():
            self.models = args.build_pair(device=str(self.state.device))
        self._has_warned = False
        self.stopwatch = RunStopwatch(self.output_dir, START_TIME, float(os.environ.get("NABLA_SETUP_SECONDS", "0")))
        self.train_problems, self.callback_problems, self.held_out_problems = self._load_problems(checks)
        if self.dtype == "bfloat16" and not {"bf16", "fp16"} & set(given_options):
            with checks.collect():  # an adapter on a half-precision base needs it
                self.sft_config = replace(sft_config, bf16=True)
        self.all_options = self.given_options
        if self.dtype in DTYPES:
            with checks.collect():
                self.all_options = self._choose_batches(machine) | self.given_options

    def _load_problems(self, checks: Checks) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """Load the training problems, those of the evaluation during training, and the held-out problems."""
        args = self.args
        limit = args.max_train_problems + self.train_options.max_callback_problems
        train: list[Problem] = []
        held_out: list[Problem] = []
        divides: bool | None = None  # None: what is named cannot be read
        with checks.collect():
            divides = self._divides_dataset()
            if divides:
                train, held_out = divide_problems(
                    load_problems(args.dataset, split=ALL_PROBLEMS), args.test_fraction, args.split_seed
                )
                self.print_once(
                    f"{args.dataset} has no splits: {pluralize(len(train), 'problem')} to train on, {len(held_out)} "
                    f"held out (by a hash of each question; test_fraction {args.test_fraction:g}, split_seed "
                    f"{args.split_seed})"
                )
                train, held_out = train[:limit], held_out[: args.max_eval_problems]
        if divides is False:
            with checks.collect():
                train = load_problems(args.dataset, split=args.train_split, max_problems=limit)
            with checks.collect():
                held_out = load_problems(
                    args.eval_dataset or args.dataset, split=args.eval_split, max_problems=args.max_eval_problems
                )
        checks.call(check_disjoint, train, held_out)
        if held_out and {"evaluate", "report"} & {*args.stages}:
            with checks.collect():
                held_out = filter_with_gold_answer(held_out, verbose=self.state.is_main_process)
        return train[: args.max_train_problems], train[args.max_train_problems :], held_out

    def _divides_dataset(self) -> bool:
        """Return whether the data set is one file, which gives both the training and the held-out problems."""
        args = self.args
        is_eval_dataset = not args.eval_dataset or is_same_model(args.eval_dataset, args.dataset)
        if not is_eval_dataset or not is_one_split(args.dataset):
            return False
        named = [name for name, default in DEFAULT_SPLITS.items() if getattr(args, name) != default]
        if named:
            raise ValueError(
                f"{args.dataset} is one file without splits, so there is no {named[0]} {getattr(args, named[0])!r}: "
                "leave the option out (--test_fraction divides the file), or name a file for each split in a YAML file"
            )
        return True

    def _choose_batches(self, machine: Machine) -> dict[str, Any]:
        """Fill in the batch sizes that the options leave out, and return what is chosen."""
        args, config = self.args, self.sft_config
        chosen = choose_batches(
            machine,
            self.given_options,
            policy=args.policy,
            reward=args.reward,
            methods=args.train_methods,
            dtype=self.dtype,
            search_config=self.search_config,
            train_options=self.train_options,
            lora=self.lora_arguments,
            sft_config=config,
        )
        for name, value in chosen.items():
            setattr(self.search_config if name == "batch_size" else config, name, value)
        return {"dtype": self.dtype, "bf16": config.bf16, **chosen}

    def collect_faults(self, checks: Checks) -> None:
        """Collect what would stop the stages later. Nothing is loaded or written."""
        args, stages = self.args, self.args.stages
        if set(stages) - {"report"}:
            args.check_models(
                checks,
                problems=[*self.train_problems[:50], *self.held_out_problems[:50]],
                max_new_tokens=self.search_config.max_new_tokens,
                device=str(self.state.device),
            )
        if "evaluate" in stages:
            names: list[str] = []
            with checks.collect():
                methods = [Method.parse(name) for name in parse_methods(args.eval_methods)]
                # Methods of policies that are not trained here, and of models that a reward lacks, are left out later.
                names = [
                    str(method) for method in methods if not method.policy and method.name != REWARD_MODEL_SAMPLING
                ]
                check_method_options(
                    names, self.search_config, [], has_better_model=True, baseline_config=self.baseline_config
                )
            checks.call(
                check_baselines,
                names,
                self.baseline_config,
                policy=args.policy,
                reward=args.reward,
                settings_dir=(self.output_dir / EVAL_SETTINGS_FILE).parent,
            )
        if "train" in stages:
            frozen_models: list[str] = []
            with checks.collect():
                frozen_models = list_frozen_models(args.policy, args.reward)
            with checks.collect():
                collect_training_faults(
                    checks,
                    self._make_train_stage(),
                    args.train_methods,
                    frozen_models=frozen_models,
                    keeps_frozen_models="traces" in stages,
                )
            checks.call(self._check_soft_targets)
        else:
            checks.call(check_output_dir, self.output_dir)
        if "traces" in stages:
            checks.call(self.budget.check, self.search_config)
        checks.call(self.check_settings)

    def _check_soft_targets(self) -> None:
        """Refuse to train soft targets on traces that have none, and that this run would make without."""
        if SOFT_TARGETS not in self.args.train_methods:
            return
        if list_trace_files(self.output_dir):
            self._make_train_stage().check_traces(SOFT_TARGETS)
        elif "traces" in self.args.stages and not self.search_config.soft_target_top_k:
            raise ValueError(
                f"{SOFT_TARGETS} needs refined distributions in the traces: set soft_target_top_k 16, say"
            )

    def load_models(self) -> tuple[Policy, Reward]:
        """Return the policy and the reward. The first call loads them, and warns past validated limits."""
        policy, reward = self.models.load(4 * self.search_config.batch_size)
        if not self._has_warned and self.state.is_main_process:
            stages = self.args.stages
            methods = parse_methods(self.args.eval_methods) if "evaluate" in stages else []
            searches = "traces" in stages or has_search(methods)
            warn_past_limits(
                reward,
                self.search_config if searches else None,
                get_max_selection_size(methods),
                limits_rounds=has_search(methods) or not self.budget.shared_flops,
            )
        self._has_warned = True
        return policy, reward

    def print_once(self, text: str) -> None:
        """Print a line in the main process."""
        if self.state.is_main_process:
            print(text, flush=True)

    @contextmanager
    def lock_output_dir(self) -> Iterator[None]:
        """Lock the output folder against other runs. Each process of this run has a lock of its own."""
        with ExitStack() as stack:
            with self.state.main_process_first():
                stack.enter_context(lock_folder(self.output_dir, self.state.process_index))
            yield

    def write_config(self) -> None:
        """Write config.yaml with the options of this run, as `--config` takes them."""
        if self.state.is_main_process:
            write_atomic(self.output_dir / CONFIG_FILE, yaml.safe_dump(self.all_options, sort_keys=False))

    def finish_stage(self) -> None:
        """Wait for all processes and save the time that the run has taken so far."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.stopwatch.save()

    # --- stages ---------------------------------------------------------------------------------------

    def run_stage(self, stage: str) -> None:
        """Run one stage, and wait for all processes."""
        if stage == "traces":
            self.audit_reward()  # does the reward rank the policy's responses?
            with self.track("traces", self._collect_trace_settings()):
                self.generate_traces()  # refine the training problems by gradient search
        elif stage == "train":
            self.train()  # one policy per training method
        elif stage == "evaluate":
            with self.track("eval", self._collect_eval_settings()):
                self.evaluate()  # every method on the held-out problems
        elif stage == "report":
            self.write_report()  # tables, plots and conclusions
        self.finish_stage()

    def track(self, stage: str, settings: Mapping[str, str]) -> AbstractContextManager[None]:
        """Send the figures of a stage to the experiment trackers of the training, from the main process alone."""
        config = self.sft_config
        return track_metrics(
            list_trackers(config.report_to) if self.state.is_main_process else None,
            stage=stage,
            output_dir=self.output_dir,
            settings=settings,
            project=config.project,
        )

    def audit_reward(self) -> None:
        """Audit in the main process if the reward ranks samples of the policy, and write audit.json."""
        path = self.output_dir / "audit.json"
        if self.state.is_main_process and self.args.max_audit_problems and not path.exists():
            self.load_models()
            audit = audit_samples(
                [problem for problem in self.train_problems if problem.answer][: self.args.max_audit_problems],
                self.models,
                config=self.search_config,
                samples=self.args.audit_samples,
                checker=self.checker,
            )
            write_atomic(path, json.dumps(audit, indent=1))
            self.print_once(f"audit: {audit['conclusion']}")
        self.state.wait_for_everyone()

    def generate_traces(self) -> None:
        """Refine the training problems and write traces, one shard per process and batch."""
        if not any(method in OFFLINE_METHODS for method in self.args.train_methods):
            self.print_once(f"traces: not needed for {', '.join(self.args.train_methods)}")
            return
        num_blocks = math.ceil(len(self.train_problems) / self.budget.block_size)
        if self.budget.shared_flops and num_blocks < self.state.num_processes:
            self.print_once(
                f"traces: {num_blocks} of {self.state.num_processes} processes have a budget to spend: lower "
                f"problems_per_budget ({self.budget.problems_per_budget}) to use all of them"
            )
        share = self._select_process_share(self.train_problems, self.budget.block_size)
        scope = " of this process" if self.state.num_processes > 1 else ""
        for seed in range(self.args.seeds[0], self.args.seeds[0] + self.args.traces_per_problem):
            run = TraceRun(
                self.models,
                self.output_dir,
                self.search_config,
                seed,
                self._get_trace_task_settings(),
                self.budget,
                load=self.load_models,
                checker=self.checker,
                rank=self.state.process_index,
                show_progress=self.state.is_main_process,
            )
            summary = run.fill(share)
            if summary.totals is None:
                self.print_once(f"traces: {len(share)} problems are already done")
            else:
                self.print_once(f"traces{scope}: {summary.totals}")

    def check_settings(self) -> None:
        """Check the settings of the output folder before anything in it is written.

        Raises:
            ValueError: a stage of this call would continue an output of other settings.
        """
        stages, methods = self.args.stages, self.args.train_methods
        if "traces" in stages and any(method in OFFLINE_METHODS for method in methods):
            check_settings(self.output_dir / "traces.settings.json", self._collect_trace_settings())
        if "train" in stages:
            for method in methods:
                self._make_train_stage().check_settings(method)
        if "evaluate" in stages or "report" in stages:
            check_settings(self.output_dir / EVAL_SETTINGS_FILE, self._collect_eval_settings())

    def _collect_trace_settings(self) -> dict[str, str]:
        return collect_trace_settings(self.models, self.search_config, self._get_trace_task_settings(), self.budget)

    def _get_trace_task_settings(self) -> dict[str, str]:
        return get_task_settings(self.args.dataset) | {"split": self._describe_split("train_split")}

    def _collect_eval_settings(self) -> dict[str, str]:
        return collect_eval_settings(self.models, self._get_eval_config(), self._get_eval_task_settings())

    def _get_eval_config(self) -> SearchConfig:
        return replace(self.search_config, soft_target_top_k=0)  # nothing is trained on these traces

    def _get_eval_task_settings(self) -> dict[str, str]:
        task_settings = get_task_settings(self.args.eval_dataset or self.args.dataset)
        return task_settings | {"split": self._describe_split("eval_split")}

    def _describe_split(self, name: str) -> str:
        split = str(getattr(self.args, name))
        if not self._divides_dataset():
            return split
        return f"{split}, test_fraction {self.args.test_fraction:g}, split_seed {self.args.split_seed}"

    def _make_train_stage(self) -> TrainStage:
        return TrainStage(
            run_dir=self.output_dir,
            policy=self.args.policy,
            dtype=self.dtype,
            problems=self.train_problems,
            callback_problems=self.callback_problems,
            search_config=self.search_config,
            options=self.train_options,
            lora=self.lora_arguments,
            sft_config=self.sft_config,
            load_models=self.load_models,
            search_settings=self.models.get_settings()
            | self.search_config.get_settings()
            | get_task_settings(self.args.dataset),
            checker=self.checker,
            process_state=self.state,
            command_options=self.all_options,
            command=self.command,
            trl_options=self.trl_options,
        )

    def train(self) -> None:
        """Train one policy per method, as an adapter or as a full model."""
        run_training(self._make_train_stage(), self.args.train_methods, self.print_once)

    def evaluate(self) -> None:
        """Evaluate every method on the held-out problems. Budgets are fractions of best-of-16's measured FLOPs."""
        _, reward = self.load_models()
        evaluation, setup = open_evaluation(
            self.held_out_problems,
            self.models,
            self.output_dir,
            task_settings=self._get_eval_task_settings(),
            config=self._get_eval_config(),
            seeds=self.args.seeds,
            baseline_config=self.baseline_config,
            settings_file=EVAL_SETTINGS_FILE,
            rank=self.state.process_index,
        )
        methods = parse_methods(self.args.eval_methods)
        trained_policies = self._load_trained_policies(methods, evaluation)
        skipped = [method for method in methods if Method.parse(method).policy not in ("", *trained_policies)]
        if REWARD_MODEL_SAMPLING in methods and not reward.preferred_model:
            skipped.append(REWARD_MODEL_SAMPLING)
        if skipped:
            self.print_once(
                f"evaluate: without {', '.join(skipped)}: not trained here, or no better model to sample from"
            )

        def get_flops(method: str) -> float:
            self.state.wait_for_everyone()  # for the rows of all processes
            return evaluation.get_budget_flops(method)

        methods = [method for method in methods if method not in skipped]
        jobs = evaluation.plan(methods, setup, trained_policies, get_flops)
        evaluation.run(
            jobs,
            self.checker,
            problems=self._select_process_share(self.held_out_problems),
            keep_traces=True,
            show_progress=self.state.is_main_process,
        )

    def _load_trained_policies(self, eval_methods: Sequence[str], evaluation: Evaluation) -> dict[str, Policy]:
        """Return the trained policies that these methods need, by label."""
        trained_policies = {}
        for method in list_trained_methods(self.output_dir):
            if get_policy_label(method) in list_policy_labels(eval_methods):
                path = find_trained_weights(self.output_dir, method)
                # Rows of an earlier training must not pass for those of this one.
                with announce(f"reading the weights of {path}"):
                    evaluation.claim(method, {"weights": hash_weights(path)})
                trained_policies[get_policy_label(method)] = self.models.load_trained_policy(path)
        return trained_policies

    def _select_process_share(self, problems: list[Problem], block_size: int = 1) -> list[Problem]:
        """Return the problems of this process."""
        return Shard(self.state.process_index, self.state.num_processes, block_size).select(problems)

    def write_report(self) -> None:
        """Write the report of the rows of all processes, in the main process."""
        if not self.state.is_main_process:
            return
        rows, incomplete = self._open_evaluation().select_rows()
        if not rows:
            raise ValueError(
                f"{self.output_dir} has no method with rows of all problems: finish the stage evaluate first"
            )
        if incomplete:
            self.print_once(incomplete)
        facts = self.build_facts()
        store_results(self.output_dir, rows, facts)
        summary = write_report_files(self.output_dir, rows, facts)
        print_summary_table(summary)
        for remark in list_remarks(self.output_dir, rows):
            print(remark)
        for name, path in self.list_files().items():
            print(f"{name:>10}: {path}")

    # --- facts and files ------------------------------------------------------------------------------

    def build_facts(self) -> dict[str, Any]:
        """Return the facts of the run for its report (see `nabla_trl.report.text`)."""
        args, audit_path = self.args, self.output_dir / "audit.json"
        audit = read_json_file(audit_path) if audit_path.exists() else None
        facts = self.models.build_run_facts(
            title=args.title,
            command=self.command,
            task=args.eval_dataset or args.dataset,
            seeds=args.seeds,
            sampling=self.search_config.get_sampling(),
            problems=self.held_out_problems,
            dollars_per_gpu_hour=args.dollars_per_gpu_hour,
        )
        held_out = pluralize(len(self.held_out_problems), "held-out problem")
        sizes = f"{len(self.train_problems)} training and {held_out}, disjoint"
        return facts | {
            "setup_seconds": self.stopwatch.setup_seconds,
            "total_seconds": self.stopwatch.total_seconds,
            "audit": audit,
            "trained": collect_training_facts(self.output_dir, audit or {}),
            "files": self.list_files(),
            "show_targets": args.show_targets,
            "notes": [sizes],
        }

    def list_files(self) -> dict[str, str]:
        """Return the paths of the results by what they hold."""
        names = {
            "report": "report.md",
            "page": "report.html",
            "summary": "summary.json",
            "rows": "rows.jsonl",
            "traces": "traces",
            "trained": "trained",
            "plots": "plots",
        }
        return {label: str(self.output_dir / name) for label, name in names.items()}

    def _open_evaluation(self) -> Evaluation:
        return Evaluation(
            self.output_dir,
            self._collect_eval_settings(),
            self.held_out_problems,
            settings_file=EVAL_SETTINGS_FILE,
            rank=self.state.process_index,
        )
