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

from nabla_trl.audit.gradient import audit_gradient
from nabla_trl.audit.overoptimization import audit_overoptimization
from nabla_trl.audit.ranking import audit_ranking
from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import load_policy
from nabla_trl.reward_training.card import write_reward_readme
from nabla_trl.reward_training.data import (
    LabeledResponse,
    check_both_classes,
    collect_accepted_responses,
    label_responses,
    read_samples,
    sample_responses,
    select_highest_reward,
    write_samples,
)
from nabla_trl.reward_training.implicit import train_implicit_reward
from nabla_trl.reward_training.labels import TokenLabeler, has_step_labels
from nabla_trl.reward_training.trainer import RewardOptions, RewardTrainingStats, train_reward
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import RewardManifest, write_manifest
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.generate_traces import get_search_settings
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.traces.build import get_package_versions
from nabla_trl.training.peft import LoraArguments
from nabla_trl.utils.fields import option
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.identity import claim_settings
from nabla_trl.utils.locks import lock_folder

NUM_BEST_RESPONSES = 4  # responses of highest reward that best-of-N adds per problem
LABEL_CHOICES = ("auto", "steps", "outcome")


@dataclass
class RewardArguments:
    """Policy, problems and audits. The search is set by the reasoner's options, training by TRL's RewardConfig."""

    policy: str = field(metadata={"help": "hub id or path of the policy, a causal LM"})
    dataset: str = option(
        "digit_chains", "gsm8k, math500, amc, aime24, aime25, digit_chains, or a .jsonl file to train on"
    )
    split: str = option("train", "split of the dataset; audits use problems of it that training does not")
    max_train_problems: int = option(2000, "training problems")
    samples_per_problem: int = option(4, "answers of the policy per training problem")
    labels: str = option("auto", "steps (which token is the first error), outcome (the answer alone), or auto")
    max_adversarial_rounds: int = option(2, "most rounds of searching against the reward and training on")
    max_steps_per_round: int = option(200, "optimiser steps of a round after the first; the first has max_steps")
    max_search_problems: int = option(300, "training problems that a round searches on")
    extra_sample_temperature: float = option(
        1.5, "temperature of the further answers that a round draws, for rare mistakes"
    )
    max_audit_problems: int = option(150, "problems of the audits")
    audit_samples: int = option(64, "answers per problem of the best-of-N audit: the N asked for")
    max_audit_rounds: int = option(32, "rounds of the pressure audit: the budget of search asked for")
    num_swaps: int = option(600, "token swaps of the gradient audit")
    audit_gradient_at: list[str] = field(
        default_factory=lambda: ["direct", "hard", "mixture:0.5", "direct+mixture:0.5"],
        metadata={"help": "points of the gradient audit, the cheapest first"},
    )
    dtype: str = option("float32", "weights: float32, bfloat16 or float16")

    def __post_init__(self) -> None:
        if self.labels not in LABEL_CHOICES:
            raise ValueError(f"labels must be one of {', '.join(LABEL_CHOICES)}, not {self.labels!r}")
        for name in ("train_limit", "samples", "round_steps", "search_problems", "audit_problems", "audit_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.audit_samples < 2 or self.max_adversarial_rounds < 0:
            raise ValueError("audit_samples must be at least 2, adversarial_rounds not negative")


class RewardRun:
    """One run: its settings, its output folder and its policy."""

    def __init__(
        self,
        args: RewardArguments,
        reward_options: RewardOptions,
        search_config: SearchConfig,
        lora_arguments: LoraArguments,
        trainer_config: RewardConfig,
    ):
        self.args, self.reward_options, self.search_config, self.lora_arguments, self.trainer_config = (
            args,
            reward_options,
            search_config,
            lora_arguments,
            trainer_config,
        )
        self.state = PartialState()
        self.output_dir = Path(trainer_config.output_dir)
        self.checker = AnswerChecker()
        problems = load_problems(
            args.dataset, split=args.split, max_problems=args.max_train_problems + args.max_audit_problems
        )
        problems = [problem for problem in problems if problem.answer]
        # The last ones are for the audits: the first are more likely to have been used before.
        self.train_problems, self.audit_problems = (
            problems[: -args.max_audit_problems],
            problems[-args.max_audit_problems :],
        )
        if not self.train_problems:
            raise ValueError(f"{len(problems)} problems with answers leave none to train on: lower audit_problems")
        self.use_step_labels = args.labels == "steps" or (
            args.labels == "auto" and has_step_labels(self.train_problems)
        )
        if self.use_step_labels and not has_step_labels(self.train_problems):
            raise ValueError(f"{args.dataset} has no step labels: use labels outcome")
        self.base_model = reward_options.base_model or args.policy
        self.policy = load_policy(args.policy, dtype=args.dtype, device=str(self.state.device))
        claim_settings(self.output_dir / "settings.json", self.get_settings())

    def get_settings(self) -> dict[str, str]:
        data = {**get_task_settings(self.args.dataset), "policy": self.args.policy, "dtype": self.args.dtype}
        for argument in fields(RewardArguments):
            if argument.name not in ("policy", "dataset", "dtype", "adversarial_rounds"):  # more rounds may be added
                data[argument.name] = str(getattr(self.args, argument.name))
        for part in (self.reward_options, self.lora_arguments):
            data |= {name: str(value) for name, value in asdict(part).items()}
        return (
            data
            | {name: str(getattr(self.trainer_config, name)) for name in TRAINER_SETTINGS}
            | get_search_settings(self.search_config)
        )

    def run_rounds(self) -> None:
        rounds: list[dict[str, Any]] = []
        for number in range(self.args.max_adversarial_rounds + 1):
            data = self.collect_labeled_responses(number)
            trained = self.train_round(number, data)
            rounds.append({"round": number, "training": trained} | self.audit_round(number))
            self.print_once(_format_round(rounds[-1]))
            if self.state.is_main_process:
                self.export_best_reward(rounds)  # now, so that a later round that fails leaves a reward behind
            if _passes_audit(rounds[-1], self.args):
                break
        self.state.wait_for_everyone()

    # --- data -------------------------------------------------------------------------------------------

    def collect_labeled_responses(self, number: int) -> list[LabeledResponse]:
        """Labelled responses of the rounds up to this one, those of searches repeated until they are half."""
        drawn = self.label_samples(self.load_or_draw_samples(0))
        check_both_classes(drawn)
        found = [
            one for earlier in range(1, number + 1) for one in self.label_samples(self.load_or_draw_samples(earlier))
        ]
        times = max(1, round(len(drawn) / len(found))) if found else 0
        return drawn + found * times

    def label_samples(self, samples: Sequence[Sample]) -> list[LabeledResponse]:
        return label_responses(
            samples,
            policy=self.policy,
            checker=self.checker,
            top_k_candidates=self.search_config.top_k_candidates,
            batch_size=4 * self.search_config.batch_size,
        )

    def load_or_draw_samples(self, number: int) -> list[Sample]:
        """The responses that a round adds, drawn by all processes together and kept on disk."""
        by_id = {problem.id: problem for problem in self.train_problems}
        files = [self.output_dir / f"round-{number}.{rank}.jsonl" for rank in range(self.state.num_processes)]
        mine = files[self.state.process_index]
        if not mine.exists():
            mine.parent.mkdir(parents=True, exist_ok=True)
            write_samples(
                mine,
                self.search_against_reward(number)
                if number
                else self.draw_round_samples(number, self.args.samples_per_problem),
            )
        self.state.wait_for_everyone()
        return [sample for file in files for sample in read_samples(file, by_id)]

    def draw_round_samples(
        self, number: int, samples_per_problem: int, temperature: float | None = None
    ) -> list[Sample]:
        """`count` responses to each training problem, at the search's temperature unless told another."""
        begun, sampling = time.perf_counter(), self.search_config.get_sampling()
        mine = self._select_process_share(self.train_problems)
        made = sample_responses(
            mine,
            samples_per_problem,
            policy=self.policy,
            sampling=sampling if temperature is None else replace(sampling, temperature=temperature),
            seed=self.trainer_config.seed,
            batch_size=4 * self.search_config.batch_size,
        )
        self.print_once(
            f"round {number}: {len(made)} answers to {len(mine)} problems, {time.perf_counter() - begun:.0f} s"
        )
        return made

    def search_against_reward(self, number: int) -> list[Sample]:
        """What searches against the last round's reward end up with: best-of-N, and ours with and without gradient.

        And one response per training problem at a higher temperature: the rare mistakes among which best-of-N picks.
        """
        begun = time.perf_counter()
        reward = self.load_round_reward(number - 1)
        # Read, not asked for: `audit` waits for all processes, and some may have drawn their share already.
        audited = _read_json(self.output_dir / f"round-{number - 1}.audit.json")
        reward.gradient_at = audited["gradient"]["best"] or reward.gradient_at
        first = (number - 1) * self.args.max_search_problems % len(self.train_problems)
        some = self._select_process_share(
            (self.train_problems[first:] + self.train_problems[:first])[: self.args.max_search_problems]
        )
        config = replace(
            self.search_config, max_rounds=self.args.max_audit_rounds, patience=0, max_rollouts=0, max_flops=0.0
        )
        pool = draw_pool(
            some,
            self.args.audit_samples,
            policy=self.policy,
            reward=reward,
            sampling=self.search_config.get_sampling(),
            seed=self.trainer_config.seed + number,
            batch_size=4 * self.search_config.batch_size,
        )
        found = select_highest_reward(pool, NUM_BEST_RESPONSES) + self.draw_round_samples(
            number, 1, self.args.extra_sample_temperature
        )
        for one in (config, config.with_no_gradient()):
            traces = run_search(some, policy=self.policy, reward=reward, config=one, seed=number)
            found += collect_accepted_responses(traces, {problem.id: problem for problem in some})
        self.print_once(f"round {number}: searches kept {len(found)} responses, {time.perf_counter() - begun:.0f} s")
        return found

    def _select_process_share(self, problems: Sequence[Problem]) -> list[Problem]:
        return list(problems[self.state.process_index :: self.state.num_processes])

    # --- training and audits ----------------------------------------------------------------------------

    def train_round(self, number: int, data: list[LabeledResponse]) -> list[dict[str, Any]]:
        """Train the round's members; what each training run did."""
        note, output = self.output_dir / f"round-{number}.train.json", self._get_round_dir(number)
        if not note.exists():
            trained = [self._train_member(number, data, member) for member in self._list_member_dirs(output)]
            if self.state.is_main_process:
                write_manifest(output, self._make_card())
            self._write_json(note, [asdict(one) for one in trained])
        self.state.wait_for_everyone()
        return _read_json(note)

    def _train_member(self, number: int, data: list[LabeledResponse], output: Path) -> RewardTrainingStats:
        before = self._get_round_dir(number - 1) / output.relative_to(self._get_round_dir(number))
        config = replace(
            self.trainer_config,
            output_dir=str(self.output_dir / "trainer" / output.relative_to(self.output_dir)),
            max_steps=self.args.max_steps_per_round if number else self.trainer_config.max_steps,
            seed=self.trainer_config.seed + self._list_member_dirs(self._get_round_dir(number)).index(output),
        )
        common: dict[str, Any] = {
            "policy": self.policy,
            "lora": self.lora_arguments,
            "config": config,
            "dtype": self.args.dtype,
        }
        if self.reward_options.kind == "implicit":
            return train_implicit_reward(
                self.base_model,
                data,
                output,
                beta=self.reward_options.implicit_beta,
                pairs_per_problem=self.reward_options.pairs_per_problem,
                **common,
            )
        return train_reward(
            str(before) if number else self.base_model,
            data,
            output,
            options=self.reward_options,
            token_labels=TokenLabeler(self.policy) if self.use_step_labels else None,
            min_p=self.search_config.candidate_min_p,
            add_layers=number == 0,
            **common,
        )

    def _get_round_dir(self, number: int) -> Path:
        return self.output_dir / f"round-{number}"

    def _list_member_dirs(self, folder: Path) -> list[Path]:
        """A round's folder, or one in it for each member of an ensemble."""
        count = self.reward_options.num_members
        return [folder] if count == 1 else [folder / f"member-{index}" for index in range(count)]

    def _make_card(self, **audited: Any) -> RewardManifest:
        common = {"base": self.base_model, "policy": self.args.policy, **audited}
        if self.reward_options.kind == "implicit":
            return RewardManifest(
                kind="implicit", scale=self.reward_options.implicit_beta, reference_model=self.base_model, **common
            )
        if self.reward_options.num_members > 1:
            members = [folder.name for folder in self._list_member_dirs(self.output_dir)]
            return RewardManifest(
                kind="ensemble", members=members, uncertainty_penalty=self.reward_options.uncertainty_penalty, **common
            )
        return RewardManifest(kind="scalar", **common)

    def load_round_reward(self, number: int) -> Reward:
        return load_reward(
            str(self._get_round_dir(number)),
            policy=self.policy,
            dtype=self.args.dtype,
            device=str(self.state.device),
            batch_size=4 * self.search_config.batch_size,
        )

    def audit_round(self, number: int) -> dict[str, Any]:
        """Ranking, pressure and gradient on problems that nothing is trained on; by the main process."""
        note = self.output_dir / f"round-{number}.audit.json"
        if self.state.is_main_process and not note.exists():
            self._write_json(note, self._audit_reward(self.load_round_reward(number)))
        self.state.wait_for_everyone()
        return _read_json(note)

    def _audit_reward(self, reward: Reward) -> dict[str, Any]:
        sampling, rows = self.search_config.get_sampling(), 4 * self.search_config.batch_size
        common: dict[str, Any] = {"policy": self.policy, "reward": reward}
        gradient = audit_gradient(
            self.audit_problems,
            gradient_at=self.args.audit_gradient_at,
            sampling=sampling,
            samples_per_problem=4,
            num_swaps=self.args.num_swaps,
            top_k_candidates=self.search_config.top_k_candidates,
            candidate_min_p=self.search_config.candidate_min_p,
            reward_weight=self.search_config.reward_weight,
            batch_size=rows,
            **common,
        )
        reward.gradient_at = gradient.best_gradient_at or reward.gradient_at  # the search is audited as it is advised
        pool = draw_pool(
            self.audit_problems,
            self.args.audit_samples,
            sampling=sampling,
            batch_size=rows,
            seed=self.trainer_config.seed,
            **common,
        )
        ranking = audit_ranking(pool, self.checker)
        config = replace(self.search_config, max_rounds=self.args.max_audit_rounds)
        pressed = audit_overoptimization(
            self.audit_problems,
            config=config,
            checker=self.checker,
            validated_samples=ranking.validated_samples,
            **common,
        )
        return {"gradient": gradient.to_dict(), "ranking": ranking.to_dict(), "pressure": pressed.to_dict()}

    def export_best_reward(self, rounds: list[dict[str, Any]]) -> None:
        scratch, final = self.output_dir / "reward.tmp", self.output_dir / "reward"
        shutil.rmtree(scratch, ignore_errors=True)
        best = max(rounds, key=_rank_validated_limits)
        shutil.copytree(self._get_round_dir(best["round"]), scratch)
        trust = ValidatedLimits.from_dict(best["pressure"]["trust"])
        settings = self.get_settings() | {
            f"version of {name}": value for name, value in get_package_versions().items()
        }
        point = best["gradient"]["best"]
        card = self._make_card(trust=trust, point=point, rounds=rounds, settings=settings)
        write_manifest(scratch, card)
        write_reward_readme(scratch, card)
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
        self.print_once(
            f"reward: {final}, trusted up to {trust.max_samples} samples and {trust.max_rounds} rounds; gradient: {point}"
        )

    def _write_json(self, file: Path, content: Any) -> None:
        if self.state.is_main_process:
            write_atomic(file, json.dumps(content, indent=1))

    def print_once(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


# TRL's options that decide what a reward becomes.
TRAINER_SETTINGS = (
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


def _passes_audit(round_result: dict[str, Any], args: RewardArguments) -> bool:
    """Neither best-of-N nor a search, with or without gradient, turns within the budget asked for."""
    curves = round_result["pressure"]["curves"].values()
    return round_result["ranking"]["trusted_samples"] >= _get_largest_budget(
        round_result["ranking"]["best_of_n"]
    ) and all(curve["turn"]["trusted"] >= args.max_audit_rounds for curve in curves)


def _rank_validated_limits(round_result: dict[str, Any]) -> tuple[int, int, int]:
    """How far a round's reward can be trusted; of equals the later."""
    trust = round_result["pressure"]["trust"]
    return trust["rounds"], trust["samples"], round_result["round"]


def _get_largest_budget(curve: dict[str, Any]) -> int:
    return max(int(budget) for budget in curve)


def _format_round(round_result: dict[str, Any]) -> str:
    ranking, gradient = round_result["ranking"], round_result["gradient"]
    return (
        f"round {round_result['round']}: {ranking['verdict']}; search: {round_result['pressure']['verdict']}; "
        f"gradient: {gradient['verdict']}"
    )


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main(argv: Sequence[str]) -> None:
    # First of all: whatever made a state before would choose the back end.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    asked, state = int(os.environ.get("WORLD_SIZE", "1")), PartialState()
    if state.num_processes != asked:
        raise ValueError(f"{asked} processes were asked for, but {state.num_processes} started")
    quiet_libraries()
    parts = parse_dataclasses(
        [RewardArguments, RewardOptions, SearchConfig, LoraArguments, RewardConfig], argv, presets=PRESETS
    )
    run = RewardRun(*parts)
    with ExitStack() as held:
        with state.main_process_first():
            held.enter_context(lock_folder(run.output_dir, state.process_index))
        held.enter_context(run.checker)
        run.run_rounds()


if __name__ == "__main__":
    sys.exit(run_main(main))
