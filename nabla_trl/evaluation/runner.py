"""Run methods on problems and seeds, and keep one row for each (method, problem, seed).

A plan is a list of steps; each step makes the rows of one or several methods from the same work (best-of-n for
all n reads one pool). What is on disk already is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nabla_trl.baselines import sampling, step_tree
from nabla_trl.baselines.sampling import ResponsePool
from nabla_trl.baselines.step_config import StepSearchConfig
from nabla_trl.baselines.step_methods import STEP_SEARCH_METHODS
from nabla_trl.evaluation.kl import KLMeasure, build_sample_kl_measure, skip_kl
from nabla_trl.evaluation.method import REWARD_MODEL_SAMPLING, join_label
from nabla_trl.evaluation.rows import Row, RowStore, build_row, merge_sample_rows
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.generate_traces import write_token_texts
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.traces.build import grade_traces
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.interrupts import finish_current_batch
from nabla_trl.utils.progress import ProgressDisplay, ProgressItem

# The problems of one batch, and the seed, to traces of every method of the step.
Work = Callable[[Sequence[Problem], int], list[Trace]]
# By how much the cost that sets a budget may move; a search ends further from its budget than this.
_MAX_COST_DRIFT = 0.02


@dataclass(frozen=True)
class Job:
    """One piece of work and the methods whose rows it makes; a deterministic one runs with one seed.

    `kl` measures how far the kept responses lie from the base policy; `traced` is the policy that drew the responses,
    where they are worth keeping as traces.
    """

    methods: tuple[str, ...]
    run: Work
    seeds: tuple[int, ...]
    batch_size: int
    measure_kl: KLMeasure = skip_kl
    trace_policy: Policy | None = None


@dataclass(frozen=True)
class EvaluationSetup:
    """What every step of an evaluation shares.

    Attributes:
        label: of a trained policy: its methods' names begin with it.
        base: the policy that it was trained from; None: it is the base itself.
        stepwise: how searches over steps are set.
    """

    policy: Policy
    reward: Reward
    config: SearchConfig
    seeds: tuple[int, ...]
    label: str = ""
    base_policy: Policy | None = None
    step_search: StepSearchConfig = field(default_factory=StepSearchConfig)

    def with_trained_policy(self, label: str, policy: Policy) -> EvaluationSetup:
        """The same for a policy trained from this one: its steps are named <label>_<method>."""
        return replace(self, policy=policy, label=label, base_policy=self.policy)

    def get_sampling(self) -> Sampling:
        return self.config.get_sampling()

    def plan_greedy(self) -> Job:
        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = sampling.decode_greedily(
                problems,
                policy=self.policy,
                reward=self.reward,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            )
            return [replace(trace, seed=seed) for trace in traces]  # which changes nothing, but names the row

        return self._build_job(["greedy"], work, self.seeds[:1], self.config.batch_size)

    def plan_sample_pool(
        self,
        best_of: Sequence[int],
        self_consistency: Sequence[int] = (),
        weighted_best_of: Sequence[int] = (),
        samples: Sequence[int] = (),
    ) -> Job:
        """best-of-n, self-consistency, weighted best-of-n and the samples themselves from one pool."""
        count = max([*best_of, *self_consistency, *weighted_best_of, *samples])
        rows = self._get_pool_batch_size(count)

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            pool = self._draw_pool(problems, count, seed, self.policy, self.reward)
            made = [trace for n in best_of for trace in sampling.select_best_of_n(pool, n)]
            made += [trace for n in self_consistency for trace in sampling.select_by_self_consistency(pool, n)]
            made += [
                t
                for n in weighted_best_of
                for t in sampling.select_weighted_best_of_n(pool, n, 1 / self.config.reward_weight)
            ]
            return made + [trace for n in samples for trace in sampling.build_sample_traces(pool, n)]

        counts = {f"best_of_{n}": n for n in best_of}
        methods = [
            *counts,
            *(f"self_consistency_{n}" for n in self_consistency),
            *(f"weighted_best_of_{n}" for n in weighted_best_of),
        ]
        methods += [f"samples_{n}" for n in samples]
        kl = build_sample_kl_measure(
            {join_label(self.label, method): n for method, n in counts.items()},
            self.policy,
            self.base_policy or self.policy,
            batch_size=rows,
        )
        return self._build_job(methods, work, self.seeds, rows // count, kl)

    def plan_reward_model_sampling(self) -> Job:
        """Samples of the model that a log-ratio prefers. Its vocabulary may be another: the reward does not read them.

        Raises:
            ValueError: the reward has no such model.
        """
        model = self.reward.preferred_model
        if model is None:
            raise ValueError(
                f"{REWARD_MODEL_SAMPLING} needs a log-ratio reward: {self.reward.name} has no model to sample from"
            )

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return sampling.select_best_of_n(self._draw_pool(problems, 1, seed, model, None), 1, REWARD_MODEL_SAMPLING)

        return self._build_job([REWARD_MODEL_SAMPLING], work, self.seeds, self.config.batch_size)

    def plan_search(self, method: str, config: SearchConfig, *, keep_traces: bool = False) -> Job:
        """The reasoner under a configuration and a name of its own; `traced`: its traces are worth keeping."""

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = run_search(problems, policy=self.policy, reward=self.reward, config=config, seed=seed)
            return [replace(trace, method=method) for trace in traces]

        step = self._build_job([method], work, self.seeds, config.batch_size)
        return replace(step, trace_policy=self.policy) if keep_traces else step

    def plan_step_search(self, name: str, method: str, size: int | None, max_flops: float, num_samples: int) -> Job:
        """A search over steps, under its whole name, of a size or at a budget: about `breadth` responses wide."""
        rows = self._get_pool_batch_size(num_samples)

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return step_tree.run_step_search(
                problems,
                method=STEP_SEARCH_METHODS[method],
                size=size,
                policy=self.policy,
                reward=self.reward,
                sampling=self.get_sampling(),
                step_config=self.step_search,
                method_name=name,
                max_flops=max_flops,
                seed=seed,
                batch_size=rows,
            )

        return self._build_job([name], work, self.seeds, rows // num_samples)

    def _draw_pool(
        self, problems: Sequence[Problem], count: int, seed: int, policy: Policy, reward: Reward | None
    ) -> ResponsePool:
        return sampling.draw_pool(
            problems,
            count,
            policy=policy,
            reward=reward,
            sampling=self.get_sampling(),
            seed=seed,
            batch_size=self._get_pool_batch_size(count),
        )

    def _get_pool_batch_size(self, count: int) -> int:
        """Responses of pools that are drawn together: they hold no candidates and no gradients, so as many as the
        reward scores together."""
        return max(4 * self.config.batch_size, count)

    def _build_job(
        self,
        methods: Sequence[str],
        work: Work,
        seeds: tuple[int, ...],
        batch_size: int,
        measure_kl: KLMeasure = skip_kl,
    ) -> Job:
        """A step whose methods, and their traces, are named after the policy too."""

        def named(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = work(problems, seed)
            return [replace(trace, method=join_label(self.label, trace.method)) for trace in traces]

        return Job(tuple(join_label(self.label, method) for method in methods), named, seeds, batch_size, measure_kl)


def run_job(
    job: Job,
    problems: Sequence[Problem],
    store: RowStore,
    checker: AnswerChecker,
    *,
    eval_traces_dir: Path | None = None,
    show_progress: bool = False,
) -> list[Row]:
    """Run a step where rows are missing; returns the rows it added. Each batch is on disk before the next starts.

    Args:
        held_out: a folder to keep the traces in of a step that says so.
        shown: show the progress, of the step's last method, on stderr.

    Raises:
        Stopped: it was asked for, and the batch in hand is on disk (`nabla_trl.utils.interrupts`).
        ValueError: as `RowStore.missing`.
        OSError: as `RowStore.append`.
    """
    added: list[Row] = []
    method = job.methods[-1]
    todo = {seed: store.find_missing(job.methods, problems, seed) for seed in job.seeds}
    writer = None
    if job.trace_policy and eval_traces_dir and any(todo.values()):
        writer = TraceWriter(eval_traces_dir, rank=store.rank, chunk_size=job.batch_size)
        write_token_texts(eval_traces_dir, job.trace_policy)
    progress = ProgressDisplay(method, len(problems) * len(job.seeds), show_progress=show_progress)
    progress.add_items(_build_done_items(job, problems, todo, store), is_new=False)
    with progress:
        for seed, missing in todo.items():
            for begin in range(0, len(missing), job.batch_size):
                batch = missing[begin : begin + job.batch_size]
                about = progress.estimate_seconds(len(batch))
                with finish_current_batch(f"{len(batch)} problems of {method}", progress.format_position, about):
                    traces = grade_traces(job.run(batch, seed), checker)
                    if writer:
                        _write_trace_shard(traces, writer)
                    rows = _build_rows(job, batch, traces, store.settings_hash)
                    store.append(rows)
                    added += rows
                    progress.add_items(_build_progress_items(job, batch, seed, store))
    return added


def _build_rows(job: Job, batch: Sequence[Problem], traces: Sequence[Trace], settings_hash: str) -> list[Row]:
    content = {problem.id: compute_content_hash(problem) for problem in batch}
    known = zip(traces, job.measure_kl(batch, traces), strict=True)
    return merge_sample_rows(
        [build_row(trace, settings_hash, kl) | {"content": content[trace.problem_id]} for trace, kl in known]
    )


def _write_trace_shard(traces: Sequence[Trace], writer: TraceWriter) -> None:
    """Write the traces as a shard; before the rows are, so that a row has its trace. A kill in between leaves two."""
    for trace in traces:
        writer.add(trace)
    writer.flush()


def _build_done_items(
    job: Job, problems: Sequence[Problem], missing_by_seed: Mapping[int, Sequence[Problem]], store: RowStore
) -> list[ProgressItem]:
    """What of a step need not be made, for its progress."""
    found = []
    for seed, missing in missing_by_seed.items():
        ids = {problem.id for problem in missing}
        found += _build_progress_items(job, [problem for problem in problems if problem.id not in ids], seed, store)
    return found


def _build_progress_items(job: Job, problems: Sequence[Problem], seed: int, store: RowStore) -> list[ProgressItem]:
    """For the progress of a step: whether its last method is right, and what its dearest cost, which pools share."""
    found = []
    for problem in problems:
        rows = [store.stored_rows[method, problem.task, problem.id, seed] for method in job.methods]
        found.append((problem.id, rows[-1].correct, max(row.flops for row in rows)))
    return found


def run_jobs(
    jobs: Iterable[Job],
    problems: Sequence[Problem],
    store: RowStore,
    checker: AnswerChecker,
    *,
    eval_traces_dir: Path | None = None,
    show_progress: bool = True,
) -> None:
    """Run steps where rows are missing; arguments and errors as for `run_step`."""
    for step in jobs:
        run_job(step, problems, store, checker, eval_traces_dir=eval_traces_dir, show_progress=show_progress)


def get_budget_flops(store: RowStore, method: str) -> float:
    """Mean FLOPs per problem of a method, for the budgets that it sets; kept beside the rows once it was asked for.

    So rows of one budget are all made at the same one, whatever problems or seeds come later.

    Raises:
        ValueError: the method has no rows, or cost nothing, or costs more than a fiftieth more or less than when the
            budget was set.
    """
    mark = store.folder / "budgets.json"
    now, held = compute_mean_flops(store.read(), method), read_json_file(mark) if mark.exists() else {}
    if not now:
        raise ValueError(f"{method} can set no budget: no problem could be run, as the errors in its rows say")
    if method not in held:
        write_atomic(mark, json.dumps({**held, method: now}, indent=1))
        return now
    if not isinstance(held[method], float) or held[method] <= 0:
        raise ValueError(f"{mark}: {held[method]!r} is no budget of FLOPs")
    if abs(now / held[method] - 1) > _MAX_COST_DRIFT:
        raise ValueError(
            f"{store.folder} has rows at a budget of {held[method]:.4g} FLOPs, which {method} cost on other problems "
            f"or seeds; now it costs {now:.4g}: use another --output_dir"
        )
    return held[method]


def compute_mean_flops(rows: Sequence[Row], method: str) -> float:
    """Mean FLOPs per problem of a method.

    Raises:
        ValueError: the method has no rows.
    """
    values = [row["flops"] for row in rows if row["method"] == method]
    if not values:
        raise ValueError(f"no rows of {method}: it must be evaluated before budgets can be set by it")
    return sum(values) / len(values)
