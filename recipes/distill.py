"""From a policy and a reward to traces, trained weights and an honest comparison.

    accelerate launch recipes/distill.py --config recipes/tiny/distill.yaml
    accelerate launch recipes/distill.py --config recipes/gsm8k/distill.yaml \
        --policy Qwen/Qwen2.5-0.5B-Instruct --reward PATH_OR_HUB_ID --dataset gsm8k --method sft rloo

Stages: traces (audit the reward, refine the training problems), train (one policy per `--method`: sft, reward-weighted
and dpo on the traces, rloo and grpo on what the policy draws), evaluate (every method on held-out problems), report.
Each resumes where it was stopped and is skipped when its output is there; `--stages evaluate,report` runs only those.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from trl import SFTConfig

from nabla_trl.audit.overoptimization import warn_past_trust
from nabla_trl.audit.ranking import audit_reward
from nabla_trl.baselines.step_config import StepConfig
from nabla_trl.cli.arguments import drawing_settings
from nabla_trl.cli.distill_arguments import DistillArguments
from nabla_trl.cli.parsing import given, parse, quiet_libraries, run_main
from nabla_trl.evaluation.method import RIVAL, labels, split
from nabla_trl.evaluation.plan import chosen_among, method_names, searches, steps, stepwise_settings
from nabla_trl.evaluation.results import remarks, store_results
from nabla_trl.evaluation.rows import RowStore, of_problems
from nabla_trl.evaluation.run_facts import Clock, reward_cost, run_facts, trained_facts
from nabla_trl.evaluation.runner import Bench, budget_flops, run_steps
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.models.vllm_backend import connect
from nabla_trl.report.text import terminal_table, write_report
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import reward_identity
from nabla_trl.search.config import PRESETS, ReasonerConfig
from nabla_trl.search.generate_traces import search_settings, unfinished, write_traces
from nabla_trl.tasks.problem import Problem, check_disjoint, graded
from nabla_trl.tasks.registry import load_problems, problem_facts, task_settings
from nabla_trl.traces.storage import HELD_OUT
from nabla_trl.training.checkpoints import CONFIG, trained_label, trained_methods, trained_weights
from nabla_trl.training.offline import OFFLINE, TrainOptions
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.stage import TrainStage
from nabla_trl.utils.files import read_object, write_whole
from nabla_trl.utils.identity import claim_settings, weights_identity
from nabla_trl.utils.interrupts import this_command
from nabla_trl.utils.locks import hold


class Run:
    """One run: its settings, its output folder and, once asked for, its models."""

    def __init__(
        self,
        called: Mapping[str, Any],
        args: DistillArguments,
        reasoner: ReasonerConfig,
        stepwise: StepConfig,
        options: TrainOptions,
        lora: LoraArguments,
        sft: SFTConfig,
    ):
        self.called = called  # options, as `--config` takes them
        self.command = this_command()
        self.args, self.reasoner, self.stepwise = args, reasoner, stepwise
        self.options, self.lora, self.sft = options, lora, sft
        self.state = PartialState()
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if self.state.num_processes != asked:
            raise ValueError(f"{asked} processes were asked for, but {self.state.num_processes} started")
        self.folder = Path(sft.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.traces = self.folder / "traces"
        self.checker = AnswerChecker()
        self._models: tuple[Policy, Reward] | None = None
        self.clock = Clock(self.folder, STARTED, float(os.environ.get("NABLA_SETUP_SECONDS", "0")))
        self.train, self.probed, self.held_out = self._problems()

    def _problems(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """Those of training, of the probe in training, and the held-out ones."""
        args = self.args
        limit = args.train_limit + self.options.probe_problems
        train = load_problems(args.dataset, split=args.train_split, limit=limit)
        held_out = load_problems(args.eval_dataset or args.dataset, split=args.eval_split, limit=args.eval_limit)
        args.prompting().check([*train, *held_out])
        check_disjoint(train, held_out)
        held_out = graded(held_out, told=self.state.is_main_process)
        return train[: args.train_limit], train[args.train_limit :], held_out

    def models(self) -> tuple[Policy, Reward]:
        if self._models is None:
            device = str(self.state.device)
            policy = load_policy(
                self.args.policy, dtype=self.args.dtype, device=device, prompting=self.args.prompting()
            )
            if self.args.vllm_url:
                policy = connect(policy, self.args.vllm_url, timeout=self.args.vllm_timeout)
            rows = 4 * self.reasoner.batch_size
            reward = load_reward(
                self.args.reward, policy=policy, dtype=self.args.dtype, device=device, batch_size=rows
            )
            if self.state.is_main_process:
                among = chosen_among(method_names(self.args.methods)) if "evaluate" in self.args.stages else 1
                warn_past_trust(reward, self.reasoner if self._searches() else None, among)
            self._models = policy, reward
        return self._models

    def _searches(self) -> bool:
        stages = self.args.stages.split(",")
        return "traces" in stages or ("evaluate" in stages and searches(method_names(self.args.methods)))

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)

    def note(self) -> None:
        """config.yaml: what this run was called with, as `--config` takes it."""
        if self.state.is_main_process:
            write_whole(self._path(CONFIG), yaml.safe_dump(self.called, sort_keys=False))

    # --- stages ---------------------------------------------------------------------------------------

    def stage_traces(self) -> None:
        """Audit the reward on training problems, then refine them; one shard per process and batch."""
        if self.state.is_main_process and self.args.audit_problems and not self._path("audit.json").exists():
            self._audit()
        self.state.wait_for_everyone()
        if not any(method in OFFLINE for method in self.args.method):
            self.say(f"traces: {', '.join(self.args.method)} need none")
            return
        mine = self._mine(self.train)
        seeds = range(self.args.seeds[0], self.args.seeds[0] + self.args.traces_per_problem)
        todo = {seed: unfinished(mine, self.traces, seed) for seed in seeds}
        if any(todo.values()):
            self.models()  # first: what cannot be loaded must not claim the folder
        settings = self._search_settings() | {"adapter": "", "split": self.args.train_split}
        claim_settings(self._path("traces.settings.json"), settings | task_settings(self.args.dataset))
        for seed, problems in todo.items():
            if not problems:
                self.say(f"traces: {len(mine)} problems are there already")
                continue
            policy, reward = self.models()
            tally = write_traces(
                problems,
                self.traces,
                policy=policy,
                reward=reward,
                config=self.reasoner,
                seed=seed,
                checker=self.checker,
                rank=self.state.process_index,
                shown=self.state.is_main_process,
                there=len(mine) - len(problems),
            )
            here = " of this process" if self.state.num_processes > 1 else ""
            self.say(f"traces{here}: {tally}")

    def _search_settings(self) -> dict[str, str]:
        reward = reward_identity(self.args.reward)
        models = {"policy": self.args.policy, "reward": reward, "dtype": self.args.dtype}
        models |= drawing_settings(self.args.vllm_url) | self.args.prompting().settings()
        return models | search_settings(self.reasoner)

    def _audit(self) -> None:
        policy, reward = self.models()
        found = audit_reward(
            [problem for problem in self.train if problem.answer][: self.args.audit_problems],
            self.args.audit_samples,
            policy=policy,
            reward=reward,
            sampling=self.reasoner.sampling(),
            batch_size=4 * self.reasoner.batch_size,
            checker=self.checker,
        )
        write_whole(self._path("audit.json"), json.dumps(found, indent=1))
        self.say(f"audit: {found['verdict']}")

    def check(self) -> None:
        """Refuse what could not be trained, before hours of traces."""
        if "train" in self.args.stages.split(","):
            for method in self.args.method:
                self._train_stage().check(method)

    def _train_stage(self) -> TrainStage:
        return TrainStage(
            folder=self.folder,
            policy=self.args.policy,
            dtype=self.args.dtype,
            problems=self.train,
            probed=self.probed,
            reasoner=self.reasoner,
            options=self.options,
            lora=self.lora,
            config=self.sft,
            models=self.models,
            settings=self._search_settings() | task_settings(self.args.dataset),
            checker=self.checker,
            state=self.state,
            called=self.called,
            command=self.command,
        )

    def stage_train(self) -> None:
        """One policy per method; adapters, or whole models."""
        stage = self._train_stage()
        for method in self.args.method:
            made = stage.run(method)
            if made is None:
                self.say(f"train {method}: it is there already")
                continue
            self.say(
                f"train {method}: {made.rows} rows, {made.steps} steps, loss {made.loss:.3f}, {made.seconds:.0f} s"
            )
            if made.stopped:
                self.say(f"train {method}: {made.stopped}")

    def stage_evaluate(self) -> None:
        """Every method on the held-out problems; budgets are fractions of best-of-16's measured FLOPs."""
        store = self._store()
        policy, reward = self.models()
        bench = Bench(policy, reward, self.reasoner, tuple(self.args.seeds), stepwise=self.stepwise)
        names = method_names(self.args.methods)
        if own := stepwise_settings(names, bench):
            claim_settings(self._path("rows/stepwise.settings.json"), own)
        tuned = self._tuned(names)
        absent = [name for name in names if split(name)[0] not in ("", *tuned)]
        absent += [] if reward.rival else [name for name in names if name == RIVAL]
        if absent:
            self.say(f"evaluate: without {', '.join(absent)}: not trained here, or no better model to sample from")

        def flops_of(method: str) -> float:
            self.state.wait_for_everyone()  # the rows of all processes
            return budget_flops(store, method)

        wanted = steps([name for name in names if name not in absent], bench, tuned, flops_of)
        mine, shown = self._mine(self.held_out), self.state.is_main_process
        run_steps(wanted, mine, store, self.checker, held_out=self._path(HELD_OUT), shown=shown)

    def _tuned(self, names: Sequence[str]) -> dict[str, Policy]:
        """The trained policies that these methods ask for, by label."""
        tuned = {}
        for method in trained_methods(self.folder):
            if trained_label(method) in labels(names):
                path = trained_weights(self.folder, method)
                # Rows of an earlier training must not pass for those of this one.
                mark = self._path(f"rows/{method}.settings.json")
                claim_settings(mark, {"weights": weights_identity(path)})
                model, adapter = (str(path), None) if path.name == "model" else (self.args.policy, str(path))
                tuned[trained_label(method)] = load_policy(
                    model,
                    dtype=self.args.dtype,
                    device=str(self.state.device),
                    adapter=adapter,
                    prompting=self.args.prompting(),
                )
        return tuned

    def _mine(self, problems: list[Problem]) -> list[Problem]:
        """The share of this process."""
        return problems[self.state.process_index :: self.state.num_processes]

    def stage_report(self) -> None:
        if not self.state.is_main_process:
            return
        rows, left_out = of_problems(self._store().read(), self.held_out)
        if not rows:
            raise ValueError(f"{self.folder} holds no rows of all its problems: finish the stage evaluate first")
        if left_out:
            self.say(left_out)
        facts = self.facts()
        store_results(self.folder, rows, facts)
        terminal_table(write_report(self.folder, rows, facts))
        for remark in remarks(self.folder, rows):
            print(remark)
        for name, path in self.files().items():
            print(f"{name:>10}: {path}")

    # --- facts and files ------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        args, audit = self.args, self._path("audit.json")
        audited = read_object(audit) if audit.exists() else None
        facts = run_facts(
            title=args.title,
            command=self.command,
            policy=args.policy,
            reward=args.reward,
            task=args.eval_dataset or args.dataset,
            seeds=args.seeds,
        )
        sizes = f"{len(self.train)} training and {len(self.held_out)} held-out problems, disjoint"
        return facts | {
            "problems": problem_facts(self.held_out),
            "sampling": asdict(self.reasoner.sampling()),
            "setup_seconds": self.clock.setup,
            "total_seconds": self.clock.total,
            "audit": audited,
            "trained": trained_facts(self.folder, audited or {}),
            "files": self.files(),
            "notes": [sizes, *reward_cost(args.reward)],
        }

    def files(self) -> dict[str, str]:
        names = {
            "report": "report.md",
            "page": "report.html",
            "summary": "summary.json",
            "rows": "rows.jsonl",
            "traces": "traces",
            "trained": "trained",
            "plots": "plots",
        }
        return {label: str(self._path(name)) for label, name in names.items()}

    def _store(self) -> RowStore:
        settings = self._search_settings() | {"split": self.args.eval_split}
        settings |= task_settings(self.args.eval_dataset or self.args.dataset)
        claim_settings(self._path("rows/eval.settings.json"), settings)
        run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return RowStore(self.folder / "rows", run, rank=self.state.process_index)

    def _path(self, name: str) -> Path:
        return self.folder / name


STARTED = time.perf_counter()


def main(argv: Sequence[str]) -> None:
    # First of all: whatever made a state before would choose the back end.
    # A process may wait for hours for another one that has longer answers to draw.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    quiet_libraries()
    dataclasses = [DistillArguments, ReasonerConfig, StepConfig, TrainOptions, LoraArguments, SFTConfig]
    filled = parse(dataclasses, argv, presets=PRESETS)
    run = Run(given(argv, filled, PRESETS), *filled)
    run.check()
    with ExitStack() as open_:
        with run.state.main_process_first():
            open_.enter_context(hold(run.folder, run.state.process_index))
        open_.enter_context(run.checker)
        run.note()
        for stage in run.args.stages.split(","):
            getattr(run, f"stage_{stage}")()
            run.state.wait_for_everyone()
            if run.state.is_main_process:
                run.clock.save()


if __name__ == "__main__":
    sys.exit(run_main(main))
