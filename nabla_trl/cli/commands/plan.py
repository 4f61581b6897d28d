"""`nabla-trl plan`: what fits into memory, at which batch, and the FLOPs and hours of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nabla_trl.cli.arguments import POLICY_HELP, REWARD_HELP
from nabla_trl.cli.parsing import Parser, UsageError, quiet_libraries
from nabla_trl.search.config import SharedBudget
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option


@dataclass
class PlanArguments:
    """Options of `nabla-trl plan`."""

    policy: str = required_option(POLICY_HELP)
    reward: str = required_option(REWARD_HELP)
    gpus: int = option(1, "Number of GPUs, of all nodes together.", common=True)
    memory: float = option(80.0, "Memory of one GPU in GB.", common=True)
    train_method: str = option(
        "sft",
        "Training method: sft, reward-weighted, dpo, soft-targets, rloo, grpo or on-policy-distillation.",
        common=True,
    )
    max_problems: int = option(10_000, "Number of training problems.", common=True)
    prompt_tokens: int = option(256, "Tokens of a prompt.", common=True)
    response_tokens: int = option(768, "Tokens of a response.", common=True)
    max_rounds: int = option(16, "Rounds of the search for each problem.", common=True)
    num_generations: int = option(8, "Responses of rloo and grpo per problem.")
    num_train_epochs: float = option(1.0, "Passes over the training problems.")
    dtype: str = option("bfloat16", "Data type of frozen models and of the computation.", common=True)
    activation_checkpointing: bool = option(
        True, "Compute activations again in the backward pass, as TRL does by default."
    )
    lora_r: int = option(16, "Rank of the LoRA adapter.")
    gpu_tflops: float = option(
        989.0, "TFLOPs per second of one GPU at its peak (the default is an H100 in bfloat16).", common=True
    )
    bandwidth: float = option(3.35, "Bandwidth of one GPU's memory in TB per second (the default is an H100).")
    utilization: float = option(0.3, "Share of the peak FLOPs that is reached.")

    def __post_init__(self) -> None:
        from nabla_trl.models.loading import DTYPES
        from nabla_trl.training.offline import TRAIN_METHODS

        checks = Checks()
        checks.require_choice(self, train_method=TRAIN_METHODS, dtype=DTYPES)
        checks.require_minimum(self, 1, "gpus", "max_problems", "prompt_tokens", "response_tokens")
        checks.require_minimum(self, 1, "num_generations", "lora_r")
        for name in ("memory", "num_train_epochs", "gpu_tflops", "bandwidth"):
            checks.require(getattr(self, name) > 0, f"{name} must be above 0")
        checks.require(
            0 < self.utilization <= 1 and self.max_rounds >= 0,
            "utilization must be above 0 and at most 1, max_rounds not negative",
        )
        checks.raise_faults()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [PlanArguments, SharedBudget],
        prog="nabla-trl plan",
        usage="nabla-trl plan --policy P --reward R --gpus 8 --memory 80 [options]",
        description="Estimate what fits into memory, at which batch, and the FLOPs and hours of each stage.\n"
        "Reads configs only, loads no weights and needs no GPU.",
    )
    checks = Checks()
    args, budget = parser.parse_options(argv, checks)[:2]
    checks.raise_faults(UsageError)

    from nabla_trl.planning.plan import GB, Hardware, Workload, format_plan, make_plan
    from nabla_trl.training.peft import LoraArguments

    quiet_libraries()
    workload = Workload(
        args.train_method,
        args.max_problems,
        args.prompt_tokens,
        args.response_tokens,
        args.max_rounds,
        args.num_generations,
        args.num_train_epochs,
        budget,
    )
    hardware = Hardware(args.gpus, args.memory * GB, args.gpu_tflops * 1e12, args.bandwidth * 1e12, args.utilization)
    with checks.collect():
        launches, costs = make_plan(
            args.policy,
            args.reward,
            workload,
            hardware,
            dtype=args.dtype,
            lora=LoraArguments(lora_r=args.lora_r),
            activation_checkpointing=args.activation_checkpointing,
        )
    checks.raise_faults(UsageError)
    print(format_plan(launches, costs, hardware, workload))
    return 0
