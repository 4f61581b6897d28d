"""Turn off what libraries report about a run to their makers. Loads none of these libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# Environment variable -> (value that turns the reports off, module and attribute that hold it after its import).
_SWITCHES: dict[str, tuple[str, str, str]] = {
    # trl (every trainer that is built), transformers, datasets, diffusers, and what the hub reads in a request's agent
    "HF_HUB_DISABLE_TELEMETRY": ("1", "huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY"),
    "HF_UPDATE_DOWNLOAD_COUNTS": ("0", "datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS"),
    # transformers asks a service to convert a hub model without safetensors, and names the model
    "DISABLE_SAFETENSORS_CONVERSION": ("1", "", ""),
    "VLLM_NO_USAGE_STATS": ("1", "", ""),
    "RAY_USAGE_STATS_ENABLED": ("0", "", ""),
}


def disable_telemetry(environ: MutableMapping[str, str] = os.environ) -> None:
    """Turn off the telemetry of libraries in this process and its children.

    A variable that the user has set is left as it is, so that HF_HUB_DISABLE_TELEMETRY=0 turns reports on.
    Trackers that the user asks for (`report_to`) are not touched.
    """
    for variable, (value, module, attribute) in _SWITCHES.items():
        if variable in environ:
            continue
        environ[variable] = value
        if module in sys.modules:  # it has read the environment already
            setattr(sys.modules[module], attribute, value == "1")
