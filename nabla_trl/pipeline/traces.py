"""The stage traces: refine the answers to problems, in memory or into a folder of shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.pipeline.models import ModelPair, PolicySource, RewardSource
from nabla_trl.pipeline.problems import collect_problems
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.batches import TraceTotals, find_unfinished_problems, search_in_batches, search_to_folder
from nabla_trl.search.config import NO_BUDGET, SearchConfig, SharedBudget, make_search_config
from nabla_trl.search.loop import check_gradient
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import Problems
from nabla_trl.tasks.shards import Shard, ShardPlan
from nabla_trl.tasks.templates import use_recorded_date
from nabla_trl.traces.build import make_decoder
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TRACES_DIR, describe_missing_shards, list_trace_files, read_traces
from nabla_trl.utils.fields import check_whole_number
from nabla_trl.utils.identity import claim_settings
from nabla_trl.utils.locks import lock_folder

SETTINGS_FILE = f"{TRACES_DIR}.settings.json"

logger = logging.getLogger(__name__)


def generate_traces(
    problems: Problems,
    policy: PolicySource,
    reward: RewardSource,
    *,
    config: SearchConfig | Mapping[str, Any] | str | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    split: str = "train",
    max_problems: int | None = None,
    shard: str | None = None,
    shared_flops: float = 0.0,
    problems_per_budget: int = SharedBudget.problems_per_budget,
    show_progress: bool = True,
    **model_options: Any,
) -> list[Trace]:
    """Refine the answers to problems, and return one graded trace per problem.

    Args:
        problems: a task's name, or problems in memory (see `load_problems`).
        policy: hub id or folder of a causal LM, a model in memory, or a `Policy` (see `load_policy`).
        reward: name, model in memory, function or `Reward` (see `load_reward`).
        config: the search: a `SearchConfig`, a mapping of its options, or the name of a preset.
        seed: the same seed gives the same traces.
        output_dir: folder to write traces/ to. Traces that already exist are kept, so an interrupted call can be
            repeated. None: the traces are in memory alone.
        split: split of a task's name.
        max_problems: maximum number of problems. None: all.
        shard: share of the problems, written I/N. Needs `output_dir`. The traces of this share are returned.
        shared_flops: FLOPs per problem of a budget that many problems share, in place of the limits of `config`. 0:
            each search ends by its own limits.
        problems_per_budget: problems that share one budget. Their traces are stored together.
        show_progress: show the progress on stderr (see also `disable_progress`).
        model_options: options of `ModelPair`, such as tokenizer, dtype, device and adapter.

    Returns:
        The traces in the order of the problems. A problem that cannot be run gives a trace with `error` set.

    Raises:
        ValueError: there are no problems, a model or an option that cannot be used, or `output_dir` was made with
            other settings, which the message names.
    """
    search_config, budget = make_search_config(config), SharedBudget(shared_flops, problems_per_budget)
    budget.check(search_config)
    check_whole_number("seed", seed)
    models = ModelPair.build(policy, reward, model_options, stage=generate_traces)
    problem_set = collect_problems(
        problems, split=split, max_problems=max_problems, prompt_options=models.get_prompt_options()
    )
    if output_dir is None:
        if shard is not None:
            raise ValueError("shard needs output_dir: shards share a folder")
        return _search_in_memory(problem_set.problems, models, search_config, budget, seed, show_progress)
    run = TraceRun(
        models, Path(output_dir), search_config, seed, problem_set.settings, budget, show_progress=show_progress
    )
    run.write(problem_set.problems, share := Shard.parse(shard, budget.block_size))
    by_id = {
        trace.problem_id: trace for trace in read_traces(list_trace_files(Path(output_dir))) if trace.seed == seed
    }
    traces = [by_id[problem.id] for problem in share.select(problem_set.problems)]
    if isinstance(policy, str | Path):
        return traces
    decoder = make_decoder(models.load()[0])  # with the tokenizer of a policy that no files hold
    return [replace(trace, decoder=decoder) for trace in traces]


def _search_in_memory(
    problems: Sequence[Problem],
    models: ModelPair,
    config: SearchConfig,
    budget: SharedBudget,
    seed: int,
    show_progress: bool,
) -> list[Trace]:
    policy, reward = models.load(4 * config.batch_size)
    check_gradient(reward, config)
    warn_past_limits(reward, config, limits_rounds=not budget.shared_flops)
    traces: list[Trace] = []
    with AnswerChecker() as checker:
        totals = search_in_batches(
            problems,
            traces.extend,
            policy=policy,
            reward=reward,
            config=config,
            seed=seed,
            checker=checker,
            budget=budget,
            show_progress=show_progress,
        )
    logger.info("traces: %s", totals)
    return traces


@dataclass(frozen=True)
class TracesSummary:
    """What a call of `TraceRun` did.

    Attributes:
        num_written: traces that this call wrote.
        num_existing: traces of the problems that existed before.
        totals: of the traces that were written. None: none were.
        missing: which shards lack traces. Empty if none does.
    """

    folder: Path
    num_written: int
    num_existing: int
    totals: TraceTotals | None
    missing: str


@dataclass(frozen=True)
class TraceRun:
    """The traces of one seed in the folder of a run, as one process makes them.

    Attributes:
        task_settings: task, version and split, which the folder is claimed with.
        budget: what the searches share. Shards then need its block size.
        load: returns the models and warns of searches beyond the limits that the reward's audit validated. None: done
            here.
        checker: grades the answers. None: one for each call.
        rank: number of this process. A shard has its own.
    """

    models: ModelPair
    output_dir: Path
    config: SearchConfig
    seed: int
    task_settings: Mapping[str, str]
    budget: SharedBudget = NO_BUDGET
    load: Callable[[], tuple[Policy, Reward]] | None = None
    checker: AnswerChecker | None = None
    rank: int = 0
    show_progress: bool = True

    def write(
        self, problems: Sequence[Problem], shard: Shard | None = None, template_date: str | None = None
    ) -> TracesSummary:
        """Write the traces of problems to the folder, which is locked for that time.

        Args:
            shard: the share of the problems that this process works on. None: all.
            template_date: date that chat templates print. None: that of the folder.

        Raises:
            ValueError: the folder was made with other settings, or holds traces of other problems with the same ids.
            FolderInUse: another process works on it.
        """
        shard = shard or Shard()
        with lock_folder(self.output_dir, shard.index, shard.count):
            use_recorded_date(self.output_dir, template_date)
            plan = ShardPlan.build(shard, problems, [self.seed]) if shard.count > 1 else None
            summary = replace(self, rank=shard.index).fill(shard.select(problems), plan)
        logger.info("%d traces written, %d existed: %s", summary.num_written, summary.num_existing, summary.folder)
        return summary

    def fill(self, problems: Sequence[Problem], plan: ShardPlan | None = None) -> TracesSummary:
        """Write the traces that the locked folder lacks.

        Args:
            problems: the share of this process.
            plan: of all shards, if there are several.
        """
        settings = collect_trace_settings(self.models, self.config, self.task_settings, self.budget)
        folder = self.output_dir / TRACES_DIR
        unfinished = find_unfinished_problems(problems, folder, self.seed)
        if unfinished:  # load before the settings are claimed: a mistyped model must not claim the folder
            policy, reward = self.load() if self.load else self.models.load(4 * self.config.batch_size)
            check_gradient(reward, self.config)
        claim_settings(self.output_dir / SETTINGS_FILE, settings)
        for path in self.output_dir.glob(f"*/{SETTINGS_FILE}"):  # of shards in folders of their own
            claim_settings(path, settings)
        if plan is not None:
            plan.write(folder / f"shards-{self.seed}.json")
        totals, num_existing = None, len(problems) - len(unfinished)
        if unfinished:
            if self.load is None:
                warn_past_limits(reward, self.config, limits_rounds=not self.budget.shared_flops)
            with nullcontext(self.checker) if self.checker else AnswerChecker() as checker:
                totals = search_to_folder(
                    unfinished,
                    folder,
                    policy=policy,
                    reward=reward,
                    config=self.config,
                    seed=self.seed,
                    checker=checker,
                    budget=self.budget,
                    rank=self.rank,
                    show_progress=self.show_progress,
                    num_done=num_existing,
                )
        return TracesSummary(folder, len(unfinished), num_existing, totals, describe_missing_shards(self.output_dir))


def collect_trace_settings(
    models: ModelPair, config: SearchConfig, task_settings: Mapping[str, str], budget: SharedBudget
) -> dict[str, str]:
    """Return the settings that the traces of a folder depend on."""
    of_models = models.get_settings() | models.get_adapter_settings()
    return {**of_models, **task_settings, **config.get_settings(), **budget.get_settings()}
