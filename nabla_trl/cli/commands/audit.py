"""`nabla-trl audit`: measure if a reward ranks responses, if its gradient helps, and how far a search may go."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nabla_trl.audit.terms import AUDIT_TERMS, describe_audit
from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem, filter_with_gold_answer
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.progress import PrintableConsole

if TYPE_CHECKING:
    from nabla_trl.audit.gradient import FirstErrorScores, GradientAudit
    from nabla_trl.audit.overoptimization import OveroptimizationAudit
    from nabla_trl.audit.ranking import RankingAudit
    from nabla_trl.pipeline.audit import AuditResult
    from nabla_trl.utils.statistics import Interval

_GRADIENT_LEGEND = {
    "direction": "share of exchanged tokens whose change of reward has the predicted sign (by chance: 50%)",
    "correl.": "correlation of predicted and measured changes of reward",
    "first error": "share of wrong responses in which the position that is ranked first is the first error",
    "repair": "share of wrong responses in which the exchange that is ranked first corrects the first error",
    "effect": "what the gradient adds to the ranking without it, (none), beyond chance",
    "swaps": "exchanges of one token. Informative ones change the reward noticeably",
}
_OVEROPTIMIZATION_LEGEND = {
    "nabla": "accuracy of the search after so many rounds",
    "control": "accuracy of the same search without the gradient",
    "reward": "mean reward of the selected responses. Over-optimization: it rises and the accuracy falls",
    "validated": "as far as accuracy was measured to rise",
}

AUDIT_HELP = """--json prints one object. --output_file writes the same object after each part:
  policy, reward              names on the command line
  problems, samples, accuracy, best_of_n_accuracy, best_of_n_reward, auc,
  auc_interval, correlation, length_correlation, validated_samples, conclusion
                              the samples
  gradient                    with --gradient, else null: gradient_points
                              {name: ...}, best_gradient_at, baseline (no
                              gradient), conclusion
  over_optimization           with --over_optimization, else null: curves {nabla,
                              control}, conclusion
  validated_limits            with --over_optimization, else null: {max_samples,
                              max_rounds}, the largest search that the audit
                              validated. Other commands read it with --audit_file"""


@dataclass
class AuditArguments:
    """Options of `nabla-trl audit`."""

    dataset: str = required_option(DATASET_HELP)
    split: str = option("train", "Split of the data set. Audit on problems that you do not evaluate on.", common=True)
    max_audit_problems: int = option(
        64,
        "Maximum number of problems to audit on. Increase it for narrower confidence intervals. 0 uses all problems.",
        common=True,
    )
    audit_samples: int = option(
        16,
        "Responses drawn per problem to audit the reward, at least 2. Increase it to audit larger best-of-N.",
        common=True,
    )
    seed: int = option(0, "Random seed of the samples.", common=True)
    temperature: float = option(1.0, "Sampling temperature. Use the value of the search.", common=True)
    top_k: int = option(0, "Sample from the k most likely tokens. 0 uses all tokens.")
    top_p: float = option(
        1.0, "Nucleus sampling: sample from the smallest set of tokens with this total probability. 1 uses all tokens."
    )
    min_p: float = option(
        0.0, "Do not sample tokens whose probability is below this fraction of the most likely token's. 0 disables it."
    )
    max_new_tokens: int = option(
        512, "Maximum length of a response in tokens. Increase it if responses are cut off.", common=True
    )
    batch_size: int = option(256, "Responses drawn and scored together. Lower it if memory runs out.", common=True)
    output_file: str = option(
        "",
        "JSON file to write the results to. Other commands read it with --audit_file (default: no file).",
        common=True,
    )
    gradient: bool = option(
        False,
        "Also audit the gradient of the reward: does it show which token to change? Use it before a search with "
        "solver mirror (default: false).",
        common=True,
    )
    gradient_at: list[str] = option(
        ["direct", "hard", "mixture:0.5", "direct+mixture:0.5"],
        "Gradients to audit, cheapest first. See --solver.gradient_at of the search. Needs --gradient.",
        common=True,
    )
    num_swaps: int = option(
        1000,
        "Single-token swaps for which predicted and true reward changes are compared. Increase it for narrower "
        "intervals. Needs --gradient.",
    )
    over_optimization: bool = option(
        False,
        "Also audit over-optimization: does the accuracy fall as the search continues? The result contains the limits "
        "that later searches should respect (default: false).",
        common=True,
    )
    max_rounds: int = option(
        16,
        "Number of search rounds to audit, the largest budget that can be validated. All other search options keep "
        "their defaults. Needs --over_optimization.",
        common=True,
    )
    beta: float | None = option(
        None,
        "KL coefficient β of the search. Used by --gradient and --over_optimization (default: the search's own "
        "default, a KL target).",
        common=True,
    )
    top_k_candidates: int = option(
        16, "Tokens of the policy considered at each position. Used by --gradient and --over_optimization."
    )
    candidate_min_p: float = option(
        0.02,
        "Drop candidates whose probability is below this fraction of the most likely token's. Used by --gradient and "
        "--over_optimization.",
    )

    def __post_init__(self) -> None:
        from nabla_trl.pipeline.audit import check_audit_options

        checks = Checks()
        checks.call(check_audit_options, self.audit_samples, self.gradient_at, self.num_swaps)
        checks.require_minimum(self, 1, "max_rounds")
        checks.call(self.build_search_config)
        checks.raise_faults()

    def build_search_config(self) -> SearchConfig:
        """Return the search that the options describe, with defaults for everything else."""
        names = {field.name for field in fields(SearchConfig)} & vars(self).keys()
        return SearchConfig(**{name: getattr(self, name) for name in names})


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, AuditArguments],
        prog="nabla-trl audit",
        usage="nabla-trl audit --policy P --reward R --dataset D [--gradient] [--over_optimization] [options]",
        description="Measure if a reward prefers correct answers among samples of the policy, before a search\n"
        "uses it. --gradient measures if its gradient shows which token to change, and --over_optimization\n"
        "how far a search may go.",
        epilog=AUDIT_HELP,
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the results as one JSON object, described below. Use it in scripts (default: print tables).",
    )
    checks = Checks()
    models, args, extra = parser.parse_options(argv, checks)

    from nabla_trl.pipeline.audit import run_audit
    from nabla_trl.planning.preflight import check_output_file

    problems: list[Problem] = []
    if args.dataset:
        with checks.collect():
            problems = load_problems(args.dataset, split=args.split, max_problems=args.max_audit_problems or None)
            problems = filter_with_gold_answer(problems)
    models.preflight(checks, problems=problems, max_new_tokens=args.max_new_tokens)
    if args.output_file:
        checks.call(check_output_file, args.output_file)
    checks.raise_faults(UsageError)
    with redirect_stdout(sys.stderr):  # libraries must not print into the JSON
        result = run_audit(
            problems,
            models.build_pair(),
            config=args.build_search_config(),
            samples=args.audit_samples,
            gradient_at=args.gradient_at if args.gradient else (),
            num_swaps=args.num_swaps,
            over_optimization=args.over_optimization,
            seed=args.seed,
            batch_size=args.batch_size,
            output_file=args.output_file,
        )
    if extra.json:
        print(json.dumps(result.to_dict()))
    else:
        print_audit(result, PrintableConsole())
    return 0


# --- in a terminal ------------------------------------------------------------------------------------


def print_audit(result: AuditResult, console: Console) -> None:
    """Print the parts of an audit as tables with their conclusions."""
    _print_ranking_audit(result.ranking, console)
    if result.gradient is not None:
        console.print("\ngradient", style="bold")
        _print_gradient_audit(result.gradient, console)
    if result.over_optimization is not None:
        console.print("\nover-optimization", style="bold")
        _print_overoptimization_audit(result.over_optimization, console)


def _print_ranking_audit(audit: RankingAudit, console: Console) -> None:
    table = _make_table("best of", "accuracy [95%]", "reward")
    for n, accuracy in audit.best_of_n_accuracy.items():
        table.add_row(str(n), format_interval(accuracy), f"{audit.best_of_n_reward[n]:.3f}")
    console.print(table)
    values = {key: value for key, value in audit.to_dict().items() if key in AUDIT_TERMS}
    lines = describe_audit(values)
    _print_fields({label: value for label, value, _ in lines}, audit.conclusion, console)
    best_of = "accuracy and mean reward of the highest reward among so many samples"
    _print_legend({"best of": best_of} | {label: meaning for label, _, meaning in lines if meaning}, console)


def _print_gradient_audit(audit: GradientAudit, console: Console) -> None:
    headings = [
        "gradient at",
        "direction",
        "correl.",
        *(["first error", "repair"] if audit.baseline else []),
        "effect",
    ]
    table = _make_table(*headings)
    if audit.baseline:
        table.add_row("(none)", "", "", *_format_first_error_scores(audit.baseline), "")
    for name, point in audit.gradient_points.items():
        table.add_row(
            name,
            _format_percent_interval(point.sign_accuracy_informative),
            "–" if point.correlation is None else f"{point.correlation.value:+.2f}",
            *_format_first_error_scores(point.first_error_scores),
            point.effect,
        )
    console.print(table)
    lines = {
        "swaps": f"{audit.swaps} in {audit.swapped_responses} of {audit.responses} responses, "
        f"{audit.informative_swaps} informative",
        "wrong responses": audit.no_labels_reason
        or f"{audit.wrong_responses}, {audit.repairable_responses} with a correct token among the candidates",
    }
    _print_fields(lines, audit.conclusion, console)
    shown = [*headings[1:], *lines]
    _print_legend({label: meaning for label, meaning in _GRADIENT_LEGEND.items() if label in shown}, console)


def _print_overoptimization_audit(audit: OveroptimizationAudit, console: Console) -> None:
    table = _make_table("rounds", *(heading for name in audit.curves for heading in (f"{name} [95%]", "reward")))
    for rounds in next(iter(audit.curves.values())).accuracy:
        cells = []
        for curve in audit.curves.values():
            cells += [format_interval(curve.accuracy[rounds].to_dict()), f"{curve.reward[rounds]:.3f}"]
        table.add_row(str(rounds), *cells)
    console.print(table)
    limits = audit.validated_limits
    lines = {"validated": f"up to {limits.max_samples} samples, {limits.max_rounds} rounds"}
    _print_fields(lines, audit.conclusion, console)
    _print_legend(_OVEROPTIMIZATION_LEGEND, console)


def _print_legend(meanings: Mapping[str, str], console: Console) -> None:
    console.print("\nwhat it means:", style="dim", highlight=False)
    for label, meaning in meanings.items():
        console.print(f"  {label}: {meaning}", style="dim", highlight=False, markup=False)


def _make_table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "gradient at", overflow="fold")
    return table


def _format_first_error_scores(scores: FirstErrorScores | None) -> list[str]:
    return [] if scores is None else [_format_percent_interval(scores.top1), _format_percent_interval(scores.repair)]


def _format_percent_interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.0%} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _print_fields(fields: dict[str, str], conclusion: str, console: Console) -> None:
    for label, value in fields.items():
        console.print(f"{label:<26}{value}", highlight=False, markup=False)
    console.print(f"conclusion: {conclusion}", highlight=False, markup=False)
