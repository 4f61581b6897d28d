"""The jobs of an evaluation: which methods share one piece of work, and with which configuration each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nabla_trl.baselines import allocation
from nabla_trl.baselines import sampling as pools
from nabla_trl.baselines.budget_forcing import check_thinking, run_budget_forcing
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.particles import power_smc
from nabla_trl.baselines.sampling import PoolEntry, ResponsePool
from nabla_trl.baselines.step_methods import STEP_SEARCH_METHODS
from nabla_trl.baselines.step_tree import (
    StepDrawing,
    StepSearchMethod,
    check_step_delimiter,
    create_step_finder,
    run_step_search,
)
from nabla_trl.baselines.uncertainty import UNCERTAINTY_METHODS
from nabla_trl.baselines.votes import (
    STATISTICS_VOTES,
    VOTES,
    WHOLE_DISTRIBUTION_VOTES,
    count_responses_in_budget,
    vote_in_pool,
)
from nabla_trl.evaluation.kl import KLMeasure, build_sample_kl_measure, skip_kl
from nabla_trl.evaluation.method import (
    ALLOCATED_SEARCHES,
    BUDGET_FORCING,
    POOL_METHODS,
    REWARD_MODEL_SAMPLING,
    Method,
    get_main_search,
    list_policy_labels,
)
from nabla_trl.models.loading import load_tokenizer
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import build_power_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import parse_reward_spec
from nabla_trl.search.batches import run_search_with_shared_budget
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import MirrorSolver, NoGradient
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.identity import check_settings

# The problems of one batch and the seed -> the traces of every method of the job.
RunBatch = Callable[[Sequence[Problem], int], list[Trace]]


@dataclass(frozen=True)
class Job:
    """One piece of work and the methods whose rows it makes.

    Attributes:
        seeds: the seeds to run with. Deterministic work runs with one.
        batch_size: problems per call of `run`.
        measure_kl: measures how far the chosen responses lie from the base policy.
        trace_policy: the policy that drew the responses, if they are worth keeping as traces.
        needs_all_problems: one call of `run` gets all problems of the evaluation, because they share a budget.
    """

    methods: tuple[str, ...]
    run: RunBatch
    seeds: tuple[int, ...]
    batch_size: int
    measure_kl: KLMeasure = skip_kl
    trace_policy: Policy | None = None
    needs_all_problems: bool = False


@dataclass(frozen=True)
class EvaluationSetup:
    """Models and configuration that all jobs of an evaluation share.

    Attributes:
        policy: the policy that runs the methods.
        label: label of a trained policy. The names of its methods begin with it.
        base_policy: the policy that a trained one began from. None: `policy` is the base policy itself.
        baseline_config: how the baselines are set.
    """

    policy: Policy
    reward: Reward
    config: SearchConfig
    seeds: tuple[int, ...]
    label: str = ""
    base_policy: Policy | None = None
    baseline_config: BaselineConfig = field(default_factory=BaselineConfig)

    def with_trained_policy(self, label: str, policy: Policy) -> EvaluationSetup:
        """Return the setup of a policy trained from this one, whose methods are named <label>_<method>."""
        return replace(self, policy=policy, label=label, base_policy=self.policy)

    def plan_greedy(self) -> Job:
        """Return the job of the greedy decode."""

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = pools.decode_greedily(
                problems,
                policy=self.policy,
                reward=self.reward,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            )
            return [replace(trace, seed=seed) for trace in traces]  # the seed only identifies the row

        return self._build_job(["greedy"], run, self.config.batch_size, seeds=self.seeds[:1])

    def plan_sample_pool(self, **sizes: Sequence[int]) -> Job:
        """Return the job that draws one pool of responses per problem and reads all these methods from it.

        Args:
            sizes: the N of each method of `POOL_METHODS`, as in `best_of=[4, 16], self_consistency=[16]`.
        """
        beta = 1 / self.config.reward_weight
        selectors: dict[str, Callable[[ResponsePool, int], list[Trace]]] = {
            "best_of": pools.select_best_of_n,
            **{name: partial(self._vote, name) for name in VOTES},
            "weighted_best_of": lambda pool, n: pools.select_weighted_best_of_n(pool, n, beta),
            "samples": pools.build_sample_traces,
        }
        reads = [(name, n) for name in selectors for n in sizes.get(name, ())]
        num_responses = max(n for _, n in reads)
        batch_size = self._get_pool_batch_size(num_responses)

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            top_k = self._get_statistics_top_k(name for name, _ in reads)
            pool = self._draw_pool(problems, num_responses, seed, self.policy, self.reward, statistics_top_k=top_k)
            return [trace for name, n in reads for trace in selectors[name](pool, n)]

        methods = [f"{name}_{n}" for name, n in reads]
        measure_kl = build_sample_kl_measure(
            {self._name_method(f"best_of_{n}"): n for n in sizes.get("best_of", ())},
            self.policy,
            self.base_policy or self.policy,
            batch_size=batch_size,
        )
        return self._build_job(methods, run, batch_size // num_responses, measure_kl=measure_kl)

    def plan_low_temperature(self, methods: Sequence[Method], max_flops: float = 0.0) -> Job:
        """Return the job of votes among samples at temperature 1/α, all from one pool, at sizes or at one budget."""
        sampling = Sampling(1 / self.baseline_config.power_alpha, max_new_tokens=self.config.max_new_tokens)
        return self._plan_votes(methods, dict.fromkeys(methods, "self_consistency"), max_flops, sampling)

    def plan_power_smc(self, method: Method, max_flops: float = 0.0) -> Job:
        """Return the job of a population on π^α, at the size in its name or at a budget of FLOPs per problem."""
        return self._plan_tree_search(
            method,
            power_smc,
            self.build_power_reward(),
            Sampling(1 / self.baseline_config.power_alpha, max_new_tokens=self.config.max_new_tokens),
            max_flops,
            drawing=StepDrawing(is_power_sampling=True),
        )

    def plan_budget_forcing(self, method: Method, max_flops: float = 0.0) -> Job:
        """Return the job of longer thoughts, at the size in its name or at a budget of FLOPs per problem."""

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return run_budget_forcing(
                problems,
                size=method.n,
                policy=self.policy,
                sampling=self.config.get_sampling(),
                config=self.baseline_config,
                method_name=str(method),
                max_flops=max_flops,
                seed=seed,
                batch_size=self.config.batch_size,
            )

        return self._build_job([str(method)], run, self.config.batch_size)

    def build_power_reward(self) -> Reward:
        """Return the reward whose optimum is π^α: (α − 1)·log π, which costs nothing to score."""
        alpha = self.baseline_config.power_alpha
        return build_power_reward(self.policy, alpha, f"power:{alpha:g}")

    def plan_vote_budget(self, methods: Sequence[Method], max_flops: float) -> Job:
        """Return the job that draws one pool for votes at the same budget of FLOPs per problem."""
        votes = {method: method.name for method in methods}
        return self._plan_votes(methods, votes, max_flops, self.config.get_sampling())

    def _plan_votes(
        self, methods: Sequence[Method], votes: Mapping[Method, str], max_flops: float, sampling: Sampling
    ) -> Job:
        """Return the job of votes without a reward. Responses are drawn until each method has all that it reads.

        Args:
            votes: the vote of each method (`VOTES`).
        """
        names = list(votes.values())
        largest_size = max(method.n or 0 for method in methods)

        def count_missing(entry: PoolEntry) -> int:
            num_drawn = len(entry.responses)
            counts = [
                count_responses_in_budget(entry, name, self.baseline_config, self.policy, max_flops) for name in names
            ]
            return num_drawn if max(counts) > num_drawn else 0  # twice as many, so that they are decoded together

        num_responses = largest_size or 4

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            pool = self._draw_pool(
                problems,
                num_responses,
                seed,
                self.policy,
                None,
                sampling=sampling,
                statistics_top_k=self._get_statistics_top_k(names),
                count_missing=count_missing if max_flops else None,
            )
            return [
                trace
                for method in methods
                for trace in vote_in_pool(
                    pool,
                    votes[method],
                    method.n,
                    config=self.baseline_config,
                    max_flops=max_flops,
                    method_name=str(method),
                )
            ]

        batch_size = self._get_pool_batch_size(num_responses) // num_responses
        return self._build_job([str(method) for method in methods], run, batch_size)

    def plan_allocation(self, method: Method, max_flops: float) -> Job:
        """Return the job of a method that spreads the budget of all problems over them by what they gain.

        Args:
            max_flops: mean FLOPs per problem.
        """
        beta = 1 / self.config.reward_weight
        config = self.config.with_no_gradient() if method.name == "allocated_control" else self.config

        def run_search(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = run_search_with_shared_budget(
                problems,
                policy=self.policy,
                reward=self.reward,
                config=config,
                max_flops=max_flops * len(problems),
                seed=seed,
                pilot=self.baseline_config.allocation_pilot,
            )
            return [replace(trace, method=str(method)) for trace in traces]

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            pool = allocation.draw_allocated_pool(
                problems,
                allocation.build_gain_estimator(method.needs_reward, beta),
                max_flops=max_flops * len(problems),
                policy=self.policy,
                reward=self.reward if method.needs_reward else None,
                sampling=self.config.get_sampling(),
                seed=seed,
                batch_size=self._get_pool_batch_size(1),
                pilot=self.baseline_config.allocation_pilot,
            )
            # At least 2, because a choice among one response is not charged the reward, which the allocation has read.
            size, name = max(2, *(len(entry.responses) for entry in pool.entries)), str(method)
            if method.name == "allocated_best_of":
                return pools.select_best_of_n(pool, size, name)
            if method.name == "allocated_weighted_best_of":
                return pools.select_weighted_best_of_n(pool, size, beta, name)
            return vote_in_pool(pool, "self_consistency", size, config=self.baseline_config, method_name=name)

        run_method = run_search if method.name in ALLOCATED_SEARCHES else run
        job = self._build_job([str(method)], run_method, self.config.batch_size)
        return replace(job, needs_all_problems=True)

    def _vote(self, name: str, pool: ResponsePool, size: int) -> list[Trace]:
        return vote_in_pool(pool, name, size, config=self.baseline_config)

    def _get_statistics_top_k(self, names: Iterable[str]) -> int:
        """Return the k of the statistics that these methods need, or 0."""
        return self.baseline_config.confidence_top_k if set(names) & set(STATISTICS_VOTES) else 0

    def plan_reward_model_sampling(self) -> Job:
        """Return the job that samples from the model that a log-ratio reward prefers.

        The model may have another vocabulary than the policy, because the reward does not read its samples.

        Raises:
            ValueError: the reward has no such model.
        """
        model = self.reward.preferred_model
        if model is None:
            raise ValueError(
                f"{REWARD_MODEL_SAMPLING} needs a log-ratio reward: {self.reward.name} has no model to sample from"
            )

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return pools.select_best_of_n(self._draw_pool(problems, 1, seed, model, None), 1, REWARD_MODEL_SAMPLING)

        return self._build_job([REWARD_MODEL_SAMPLING], run, self.config.batch_size)

    def plan_search(
        self, method: str, config: SearchConfig, *, reward: Reward | None = None, keep_traces: bool = False
    ) -> Job:
        """Return the job of a search under its own configuration and name, and with its own reward if it has one."""

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            traces = run_search(problems, policy=self.policy, reward=reward or self.reward, config=config, seed=seed)
            return [replace(trace, method=method) for trace in traces]

        job = self._build_job([method], run, config.batch_size)
        return replace(job, trace_policy=self.policy) if keep_traces else job

    def plan_step_search(self, method: Method, max_flops: float = 0.0) -> Job:
        """Return the job of a step-level search, at the size in its name or at a budget of FLOPs per problem."""
        if method.name in UNCERTAINTY_METHODS:
            search, drawing = UNCERTAINTY_METHODS[method.name]
        else:
            search, drawing = STEP_SEARCH_METHODS[method.name], StepDrawing()
        sampling = self.config.get_sampling()
        return self._plan_tree_search(method, search, self.reward, sampling, max_flops, drawing=drawing)

    def _plan_tree_search(
        self,
        method: Method,
        search: StepSearchMethod,
        reward: Reward,
        sampling: Sampling,
        max_flops: float,
        **options: Any,
    ) -> Job:
        num_prefixes = method.population_size
        batch_size = self._get_pool_batch_size(num_prefixes)

        def run(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return run_step_search(
                problems,
                method=search,
                size=method.n,
                policy=self.policy,
                reward=reward,
                sampling=sampling,
                step_config=self.baseline_config,
                method_name=str(method),
                max_flops=max_flops,
                seed=seed,
                batch_size=batch_size,
                **options,
            )

        return self._build_job([str(method)], run, batch_size // num_prefixes)

    def _draw_pool(
        self,
        problems: Sequence[Problem],
        num_responses: int,
        seed: int,
        policy: Policy,
        reward: Reward | None,
        *,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> ResponsePool:
        return pools.draw_pool(
            problems,
            num_responses,
            policy=policy,
            reward=reward,
            sampling=sampling or self.config.get_sampling(),
            seed=seed,
            batch_size=self._get_pool_batch_size(num_responses),
            **options,
        )

    def _get_pool_batch_size(self, num_responses: int) -> int:
        """Return how many responses are drawn together.

        Responses of a pool have neither candidates nor gradients, so the number is that of the reward's batches.
        """
        return max(4 * self.config.batch_size, num_responses)

    def _name_method(self, name: str) -> str:
        return str(replace(Method.parse(name), policy=self.label))

    def _build_job(
        self,
        methods: Sequence[str],
        run: RunBatch,
        batch_size: int,
        *,
        seeds: tuple[int, ...] | None = None,
        measure_kl: KLMeasure = skip_kl,
    ) -> Job:
        """Return a job whose methods and traces carry the label of the policy."""

        def run_and_label(problems: Sequence[Problem], seed: int) -> list[Trace]:
            return [replace(trace, method=self._name_method(trace.method)) for trace in run(problems, seed)]

        names = tuple(map(self._name_method, methods))
        return Job(names, run_and_label, self.seeds if seeds is None else seeds, batch_size, measure_kl)


def plan_jobs(
    names: Sequence[str],
    setup: EvaluationSetup,
    trained_policies: Mapping[str, Policy],
    get_flops: Callable[[str], float],
) -> Iterator[Job]:
    """Yield the jobs of these methods. Each job must have run before the next one is taken.

    Args:
        trained_policies: label -> trained policy, for the methods that begin with the label.
        get_flops: returns the mean FLOPs per problem of a method whose rows exist.

    Raises:
        ValueError: before the first job, as `check_methods`.
    """
    check_methods(names, setup, trained_policies)
    methods = [Method.parse(name) for name in names]
    setups = [setup, *(setup.with_trained_policy(label, policy) for label, policy in trained_policies.items())]
    for policy_setup in setups:
        own_methods = [method.base_method for method in methods if method.policy == policy_setup.label]
        yield from _plan_policy_jobs(own_methods, policy_setup, get_flops)


def _plan_policy_jobs(
    methods: Sequence[Method], setup: EvaluationSetup, get_flops: Callable[[str], float]
) -> Iterator[Job]:
    """Yield the jobs of one policy, whose methods come without its label."""
    names = [str(method) for method in methods]
    pool_sizes = {name: [m.n for m in methods if m.name == name and m.n is not None] for name in POOL_METHODS}
    if any(pool_sizes.values()):
        yield setup.plan_sample_pool(**pool_sizes)
    if "greedy" in names:
        yield setup.plan_greedy()

    def get_max_flops(method: Method) -> float:
        return method.budget_factor * get_flops(method.budget_reference) if method.budget else 0.0

    low_temperature = [method for method in methods if method.name == "low_temperature"]
    for plan, pool_methods in (
        (setup.plan_vote_budget, [method for method in methods if method.is_vote and method.budget]),
        (setup.plan_low_temperature, low_temperature),
    ):
        for budget in dict.fromkeys(method.budget for method in pool_methods):
            same_pool = [method for method in pool_methods if method.budget == budget]
            yield plan(same_pool, get_max_flops(same_pool[0]))
    main_search = get_main_search(names)
    for name, method in zip(names, methods, strict=True):
        if method.is_power_search:
            config = build_power_config(method, setup.config, setup.baseline_config, get_max_flops(method))
            yield setup.plan_search(name, config, reward=setup.build_power_reward())
        elif method.is_search:
            config = build_search_config(method, setup.config, get_max_flops(method))
            yield setup.plan_search(name, config, keep_traces=not setup.label and name == main_search)
        elif method.is_step_search:
            yield setup.plan_step_search(method, get_max_flops(method))
        elif method.name == "power_smc":
            yield setup.plan_power_smc(method, get_max_flops(method))
        elif method.is_allocated:
            yield setup.plan_allocation(method, get_max_flops(method))
        elif method.name == BUDGET_FORCING:
            yield setup.plan_budget_forcing(method, get_max_flops(method))
    if REWARD_MODEL_SAMPLING in names:
        yield setup.plan_reward_model_sampling()


def build_search_config(method: Method, config: SearchConfig, max_flops: float = 0.0) -> SearchConfig:
    """Return the configuration of a search, made from the one of nabla.

    Args:
        max_flops: budget of FLOPs per problem, in place of the configuration's own limits. 0: none.
    """
    if method.name in PRESETS:
        shared = {name: getattr(config, name) for name in ("top_k_candidates", "max_new_tokens", "batch_size")}
        if method.name == "qalign":
            shared["beta"] = config.vote_beta  # the π* that a weighted vote of samples estimates
        config = SearchConfig.from_preset(method.name, **shared)
    elif method.name == "control":
        config = config.with_no_gradient()
    elif method.name == "shuffled":
        config = config.with_shuffled_gradient()
    if not max_flops:
        return config
    config = limit_to_flops(config, max_flops)
    # By itself a preset of the paper scans one response once. At a budget it begins again until the budget is spent.
    return replace(config, restarts=True) if method.name in ("paper", "released") else config


def build_power_config(
    method: Method, config: SearchConfig, baseline_config: BaselineConfig, max_flops: float = 0.0
) -> SearchConfig:
    """Return the configuration of a Metropolis chain on π^α, for a reward of (α − 1)·log π.

    Suffixes are drawn at temperature 1/α, as published. One step in ten proposes a whole new response.

    Args:
        max_flops: budget of FLOPs per problem. 0: the chain has the rounds of the configuration.

    Raises:
        ValueError: a budget, and a single sample to be returned.
    """
    cut = method.name.removeprefix("power_")
    solver = MirrorSolver(gradient_at="direct", step_size=0.5) if cut == "gradient" else NoGradient(cut=cut)
    power_config = SearchConfig(
        solver=solver,
        acceptance="metropolis",
        select="vote" if baseline_config.power_select == "vote" else "reward",
        beta=1.0,
        temperature=1 / baseline_config.power_alpha,
        top_k_candidates=config.top_k_candidates,
        max_new_tokens=config.max_new_tokens,
        max_rounds=config.max_rounds or 16,
        batch_size=config.batch_size,
    )
    return limit_to_flops(power_config, max_flops) if max_flops else power_config


def limit_to_flops(config: SearchConfig, max_flops: float) -> SearchConfig:
    """Return a configuration with FLOPs per problem as its only limit."""
    return replace(config, max_flops=max_flops, max_rounds=0, max_rollouts=0, patience=0)


def get_baseline_settings(names: Sequence[str], setup: EvaluationSetup) -> dict[str, dict[str, str]]:
    """Return what the rows of baselines depend on beside the settings of all rows, by the name to claim them under.

    Raises:
        ValueError: the policy cannot write the delimiter of steps, or its back end lacks what a vote needs.
    """
    methods, config = [Method.parse(name) for name in names], setup.baseline_config
    if any(map(_needs_delimiter, methods)):
        create_step_finder(setup.policy, config.resolve_delimiter(setup.reward.step_delimiter))
    if any(method.name == BUDGET_FORCING for method in methods):
        check_thinking(setup.policy, config)
    whole = [
        str(method)
        for method in methods
        if method.name in (*WHOLE_DISTRIBUTION_VOTES, *UNCERTAINTY_METHODS, "power_smc") or method.is_power_search
    ]
    if whole and not setup.policy.backend.knows_distributions:
        raise ValueError(
            f"{whole[0]} reads whole distributions, which a vLLM server does not return: leave out vllm_url"
        )
    return _collect_baseline_settings(methods, config, setup.reward.step_delimiter)


def check_baselines(
    names: Sequence[str], config: BaselineConfig, *, policy: str, reward: str, settings_dir: str | Path
) -> None:
    """Refuse what `get_baseline_settings` and the rows of a folder would, as far as it is known before models load.

    Args:
        policy: its name.
        reward: its name.
        settings_dir: folder that holds the settings of baselines whose rows are there.
    """
    methods, checks = [Method.parse(name) for name in names], Checks()
    spec = parse_reward_spec(reward)
    if spec.members and config.step_delimiter is None:
        return  # the delimiter is that of the members, which are not read here
    if any(map(_needs_delimiter, methods)):
        with checks.collect():
            check_step_delimiter(load_tokenizer(policy), config.resolve_delimiter(spec.step_delimiter), policy)
    for name, settings in _collect_baseline_settings(methods, config, spec.step_delimiter).items():
        checks.call(check_settings, Path(settings_dir, f"{name}.settings.json"), settings)
    checks.raise_faults()


def _needs_delimiter(method: Method) -> bool:
    return method.is_step_search and method.name != "ggro"  # whose segments end by entropy


def _collect_baseline_settings(
    methods: Sequence[Method], config: BaselineConfig, reward_delimiter: str
) -> dict[str, dict[str, str]]:
    settings = {}
    if any(method.is_step_search for method in methods):
        settings["step_search"] = config.get_settings(reward_delimiter)
    if any(method.name in ("confidence_vote", *STATISTICS_VOTES) for method in methods):
        settings["votes"] = config.get_vote_settings()
    if any(method.is_power_search or method.is_power_sampler for method in methods):
        settings["power"] = config.get_power_settings()
    if any(method.is_allocated for method in methods):
        settings["allocation"] = config.select_settings(("allocation_pilot",))
    if any(method.name == BUDGET_FORCING for method in methods):
        settings["thinking"] = config.get_thinking_settings()
    return settings


def check_methods(names: Sequence[str], setup: EvaluationSetup, trained_policies: Mapping[str, Policy]) -> None:
    """Refuse methods that cannot be run, before any work.

    Raises:
        ValueError: a method lacks the policy, solver or preferred model that it needs, cannot be given a budget, or
            searches over steps that the policy cannot make.
    """
    checks = Checks()
    checks.call(
        check_method_options,
        names,
        setup.config,
        list(trained_policies),
        has_better_model=setup.reward.preferred_model is not None,
        baseline_config=setup.baseline_config,
        has_gradient=setup.reward.has_gradient,
    )
    for label, policy in trained_policies.items():
        checks.require(
            policy.model is not setup.policy.model,
            f"the trained policy {label} is the policy itself: there is nothing to compare",
        )
    checks.call(get_baseline_settings, names, setup)
    checks.raise_faults()


def check_method_options(
    names: Sequence[str],
    config: SearchConfig,
    policy_labels: Collection[str],
    *,
    has_better_model: bool,
    baseline_config: BaselineConfig | None = None,
    has_gradient: bool = True,
) -> None:
    """Refuse methods that cannot be run, before any model is loaded.

    Args:
        policy_labels: of the trained policies that there are.
        has_better_model: the reward compares the policy with a model that can be sampled from.
        baseline_config: how the baselines are set. None: the defaults.
        has_gradient: of the reward.
    """
    checks = Checks()
    methods = [Method.parse(name) for name in names]
    for method in methods:
        if method.policy == "distilled":
            checks.require("distilled" in policy_labels, f"{method} needs an adapter: give --adapter")
        elif method.policy:
            way = method.policy.replace("_", "-")
            checks.require(
                method.policy in policy_labels,
                f"{method} needs a policy trained by {way}, which recipes/distill.py makes; there is none here",
            )
    unused = [label for label in policy_labels if label not in list_policy_labels(names)]
    checks.require(not unused, f"there is an adapter, but no {', '.join(unused)}_ method that uses it")
    checks.require(
        has_better_model or REWARD_MODEL_SAMPLING not in names,
        f"{REWARD_MODEL_SAMPLING} needs a log-ratio reward: this one has no model to sample from",
    )
    searches = {method.name for method in methods}
    checks.require(
        not isinstance(config.solver, NoGradient) or searches.isdisjoint(("nabla", "allocated_nabla")),
        "solver none is the control: ask for control instead of nabla, or choose another solver",
    )
    checks.require(
        has_gradient or "allocated_nabla" not in searches,
        "allocated_nabla follows the gradient of the reward, and a function has none: use allocated_control",
    )
    checks.require(
        isinstance(config.solver, MirrorSolver) or "shuffled" not in searches,
        f"shuffled is a control of solver mirror, not of {config.solver.name}",
    )
    for method in methods:
        with checks.collect(f"{method}: "):
            if method.is_power_search:
                build_power_config(method, config, baseline_config or BaselineConfig(), float(bool(method.budget)))
            elif method.name in ALLOCATED_SEARCHES:
                config.with_shared_budget(max_flops=1.0)
            elif method.is_search and (method.budget or not has_gradient):
                method_config = build_search_config(method, config, max_flops=1.0 if method.budget else 0.0)
                checks.require(
                    has_gradient or isinstance(method_config.solver, NoGradient),
                    f"{method} follows the gradient of the reward, and a function has none: use control or best_of_N",
                )
    checks.raise_faults()
