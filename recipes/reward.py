"""A scalar reward from the policy's own answers, trained so that a search can trust it and follow its gradient.

    accelerate launch recipes/reward.py --config recipes/tiny/reward.yaml
    accelerate launch recipes/reward.py --config recipes/gsm8k/reward.yaml --policy Qwen/Qwen2.5-0.5B-Instruct

Round 0 draws answers of the policy to training problems, labels them and trains. Every round is audited on problems
set apart: ranking and best-of-N, search pressure (with and without gradient), and the gradient itself. As long as the
search turns within the budget asked for, the next round searches against the reward, by best-of-N too, labels what it
kept and trains on. OUT/reward is the reward that can be trusted furthest, with every round's audit in its reward.json;
a search that goes past what was measured warns. Each stage resumes where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import RewardConfig

from nabla_trl.audit.gradient import gradient_audit
from nabla_trl.audit.overoptimization import pressure
from nabla_trl.audit.ranking import audit
from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.cli.parsing import parse, quiet_libraries, run_main
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import load_policy
from nabla_trl.reward_training.card import write_readme
from nabla_trl.reward_training.data import (
    Labelled,
    accepted,
    check_classes,
    draw_samples,
    highest,
    label,
    read_samples,
    write_samples,
)
from nabla_trl.reward_training.implicit import train_implicit
from nabla_trl.reward_training.labels import TokenLabels, has_step_labels
from nabla_trl.reward_training.trainer import RewardOptions, TrainedReward, train_reward
from nabla_trl.rewards.limits import Trust
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import RewardCard, write_card
from nabla_trl.search.config import PRESETS, ReasonerConfig
from nabla_trl.search.generate_traces import search_settings
from nabla_trl.search.loop import solve
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems, task_settings
from nabla_trl.traces.build import versions
from nabla_trl.training.peft import LoraArguments
from nabla_trl.utils.files import write_whole
from nabla_trl.utils.identity import claim_settings
from nabla_trl.utils.locks import hold

BEST = 4  # responses of highest reward that best-of-N adds per problem
LABELS = ("auto", "steps", "outcome")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RewardArguments:
    """Policy, problems and audits. The search is set by the reasoner's options, training by TRL's RewardConfig."""

    policy: str = field(metadata={"help": "hub id or path of the policy, a causal LM"})
    dataset: str = _option("chains", "gsm8k, math500, amc, aime24, aime25, chains, or a .jsonl file to train on")
    split: str = _option("train", "split of the dataset; audits use problems of it that training does not")
    train_limit: int = _option(2000, "training problems")
    samples: int = _option(4, "answers of the policy per training problem")
    labels: str = _option("auto", "steps (which token is the first error), outcome (the answer alone), or auto")
    adversarial_rounds: int = _option(2, "most rounds of searching against the reward and training on")
    round_steps: int = _option(200, "optimiser steps of a round after the first; the first has max_steps")
    search_problems: int = _option(300, "training problems that a round searches on")
    rare_temperature: float = _option(1.5, "temperature of the further answers that a round draws, for rare mistakes")
    audit_problems: int = _option(150, "problems of the audits")
    audit_samples: int = _option(64, "answers per problem of the best-of-N audit: the N asked for")
    audit_rounds: int = _option(32, "rounds of the pressure audit: the budget of search asked for")
    swaps: int = _option(600, "token swaps of the gradient audit")
    points: list[str] = field(
        default_factory=lambda: ["direct", "hard", "mixture:0.5", "direct+mixture:0.5"],
        metadata={"help": "points of the gradient audit, the cheapest first"},
    )
    dtype: str = _option("float32", "weights: float32, bfloat16 or float16")

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(f"labels must be one of {', '.join(LABELS)}, not {self.labels!r}")
        for name in ("train_limit", "samples", "round_steps", "search_problems", "audit_problems", "audit_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.audit_samples < 2 or self.adversarial_rounds < 0:
            raise ValueError("audit_samples must be at least 2, adversarial_rounds not negative")


class Run:
    """One run: its settings, its output folder and its policy."""

    def __init__(
        self,
        args: RewardArguments,
        options: RewardOptions,
        reasoner: ReasonerConfig,
        lora: LoraArguments,
        trainer: RewardConfig,
    ):
        self.args, self.options, self.reasoner, self.lora, self.trainer = args, options, reasoner, lora, trainer
        self.state = PartialState()
        self.folder = Path(trainer.output_dir)
        self.checker = AnswerChecker()
        problems = load_problems(args.dataset, split=args.split, limit=args.train_limit + args.audit_problems)
        problems = [problem for problem in problems if problem.answer]
        # The last ones are for the audits: the first are more likely to have been used before.
        self.problems, self.audited = problems[: -args.audit_problems], problems[-args.audit_problems :]
        if not self.problems:
            raise ValueError(f"{len(problems)} problems with answers leave none to train on: lower audit_problems")
        self.steps = args.labels == "steps" or (args.labels == "auto" and has_step_labels(self.problems))
        if self.steps and not has_step_labels(self.problems):
            raise ValueError(f"{args.dataset} has no step labels: use labels outcome")
        self.base = options.base or args.policy
        self.policy = load_policy(args.policy, dtype=args.dtype, device=str(self.state.device))
        claim_settings(self.folder / "settings.json", self.settings())

    def settings(self) -> dict[str, str]:
        data = {**task_settings(self.args.dataset), "policy": self.args.policy, "dtype": self.args.dtype}
        for option in fields(RewardArguments):
            if option.name not in ("policy", "dataset", "dtype", "adversarial_rounds"):  # more rounds may be added
                data[option.name] = str(getattr(self.args, option.name))
        for part in (self.options, self.lora):
            data |= {name: str(value) for name, value in asdict(part).items()}
        return data | {name: str(getattr(self.trainer, name)) for name in TRAINING} | search_settings(self.reasoner)

    def run(self) -> None:
        rounds: list[dict[str, Any]] = []
        for number in range(self.args.adversarial_rounds + 1):
            data = self.data(number)
            trained = self.train(number, data)
            rounds.append({"round": number, "training": trained} | self.audit(number))
            self.say(_line(rounds[-1]))
            if self.state.is_main_process:
                self.finish(rounds)  # now, so that a later round that fails leaves a reward behind
            if _holds(rounds[-1], self.args):
                break
        self.state.wait_for_everyone()

    # --- data -------------------------------------------------------------------------------------------

    def data(self, number: int) -> list[Labelled]:
        """Labelled responses of the rounds up to this one, those of searches repeated until they are half."""
        drawn = self.label(self.samples(0))
        check_classes(drawn)
        found = [one for earlier in range(1, number + 1) for one in self.label(self.samples(earlier))]
        times = max(1, round(len(drawn) / len(found))) if found else 0
        return drawn + found * times

    def label(self, samples: Sequence[Sample]) -> list[Labelled]:
        return label(
            samples,
            policy=self.policy,
            checker=self.checker,
            candidates=self.reasoner.candidates,
            batch_size=4 * self.reasoner.batch_size,
        )

    def samples(self, number: int) -> list[Sample]:
        """The responses that a round adds, drawn by all processes together and kept on disk."""
        by_id = {problem.id: problem for problem in self.problems}
        files = [self.folder / f"round-{number}.{rank}.jsonl" for rank in range(self.state.num_processes)]
        mine = files[self.state.process_index]
        if not mine.exists():
            mine.parent.mkdir(parents=True, exist_ok=True)
            write_samples(mine, self.search(number) if number else self.draw(number, self.args.samples))
        self.state.wait_for_everyone()
        return [sample for file in files for sample in read_samples(file, by_id)]

    def draw(self, number: int, count: int, temperature: float | None = None) -> list[Sample]:
        """`count` responses to each training problem, at the search's temperature unless told another."""
        begun, sampling = time.perf_counter(), self.reasoner.sampling()
        mine = self._mine(self.problems)
        made = draw_samples(
            mine,
            count,
            policy=self.policy,
            sampling=sampling if temperature is None else replace(sampling, temperature=temperature),
            seed=self.trainer.seed,
            batch_size=4 * self.reasoner.batch_size,
        )
        self.say(f"round {number}: {len(made)} answers to {len(mine)} problems, {time.perf_counter() - begun:.0f} s")
        return made

    def search(self, number: int) -> list[Sample]:
        """What searches against the last round's reward end up with: best-of-N, and ours with and without gradient.

        And one response per training problem at a higher temperature: the rare mistakes among which best-of-N picks.
        """
        begun = time.perf_counter()
        reward = self.reward(number - 1)
        # Read, not asked for: `audit` waits for all processes, and some may have drawn their share already.
        audited = _read(self.folder / f"round-{number - 1}.audit.json")
        reward.point = audited["gradient"]["best"] or reward.point
        first = (number - 1) * self.args.search_problems % len(self.problems)
        some = self._mine((self.problems[first:] + self.problems[:first])[: self.args.search_problems])
        config = replace(self.reasoner, rounds=self.args.audit_rounds, patience=0, rollouts=0, flops=0.0)
        pool = draw_pool(
            some,
            self.args.audit_samples,
            policy=self.policy,
            reward=reward,
            sampling=self.reasoner.sampling(),
            seed=self.trainer.seed + number,
            batch_size=4 * self.reasoner.batch_size,
        )
        found = highest(pool, BEST) + self.draw(number, 1, self.args.rare_temperature)
        for one in (config, config.control()):
            traces = solve(some, policy=self.policy, reward=reward, config=one, seed=number)
            found += accepted(traces, {problem.id: problem for problem in some})
        self.say(f"round {number}: searches kept {len(found)} responses, {time.perf_counter() - begun:.0f} s")
        return found

    def _mine(self, problems: Sequence[Problem]) -> list[Problem]:
        return list(problems[self.state.process_index :: self.state.num_processes])

    # --- training and audits ----------------------------------------------------------------------------

    def train(self, number: int, data: list[Labelled]) -> list[dict[str, Any]]:
        """Train the round's members; what each training run did."""
        note, output = self.folder / f"round-{number}.train.json", self._round(number)
        if not note.exists():
            trained = [self._train_member(number, data, member) for member in self._members(output)]
            if self.state.is_main_process:
                write_card(output, self._card())
            self._write(note, [asdict(one) for one in trained])
        self.state.wait_for_everyone()
        return _read(note)

    def _train_member(self, number: int, data: list[Labelled], output: Path) -> TrainedReward:
        before = self._round(number - 1) / output.relative_to(self._round(number))
        config = replace(
            self.trainer,
            output_dir=str(self.folder / "trainer" / output.relative_to(self.folder)),
            max_steps=self.args.round_steps if number else self.trainer.max_steps,
            seed=self.trainer.seed + self._members(self._round(number)).index(output),
        )
        common: dict[str, Any] = {"policy": self.policy, "lora": self.lora, "config": config, "dtype": self.args.dtype}
        if self.options.kind == "implicit":
            return train_implicit(
                self.base,
                data,
                output,
                beta=self.options.implicit_beta,
                pairs_per_problem=self.options.pairs_per_problem,
                **common,
            )
        return train_reward(
            str(before) if number else self.base,
            data,
            output,
            options=self.options,
            labels=TokenLabels(self.policy) if self.steps else None,
            min_p=self.reasoner.candidate_min_p,
            grow=number == 0,
            **common,
        )

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _members(self, folder: Path) -> list[Path]:
        """A round's folder, or one in it for each member of an ensemble."""
        count = self.options.members
        return [folder] if count == 1 else [folder / f"member-{index}" for index in range(count)]

    def _card(self, **audited: Any) -> RewardCard:
        common = {"base": self.base, "policy": self.args.policy, **audited}
        if self.options.kind == "implicit":
            return RewardCard(kind="implicit", scale=self.options.implicit_beta, reference=self.base, **common)
        if self.options.members > 1:
            members = [folder.name for folder in self._members(self.folder)]
            return RewardCard(kind="ensemble", members=members, caution=self.options.caution, **common)
        return RewardCard(kind="scalar", **common)

    def reward(self, number: int) -> Reward:
        return load_reward(
            str(self._round(number)),
            policy=self.policy,
            dtype=self.args.dtype,
            device=str(self.state.device),
            batch_size=4 * self.reasoner.batch_size,
        )

    def audit(self, number: int) -> dict[str, Any]:
        """Ranking, pressure and gradient on problems that nothing is trained on; by the main process."""
        note = self.folder / f"round-{number}.audit.json"
        if self.state.is_main_process and not note.exists():
            self._write(note, self._audit(self.reward(number)))
        self.state.wait_for_everyone()
        return _read(note)

    def _audit(self, reward: Reward) -> dict[str, Any]:
        sampling, rows = self.reasoner.sampling(), 4 * self.reasoner.batch_size
        common: dict[str, Any] = {"policy": self.policy, "reward": reward}
        gradient = gradient_audit(
            self.audited,
            points=self.args.points,
            sampling=sampling,
            samples=4,
            swaps=self.args.swaps,
            candidates=self.reasoner.candidates,
            min_p=self.reasoner.candidate_min_p,
            lam=self.reasoner.lam,
            batch_size=rows,
            **common,
        )
        reward.point = gradient.best or reward.point  # the search is audited as it is advised
        pool = draw_pool(
            self.audited, self.args.audit_samples, sampling=sampling, batch_size=rows, seed=self.trainer.seed, **common
        )
        ranking = audit(pool, self.checker)
        config = replace(self.reasoner, rounds=self.args.audit_rounds)
        pressed = pressure(self.audited, config=config, checker=self.checker, best_of_n=ranking, **common)
        return {"gradient": gradient.to_dict(), "ranking": ranking.to_dict(), "pressure": pressed.to_dict()}

    def finish(self, rounds: list[dict[str, Any]]) -> None:
        scratch, final = self.folder / "reward.tmp", self.folder / "reward"
        shutil.rmtree(scratch, ignore_errors=True)
        best = max(rounds, key=_trusted)
        shutil.copytree(self._round(best["round"]), scratch)
        trust = Trust.from_dict(best["pressure"]["trust"])
        settings = self.settings() | {f"version of {name}": value for name, value in versions().items()}
        point = best["gradient"]["best"]
        card = self._card(trust=trust, point=point, rounds=rounds, settings=settings)
        write_card(scratch, card)
        write_readme(scratch, card)
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
        self.say(
            f"reward: {final}, trusted up to {trust.samples} samples and {trust.rounds} rounds; gradient: {point}"
        )

    def _write(self, file: Path, content: Any) -> None:
        if self.state.is_main_process:
            write_whole(file, json.dumps(content, indent=1))

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


# TRL's options that decide what a reward becomes.
TRAINING = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "center_rewards_coefficient",
    "seed",
)


def _holds(found: dict[str, Any], args: RewardArguments) -> bool:
    """Neither best-of-N nor a search, with or without gradient, turns within the budget asked for."""
    curves = found["pressure"]["curves"].values()
    return found["ranking"]["trusted_samples"] >= _largest(found["ranking"]["best_of_n"]) and all(
        curve["turn"]["trusted"] >= args.audit_rounds for curve in curves
    )


def _trusted(found: dict[str, Any]) -> tuple[int, int, int]:
    """How far a round's reward can be trusted; of equals the later."""
    trust = found["pressure"]["trust"]
    return trust["rounds"], trust["samples"], found["round"]


def _largest(curve: dict[str, Any]) -> int:
    return max(int(budget) for budget in curve)


def _line(found: dict[str, Any]) -> str:
    ranking, gradient = found["ranking"], found["gradient"]
    return (
        f"round {found['round']}: {ranking['verdict']}; search: {found['pressure']['verdict']}; "
        f"gradient: {gradient['verdict']}"
    )


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main(argv: Sequence[str]) -> None:
    # First of all: whatever made a state before would choose the back end.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    asked, state = int(os.environ.get("WORLD_SIZE", "1")), PartialState()
    if state.num_processes != asked:
        raise ValueError(f"{asked} processes were asked for, but {state.num_processes} started")
    quiet_libraries()
    parts = parse([RewardArguments, RewardOptions, ReasonerConfig, LoraArguments, RewardConfig], argv, presets=PRESETS)
    run = Run(*parts)
    with ExitStack() as held:
        with state.main_process_first():
            held.enter_context(hold(run.folder, state.process_index))
        held.enter_context(run.checker)
        run.run()


if __name__ == "__main__":
    sys.exit(run_main(main))
