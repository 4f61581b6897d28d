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
from distributions import Case, counted, mean_measures, noise_floor
from duality_report import TRAINED, Row
from duality_training import Trainer, TrainingArguments, Weights
from enumeration import LIMIT, Tree, enumerate_tree, law_of, score_tree
from small_world import WorldArguments, make_world

from nabla_trl.audit.overoptimization import incumbents_at, round_grid
from nabla_trl.cli.arguments import DATASETS, REWARDS
from nabla_trl.cli.parsing import parse, quiet_libraries, run_main
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import reward_identity
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.loop import solve
from nabla_trl.tasks.registry import load_problems, task_settings
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.identity import claim_settings


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DualityArguments:
    output_dir: str = field(metadata={"help": "folder of duality.md, chains/ and world/"})
    policy: str = _option("", "hub id or path of a causal LM; empty = a world is made")
    reward: str = _option("", f"with --policy: {REWARDS}")
    dataset: str = _option("", f"with --policy: {DATASETS}")
    split: str = _option("test", "split of the dataset")
    limit: int = _option(8, "prompts of the dataset")
    device: str | None = _option(None, "where to run, as cpu or cuda:1; a GPU if there is one")
    beta: float = _option(1.0, "KL coefficient β of every method")
    max_new_tokens: int = _option(5, "longest response, in tokens")
    responses: int = _option(LIMIT, "most responses per prompt that are written down")
    samples: list[int] = field(
        default_factory=lambda: [2, 4, 8, 16, 32], metadata={"help": "N of best-of-N, rising, at least 2"}
    )
    chains: int = _option(300, "independent chains per prompt and search")
    rounds: int = _option(32, "steps of every chain")
    point: str = _option("direct", "gradient of the searches that follow one, see `point` of the search")
    step: float = _option(1.0, "share of the mirror step")
    batch_size: int = _option(500, "chains run together")
    seed: int = _option(0, "seed of the chains and of the noise")
    title: str = _option("The dual, measured", "title of the page")

    def __post_init__(self) -> None:
        if not self.samples or min(self.samples) < 2 or self.samples != sorted(set(self.samples)):
            raise ValueError("samples must be rising numbers of at least 2")
        if self.chains < 2 or self.rounds < 1:
            raise ValueError("chains must be at least 2 and rounds at least 1")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be a positive number, not {self.beta}")
        if bool(self.policy) != bool(self.reward) or bool(self.policy) != bool(self.dataset):
            raise ValueError(
                "policy, reward and dataset belong together: give all three, or none to have a world made"
            )

    def searches(self, tokens: int) -> dict[str, ReasonerConfig]:
        """Metropolis and greedy acceptance, each with the gradient and without.

        Args:
            tokens: rows of the policy's output head. All are candidates, so that a chain can reach every response.
        """
        config = ReasonerConfig(
            acceptance="metropolis",
            redraw=0.0,  # every token is a candidate: branches reach every response
            beta=self.beta,
            point=self.point,
            step=self.step,
            rounds=self.rounds,
            candidates=tokens,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        greedy = replace(config, acceptance="greedy", redraw=None)
        return {
            "metropolis + gradient": config,
            "metropolis": config.control(),
            "greedy search + gradient": greedy,
            "greedy search": greedy.control(),
        }


class Study:
    """A policy and a reward with every response to every prompt."""

    def __init__(self, args: DualityArguments, policy: Policy, reward: Reward, problems: Sequence[Any]):
        self.args, self.policy, self.reward = args, policy, reward
        self.trees = [enumerate_tree(policy, one, args.max_new_tokens, limit=args.responses) for one in problems]
        self.scored = [score_tree(tree, policy, reward) for tree in self.trees]
        self.cases = [
            Case(tree.logp, scored.rewards, args.beta) for tree, scored in zip(self.trees, self.scored, strict=True)
        ]
        self.optimum = mean_measures(self.cases, [case.optimum for case in self.cases])

    def drawn(self) -> list[Row]:
        """π itself, one sample of which costs no score, and best-of-N."""
        policy = [case.policy for case in self.cases]
        rows = [duality_report.exact_row(self.cases, policy, "π", flops=self.sampling_flops(policy))]
        for count in self.args.samples:
            laws, flops = [case.best_of(count) for case in self.cases], self.best_of_flops(count)
            rows.append(duality_report.exact_row(self.cases, laws, "best of N", count, flops=flops))
        return rows

    def searched(self, folder: Path) -> list[Row]:
        """Chains at 1, 2, 4, … steps; what `folder` holds is not run again."""
        folder.mkdir(parents=True, exist_ok=True)
        floor = noise_floor(self.cases, self.args.chains, seed=self.args.seed)
        rows, budgets = [], round_grid(self.args.rounds)[1:]
        for number, (name, config) in enumerate(self.args.searches(len(self.policy.forbidden)).items()):
            found = [
                self.counts(tree, config, budgets, folder / f"search-{number}-prompt-{place}.npz")
                for place, tree in enumerate(self.trees)
            ]
            for at, budget in enumerate(budgets):
                laws = [counted(counts[at]) for counts, _ in found]
                flops = float(np.mean([spent[at] for _, spent in found]))
                rows.append(duality_report.counted_row(self.cases, laws, name, budget, floor=floor, flops=flops))
            print(f"{name}: {rows[-1].measures.kl:.3f} nats at {rows[-1].size} steps", file=sys.stderr, flush=True)
        return rows

    def trained(self, checkpoints: Sequence[Weights]) -> list[Row]:
        """Exact laws of trained policies."""
        rows = []
        for one in checkpoints:
            laws = law_of(load_policy(one.folder, device=self.args.device), self.trees)
            flops = self.sampling_flops(laws)
            rows.append(
                duality_report.exact_row(
                    self.cases, laws, one.method, kind=TRAINED, flops=flops, training_flops=one.flops
                )
            )
        return rows

    def counts(
        self, tree: Tree, config: ReasonerConfig, budgets: Sequence[int], file: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """[budgets, N] how many chains of a prompt stand at each response, and [budgets] mean FLOPs by then."""
        if file.exists():
            with np.load(file) as kept:
                return kept["counts"], kept["flops"]
        problems = [replace(tree.problem, id=f"{tree.problem.id}/{chain}") for chain in range(self.args.chains)]
        traces = solve(problems, policy=self.policy, reward=self.reward, config=config, seed=self.args.seed)
        counts = np.zeros((len(budgets), len(tree.responses)), dtype=np.int64)
        for trace in traces:
            if trace.error is not None:
                raise ValueError(f"{trace.problem_id}: {trace.error}")
            for at, (response, _) in enumerate(incumbents_at(trace, budgets)):
                counts[at, tree.places[tuple(response)]] += 1
        flops = np.array([np.mean([flops_at(trace, budget) for trace in traces]) for budget in budgets])
        draft = file.with_suffix(".tmp.npz")
        np.savez_compressed(draft, counts=counts, flops=flops)
        draft.replace(file)
        return counts, flops

    def sampling_flops(self, laws: Sequence[np.ndarray]) -> float:
        """One sample of laws of policies of this size, without a score."""
        spent = [one.drawing_prompt + law @ one.drawing for one, law in zip(self.scored, laws, strict=True)]
        return float(np.mean(spent))

    def best_of_flops(self, count: int) -> float:
        """Expected FLOPs of drawing and scoring `count` responses."""
        spent = [
            one.drawing_prompt + one.scoring_prompt + count * float(case.policy @ (one.drawing + one.scoring))
            for one, case in zip(self.scored, self.cases, strict=True)
        ]
        return float(np.mean(spent))

    def subject(self) -> str:
        """A sentence on the world."""
        entropies = [-float(case.policy @ case.logp.clip(-1e3)) for case in self.cases]
        sizes = sorted({len(tree.responses) for tree in self.trees})
        return (
            f"{len(self.cases)} prompts, {' or '.join(f'{size:,}' for size in sizes)} responses each; entropy of π "
            f"{min(entropies):.1f} to {max(entropies):.1f} nats, KL(π*‖π) {self.optimum.kl_policy:.2f} on average."
        )


def flops_at(trace: Trace, rounds: int) -> float:
    """What a search had spent after so many rounds; all of it where it made no more than that."""
    spent = [revision.flops for revision in trace.revisions if revision.round < rounds]
    return spent[-1] if spent else trace.cost.flops


def prepare(args: DualityArguments, world: WorldArguments) -> tuple[Policy, Reward, list[Any]]:
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
    return policy, reward, load_problems(names[2], split=args.split, limit=args.limit if args.policy else None)


def chain_settings(args: DualityArguments) -> dict[str, str]:
    """What the chains depend on."""
    keep = ("beta", "max_new_tokens", "chains", "rounds", "point", "step", "seed")
    settings = {name: str(getattr(args, name)) for name in keep}
    if args.policy:
        settings |= {"policy": args.policy, "reward": reward_identity(args.reward), "split": args.split}
        settings |= {**task_settings(args.dataset), "limit": str(args.limit)}
    return settings


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, world, training = parse([DualityArguments, WorldArguments, TrainingArguments], argv)
    study = Study(args, *prepare(args, world))
    folder = Path(args.output_dir)
    claim_settings(folder / "duality.settings.json", chain_settings(args))
    rows = study.drawn() + study.searched(folder / "chains")
    # Without the gradient: the reward of a made world is untrained, and its gradient leads nowhere.
    chains = args.searches(len(study.policy.forbidden))["metropolis"]
    trainer = Trainer(
        folder / "trained",
        training,
        policy=study.policy,
        reward=study.reward,
        problems=[tree.problem for tree in study.trees],
        metropolis=chains,
        seed=args.seed + 1,  # other chains than those that are measured
    )
    rows += study.trained([weights for method in training.methods() for weights in trainer.run(method)])
    command = shlex.join(["python", "recipes/research/duality.py", *argv])
    facts = {"title": args.title, "command": command, "subject": study.subject(), "beta": args.beta}
    found = duality_report.to_dict(rows, study.optimum, facts)
    (folder / "duality.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    duality_report.draw(folder / "duality.png", rows, facts)
    text = duality_report.page(rows, study.optimum, facts)
    (folder / "duality.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
