"""Load a model from files, and refuse files that do not hold exactly its weights."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from nabla_trl.utils.formatting import format_error, format_load_error

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(
    auto_class: Any,
    name: str,
    *,
    dtype: str,
    device: str | None,
    revision: str | None = None,
    allowed_missing: str | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """Call `auto_class.from_pretrained`, and refuse files that leave weights newly initialized.

    Args:
        allowed_missing: a weight that may be missing, because the caller loads it.
        config_options: options of the model's config.

    Raises:
        ValueError: nothing can be loaded from `name`, weights are missing, or an unknown dtype or device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    resolved_device = resolve_device(device)
    try:
        model, info = auto_class.from_pretrained(
            name, dtype=DTYPES[dtype], revision=revision, output_loading_info=True, **config_options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(format_load_error("a model", name, error)) from error
    missing = sorted({*info["missing_keys"]} - {allowed_missing})
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: "
            f"they would be random. Is it a {auto_class.__name__.removeprefix('AutoModelFor')} model?"
        )
    return model.to(resolved_device)


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


def load_architecture(name: str, revision: str | None = None) -> str:
    """Return the class name in a model's config, "" where the config has none."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(format_load_error("a model config", name, error)) from error
    return (config.architectures or [""])[0]
