"""How fast Metropolis chains come to samples of π* ∝ π·exp(r/β), by what proposes their moves.

    python recipes/research/mixing.py --config recipes/tiny/mixing.yaml

Chains of the embedded world's policy with its reward, one per problem: without the gradient, with the full mirror step
and with half of it (locally balanced, Zanella 2020), from the direct gradient and from one at mixtures. For each the
acceptance rate, how many chains never moved, the autocorrelation time of the reward, and effective samples per GFLOP;
OUT/mixing.json holds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixing_statistics import MixingStatistics, measure_mixing

from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import GlobalProposals, MetropolisAcceptance, MirrorSolver
from nabla_trl.tasks.registry import load_problems


@dataclass
class MixingArguments:
    output_dir: str = field(metadata={"help": "folder of mixing.json"})
    dataset: str = field(default="digit_chains", metadata={"help": DATASET_HELP})
    split: str = field(default="test", metadata={"help": "split of the dataset"})
    max_problems: int = field(default=60, metadata={"help": "problems, a chain for each"})
    compare_gradient_at: list[str] = field(
        default_factory=lambda: ["direct", "mixture:0.5"], metadata={"help": "gradients to propose by, see `point`"}
    )
    compare_step_sizes: list[float] = field(
        default_factory=lambda: [1.0, 0.5], metadata={"help": "shares of the mirror step; 0.5 is locally balanced"}
    )


def make_search_configs(args: MixingArguments, config: SearchConfig) -> dict[str, SearchConfig]:
    """The control and every gradient and step, by name."""
    found = {"no gradient": config.with_no_gradient()}
    for point in args.compare_gradient_at:
        for share in args.compare_step_sizes:
            solver = MirrorSolver(gradient_at=point, step_size=share)
            found[f"{point}, step size {share:g}"] = replace(config, solver=solver)
    return found


def format_mixing_row(name: str, mixing: MixingStatistics) -> str:
    time = "–" if mixing.autocorrelation_time is None else f"{mixing.autocorrelation_time:.1f}"
    time += "" if mixing.is_reliable else " (short chains)"
    figures = [
        f"{mixing.acceptance_rate:.3f}",
        str(mixing.num_stuck_chains),
        time,
        f"{mixing.effective_samples:.0f}",
        f"{mixing.effective_samples_per_gflop:.1f}",
    ]
    return f"| {' | '.join([name, *figures, f'{mixing.mean_reward:.3f}'])} |"


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, models, config = parse_dataclasses([MixingArguments, ModelArguments, SearchConfig], argv, presets=PRESETS)
    if not isinstance(config.acceptance, MetropolisAcceptance) or not isinstance(config.proposals, GlobalProposals):
        raise ValueError("mixing is measured of chains with acceptance metropolis and global proposals")
    if config.starts > 1:
        raise ValueError("mixing is measured of one chain for each problem: starts must be 1")
    wanted = make_search_configs(args, config)
    problems = load_problems(args.dataset, split=args.split, max_problems=args.limit or None)
    policy, reward = models.load(4 * config.batch_size)
    folder, found = Path(args.output_dir), dict[str, Any]()
    folder.mkdir(parents=True, exist_ok=True)
    print("| proposals | accepted | stuck chains | autocorrelation, steps | effective samples | per GFLOP | reward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one in wanted.items():
        mixed = measure_mixing(run_search(problems, policy=policy, reward=reward, config=one))
        found[name] = mixed.to_dict()
        (folder / "mixing.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(format_mixing_row(name, mixed), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
