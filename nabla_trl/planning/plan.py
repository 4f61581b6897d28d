"""Plan a run before it is paid for: what fits into memory, at which batch, and the FLOPs and hours of each stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nabla_trl.models.flops import ModelSize, measure_model_size
from nabla_trl.planning.memory import ModelShape, build_empty_model, count_params, measure_shape, plan_memory
from nabla_trl.rewards.spec import RewardSpec, parse_reward_spec
from nabla_trl.search.config import NO_BUDGET, SharedBudget
from nabla_trl.training.offline import GROUP_METHODS, ON_POLICY
from nabla_trl.training.peft import LoraArguments, compute_training_flops
from nabla_trl.utils.formatting import format_si

# Of a device's memory. The rest holds the context, the allocator's fragments and buffers of the communication.
USABLE_SHARE = 0.9
GB = 1e9


@dataclass(frozen=True)
class Workload:
    """What is planned.

    Attributes:
        num_problems: training problems.
        response_tokens: mean length of a response.
        max_rounds: rounds of the search for each problem.
        num_generations: responses of rloo and grpo per problem.
        budget: what the searches share, in place of `max_rounds`.
    """

    method: str
    num_problems: int
    prompt_tokens: int
    response_tokens: int
    max_rounds: int
    num_generations: int
    num_epochs: float
    budget: SharedBudget = NO_BUDGET

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a prompt with its response."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Hardware:
    """What it is planned for.

    Attributes:
        memory: of one device, in bytes.
        flops: of one device at its peak, per second.
        bandwidth: of one device's memory, in bytes per second.
        utilization: share of the peak FLOPs that a forward and backward pass reaches.
    """

    num_devices: int
    memory: float
    flops: float
    bandwidth: float
    utilization: float


@dataclass(frozen=True)
class LaunchPlan:
    """A way to train, and what it needs.

    Attributes:
        static_bytes: per device, without activations.
        bytes_per_response: of activations or of the key/value cache, whichever is more.
        max_batch_size: responses per device and forward pass, 0 where nothing fits.
    """

    tuning: str
    sharding: str
    static_bytes: float
    bytes_per_response: float
    max_batch_size: int


@dataclass(frozen=True)
class StageCost:
    """FLOPs of a stage, and its hours at the least: of the FLOPs, or of reading the weights for every token."""

    stage: str
    flops: float
    hours: float


def measure_reward_models(reward: str, policy: str, dtype: str) -> list[tuple[ModelSize, int]]:
    """Return size and number of parameters of each model that a reward loads.

    Raises:
        ValueError: a malformed spec, or a model without a config.
    """
    spec = parse_reward_spec(reward)
    specs: tuple[RewardSpec, ...] = spec.members or (spec,)
    models = []
    for member in specs:
        for name in member.model_names:
            if name != policy:  # the policy itself is not loaded again
                model = build_empty_model(name, dtype=dtype, is_classifier=member.kind in ("scalar", "process"))
                models.append((measure_model_size(model, "reward"), count_params(model)))
    return models


def plan_launch(
    shape: ModelShape,
    workload: Workload,
    hardware: Hardware,
    *,
    tuning: str,
    sharding: str,
    dtype: str,
    frozen_params: int,
    activation_checkpointing: bool,
) -> LaunchPlan:
    """Return the memory of one way to train, and the largest batch that fits."""
    one = plan_memory(
        shape,
        method=workload.method,
        tuning=tuning,
        dtype=dtype,
        sharding=sharding,
        num_processes=hardware.num_devices,
        batch_size=1,
        num_tokens=workload.num_tokens,
        activation_checkpointing=activation_checkpointing,
        frozen_params=frozen_params,
    )
    per_response = max(one.activations, one.kv_cache)
    static = one.get_total() - per_response
    room = USABLE_SHARE * hardware.memory - static
    return LaunchPlan(tuning, sharding, static, per_response, max(0, math.floor(room / per_response)))


def plan_search(
    policy: ModelShape, rewards: list[tuple[ModelSize, int]], workload: Workload, hardware: Hardware, item_size: int
) -> StageCost:
    """Return the cost of the traces: a first response, then rounds that draw half a response each.

    Each round scores its response, and has one backward pass of the reward. Gradients without a backward pass
    (`gradient_at direct`) and searches that end early cost less. Searches that share a budget have as many rounds as
    it pays for. They do not fit where the memory cannot hold a response to each problem of a budget.
    """
    start, length = workload.prompt_tokens, workload.response_tokens
    prompt = policy.size.compute_forward_flops(0, start, 1)
    response = policy.size.compute_forward_flops(start, length)
    suffix = policy.size.compute_forward_flops(start + length // 2, length - length // 2)
    score = sum(size.compute_forward_flops(start, length, 1) for size, _ in rewards)
    gradient = score + sum(size.compute_backward_flops(start, length, 1) for size, _ in rewards)
    first_flops, round_flops = prompt + response + score, suffix + score + gradient
    num_rounds: float = workload.max_rounds
    if workload.budget.shared_flops:
        num_rounds = max(0.0, workload.budget.shared_flops - first_flops) / round_flops
    flops = workload.num_problems * (first_flops + num_rounds * round_flops)
    num_tokens = workload.num_problems * length * (1 + num_rounds / 2)
    frozen = policy.num_params + sum(params for _, params in rewards)
    room = max(USABLE_SHARE * hardware.memory - frozen * item_size, 0.0)
    # A model without keys and values keeps a state of fixed size, of one token's width at least.
    state = max(policy.kv_bytes * workload.num_tokens, policy.layer_input_bytes * policy.num_layers)
    slots = math.floor(room / state)
    if slots < min(workload.budget.block_size, workload.num_problems):
        slots = 0
    return StageCost("traces", flops, _compute_hours(flops, num_tokens, slots, policy, hardware, item_size))


def plan_training(
    policy: ModelShape,
    rewards: list[tuple[ModelSize, int]],
    workload: Workload,
    hardware: Hardware,
    *,
    tuning: str,
    item_size: int,
    batch_size: int,
) -> StageCost:
    """Return the cost of training on a response per problem (dpo: a pair), or on what the policy samples.

    The teacher of on-policy distillation reads a response with the policy and the reward. Its gradient has a backward
    pass of the reward, which `gradient_at direct` does not need.
    """
    length = workload.num_tokens
    is_frozen = tuning != "full"
    step = compute_training_flops(policy.size, policy.adapter_params, length, frozen=is_frozen)
    forward = policy.size.compute_forward_flops(0, length)
    num_rows = workload.num_problems * workload.num_epochs
    num_tokens = 0.0
    if workload.method == ON_POLICY:
        num_tokens = num_rows * workload.response_tokens
        teacher = sum(
            2 * size.compute_forward_flops(0, length, 1) + size.compute_backward_flops(0, length, 1)
            for size, _ in rewards
        )
        flops = num_rows * (step + 2 * forward + teacher)
    elif workload.method in GROUP_METHODS:
        num_rows *= workload.num_generations
        num_tokens = num_rows * workload.response_tokens
        score = sum(size.compute_forward_flops(0, length, 1) for size, _ in rewards)
        flops = num_rows * (step + (3 if workload.method == "rloo" else 2) * forward + score)
    elif workload.method == "dpo":
        flops = num_rows * 2 * (step + forward)
    else:
        flops = num_rows * step
    hours = _compute_hours(flops, num_tokens, batch_size, policy, hardware, item_size)
    return StageCost(f"{workload.method}, {tuning}", flops, hours)


def _compute_hours(
    flops: float, num_tokens: float, batch_size: int, policy: ModelShape, hardware: Hardware, item_size: int
) -> float:
    """Return the hours of all devices together: computing, and reading the weights once per step of decoding."""
    if num_tokens and batch_size < 1:
        return math.inf
    compute = flops / (hardware.flops * hardware.utilization)
    reading = num_tokens / max(batch_size, 1) * policy.num_params * item_size / hardware.bandwidth
    return (compute + reading) / hardware.num_devices / 3600


def format_plan(launches: list[LaunchPlan], costs: list[StageCost], hardware: Hardware, workload: Workload) -> str:
    """Return the plan as Markdown."""
    lines = [
        f"{workload.method} on {hardware.num_devices} × {hardware.memory / GB:.4g} GB, of which "
        f"{USABLE_SHARE:.0%} is planned with. Sequences of {workload.num_tokens} tokens.",
        "",
        "| tuning | sharding | GB per device | GB per response | largest batch per device |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {launch.tuning} | {launch.sharding} | {launch.static_bytes / GB:.2f} | "
            f"{launch.bytes_per_response / GB:.3f} | {launch.max_batch_size or 'does not fit'} |"
            for launch in launches
        ),
        "",
        f"| stage, {workload.num_problems} problems | FLOPs | hours at least |",
        "| --- | --- | --- |",
        *(f"| {cost.stage} | {format_si(cost.flops)} | {_format_hours(cost.hours)} |" for cost in costs),
    ]
    return "\n".join(lines)


def _format_hours(hours: float) -> str:
    return "does not fit" if math.isinf(hours) else f"{hours:.2g}"


def make_plan(
    policy: str,
    reward: str,
    workload: Workload,
    hardware: Hardware,
    *,
    dtype: str,
    lora: LoraArguments,
    activation_checkpointing: bool,
) -> tuple[list[LaunchPlan], list[StageCost]]:
    """Return the ways to train a policy, and the cost of each stage. Loads no weights.

    Args:
        policy: as `nabla_trl.models.loading.load_policy` takes it.
        reward: as `nabla_trl.rewards.loading.load_reward` takes it.
        dtype: of frozen models and of the computation.

    Raises:
        ValueError: a model without a config, or a malformed reward.
    """
    from nabla_trl.models.loading import DTYPES

    rewards = measure_reward_models(reward, policy, dtype)
    item_size = DTYPES[dtype].itemsize
    shapes = {tuning: measure_shape(policy, tuning=tuning, dtype=dtype, lora=lora) for tuning in ("lora", "full")}
    frozen = shapes["lora"].num_params + sum(params for _, params in rewards)
    launches = [
        plan_launch(
            shapes[tuning],
            workload,
            hardware,
            tuning=tuning,
            sharding=sharding,
            dtype=dtype,
            frozen_params=frozen,
            activation_checkpointing=activation_checkpointing,
        )
        for tuning in shapes
        for sharding in ("ddp", "fsdp2", "zero3")
        if sharding == "ddp" or hardware.num_devices > 1
    ]
    costs = [plan_search(shapes["lora"], rewards, workload, hardware, item_size)]
    for tuning, shape in shapes.items():
        batch = max(launch.max_batch_size for launch in launches if launch.tuning == tuning)
        costs.append(
            plan_training(shape, rewards, workload, hardware, tuning=tuning, item_size=item_size, batch_size=batch)
        )
    return launches, costs
