"""`nabla-trl breakeven`: after how many queries training has paid for itself, from the rows of evaluations."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from nabla_trl.cli.arguments import DOLLARS_HELP, check_dollars_per_gpu_hour
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, split_names

if TYPE_CHECKING:
    from rich.table import Table

    from nabla_trl.report.breakeven import PairBreakEven

MIN_WIDE_COLUMNS = 108  # of a terminal that has room for the intervals of all units
_LEGEND = (
    "Queries after which the trained method has cost less in total, its training included. †: it is less accurate "
    "beyond chance, so it never pays at equal accuracy. ≈: the accuracies do not differ beyond chance. No mark: it is "
    "more accurate. never: a query costs no less. unsure: the saving per query may be zero. at once: the first query "
    "pays. ?: a log of mean costs has no interval."
)


@dataclass
class BreakEvenArguments:
    """Options of `nabla-trl breakeven`."""

    sources: list[str] = option([], argparse.SUPPRESS)
    trained: list[str] = option(
        [],
        "Methods that needed the training, separated by commas or spaces (default: the greedy decodes of trained "
        "policies).",
    )
    baselines: list[str] = option(
        [],
        "Methods to compare with, separated by commas or spaces (default: all methods of policies that were not "
        "trained).",
    )
    train_flops: float | None = option(
        None,
        "FLOPs of the training, its traces and the audit included (default: what facts.json beside the rows says).",
    )
    train_seconds: float | None = option(None, "The same in seconds of all devices together.")
    reward_train_flops: float | None = option(
        None, "FLOPs of training the reward (default: what facts.json or the reward's folder says)."
    )
    reward_train_seconds: float | None = option(None, "The same in seconds of all devices together.")
    dollars_per_gpu_hour: float | None = option(None, DOLLARS_HELP)
    task: str = option("", "Task of an lm-eval log that holds several.")
    metric: str = option("", "Metric of lm-eval's samples (default: the first one).")
    filter_name: str = option("", "Filter of lm-eval's samples (default: the first one).")
    output_file: str = option("", "JSON file to write all numbers to (default: none).")

    def __post_init__(self) -> None:
        checks = Checks()
        checks.call(check_dollars_per_gpu_hour, self.dollars_per_gpu_hour)
        for item in fields(self):
            value = getattr(self, item.name)
            is_valid = "train_" not in item.name or value is None or 0 <= value < math.inf
            checks.require(is_valid, f"{item.name} must be a finite number of at least 0, not {value}")
        checks.raise_faults()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [BreakEvenArguments],
        prog="nabla-trl breakeven",
        usage="nabla-trl breakeven SOURCE [SOURCE ...] [options]",
        description="After how many queries does training pay against test-time search at the same accuracy?\n"
        "Needs no models.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="SOURCE",
        help="Folder of an evaluation, a rows.jsonl, or a folder that lm-eval wrote with --log_samples. NAME=PATH "
        "names the method of an lm-eval log, and prefixes the methods of an evaluation.",
    )
    args, extra = parser.parse_options(argv)
    sources = [*args.sources, *extra.folders]
    if not sources:
        raise UsageError("name at least one source, as in nabla-trl breakeven outputs/tiny")

    from nabla_trl.report.breakeven import compute_breakeven, describe_breakeven
    from nabla_trl.report.prices import Price
    from nabla_trl.utils.files import write_atomic
    from nabla_trl.utils.statistics import to_json_values

    pairs = compute_breakeven(
        sources,
        trained=split_names(args.trained),
        baselines=split_names(args.baselines),
        training=Price(args.train_flops, args.train_seconds, args.train_seconds),
        reward_training=Price(args.reward_train_flops, args.reward_train_seconds, args.reward_train_seconds),
        dollars_per_gpu_hour=args.dollars_per_gpu_hour,
        task=args.task,
        metric=args.metric,
        filter_name=args.filter_name,
    )
    for name in dict.fromkeys(pair.trained for pair in pairs):
        _print_tables([pair for pair in pairs if pair.trained == name])
    print(_LEGEND)
    for sentence in describe_breakeven(pairs):
        print(sentence)
    if args.output_file:
        content = [to_json_values(pair) for pair in pairs]
        write_atomic(Path(args.output_file), json.dumps(content, indent=1) + "\n")
    return 0


def _print_tables(pairs: Sequence[PairBreakEven]) -> None:
    """Print a line for each baseline of one trained method, and a second one with the training of the reward.

    On a narrow terminal dollars have a table of their own.
    """
    from nabla_trl.report.prices import UNITS
    from nabla_trl.utils.progress import PrintableConsole

    console = PrintableConsole()
    known = [
        unit
        for unit in UNITS
        if any(by[unit].outcome != "not known" for pair in pairs for by in (pair.by_unit, pair.by_unit_with_reward))
    ]
    for units in [known] if console.width >= MIN_WIDE_COLUMNS else filter(None, (known[:2], known[2:])):
        console.print(_build_table(pairs, units))


def _build_table(pairs: Sequence[PairBreakEven], units: Sequence[str]) -> Table:
    from rich.table import Table

    from nabla_trl.report.prices import UNIT_WORDS, format_break_even

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{pairs[0].trained} against", overflow="fold")
    for heading in ("accuracy", *(f"by {UNIT_WORDS[unit]}" for unit in units)):
        table.add_column(heading, justify="right", overflow="fold")
    for pair in pairs:
        lines = {pair.baseline: pair.by_unit}
        if any(result.queries for result in pair.by_unit_with_reward.values()):
            lines["  with the reward"] = pair.by_unit_with_reward
        for name, by_unit in lines.items():
            accuracy = f"{pair.baseline_accuracy.value:.3f}" if name == pair.baseline else ""
            table.add_row(name, accuracy, *(format_break_even(by_unit[unit], pair.gap.side) for unit in units))
    return table
