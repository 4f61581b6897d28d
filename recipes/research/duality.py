"""Test-time search and KL-regularised training against the optimum of both, on a world that can be written down.

    python recipes/research/duality.py --config recipes/tiny/duality.yaml
    python recipes/research/duality.py --config recipes/tiny/duality.yaml --train sft rloo

π* ∝ π·exp(r/β) is had in closed form from every response of every prompt. Against it: best-of-N (exactly), Metropolis
chains and greedy refinement with and without the gradient (counted from independent chains, beside what as many draws
of π* measure), and policies trained from π by sft, reward-weighted sft, dpo, rloo and grpo (exactly). OUT/duality.md
holds the table, duality.json its numbers, duality.png the figure, OUT/world the models; chains and trained policies
that are there are not made again.

Without --policy a world is made from --world_seed. Your own: --policy P --reward R --dataset D, of few enough tokens.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import option
from nabla_trl.utils.identity import claim_settings


@dataclass
class DualityArguments:
    output_dir: str = field(metadata={"help": "folder of duality.md, chains/ and world/"})
    policy: str = option("", "hub id or path of a causal LM; empty = a world is made")
    reward: str = option("", f"with --policy: {REWARD_HELP}")
    dataset: str = option("", f"with --policy: {DATASET_HELP}")
    split: str = option("test", "split of the dataset")
    max_problems: int = option(8, "prompts of the dataset")
    device: str | None = option(None, "where to run, as cpu or cuda:1; a GPU if there is one")
    beta: float = option(1.0, "KL coefficient β of every method")
    max_new_tokens: int = option(5, "longest response, in tokens")
    max_responses: int = option(MAX_RESPONSES, "most responses per prompt that are written down")
    best_of_n: list[int] = field(
        default_factory=lambda: [2, 4, 8, 16, 32], metadata={"help": "N of best-of-N, rising, at least 2"}
    )
    num_chains: int = option(300, "independent chains per prompt and search")
    max_rounds: int = option(32, "steps of every chain")
    gradient_at: str = option("direct", "gradient of the searches that follow one, see `point` of the search")
    step_size: float = option(1.0, "share of the mirror step")
    batch_size: int = option(500, "chains run together")
    seed: int = option(0, "seed of the chains and of the noise")
    title: str = option("The dual, measured", "title of the page")

    def __post_init__(self) -> None:
        if not self.best_of_n or min(self.best_of_n) < 2 or self.best_of_n != sorted(set(self.best_of_n)):
            raise ValueError("samples must be rising numbers of at least 2")
        if self.num_chains < 2 or self.max_rounds < 1:
            raise ValueError("chains must be at least 2 and rounds at least 1")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be a positive number, not {self.beta}")
        if bool(self.policy) != bool(self.reward) or bool(self.policy) != bool(self.dataset):
            raise ValueError(
                "policy, reward and dataset belong together: give all three, or none to have a world made"
            )

    def make_search_configs(self, vocab_size: int) -> dict[str, SearchConfig]:
        """Metropolis and greedy acceptance, each with the gradient and without.

        Args:
            tokens: rows of the policy's output head. All are candidates, so that a chain can reach every response.
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
    """A policy and a reward with every response to every prompt."""

    def __init__(self, args: DualityArguments, policy: Policy, reward: Reward, problems: Sequence[Any]):
        self.args, self.policy, self.reward = args, policy, reward
        self.enumerated = [
            enumerate_responses(policy, one, args.max_new_tokens, max_responses=args.max_responses) for one in problems
        ]
        self.scores = [score_enumerated_responses(tree, policy, reward) for tree in self.enumerated]
        self.cases = [
            EnumeratedCase(tree.logp, scored.rewards, args.beta)
            for tree, scored in zip(self.enumerated, self.scores, strict=True)
        ]
        self.optimum_metrics = compute_mean_metrics(self.cases, [case.optimum_probs for case in self.cases])

    def compute_sampling_rows(self) -> list[DualityRow]:
        """π itself, one sample of which costs no score, and best-of-N."""
        policy = [case.policy_probs for case in self.cases]
        rows = [duality_report.make_exact_row(self.cases, policy, "π", flops=self.compute_sampling_flops(policy))]
        for count in self.args.best_of_n:
            laws, flops = (
                [case.compute_best_of_n_distribution(count) for case in self.cases],
                self.compute_best_of_n_flops(count),
            )
            rows.append(duality_report.make_exact_row(self.cases, laws, "best of N", count, flops=flops))
        return rows

    def compute_search_rows(self, counts_dir: Path) -> list[DualityRow]:
        """Chains at 1, 2, 4, … steps; what `folder` holds is not run again."""
        counts_dir.mkdir(parents=True, exist_ok=True)
        floor = estimate_noise_floor(self.cases, self.args.num_chains, seed=self.args.seed)
        rows, budgets = [], make_round_grid(self.args.max_rounds)[1:]
        for number, (name, config) in enumerate(
            self.args.make_search_configs(len(self.policy.forbidden_mask)).items()
        ):
            found = [
                self.count_chain_states(tree, config, budgets, counts_dir / f"search-{number}-prompt-{place}.npz")
                for place, tree in enumerate(self.enumerated)
            ]
            for at, budget in enumerate(budgets):
                laws = [compute_empirical_distribution(counts[at]) for counts, _ in found]
                flops = float(np.mean([spent[at] for _, spent in found]))
                rows.append(
                    duality_report.make_empirical_row(self.cases, laws, name, budget, noise_floor=floor, flops=flops)
                )
            print(
                f"{name}: {rows[-1].measures.kl_optimum:.3f} nats at {rows[-1].size} steps",
                file=sys.stderr,
                flush=True,
            )
        return rows

    def compute_trained_rows(self, checkpoints: Sequence[PolicyCheckpoint]) -> list[DualityRow]:
        """Exact laws of trained policies."""
        rows = []
        for one in checkpoints:
            laws = compute_exact_distributions(load_policy(one.folder, device=self.args.device), self.enumerated)
            flops = self.compute_sampling_flops(laws)
            rows.append(
                duality_report.make_exact_row(
                    self.cases, laws, one.method, kind=TRAINED_POLICY, flops=flops, training_flops=one.flops
                )
            )
        return rows

    def count_chain_states(
        self, enumerated: EnumeratedResponses, config: SearchConfig, round_budgets: Sequence[int], file: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """[budgets, N] how many chains of a prompt stand at each response, and [budgets] mean FLOPs by then."""
        if file.exists():
            with np.load(file) as kept:
                return kept["counts"], kept["flops"]
        problems = [
            replace(enumerated.problem, id=f"{enumerated.problem.id}/{chain}") for chain in range(self.args.num_chains)
        ]
        traces = run_search(problems, policy=self.policy, reward=self.reward, config=config, seed=self.args.seed)
        counts = np.zeros((len(round_budgets), len(enumerated.responses)), dtype=np.int64)
        for trace in traces:
            if trace.error is not None:
                raise ValueError(f"{trace.problem_id}: {trace.error}")
            for at, (response, _) in enumerate(trace.list_incumbents_at(round_budgets)):
                counts[at, enumerated.index_by_response[tuple(response)]] += 1
        flops = np.array(
            [np.mean([get_flops_at_round(trace, budget) for trace in traces]) for budget in round_budgets]
        )
        draft = file.with_suffix(".tmp.npz")
        np.savez_compressed(draft, counts=counts, flops=flops)
        draft.replace(file)
        return counts, flops

    def compute_sampling_flops(self, distributions: Sequence[np.ndarray]) -> float:
        """One sample of laws of policies of this size, without a score."""
        spent = [
            one.prompt_sampling_flops + law @ one.sampling_flops
            for one, law in zip(self.scores, distributions, strict=True)
        ]
        return float(np.mean(spent))

    def compute_best_of_n_flops(self, num_samples: int) -> float:
        """Expected FLOPs of drawing and scoring `count` responses."""
        spent = [
            one.prompt_sampling_flops
            + one.prompt_scoring_flops
            + num_samples * float(case.policy_probs @ (one.sampling_flops + one.scoring_flops))
            for one, case in zip(self.scores, self.cases, strict=True)
        ]
        return float(np.mean(spent))

    def describe_world(self) -> str:
        """A sentence on the world."""
        entropies = [-float(case.policy_probs @ case.logp.clip(-1e3)) for case in self.cases]
        sizes = sorted({len(tree.responses) for tree in self.enumerated})
        return (
            f"{len(self.cases)} prompts, {' or '.join(f'{size:,}' for size in sizes)} responses each; entropy of π "
            f"{min(entropies):.1f} to {max(entropies):.1f} nats, KL(π*‖π) {self.optimum_metrics.kl_policy:.2f} on average."
        )


def get_flops_at_round(trace: Trace, num_rounds: int) -> float:
    """What a search had spent after so many rounds; all of it where it made no more than that."""
    spent = [revision.cumulative_flops for revision in trace.revisions if revision.round < num_rounds]
    return spent[-1] if spent else trace.cost.flops


def load_or_make_world(args: DualityArguments, world: WorldArguments) -> tuple[Policy, Reward, list[Any]]:
    """Models and prompts: those that are named, or of a world that is made if it is not there.

    Raises:
        ValueError: options of a world beside a policy, or a folder with a world of others.
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
        raise ValueError("a policy is given, so no world is made: leave out world_seed, symbols and their like")
    policy = load_policy(names[0], device=args.device)
    reward = load_reward(names[1], policy=policy, device=args.device, batch_size=4 * args.batch_size)
    return (
        policy,
        reward,
        load_problems(names[2], split=args.split, max_problems=args.max_problems if args.policy else None),
    )


def collect_chain_settings(args: DualityArguments) -> dict[str, str]:
    """What the chains depend on."""
    keep = ("beta", "max_new_tokens", "chains", "rounds", "point", "step", "seed")
    settings = {name: str(getattr(args, name)) for name in keep}
    if args.policy:
        settings |= {"policy": args.policy, "reward": compute_reward_identity(args.reward), "split": args.split}
        settings |= {**get_task_settings(args.dataset), "limit": str(args.max_problems)}
    return settings


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, world, training = parse_dataclasses([DualityArguments, WorldArguments, DualityTrainingArguments], argv)
    study = DualityStudy(args, *load_or_make_world(args, world))
    folder = Path(args.output_dir)
    claim_settings(folder / "duality.settings.json", collect_chain_settings(args))
    rows = study.compute_sampling_rows() + study.compute_search_rows(folder / "chains")
    # Without the gradient: the reward of a made world is untrained, and its gradient leads nowhere.
    chains = args.searches(len(study.policy.forbidden_mask))["metropolis"]
    trainer = DualityTrainer(
        folder / "trained",
        training,
        policy=study.policy,
        reward=study.reward,
        problems=[tree.problem for tree in study.enumerated],
        search_config=chains,
        seed=args.seed + 1,  # other chains than those that are measured
    )
    rows += study.compute_trained_rows([weights for method in training.methods() for weights in trainer.train(method)])
    command = shlex.join(["python", "recipes/research/duality.py", *argv])
    facts = {"title": args.title, "command": command, "subject": study.describe_world(), "beta": args.beta}
    found = duality_report.duality_to_json(rows, study.optimum_metrics, facts)
    (folder / "duality.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    duality_report.plot_duality(folder / "duality.png", rows, facts)
    text = duality_report.format_duality_markdown(rows, study.optimum_metrics, facts)
    (folder / "duality.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
