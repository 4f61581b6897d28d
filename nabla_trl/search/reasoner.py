"""`NablaReasoner`: a policy, a reward and a configuration that solve problems from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.vllm_backend import connect_vllm
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search, run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

Question = str | list[dict[str, str]] | Problem


class NablaReasoner:
    """A policy, a reward and a configuration of the search.

    Example:
        reasoner = NablaReasoner.from_pretrained("policy", reward="reward-model", beta=0.5, max_rounds=8)
        trace = reasoner.solve("What is 7 * 8 + 2?")
        print(trace.response)
    """

    def __init__(self, policy: Policy, reward: Reward, config: SearchConfig | None = None):
        self.policy, self.reward = policy, reward
        self.config = config if config is not None else SearchConfig()

    @classmethod
    def from_pretrained(
        cls,
        policy: str,
        *,
        reward: str | Mapping[str, Any],
        preset: str = "default",
        adapter: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        vllm_url: str | None = None,
        prompt_options: PromptOptions | None = None,
        trust_remote_code: bool | None = None,
        **config: Any,
    ) -> NablaReasoner:
        """Load a policy and a reward, and configure the search.

        Args:
            policy: name or folder of a causal language model (see `load_policy`).
            reward: name or folder of a reward model, or another specification of a reward (see `load_reward`).
            preset: name of the options to begin with (see `config.PRESETS`).
            adapter: folder of a LoRA adapter of the policy.
            vllm_url: address of a vLLM server that generates the responses. It does not support an adapter.
            prompt_options: how the policy is prompted. None: with its chat template.
            trust_remote_code: run code from the models' repositories (see `load_policy`).
            config: options of `SearchConfig`. They win over those of the preset.

        Raises:
            ValueError: an unknown option, or a model that cannot be used.
            ConnectionError: the server does not answer.
        """
        search_config = SearchConfig.from_preset(preset, **config)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        loaded_policy = load_policy(policy, adapter=adapter, prompt_options=prompt_options, **options)
        if vllm_url is not None:
            loaded_policy = connect_vllm(loaded_policy, vllm_url)
        return cls(loaded_policy, load_reward(reward, policy=loaded_policy, **options), search_config)

    @overload  # a str is a Sequence[str] to the type checker; here it is one question
    def solve(  # type: ignore[overload-overlap]
        self, problems: Question, *, seed: int = 0, on_round: Callable[[Search], None] | None = None
    ) -> Trace: ...

    @overload
    def solve(
        self, problems: Sequence[Question], *, seed: int = 0, on_round: Callable[[Search], None] | None = None
    ) -> list[Trace]: ...

    def solve(
        self, problems: Any, *, seed: int = 0, on_round: Callable[[Search], None] | None = None
    ) -> Trace | list[Trace]:
        """Search a response to each question.

        Args:
            problems: one question (a text, a chat as a list of messages, or a `Problem`), or a list of questions.
            seed: the same seed gives the same responses.
            on_round: called before each round and after the last one (see `run_search`).

        Returns:
            one trace for one question, a list of traces for a list.

        Raises:
            ValueError: an empty question, an object that is not a question, or duplicate problem ids.
        """
        if isinstance(problems, str | Problem) or (problems and isinstance(problems[0], dict)):
            return self.solve([problems], seed=seed, on_round=on_round)[0]
        questions = [as_problem(question, index) for index, question in enumerate(problems)]
        return run_search(
            questions, policy=self.policy, reward=self.reward, config=self.config, seed=seed, on_round=on_round
        )


def as_problem(question: Question, index: int = 0) -> Problem:
    """Return a text or a chat as a `Problem`, whose id holds its index in the list.

    Raises:
        ValueError: an empty text, or messages that are not a chat.
    """
    if isinstance(question, Problem):
        return question
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"question {index} is empty")
        return Problem(id=f"question/{index}", question=question)
    turns = question if isinstance(question, list) else []
    if not turns or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise ValueError(
            f"question {index}: expected a text, a Problem, or a list of messages with 'role' and 'content'"
        )
    return Problem(id=f"question/{index}", question=turns[-1]["content"], messages=tuple(turns))
