"""Options of the policy and the reward, and help texts that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_trl.cli.parsing import quiet_libraries
from nabla_trl.models.options import PromptOptions
from nabla_trl.tasks.templates import pin_template_date
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.identity import check_settings

if TYPE_CHECKING:
    from nabla_trl.models.policy import Policy
    from nabla_trl.pipeline.models import ModelPair
    from nabla_trl.rewards.reward import Reward

POLICY_HELP = "Hub id or path of the policy, a causal language model."
REWARD_HELP = (
    "Reward to search with: a reward model with one label (hub id, path, or folder of its LoRA adapter), a folder "
    "with a reward.json, process[@DELIMITER]:NAME (sum of a reward model's scores at the ends of reasoning steps, "
    r"which DELIMITER ends, \n\n by default), logratio:A[,B] (log p_A − log p_B of two causal LMs or adapters, B is "
    "the policy by default, and none leaves it out), head:FOLDER (a head on the policy's own hidden states, whose "
    "scores cost nothing), power:ALPHA, or ensemble[@K]:A,B,… (mean − K·std of reward models or of heads, K is 1 by "
    "default)."
)
DATASET_HELP = (
    "Data set: gsm8k, math500, amc, aime24, aime25, digit_chains, reasoning_gym:FAMILY, the path of a .jsonl, .csv, "
    ".json or .parquet file of problems, or the path of a .yaml file that describes a data set."
)
TRUST_REMOTE_CODE_HELP = (
    "Run Python code from the repositories of the models, where transformers has none for them. Read that code first: "
    "it can do whatever you can (default: false)."
)
DEVICE_HELP = "Device to run on, such as cpu or cuda:1 (default: a GPU if there is one, else the CPU)."
REPORT_TO_HELP = (
    "Experiment trackers to send figures to while they are made, such as trackio, wandb or tensorboard. Files of "
    "trackers go to logs/ of --output_dir (default: none)."
)
SEEDS_HELP = (
    "Seeds of every method that samples. Each seed repeats the whole evaluation. Use more seeds for narrower "
    "confidence intervals."
)
DEFAULT_SEEDS = (0, 1, 2)
DOLLARS_HELP = (
    "Price in dollars of an hour of the device that one process uses. Set it to see what queries and training cost in "
    "dollars (default: no dollars)."
)


@dataclass
class PolicyRewardArguments:
    """Policy and reward."""

    policy: str = required_option(POLICY_HELP)
    reward: str = required_option(REWARD_HELP)
    dtype: str | None = option(
        None,
        "Data type of the frozen models' weights: float32, bfloat16 or float16. bfloat16 takes half the memory of "
        "float32 (default: bfloat16 on a GPU that has it, else float32).",
        common=True,
    )
    vllm_url: str | None = option(
        None,
        "URL of a vLLM server that draws the policy's responses, such as http://localhost:8000. The server must serve "
        "the policy under the same name and without an adapter. Use it to sample faster (default: sample in this "
        "process).",
        common=True,
    )
    vllm_timeout: float = option(
        600.0, "Seconds to wait for one response of the vLLM server. Increase it for long responses."
    )
    prompt_style: str = option(
        "auto",
        "How to prompt the policy. chat uses its chat template. few_shot puts worked examples before the question, "
        "and the response ends where the model begins the next question. auto uses chat if the tokenizer has a chat "
        "template. Use few_shot for base models.",
    )
    chat_template_kwargs: str | None = option(
        None,
        'Keywords for the chat template, as a JSON object such as {"enable_thinking": false}. Set it for models with '
        "template switches (default: none).",
    )
    template_date: str | None = option(
        None,
        "Date that chat templates print, such as 2026-11-29. Most templates print none. Set it to repeat an earlier "
        "run (default: the date that --output_dir records, else the time at which the run first needs it).",
    )

    def __post_init__(self) -> None:
        checks = Checks()
        checks.call(self.get_prompt_options)  # refuses wrong values before anything is loaded
        checks.call(pin_template_date, self.template_date)
        checks.raise_faults()

    def get_prompt_options(self) -> PromptOptions:
        """Return the options of prompts.

        Raises:
            ValueError: unknown style, or keywords that are not a JSON object.
        """
        return PromptOptions.parse(self.prompt_style, self.chat_template_kwargs)

    def check_models(self, checks: Checks, **options: Any) -> None:
        """Collect what is wrong with the models, before they are loaded.

        Args:
            options: further ones of `collect_model_faults`, such as the device.
        """
        from nabla_trl.planning.preflight import collect_model_faults

        quiet_libraries()
        with checks.collect():
            prompt_options = self.get_prompt_options()
            collect_model_faults(
                checks,
                policy=self.policy,
                reward=self.reward,
                dtype=self.dtype,
                prompt_options=prompt_options,
                vllm_url=self.vllm_url,
                **options,
            )

    def build_pair(self, **options: Any) -> ModelPair:
        """Return the policy and the reward, which are loaded when they are first needed.

        Args:
            options: further ones of `ModelPair`, such as the device.
        """
        from nabla_trl.pipeline.models import ModelPair

        quiet_libraries()
        return ModelPair(
            self.policy,
            self.reward,
            dtype=self.dtype,
            vllm_url=self.vllm_url,
            vllm_timeout=self.vllm_timeout,
            prompt_options=self.get_prompt_options(),
            **options,
        )


@dataclass
class ModelArguments(PolicyRewardArguments):
    """Policy and reward."""

    adapter: str | None = option(
        None,
        "LoRA adapter of the policy, as a hub id or folder. nabla-trl eval uses it only for the distilled_ methods "
        "(default: none).",
        common=True,
    )
    device: str | None = option(None, DEVICE_HELP, common=True)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE_HELP)
    audit_file: str | None = option(
        None,
        "JSON file that nabla-trl audit --over_optimization --output_file wrote for this reward. A search with more "
        "rounds than the audit validated then prints a warning. A reward folder with a reward.json needs no such file "
        "(default: none).",
    )

    def preflight(self, checks: Checks, **options: Any) -> None:
        """Collect what is wrong with the models and their options (see `check_models`)."""
        from nabla_trl.models.loading import set_trust_remote_code

        set_trust_remote_code(self.trust_remote_code)
        checks.require(
            not (self.vllm_url and self.adapter),
            "a vLLM server draws from the policy without an adapter: leave out --vllm_url or --adapter",
        )
        self.check_models(checks, device=self.device, adapter=self.adapter, audit_file=self.audit_file, **options)

    def build_pair(self, *, use_adapter: bool = True, **options: Any) -> ModelPair:
        """Return the policy and the reward, which are loaded when they are first needed.

        Args:
            use_adapter: load the policy with its adapter.

        Raises:
            ValueError: --vllm_url with an adapter.
        """
        from nabla_trl.models.loading import set_trust_remote_code

        set_trust_remote_code(self.trust_remote_code)
        adapter = self.adapter if use_adapter else None
        return super().build_pair(device=self.device, adapter=adapter, audit_file=self.audit_file, **options)

    def load_policy_and_reward(self, reward_batch_size: int) -> tuple[Policy, Reward]:
        """Load the policy and the reward, with the limits that --audit_file validated.

        Args:
            reward_batch_size: maximum number of responses that the reward scores together.

        Raises:
            ValueError: --vllm_url with an adapter, an audit of another reward, or a model that cannot be loaded.
        """
        return self.build_pair().load(reward_batch_size)


def check_dollars_per_gpu_hour(value: float | None) -> None:
    """Raise ValueError if the price of a GPU hour is not positive and finite."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"dollars_per_gpu_hour must be positive, not {value:g}")


def collect_output_faults(
    checks: Checks, output_dir: str | None, settings_files: Mapping[str, Callable[[], Mapping[str, str]]]
) -> None:
    """Collect what is wrong with an output folder: it cannot be written, or holds an output of other settings.

    Args:
        settings_files: names of files with settings in the folder, and functions that return the settings now.
    """
    from nabla_trl.planning.preflight import check_output_dir

    if not output_dir:
        return
    checks.call(check_output_dir, output_dir)
    for name, get_settings in settings_files.items():
        with checks.collect():
            check_settings(Path(output_dir, name), get_settings())


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError if a list option is empty or has a value twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be distinct values, at least one")
