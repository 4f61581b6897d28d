"""The policy and the reward of a stage: by name, in memory or loaded already, and what names them in settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.evaluation.run_facts import build_run_facts
from nabla_trl.models.loading import (
    describe_dtype,
    find_adapter_folder,
    get_dtype_name,
    get_saved_folder_name,
    load_policy,
    read_adapter_info,
    trusting_remote_code,
)
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.vllm_backend import connect_vllm
from nabla_trl.planning.preflight import check_policy_files, check_reward_files
from nabla_trl.rewards.function import RewardFunction
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import compute_reward_identity, get_reward_name, read_validated_limits
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import format_suggestion
from nabla_trl.utils.identity import identify_adapter
from nabla_trl.utils.progress import announce

# A hub id or folder, a model of transformers or PEFT in memory, or what `load_policy` and `load_reward` return.
PolicySource: TypeAlias = str | Path | PreTrainedModel | Policy | Any
RewardSource: TypeAlias = str | Path | Mapping[str, Any] | PreTrainedModel | Reward | RewardFunction | Any


class ModelPair:
    """A policy and its reward. What is given by name is loaded when it is first needed.

    Args:
        policy: what `load_policy` takes.
        reward: what `load_reward` takes.
        tokenizer: of a policy in memory, or its name. None: that of the model's name.
        reward_tokenizer: of a reward model in memory, or its name. None: that of the model's name.
        dtype: data type of models that are loaded by name: float32, bfloat16 or float16. None: bfloat16 on a GPU that
            has it, else float32.
        device: device of models that are loaded by name. None: that of the policy if it is in memory, else a GPU if
            there is one, else the CPU.
        adapter: LoRA adapter of the policy, as a hub id or folder.
        prompt_options: how the policy is prompted. None: with its chat template.
        vllm_url: URL of a vLLM server that draws the policy's responses.
        vllm_timeout: seconds to wait for one response of the server.
        audit_file: JSON file of an over-optimization audit, whose limits searches warn about.
        trust_remote_code: run code from the models' repositories (see `load_policy`).

    Raises:
        ValueError: a model in memory that cannot be used, or an adapter with a vLLM server.
    """

    OPTIONS = (
        "tokenizer",
        "reward_tokenizer",
        "dtype",
        "device",
        "adapter",
        "prompt_options",
        "vllm_url",
        "vllm_timeout",
        "audit_file",
        "trust_remote_code",
    )

    def __init__(
        self,
        policy: PolicySource,
        reward: RewardSource,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        adapter: str | None = None,
        prompt_options: PromptOptions | None = None,
        vllm_url: str | None = None,
        vllm_timeout: float = 600.0,
        audit_file: str | None = None,
        trust_remote_code: bool | None = None,
    ):
        if vllm_url and adapter:
            raise ValueError(
                "a vLLM server draws from the policy without an adapter: leave out --vllm_url or --adapter"
            )
        is_named = isinstance(policy, str | Path) or isinstance(reward, str | Path | Mapping)
        if placed := [name for name, value in (("dtype", dtype), ("device", device)) if value and not is_named]:
            raise ValueError(
                f"{' and '.join(placed)}: nothing is loaded by name here, so convert or move the models before"
            )
        self.dtype, self.device, self.adapter = dtype, device, adapter
        self.tokenizer, self.reward_tokenizer, self.prompt_options = tokenizer, reward_tokenizer, prompt_options
        self.vllm_url, self.vllm_timeout, self.audit_file = vllm_url, vllm_timeout, audit_file
        self.trust_remote_code = trust_remote_code
        self.policy_source, self.reward_source = policy, reward
        self._policy: Policy | None = None
        self._reward: Reward | None = None
        if not isinstance(policy, str | Path):
            self._load_policy()
        if not isinstance(reward, str | Path | Mapping):
            self._load_reward(256)

    @classmethod
    def build(
        cls,
        policy: PolicySource,
        reward: RewardSource,
        options: Mapping[str, Any],
        *,
        stage: Callable[..., Any] | None = None,
    ) -> ModelPair:
        """Return a pair with options by name.

        Args:
            stage: the function that was called with these options, whose own arguments a message may suggest.

        Raises:
            ValueError: an unknown option, which the message names with the most similar one.
        """
        check_model_options(options, stage)
        return cls(policy, reward, **options)

    def load(self, reward_batch_size: int = 256) -> tuple[Policy, Reward]:
        """Return the policy and the reward, which the first call loads.

        Args:
            reward_batch_size: responses that the reward scores together, if it is loaded here.

        Raises:
            Faults: files that are missing or do not fit, of the policy and of the reward.
            ValueError: a model that cannot be loaded or used, or an audit file of another reward.
        """
        self._check_files()
        limits = None
        if self.audit_file:  # before the models are loaded
            limits = read_validated_limits(self.audit_file, policy=self.policy_name, reward=self.reward_name)
        policy, reward = self._load_policy(), self._load_reward(reward_batch_size)
        reward.validated_limits = limits or reward.validated_limits
        return policy, reward

    def _check_files(self) -> None:
        """Refuse models whose files cannot be loaded, all of them at once, before any of them is loaded."""
        checks = Checks()
        with trusting_remote_code(self.trust_remote_code):
            if self._policy is None and self.tokenizer is None:
                options = self.get_prompt_options()
                checks.call(check_policy_files, str(self.policy_source), prompt_options=options, adapter=self.adapter)
            if self._reward is None and isinstance(self.policy_source, str | Path):
                checks.call(
                    check_reward_files, self.reward_name, policy=str(self.policy_source), audit_file=self.audit_file
                )
        checks.raise_faults()

    def _load_policy(self) -> Policy:
        if self._policy is None:
            is_named = isinstance(self.policy_source, str | Path)
            name = self.policy_source if is_named else "in memory"
            with announce(f"loading the policy {name}"):
                policy = load_policy(
                    self.policy_source,
                    self.tokenizer,
                    dtype=self.dtype if is_named else None,
                    device=self.device if is_named else None,
                    adapter=self.adapter,
                    prompt_options=self.prompt_options,
                    trust_remote_code=self.trust_remote_code,
                )
            if self.vllm_url:
                policy = connect_vllm(policy, self.vllm_url, timeout=self.vllm_timeout)
            self._policy = policy
        return self._policy

    def _load_reward(self, batch_size: int) -> Reward:
        if self._reward is None:
            policy = self._load_policy()
            is_named = isinstance(self.reward_source, str | Path | Mapping)
            device = self.device
            if device is None and not isinstance(self.policy_source, str | Path):
                device = policy.device
            with announce(f"loading the reward {self.reward_source if is_named else 'in memory'}"):
                self._reward = load_reward(
                    self.reward_source,
                    self.reward_tokenizer,
                    policy=policy,
                    dtype=self.dtype if is_named else None,
                    device=device if is_named else None,
                    batch_size=None if isinstance(self.reward_source, Reward) else batch_size,
                    trust_remote_code=self.trust_remote_code,
                )
        return self._reward

    def load_trained_policy(self, weights: PolicySource, *, must_be_adapter: bool = False) -> Policy:
        """Return a policy that was trained from this one.

        Args:
            weights: an adapter or a full model, as a hub id or folder, a model in memory, or a policy.
            must_be_adapter: refuse a full model that is given by name.
        """
        options = self._load_policy().prompt_options
        if not isinstance(weights, str | Path):
            return load_policy(weights, self.tokenizer if not isinstance(weights, Policy) else None)
        shared: dict[str, Any] = {"prompt_options": options, "trust_remote_code": self.trust_remote_code}
        with announce(f"loading the trained policy {weights}"), trusting_remote_code(self.trust_remote_code):
            folder = find_adapter_folder(str(weights))
            is_adapter = must_be_adapter or folder is not None
            if isinstance(self.policy_source, str | Path):
                base = self.policy_source if is_adapter else weights
                adapter = str(weights) if is_adapter else None
                return load_policy(base, dtype=self.dtype, device=self.device, adapter=adapter, **shared)
            policy = self._load_policy()
            placed = {"dtype": describe_dtype(policy.model), "device": policy.device, **shared}
            if not is_adapter:
                return load_policy(weights, **placed)
            base = read_adapter_info(folder).base_model if folder else ""
            # What `train` has written of a model in memory.
            if Path(base).is_dir() and Path(base).name == get_saved_folder_name(policy.model):
                return load_policy(base, adapter=str(weights), **placed)
            return load_policy(policy.model, policy.tokenizer, adapter=str(weights), **shared)

    # --- names --------------------------------------------------------------------------------------------

    @property
    def policy_name(self) -> str:
        """Return the name of the policy, without its adapter if it is loaded by name."""
        return str(self.policy_source) if isinstance(self.policy_source, str | Path) else self._load_policy().name

    @property
    def reward_name(self) -> str:
        """Return the name of the reward: its spec as text, or that of a model or function in memory."""
        if isinstance(self.reward_source, str | Path | Mapping) and self._reward is None:
            return get_reward_name(
                str(self.reward_source) if isinstance(self.reward_source, Path) else self.reward_source
            )
        return self._load_reward(256).name

    def get_prompt_options(self) -> PromptOptions:
        """Return how the policy is prompted."""
        if self._policy is not None:
            return self._policy.prompt_options
        return PromptOptions() if self.prompt_options is None else self.prompt_options

    def get_settings(self) -> dict[str, str]:
        """Return the settings of the models that results depend on, without the adapter (see `claim_settings`)."""
        is_named = isinstance(self.policy_source, str | Path)
        dtype = get_dtype_name(self.dtype, self.device) if is_named else describe_dtype(self._load_policy().model)
        is_function = self._reward is not None and not self._reward.has_gradient
        identity = self.reward_name if is_function else compute_reward_identity(self.reward_name)
        models = {"policy": self.policy_name, "reward": identity, "dtype": dtype}
        # A vLLM server draws other responses than this process does. Its address does not matter.
        sampler = {"sampler": "vllm"} if self.vllm_url else {}
        return models | sampler | self.get_prompt_options().get_changed_settings()

    def get_adapter_settings(self) -> dict[str, str]:
        """Return the setting of the policy's adapter, empty without one."""
        return {"adapter": identify_adapter(self.adapter) if self.adapter else ""}

    def build_run_facts(self, **facts: Any) -> dict[str, Any]:
        """Return facts of a run with these models, from the other arguments of `run_facts.build_run_facts`."""
        kind = None if self._reward is None else self._reward.kind
        return build_run_facts(policy=self.policy_name, reward=self.reward_name, reward_kind=kind, **facts)


def check_model_options(options: Iterable[str], stage: Callable[..., Any] | None = None) -> None:
    """Refuse names that are no options of `ModelPair`.

    Args:
        stage: the function that was called with these options.
    """
    from nabla_trl.search.config import SearchConfig

    arguments = [] if stage is None else [name for name in signature(stage).parameters if name != "model_options"]
    search = "search" if "search" in arguments else "config"
    unknown = []
    for name in options:
        if name in ModelPair.OPTIONS:
            continue
        hint = format_suggestion(name, [*arguments, *ModelPair.OPTIONS])
        if name.partition(".")[0] in SearchConfig.__dataclass_fields__:
            hint = f": it is an option of the search, as in {search}={{{name!r}: …}}"
        unknown.append(f"unknown option {name!r}{hint}")
    if unknown:
        raise ValueError(f"{'; '.join(unknown)}; the models have the options {', '.join(ModelPair.OPTIONS)}")
