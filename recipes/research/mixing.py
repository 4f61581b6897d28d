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

from mixing_statistics import Mixing, measure

from nabla_trl.cli.arguments import DATASETS, ModelArguments
from nabla_trl.cli.parsing import parse, quiet_libraries, run_main
from nabla_trl.search.config import PRESETS, ReasonerConfig
from nabla_trl.search.loop import solve
from nabla_trl.tasks.registry import load_problems


@dataclass
class MixingArguments:
    output_dir: str = field(metadata={"help": "folder of mixing.json"})
    dataset: str = field(default="chains", metadata={"help": DATASETS})
    split: str = field(default="test", metadata={"help": "split of the dataset"})
    limit: int = field(default=60, metadata={"help": "problems, a chain for each"})
    points: list[str] = field(
        default_factory=lambda: ["direct", "mixture:0.5"], metadata={"help": "gradients to propose by, see `point`"}
    )
    shares: list[float] = field(
        default_factory=lambda: [1.0, 0.5], metadata={"help": "shares of the mirror step; 0.5 is locally balanced"}
    )


def proposals(args: MixingArguments, config: ReasonerConfig) -> dict[str, ReasonerConfig]:
    """The control and every gradient and step, by name."""
    found = {"no gradient": config.control()}
    for point in args.points:
        for share in args.shares:
            found[f"{point}, step {share:g}"] = replace(config, point=point, step=share)
    return found


def line(name: str, one: Mixing) -> str:
    time = "–" if one.autocorrelation is None else f"{one.autocorrelation:.1f}"
    time += "" if one.reliable else " (short chains)"
    figures = [f"{one.accepted:.3f}", str(one.stuck), time, f"{one.effective:.0f}", f"{one.per_gflop:.1f}"]
    return f"| {' | '.join([name, *figures, f'{one.reward:.3f}'])} |"


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, models, config = parse([MixingArguments, ModelArguments, ReasonerConfig], argv, presets=PRESETS)
    if config.acceptance != "metropolis" or config.proposals != "global":
        raise ValueError("mixing is measured of chains with acceptance metropolis and global proposals")
    if config.starts > 1:
        raise ValueError("mixing is measured of one chain for each problem: starts must be 1")
    wanted = proposals(args, config)
    problems = load_problems(args.dataset, split=args.split, limit=args.limit or None)
    policy, reward = models.load(4 * config.batch_size)
    folder, found = Path(args.output_dir), dict[str, Any]()
    folder.mkdir(parents=True, exist_ok=True)
    print("| proposals | accepted | stuck chains | autocorrelation, steps | effective samples | per GFLOP | reward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one in wanted.items():
        mixed = measure(solve(problems, policy=policy, reward=reward, config=one))
        found[name] = mixed.to_dict()
        (folder / "mixing.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(line(name, mixed), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
