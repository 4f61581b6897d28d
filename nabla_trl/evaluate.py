"""Run methods on problems and seeds, and keep one row for each (method, problem, seed).

A plan is a list of steps; each step makes the rows of one or several methods from the same work (best-of-n for
all n reads one pool). What is on disk already is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from nabla_trl import baselines, step_search
from nabla_trl.checker import AnswerChecker
from nabla_trl.config import ReasonerConfig
from nabla_trl.divergence import Measure, nothing_known, of_samples
from nabla_trl.models import Policy
from nabla_trl.naming import RIVAL, labelled
from nabla_trl.options import Sampling
from nabla_trl.records import grade
from nabla_trl.rewards import Reward
from nabla_trl.rowstore import Row, RowStore, trace_row
from nabla_trl.search import solve
from nabla_trl.step_config import StepConfig
from nabla_trl.step_methods import METHODS
from nabla_trl.tasks import Problem
from nabla_trl.traces import Trace

# The problems of one batch, and the seed, to traces of every method of the step.
Work = Callable[[Sequence[Problem], int], list[Trace]]


@dataclass(frozen=True)
class Step:
    """One piece of work and the methods whose rows it makes; a deterministic one runs with one seed.

    `kl` measures how far the kept responses lie from the base policy.
    """

    methods: tuple[str, ...]
    work: Work
    seeds: tuple[int, ...]
    batch_size: int
    kl: Measure = nothing_known


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
            return baselines.greedy(
                problems,
                policy=self.policy,
                reward=self.reward,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            )

        return self._step(["greedy"], work, self.seeds[:1], self.config.batch_size)

    def pool(self, best_of: Sequence[int], majority: Sequence[int] = (), weighted: Sequence[int] = ()) -> Step:
        """best-of-n, self-consistency and weighted best-of-n from one pool."""
        count = max([*best_of, *majority, *weighted])
        rows = self._together(count)

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            pool = self._draw(problems, count, seed, self.policy, self.reward)
            made = [trace for n in best_of for trace in baselines.best_of(pool, n)]
            made += [trace for n in majority for trace in baselines.self_consistency(pool, n)]
            return made + [t for n in weighted for t in baselines.weighted_best_of(pool, n, 1 / self.config.lam)]

        counts = {f"best_of_{n}": n for n in best_of}
        methods = [*counts, *(f"self_consistency_{n}" for n in majority), *(f"weighted_best_of_{n}" for n in weighted)]
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
            return baselines.best_of(self._draw(problems, 1, seed, model, None), 1, RIVAL)

        return self._step([RIVAL], work, self.seeds, self.config.batch_size)

    def search(self, method: str, config: ReasonerConfig) -> Step:
        """The reasoner under a configuration and a name of its own."""

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = solve(problems, policy=self.policy, reward=self.reward, config=config, seed=seed)
            return [replace(trace, method=method) for trace in traces]

        return self._step([method], work, self.seeds, config.batch_size)

    def by_steps(self, name: str, method: str, size: int | None, flops: float, breadth: int) -> Step:
        """A search over steps, under its whole name, of a size or at a budget: about `breadth` responses wide."""
        rows = self._together(breadth)

        def work(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return step_search.solve(
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

    def _draw(
        self, problems: Sequence[Problem], count: int, seed: int, policy: Policy, reward: Reward | None
    ) -> baselines.Pool:
        return baselines.draw_pool(
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
            traces = grade(step.work(batch, seed), checker)
            known = zip(traces, step.kl(batch, traces), strict=True)
            rows = [trace_row(trace, store.run, kl) for trace, kl in known]
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
