"""The options of the subcommands of `nabla-trl`, apart from the search's (`nabla_trl.search.config.ReasonerConfig`)."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nabla_trl.cli.parsing import quiet_libraries
from nabla_trl.evaluation.method import METHOD_SYNTAX
from nabla_trl.models.options import GradientPoint, PromptOptions
from nabla_trl.utils.fields import option

if TYPE_CHECKING:
    from nabla_trl.models.policy import Policy
    from nabla_trl.rewards.reward import Reward

REWARD_HELP = (
    "a reward model with one label (hub id, path, or folder of a LoRA adapter of one); a folder with a reward.json; "
    "process[@DELIMITER]:NAME for the sum of a reward model's score over the ends of steps, which end with DELIMITER "
    r"(\n\n; escapes \n, \t, \\, \xHH); "
    "logratio:A[,B] for log p_A − log p_B of two causal LMs or adapter folders of causal LMs (B: the policy); or "
    "ensemble[@K]:A,B,… for mean − K·std of reward models (K: 1)"
)
DATASET_HELP = (
    "gsm8k, math500, amc, aime24, aime25, digit_chains, reasoning_gym:FAMILY, or the path of a .jsonl file of problems "
    "or of a .yaml file that describes a data set"
)
VLLM_URL_HELP = (
    "draw the policy's responses from this vLLM server, as http://localhost:8000; it must serve the policy under its "
    "name, without an adapter (nabla_trl/models/vllm_backend.py has the command)"
)
PROMPT_STYLE_HELP = (
    "how the policy is asked: chat (its chat template), few_shot (worked examples of the task, then the question; a "
    "response ends where the model writes the next question), or auto: chat where there is a template"
)
CHAT_TEMPLATE_KWARGS_HELP = """keywords for the policy's chat template, as JSON: {"enable_thinking": false}"""
VLLM_TIMEOUT_HELP = "seconds to wait for one response of the vLLM server"
DEFAULT_EVAL_METHODS = "greedy,best_of_16,nabla,control"
DEFAULT_ADAPTER_EVAL_METHODS = "distilled_greedy,distilled_best_of_1,distilled_best_of_8"


def _requiredoption(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass
class ModelArguments:
    policy: str = _requiredoption("hub id or path of the policy, a causal LM")
    reward: str = _requiredoption(REWARD_HELP)
    adapter: str | None = option(None, "LoRA adapter to put on the policy")
    dtype: str = option("float32", "weights: float32, bfloat16 or float16")
    device: str | None = option(None, "where to run, as cpu or cuda:1; a GPU if there is one")
    audit_file: str | None = option(
        None,
        "what nabla-trl audit --over_optimization --output_file wrote about this reward: a search for more rounds than it trusts is "
        "warned of; a reward.json tells the same of its folder",
    )
    vllm_url: str | None = option(None, VLLM_URL_HELP)
    vllm_timeout: float = option(600.0, VLLM_TIMEOUT_HELP)
    prompt_style: str = option("auto", PROMPT_STYLE_HELP)
    chat_template_kwargs: str | None = option(None, CHAT_TEMPLATE_KWARGS_HELP)

    def __post_init__(self) -> None:
        self.get_prompt_options()

    def get_prompt_options(self) -> PromptOptions:
        return PromptOptions.parse(self.prompt_style, self.chat_template_kwargs)

    def load_policy_and_reward(self, reward_batch_size: int, *, use_adapter: bool = True) -> tuple[Policy, Reward]:
        """Policy (with its adapter, unless told otherwise) and reward, which scores `rows` responses together."""
        from nabla_trl.models.loading import load_policy
        from nabla_trl.models.vllm_backend import connect_vllm
        from nabla_trl.rewards.loading import load_reward
        from nabla_trl.rewards.spec import read_validated_limits

        if self.vllm_url and use_adapter and self.adapter:
            raise ValueError("a vLLM server draws from the policy alone: leave out --vllm_url or --adapter")
        quiet_libraries()
        trust = (
            read_validated_limits(self.audit_file, policy=self.policy, reward=self.reward) if self.audit_file else None
        )
        own = self.adapter if use_adapter else None
        policy = load_policy(
            self.policy, dtype=self.dtype, device=self.device, adapter=own, prompt_options=self.get_prompt_options()
        )
        if self.vllm_url:
            policy = connect_vllm(policy, self.vllm_url, timeout=self.vllm_timeout)
        reward = load_reward(
            self.reward, policy=policy, dtype=self.dtype, device=self.device, batch_size=reward_batch_size
        )
        reward.validated_limits = trust or reward.validated_limits
        return policy, reward

    def build_run_facts(self, **facts: Any) -> dict[str, Any]:
        """Return what a report says of the run: the models, and the other arguments of `run_facts.build_run_facts`."""
        from nabla_trl.evaluation.run_facts import build_run_facts

        return build_run_facts(policy=self.policy, reward=self.reward, **facts)

    def get_settings(self) -> dict[str, str]:
        """What results depend on, the adapter aside."""
        from nabla_trl.rewards.spec import compute_reward_identity

        models = {"policy": self.policy, "reward": compute_reward_identity(self.reward), "dtype": self.dtype}
        return models | get_sampler_settings(self.vllm_url) | self.get_prompt_options().get_changed_settings()


def get_sampler_settings(vllm_url: str | None) -> dict[str, str]:
    """Whose sampler draws, for `claim_settings`: its responses are others. Where the server stands does not matter."""
    return {"sampler": "vllm"} if vllm_url else {}


@dataclass
class SolveArguments:
    seed: int = option(0, "the same seed gives the same answer")


@dataclass
class TracesArguments:
    dataset: str = _requiredoption(DATASET_HELP)
    output_dir: str = _requiredoption("folder to write traces/ into; what is there already is not made again")
    split: str = option("train", "split of the dataset")
    max_problems: int = option(1000, "problems; 0 = all")
    seed: int = option(0, "seed of the search; traces of several seeds can share a folder")


@dataclass
class EvalArguments:
    dataset: str = _requiredoption(DATASET_HELP)
    output_dir: str = _requiredoption("folder of the rows; rows that are there already are not made again")
    eval_methods: str = option(
        "",
        f"comma-separated: {METHOD_SYNTAX}; here L is distilled, the policy of --adapter; empty = {DEFAULT_EVAL_METHODS}, "
        f"with an adapter also {DEFAULT_ADAPTER_EVAL_METHODS}",
    )
    split: str = option("test", "split of the dataset")
    max_problems: int = option(300, "problems; 0 = all")
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of every method that samples"}
    )
    title: str = option("Evaluation", "title of the report")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct and not empty")


@dataclass
class ReportArguments:
    run_dir: str = option("", argparse.SUPPRESS)  # the name that other commands have for it


@dataclass
class ServeArguments:
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 = all of this machine's: set a key then")
    port: int = option(8000, "port to listen at; 0 = any free one")
    api_key: str | None = option(
        None,
        "bearer token that requests must bring; empty = what NABLA_API_KEY holds, which others on this machine cannot "
        "see; without either none is asked for",
    )
    served_model_name: str | None = option(None, "name of the model in requests; empty = that of the policy")
    max_request_flops: float = option(
        0.0, "largest FLOPs budget that a request may ask for, and the budget of those that name none; 0 = no limit"
    )
    max_queue: int = option(1000, "requests that may wait; further ones are refused with status 429")
    request_timeout: float = option(600.0, "seconds from a request to its answer, waiting included")
    batch_window: float = option(0.01, "seconds that a request waits for others to be searched for together with it")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be in [0, 65535], not {self.port}")
        if self.max_queue < 1 or not 0 < self.request_timeout < math.inf or not 0 <= self.batch_window < math.inf:
            raise ValueError("a server needs max_queue >= 1, request_timeout > 0 and batch_window >= 0, all finite")
        if self.api_key == "" or self.served_model_name == "":
            raise ValueError("api_key and served_model_name must not be empty where they are given")


@dataclass
class ExportArguments:
    run_dir: str = _requiredoption("folder of a run of recipes/distill.py, trained and evaluated")
    output_dir: str = _requiredoption("folder to make; it must not be there, or be empty")
    train_method: str | None = option(None, "which checkpoint, as sft or dpo, where the run has several")
    merge: bool = option(False, "also write base and adapter as one model, in merged/, in --dtype")
    dtype: str | None = option(
        None, "of the check and of merged weights: float32, bfloat16 or float16; empty = what the run evaluated in"
    )
    device: str | None = option(None, "where to check, as cpu or cuda:1; a GPU if there is one")
    license: str | None = option(
        None, "licence of the checkpoint, as apache-2.0; empty = the base's, where its card is at hand"
    )
    push_to_hub: str | None = option(None, "also push the folder to this model of the hub, as NAME/MODEL")
    private: bool = option(False, "--push_to_hub: make the model private, if it is new")

    def __post_init__(self) -> None:
        if self.private and not self.push_to_hub:
            raise ValueError("private belongs to push_to_hub: nothing is pushed")


@dataclass
class AuditArguments:
    dataset: str = _requiredoption(DATASET_HELP)
    split: str = option("train", "split of the dataset: audit on problems that nothing is evaluated on")
    max_audit_problems: int = option(64, "problems; 0 = all")
    audit_samples: int = option(16, "samples per problem, at least 2")
    seed: int = option(0, "seed of the samples")
    temperature: float = option(1.0, "sampling temperature")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 = all")
    top_p: float = option(1.0, "nucleus sampling mass; 1 = all")
    min_p: float = option(0.0, "min-p sampling threshold; 0 = off")
    max_new_tokens: int = option(512, "longest response, in tokens")
    batch_size: int = option(256, "responses drawn and scored together")
    output_file: str = option("", "file to write what was found to, as JSON; other commands read its trust by --audit")
    gradient: bool = option(False, "audit the reward's gradient: does it say which token to change?")
    gradient_at: list[str] = field(
        default_factory=lambda: ["direct", "hard", "mixture:0.5", "direct+mixture:0.5"],
        metadata={"help": "--gradient: which gradients, see `point` of the search; the cheapest first"},
    )
    num_swaps: int = option(1000, "--gradient: single-token swaps to compare predicted with true changes on")
    over_optimization: bool = option(False, "audit the search: does accuracy fall as it goes on?")
    max_rounds: int = option(16, "--over_optimization: rounds of the search, which else is as by default")
    beta: float | None = option(
        None, "--gradient, --over_optimization: KL coefficient β of the search; empty = its own default, a KL budget"
    )
    top_k_candidates: int = option(16, "--gradient, --over_optimization: policy tokens considered per position")
    candidate_min_p: float = option(
        0.02, "--gradient, --over_optimization: drop candidates below this fraction of the position's likeliest token"
    )

    def __post_init__(self) -> None:
        if not self.gradient_at or len(set(self.gradient_at)) < len(self.gradient_at):
            raise ValueError("points must be distinct and not empty")
        for text in self.gradient_at:
            GradientPoint.parse(text)
        for name in ("swaps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
