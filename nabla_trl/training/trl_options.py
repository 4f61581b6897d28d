"""Options of TRL's trainers beside those that all methods share, under TRL's names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from transformers import TrainingArguments
from trl import DistillationConfig, DPOConfig, GRPOConfig, RLOOConfig, SFTConfig

from nabla_trl.search.config import SearchConfig
from nabla_trl.training.offline import ON_POLICY, SOFT_TARGETS, TrainOptions

CONFIG_CLASSES: dict[str, type[TrainingArguments]] = {
    "sft": SFTConfig,
    "reward-weighted": SFTConfig,
    "dpo": DPOConfig,
    "rloo": RLOOConfig,
    "grpo": GRPOConfig,
    SOFT_TARGETS: SFTConfig,
    ON_POLICY: DistillationConfig,
}
# Options of TRL that cannot be chosen here: responses are drawn from π alone, as the search draws them, in steps of
# whole groups, and one reward scores them.
_FIXED = (
    *("max_completion_length", "generation_kwargs", "repetition_penalty", "cache_implementation"),
    *("generation_batch_size", "steps_per_generation", "num_generations_eval", "chat_template_kwargs"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"),
    *("vllm_structured_outputs_regex", "vllm_server_host", "vllm_server_port", "vllm_importance_sampling_cap"),
    *("reward_weights", "multi_objective_aggregation", "max_tool_calling_iterations"),
    *("log_multimodal", "log_completions_hub_repo"),
    # The teacher of on-policy distillation is made of the policy and the reward.
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"),
)
# Options of `SFTConfig` that other trainers have too and that they get from it, if they are given.
_SHARED_WITH_SFT = (
    "activation_offloading",
    "loss_type",
    "pad_to_multiple_of",
    "padding_free",
    "router_aux_loss_coef",
)


@dataclass
class TrainerConfig(SFTConfig):
    """TRL's SFTConfig, whose general options all methods share."""

    loss_type: str = field(
        default="nll",
        metadata={
            "help": "TRL's loss of the method that is trained: nll or dft for sft, one or several of DPOConfig for "
            "dpo (separated by commas, the default is sigmoid), one of GRPOConfig for grpo (the default is dr_grpo)."
        },
    )


def _list_method_fields() -> dict[str, tuple[Field[Any], Any, list[str]]]:
    """Return the options that only some methods have: name → field, type and methods."""
    taken = {item.name for cls in (SFTConfig, SearchConfig, TrainOptions) for item in fields(cls)}
    found: dict[str, tuple[Field[Any], Any, list[str]]] = {}
    for method, config_class in CONFIG_CLASSES.items():
        hints = get_type_hints(config_class)
        for item in fields(config_class):
            if item.init and item.name not in taken and item.name not in _FIXED:
                found.setdefault(item.name, (item, hints[item.name], []))[2].append(method)
    return found


_METHOD_FIELDS = _list_method_fields()
OWNERS = {name: tuple(methods) for name, (_, _, methods) in _METHOD_FIELDS.items()}


def _build_field(item: Field[Any], hint: Any, methods: Sequence[str]) -> tuple[str, Any, Any]:
    default = item.default if item.default is not MISSING else None
    hint = list[float] | None if item.name == "reward_clip_range" else hint  # a tuple cannot be parsed
    text = " ".join(str(item.metadata.get("help", "")).split()).rstrip(".")
    end = "" if default is None else f" (default: {default})"
    metadata = {"help": f"For {' and '.join(methods)}, as in TRL. {text}{end}.", "owner": " and ".join(methods)}
    return item.name, hint | None, field(default=None, metadata=metadata)


TrlOptions = make_dataclass(
    "TrlOptions",
    [_build_field(*entry) for entry in _METHOD_FIELDS.values()],
    namespace={"__doc__": "TRL's options of single methods. None leaves TRL's default, or ours."},
)
TrlOptions.__module__ = __name__


def collect_trl_options(options: Any, config: TrainingArguments, given_names: Collection[str]) -> dict[str, Any]:
    """Return the options that a run gives beside the general ones, by name.

    Args:
        options: `TrlOptions`.
        given_names: names of all options that the run gives.
    """
    shared = {name: getattr(config, name) for name in _SHARED_WITH_SFT if name in given_names}
    return {name: value for name, value in vars(options).items() if value is not None} | shared


def select_trl_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given options that a method's trainer takes beside the general ones.

    Args:
        options: what `collect_trl_options` returns.
    """
    names = {item.name for item in fields(CONFIG_CLASSES[method])}
    chosen = {name: value for name, value in options.items() if name in names}
    if method == "dpo" and "loss_type" in chosen:
        chosen["loss_type"] = chosen["loss_type"].split(",")
    if "reward_clip_range" in chosen:
        chosen["reward_clip_range"] = tuple(chosen["reward_clip_range"])
    return chosen


def list_trl_faults(methods: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the given options of single methods: nobody's options, and losses of other methods.

    Args:
        methods: methods that are trained.
        options: what `collect_trl_options` returns.
    """
    faults = []
    for name in options:
        if name in OWNERS and not set(OWNERS[name]) & set(methods):
            owners = " and ".join(OWNERS[name])
            faults.append(f"{name} belongs to {owners}, which train_methods ({', '.join(methods)}) does not name")
    if options.get("loss_type") is None:
        return faults
    for method in methods:
        choices = _list_loss_types(method)
        unknown = [loss for loss in options["loss_type"].split(",") if loss not in choices]
        if unknown:
            known = f"which has {', '.join(choices)}" if choices else "which has one loss"
            faults.append(f"loss_type {', '.join(unknown)} is unknown to {method}, {known}: train other methods apart")
    return faults


def _list_loss_types(method: str) -> list[str]:
    """Return the losses that TRL's help names for a method."""
    if method == "reward-weighted":
        return ["nll"]
    if method == SOFT_TARGETS:
        return []
    item = next((item for item in fields(CONFIG_CLASSES[method]) if item.name == "loss_type"), None)
    text = "" if item is None else str(item.metadata.get("help", ""))
    return list(dict.fromkeys(re.findall(r"[`'](\w+)[`']", text)))
