"""`nabla-trl report`: write the report of an evaluation again, from its rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_trl.cli.arguments import DOLLARS_HELP, check_dollars_per_gpu_hour
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.utils.fields import option


@dataclass
class ReportArguments:
    """Options of `nabla-trl report`, for YAML files. The command line has the positional RUN_DIR."""

    run_dir: str = option("", argparse.SUPPRESS)
    dollars_per_gpu_hour: float | None = option(None, DOLLARS_HELP)

    def __post_init__(self) -> None:
        check_dollars_per_gpu_hour(self.dollars_per_gpu_hour)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ReportArguments],
        prog="nabla-trl report",
        usage="nabla-trl report RUN_DIR [--dollars_per_gpu_hour D]",
        description="Write report.md, report.html, summary.json and plots/ again from rows.jsonl and facts.json.\n"
        "Needs no models.",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="RUN_DIR",
        help="Folder of an evaluation that nabla-trl eval or recipes/distill.py wrote.",
    )
    args, extra = parser.parse_options(argv)
    if bool(args.run_dir) == bool(extra.folder):
        raise UsageError("name one folder, as in nabla-trl report outputs/tiny")

    from nabla_trl.pipeline.report import write_report
    from nabla_trl.report.text import print_summary_table

    run_dir = Path(args.run_dir or extra.folder)
    print_summary_table(write_report(run_dir, dollars_per_gpu_hour=args.dollars_per_gpu_hour))
    print(f"report: {run_dir / 'report.md'}; the same as a page, with the traces: {run_dir / 'report.html'}")
    return 0
