"""The door for users: a policy, a reward and a configuration that solve problems."""

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
    """A policy, a reward and a configuration, ready to solve.

    reasoner = NablaReasoner.from_pretrained("policy", reward="reward-model", beta=0.5, rounds=8)
    trace = reasoner.solve("What is 7 * 8 + 2?")
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
        **config: Any,
    ) -> NablaReasoner:
        """Load a policy and a reward (see `load_policy`, `load_reward`) and configure the search.

        Args:
            vllm_url: a vLLM server that draws the responses (`server.connect`); it knows of no adapter.
            prompting: how the policy is asked, other than by its chat template.
            config: any option of `ReasonerConfig`, over those of the preset.

        Raises:
            ValueError: an unknown option, or whatever loading refuses.
            ConnectionError: the server does not answer.
        """
        settings = SearchConfig.from_preset(preset, **config)
        loaded = load_policy(policy, dtype=dtype, device=device, adapter=adapter, prompt_options=prompt_options)
        if vllm_url is not None:
            loaded = connect_vllm(loaded, vllm_url)
        return cls(loaded, load_reward(reward, policy=loaded, dtype=dtype, device=device), settings)

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
        """Refine one response per question, many at once.

        Args:
            problems: a question (text, chat as a list of messages, or `Problem`) for one trace; a list of
                questions for a list of traces.
            on_round: called before each round and after the last (`search.solve`).

        Raises:
            ValueError: an empty question, something that is no question, or duplicate problem ids.
        """
        if isinstance(problems, str | Problem) or (problems and isinstance(problems[0], dict)):
            return self.solve([problems], seed=seed, on_round=on_round)[0]
        asked = [as_problem(question, index) for index, question in enumerate(problems)]
        return run_search(
            asked, policy=self.policy, reward=self.reward, config=self.config, seed=seed, on_round=on_round
        )


def as_problem(question: Question, index: int = 0) -> Problem:
    """A text or a chat as a `Problem` named by its place in the list.

    Raises:
        ValueError: an empty text, or messages that are not a chat.
    """
    if isinstance(question, Problem):
        return question
    if isinstance(question, str):
        if not question.strip():
            raise ValueError(f"question {index} is empty")
        return Problem(id=f"question/{index}", question=question)
    turns = [turn for turn in question if _is_message(turn)] if isinstance(question, list) else []
    if not turns or len(turns) != len(question):
        raise ValueError(
            f"question {index}: expected a text, a Problem, or a list of messages with 'role' and 'content'"
        )
    return Problem(id=f"question/{index}", question=turns[-1]["content"], messages=tuple(turns))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
