"""How rloo and grpo sample responses: from π alone, in this process or by vLLM, as TRL offers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from transformers import GenerationConfig

from nabla_trl.models.loading import find_adapter_folder
from nabla_trl.models.policy import Policy
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option

VLLM_MODES = ("colocate", "server")
# Lowest bias that vLLM's API takes: at −100 a token has a probability of about 1e-44.
FORBIDDEN_LOGIT_BIAS = -100.0


@dataclass
class RolloutOptions:
    """Options of vLLM for the responses of rloo and grpo. Names and defaults are those of TRL."""

    use_vllm: bool = option(
        False, "Sample the responses of rloo and grpo with vLLM, which is faster for long responses on GPUs."
    )
    vllm_mode: str = option(
        "colocate",
        "Where vLLM runs: colocate (in the training processes, on their GPUs) or server (a `vllm serve` on other "
        "GPUs, which gets the new weights after each step).",
    )
    vllm_server_base_url: str = option(
        "http://0.0.0.0:8000", "Address of the vLLM server for vllm_mode server, without a password."
    )
    vllm_server_timeout: float = option(240.0, "Seconds to wait for the vLLM server to be up.")
    vllm_group_port: int = option(51216, "Port through which the vLLM server gets new weights.")
    vllm_gpu_memory_utilization: float = option(
        0.3, "Share of each GPU's memory that vLLM reserves in mode colocate. Lower it if training runs out of memory."
    )
    vllm_tensor_parallel_size: int = option(
        1, "GPUs that hold one copy of the policy in mode colocate. It divides the number of processes."
    )
    vllm_max_model_length: int | None = option(
        None, "Longest prompt and response in mode colocate, in tokens (default: that of the policy)."
    )
    vllm_enable_sleep_mode: bool = option(
        False, "Free vLLM's memory during the optimizer steps in mode colocate. Each step then takes longer."
    )
    vllm_model_impl: str = option("vllm", "Implementation of the policy in mode colocate: vllm or transformers.")

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(
            self.vllm_mode in VLLM_MODES,
            f"vllm_mode must be one of {', '.join(VLLM_MODES)}, not {self.vllm_mode!r}",
        )
        with checks.collect("vllm_server_base_url: "):
            url = urlsplit(self.vllm_server_base_url)
            if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password:
                raise ValueError("it must be http://HOST:PORT, without a user name or password")
        checks.require(
            0 < self.vllm_gpu_memory_utilization <= 1, "vllm_gpu_memory_utilization must be above 0 and at most 1"
        )
        checks.require(self.vllm_tensor_parallel_size >= 1, "vllm_tensor_parallel_size must be at least 1")
        checks.raise_faults()

    def check(self, policy: str, num_processes: int) -> None:
        """Refuse vLLM where it cannot run, before anything is loaded.

        Args:
            policy: name of the policy.

        Raises:
            ValueError: vLLM is not installed, the policy is an adapter, or the processes are not whole groups.
        """
        if not self.use_vllm:
            return
        checks = Checks()
        checks.require(
            find_spec("vllm") is not None,
            "use_vllm needs vLLM, which is not installed: pip install 'nabla-trl[vllm]'",
        )
        with checks.collect():
            if find_adapter_folder(policy) is not None:
                raise ValueError(
                    f"{policy} is an adapter, which vLLM cannot start from: leave out use_vllm, or start from whole "
                    "weights (nabla-trl export --merge writes them)"
                )
        checks.require(
            self.vllm_mode != "colocate" or num_processes % self.vllm_tensor_parallel_size == 0,
            f"vllm_tensor_parallel_size {self.vllm_tensor_parallel_size} does not divide {num_processes} processes",
        )
        checks.raise_faults()

    def get_trainer_options(self) -> dict[str, Any]:
        """Return the options as TRL's configurations take them."""
        return {field.name: getattr(self, field.name) for field in fields(RolloutOptions)}


def build_generation_kwargs(policy: Policy, *, use_vllm: bool) -> dict[str, Any]:
    """Return what TRL passes to the sampler beside its own options, so that it draws as the search does.

    Rows of the head without a token are never sampled. Only the policy's stop tokens end a response, whatever
    vLLM reads in the policy's folder.

    Returns:
        Arguments of `GenerationConfig`, or of vLLM's `SamplingParams`.
    """
    forbidden_ids = torch.nonzero(policy.forbidden_mask).flatten().tolist()
    if not use_vllm:
        return {"suppress_tokens": forbidden_ids or None}
    bias = {"logit_bias": dict.fromkeys(forbidden_ids, FORBIDDEN_LOGIT_BIAS)} if forbidden_ids else {}
    num_rows = len(policy.forbidden_mask)
    return {
        "ignore_eos": True,
        "stop_token_ids": sorted(token for token in policy.stop_ids if token < num_rows),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **bias,
    }


@contextmanager
def default_generation_config(model: Any) -> Iterator[None]:
    """Replace the model's generation config by transformers' defaults within the `with` block.

    `generate` fills every option that the caller leaves unset from the model's generation_config.json, so that its
    min_p, bad_words_ids or num_beams would change what is sampled. The model is saved with its config, as it was.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    model_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = model_config
