"""The stage audit: does a reward rank responses, does its gradient help, and how far may a search go with it?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_trl.audit.gradient import GradientAudit, audit_gradient
from nabla_trl.audit.overoptimization import OveroptimizationAudit, audit_overoptimization
from nabla_trl.audit.ranking import RankingAudit, audit_ranking
from nabla_trl.baselines.sampling import ResponsePool, draw_pool
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.options import GradientPoint
from nabla_trl.pipeline.models import ModelPair, PolicySource, RewardSource
from nabla_trl.pipeline.problems import collect_problems
from nabla_trl.search.config import SearchConfig, make_search_config
from nabla_trl.tasks.problem import Problem, filter_with_gold_answer
from nabla_trl.tasks.registry import Problems
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import check_whole_number
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import pluralize
from nabla_trl.utils.progress import announce

DEFAULT_GRADIENT_POINTS = ("direct", "hard", "mixture:0.5", "direct+mixture:0.5")


@dataclass
class AuditResult:
    """The parts of an audit that have run so far.

    Attributes:
        policy: name of the policy.
        reward: name of the reward.
    """

    policy: str
    reward: str
    ranking: RankingAudit
    gradient: GradientAudit | None = None
    over_optimization: OveroptimizationAudit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        over_optimization = self.over_optimization.to_dict() if self.over_optimization else None
        return {
            "policy": self.policy,
            "reward": self.reward,
            **self.ranking.to_dict(),
            "gradient": self.gradient.to_dict() if self.gradient else None,
            "over_optimization": over_optimization,
            "validated_limits": over_optimization and over_optimization["validated_limits"],
        }

    def write(self, output_file: str | Path | None) -> None:
        """Write the result to a file, if it has a name."""
        if output_file:
            write_atomic(Path(output_file), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")


def audit_reward(
    problems: Problems,
    policy: PolicySource,
    reward: RewardSource,
    *,
    samples: int = 16,
    gradient: bool = False,
    gradient_at: str | Sequence[str] = DEFAULT_GRADIENT_POINTS,
    num_swaps: int = 1000,
    over_optimization: bool = False,
    config: SearchConfig | Mapping[str, Any] | str | None = None,
    seed: int = 0,
    output_file: str | Path | None = None,
    split: str = "train",
    max_problems: int | None = 64,
    **model_options: Any,
) -> dict[str, Any]:
    """Audit a reward on samples of the policy, before anything searches with it.

    Args:
        problems: a task's name, or problems in memory (see `load_problems`), on which nothing is evaluated later.
            Those without a gold answer are left out.
        policy: hub id or folder of a causal LM, a model in memory, or a `Policy` (see `load_policy`).
        reward: name, model in memory, function or `Reward` (see `load_reward`).
        samples: responses per problem, at least 2.
        gradient: also audit if the gradient shows which token to change. Not for a reward that is a function.
        gradient_at: gradient to audit, or several, the cheapest first.
        num_swaps: single-token swaps that the gradient audit compares.
        over_optimization: also audit if accuracy falls as the search goes on, up to `config.max_rounds` rounds.
        config: the search, for its sampling and for the two further audits. None: the defaults.
        seed: of the samples.
        output_file: JSON file to write the result to, after each part. Searches read it by `audit_file`.
        split: split of a task's name.
        max_problems: maximum number of problems. None: all.
        model_options: options of `ModelPair`, such as tokenizer, dtype, device and adapter.

    Returns:
        The audit as JSON values: accuracy, best_of_n_accuracy, auc, auc_interval, validated_samples and conclusion
        among them, and `gradient`, `over_optimization` and `validated_limits`, which are None where they did not run.

    Raises:
        ValueError: no problem with a gold answer, too few samples, or samples that are all right or all wrong.
    """
    search_config = make_search_config(config)
    gradient_at = [gradient_at] if isinstance(gradient_at, str) else gradient_at
    check_whole_number("seed", seed)
    check_audit_options(samples, gradient_at, num_swaps)
    models = ModelPair.build(policy, reward, model_options, stage=audit_reward)
    problem_set = collect_problems(
        problems, split=split, max_problems=max_problems, prompt_options=models.get_prompt_options()
    )
    result = run_audit(
        filter_with_gold_answer(problem_set.problems),
        models,
        config=search_config,
        samples=samples,
        gradient_at=gradient_at if gradient else (),
        num_swaps=num_swaps,
        over_optimization=over_optimization,
        seed=seed,
        output_file=output_file,
    )
    return result.to_dict()


def check_audit_options(samples: int, gradient_at: Sequence[str], num_swaps: int) -> None:
    """Refuse options of an audit, before anything is loaded.

    Raises:
        ValueError: fewer than two samples or than one swap, or a malformed, repeated or missing gradient.
    """
    checks = Checks()
    is_distinct = bool(gradient_at) and len(set(gradient_at)) == len(gradient_at)
    checks.require(is_distinct, "gradient_at must be distinct values, at least one")
    for text in gradient_at:
        checks.call(GradientPoint.parse, text)
    checks.call(check_whole_number, "num_swaps", num_swaps, 1)
    with checks.collect():
        check_whole_number("samples", samples)
        if samples < 2:
            raise ValueError("audit_samples must be at least 2: the audit compares samples of the same problem")
    checks.raise_faults()


def run_audit(
    problems: Sequence[Problem],
    models: ModelPair,
    *,
    config: SearchConfig,
    samples: int,
    gradient_at: Sequence[str] = (),
    num_swaps: int = 1000,
    over_optimization: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    output_file: str | Path | None = None,
) -> AuditResult:
    """Run the parts of an audit. The output file is written after each part, in case a later part fails.

    Args:
        problems: with gold answers.
        gradient_at: gradients to audit. Empty: the gradient is not audited.
        batch_size: responses that are drawn and scored together (default: four times that of `config`).
    """
    batch_size = batch_size or 4 * config.batch_size
    if output_file:  # now, so that a wrong path does not fail after the work
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    policy, reward = models.load(batch_size)
    with AnswerChecker() as checker:
        pool = _draw_samples(problems, models, samples, config, batch_size, seed)
        result = AuditResult(models.policy_name, models.reward_name, audit_ranking(pool, checker))
        result.write(output_file)
        if gradient_at:
            with announce("auditing the gradient of the reward"):
                result.gradient = audit_gradient(
                    problems,
                    policy=policy,
                    reward=reward,
                    gradient_at=gradient_at,
                    sampling=config.get_sampling(),
                    samples_per_problem=samples,
                    num_swaps=num_swaps,
                    top_k_candidates=config.top_k_candidates,
                    candidate_min_p=config.candidate_min_p,
                    reward_weight=config.reward_weight,
                    seed=seed,
                    batch_size=batch_size,
                )
            result.write(output_file)
        if over_optimization:
            with announce("auditing over-optimization: searches of several sizes"):
                result.over_optimization = audit_overoptimization(
                    problems,
                    policy=policy,
                    reward=reward,
                    config=config if reward.has_gradient else config.with_no_gradient(),
                    checker=checker,
                    validated_samples=result.ranking.validated_samples,
                    seeds=(seed,),
                )
            result.write(output_file)
    return result


def audit_samples(
    problems: Sequence[Problem],
    models: ModelPair,
    *,
    config: SearchConfig,
    samples: int,
    checker: AnswerChecker | None = None,
) -> dict[str, Any]:
    """Audit a reward on samples alone, as the first stage of a run, which continues whatever the result.

    Returns:
        The audit's fields, or "conclusion" alone where no audit was possible, and "flops", the cost of sampling and
        scoring.
    """
    pool = _draw_samples(problems, models, samples, config, 4 * config.batch_size, seed=0)
    cost = sum((entry.compute_cost() for entry in pool.entries), Cost())
    try:
        with nullcontext(checker) if checker else AnswerChecker() as answer_checker:
            audit = audit_ranking(pool, answer_checker).to_dict()
    except ValueError as error:
        audit = {"conclusion": f"the reward could not be audited: {error}"}
    return audit | {"flops": cost.flops}


def _draw_samples(
    problems: Sequence[Problem], models: ModelPair, samples: int, config: SearchConfig, batch_size: int, seed: int
) -> ResponsePool:
    policy, reward = models.load(batch_size)
    sampling = config.get_sampling()
    with announce(f"auditing the reward on {pluralize(len(problems), 'problem')} × {samples} responses"):
        return draw_pool(
            problems, samples, policy=policy, reward=reward, sampling=sampling, seed=seed, batch_size=batch_size
        )
