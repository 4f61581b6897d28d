"""Load policies, models, tokenizers and adapters from folders and the hub."""

from nabla_trl.models.loading.adapters import (
    ADAPTER_CONFIG_FILE,
    AdapterInfo,
    find_adapter_folder,
    has_adapter_beside,
    is_adapter,
    merge_adapter,
    read_adapter_info,
    resolve_adapters,
)
from nabla_trl.models.loading.in_memory import (
    check_stays_as_loaded,
    describe_dtype,
    find_tokenizer,
    get_loaded_name,
    get_saved_folder_name,
    is_name_in_memory,
    name_model,
    unwrap_model,
)
from nabla_trl.models.loading.policies import freeze_policy, load_causal_lm, load_policy
from nabla_trl.models.loading.pretrained import (
    DTYPES,
    get_device_name,
    get_dtype_name,
    has_bfloat16,
    load_architecture,
    load_model,
    resolve_device,
    set_trust_remote_code,
    trusting_remote_code,
)
from nabla_trl.models.loading.quantization import fix_quantized_gradients
from nabla_trl.models.loading.tokenizers import load_tokenizer, map_vocabulary

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "DTYPES",
    "AdapterInfo",
    "check_stays_as_loaded",
    "describe_dtype",
    "find_adapter_folder",
    "find_tokenizer",
    "fix_quantized_gradients",
    "freeze_policy",
    "get_device_name",
    "get_dtype_name",
    "get_loaded_name",
    "get_saved_folder_name",
    "has_adapter_beside",
    "has_bfloat16",
    "is_adapter",
    "is_name_in_memory",
    "load_architecture",
    "load_causal_lm",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "map_vocabulary",
    "merge_adapter",
    "name_model",
    "read_adapter_info",
    "resolve_adapters",
    "resolve_device",
    "set_trust_remote_code",
    "trusting_remote_code",
    "unwrap_model",
]
