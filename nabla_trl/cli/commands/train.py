"""`nabla-trl train`: train policies on the traces of a folder, or on problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_trl.cli.arguments import DATASET_HELP, POLICY_HELP, REWARD_HELP, PolicyRewardArguments, check_distinct
from nabla_trl.cli.distill.arguments import COMMON_TRAIN_OPTIONS
from nabla_trl.cli.launch import DEFAULT_STALL_MINUTES, STALL_MINUTES_HELP, check_stall_minutes, join_launch
from nabla_trl.cli.parsing import Parser, UsageError, collect_given_options, quiet_libraries
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.training.offline import OFFLINE_METHODS, ONLINE_METHODS, TRAIN_METHODS, TrainOptions
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.trl_options import TrainerConfig, TrlOptions, collect_trl_options
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import check_choices, option, split_names


@dataclass
class TrainArguments(PolicyRewardArguments):
    """Options of `nabla-trl train`."""

    policy: str = option("", f"{POLICY_HELP} Default: the policy that the traces were made with.", common=True)
    reward: str = option("", f"For {', '.join(ONLINE_METHODS)}. {REWARD_HELP}", common=True)
    train_methods: list[str] = option(
        ["sft"],
        "Training methods, separated by commas or spaces, which each give one trained policy: "
        f"{', '.join(TRAIN_METHODS)}.",
        common=True,
    )
    traces_dir: str = option(
        "",
        f"Folder of the run that holds traces/, for {', '.join(OFFLINE_METHODS)} (default: --output_dir).",
        common=True,
    )
    dataset: str = option("", f"For {', '.join(ONLINE_METHODS)}. {DATASET_HELP}", common=True)
    train_split: str = option("train", "Split of --dataset to train on.")
    max_train_problems: int = option(1000, f"Maximum number of problems for {', '.join(ONLINE_METHODS)}.", common=True)
    stall_minutes: float = option(DEFAULT_STALL_MINUTES, STALL_MINUTES_HELP)

    def __post_init__(self) -> None:
        self.train_methods = split_names(self.train_methods)
        checks = Checks()
        checks.call(super().__post_init__)
        checks.call(check_stall_minutes, self.stall_minutes)
        checks.call(check_distinct, "train_methods", self.train_methods)
        checks.call(check_choices, "training method", self.train_methods, TRAIN_METHODS)
        checks.raise_faults()


DATACLASSES = (TrainArguments, SearchConfig, TrainOptions, LoraArguments, TrainerConfig, TrlOptions)


def main(argv: Sequence[str]) -> int:
    """Run the command in this process, alone or one of those that a launcher started, and return its exit code."""
    with join_launch() as stall_watch:
        from accelerate import PartialState

        from nabla_trl.pipeline.train import TrainingCall
        from nabla_trl.planning.machine import Machine
        from nabla_trl.utils.interrupts import get_current_command

        quiet_libraries()
        state = PartialState()
        machine = Machine.detect(state)
        parser = Parser(
            DATACLASSES,
            presets=PRESETS,
            common=COMMON_TRAIN_OPTIONS,
            prog="nabla-trl train",
            usage="nabla-trl train --traces_dir RUN --output_dir DIR [--train_methods sft dpo] [options]\n"
            "       nabla-trl train --train_methods rloo --policy P --reward R --dataset D --output_dir DIR\n"
            "       accelerate launch -m nabla_trl.cli train [options]",
            description="Train one policy per method with TRL's trainers, as nabla-trl distill does. sft,\n"
            "reward-weighted, dpo and soft-targets learn from traces. rloo, grpo and\n"
            "on-policy-distillation learn from what they sample to problems.\n"
            "The same command continues where it was interrupted.",
        )
        parser.set_defaults_with_config(output_dir="", max_length=None, **machine.get_defaults())
        checks = Checks()
        parsed = parser.parse_options(argv, checks)[: len(DATACLASSES)]
        args, search_config, options, lora, sft_config, trl_options = parsed
        given: dict[str, Any] = {}
        with checks.collect():
            given = collect_given_options(argv, parsed, PRESETS)
        output_dir = sft_config.output_dir or args.traces_dir
        checks.require(
            bool(output_dir), "where to? give --output_dir, or --traces_dir to train in the folder of the traces"
        )

        def say(text: str) -> None:
            if state.is_main_process:
                print(text, flush=True)

        call = TrainingCall(
            methods=args.train_methods,
            policy=args.policy or None,
            traces=args.traces_dir or None,
            problems=args.dataset or None,
            output_dir=Path(output_dir),
            reward=args.reward or None,
            tokenizer=None,
            options=options,
            sft_config=sft_config,
            trl_options=collect_trl_options(trl_options, sft_config, given),
            lora=lora,
            search_config=search_config,
            given_options=given,
            split=args.train_split,
            max_problems=args.max_train_problems or None,
            model_options={
                "dtype": args.dtype,
                "device": str(state.device),
                "prompt_options": args.get_prompt_options(),
                "vllm_url": args.vllm_url,
                "vllm_timeout": args.vllm_timeout,
                "trust_remote_code": sft_config.trust_remote_code,
            },
            command=get_current_command(),
        )
        call.collect_faults(checks)
        checks.raise_faults(UsageError)
        if stall_watch:
            stall_watch.limit_seconds = 60 * args.stall_minutes
        for method in call.run(say):
            say(f"{method}: {Path(output_dir) / 'trained' / method}")
    return 0
