"""Choose what a run leaves out for the machine that it runs on (device, data types, batches), and say it in a line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import SFTConfig

from nabla_trl.models.loading import DTYPES, has_bfloat16
from nabla_trl.planning.batches import choose_search_batch_size, choose_train_batch_size
from nabla_trl.search.config import SearchConfig
from nabla_trl.training.offline import TrainOptions
from nabla_trl.training.peft import LoraArguments

PROMPT_TOKENS = 256  # taken for the length of a prompt; problems are not read before the options are known
_CGROUP_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")
# Options that are chosen here where a run leaves them out.
BATCH_OPTIONS = ("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Machine:
    """What a process of a launch runs on.

    Attributes:
        device: "cuda" or "cpu".
        memory: of the device in bytes. On a CPU the process's share of the machine's.
        has_bfloat16: the device computes in bfloat16 without emulation.
        num_processes: of the launch.
        num_gpus: that this machine has.
    """

    device: str
    memory: float
    has_bfloat16: bool
    num_processes: int
    num_gpus: int

    @classmethod
    def detect(cls, state: PartialState) -> Machine:
        """Return the machine of this process. The total memory counts, so that a resumed run chooses alike."""
        if state.device.type == "cuda":
            memory: float = torch.cuda.mem_get_info(state.device)[1]
            return cls("cuda", memory, has_bfloat16(state.device), state.num_processes, torch.cuda.device_count())
        memory = psutil.virtual_memory().total
        if _CGROUP_LIMIT_FILE.exists() and (limit := _CGROUP_LIMIT_FILE.read_text().strip()).isdigit():
            memory = min(memory, int(limit))  # of a container
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls("cpu", memory, False, state.num_processes, 0)

    def get_defaults(self) -> dict[str, Any]:
        """Return the options that depend on the machine alone. An option of the run wins over them."""
        device = {"use_cpu": True} if self.device == "cpu" else {}
        # TRL's default of bf16 is true without fp16, on any machine.
        return device | ({} if self.has_bfloat16 else {"bf16": False})

    def describe(self, dtype: str, search_batch: int, config: SFTConfig) -> str:
        """Return the line that says where and how a run computes."""
        devices = f"{self.num_processes} × {'GPU' if self.device == 'cuda' else 'CPU process'}"
        unused = self.num_gpus - self.num_processes
        hint = (
            f" ({unused} more GPUs are idle: accelerate launch uses all)"
            if unused > 0 and not ("WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ)
            else ""
        )
        rows = f"{config.per_device_train_batch_size} rows × {config.gradient_accumulation_steps}"
        mixed = "bf16" if config.bf16 else "fp16" if config.fp16 else ""
        training = f"training in batches of {rows}{f' with {mixed}' if mixed else ''}"
        slow = "; bfloat16 and float16 are slow on most CPUs" if self.device == "cpu" and dtype != "float32" else ""
        return f"running on {devices}{hint}: {dtype}, search in batches of {search_batch} problems, {training}{slow}"


def choose_batches(
    machine: Machine,
    given_options: Mapping[str, Any],
    *,
    policy: str,
    reward: str,
    methods: list[str],
    dtype: str,
    search_config: SearchConfig,
    train_options: TrainOptions,
    lora: LoraArguments,
    sft_config: SFTConfig,
) -> dict[str, int]:
    """Return the batch sizes that the options leave out, from the models' configs. All processes choose the same.

    Args:
        given_options: options that the run says, by name.

    Raises:
        ValueError: a model without a config, or a malformed reward.
    """
    missing = [name for name in BATCH_OPTIONS if name not in given_options]
    chosen: dict[str, int] = {}
    if "batch_size" in missing:
        chosen["batch_size"] = choose_search_batch_size(
            policy,
            reward,
            dtype=dtype,
            memory=machine.memory,
            prompt_tokens=PROMPT_TOKENS,
            max_new_tokens=search_config.max_new_tokens,
        )
    if missing[-2:] == list(BATCH_OPTIONS[1:]):
        size, accumulation = choose_train_batch_size(
            policy,
            methods=methods,
            tuning=train_options.tuning,
            lora=lora,
            dtype=dtype if dtype in DTYPES else "float32",
            memory=machine.memory,
            num_tokens=PROMPT_TOKENS + search_config.max_new_tokens,
            num_generations=train_options.num_generations,
            activation_checkpointing=sft_config.gradient_checkpointing,
        )
        chosen |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    return broadcast_object_list([chosen])[0]
