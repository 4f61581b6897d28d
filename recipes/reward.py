"""Train a scalar reward from the policy's own answers that a search can rely on, with a useful gradient.

    accelerate launch recipes/reward.py --config recipes/tiny/reward.yaml
    accelerate launch recipes/reward.py --config recipes/gsm8k/reward.yaml --policy Qwen/Qwen2.5-0.5B-Instruct

Round 0 samples answers of the policy to training problems, labels them and trains. Every round is audited on separate
problems: ranking and best-of-N, over-optimization by searches (with and without gradient), and the gradient itself.
While a search over-optimizes the reward within the requested budget, the next round searches against the reward, also
by best-of-N, labels the accepted responses and trains on them. OUT/reward is the reward with the largest validated
limits. Its reward.json holds the audits of all rounds, and a search beyond these limits warns. Each stage resumes
where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
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
from nabla_trl.cli.launch import DEFAULT_STALL_MINUTES, STALL_MINUTES_HELP, check_stall_minutes, watch_for_stalls
from nabla_trl.cli.parsing import Parser, UsageError, quiet_libraries, run_main
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import load_policy, set_trust_remote_code
from nabla_trl.planning.preflight import (
    check_memory,
    check_model_weights,
    check_output_dir,
    collect_model_faults,
    read_model_config,
)
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
from nabla_trl.reward_training.head_trainer import train_state_head
from nabla_trl.reward_training.implicit import train_implicit_reward
from nabla_trl.reward_training.labels import TokenLabeler, has_step_labels
from nabla_trl.reward_training.trainer import RewardOptions, RewardTrainingStats, train_reward
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import NO_REFERENCE, RewardManifest, write_manifest
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem, check_disjoint
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.tasks.templates import use_recorded_date
from nabla_trl.traces.build import get_package_versions
from nabla_trl.training.peft import LoraArguments, check_precision
from nabla_trl.training.reporting import check_reporting
from nabla_trl.training.trainers import check_seeds
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.identity import check_settings, claim_settings
from nabla_trl.utils.interrupts import end_with_launcher
from nabla_trl.utils.locks import lock_folder
from nabla_trl.utils.progress import announce

NUM_BEST_RESPONSES = 4  # responses of highest reward that best-of-N adds per problem
AUDIT_SAMPLES_PER_PROBLEM = 4  # of the gradient audit
PROBLEMS_PER_SAMPLES_FILE = 64  # after which the answers of round 0 are on disk
# What the answers of round 0 depend on, beside the data.
SAMPLE_SETTINGS = ("policy", "split", "max_train_problems", "max_audit_problems", "samples_per_problem", "dtype")
LABEL_CHOICES = ("auto", "steps", "outcome")


@dataclass
class RewardArguments:
    """Policy, problems and audits. SearchConfig sets the search, TRL's RewardConfig the training."""

    policy: str = required_option("hub id or path of the policy, a causal LM")
    dataset: str = option(
        "digit_chains", "problems to train on: gsm8k, math500, amc, aime24, aime25, digit_chains or a .jsonl file"
    )
    split: str = option("train", "split of the dataset. Audits use problems of it that training does not use")
    max_train_problems: int = option(2000, "training problems")
    samples_per_problem: int = option(4, "answers of the policy per training problem")
    samples_dir: str = option(
        "", "folder with the answers of round 0, which rewards of several kinds may share (default: output_dir)"
    )
    labels: str = option(
        "auto",
        "steps: label every token as correct or wrong. outcome: label the answer alone. auto: steps where the task "
        "has step labels, else outcome",
    )
    max_adversarial_rounds: int = option(2, "most rounds that search against the reward and train on the result")
    max_steps_per_round: int = option(200, "optimizer steps of a round after the first. The first has max_steps")
    max_search_problems: int = option(300, "training problems that a round searches on")
    extra_sample_temperature: float = option(
        1.5, "sampling temperature of one more answer per problem and round. High values show rare mistakes"
    )
    audit_dataset: str = option("", "problems of the audits (default: the last ones of dataset)")
    max_audit_problems: int = option(150, "problems of the audits")
    audit_samples: int = option(64, "answers per problem of the best-of-N audit, and the largest N to validate")
    max_audit_rounds: int = option(32, "rounds of the over-optimization audit, and the largest number to validate")
    num_swaps: int = option(600, "token swaps of the gradient audit")
    audit_gradient_at: list[str] = option(
        ["direct", "hard", "mixture:0.5", "direct+mixture:0.5"],
        "gradients to audit, the cheapest first: direct, hard, mixture:A or direct+ one of these",
    )
    dtype: str = option("float32", "of the weights: float32, bfloat16 or float16")
    stall_minutes: float = option(DEFAULT_STALL_MINUTES, STALL_MINUTES_HELP)

    def __post_init__(self) -> None:
        checks = Checks()
        checks.call(check_stall_minutes, self.stall_minutes)
        checks.require_choice(self, labels=LABEL_CHOICES)
        checks.require_minimum(self, 1, "max_train_problems", "max_search_problems", "max_audit_problems")
        checks.require_minimum(self, 1, "samples_per_problem", "max_steps_per_round", "max_audit_rounds")
        checks.require_minimum(self, 2, "audit_samples")
        checks.require(self.max_adversarial_rounds >= 0, "max_adversarial_rounds must not be negative")
        checks.raise_faults()


class RewardRun:
    """One run: its options, its output folder and its policy.

    Args:
        checks: what is wrong with the options already. Everything else that is wrong is added, and all of it raised,
            before the policy is loaded or anything is written.
    """

    def __init__(
        self,
        args: RewardArguments,
        reward_options: RewardOptions,
        search_config: SearchConfig,
        lora_arguments: LoraArguments,
        trainer_config: RewardConfig,
        checks: Checks,
    ):
        self.args, self.reward_options, self.search_config = args, reward_options, search_config
        self.lora_arguments, self.trainer_config = lora_arguments, trainer_config
        self.state = PartialState()
        self.output_dir = Path(trainer_config.output_dir or "")
        self.samples_dir = Path(args.samples_dir or self.output_dir)
        self.checker = AnswerChecker()
        # Best-of-N and scoring take four times as many responses at once as the search has problems.
        self.batch_size = 4 * search_config.batch_size
        self.base_model = reward_options.base_model or args.policy
        set_trust_remote_code(trainer_config.trust_remote_code)
        self.train_problems: list[Problem] = []
        self.audit_problems: list[Problem] = []
        self.use_step_labels = False
        checks.call(use_recorded_date, self.output_dir)
        checks.call(self._load_problems)
        self._collect_faults(checks)
        checks.raise_faults(UsageError)
        with announce(f"loading the policy {args.policy}"):
            self.policy = load_policy(args.policy, dtype=args.dtype, device=str(self.state.device))
        for file, settings in self._collect_settings().items():
            claim_settings(file, settings)

    def _load_problems(self) -> None:
        """Load the problems of the training and of the audits.

        Raises:
            ValueError: they cannot be read, overlap, leave none to train on, or have no step labels.
        """
        args = self.args
        num_audit_problems = 0 if args.audit_dataset else args.max_audit_problems
        problems = load_problems(
            args.dataset, split=args.split, max_problems=args.max_train_problems + num_audit_problems
        )
        problems = [problem for problem in problems if problem.answer]
        # The audits take the last problems: the first ones are more likely to have been used before.
        self.train_problems = problems[: max(0, len(problems) - num_audit_problems)]
        self.audit_problems = problems[len(self.train_problems) :]
        if args.audit_dataset:
            others = load_problems(args.audit_dataset, split=args.split, max_problems=args.max_audit_problems)
            self.audit_problems = [problem for problem in others if problem.answer]
            check_disjoint(self.train_problems, self.audit_problems)
        if not self.train_problems:
            raise ValueError(f"{len(problems)} problems with answers leave none to train on: lower max_audit_problems")
        self.use_step_labels = args.labels == "steps" or (
            args.labels == "auto" and has_step_labels(self.train_problems)
        )
        if self.use_step_labels and not has_step_labels(self.train_problems):
            raise ValueError(f"{args.dataset} has no step labels: use labels outcome")

    def _collect_faults(self, checks: Checks) -> None:
        """Collect what would stop the run later. Nothing is loaded or written."""
        args, config = self.args, self.trainer_config
        with checks.collect():
            collect_model_faults(
                checks,
                policy=args.policy,
                reward="",
                dtype=args.dtype,
                device=str(self.state.device),
                problems=[*self.train_problems[:50], *self.audit_problems[:50]],
                max_new_tokens=self.search_config.max_new_tokens,
            )
        if self.base_model != args.policy:
            with checks.collect():
                read_model_config(self.base_model)
                check_model_weights(self.base_model)
        for folder in {self.output_dir, self.samples_dir}:
            checks.call(check_output_dir, folder)
        checks.call(check_seeds, config, num_derived=self.reward_options.num_members)
        if self.reward_options.kind != "head":  # a head is float32, and reads states of any type
            checks.call(check_precision, self.reward_options.tuning, args.dtype, config)
        if self.state.is_main_process:
            checks.call(check_reporting, config)
        if not checks.faults:
            checks.call(check_memory, [args.policy], dtype=args.dtype, device=str(self.state.device))
            for file, settings in self._collect_settings().items():
                checks.call(check_settings, file, settings)

    def _collect_settings(self) -> dict[Path, dict[str, str]]:
        """Return the settings that the files of the output folder, and shared answers of round 0, depend on."""
        args, files = self.args, {self.output_dir / "settings.json": self.get_settings()}
        if args.samples_dir:
            sampling = asdict(self.search_config.get_sampling()) | {
                name: getattr(args, name) for name in SAMPLE_SETTINGS
            }
            facts = {name: str(value) for name, value in sampling.items()} | {"seed": str(self.trainer_config.seed)}
            files[self.samples_dir / "samples.json"] = get_task_settings(args.dataset) | facts
        return files

    def get_settings(self) -> dict[str, str]:
        """Return the options that the result depends on."""
        options = asdict(self.args)
        del options["dataset"]  # get_task_settings names it
        del options["stall_minutes"]
        del options["samples_dir"]
        del options["max_adversarial_rounds"]  # a finished run may get more rounds
        options |= asdict(self.reward_options) | asdict(self.lora_arguments)
        options |= {name: getattr(self.trainer_config, name) for name in TRAINER_SETTINGS}
        settings = {name: str(value) for name, value in options.items()}
        return get_task_settings(self.args.dataset) | settings | self.search_config.get_settings()

    def run_rounds(self) -> None:
        """Train and audit round after round, until a reward is valid for the requested budgets."""
        rounds: list[dict[str, Any]] = []
        for number in range(self.args.max_adversarial_rounds + 1):
            stats = self.train_round(number, self.collect_labeled_responses(number))
            rounds.append({"round": number, "training": stats} | self.audit_round(number))
            self.print_once(_format_round(rounds[-1]))
            if self.state.is_main_process:
                self.export_best_reward(rounds)  # now, so that a later round that fails leaves a reward behind
            if _passes_audit(rounds[-1], self.args):
                break
        self.state.wait_for_everyone()

    # --- data -------------------------------------------------------------------------------------------

    def collect_labeled_responses(self, number: int) -> list[LabeledResponse]:
        """Return the labeled responses of all rounds up to this one. Those of searches are repeated to be half."""
        sampled = self.label_samples(self.load_or_draw_samples(0))
        check_both_classes(sampled)
        adversarial = [
            response
            for earlier in range(1, number + 1)
            for response in self.label_samples(self.load_or_draw_samples(earlier))
        ]
        repeats = max(1, round(len(sampled) / len(adversarial))) if adversarial else 0
        return sampled + adversarial * repeats

    def label_samples(self, samples: Sequence[Sample]) -> list[LabeledResponse]:
        return label_responses(
            samples,
            policy=self.policy,
            checker=self.checker,
            # Only mixtures are made of candidates. Heads and implicit rewards read the tokens alone.
            top_k_candidates=self.search_config.top_k_candidates if self.reward_options.kind == "scalar" else 0,
            batch_size=self.batch_size,
        )

    def load_or_draw_samples(self, number: int) -> list[Sample]:
        """Return the responses that a round adds. All processes draw them together and keep them on disk."""
        by_id = {problem.id: problem for problem in self.train_problems}
        folder = self.output_dir if number else self.samples_dir
        files = [folder / f"round-{number}.{rank}.jsonl" for rank in range(self.state.num_processes)]
        own_file = files[self.state.process_index]
        if not own_file.exists():
            write_samples(
                own_file,
                self.search_against_reward(number) if number else self.draw_first_samples(own_file.with_suffix("")),
            )
        self.state.wait_for_everyone()
        return [sample for file in files for sample in read_samples(file, by_id)]

    def draw_first_samples(self, folder: Path) -> list[Sample]:
        """Return the responses of round 0 to this process's training problems. Those in the folder are kept."""
        problems = self._select_process_share(self.train_problems)
        by_id, samples = {problem.id: problem for problem in problems}, []
        for begin in range(0, len(problems), PROBLEMS_PER_SAMPLES_FILE):
            file = folder / f"{begin:06d}.jsonl"
            if not file.exists():
                part = problems[begin : begin + PROBLEMS_PER_SAMPLES_FILE]
                write_samples(file, self._draw_samples(0, part, self.args.samples_per_problem))
            samples += read_samples(file, by_id)
        return samples

    def _draw_samples(
        self, number: int, problems: Sequence[Problem], samples_per_problem: int, temperature: float | None = None
    ) -> list[Sample]:
        """Return responses to problems, at the search's temperature by default."""
        start, sampling = time.perf_counter(), self.search_config.get_sampling()
        samples = sample_responses(
            problems,
            samples_per_problem,
            policy=self.policy,
            sampling=sampling if temperature is None else replace(sampling, temperature=temperature),
            seed=self.trainer_config.seed,
            batch_size=self.batch_size,
        )
        seconds = time.perf_counter() - start
        self.print_once(f"round {number}: {len(samples)} answers to {len(problems)} problems, {seconds:.0f} s")
        return samples

    def search_against_reward(self, number: int) -> list[Sample]:
        """Return the results of searches against the last round's reward: best-of-N, and with and without gradient.

        One response per training problem at a higher temperature is added: it shows the rare mistakes that best-of-N
        would pick.
        """
        start = time.perf_counter()
        reward = self.load_round_reward(number - 1)
        # From the file: `audit_round` would wait for all processes, and some may have finished their share already.
        audit = _read_json(self.output_dir / f"round-{number - 1}.audit.json")
        reward.gradient_at = audit["gradient"]["best_gradient_at"] or reward.gradient_at
        first = (number - 1) * self.args.max_search_problems % len(self.train_problems)
        rotated = self.train_problems[first:] + self.train_problems[:first]
        problems = self._select_process_share(rotated[: self.args.max_search_problems])
        pool = draw_pool(
            problems,
            self.args.audit_samples,
            policy=self.policy,
            reward=reward,
            sampling=self.search_config.get_sampling(),
            seed=self.trainer_config.seed + number,
            batch_size=self.batch_size,
        )
        samples = select_highest_reward(pool, NUM_BEST_RESPONSES)
        train_problems = self._select_process_share(self.train_problems)
        samples += self._draw_samples(number, train_problems, 1, self.args.extra_sample_temperature)
        config = replace(
            self.search_config, max_rounds=self.args.max_audit_rounds, patience=0, max_rollouts=0, max_flops=0.0
        )
        for search_config in (config, config.with_no_gradient()):
            traces = run_search(problems, policy=self.policy, reward=reward, config=search_config, seed=number)
            samples += collect_accepted_responses(traces, {problem.id: problem for problem in problems})
        seconds = time.perf_counter() - start
        self.print_once(f"round {number}: searches accepted {len(samples)} responses, {seconds:.0f} s")
        return samples

    def _select_process_share(self, problems: Sequence[Problem]) -> list[Problem]:
        return list(problems[self.state.process_index :: self.state.num_processes])

    # --- training and audits ----------------------------------------------------------------------------

    def train_round(self, number: int, data: list[LabeledResponse]) -> list[dict[str, Any]]:
        """Train the round's members and return the statistics of each training run."""
        stats_file, round_dir = self.output_dir / f"round-{number}.train.json", self._get_round_dir(number)
        if not stats_file.exists():
            members = self._list_member_dirs(round_dir)
            stats = [self._train_member(number, data, member, folder) for member, folder in enumerate(members)]
            if self.state.is_main_process:
                write_manifest(round_dir, self._build_manifest())
            self._write_json(stats_file, [asdict(member_stats) for member_stats in stats])
        self.state.wait_for_everyone()
        return _read_json(stats_file)

    def _train_member(
        self, number: int, data: list[LabeledResponse], member: int, output_dir: Path
    ) -> RewardTrainingStats:
        config = replace(
            self.trainer_config,
            output_dir=str(self.output_dir / "trainer" / output_dir.relative_to(self.output_dir)),
            max_steps=self.args.max_steps_per_round if number else self.trainer_config.max_steps,
            seed=self.trainer_config.seed + member,
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
                output_dir,
                beta=self.reward_options.implicit_beta,
                loss_type=self.reward_options.implicit_loss,
                has_reference=self.reward_options.implicit_reference == "base",
                pairs_per_problem=self.reward_options.pairs_per_problem,
                **common,
            )
        if self.reward_options.kind == "head":
            # Every process trains the same head, which takes seconds, and writes the same file.
            stats = train_state_head(
                data,
                output_dir,
                policy=self.policy,
                options=self.reward_options,
                config=config,
                token_labels=TokenLabeler(self.policy) if self.use_step_labels else None,
                batch_size=self.batch_size,
            )
            if self.reward_options.num_members > 1:
                write_manifest(output_dir, RewardManifest(kind="head", policy=self.args.policy))
            return stats
        last_round = self._list_member_dirs(self._get_round_dir(number - 1))[member]
        return train_reward(
            str(last_round) if number else self.base_model,
            data,
            output_dir,
            options=self.reward_options,
            token_labels=TokenLabeler(self.policy) if self.use_step_labels else None,
            min_p=self.search_config.candidate_min_p,
            add_layers=number == 0,
            **common,
        )

    def _get_round_dir(self, number: int) -> Path:
        return self.output_dir / f"round-{number}"

    def _list_member_dirs(self, folder: Path) -> list[Path]:
        """Return a round's folder, or one folder in it for each member of an ensemble."""
        count = self.reward_options.num_members
        return [folder] if count == 1 else [folder / f"member-{index}" for index in range(count)]

    def _build_manifest(self, **audit_fields: Any) -> RewardManifest:
        options = self.reward_options
        fields: dict[str, Any] = {"base_model": self.base_model, "policy": self.args.policy, **audit_fields}
        if options.kind == "implicit":
            reference = self.base_model if options.implicit_reference == "base" else NO_REFERENCE
            return RewardManifest(kind="log_ratio", scale=options.implicit_beta, reference_model=reference, **fields)
        if options.num_members > 1:
            members = [folder.name for folder in self._list_member_dirs(self.output_dir)]
            return RewardManifest(
                kind="ensemble", members=members, uncertainty_penalty=options.uncertainty_penalty, **fields
            )
        return RewardManifest(kind=options.kind, **fields)

    def load_round_reward(self, number: int) -> Reward:
        return load_reward(
            str(self._get_round_dir(number)),
            policy=self.policy,
            dtype=self.args.dtype,
            device=str(self.state.device),
            batch_size=self.batch_size,
        )

    def audit_round(self, number: int) -> dict[str, Any]:
        """Audit ranking, over-optimization and gradient on the audit problems, in the main process."""
        file = self.output_dir / f"round-{number}.audit.json"
        if self.state.is_main_process and not file.exists():
            self._write_json(file, self._audit_reward(self.load_round_reward(number)))
        self.state.wait_for_everyone()
        return _read_json(file)

    def _audit_reward(self, reward: Reward) -> dict[str, Any]:
        sampling = self.search_config.get_sampling()
        common: dict[str, Any] = {"policy": self.policy, "reward": reward}
        gradient = audit_gradient(
            self.audit_problems,
            gradient_at=self.args.audit_gradient_at,
            sampling=sampling,
            samples_per_problem=AUDIT_SAMPLES_PER_PROBLEM,
            num_swaps=self.args.num_swaps,
            top_k_candidates=self.search_config.top_k_candidates,
            candidate_min_p=self.search_config.candidate_min_p,
            reward_weight=self.search_config.reward_weight,
            batch_size=self.batch_size,
            **common,
        )
        # The audit of the search follows the recommended gradient.
        reward.gradient_at = gradient.best_gradient_at or reward.gradient_at
        pool = draw_pool(
            self.audit_problems,
            self.args.audit_samples,
            sampling=sampling,
            batch_size=self.batch_size,
            seed=self.trainer_config.seed,
            **common,
        )
        ranking = audit_ranking(pool, self.checker)
        over_optimization = audit_overoptimization(
            self.audit_problems,
            config=replace(self.search_config, max_rounds=self.args.max_audit_rounds),
            checker=self.checker,
            validated_samples=ranking.validated_samples,
            **common,
        )
        return {
            "gradient": gradient.to_dict(),
            "ranking": ranking.to_dict(),
            "over_optimization": over_optimization.to_dict(),
        }

    def export_best_reward(self, rounds: list[dict[str, Any]]) -> None:
        """Write OUT/reward: the round with the largest validated limits, with the audits of all rounds."""
        draft, final = self.output_dir / "reward.tmp", self.output_dir / "reward"
        shutil.rmtree(draft, ignore_errors=True)
        best = max(rounds, key=_rank_validated_limits)
        shutil.copytree(self._get_round_dir(best["round"]), draft)
        limits = ValidatedLimits.from_dict(best["over_optimization"]["validated_limits"])
        gradient_at = best["gradient"]["best_gradient_at"]
        versions = {f"version of {name}": version for name, version in get_package_versions().items()}
        manifest = self._build_manifest(
            validated_limits=limits,
            gradient_at=gradient_at,
            training_rounds=rounds,
            training_settings=self.get_settings() | versions,
        )
        write_manifest(draft, manifest)
        write_reward_readme(draft, manifest)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        self.print_once(
            f"reward: {final}, validated up to {limits.max_samples} samples and {limits.max_rounds} rounds; "
            f"gradient_at: {gradient_at}"
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
    """Tell whether neither best-of-N nor a search over-optimizes the reward within the requested budgets."""
    ranking, curves = round_result["ranking"], round_result["over_optimization"]["curves"]
    largest_n = max(int(n) for n in ranking["best_of_n_accuracy"])
    return ranking["validated_samples"] >= largest_n and all(
        curve["overoptimization"]["validated_budget"] >= args.max_audit_rounds for curve in curves.values()
    )


def _rank_validated_limits(round_result: dict[str, Any]) -> tuple[int, int, int]:
    """Return a key by which the reward with the largest limits comes last, and of equal ones the latest."""
    limits = round_result["over_optimization"]["validated_limits"]
    return limits["max_rounds"], limits["max_samples"], round_result["round"]


def _format_round(round_result: dict[str, Any]) -> str:
    ranking, search, gradient = (
        round_result[name]["conclusion"] for name in ("ranking", "over_optimization", "gradient")
    )
    return f"round {round_result['round']}: {ranking}; search: {search}; gradient: {gradient}"


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main(argv: Sequence[str]) -> None:
    end_with_launcher()
    with watch_for_stalls() as stall_watch:
        # Before anything else: whatever makes a state first chooses the back end.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        num_requested, state = int(os.environ.get("WORLD_SIZE", "1")), PartialState()
        if state.num_processes != num_requested:
            raise ValueError(f"{num_requested} processes were requested, but {state.num_processes} started")
        quiet_libraries()
        checks = Checks()
        dataclasses = (RewardArguments, RewardOptions, SearchConfig, LoraArguments, RewardConfig)
        parsed = Parser(dataclasses, presets=PRESETS).parse_options(argv, checks)
        args, options, search_config, lora, config = parsed[: len(dataclasses)]
        run = RewardRun(args, options, search_config, lora, config, checks)
        if stall_watch:
            stall_watch.limit_seconds = 60 * run.args.stall_minutes
        with ExitStack() as stack:
            with state.main_process_first():
                stack.enter_context(lock_folder(run.output_dir, state.process_index))
            stack.enter_context(run.checker)
            run.run_rounds()


if __name__ == "__main__":
    sys.exit(run_main(main))
