"""`nabla-trl audit`: whether a reward ranks, whether its gradient points, and how far it may be searched with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nabla_trl.cli.arguments import AuditArguments, ModelArguments
from nabla_trl.cli.parsing import Parser
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem, filter_with_gold_answer
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.files import write_atomic

if TYPE_CHECKING:
    from nabla_trl.audit.gradient import FirstErrorScores, GradientAudit
    from nabla_trl.audit.overoptimization import OveroptimizationAudit
    from nabla_trl.audit.ranking import RankingAudit
    from nabla_trl.models.policy import Policy
    from nabla_trl.rewards.reward import Reward
    from nabla_trl.utils.statistics import Interval

AUDIT_HELP = """--json prints one object, and --output_file writes the same, after each part
what is found so far:
  policy, reward              as they were named
  problems, samples, accuracy, best_of_n, reward_of_n, auc, correlation,
  length_correlation, trusted_samples, verdict   of the samples
  gradient                    of --gradient, else null: points {name: ...}, best,
                              baseline (no gradient), verdict
  pressure                    of --over_optimization, else null: curves {nabla, control},
                              verdict
  trust                       of --over_optimization, else null: {samples, rounds} that
                              the reward may be searched with; other commands
                              read it by --audit FILE"""


def run_audit(argv: Sequence[str]) -> int:
    parser = Parser(
        [ModelArguments, AuditArguments],
        prog="nabla-trl audit",
        usage="nabla-trl audit --policy P --reward R --dataset D [--gradient] [--over_optimization] [options]",
        description="Measure whether a reward prefers right answers among samples of the policy, before anything "
        "searches with it;\nwith --gradient whether its gradient says which token to change, with --over_optimization how far "
        "a search may go.",
        epilog=AUDIT_HELP,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables, see below")
    models, args, extra = parser.parse_options(argv)

    if args.audit_samples < 2:
        raise ValueError("audit_samples must be at least 2: the audit compares samples of a problem")
    config = _build_search_config(args)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # now, rather than fail after the work
    problems = filter_with_gold_answer(
        load_problems(args.dataset, split=args.split, max_problems=args.audit_problems or None)
    )
    models.prompting().check(problems)
    with redirect_stdout(sys.stderr), AnswerChecker() as checker:
        policy, reward = models.load(args.batch_size)
        found, slope, pushed = _audit_ranking(problems, policy, reward, config, checker, args), None, None
        result: dict[str, Any] = {"policy": models.policy, "reward": models.reward, **found.to_dict()}
        result |= {"gradient": None, "pressure": None, "trust": None}
        _write_result(args.output, result)
        if args.gradient:
            slope = _audit_gradient(problems, policy, reward, config, args)
            result["gradient"] = slope.to_dict()
            _write_result(args.output, result)
        if args.pressure:
            pushed = _audit_overoptimization(problems, policy, reward, config, checker, found, args)
            result |= {"pressure": pushed.to_dict(), "trust": pushed.validated_limits.to_dict()}
            _write_result(args.output, result)
    if extra.json:
        print(json.dumps(result))
    else:
        _print_audit(found, slope, pushed, Console())
    return 0


def _write_result(output_file: str, result: dict[str, Any]) -> None:
    """Write what is found so far to the file `output`, if there is one, whole or not at all."""
    if output_file:
        write_atomic(Path(output_file), json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _build_search_config(args: AuditArguments) -> SearchConfig:
    """The search that the options describe; what they do not name is as by default."""
    return SearchConfig(
        beta=args.beta,
        max_rounds=args.max_rounds,
        top_k_candidates=args.top_k_candidates,
        candidate_min_p=args.candidate_min_p,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )


# --- the work -----------------------------------------------------------------------------------------


def _audit_ranking(
    problems: Sequence[Problem],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    checker: AnswerChecker,
    args: AuditArguments,
) -> RankingAudit:
    from nabla_trl.audit.ranking import audit_ranking as audited
    from nabla_trl.baselines.sampling import draw_pool

    pool = draw_pool(
        problems,
        args.audit_samples,
        policy=policy,
        reward=reward,
        sampling=config.get_sampling(),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return audited(pool, checker)


def _audit_gradient(
    problems: Sequence[Problem], policy: Policy, reward: Reward, config: SearchConfig, args: AuditArguments
) -> GradientAudit:
    from nabla_trl.audit.gradient import audit_gradient

    return audit_gradient(
        problems,
        policy=policy,
        reward=reward,
        gradient_at=args.gradient_at,
        sampling=config.get_sampling(),
        samples_per_problem=args.audit_samples,
        num_swaps=args.num_swaps,
        top_k_candidates=config.top_k_candidates,
        candidate_min_p=config.candidate_min_p,
        reward_weight=config.reward_weight,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _audit_overoptimization(
    problems: Sequence[Problem],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    checker: AnswerChecker,
    ranking_audit: RankingAudit,
    args: AuditArguments,
) -> OveroptimizationAudit:
    from nabla_trl.audit.overoptimization import audit_overoptimization

    return audit_overoptimization(
        problems,
        policy=policy,
        reward=reward,
        config=config,
        checker=checker,
        validated_samples=ranking_audit.validated_samples,
        seeds=(args.seed,),
    )


# --- in a terminal ------------------------------------------------------------------------------------


def _print_audit(
    ranking_audit: RankingAudit,
    gradient_audit: GradientAudit | None,
    overoptimization_audit: OveroptimizationAudit | None,
    console: Console,
) -> None:
    _print_ranking_audit(ranking_audit, console)
    if gradient_audit is not None:
        console.print("\ngradient", style="bold")
        _print_gradient_audit(gradient_audit, console)
    if overoptimization_audit is not None:
        console.print("\npressure", style="bold")
        _print_overoptimization_audit(overoptimization_audit, console)


def _print_ranking_audit(ranking_audit: RankingAudit, console: Console) -> None:
    table = _make_table("best of", "accuracy [95%]", "reward")
    for count, one in ranking_audit.best_of_n_accuracy.items():
        span = f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        table.add_row(str(count), span, f"{ranking_audit.best_of_n_reward[count]:.3f}")
    console.print(table)
    lines = {
        "right samples": f"{ranking_audit.accuracy:.3f} of {ranking_audit.problems} × {ranking_audit.samples}",
        "AUC within problems": f"{ranking_audit.auc:.3f}",
        **({} if ranking_audit.step_auc is None else {"AUC, free of error": f"{ranking_audit.step_auc:.3f}"}),
        **(
            {}
            if ranking_audit.correct_with_errors is None
            else {"right by luck": f"{ranking_audit.correct_with_errors:.3f} of the right samples"}
        ),
        "correlation with right": f"{ranking_audit.correlation:+.3f}",
        "correlation with length": f"{ranking_audit.length_correlation:+.3f}",
    }
    _print_fields(lines, ranking_audit.conclusion, console)


def _print_gradient_audit(gradient_audit: GradientAudit, console: Console) -> None:
    headings = ["point", "direction", "correl."]
    table = _make_table(*headings, *(["first error", "repair"] if gradient_audit.baseline else []), "effect")
    if gradient_audit.baseline:
        table.add_row("(none)", "", "", *_format_finding(gradient_audit.baseline), "")
    for name, one in gradient_audit.gradient_points.items():
        correlation = "–" if one.correlation is None else f"{one.correlation.value:+.2f}"
        table.add_row(
            name,
            _format_percent_interval(one.sign_accuracy_informative),
            correlation,
            *_format_finding(one.first_error_scores),
            one.effect,
        )
    console.print(table)
    lines = {
        "swaps": f"{gradient_audit.swaps} in {gradient_audit.swapped_responses} of {gradient_audit.responses} responses, {gradient_audit.informative_swaps} telling"
    }
    lines["wrong responses"] = (
        gradient_audit.no_labels_reason
        or f"{gradient_audit.wrong_responses}, {gradient_audit.repairable_responses} with a right token to choose"
    )
    _print_fields(lines, gradient_audit.conclusion, console)


def _print_overoptimization_audit(overoptimization_audit: OveroptimizationAudit, console: Console) -> None:
    table = _make_table(
        "rounds", *(text for name in overoptimization_audit.curves for text in (f"{name} [95%]", "reward"))
    )
    for rounds in next(iter(overoptimization_audit.curves.values())).accuracy:
        cells = []
        for curve in overoptimization_audit.curves.values():
            one = curve.accuracy[rounds]
            cells += [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]", f"{curve.reward[rounds]:.3f}"]
        table.add_row(str(rounds), *cells)
    console.print(table)
    trust = f"up to {overoptimization_audit.validated_limits.max_samples} samples, {overoptimization_audit.validated_limits.max_rounds} rounds"
    _print_fields({"trust": trust}, overoptimization_audit.conclusion, console)


def _make_table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "point", overflow="fold")
    return table


def _format_finding(finding: FirstErrorScores | None) -> list[str]:
    return (
        [] if finding is None else [_format_percent_interval(finding.top1), _format_percent_interval(finding.repair)]
    )


def _format_percent_interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.0%} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _print_fields(fields: dict[str, str], conclusion: str, console: Console) -> None:
    for label, value in fields.items():
        console.print(f"{label:<24}{value}", highlight=False, markup=False)
    console.print(f"verdict: {conclusion}", highlight=False, markup=False)
