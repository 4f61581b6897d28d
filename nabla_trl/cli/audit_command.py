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
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.tasks.problem import Problem, graded
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.files import write_whole

if TYPE_CHECKING:
    from nabla_trl.audit.gradient import Finding, GradientAudit
    from nabla_trl.audit.overoptimization import Pressure
    from nabla_trl.audit.ranking import Audit
    from nabla_trl.models.policy import Policy
    from nabla_trl.rewards.reward import Reward
    from nabla_trl.utils.statistics import Interval

AUDIT_HELP = """--json prints one object, and --output writes the same, after each part
what is found so far:
  policy, reward              as they were named
  problems, samples, accuracy, best_of_n, reward_of_n, auc, correlation,
  length_correlation, trusted_samples, verdict   of the samples
  gradient                    of --gradient, else null: points {name: ...}, best,
                              baseline (no gradient), verdict
  pressure                    of --pressure, else null: curves {nabla, control},
                              verdict
  trust                       of --pressure, else null: {samples, rounds} that
                              the reward may be searched with; other commands
                              read it by --audit FILE"""


def audit(argv: Sequence[str]) -> int:
    parser = Parser(
        [ModelArguments, AuditArguments],
        prog="nabla-trl audit",
        usage="nabla-trl audit --policy P --reward R --dataset D [--gradient] [--pressure] [options]",
        description="Measure whether a reward prefers right answers among samples of the policy, before anything "
        "searches with it;\nwith --gradient whether its gradient says which token to change, with --pressure how far "
        "a search may go.",
        epilog=AUDIT_HELP,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables, see below")
    models, args, extra = parser.read(argv)

    if args.audit_samples < 2:
        raise ValueError("audit_samples must be at least 2: the audit compares samples of a problem")
    config = _search(args)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # now, rather than fail after the work
    problems = graded(load_problems(args.dataset, split=args.split, limit=args.audit_problems or None))
    models.prompting().check(problems)
    with redirect_stdout(sys.stderr), AnswerChecker() as checker:
        policy, reward = models.load(args.batch_size)
        found, slope, pushed = _samples(problems, policy, reward, config, checker, args), None, None
        result: dict[str, Any] = {"policy": models.policy, "reward": models.reward, **found.to_dict()}
        result |= {"gradient": None, "pressure": None, "trust": None}
        _store(args.output, result)
        if args.gradient:
            slope = _gradient(problems, policy, reward, config, args)
            result["gradient"] = slope.to_dict()
            _store(args.output, result)
        if args.pressure:
            pushed = _pressure(problems, policy, reward, config, checker, found, args)
            result |= {"pressure": pushed.to_dict(), "trust": pushed.trust.to_dict()}
            _store(args.output, result)
    if extra.json:
        print(json.dumps(result))
    else:
        _show(found, slope, pushed, Console())
    return 0


def _store(output: str, result: dict[str, Any]) -> None:
    """Write what is found so far to the file `output`, if there is one, whole or not at all."""
    if output:
        write_whole(Path(output), json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _search(args: AuditArguments) -> ReasonerConfig:
    """The search that the options describe; what they do not name is as by default."""
    return ReasonerConfig(
        beta=args.beta,
        rounds=args.rounds,
        candidates=args.candidates,
        candidate_min_p=args.candidate_min_p,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        sample_min_p=args.sample_min_p,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )


# --- the work -----------------------------------------------------------------------------------------


def _samples(
    problems: Sequence[Problem],
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    checker: AnswerChecker,
    args: AuditArguments,
) -> Audit:
    from nabla_trl.audit.ranking import audit as audited
    from nabla_trl.baselines.sampling import draw_pool

    pool = draw_pool(
        problems,
        args.audit_samples,
        policy=policy,
        reward=reward,
        sampling=config.sampling(),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return audited(pool, checker)


def _gradient(
    problems: Sequence[Problem], policy: Policy, reward: Reward, config: ReasonerConfig, args: AuditArguments
) -> GradientAudit:
    from nabla_trl.audit.gradient import gradient_audit

    return gradient_audit(
        problems,
        policy=policy,
        reward=reward,
        points=args.points,
        sampling=config.sampling(),
        samples=args.audit_samples,
        swaps=args.swaps,
        candidates=config.candidates,
        min_p=config.candidate_min_p,
        lam=config.lam,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _pressure(
    problems: Sequence[Problem],
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    checker: AnswerChecker,
    found: Audit,
    args: AuditArguments,
) -> Pressure:
    from nabla_trl.audit.overoptimization import pressure

    return pressure(
        problems,
        policy=policy,
        reward=reward,
        config=config,
        checker=checker,
        best_of_n=found,
        seeds=(args.seed,),
    )


# --- in a terminal ------------------------------------------------------------------------------------


def _show(found: Audit, slope: GradientAudit | None, pushed: Pressure | None, console: Console) -> None:
    _show_samples(found, console)
    if slope is not None:
        console.print("\ngradient", style="bold")
        _show_gradient(slope, console)
    if pushed is not None:
        console.print("\npressure", style="bold")
        _show_pressure(pushed, console)


def _show_samples(found: Audit, console: Console) -> None:
    table = _table("best of", "accuracy [95%]", "reward")
    for count, one in found.best_of_n.items():
        span = f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        table.add_row(str(count), span, f"{found.reward_of_n[count]:.3f}")
    console.print(table)
    lines = {
        "right samples": f"{found.accuracy:.3f} of {found.problems} × {found.samples}",
        "AUC within problems": f"{found.auc:.3f}",
        **({} if found.step_auc is None else {"AUC, free of error": f"{found.step_auc:.3f}"}),
        **({} if found.lucky is None else {"right by luck": f"{found.lucky:.3f} of the right samples"}),
        "correlation with right": f"{found.correlation:+.3f}",
        "correlation with length": f"{found.length_correlation:+.3f}",
    }
    _lines(lines, found.verdict, console)


def _show_gradient(found: GradientAudit, console: Console) -> None:
    headings = ["point", "direction", "correl."]
    table = _table(*headings, *(["first error", "repair"] if found.baseline else []), "effect")
    if found.baseline:
        table.add_row("(none)", "", "", *_findings(found.baseline), "")
    for name, one in found.points.items():
        correlation = "–" if one.correlation is None else f"{one.correlation.value:+.2f}"
        table.add_row(name, _percents(one.sign_telling), correlation, *_findings(one.finding), one.effect)
    console.print(table)
    lines = {"swaps": f"{found.swaps} in {found.swapped} of {found.responses} responses, {found.telling} telling"}
    lines["wrong responses"] = found.no_labels or f"{found.wrong}, {found.fixable} with a right token to choose"
    _lines(lines, found.verdict, console)


def _show_pressure(found: Pressure, console: Console) -> None:
    table = _table("rounds", *(text for name in found.curves for text in (f"{name} [95%]", "reward")))
    for rounds in next(iter(found.curves.values())).accuracy:
        cells = []
        for curve in found.curves.values():
            one = curve.accuracy[rounds]
            cells += [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]", f"{curve.reward[rounds]:.3f}"]
        table.add_row(str(rounds), *cells)
    console.print(table)
    trust = f"up to {found.trust.samples} samples, {found.trust.rounds} rounds"
    _lines({"trust": trust}, found.verdict, console)


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "point", overflow="fold")
    return table


def _findings(one: Finding | None) -> list[str]:
    return [] if one is None else [_percents(one.first), _percents(one.repair)]


def _percents(one: Interval | None) -> str:
    return "–" if one is None else f"{one.value:.0%} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def _lines(lines: dict[str, str], verdict: str, console: Console) -> None:
    for label, value in lines.items():
        console.print(f"{label:<24}{value}", highlight=False, markup=False)
    console.print(f"verdict: {verdict}", highlight=False, markup=False)
