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
from nabla_trl.baselines.sampling import Pool
from nabla_trl.baselines.step_config import StepConfig
from nabla_trl.baselines.step_methods import METHODS
from nabla_trl.evaluation.kl import Measure, nothing_known, of_samples
from nabla_trl.evaluation.method import RIVAL, labelled
from nabla_trl.evaluation.rows import Row, RowStore, gather_samples, trace_row
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.generate_traces import write_tokens
from nabla_trl.search.loop import solve
from nabla_trl.tasks.problem import Problem, content_hash
from nabla_trl.traces.build import grade
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter
from nabla_trl.utils.files import read_object, write_whole
from nabla_trl.utils.interrupts import in_hand
from nabla_trl.utils.progress import Item, Progress

# The problems of one batch, and the seed, to traces of every method of the step.
Work = Callable[[Sequence[Problem], int], list[Trace]]
# By how much the cost that sets a budget may move; a search ends further from its budget than this.
_DRIFT = 0.02


@dataclass(frozen=True)
class Step:
    """One piece of work and the methods whose rows it makes; a deterministic one runs with one seed.

    `kl` measures how far the kept responses lie from the base policy; `traced` is the policy that drew the responses,
    where they are worth keeping as traces.
    """

    methods: tuple[str, ...]
    work: Work
    seeds: tuple[int, ...]
    batch_size: int
    kl: Measure = nothing_known
    traced: Policy | None = None


@dataclass(frozen=True)
class Bench:
    """What every step of an evaluation shares.

    Attributes:
        label: of a trained policy: its methods' names begin with it.
        base: the policy that it was trained from; None: it is the base itself.
        stepwise: how searches over steps are set.
    """

    policy: Policy
    reward: Reward
    config: ReasonerConfig
    seeds: tuple[int, ...]
    label: str = ""
    base: Policy | None = None
    stepwise: StepConfig = field(default_factory=StepConfig)

    def trained(self, label: str, policy: Policy) -> Bench:
        """The same for a policy trained from this one: its steps are named <label>_<method>."""
        return replace(self, policy=policy, label=label, base=self.policy)

    def sampling(self) -> Sampling:
        return self.config.sampling()

    def greedy(self) -> Step:
        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = sampling.greedy(
                problems,
                policy=self.policy,
                reward=self.reward,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            )
            return [replace(trace, seed=seed) for trace in traces]  # which changes nothing, but names the row

        return self._step(["greedy"], work, self.seeds[:1], self.config.batch_size)

    def pool(
        self,
        best_of: Sequence[int],
        majority: Sequence[int] = (),
        weighted: Sequence[int] = (),
        samples: Sequence[int] = (),
    ) -> Step:
        """best-of-n, self-consistency, weighted best-of-n and the samples themselves from one pool."""
        count = max([*best_of, *majority, *weighted, *samples])
        rows = self._together(count)

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            pool = self._draw(problems, count, seed, self.policy, self.reward)
            made = [trace for n in best_of for trace in sampling.best_of(pool, n)]
            made += [trace for n in majority for trace in sampling.self_consistency(pool, n)]
            made += [t for n in weighted for t in sampling.weighted_best_of(pool, n, 1 / self.config.lam)]
            return made + [trace for n in samples for trace in sampling.independent(pool, n)]

        counts = {f"best_of_{n}": n for n in best_of}
        methods = [*counts, *(f"self_consistency_{n}" for n in majority), *(f"weighted_best_of_{n}" for n in weighted)]
        methods += [f"samples_{n}" for n in samples]
        kl = of_samples(
            {labelled(self.label, method): n for method, n in counts.items()},
            self.policy,
            self.base or self.policy,
            batch_size=rows,
        )
        return self._step(methods, work, self.seeds, rows // count, kl)

    def rival(self) -> Step:
        """Samples of the model that a log-ratio prefers. Its vocabulary may be another: the reward does not read them.

        Raises:
            ValueError: the reward has no such model.
        """
        model = self.reward.rival
        if model is None:
            raise ValueError(f"{RIVAL} needs a log-ratio reward: {self.reward.name} has no model to sample from")

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return sampling.best_of(self._draw(problems, 1, seed, model, None), 1, RIVAL)

        return self._step([RIVAL], work, self.seeds, self.config.batch_size)

    def search(self, method: str, config: ReasonerConfig, *, traced: bool = False) -> Step:
        """The reasoner under a configuration and a name of its own; `traced`: its traces are worth keeping."""

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = solve(problems, policy=self.policy, reward=self.reward, config=config, seed=seed)
            return [replace(trace, method=method) for trace in traces]

        step = self._step([method], work, self.seeds, config.batch_size)
        return replace(step, traced=self.policy) if traced else step

    def by_steps(self, name: str, method: str, size: int | None, flops: float, breadth: int) -> Step:
        """A search over steps, under its whole name, of a size or at a budget: about `breadth` responses wide."""
        rows = self._together(breadth)

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return step_tree.solve(
                problems,
                method=METHODS[method],
                size=size,
                policy=self.policy,
                reward=self.reward,
                sampling=self.sampling(),
                steps=self.stepwise,
                name=name,
                flops=flops,
                seed=seed,
                batch_size=rows,
            )

        return self._step([name], work, self.seeds, rows // breadth)

    def _draw(self, problems: Sequence[Problem], count: int, seed: int, policy: Policy, reward: Reward | None) -> Pool:
        return sampling.draw_pool(
            problems,
            count,
            policy=policy,
            reward=reward,
            sampling=self.sampling(),
            seed=seed,
            batch_size=self._together(count),
        )

    def _together(self, count: int) -> int:
        """Responses of pools that are drawn together: they hold no candidates and no gradients, so as many as the
        reward scores together."""
        return max(4 * self.config.batch_size, count)

    def _step(
        self,
        methods: Sequence[str],
        work: Work,
        seeds: tuple[int, ...],
        batch_size: int,
        kl: Measure = nothing_known,
    ) -> Step:
        """A step whose methods, and their traces, are named after the policy too."""

        def named(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = work(problems, seed)
            return [replace(trace, method=labelled(self.label, trace.method)) for trace in traces]

        return Step(tuple(labelled(self.label, method) for method in methods), named, seeds, batch_size, kl)


def run_step(
    step: Step,
    problems: Sequence[Problem],
    store: RowStore,
    checker: AnswerChecker,
    *,
    held_out: Path | None = None,
    shown: bool = False,
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
    method = step.methods[-1]
    todo = {seed: store.missing(step.methods, problems, seed) for seed in step.seeds}
    writer = None
    if step.traced and held_out and any(todo.values()):
        writer = TraceWriter(held_out, rank=store.rank, chunk_size=step.batch_size)
        write_tokens(held_out, step.traced)
    progress = Progress(method, len(problems) * len(step.seeds), shown=shown)
    progress.count(_there(step, problems, todo, store), made=False)
    with progress:
        for seed, missing in todo.items():
            for begin in range(0, len(missing), step.batch_size):
                batch = missing[begin : begin + step.batch_size]
                about = progress.seconds_for(len(batch))
                with in_hand(f"{len(batch)} problems of {method}", progress.position, about):
                    traces = grade(step.work(batch, seed), checker)
                    if writer:
                        _keep(traces, writer)
                    rows = _rows(step, batch, traces, store.run)
                    store.append(rows)
                    added += rows
                    progress.count(_items(step, batch, seed, store))
    return added


def _rows(step: Step, batch: Sequence[Problem], traces: Sequence[Trace], run: str) -> list[Row]:
    content = {problem.id: content_hash(problem) for problem in batch}
    known = zip(traces, step.kl(batch, traces), strict=True)
    return gather_samples([trace_row(trace, run, kl) | {"content": content[trace.problem_id]} for trace, kl in known])


def _keep(traces: Sequence[Trace], writer: TraceWriter) -> None:
    """Write the traces as a shard; before the rows are, so that a row has its trace. A kill in between leaves two."""
    for trace in traces:
        writer.add(trace)
    writer.flush()


def _there(
    step: Step, problems: Sequence[Problem], todo: Mapping[int, Sequence[Problem]], store: RowStore
) -> list[Item]:
    """What of a step need not be made, for its progress."""
    found = []
    for seed, missing in todo.items():
        ids = {problem.id for problem in missing}
        found += _items(step, [problem for problem in problems if problem.id not in ids], seed, store)
    return found


def _items(step: Step, problems: Sequence[Problem], seed: int, store: RowStore) -> list[Item]:
    """For the progress of a step: whether its last method is right, and what its dearest cost, which pools share."""
    found = []
    for problem in problems:
        rows = [store.done[method, problem.task, problem.id, seed] for method in step.methods]
        found.append((problem.id, rows[-1].correct, max(row.flops for row in rows)))
    return found


def run_steps(
    steps: Iterable[Step],
    problems: Sequence[Problem],
    store: RowStore,
    checker: AnswerChecker,
    *,
    held_out: Path | None = None,
    shown: bool = True,
) -> None:
    """Run steps where rows are missing; arguments and errors as for `run_step`."""
    for step in steps:
        run_step(step, problems, store, checker, held_out=held_out, shown=shown)


def budget_flops(store: RowStore, method: str) -> float:
    """Mean FLOPs per problem of a method, for the budgets that it sets; kept beside the rows once it was asked for.

    So rows of one budget are all made at the same one, whatever problems or seeds come later.

    Raises:
        ValueError: the method has no rows, or cost nothing, or costs more than a fiftieth more or less than when the
            budget was set.
    """
    mark = store.folder / "budgets.json"
    now, held = mean_flops(store.read(), method), read_object(mark) if mark.exists() else {}
    if not now:
        raise ValueError(f"{method} can set no budget: no problem could be run, as the errors in its rows say")
    if method not in held:
        write_whole(mark, json.dumps({**held, method: now}, indent=1))
        return now
    if not isinstance(held[method], float) or held[method] <= 0:
        raise ValueError(f"{mark}: {held[method]!r} is no budget of FLOPs")
    if abs(now / held[method] - 1) > _DRIFT:
        raise ValueError(
            f"{store.folder} has rows at a budget of {held[method]:.4g} FLOPs, which {method} cost on other problems "
            f"or seeds; now it costs {now:.4g}: use another --output_dir"
        )
    return held[method]


def mean_flops(rows: Sequence[Row], method: str) -> float:
    """Mean FLOPs per problem of a method.

    Raises:
        ValueError: the method has no rows.
    """
    values = [row["flops"] for row in rows if row["method"] == method]
    if not values:
        raise ValueError(f"no rows of {method}: it must be evaluated before budgets can be set by it")
    return sum(values) / len(values)
