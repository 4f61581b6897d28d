"""A function as reward, as TRL's trainers call theirs. It has no gradient by the response's tokens."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch

from nabla_trl.gradient.objectives import Sample, ScoreCache
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.formatting import format_error

# Takes the keywords prompts, completions, completion_ids and columns of the problems, one value per response in each.
# Returns one number per response, None where it has none.
RewardFunction = Callable[..., Any]


def is_reward_function(value: Any) -> bool:
    """Return whether a value is a function. A model, which can be called too, is none."""
    return callable(value) and not isinstance(value, torch.nn.Module | type)


@dataclass
class FunctionReward(Reward):
    """A reward that a function computes from texts, token ids and columns, as TRL's reward functions do.

    The function is called with keywords alone, those that its signature takes: `prompts`, `completions` (texts without
    special tokens), `completion_ids` (token ids of the policy, the end token included), and a list for each column:
    `question`, `answer`, `solution`, `level`, `task`, `id` and the further columns of the problems. It returns a list,
    an array or a tensor of one number per response. A coroutine function is awaited. The FLOPs of a function are not
    known and count as 0. Its seconds count.

    Attributes:
        policy: its tokenizer decodes the responses.
        conversational: give prompts as lists of messages, and completions as lists of one message of the assistant.
            False: as texts. None, as TRL does it: as messages where a problem has `messages`, and else as texts.
    """

    policy: Policy | None = None
    function: RewardFunction | None = None
    conversational: bool | None = None
    _parameters: frozenset[str] | None = field(default=None, repr=False)  # None: all

    @property
    def has_gradient(self) -> bool:
        return False

    def compute_max_new_tokens(self, problem: Problem, prompt_ids: list[int]) -> int:
        """Return the number of tokens that fit into the policy's context, since a function reads any length."""
        assert self.policy is not None
        return max(1, self.policy.context_length - len(prompt_ids))

    def compute_prompt_caches(self, samples: Sequence[Sample], flop_counter: FlopCounter) -> list[list[ScoreCache]]:
        return [[] for _ in samples]

    def score_by_objective(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        *,
        flop_counter: FlopCounter,
        num_shared: Sequence[int] | None = None,
        return_caches: bool = False,
    ) -> tuple[list[float], list[list[float]], list[list[ScoreCache]]]:
        """Return one number per response, and no values of objectives.

        Raises:
            ValueError: the function raised an error, or returned other values than one number per response.
        """
        values = [math.nan] * len(samples)
        kinds = [self._takes_messages(sample.problem) for sample in samples]
        for kind in (False, True):
            rows = [index for index, is_conversational in enumerate(kinds) if is_conversational == kind]
            for begin in range(0, len(rows), self.batch_size):
                indices = rows[begin : begin + self.batch_size]
                batch = [samples[index] for index in indices]
                with flop_counter.measure_seconds([sample.cost_key for sample in batch]):
                    for index, value in zip(indices, self._call(batch, conversational=kind), strict=True):
                        values[index] = value
        return values, [[] for _ in samples], [[] for _ in samples]

    def _takes_messages(self, problem: Problem) -> bool:
        return problem.messages is not None if self.conversational is None else self.conversational

    def _call(self, samples: Sequence[Sample], *, conversational: bool) -> list[float]:
        """Return the function's values of some samples."""
        assert self.policy is not None and self.function is not None
        problems = [sample.problem for sample in samples]
        texts = [
            self.policy.decode_response(sample.response_ids, self.policy.get_stop_strings(sample.problem))
            for sample in samples
        ]
        keywords: dict[str, Any] = _collect_columns(problems)
        keywords |= {
            "prompts": [problem.build_messages() for problem in problems]
            if conversational
            else [problem.question for problem in problems],
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
            "completion_ids": [list(sample.response_ids) for sample in samples],
        }
        if self._parameters is not None:
            keywords = {name: value for name, value in keywords.items() if name in self._parameters}
        try:
            result = self.function(**keywords)
            result = _await(result) if inspect.isawaitable(result) else result
        except Exception as error:  # whatever a user's function may raise
            form = "lists of messages: conversational=False gives texts" if conversational else "texts"
            hint = form if conversational else f"{form}: conversational=True gives lists of messages, as TRL does"
            raise ValueError(
                f"the reward function {self.name} failed with {type(error).__name__}: {format_error(error)} (it got "
                f"{hint})"
            ) from error
        return _read_values(result, len(samples), self.name)


def build_function_reward(
    policy: Policy, function: RewardFunction, *, conversational: bool | None = None, batch_size: int = 256
) -> FunctionReward:
    """Build the reward of a function for a policy.

    Raises:
        ValueError: the function takes neither completions nor completion_ids, or needs arguments without a name.
    """
    name = name_function(function)
    parameters: frozenset[str] | None = None
    signature: list[inspect.Parameter] | None
    try:
        signature = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built-in functions may have none
        signature = None
    if signature is not None and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature):
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = frozenset(parameter.name for parameter in signature if parameter.kind in kinds)
        if not parameters & {"completions", "completion_ids"}:
            raise ValueError(
                f"the reward function {name} takes {', '.join(sorted(parameters)) or 'no names'}, but a reward "
                "function is called with prompts, completions, completion_ids and columns: write "
                "def reward(completions, **columns)"
            )
    return FunctionReward(
        name=f"{name} ({_hash_function(function)})",
        kind="function",
        objectives=[],
        in_vocabulary=torch.ones(policy.forbidden_mask.shape[0], dtype=torch.bool),
        stop_ids=policy.stop_ids,
        batch_size=batch_size,
        policy=policy,
        function=function,
        conversational=conversational,
        _parameters=parameters,
    )


def name_function(function: RewardFunction) -> str:
    """Return the name of a function, or of the class of an object that can be called."""
    if isinstance(function, partial):
        return name_function(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _hash_function(function: RewardFunction) -> str:
    """Return a hash of a function's code and of the values that it closes over, as far as they have a text."""
    parts: list[Any] = []
    if isinstance(function, partial):
        parts += [repr(function.args), repr(sorted(function.keywords.items()))]
        function = function.func
    code = function if hasattr(function, "__code__") else type(function).__call__
    code_object = getattr(code, "__code__", None)
    parts += [] if code_object is None else _list_code(code_object)
    parts += [repr(getattr(code, "__defaults__", None))]
    text = repr(parts) if " at 0x" not in repr(parts) else repr(parts[:2])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _list_code(code: CodeType) -> list[str]:
    """Return the instructions, names and constants of a function and of those inside it."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    constants = [constant for constant in code.co_consts if not inspect.iscode(constant)]
    return [
        code.co_code.hex(),
        repr(code.co_names),
        repr(constants),
        *(text for one in inner for text in _list_code(one)),
    ]


def _collect_columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """Return the columns of problems: those of `Problem`, and further ones that the data had."""
    names = ("id", "question", "answer", "solution", "level", "task")
    columns: dict[str, list[Any]] = {name: [getattr(problem, name) for problem in problems] for name in names}
    further: dict[str, None] = dict.fromkeys(name for problem in problems for name in problem.columns or ())
    return {name: [(problem.columns or {}).get(name) for problem in problems] for name in further} | columns


def _await(awaitable: Any) -> Any:
    """Return what an awaitable gives, also where a loop runs already in this thread, as in a notebook."""

    async def run() -> Any:
        return await awaitable

    coroutine: Coroutine[Any, Any, Any] = run()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _read_values(result: Any, count: int, name: str) -> list[float]:
    """Return one number per response from what a function returned."""
    if isinstance(result, torch.Tensor):
        result = result.detach().float().cpu().numpy()
    expected = f"the reward function {name} must return one number per response, a list of {count}"
    if isinstance(result, Mapping | str) or not hasattr(result, "__len__"):
        raise ValueError(f"{expected}, not {format_error(repr(result), 60)}")
    values = list(result.reshape(-1) if isinstance(result, np.ndarray) and result.size == count else result)
    if len(values) != count:
        raise ValueError(f"{expected}, but it returned {len(values)} values")
    try:
        return [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{expected}, not {format_error(repr(values), 60)}") from error
