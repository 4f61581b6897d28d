"""Everything wrong with a distill run, before anything is loaded, searched or written."""

from __future__ import annotations

from typing import Any

from nabla_trl.evaluation.method import REWARD_MODEL_SAMPLING, Method, parse_methods
from nabla_trl.evaluation.plan import check_method_options
from nabla_trl.models.loading import DTYPES
from nabla_trl.planning.memory import measure_shape, plan_memory
from nabla_trl.planning.preflight import (
    MIN_FREE_BYTES,
    check_memory,
    check_output_dir,
    count_model_params,
    list_frozen_models,
)
from nabla_trl.training.offline import ONLINE_METHODS
from nabla_trl.training.reporting import check_reporting
from nabla_trl.training.trl_options import list_trl_faults
from nabla_trl.utils.faults import Checks

# Bytes of a full weight and of Adam's two moments, all in float32.
_WEIGHT_BYTES, _CHECKPOINT_BYTES = 4, 12


def collect_faults(run: Any, checks: Checks) -> None:
    """Collect what is wrong with the models, the output folder, the methods, the machine and the integrations.

    Args:
        run: a `DistillRun`, whose module imports this one.
    """
    args, stages = run.args, run.args.list_stages()
    if set(stages) - {"report"}:
        args.check_models(
            checks,
            problems=[*run.train_problems[:50], *run.held_out_problems[:50]],
            max_new_tokens=run.search_config.max_new_tokens,
            device=str(run.state.device),
        )
    with checks.collect():
        check_output_dir(run.output_dir, _estimate_disk_bytes(run) if "train" in stages else MIN_FREE_BYTES)
    if "evaluate" in stages:
        with checks.collect():
            methods = [Method.parse(name) for name in parse_methods(args.eval_methods)]
            # Methods of policies that are not trained here, and of models that a reward lacks, are left out later.
            names = [str(method) for method in methods if not method.policy and method.name != REWARD_MODEL_SAMPLING]
            check_method_options(names, run.search_config, [], has_better_model=True)
    if "train" in stages:
        checks.add(list_trl_faults(args.train_methods, run.trl_options))
        for method in args.train_methods:
            with checks.collect():
                run._make_train_stage().check_method(method)
        if run.state.is_main_process:
            with checks.collect():
                check_reporting(run.sft_config, len(args.train_methods))
        _collect_memory_faults(run, checks)
    with checks.collect():
        run.check_settings()


def _estimate_disk_bytes(run: Any) -> float:
    """Return what the trained weights and a checkpoint take at least. Adapters are small."""
    if run.train_options.tuning != "full":
        return MIN_FREE_BYTES
    num_params = count_model_params(run.args.policy)
    has_checkpoints = str(getattr(run.sft_config.save_strategy, "value", run.sft_config.save_strategy)) != "no"
    per_weight = _WEIGHT_BYTES + (_CHECKPOINT_BYTES if has_checkpoints else 0)
    return MIN_FREE_BYTES + per_weight * num_params * len(run.args.train_methods)


def _collect_memory_faults(run: Any, checks: Checks) -> None:
    """Compare what a training needs before any activation with the memory of the device.

    Nothing is said about sharded trainings, whose devices share the weights, and where the plan cannot be made.
    """
    dtype, config, tuning = run.dtype, run.sft_config, run.train_options.tuning
    is_sharded = getattr(config, "fsdp", None) or getattr(config, "deepspeed", None) or _is_sharded_launch(run)
    if checks.faults or is_sharded or dtype not in DTYPES or tuning == "qlora":
        return
    frozen = list_frozen_models(run.args.policy, run.args.reward)
    makes_traces = "traces" in run.args.list_stages()  # with models that stay in memory
    for method in run.args.train_methods:
        shape = measure_shape(run.args.policy, tuning=tuning, dtype=dtype, lora=run.lora_arguments)
        plan = plan_memory(
            shape,
            method=method,
            tuning=tuning,
            dtype=dtype,
            sharding="ddp",
            num_processes=run.state.num_processes,
            batch_size=1,
            num_tokens=1,
            activation_checkpointing=True,
            frozen_params=0,
        )
        with checks.collect(f"train {method}: "):
            models = frozen if makes_traces or method in ONLINE_METHODS else []
            extra = plan.weights + plan.gradients + plan.optimizer + plan.reference
            check_memory(models, dtype=dtype, device=str(run.state.device), extra_bytes=extra)


def _is_sharded_launch(run: Any) -> bool:
    return run.state.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
