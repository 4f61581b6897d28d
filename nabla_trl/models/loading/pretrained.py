"""Load a model from files, and refuse files that do not hold exactly its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from nabla_trl.models.loading.quantization import fix_quantized_gradients
from nabla_trl.utils.formatting import format_error, format_load_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Names of the weights of a text model inside a checkpoint that also reads images or sound, and their names on its own.
_TEXT_KEY_MAPPING = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
# Layers that predict further tokens (multi-token prediction). The next token's logits do not depend on them.
_MULTI_TOKEN_LAYERS = re.compile(r"(^|\.)mtp(_layers|_block)?\.")

_trust_remote_code: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


# --- code from repositories -----------------------------------------------------------------------------


@contextmanager
def trusting_remote_code(trust: bool | None) -> Iterator[None]:
    """Set within the block whether code from model repositories may run. None: as outside the block."""
    token = _trust_remote_code.set(trusts_remote_code() if trust is None else trust)
    try:
        yield
    finally:
        _trust_remote_code.reset(token)


def set_trust_remote_code(trust: bool) -> None:
    """Set for this process whether code from model repositories may run. By default it may not."""
    _trust_remote_code.set(trust)


def trusts_remote_code() -> bool:
    """Return whether code from model repositories may run."""
    return _trust_remote_code.get()


def call_from_pretrained(auto_class: Any, what: str, name: str, **options: Any) -> Any:
    """Call `auto_class.from_pretrained(name, ...)`, without running code of the repository unless that is trusted.

    transformers asks on the terminal where nothing is said, and takes what is piped into it for an answer.

    Args:
        what: what is loaded, for the error ("a model").

    Raises:
        ValueError: nothing can be loaded from `name`.
    """
    try:
        return auto_class.from_pretrained(name, trust_remote_code=trusts_remote_code(), **options)
    except Exception as error:  # whatever files by others may raise
        if "trust_remote_code" in str(error) and not trusts_remote_code():
            raise ValueError(
                f"{name} needs code from its repository, which is not run by default: read that code, and use "
                "--trust_remote_code (in Python: trust_remote_code=True) if you trust it"
            ) from error
        raise ValueError(format_load_error(what, name, error)) from error


# --- models ---------------------------------------------------------------------------------------------


def load_model(
    auto_class: Any,
    name: str,
    *,
    dtype: str,
    device: str | None,
    revision: str | None = None,
    sharded: bool = False,
    allowed_missing: str | None = None,
    allowed_unexpected: Sequence[str] = (),
    model_options: dict[str, Any] | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """Call `auto_class.from_pretrained`, and refuse files that leave weights newly initialized or unused.

    Of a checkpoint that also reads images or sound, the text model is loaded if transformers has one of this kind.

    Args:
        sharded: let DeepSpeed ZeRO-3 shard the weights while they are loaded, if it is on. For a model to train.
            A frozen model is loaded whole in every process.
        allowed_missing: a weight that may be missing, because the caller loads it.
        allowed_unexpected: weights that the files may hold in addition, such as the head of another task.
        model_options: further arguments of `from_pretrained`.
        config_options: options of the model's config.

    Raises:
        ValueError: nothing can be loaded from `name`, weights are missing or have no place in the model, quantization
            without known gradients, or an unknown dtype or device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    resolved_device = resolve_device(device)
    config = _load_config(name, revision, **config_options)
    options = {
        "dtype": DTYPES[dtype],
        "revision": revision,
        **_select_text_model(auto_class, config, name, config_options),
    }
    options |= model_options or {}
    is_quantized = "quantization_config" in options or getattr(config, "quantization_config", None) is not None
    if is_quantized:
        options["device_map"] = {"": resolved_device}
    with _loading_weights(sharded) as is_sharded:
        model, info = call_from_pretrained(auto_class, "a model", name, output_loading_info=True, **options)
    missing = sorted({*info["missing_keys"]} - {allowed_missing})
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: "
            f"they would be random. Is it a {auto_class.__name__.removeprefix('AutoModelFor')} model?"
        )
    unexpected = _list_unused_weights(model, info["unexpected_keys"], config, allowed_unexpected)
    if unexpected:
        raise ValueError(
            f"{name} holds weights that {type(model).__name__} has no place for with this config: "
            f"{', '.join(unexpected[:3])}{' …' if len(unexpected) > 3 else ''}. Without them the model computes "
            "something else"
        )
    fix_quantized_gradients(model, name)
    return model if is_quantized or is_sharded else model.to(resolved_device)


def _load_config(name: str, revision: str | None = None, **options: Any) -> PreTrainedConfig:
    return call_from_pretrained(AutoConfig, "a model config", name, revision=revision, **options)


def load_architecture(name: str) -> str:
    """Return the class name in a model's config, "" where the config has none."""
    return (_load_config(name, None).architectures or [""])[0]


def _select_text_model(
    auto_class: Any, config: PreTrainedConfig, name: str, config_options: dict[str, Any]
) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load the text part of a model of several parts alone."""
    if not is_composite(config):
        return {"config": config}
    text_config, mapping = config.get_text_config(), auto_class._model_mapping
    model_class = mapping.get(type(config), None)
    if model_class is not None and getattr(model_class, "config_class", None) is type(text_config):
        return {"config": config}  # transformers takes the text part itself
    if type(text_config) not in mapping:
        if model_class is not None:
            return {"config": config}
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise ValueError(
            f"{name} is a {config.model_type} model, and transformers has no {kind} class for its text part "
            f"({text_config.model_type})"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text_config.quantization_config = quantization
    # A head that the files hold stays apart from the embeddings, whatever the config says.
    text_config.tie_word_embeddings = any(
        getattr(part, "tie_word_embeddings", False) for part in (config, text_config)
    )
    for option, value in config_options.items():
        setattr(text_config, option, value)
    return {"config": text_config, "key_mapping": _TEXT_KEY_MAPPING}


def is_composite(config: PreTrainedConfig) -> bool:
    """Return whether a model has a text part beside others."""
    return "text_config" in config.sub_configs and config.get_text_config() is not config


def _list_unused_weights(
    model: PreTrainedModel, unexpected: Sequence[str], config: PreTrainedConfig, allowed: Sequence[str]
) -> list[str]:
    """Return the weights of the files that the model should have used.

    The parts of a composite model that read images or sound are none of them. They lie beside the modules of the text
    model, never inside.
    """
    names = [name for name in unexpected if name not in allowed and not _MULTI_TOKEN_LAYERS.search(name)]
    if is_composite(config):
        for pattern, replacement in _TEXT_KEY_MAPPING.items():
            names = [re.sub(pattern, replacement, name) for name in names]
        parts = {child for child, _ in model.named_children()}
        parts |= {f"{name}.{child}" for name, part in model.named_children() for child, _ in part.named_children()}
        parts -= {name for name, part in model.named_children() if isinstance(part, PreTrainedModel)}
        names = [name for name in names if any(name.startswith(f"{part}.") for part in parts)]
    return sorted(names)


@contextmanager
def _loading_weights(sharded: bool) -> Iterator[bool]:
    """Load whole weights although DeepSpeed's ZeRO-3 is on, or sharded ones if they are wanted. Yield which.

    transformers shards every model that it loads while a ZeRO-3 config is alive, frozen models too.
    """
    from transformers.integrations import deepspeed

    if sharded or not deepspeed.is_deepspeed_zero3_enabled():
        yield deepspeed.is_deepspeed_zero3_enabled()
        return
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield False
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def get_dtype_name(dtype: str | torch.dtype | None, device: str | torch.device | None = None) -> str:
    """Return the name of the data type of frozen weights that an option gives, or leaves out.

    Every command and function chooses by this rule, so that they can continue each other's results.

    Args:
        dtype: as text or as torch's object. None: bfloat16 on a GPU that computes in it, else float32.
        device: that the weights are loaded to. None: a GPU if there is one, else the CPU.
    """
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: str | torch.device | None) -> bool:
    """Return whether a device is a GPU that computes in bfloat16 without emulation. None: the default device."""
    is_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    return is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def get_device_name(device: str | torch.device | None) -> str | None:
    """Return the name of a device that an option gives as text or as torch's object. None stays None."""
    return None if device is None else str(device)


def resolve_device(device: str | None) -> str:
    """Return `device`, or the default device for None.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {format_error(error)}") from error
    return device
