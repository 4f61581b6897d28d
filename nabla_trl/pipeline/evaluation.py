"""The stage evaluate: run methods on held-out problems, and compare their accuracy and cost."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.evaluation.grids import METRICS, build_grids
from nabla_trl.evaluation.method import (
    POLICY_LABELS,
    get_max_selection_size,
    has_search,
    list_policy_labels,
    parse_methods,
    sort_methods,
)
from nabla_trl.evaluation.plan import EvaluationSetup
from nabla_trl.evaluation.results import list_remarks, store_facts, store_results
from nabla_trl.evaluation.rows import Row
from nabla_trl.evaluation.run_facts import collect_training_facts
from nabla_trl.evaluation.runner import SETTINGS_FILE, Evaluation
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.pipeline.models import ModelPair, PolicySource, RewardSource
from nabla_trl.pipeline.problems import ProblemSet, collect_problems
from nabla_trl.report.summary import Summary, compare_grids, summarize
from nabla_trl.report.text import print_summary_table
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig, make_search_config
from nabla_trl.search.options import NoGradient
from nabla_trl.tasks.problem import Problem, filter_with_gold_answer
from nabla_trl.tasks.registry import Problems
from nabla_trl.tasks.shards import Shard
from nabla_trl.tasks.templates import use_recorded_date
from nabla_trl.training.checkpoints import find_trained_weights, get_policy_label, list_trained_methods
from nabla_trl.utils.fields import check_choices, check_whole_number, coerce_fields, format_suggestion
from nabla_trl.utils.identity import identify_adapter
from nabla_trl.utils.locks import lock_folder
from nabla_trl.utils.statistics import Interval, PairedDifference

DEFAULT_SEEDS = (0, 1, 2)
DEFAULT_METHODS = ("greedy", "best_of_16", "nabla", "control")
DEFAULT_TRAINED_METHODS = ("greedy", "best_of_1", "best_of_8")  # of each trained policy
ADAPTER_LABEL = "distilled"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """Rows of an evaluation, and what they say. Printing it gives a table.

    Attributes:
        rows: one per method, problem and seed (of the methods that have all of them).
        facts: what a report needs beside the rows: models, task, hardware and versions.
        output_dir: folder of rows.jsonl and facts.json. None: in memory alone.
        remarks: sentences on what is left out or was read in two ways.
        missing: which shards lack rows. There are no rows then. Empty if none does.
        num_shard_problems: problems of this shard.
    """

    rows: list[Row] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    output_dir: Path | None = None
    remarks: tuple[str, ...] = ()
    missing: str = ""
    num_shard_problems: int = 0

    @property
    def methods(self) -> list[str]:
        """Return the methods in the order of a report."""
        return sort_methods(row.method for row in self.rows)

    @cached_property
    def summary(self) -> Summary:
        """Return the numbers of a report by name, as summary.json has them (`nabla_trl.report.summary.summarize`)."""
        return summarize(self.rows, self.facts)

    def get_accuracy(self, method: str) -> Interval:
        """Return the accuracy of a method with its 95% interval over problems.

        Raises:
            ValueError: the method was not evaluated.
        """
        interval = build_grids(self.rows)[self._check_method(method)].compute_mean("accuracy")
        assert interval is not None  # every row has a correctness
        return interval

    def compare(self, method: str, other: str, metric: str = "accuracy") -> PairedDifference:
        """Return the paired difference of two methods on the same problems and seeds, `method` minus `other`.

        Args:
            metric: accuracy, flops, seconds, tokens, reward or kl.

        Returns:
            `value` with the 95% interval `low` to `high`, and `p_value`.

        Raises:
            ValueError: a method was not evaluated, or there is no such metric.
        """
        check_choices("metric", [metric], METRICS)
        return compare_grids(build_grids(self.rows), metric, self._check_method(method), self._check_method(other))

    def _check_method(self, method: str) -> str:
        if method not in self.methods:
            near = format_suggestion(method, self.methods)
            raise ValueError(f"there are no rows of {method}{near}: the methods are {', '.join(self.methods)}")
        return method

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts, for `datasets.Dataset.from_list` or `pandas.DataFrame`."""
        return [row.to_dict() for row in self.rows]

    def format_table(self) -> str:
        """Return a line per method: accuracy with its interval, FLOPs and seconds per problem."""
        if not self.rows:
            return f"no rows{f': missing are those of {self.missing}' if self.missing else ''}"
        stream = StringIO()
        print_summary_table(self.summary, Console(file=stream, width=120, color_system=None))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def __str__(self) -> str:
        return "\n".join([self.format_table(), *self.remarks])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def evaluate(
    problems: Problems,
    policy: PolicySource,
    reward: RewardSource,
    *,
    methods: str | Iterable[str] | None = None,
    seeds: int | Iterable[int] = DEFAULT_SEEDS,
    config: SearchConfig | Mapping[str, Any] | str | None = None,
    baseline_config: BaselineConfig | Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    adapter: PolicySource | None = None,
    trained_policies: Mapping[str, PolicySource] | None = None,
    split: str = "test",
    max_problems: int | None = None,
    shard: str | None = None,
    title: str = "Evaluation",
    dollars_per_gpu_hour: float | None = None,
    show_progress: bool = True,
    **model_options: Any,
) -> EvaluationResult:
    """Run methods on held-out problems, and return their rows with accuracy, FLOPs and seconds.

    Args:
        problems: a task's name, or problems in memory (see `load_problems`). Those without a gold answer are left out.
        policy: hub id or folder of a causal LM, a model in memory, or a `Policy` (see `load_policy`).
        reward: name, model in memory, function or `Reward` (see `load_reward`).
        methods: names, as a list or separated by commas (docs/methods.md). None: greedy, best_of_16, nabla and
            control, without nabla for a reward that is a function, and greedy, best_of_1 and best_of_8 of each trained
            policy.
        seeds: of every method that samples.
        config: the search: a `SearchConfig`, a mapping of its options, or the name of a preset.
        baseline_config: options of the baselines: a `BaselineConfig` or a mapping of its options.
        output_dir: folder for rows/, rows.jsonl and facts.json. Rows that exist are kept, so an interrupted call can
            be repeated. None: the rows are in memory alone.
        adapter: adapter of the policy, or a trained model in memory. Its methods are named distilled_greedy and so on.
        trained_policies: adapters or models that were trained from the policy, by label: sft, reward_weighted, dpo,
            soft_targets, rloo, grpo or on_policy_distillation. Those that `output_dir` holds as trained/ need not be
            named.
        split: split of a task's name.
        max_problems: maximum number of problems. None: all.
        shard: share of the problems, written I/N. Needs `output_dir`. There are no rows before all shards have theirs.
        title: title of the report.
        dollars_per_gpu_hour: price of an hour of the device, for costs in dollars.
        show_progress: show the progress on stderr (see also `disable_progress`).
        model_options: options of `ModelPair`, such as tokenizer, dtype and device.

    Returns:
        The result, which prints as a table. `write_report` makes a page of it.

    Raises:
        ValueError: no problem with a gold answer, an unknown method, a method that the reward or the policies cannot
            serve, or `output_dir` was made with other settings, which the message names.
    """
    search_config = make_search_config(config)
    if isinstance(baseline_config, Mapping):
        baseline_config = BaselineConfig(**coerce_fields(baseline_config, [BaselineConfig], source="baseline_config"))
    seeds = _read_seeds(seeds)
    if not isinstance(methods, str | Iterable | None):
        raise ValueError(f"methods are names, as a list or separated by commas, not {methods!r}")
    models = ModelPair.build(policy, reward, model_options, stage=evaluate)
    trained = dict(trained_policies or {})
    if adapter is not None:
        trained[ADAPTER_LABEL] = adapter
    check_choices("label", trained, POLICY_LABELS)
    problem_set = collect_problems(
        problems, split=split, max_problems=max_problems, prompt_options=models.get_prompt_options()
    )
    if shard is not None and output_dir is None:
        raise ValueError("shard needs output_dir: shards share a folder")
    options: dict[str, Any] = {
        "methods": methods,
        "seeds": seeds,
        "config": search_config,
        "baseline_config": baseline_config or BaselineConfig(),
        "trained_policies": trained,
        "shard": Shard.parse(shard),
        "title": title,
        "dollars_per_gpu_hour": dollars_per_gpu_hour,
        "command": "nabla_trl.evaluate(…)",
        "show_progress": show_progress,
    }
    if output_dir is not None:
        return run_evaluation(problem_set, models, Path(output_dir), **options)
    with TemporaryDirectory() as folder:
        result = run_evaluation(problem_set, models, Path(folder), **options)
    return EvaluationResult(result.rows, result.facts, None, result.remarks)


def _read_seeds(seeds: Any) -> tuple[int, ...]:
    """Return seeds as a tuple. One seed is a list of one."""
    values = tuple(seeds) if isinstance(seeds, Iterable) else (seeds,)
    for seed in values:
        check_whole_number("a seed", seed)
    if not values or len(set(values)) < len(values):
        raise ValueError("seeds must be distinct values, at least one")
    return values


def run_evaluation(
    problem_set: ProblemSet,
    models: ModelPair,
    output_dir: Path,
    *,
    methods: str | Iterable[str] | None,
    seeds: Sequence[int],
    config: SearchConfig,
    baseline_config: BaselineConfig,
    trained_policies: Mapping[str, PolicySource],
    shard: Shard,
    title: str,
    command: str,
    template_date: str | None = None,
    dollars_per_gpu_hour: float | None = None,
    show_progress: bool = True,
) -> EvaluationResult:
    """Run an evaluation in a folder, which is locked for that time. See `evaluate`.

    Args:
        command: what a report names as its origin.
        template_date: date that chat templates print. None: that of the folder.
    """
    names = None if methods is None else parse_methods(methods)
    problems = filter_with_gold_answer(problem_set.problems)
    trained_policies = {**_find_trained_weights(output_dir, names or ()), **trained_policies}
    with lock_folder(output_dir, shard.index, shard.count):
        use_recorded_date(output_dir, template_date)
        _, reward = models.load(4 * config.batch_size)
        names = names or list_default_methods(reward, config, trained_policies)
        policies = {
            label: models.load_trained_policy(weights, must_be_adapter=label == ADAPTER_LABEL)
            for label, weights in trained_policies.items()
        }
        evaluation, setup = open_evaluation(
            problems,
            models,
            output_dir,
            task_settings=problem_set.settings,
            config=config,
            seeds=seeds,
            baseline_config=baseline_config,
            shard=shard,
        )
        for label, weights in trained_policies.items():  # apart, so that later ones can join the rows of the policy
            name = "adapter" if label == ADAPTER_LABEL else f"{label}.policy"
            evaluation.claim(name, {"adapter": _identify(weights, policies[label])})
        jobs = evaluation.plan(names, setup, policies)
        warn_past_limits(reward, config if has_search(names) else None, get_max_selection_size(names))
        facts = models.build_run_facts(
            title=title,
            command=command,
            task=problem_set.name,
            seeds=seeds,
            sampling=config.get_sampling(),
            problems=problems,
            dollars_per_gpu_hour=dollars_per_gpu_hour,
        )
        facts["files"] = {"rows": "rows.jsonl", "facts": "facts.json"}
        if list_trained_methods(output_dir):
            facts["trained"] = collect_training_facts(output_dir, {})
        if shard.count > 1:  # before the work, so that a report needs the rows of all shards and no more
            facts["command"] = command.replace(f"--shard {shard}", f"--shard I/{shard.count}")
            store_facts(output_dir, facts)
        with AnswerChecker() as checker:
            evaluation.run(jobs, checker, keep_traces=True, show_progress=show_progress)
        if missing := evaluation.describe_missing_shards():
            num_problems = len(shard.select(problems))
            return EvaluationResult([], facts, output_dir, missing=missing, num_shard_problems=num_problems)
        rows, incomplete = evaluation.select_rows()
        store_results(output_dir, rows, facts)
    remarks = tuple(filter(None, [incomplete, *list_remarks(output_dir, rows)]))
    return EvaluationResult(rows, facts, output_dir, remarks)


def _find_trained_weights(output_dir: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the weights in the folder of a run that methods need, by the label of their policy."""
    labels = list_policy_labels(names)
    methods = {get_policy_label(method): method for method in list_trained_methods(output_dir)}
    return {label: find_trained_weights(output_dir, methods[label]) for label in labels if label in methods}


def _identify(weights: PolicySource, policy: Policy) -> str:
    return identify_adapter(str(weights)) if isinstance(weights, str | Path) else policy.name


def list_default_methods(reward: Reward, config: SearchConfig, trained_policies: Iterable[str] = ()) -> list[str]:
    """Return the methods that are evaluated where none are chosen."""
    has_search_gradient = reward.has_gradient and not isinstance(config.solver, NoGradient)
    names = [name for name in DEFAULT_METHODS if name != "nabla" or has_search_gradient]
    return names + [f"{label}_{method}" for label in trained_policies for method in DEFAULT_TRAINED_METHODS]


def open_evaluation(
    problems: Sequence[Problem],
    models: ModelPair,
    output_dir: Path,
    *,
    task_settings: Mapping[str, str],
    config: SearchConfig,
    seeds: Sequence[int],
    baseline_config: BaselineConfig,
    settings_file: str = SETTINGS_FILE,
    rank: int = 0,
    shard: Shard | None = None,
) -> tuple[Evaluation, EvaluationSetup]:
    """Load the models, claim a locked folder with the settings of its rows, and return what plans and runs the jobs.

    Args:
        problems: the held-out problems.
        task_settings: task, version and split, and whatever else all rows depend on.
        settings_file: where the settings are noted, below `output_dir`.
        rank: number of this process.

    Raises:
        ValueError: a model that cannot be loaded, or a folder with rows of other settings.
    """
    policy, reward = models.load(4 * config.batch_size)  # before the settings are claimed
    settings = collect_eval_settings(models, config, task_settings)
    evaluation = Evaluation(output_dir, settings, problems, settings_file=settings_file, rank=rank, shard=shard)
    return evaluation, EvaluationSetup(policy, reward, config, tuple(seeds), baseline_config=baseline_config)


def collect_eval_settings(models: ModelPair, config: SearchConfig, task_settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the rows of an evaluation depend on."""
    return {**models.get_settings(), **task_settings, **config.get_settings()}
