"""Options of a run of `nabla-trl distill`, beside those of the search, the training and the adapter."""

from __future__ import annotations

from dataclasses import dataclass

from nabla_trl.cli.arguments import (
    DATASET_HELP,
    DEFAULT_SEEDS,
    DOLLARS_HELP,
    SEEDS_HELP,
    PolicyRewardArguments,
    check_distinct,
    check_dollars_per_gpu_hour,
)
from nabla_trl.cli.launch import DEFAULT_STALL_MINUTES, STALL_MINUTES_HELP, check_stall_minutes
from nabla_trl.evaluation.method import METHOD_SYNTAX, parse_methods
from nabla_trl.training.checkpoints import get_policy_label
from nabla_trl.training.offline import TRAIN_METHODS
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import check_choices, option, split_names

# Options of the training that --help shows beside the common ones of this module and of the search.
COMMON_TRAIN_OPTIONS = (
    "tuning",
    "sft_selection",
    "lora_r",
    "output_dir",
    "seed",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "trust_remote_code",
)
DEFAULT_OUTPUT_DIR = "outputs/distill"
DEFAULT_SPLITS = {"train_split": "train", "eval_split": "test"}
STAGES = ("traces", "train", "evaluate", "report")
DEFAULT_DISTILL_EVAL_METHODS = (
    "greedy,samples_32,self_consistency_16,best_of_1,best_of_2,best_of_4,best_of_8,best_of_16,best_of_32,"
    "weighted_best_of_16,control,nabla,control@0.15,nabla@0.15,control@0.2,nabla@0.2,control@0.33,nabla@0.33,"
    "reward_model_sampling"
)
DEFAULT_TRAINED_POLICY_METHODS = ("greedy", "best_of_1", "best_of_8", "samples_8")  # for every trained policy


@dataclass
class DistillArguments(PolicyRewardArguments):
    """Models, problems, stages and methods."""

    dataset: str = option("digit_chains", f"{DATASET_HELP} The traces and the training use it.", common=True)
    eval_dataset: str = option(
        "",
        "Data set to evaluate on, named like --dataset (default: --eval_split of --dataset, or --test_fraction of it "
        "if it is one file without splits).",
        common=True,
    )
    train_split: str = option(DEFAULT_SPLITS["train_split"], "Split of --dataset to generate traces on.")
    eval_split: str = option(DEFAULT_SPLITS["eval_split"], "Split to evaluate on. Nothing is trained on its problems.")
    test_fraction: float = option(
        0.2,
        "Share of the problems that is held out to evaluate on, if --dataset is one file without splits. A hash of "
        "each question decides, so that a question keeps its side when the file grows.",
    )
    split_seed: int = option(0, "Seed of that division. Another seed holds out other problems.")
    train_methods: list[str] = option(
        ["sft"],
        "Training methods, separated by commas or spaces, which each give one trained policy: "
        f"{', '.join(TRAIN_METHODS)}.",
        common=True,
    )
    max_train_problems: int = option(
        1000, "Maximum number of training problems. Lower it for a quick test.", common=True
    )
    traces_per_problem: int = option(
        1, "Traces of each training problem, with consecutive seeds from the first of --seeds."
    )
    max_eval_problems: int = option(
        300, "Maximum number of evaluation problems. Increase it for narrower confidence intervals.", common=True
    )
    stages: list[str] = option(
        list(STAGES), "Stages to run, separated by commas or spaces. Finished work is skipped.", common=True
    )
    seeds: list[int] = option(list(DEFAULT_SEEDS), SEEDS_HELP, common=True)
    eval_methods: list[str] = option(
        [],
        f"Methods to evaluate, separated by commas or spaces: {METHOD_SYNTAX} (default: "
        f"{DEFAULT_DISTILL_EVAL_METHODS}, and for every trained policy {', '.join(DEFAULT_TRAINED_POLICY_METHODS)}).",
        common=True,
    )
    max_audit_problems: int = option(
        64, "Maximum number of training problems for the reward audit. 0 skips the audit."
    )
    audit_samples: int = option(
        16, "Responses drawn per problem to audit the reward, at least 2. Increase it to audit larger best-of-N."
    )
    stall_minutes: float = option(DEFAULT_STALL_MINUTES, STALL_MINUTES_HELP)
    title: str = option("Test-time gradient search and its distillation", "Title of the report.")
    dollars_per_gpu_hour: float | None = option(None, DOLLARS_HELP)
    show_targets: bool = option(
        False,
        "Compare the results with the targets that this project set for its own demonstration (default: false).",
    )

    def __post_init__(self) -> None:
        self.train_methods, self.stages = split_names(self.train_methods), split_names(self.stages)
        checks = Checks()
        checks.call(super().__post_init__)
        checks.call(check_stall_minutes, self.stall_minutes)
        checks.call(check_distinct, "seeds", self.seeds)
        checks.call(check_distinct, "train_methods", self.train_methods)
        checks.call(check_distinct, "stages", self.stages)
        checks.call(check_dollars_per_gpu_hour, self.dollars_per_gpu_hour)
        checks.require(
            0 < self.test_fraction < 1, f"test_fraction must be between 0 and 1, not {self.test_fraction:g}"
        )
        checks.require_minimum(self, 1, "max_train_problems", "max_eval_problems", "traces_per_problem")
        checks.call(check_choices, "stage", self.stages, STAGES)
        checks.call(check_choices, "training method", self.train_methods, TRAIN_METHODS)
        if not self.eval_methods:
            trained = [
                f"{get_policy_label(train_method)}_{method}"
                for train_method in self.train_methods
                if train_method in TRAIN_METHODS
                for method in DEFAULT_TRAINED_POLICY_METHODS
            ]
            self.eval_methods = [DEFAULT_DISTILL_EVAL_METHODS, *trained]
        checks.call(parse_methods, self.eval_methods)
        checks.raise_faults()
