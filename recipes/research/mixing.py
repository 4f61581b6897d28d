"""Measure how fast Metropolis chains converge to π* ∝ π·exp(r/β), depending on what proposes their moves.

    python recipes/research/mixing.py --config recipes/tiny/mixing.yaml

The policy and reward of the embedded world run one chain per problem: without the gradient, for each way to choose
where a response is cut, and with the full mirror-descent step and half of it (locally balanced, Zanella 2020), each
with the direct gradient and with one at mixtures. For each the recipe measures the acceptance rate, the number of
stuck chains, the autocorrelation time of the reward, and effective samples per GFLOP with a 95% interval over chains.
With --max_chain_rounds, chains that are shorter than 50 autocorrelation times are run again, longer. OUT/mixing.json
holds the results.

With recipes/tiny/power.yaml it measures power sampling: chains on π^α of the policy itself, without a reward model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mixing_statistics import MixingStatistics, measure_mixing

from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.report.markdown import format_table
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import GlobalProposals, MetropolisAcceptance, MirrorSolver, NoGradient
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import write_atomic


@dataclass
class MixingArguments:
    """Problems, and the gradients and step sizes to compare."""

    output_dir: str = required_option("Folder to write mixing.json to.")
    dataset: str = option("digit_chains", DATASET_HELP)
    split: str = option("test", "Split of the data set.")
    max_problems: int = option(60, "Maximum number of problems. Each has one chain. 0 uses all problems.")
    compare_cuts: list[str] = option(
        ["token"], "Cuts to compare, without the gradient: token, uniform, entropy, jump (see --solver.cut)."
    )
    compare_gradient_at: list[str] = option(
        ["direct", "mixture:0.5"], "Gradients to compare. See --solver.gradient_at of the search."
    )
    compare_step_sizes: list[float] = option(
        [1.0, 0.5], "Step sizes to compare, as fractions of the full mirror-descent step. 0.5 is locally balanced."
    )
    max_chain_rounds: int = option(
        0,
        "Longest chains. Chains shorter than 50 autocorrelation times are run again, with as many rounds as that "
        "takes, but never with more than this. 0 runs them once, with max_rounds.",
    )


def make_search_configs(args: MixingArguments, config: SearchConfig) -> dict[str, SearchConfig]:
    """Return the search without the gradient, with every cut, and with every gradient and step size, by name."""
    configs = {f"no gradient, cut {cut}": replace(config, solver=NoGradient(cut=cut)) for cut in args.compare_cuts}
    for gradient_at in args.compare_gradient_at:
        for step_size in args.compare_step_sizes:
            solver = MirrorSolver(gradient_at=gradient_at, step_size=step_size)
            configs[f"{gradient_at}, step size {step_size:g}"] = replace(config, solver=solver)
    return configs


def count_needed_rounds(mixing: MixingStatistics, max_chain_rounds: int) -> int:
    """Return the rounds of chains that are 60 autocorrelation times long. 0: these are the longest allowed already."""
    needed = max(2 * mixing.num_rounds, int(60 * (mixing.autocorrelation_time or 1.0)))
    rounds = min(needed, max_chain_rounds)
    return rounds if rounds > mixing.num_rounds else 0


def format_interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, models, config = parse_dataclasses([MixingArguments, ModelArguments, SearchConfig], argv, presets=PRESETS)
    if not isinstance(config.acceptance, MetropolisAcceptance) or not isinstance(config.proposals, GlobalProposals):
        raise ValueError("mixing is measured of chains with acceptance metropolis and global proposals")
    if config.num_starts > 1:
        raise ValueError("mixing is measured of one chain for each problem: num_starts must be 1")
    problems = load_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
    policy, reward = models.load_policy_and_reward(4 * config.batch_size)
    file, results = Path(args.output_dir, "mixing.json"), {}
    rows = []
    for name, search_config in make_search_configs(args, config).items():
        mixing = measure_mixing(run_search(problems, policy=policy, reward=reward, config=search_config))
        while not mixing.is_reliable and (rounds := count_needed_rounds(mixing, args.max_chain_rounds)):
            search_config = replace(search_config, max_rounds=rounds)
            mixing = measure_mixing(run_search(problems, policy=policy, reward=reward, config=search_config))
        results[name] = asdict(mixing)
        write_atomic(file, json.dumps(results, indent=1))
        time = "–" if mixing.autocorrelation_time is None else f"{mixing.autocorrelation_time:.1f}"
        rows.append(
            [
                name,
                f"{mixing.acceptance_rate:.3f}",
                mixing.num_stuck_chains,
                mixing.num_rounds,
                time if mixing.is_reliable else f"{time} (short chains)",
                f"{mixing.effective_samples:.0f}",
                f"{mixing.effective_samples_per_gflop:.1f}{format_interval(mixing.per_gflop_interval)}",
                f"{mixing.mean_reward:.3f}",
            ]
        )
        print(f"{name}: measured", file=sys.stderr, flush=True)
    headers = ["proposals", "accepted", "stuck chains", "rounds", "autocorrelation, rounds", "effective samples"]
    print(format_table([*headers, "per GFLOP", "reward"], rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
