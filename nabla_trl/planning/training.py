"""Check before a run what would stop its trainings: options, trackers, disk, memory, and what the folder holds."""

from __future__ import annotations

from collections.abc import Sequence

from nabla_trl.models.loading import DTYPES
from nabla_trl.planning.memory import measure_shape, plan_memory
from nabla_trl.planning.preflight import MIN_FREE_BYTES, check_memory, check_output_dir, count_model_params
from nabla_trl.training.offline import ONLINE_METHODS
from nabla_trl.training.reporting import check_reporting
from nabla_trl.training.stage import TrainStage
from nabla_trl.training.trl_options import list_trl_faults
from nabla_trl.utils.faults import Checks

# Bytes of a full weight and of Adam's two moments, all in float32.
_WEIGHT_BYTES, _CHECKPOINT_BYTES = 4, 12


def collect_training_faults(
    checks: Checks,
    stage: TrainStage,
    methods: Sequence[str],
    *,
    frozen_models: Sequence[str] = (),
    keeps_frozen_models: bool = False,
) -> None:
    """Collect what would stop the trainings of a run. Nothing is loaded or written.

    Args:
        stage: whose policy is given by name.
        methods: training methods.
        frozen_models: names of the policy and the models of the reward.
        keeps_frozen_models: they are in memory during every training, and not only in those of methods that sample.
    """
    with checks.collect():
        check_output_dir(stage.run_dir, _estimate_disk_bytes(stage, len(methods)))
    checks.add(list_trl_faults(methods, stage.trl_options))
    for method in methods:
        checks.call(stage.check_method, method)
        checks.call(stage.check_settings, method)
    if stage.process_state.is_main_process:
        with checks.collect():
            check_reporting(stage.sft_config, len(methods))
    if not checks.faults:
        for method in methods:
            with checks.collect(f"train {method}: "):
                needs_frozen_models = keeps_frozen_models or method in ONLINE_METHODS
                _check_training_memory(stage, method, frozen_models if needs_frozen_models else [])


def _estimate_disk_bytes(stage: TrainStage, num_methods: int) -> float:
    """Return what the trained weights and a checkpoint take at least. Adapters are small."""
    if stage.options.tuning != "full":
        return MIN_FREE_BYTES
    config = stage.sft_config
    has_checkpoints = str(getattr(config.save_strategy, "value", config.save_strategy)) != "no"
    per_weight = _WEIGHT_BYTES + (_CHECKPOINT_BYTES if has_checkpoints else 0)
    return MIN_FREE_BYTES + per_weight * count_model_params(stage.policy) * num_methods


def _check_training_memory(stage: TrainStage, method: str, frozen_models: Sequence[str]) -> None:
    """Compare what a training needs before any activation with the memory of the device.

    Nothing is said about sharded trainings, whose devices share the weights, and where the plan cannot be made.
    """
    config, state, tuning = stage.sft_config, stage.process_state, stage.options.tuning
    is_sharded_launch = state.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    is_sharded = getattr(config, "fsdp", None) or getattr(config, "deepspeed", None) or is_sharded_launch
    if is_sharded or stage.dtype not in DTYPES or tuning == "qlora":
        return
    plan = plan_memory(
        measure_shape(stage.policy, tuning=tuning, dtype=stage.dtype, lora=stage.lora),
        method=method,
        tuning=tuning,
        dtype=stage.dtype,
        sharding="ddp",
        num_processes=state.num_processes,
        batch_size=1,
        num_tokens=1,
        activation_checkpointing=True,
        frozen_params=0,
    )
    extra = plan.weights + plan.gradients + plan.optimizer + plan.reference
    check_memory(frozen_models, dtype=stage.dtype, device=str(state.device), extra_bytes=extra)
