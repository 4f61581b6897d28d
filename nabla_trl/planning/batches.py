"""Choose batch sizes for the memory of a machine, where a run does not say them."""

from __future__ import annotations

from collections.abc import Sequence

from nabla_trl.models.loading import DTYPES
from nabla_trl.planning.memory import build_empty_model, count_params, measure_saved_bytes, measure_shape
from nabla_trl.planning.plan import USABLE_SHARE, Hardware, Workload, plan_launch
from nabla_trl.rewards.spec import parse_reward_spec
from nabla_trl.training.offline import GROUP_METHODS, ONLINE_METHODS
from nabla_trl.training.peft import LoraArguments

MAX_SEARCH_BATCH = 64  # problems; more do not decode faster
TRAIN_BATCH = 8  # rows of an optimizer step and process, as TRL's default
_LOGIT_BYTES = 12  # of a logit and its gradients, where a reward reads log-likelihoods


def choose_search_batch_size(
    policy: str, reward: str, *, dtype: str, memory: float, prompt_tokens: int, max_new_tokens: int
) -> int:
    """Return how many problems a search refines together: the largest power of 2 that fits, 64 at most.

    What counts per problem is the larger of the keys and values of four responses, which best-of-N draws together, and
    of what autograd keeps for the gradient of the reward.

    Args:
        memory: of this process, in bytes.

    Raises:
        ValueError: a model without a config, or a malformed reward.
    """
    num_tokens = prompt_tokens + max_new_tokens
    shape = measure_shape(policy, tuning="full", dtype=dtype, lora=LoraArguments())
    frozen_params, gradient_bytes = shape.num_params, 0.0
    spec = parse_reward_spec(reward)
    for member in spec.members or (spec,):
        is_classifier = member.kind in ("scalar", "process")
        for name in member.model_names or (policy,):
            model = build_empty_model(name, dtype=dtype, is_classifier=is_classifier)
            frozen_params += count_params(model) if name != policy else 0
            logits = 0 if is_classifier else shape.vocab_size * _LOGIT_BYTES
            gradient_bytes = max(gradient_bytes, measure_saved_bytes(model) + logits)
    room = USABLE_SHARE * memory - frozen_params * DTYPES[dtype].itemsize
    per_problem = num_tokens * max(4 * shape.kv_bytes, gradient_bytes)
    return _floor_to_power_of_two(room / per_problem, MAX_SEARCH_BATCH)


def choose_train_batch_size(
    policy: str,
    *,
    methods: Sequence[str],
    tuning: str,
    lora: LoraArguments,
    dtype: str,
    memory: float,
    num_tokens: int,
    num_generations: int,
    activation_checkpointing: bool,
) -> tuple[int, int]:
    """Return the rows of a forward pass that fit, and the forward passes of an optimizer step.

    A step has 8 rows per process. Where a method samples groups of responses, it has one group.

    Args:
        methods: training methods, which share the batch.
        memory: of this process, in bytes.

    Raises:
        ValueError: a model without a config.
    """
    shape = measure_shape(policy, tuning=tuning, dtype=dtype, lora=lora)
    hardware = Hardware(num_devices=1, memory=memory, flops=1.0, bandwidth=1.0, utilization=1.0)
    sizes = []
    for method in methods:
        is_online = method in ONLINE_METHODS
        plan = plan_launch(
            shape,
            Workload(method, 1, num_tokens, 0, 0, num_generations, 1),
            hardware,
            tuning=tuning,
            sharding="ddp",
            dtype=dtype,
            frozen_params=shape.num_params if is_online else 0,
            activation_checkpointing=activation_checkpointing,
        )
        sizes.append(plan.max_batch_size)
    rows = num_generations if any(method in GROUP_METHODS for method in methods) else TRAIN_BATCH
    size = next(size for size in range(max(1, min(TRAIN_BATCH, *sizes, rows)), 0, -1) if rows % size == 0)
    return size, rows // size


def _floor_to_power_of_two(value: float, largest: int) -> int:
    size = largest
    while size > max(value, 1):
        size //= 2
    return size
