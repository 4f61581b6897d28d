"""Compare test-time search and KL-regularized training with the optimum of both, in a world that can be enumerated.

    python recipes/research/duality.py --config recipes/tiny/duality.yaml
    python recipes/research/duality.py --config recipes/tiny/duality.yaml --train_methods sft rloo

π* ∝ π·exp(r/β) is computed in closed form from all responses to every prompt. The recipe compares with it

- best-of-N, exactly,
- Metropolis chains and greedy refinement, with and without the gradient. Their distributions are empirical ones of
  independent chains, next to those of as many samples of π*.
- policies trained from π by sft, reward-weighted sft, dpo, soft targets, rloo, grpo and on-policy distillation,
  exactly.

OUT/duality.md has the table, duality.json its numbers, duality.png the figure and OUT/world the models. Chains and
trained policies that already exist are kept.

Without --policy a world is generated from --world_seed. For your own models give --policy P --reward R --dataset D.
Their vocabulary must be small.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import duality_report
import numpy as np
from distributions import EnumeratedCase, compute_empirical_distribution, compute_mean_metrics, estimate_noise_floor
from duality_report import TRAINED_POLICY, DualityRow
from duality_training import DualityTrainer, DualityTrainingArguments, PolicyCheckpoint
from enumeration import (
    MAX_RESPONSES,
    EnumeratedResponses,
    compute_exact_distributions,
    enumerate_responses,
    score_enumerated_responses,
)
from small_world import WorldArguments, make_world

from nabla_trl.audit.overoptimization import make_round_grid
from nabla_trl.cli.arguments import DATASET_HELP, REWARD_HELP
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import compute_reward_identity
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import GreedyAcceptance, MetropolisAcceptance, MirrorSolver
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import hide_userinfo
from nabla_trl.utils.identity import claim_settings


@dataclass
class DualityArguments:
    """Models, prompts and methods."""

    output_dir: str = required_option(
        "Folder to write duality.md, chains/ and world/ to. Chains and policies that already exist are kept."
    )
    policy: str = option(
        "",
        "Hub id or path of the policy, a causal language model. Needs --reward and --dataset (default: generate a "
        "small world).",
    )
    reward: str = option("", f"{REWARD_HELP} Needs --policy (default: generate one).")
    dataset: str = option("", f"{DATASET_HELP} Needs --policy (default: generate prompts).")
    split: str = option("test", "Split of the data set.")
    max_problems: int = option(8, "Maximum number of prompts of the data set. Ignored for a generated world.")
    device: str | None = option(
        None, "Device to run on, such as cpu or cuda:1 (default: a GPU if there is one, else the CPU)."
    )
    beta: float = option(1.0, "KL coefficient β of every method.")
    max_new_tokens: int = option(
        5, "Maximum length of a response in tokens. The number of responses grows exponentially with it."
    )
    max_responses: int = option(
        MAX_RESPONSES, "Maximum number of responses per prompt that are enumerated. Increase it if memory allows."
    )
    best_of_n: list[int] = option([2, 4, 8, 16, 32], "Values of N of best-of-N, in increasing order, at least 2.")
    num_chains: int = option(300, "Independent chains per prompt and search. Increase it for less sampling noise.")
    max_rounds: int = option(32, "Number of rounds of every chain.")
    gradient_at: str = option(
        "direct", "Gradient of the searches that use one. See --solver.gradient_at of the search."
    )
    step_size: float = option(1.0, "Fraction of the full mirror-descent step. 0.5 is locally balanced.")
    batch_size: int = option(500, "Chains run together. Lower it if memory runs out.")
    seed: int = option(0, "Random seed of the chains and of the noise estimate.")
    title: str = option("Search and training against the optimum", "Title of the page.")

    def __post_init__(self) -> None:
        if not self.best_of_n or min(self.best_of_n) < 2 or self.best_of_n != sorted(set(self.best_of_n)):
            raise ValueError("best_of_n must be increasing numbers of at least 2")
        if self.num_chains < 2 or self.max_rounds < 1:
            raise ValueError("num_chains must be at least 2 and max_rounds at least 1")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be a positive number, not {self.beta}")
        if len({bool(self.policy), bool(self.reward), bool(self.dataset)}) > 1:
            raise ValueError("policy, reward and dataset belong together: give all three, or none to generate a world")

    def make_search_configs(self, vocab_size: int) -> dict[str, SearchConfig]:
        """Return searches with Metropolis and with greedy acceptance, each with and without the gradient.

        Args:
            vocab_size: rows of the policy's output head. All are candidates, so that a chain can reach every response.
        """
        config = SearchConfig(
            solver=MirrorSolver(gradient_at=self.gradient_at, step_size=self.step_size),
            # Every token is a candidate, so branches reach every response.
            acceptance=MetropolisAcceptance(independence_prob=0.0),
            beta=self.beta,
            max_rounds=self.max_rounds,
            top_k_candidates=vocab_size,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        greedy = replace(config, acceptance=GreedyAcceptance())
        return {
            "metropolis + gradient": config,
            "metropolis": config.with_no_gradient(),
            "greedy search + gradient": greedy,
            "greedy search": greedy.with_no_gradient(),
        }


class DualityStudy:
    """A policy and a reward with all responses to every prompt.

    Attributes:
        enumerated, scores, cases: the responses, rewards and costs, and distributions of each prompt.
        optimum_metrics: metrics of π*.
    """

    def __init__(self, args: DualityArguments, policy: Policy, reward: Reward, problems: Sequence[Problem]):
        self.args, self.policy, self.reward = args, policy, reward
        self.enumerated = [
            enumerate_responses(policy, problem, args.max_new_tokens, max_responses=args.max_responses)
            for problem in problems
        ]
        self.scores = [score_enumerated_responses(enumerated, policy, reward) for enumerated in self.enumerated]
        self.cases = [
            EnumeratedCase(enumerated.logp, scores.rewards, args.beta)
            for enumerated, scores in zip(self.enumerated, self.scores, strict=True)
        ]
        self.optimum_metrics = compute_mean_metrics(self.cases, [case.optimum_probs for case in self.cases])

    def compute_sampling_rows(self) -> list[DualityRow]:
        """Return the rows of π itself, of which a sample needs no score, and of best-of-N."""
        policy = [case.policy_probs for case in self.cases]
        rows = [duality_report.make_exact_row(self.cases, policy, "π", flops=self.compute_sampling_flops(policy))]
        for count in self.args.best_of_n:
            distributions = [case.compute_best_of_n_distribution(count) for case in self.cases]
            flops = self.compute_best_of_n_flops(count)
            rows.append(duality_report.make_exact_row(self.cases, distributions, "best of N", count, flops=flops))
        return rows

    def compute_search_rows(self, counts_dir: Path) -> list[DualityRow]:
        """Return the rows of every search after 1, 2, 4, … rounds. Chains whose counts are in the folder are kept."""
        counts_dir.mkdir(parents=True, exist_ok=True)
        floor = estimate_noise_floor(self.cases, self.args.num_chains, seed=self.args.seed)
        rows, budgets = [], make_round_grid(self.args.max_rounds)[1:]
        configs = self.args.make_search_configs(len(self.policy.forbidden_mask))
        for number, (name, config) in enumerate(configs.items()):
            results = [
                self.count_chain_states(
                    enumerated, config, budgets, counts_dir / f"search-{number}-prompt-{index}.npz"
                )
                for index, enumerated in enumerate(self.enumerated)
            ]
            for index, budget in enumerate(budgets):
                distributions = [compute_empirical_distribution(counts[index]) for counts, _ in results]
                flops = float(np.mean([flops[index] for _, flops in results]))
                rows.append(
                    duality_report.make_empirical_row(
                        self.cases, distributions, name, budget, noise_floor=floor, flops=flops
                    )
                )
            kl = rows[-1].measures.kl_optimum
            print(f"{name}: {kl:.3f} nats after {rows[-1].size} rounds", file=sys.stderr, flush=True)
        return rows

    def compute_trained_rows(self, checkpoints: Sequence[PolicyCheckpoint]) -> list[DualityRow]:
        """Return the rows of the exact distributions of trained policies."""
        rows = []
        for checkpoint in checkpoints:
            policy = load_policy(checkpoint.folder, device=self.args.device)
            distributions = compute_exact_distributions(policy, self.enumerated)
            rows.append(
                duality_report.make_exact_row(
                    self.cases,
                    distributions,
                    checkpoint.method,
                    kind=TRAINED_POLICY,
                    flops=self.compute_sampling_flops(distributions),
                    training_flops=checkpoint.flops,
                )
            )
        return rows

    def count_chain_states(
        self, enumerated: EnumeratedResponses, config: SearchConfig, round_budgets: Sequence[int], file: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the chains of one prompt, or read their results from the file.

        Returns:
            [budgets, N] number of chains at each response, and [budgets] mean FLOPs so far.

        Raises:
            ValueError: if a chain fails.
        """
        if file.exists():
            with np.load(file) as arrays:
                return arrays["counts"], arrays["flops"]
        problems = [
            replace(enumerated.problem, id=f"{enumerated.problem.id}/{chain}") for chain in range(self.args.num_chains)
        ]
        traces = run_search(problems, policy=self.policy, reward=self.reward, config=config, seed=self.args.seed)
        counts = np.zeros((len(round_budgets), len(enumerated.responses)), dtype=np.int64)
        for trace in traces:
            if trace.error is not None:
                raise ValueError(f"{trace.problem_id}: {trace.error}")
            for index, (response, _) in enumerate(trace.list_incumbents_at(round_budgets)):
                counts[index, enumerated.index_by_response[tuple(response)]] += 1
        flops = np.array(
            [np.mean([get_flops_at_round(trace, budget) for trace in traces]) for budget in round_budgets]
        )
        draft = file.with_suffix(".tmp.npz")
        np.savez_compressed(draft, counts=counts, flops=flops)
        draft.replace(file)
        return counts, flops

    def compute_sampling_flops(self, distributions: Sequence[np.ndarray]) -> float:
        """Return the expected FLOPs of one sample from policies of this size, without a score."""
        flops = [
            scores.prompt_sampling_flops + probs @ scores.sampling_flops
            for scores, probs in zip(self.scores, distributions, strict=True)
        ]
        return float(np.mean(flops))

    def compute_best_of_n_flops(self, num_samples: int) -> float:
        """Return the expected FLOPs of sampling and scoring several responses."""
        flops = [
            scores.prompt_sampling_flops
            + scores.prompt_scoring_flops
            + num_samples * float(case.policy_probs @ (scores.sampling_flops + scores.scoring_flops))
            for scores, case in zip(self.scores, self.cases, strict=True)
        ]
        return float(np.mean(flops))

    def describe_world(self) -> str:
        """Return a sentence about the world."""
        entropies = [-float(case.policy_probs @ case.logp.clip(-1e3)) for case in self.cases]
        sizes = sorted({len(enumerated.responses) for enumerated in self.enumerated})
        return (
            f"{len(self.cases)} prompts, {' or '.join(f'{size:,}' for size in sizes)} responses each; entropy of π "
            f"{min(entropies):.1f} to {max(entropies):.1f} nats, KL(π*‖π) {self.optimum_metrics.kl_policy:.2f} on "
            "average."
        )


def get_flops_at_round(trace: Trace, num_rounds: int) -> float:
    """Return the FLOPs of a search after so many rounds, or all of them if it has no more rounds."""
    flops = [revision.cumulative_flops for revision in trace.revisions if revision.round < num_rounds]
    return flops[-1] if flops else trace.cost.flops


def load_or_make_world(args: DualityArguments, world: WorldArguments) -> tuple[Policy, Reward, list[Problem]]:
    """Load the given models and prompts, or those of a world, which is generated if it does not exist.

    Raises:
        ValueError: if options of a world are given with a policy, or the folder has a world with other options.
    """
    folder = Path(args.output_dir) / "world"
    names = [args.policy, args.reward, args.dataset]
    if not args.policy:
        settings = asdict(world) | {"max_new_tokens": args.max_new_tokens}
        claim_settings(folder.with_name("world.settings.json"), {name: str(value) for name, value in settings.items()})
        if not folder.exists():
            make_world(folder, world, args.max_new_tokens)
        names = [str(folder / name) for name in ("policy", "reward", "problems.jsonl")]
    elif world != WorldArguments():
        raise ValueError(
            "a policy is given, so no world is made: leave out world_seed, num_symbols and other options of a world"
        )
    policy = load_policy(names[0], device=args.device)
    reward = load_reward(names[1], policy=policy, device=args.device, batch_size=4 * args.batch_size)
    max_problems = args.max_problems if args.policy else None
    return policy, reward, load_problems(names[2], split=args.split, max_problems=max_problems)


def collect_chain_settings(args: DualityArguments) -> dict[str, str]:
    """Return the settings that the chains depend on."""
    names = ("beta", "max_new_tokens", "num_chains", "max_rounds", "gradient_at", "step_size", "seed")
    settings = {name: str(getattr(args, name)) for name in names}
    if args.policy:
        settings |= {"policy": args.policy, "reward": compute_reward_identity(args.reward), "split": args.split}
        settings |= {**get_task_settings(args.dataset), "max_problems": str(args.max_problems)}
    return settings


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, world, training = parse_dataclasses([DualityArguments, WorldArguments, DualityTrainingArguments], argv)
    study = DualityStudy(args, *load_or_make_world(args, world))
    folder = Path(args.output_dir)
    claim_settings(folder / "duality.settings.json", collect_chain_settings(args))
    rows = study.compute_sampling_rows() + study.compute_search_rows(folder / "chains")
    configs = args.make_search_configs(len(study.policy.forbidden_mask))
    trainer = DualityTrainer(
        folder / "trained",
        training,
        policy=study.policy,
        reward=study.reward,
        problems=[enumerated.problem for enumerated in study.enumerated],
        # Without the gradient, because the reward of a generated world is untrained and its gradient does not help.
        search_config=configs["metropolis"],
        gradient_config=configs["metropolis + gradient"],
        seed=args.seed + 1,  # other chains than those that are measured
    )
    checkpoints = [checkpoint for method in training.list_methods() for checkpoint in trainer.train(method)]
    rows += study.compute_trained_rows(checkpoints)
    command = hide_userinfo(shlex.join(["python", "recipes/research/duality.py", *argv]))
    facts = {"title": args.title, "command": command, "subject": study.describe_world(), "beta": args.beta}
    results = duality_report.duality_to_json(rows, study.optimum_metrics, facts)
    write_atomic(folder / "duality.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    duality_report.plot_duality(folder / "duality.png", rows, facts)
    text = duality_report.format_duality_markdown(rows, study.optimum_metrics, facts)
    write_atomic(folder / "duality.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
