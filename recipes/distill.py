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
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm
from trl import SFTConfig

from nabla_trl import training
from nabla_trl.arguments import REWARDS, VLLM_TIMEOUT, VLLM_URL, drawing_settings
from nabla_trl.audit import audit
from nabla_trl.baselines import draw_pool
from nabla_trl.checker import AnswerChecker
from nabla_trl.checkpoints import CONFIG, trained_methods, trained_weights
from nabla_trl.compute import Cost
from nabla_trl.config import PRESETS, ReasonerConfig
from nabla_trl.evaluate import Bench, Step, mean_flops, run_step
from nabla_trl.files import write_whole
from nabla_trl.methods import SYNTAX, chosen_among, method_names, searches, steps, stepwise_settings
from nabla_trl.models import Policy, load_policy
from nabla_trl.naming import RIVAL, labels, split, trained_label
from nabla_trl.parsing import given, parse, quiet_libraries, run_main
from nabla_trl.report import terminal_table, write_report
from nabla_trl.results import store_results
from nabla_trl.reward_folder import reward_identity
from nabla_trl.reward_models import load_reward, warn_past_trust
from nabla_trl.rewards import Reward
from nabla_trl.rowstore import RowStore
from nabla_trl.run_facts import reward_cost, run_facts, trained_facts
from nabla_trl.server import connect
from nabla_trl.step_config import StepConfig
from nabla_trl.tasks import Problem, check_disjoint, data_identity, load_problems, problem_facts
from nabla_trl.tracing import claim_settings, search_settings, unfinished, weights_identity, write_traces
from nabla_trl.train_stage import TrainStage
from nabla_trl.training import OFFLINE, TrainOptions
from nabla_trl.tuning import LoraArguments

STAGES = ("traces", "train", "evaluate", "report")
METHODS = (
    "greedy,self_consistency_16,best_of_1,best_of_2,best_of_4,best_of_8,best_of_16,best_of_32,weighted_best_of_16,"
    "control,nabla,control@0.15,nabla@0.15,control@0.2,nabla@0.2,control@0.33,nabla@0.33,reward_model_sampling"
)
TRAINED = ("greedy", "best_of_1", "best_of_8")  # of every trained policy


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DistillArguments:
    """Models, problems and what to compare. The search is set by the reasoner's options, training by TRL's."""

    policy: str = field(metadata={"help": "hub id or path of the policy, a causal LM"})
    reward: str = field(metadata={"help": REWARDS})
    dataset: str = _option("chains", "gsm8k, math500, amc, aime24, aime25, chains, or a .jsonl file to train on")
    eval_dataset: str = _option("", "the held-out task or .jsonl file; empty = the dataset's eval_split")
    train_split: str = _option("train", "split that traces are made of")
    eval_split: str = _option("test", "split that methods are compared on")
    method: list[str] = field(
        default_factory=lambda: ["sft"],
        metadata={"help": f"how to train, one policy for each: {', '.join(training.METHODS)}"},
    )
    train_limit: int = _option(1000, "training problems")
    traces_per_problem: int = _option(1, "traces of each training problem, with seeds from the first of `seeds` on")
    eval_limit: int = _option(300, "held-out problems")
    stages: str = _option(",".join(STAGES), "comma-separated stages to run")
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of every method that samples"}
    )
    methods: str = _option(
        "",
        f"comma-separated methods to compare: {SYNTAX}; empty = {METHODS}, and of every trained policy "
        f"{', '.join(TRAINED)}",
    )
    audit_problems: int = _option(64, "training problems of the reward audit; 0 = no audit")
    audit_samples: int = _option(16, "samples per problem of the reward audit")
    dtype: str = _option("float32", "weights of frozen models: float32, bfloat16 or float16")
    vllm_url: str | None = _option(None, VLLM_URL)
    vllm_timeout: float = _option(600.0, VLLM_TIMEOUT)
    title: str = _option("Test-time gradient search and its distillation", "title of the report")

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages.split(",") if stage not in STAGES]
        if unknown:
            raise ValueError(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct and not empty")
        unknown = [name for name in self.method if name not in training.METHODS]
        if unknown or len(set(self.method)) < len(self.method):
            raise ValueError(f"method takes distinct ones of {', '.join(training.METHODS)}, not {self.method}")
        if self.traces_per_problem < 1:
            raise ValueError("traces_per_problem must be at least 1")
        if not self.methods:
            self.methods = ",".join(
                [METHODS, *(f"{trained_label(one)}_{rest}" for one in self.method for rest in TRAINED)]
            )
        method_names(self.methods)


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
        self.command = shlex.join(["accelerate", "launch", *sys.argv])
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
        self._before = self._read("clock.json") or {"total": 0.0, "setup": 0.0}
        self.train, self.probed, self.held_out = self._problems()

    def _problems(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """Those of training, of the probe in training, and the held-out ones."""
        args = self.args
        limit = args.train_limit + self.options.probe_problems
        train = load_problems(args.dataset, split=args.train_split, limit=limit)
        held_out = load_problems(args.eval_dataset or args.dataset, split=args.eval_split, limit=args.eval_limit)
        check_disjoint(train, held_out)
        graded = [problem for problem in held_out if problem.answer]
        if not graded:
            raise ValueError("no held-out problem has a gold answer: nothing could be compared")
        if len(graded) < len(held_out):
            self.say(f"{len(held_out) - len(graded)} held-out problems have no gold answer and are left out")
        return train[: args.train_limit], train[args.train_limit :], graded

    def models(self) -> tuple[Policy, Reward]:
        if self._models is None:
            device = str(self.state.device)
            policy = load_policy(self.args.policy, dtype=self.args.dtype, device=device)
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
        mine = self.train[self.state.process_index :: self.state.num_processes]
        seeds = range(self.args.seeds[0], self.args.seeds[0] + self.args.traces_per_problem)
        todo = {seed: unfinished(mine, self.traces, seed) for seed in seeds}
        if any(todo.values()):
            self.models()  # first: what cannot be loaded must not claim the folder
        settings = self._search_settings() | {"adapter": "", "split": self.args.train_split}
        claim_settings(self._path("traces.settings.json"), settings | {"dataset": data_identity(self.args.dataset)})
        for seed, problems in todo.items():
            if problems:
                self._write_traces(problems, seed)
            else:
                self.say(f"traces: {len(mine)} problems are there already")

    def _write_traces(self, problems: list[Problem], seed: int) -> None:
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
            bar=self.state.is_main_process,
        )
        self.say(f"traces{self._here()}: {tally}")

    def _search_settings(self) -> dict[str, str]:
        reward = reward_identity(self.args.reward)
        models = {"policy": self.args.policy, "reward": reward, "dtype": self.args.dtype}
        return models | search_settings(self.reasoner) | drawing_settings(self.args.vllm_url)

    def _here(self) -> str:
        return " of this process" if self.state.num_processes > 1 else ""

    def _audit(self) -> None:
        policy, reward = self.models()
        problems = [problem for problem in self.train if problem.answer][: self.args.audit_problems]
        pool = draw_pool(
            problems,
            self.args.audit_samples,
            policy=policy,
            reward=reward,
            sampling=self.reasoner.sampling(),
            batch_size=4 * self.reasoner.batch_size,
        )
        spent = sum((entry.cost() for entry in pool.entries), Cost())
        try:
            found = audit(pool, self.checker).to_dict()
        except ValueError as error:  # worth knowing, but no reason not to go on
            found = {"verdict": f"the reward could not be audited: {error}"}
        self._write("audit.json", found | {"flops": spent.flops})
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
            settings=self._search_settings() | {"dataset": data_identity(self.args.dataset)},
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
            return mean_flops(store.read(), method)

        for step in steps([name for name in names if name not in absent], bench, tuned, flops_of):
            self._run(step, store)
        self.state.wait_for_everyone()

    def _tuned(self, names: Sequence[str]) -> dict[str, Policy]:
        """The trained policies that these methods ask for, by label."""
        tuned = {}
        for method in trained_methods(self.folder):
            if trained_label(method) in labels(names):
                path = trained_weights(self.folder, method)
                # Rows of an earlier training must not pass for those of this one.
                mark = self._path(f"rows/{method}.settings.json")
                claim_settings(mark, {"weights": weights_identity(path)})
                tuned[trained_label(method)] = self._load(path)
        return tuned

    def _load(self, path: Path) -> Policy:
        device = str(self.state.device)
        if path.name == "model":
            return load_policy(str(path), dtype=self.args.dtype, device=device)
        return load_policy(self.args.policy, dtype=self.args.dtype, device=device, adapter=str(path))

    def _run(self, step: Step, store: RowStore) -> None:
        mine = self.held_out[self.state.process_index :: self.state.num_processes]
        with tqdm(
            total=len(mine) * len(step.seeds), unit="row", leave=False, disable=not self.state.is_main_process
        ) as bar:

            def progress(method: str, done: int, total: int) -> None:
                bar.set_description(method)
                bar.update(done - bar.n)

            begun = time.perf_counter()
            added = run_step(step, mine, store, self.checker, progress)
        if added:
            rows = {name: [row["correct"] for row in added if row["method"] == name] for name in step.methods}
            shares = ", ".join(f"{name} {sum(map(bool, right)) / len(right):.3f}" for name, right in rows.items())
            self.say(f"{shares} ({len(added)} rows{self._here()}, {time.perf_counter() - begun:.1f} s)")

    def stage_report(self) -> None:
        if not self.state.is_main_process:
            return
        rows = self._store().read()
        if not rows:
            raise ValueError(f"{self.folder} holds no rows: run the stage evaluate first")
        facts = self.facts()
        store_results(self.folder, rows, facts)
        terminal_table(write_report(self.folder, rows, facts))
        for name, path in self.files().items():
            print(f"{name:>10}: {path}")

    # --- facts and files ------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        args, audited = self.args, self._read("audit.json")
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
            "setup_seconds": self.clock()["setup"],
            "total_seconds": self.clock()["total"],
            "audit": audited,
            "trained": trained_facts(self.folder, audited or {}),
            "files": self.files(),
            "notes": [sizes, *reward_cost(args.reward)],
        }

    def clock(self) -> dict[str, float]:
        """Seconds of this run so far, earlier calls included, and of making the environment."""
        before = self._before
        setup = float(os.environ.get("NABLA_SETUP_SECONDS", "0"))
        return {"total": before["total"] + time.perf_counter() - STARTED, "setup": max(before["setup"], setup)}

    def save_clock(self) -> None:
        if self.state.is_main_process:
            self._write("clock.json", self.clock())

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
        settings["dataset"] = data_identity(self.args.eval_dataset or self.args.dataset)
        claim_settings(self._path("rows/eval.settings.json"), settings)
        run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return RowStore(self.folder / "rows", run, rank=self.state.process_index)

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _write(self, name: str, content: Any) -> None:
        write_whole(self._path(name), json.dumps(content, indent=1))

    def _read(self, name: str) -> Any:
        path = self._path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}): delete it to have it made again") from error


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
    run.note()
    with run.checker:
        for stage in run.args.stages.split(","):
            getattr(run, f"stage_{stage}")()
            run.state.wait_for_everyone()
            run.save_clock()


if __name__ == "__main__":
    sys.exit(run_main(main))
