"""Write the prompts of requests in tokens, beside the engine's thread and at a bounded cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import PromptTooLong, tokenize_prompt
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.reasoner import as_problem
from nabla_trl.serving.fields import ApiError
from nabla_trl.serving.requests import SearchRequest
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.identity import hash_json

NUM_THREADS = 2  # so that a short prompt need not wait for a long one


def make_request_problem(prompt: Any, seed: int, stop: Sequence[str] = ()) -> Problem:
    """Return a prompt as a problem whose id contains the seed.

    `run_search` on this problem with `SEARCH_SEED` gives the same answer as the service.

    Args:
        prompt: a chat (a list of messages), a text, or a list of token ids.
        stop: strings that end an answer.

    Raises:
        ValueError: `prompt` is not a chat (see `as_problem`).
    """
    digest = hash_json([seed, prompt], length=16)
    is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    problem = as_problem(prompt) if is_chat else Problem(id="", question=prompt if isinstance(prompt, str) else "")
    return replace(problem, id=f"request/{digest}", stop_strings=tuple(stop))


class PromptEncoder:
    """Turns requests into problems with prompts in tokens.

    Tokenizers are called by few threads, which the engine does not wait for.
    """

    def __init__(self, policy: Policy, reward: Reward):
        self.policy, self.reward = policy, reward
        # The first call sets the tokenizer's padding, which other threads must not see half done.
        policy.tokenizer("0", add_special_tokens=False)
        self.threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nabla_trl prompts")

    def encode(self, request: SearchRequest) -> list[Problem]:
        """Return one problem per choice: prompt by prompt, and `num_choices` of each.

        Raises:
            ApiError: a prompt is too long, or cannot be read by the policy or the reward.
        """
        problems: list[Problem] = []
        for index, prompt in enumerate(request.prompts):
            is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
            param = "messages" if is_chat else "prompt" if len(request.prompts) == 1 else f"prompt[{index}]"
            try:
                problems += self._encode_choices(prompt, request)
            except ValueError as error:
                code = "context_length_exceeded" if isinstance(error, PromptTooLong) else "invalid_value"
                message = re.sub(r"^request/\w+: ", "", str(error))
                raise ApiError(400, message, param=param, code=code) from error
        return problems

    def _encode_choices(self, prompt: Any, request: SearchRequest) -> list[Problem]:
        """Return the problems of one prompt, one per choice."""
        is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        if is_chat:
            if len(prompt) > self.policy.context_length:  # each message takes a token at least
                raise PromptTooLong(f"the chat has more messages than {self.policy.name} can read tokens")
            self.policy.check_text_length("".join(message["content"] for message in prompt), "request/chat")
        elif isinstance(prompt, str):
            self.policy.check_text_length(prompt, "request/prompt")
        elif len(prompt) >= self.policy.context_length:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens, more than {self.policy.name} can read")
        first = make_request_problem(prompt, request.get_seed(0), request.stop)
        ids = self._encode_chat(first, request) if is_chat else self._encode_prompt(prompt)
        # The reward writes a raw prompt as its own template says, so it gets the text alone.
        question = first.question if is_chat else self.policy.decode(ids)
        problem = replace(first, prompt_ids=tuple(ids), question=question)
        ids = self.policy.encode(problem)
        if not request.only_prompt:  # which is scored by the policy alone
            self.reward.compute_max_new_tokens(problem, ids)
        others = [make_request_problem(prompt, request.get_seed(n)).id for n in range(1, request.num_choices)]
        return [problem, *(replace(problem, id=other) for other in others)]

    def _encode_chat(self, problem: Problem, request: SearchRequest) -> list[int]:
        options = self.policy.prompt_options
        if not request.template_kwargs:
            return self.policy.encode(problem)
        keywords = {**options.chat_template_kwargs, **request.template_kwargs}
        return tokenize_prompt(self.policy.tokenizer, problem, replace(options, chat_template_kwargs=keywords))

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the ids of a raw prompt. Its special tokens are read as such, because clients write whole chats."""
        if not isinstance(prompt, str):
            size = self.policy.forbidden_mask.shape[0]
            if wrong := [token for token in prompt if not 0 <= token < size]:
                raise ValueError(f"the token ids of a prompt must be in [0, {size - 1}], not {wrong[0]}")
            return prompt
        tokenizer = self.policy.tokenizer
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"])

    def close(self) -> None:
        """Drop the prompts that wait."""
        self.threads.shutdown(wait=False, cancel_futures=True)
