"""Run methods on problems and seeds, and keep one row for each (method, problem, seed).

The jobs come from `nabla_trl.evaluation.plan`. Rows on disk are not made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from nabla_trl.evaluation.method import Method
from nabla_trl.evaluation.plan import EvaluationSetup, Job, get_baseline_settings, plan_jobs
from nabla_trl.evaluation.results import SHARD_PLAN_FILE, describe_missing_rows
from nabla_trl.evaluation.rows import Row, RowStore, build_row, merge_sample_rows, select_complete_rows
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.search.batches import write_token_texts
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.tasks.shards import Shard, ShardPlan
from nabla_trl.traces.build import grade_traces
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import EVAL_TRACES_DIR, TraceWriter
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.formatting import format_error, hide_userinfo
from nabla_trl.utils.identity import check_settings, claim_settings, hash_json
from nabla_trl.utils.interrupts import finish_current_batch
from nabla_trl.utils.locks import hold_lock
from nabla_trl.utils.progress import ProgressDisplay, ProgressItem, report_metrics

SETTINGS_FILE = "eval.settings.json"
# By which share the cost that sets a budget may change. A search ends further from its budget than this.
_MAX_COST_DRIFT = 0.02


class Evaluation:
    """An evaluation in a folder: the settings that it claims, its rows, and the jobs that make them.

    Args:
        output_dir: holds rows/ and, with `keep_traces`, the traces of the main search.
        settings: all that every row depends on: models, task and search.
        problems: the held-out problems.
        settings_file: where the settings are noted, below `output_dir`.
        rank: number of this process.
        shard: the share of the problems that this process runs, if it is one of several shards.

    Raises:
        ValueError: the folder holds rows of other settings.
    """

    def __init__(
        self,
        output_dir: Path,
        settings: Mapping[str, str],
        problems: Sequence[Problem],
        *,
        settings_file: str = SETTINGS_FILE,
        rank: int = 0,
        shard: Shard | None = None,
    ):
        self.output_dir, self.problems, self.shard = output_dir, problems, shard or Shard()
        self._shard_plan: ShardPlan | None = None
        self._settings_dir = (output_dir / settings_file).parent
        settings = hide_userinfo(settings)
        check_settings(output_dir / settings_file, settings)
        digest = hash_json(dict(settings), length=16)
        self.store = RowStore(output_dir / "rows", digest, rank or self.shard.index)
        # Last, so that a folder whose rows are refused stays as it was.
        claim_settings(output_dir / settings_file, settings)

    def claim(self, name: str, settings: Mapping[str, str]) -> None:
        """Note what some of the rows depend on beside the settings of all rows, so that they can join later.

        Raises:
            ValueError: the folder holds such rows of other settings.
        """
        claim_settings(self._settings_dir / f"{name}.settings.json", settings)

    def plan(
        self,
        names: Sequence[str],
        setup: EvaluationSetup,
        trained_policies: Mapping[str, Policy] | None = None,
        get_flops: Callable[[str], float] | None = None,
    ) -> Iterator[Job]:
        """Return the jobs of these methods, as `plan_jobs` does, and claim what step-level searches depend on.

        A shard also writes the plan of all shards.

        Args:
            get_flops: as for `plan_jobs` (default: `get_budget_flops` of this evaluation's rows).
        """
        for claim_name, baseline_settings in get_baseline_settings(names, setup).items():
            self.claim(claim_name, baseline_settings)
        if allocated := [name for name in names if Method.parse(name).is_allocated]:
            self._claim_all_problems(allocated)
        if self.shard.count > 1:
            self._shard_plan = ShardPlan.build(self.shard, self.problems, setup.seeds, names)
            self._shard_plan.write(self.store.folder / SHARD_PLAN_FILE)
            # Budgets come last, because they may need rows that other shards still make.
            names = sorted(names, key=lambda name: bool(Method.parse(name).budget))
        else:
            (self.store.folder / SHARD_PLAN_FILE).unlink(missing_ok=True)
        return plan_jobs(names, setup, trained_policies or {}, get_flops or self.get_budget_flops)

    def _claim_all_problems(self, methods: Sequence[str]) -> None:
        """Claim the set of problems, because methods that share a budget among problems depend on all of them."""
        if self.shard.count > 1:
            raise ValueError(f"{', '.join(methods)}: all problems share one budget, so leave out --shard")
        hashes = {f"{problem.task}/{problem.id}": compute_content_hash(problem) for problem in self.problems}
        self.claim("shared_budget", {"problems that share a budget": hash_json(hashes, length=16)})

    def run(
        self,
        jobs: Iterable[Job],
        checker: AnswerChecker,
        *,
        problems: Sequence[Problem] | None = None,
        keep_traces: bool = False,
        show_progress: bool = True,
    ) -> None:
        """Run the jobs where rows are missing. Errors are those of `run_job`.

        Args:
            problems: the share of this process (default: that of its shard).
            keep_traces: store the traces of the main search.
        """
        share = self.shard.select(self.problems) if problems is None else problems
        for job in jobs:
            if job.needs_all_problems and self.store.rank:
                continue  # the first process runs it
            run_job(
                job,
                self.problems if job.needs_all_problems else share,
                self.store,
                checker,
                eval_traces_dir=self.output_dir / EVAL_TRACES_DIR if keep_traces else None,
                show_progress=show_progress,
            )

    def get_budget_flops(self, method: str) -> float:
        """Return the mean FLOPs per problem of a method, as `get_budget_flops` does.

        Raises:
            ValueError: as `get_budget_flops`, or the rows of other shards are missing. A mean over the rows of one
                shard would give each shard another budget, and other rows than one process.
        """
        if missing := self.describe_missing_shards([method]):
            raise ValueError(
                f"a budget is the mean cost of {method} over all problems, but {self.store.folder} lacks rows of "
                f"{missing}: run these shards first, or copy their rows-*.jsonl here, then run this command again"
            )
        with hold_lock(self.store.folder / ".budgets.lock") if self._shard_plan else nullcontext():
            return get_budget_flops(self.store, method)

    def describe_missing_shards(self, methods: Sequence[str] | None = None) -> str:
        """Return which shards lack rows of these methods (default: all). Empty if none does, and without shards."""
        if self._shard_plan is None:
            return ""
        plan = self._shard_plan if methods is None else replace(self._shard_plan, methods=tuple(methods))
        return describe_missing_rows(plan, self.store.read())

    def select_rows(self) -> tuple[list[Row], str]:
        """Return the rows that cover the problems, and a sentence on what is left out, as `select_complete_rows`."""
        return select_complete_rows(self.store.read(), self.problems)


def run_job(
    job: Job,
    problems: Sequence[Problem],
    store: RowStore,
    checker: AnswerChecker,
    *,
    eval_traces_dir: Path | None = None,
    show_progress: bool = False,
) -> list[Row]:
    """Run a job where rows are missing, and return the rows that were added.

    Each batch is on disk before the next one starts.

    Args:
        eval_traces_dir: folder for the traces of a job that has a `trace_policy`.
        show_progress: show the progress of the job's last method on stderr.

    Raises:
        Stopped: a stop was requested, and the current batch is on disk (`nabla_trl.utils.interrupts`).
        ValueError: as `RowStore.find_missing`.
        OSError: as `RowStore.append`.
    """
    added: list[Row] = []
    missing_by_seed = {seed: store.find_missing(job.methods, problems, seed) for seed in job.seeds}
    writer = None
    if job.trace_policy and eval_traces_dir and any(missing_by_seed.values()):
        writer = TraceWriter(eval_traces_dir, rank=store.rank, chunk_size=job.batch_size)
        write_token_texts(eval_traces_dir, job.trace_policy)
    name = job.methods[-1]
    progress = ProgressDisplay(
        name,
        len(problems) * len(job.seeds),
        show_progress=show_progress,
        trials_per_item=Method.parse(name).num_samples or 1,
    )
    for seed, missing in missing_by_seed.items():
        missing_ids = {problem.id for problem in missing}
        done = [problem for problem in problems if problem.id not in missing_ids]
        progress.add_items(_build_progress_items(job, done, seed, store), is_new=False)
    with progress:
        for seed, missing in missing_by_seed.items():
            batches = [missing[begin : begin + job.batch_size] for begin in range(0, len(missing), job.batch_size)]
            if missing and job.needs_all_problems:
                batches = [list(problems)]
            for batch in batches:
                seconds = progress.estimate_seconds(len(batch))
                with finish_current_batch(f"{len(batch)} problems of {name}", progress.format_position, seconds):
                    traces = grade_traces(job.run(batch, seed), checker)
                    if writer:  # before the rows, so that a row has its trace. A kill in between leaves two traces
                        for trace in traces:
                            writer.add(trace)
                        writer.flush()
                    rows = _build_rows(job, batch, traces, store.settings_hash)
                    store.append(rows)
                    added += rows
                    progress.add_items(_build_progress_items(job, batch, seed, store))
                    _report_job(name, progress, [row for row in added if row.method == name])
    return added


def _report_job(name: str, progress: ProgressDisplay, rows: Sequence[Row]) -> None:
    """Report what is known of a method until now to the experiment trackers.

    Args:
        rows: those that this call added.
    """
    values = {
        "accuracy": progress.compute_mean_score(),
        "flops_per_problem": progress.flops / progress.num_completed,
        "unfinished_rate": sum(not row.finished for row in rows) / len(rows),
        "error_rate": sum(row.error is not None for row in rows) / len(rows),
        "problems": float(progress.num_completed),
    }
    report_metrics(f"eval/{name}", values | progress.compute_rate())


def _build_rows(job: Job, batch: Sequence[Problem], traces: Sequence[Trace], settings_hash: str) -> list[Row]:
    content_hashes = {problem.id: compute_content_hash(problem) for problem in batch}
    divergences = job.measure_kl(batch, traces)
    return merge_sample_rows(
        [
            build_row(trace, settings_hash, kl, content_hashes[trace.problem_id])
            for trace, kl in zip(traces, divergences, strict=True)
        ]
    )


def _build_progress_items(job: Job, problems: Sequence[Problem], seed: int, store: RowStore) -> list[ProgressItem]:
    """Return, per problem, whether the job's last method is right, and the FLOPs of its most expensive method.

    A row that could not be graded counts as wrong, as in the report.

    The methods of a pool share their responses, so the most expensive one holds the cost of all.
    """
    items: list[ProgressItem] = []
    for problem in problems:
        rows = [store.stored_rows[method, problem.task, problem.id, seed] for method in job.methods]
        items.append((problem.id, rows[-1].correct or 0.0, max(row.flops for row in rows)))
    return items


def get_budget_flops(store: RowStore, method: str) -> float:
    """Return the mean FLOPs per problem of a method, for the budgets that it sets.

    The number is kept beside the rows in budgets.json. So all rows of a budget are made at the same one, whatever
    problems or seeds come later.

    Raises:
        ValueError: the method has no rows, or cost nothing, or its cost differs by more than 2% from the budget.
    """
    path = store.folder / "budgets.json"
    flops, budgets = compute_mean_flops(store.read(), method), read_json_file(path) if path.exists() else {}
    if not flops:
        raise ValueError(f"{method} can set no budget: no problem could be run, as the errors in its rows say")
    if method not in budgets:
        write_atomic(path, json.dumps({**budgets, method: flops}, indent=1))
        return flops
    budget = budgets[method]
    if not isinstance(budget, float) or not 0 < budget < math.inf:
        raise ValueError(f"{path}: {format_error(repr(budget), 60)} is no budget of FLOPs")
    if abs(flops / budget - 1) > _MAX_COST_DRIFT:
        raise ValueError(
            f"{store.folder} has rows at a budget of {budget:.4g} FLOPs, which {method} cost on other problems or "
            f"seeds. Now it costs {flops:.4g}: use another --output_dir"
        )
    return budget


def compute_mean_flops(rows: Sequence[Row], method: str) -> float:
    """Return the mean FLOPs per problem of a method.

    Raises:
        ValueError: the method has no rows.
    """
    values = [row.flops for row in rows if row.method == method]
    if not values:
        raise ValueError(f"no rows of {method}: it must be evaluated before budgets can be set by it")
    return sum(values) / len(values)
