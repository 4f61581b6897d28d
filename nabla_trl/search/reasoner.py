"""`NablaReasoner`: a policy, a reward and a configuration that solve problems from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.vllm_backend import connect_vllm
from nabla_trl.rewards.function import RewardFunction
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig, make_search_config
from nabla_trl.search.loop import Search, check_gradient, run_search
from nabla_trl.tasks.jsonl_task import build_problems
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import check_whole_number

Question = str | list[dict[str, str]] | Mapping[str, Any] | Problem


class NablaReasoner:
    """A policy, a reward and a configuration of the search.

    Example:
        reasoner = NablaReasoner.from_pretrained("policy", reward="reward-model", max_rounds=8)
        trace = reasoner.solve("What is 7 * 8 + 2?")
        print(trace)  # the answer as it is refined; trace.response is the last one

    Args:
        policy: what `load_policy` takes: a policy, a model in memory or a name.
        reward: what `load_reward` takes: a reward, a model in memory, a function or a name.
        config: the search: a `SearchConfig`, a mapping of its options, or the name of a preset. None: the defaults.
        tokenizer: of a policy in memory. None: that of the model's name.
        reward_tokenizer: of a reward model in memory. None: that of the model's name.

    Raises:
        ValueError: a model that cannot be used, or a function as reward of a search that needs a gradient.
    """

    def __init__(
        self,
        policy: Policy | PreTrainedModel | str | Any,
        reward: Reward | PreTrainedModel | RewardFunction | str | Any,
        config: SearchConfig | Mapping[str, Any] | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | str | None = None,
    ):
        self.policy = load_policy(policy, tokenizer)
        self.reward = load_reward(reward, reward_tokenizer, policy=self.policy)
        self.config = make_search_config(config)
        check_gradient(self.reward, self.config)

    @classmethod
    def from_pretrained(
        cls,
        policy: str | Path | PreTrainedModel | Policy | Any,
        *,
        reward: str | Path | Mapping[str, Any] | PreTrainedModel | RewardFunction | Reward | Any,
        preset: str = "default",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | str | None = None,
        adapter: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        vllm_url: str | None = None,
        prompt_options: PromptOptions | None = None,
        trust_remote_code: bool | None = None,
        **config: Any,
    ) -> NablaReasoner:
        """Load a policy and a reward, and configure the search.

        Args:
            policy: name or folder of a causal language model, or a model in memory (see `load_policy`).
            reward: name or folder of a reward model, another specification of a reward, a model in memory or a
                function (see `load_reward`).
            preset: name of the options to begin with (see `config.PRESETS`).
            tokenizer: of a policy in memory. None: that of the model's name.
            reward_tokenizer: of a reward model in memory. None: that of the model's name.
            adapter: folder of a LoRA adapter of the policy.
            dtype: data type of models that are loaded by name. None: bfloat16 on a GPU that has it, else float32.
            device: device of models that are loaded by name. None: a GPU if there is one.
            vllm_url: address of a vLLM server that generates the responses. It does not support an adapter.
            prompt_options: how the policy is prompted. None: with its chat template.
            trust_remote_code: run code from the models' repositories (see `load_policy`).
            config: options of `SearchConfig`. They win over those of the preset.

        Raises:
            ValueError: an unknown option, or a model that cannot be used.
            ConnectionError: the server does not answer.
        """
        search_config = SearchConfig.from_preset(preset, **config)
        shared: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        named: dict[str, Any] = {"dtype": dtype, "device": device}
        is_named = isinstance(policy, str | Path)
        loaded_policy = load_policy(
            policy, tokenizer, adapter=adapter, prompt_options=prompt_options, **(named if is_named else {}), **shared
        )
        if vllm_url is not None:
            loaded_policy = connect_vllm(loaded_policy, vllm_url)
        if not is_named and device is None:
            named["device"] = loaded_policy.device
        is_reward_named = isinstance(reward, str | Path | Mapping)
        loaded_reward = load_reward(
            reward, reward_tokenizer, policy=loaded_policy, **(named if is_reward_named else {}), **shared
        )
        return cls(loaded_policy, loaded_reward, search_config)

    @overload  # a str is an Iterable[str] to the type checker; here it is one question
    def solve(
        self,
        problems: str | Mapping[str, Any] | Problem,
        *,
        seed: int = 0,
        on_round: Callable[[Search], None] | None = None,
        config: SearchConfig | Mapping[str, Any] | str | None = None,
        **overrides: Any,
    ) -> Trace: ...

    @overload  # one chat or several rows: only their keys tell
    def solve(
        self,
        problems: list[dict[str, Any]],
        *,
        seed: int = 0,
        on_round: Callable[[Search], None] | None = None,
        config: SearchConfig | Mapping[str, Any] | str | None = None,
        **overrides: Any,
    ) -> Any: ...

    @overload
    def solve(
        self,
        problems: Iterable[Question],
        *,
        seed: int = 0,
        on_round: Callable[[Search], None] | None = None,
        config: SearchConfig | Mapping[str, Any] | str | None = None,
        **overrides: Any,
    ) -> list[Trace]: ...

    def solve(
        self,
        problems: Any,
        *,
        seed: int = 0,
        on_round: Callable[[Search], None] | None = None,
        config: SearchConfig | Mapping[str, Any] | str | None = None,
        **overrides: Any,
    ) -> Trace | list[Trace]:
        """Search a response to each question.

        Args:
            problems: one question (a text, a chat as a list of messages, a dict with `question`, or a `Problem`), or
                several questions in a list or a `datasets.Dataset`.
            seed: the same seed gives the same responses.
            on_round: called before each round and after the last one (see `run_search`).
            config: the search for this call. None: that of the reasoner.
            overrides: options of `SearchConfig` for this call, such as max_rounds=2. An option of a group is written
                **{"solver.step_size": 0.5} or solver={"step_size": 0.5}.

        Returns:
            one trace for one question, a list of traces for several.

        Raises:
            ValueError: an empty question, an object that is not a question, duplicate problem ids, or an unknown
                option, which the message names with the most similar one.
        """
        check_whole_number("seed", seed)
        search_config = (self.config if config is None else make_search_config(config)).with_options(**overrides)
        is_single = isinstance(problems, str | Mapping | Problem) or _is_chat(problems)
        if not is_single and not isinstance(problems, Iterable):
            raise ValueError(f"expected a question or a list of questions, not {type(problems).__name__}")
        items = [problems] if is_single else list(problems)
        traces = run_search(
            [as_problem(question, index) for index, question in enumerate(items)],
            policy=self.policy,
            reward=self.reward,
            config=search_config,
            seed=seed,
            on_round=on_round,
        )
        return traces[0] if is_single else traces


def _is_chat(problems: Any) -> bool:
    """Return whether a value is one chat, a list of messages, and not a list of questions."""
    return isinstance(problems, list) and bool(problems) and isinstance(problems[0], dict) and "role" in problems[0]


def as_problem(question: Question, index: int = 0) -> Problem:
    """Return a question as a `Problem`. Without an id of its own, the id holds its index in the list.

    Raises:
        ValueError: an empty text, or messages that are not a chat.
    """
    if isinstance(question, Problem):
        return question
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"question {index} is empty")
        return Problem(id=f"question/{index}", question=question)
    if isinstance(question, Mapping):
        [problem] = build_problems([question])
        return problem if question.get("id") is not None else replace(problem, id=f"question/{index}")
    turns = question if isinstance(question, list) else []
    if not turns or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise ValueError(
            f"question {index}: expected a text, a Problem, or a list of messages with 'role' and 'content'"
        )
    return Problem(id=f"question/{index}", question=turns[-1]["content"], messages=tuple(turns))
