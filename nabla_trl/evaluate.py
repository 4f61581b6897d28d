"""Run methods on problems and seeds, and keep one row for each (method, problem, seed).

A plan is a list of steps; each step makes the rows of one or several methods from the same work (best-of-n for
all n reads one pool). What is on disk already is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from nabla_trl import baselines
from nabla_trl.checker import AnswerChecker
from nabla_trl.config import ReasonerConfig
from nabla_trl.generate import Sampling
from nabla_trl.models import Policy
from nabla_trl.records import grade
from nabla_trl.rewards import Reward
from nabla_trl.rowstore import Row, RowStore, trace_row
from nabla_trl.search import solve
from nabla_trl.tasks import Problem
from nabla_trl.traces import Trace

# The problems of one batch, and the seed, to traces of every method of the step.
Work = Callable[[Sequence[Problem], int], list[Trace]]


@dataclass(frozen=True)
class Step:
    """One piece of work and the methods whose rows it makes; a deterministic one runs with one seed."""

    methods: tuple[str, ...]
    work: Work
    seeds: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True)
class Bench:
    """What every step of an evaluation shares."""

    policy: Policy
    reward: Reward
    config: ReasonerConfig
    seeds: tuple[int, ...]

    def sampling(self) -> Sampling:
        return self.config.sampling()

    def greedy(self, policy: Policy | None = None, method: str = "greedy") -> Step:
        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return baselines.greedy(
                problems,
                policy=policy or self.policy,
                reward=self.reward,
                max_new_tokens=self.config.max_new_tokens,
                method=method,
                batch_size=self.config.batch_size,
            )

        return Step((method,), work, self.seeds[:1], self.config.batch_size)

    def pool(
        self,
        best_of: Sequence[int],
        majority: Sequence[int] = (),
        weighted: Sequence[int] = (),
        *,
        policy: Policy | None = None,
        names: dict[int, str] | None = None,
        scored: bool = True,
    ) -> Step:
        """best-of-n, self-consistency and weighted best-of-n from one pool; `names` renames best-of-n methods.

        A policy of another vocabulary cannot be read by the reward: draw from it with `scored` off (n = 1).
        """
        count = max([*best_of, *majority, *weighted])
        # Rows of a pool hold no candidates and no gradients: as many together as the reward scores together.
        rows = max(4 * self.config.batch_size, count)
        titles = {n: (names or {}).get(n, f"best_of_{n}") for n in best_of}

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            pool = baselines.draw_pool(
                problems,
                count,
                policy=policy or self.policy,
                reward=self.reward if scored else None,
                sampling=self.sampling(),
                seed=seed,
                batch_size=rows,
            )
            made = [trace for n in best_of for trace in baselines.best_of(pool, n, titles[n])]
            made += [trace for n in majority for trace in baselines.self_consistency(pool, n)]
            return made + [t for n in weighted for t in baselines.weighted_best_of(pool, n, 1 / self.config.lam)]

        methods = (
            *titles.values(),
            *(f"self_consistency_{n}" for n in majority),
            *(f"weighted_best_of_{n}" for n in weighted),
        )
        return Step(methods, work, self.seeds, rows // count)

    def search(self, method: str, config: ReasonerConfig) -> Step:
        """The reasoner under a configuration and a name of its own."""

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = solve(problems, policy=self.policy, reward=self.reward, config=config, seed=seed)
            return [replace(trace, method=method) for trace in traces]

        return Step((method,), work, self.seeds, config.batch_size)


def run_step(
    step: Step,
    problems: Sequence[Problem],
    store: RowStore,
    checker: AnswerChecker,
    progress: Callable[[str, int, int], None] = lambda methods, done, total: None,
) -> list[Row]:
    """Run a step where rows are missing; returns the rows it added. Each batch is on disk before the next starts."""
    added: list[Row] = []
    total = len(problems) * len(step.seeds)
    done = 0
    for seed in step.seeds:
        missing = [p for p in problems if any((m, p.task, p.id, seed) not in store.done for m in step.methods)]
        done += len(problems) - len(missing)
        for begin in range(0, len(missing), step.batch_size):
            batch = missing[begin : begin + step.batch_size]
            rows = [trace_row(trace, store.run) for trace in grade(step.work(batch, seed), checker)]
            store.append(rows)
            added += rows
            done += len(batch)
            progress(step.methods[-1], done, total)
    return added


def run_steps(steps: Iterable[Step], problems: Sequence[Problem], store: RowStore, checker: AnswerChecker) -> None:
    """Run steps where rows are missing, with a progress bar for each."""
    for step in steps:
        with tqdm(total=len(problems) * len(step.seeds), desc=step.methods[-1], unit="row", disable=None) as bar:

            def progress(method: str, done: int, total: int, bar: tqdm = bar) -> None:
                bar.update(done - bar.n)

            run_step(step, problems, store, checker, progress)


def mean_flops(rows: Sequence[Row], method: str) -> float:
    """Mean FLOPs per problem of a method.

    Raises:
        ValueError: the method has no rows.
    """
    values = [row["flops"] for row in rows if row["method"] == method]
    if not values:
        raise ValueError(f"no rows of {method}: it must be evaluated before budgets can be set by it")
    return sum(values) / len(values)
