"""Budget forcing: a thinking model thinks longer, or is made to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.engine.engine import Engine
from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import encode_prompt
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Trace

THOUGHT_SHARE = 0.75  # of the longest response, by default; the rest is left for the answer


def run_budget_forcing(
    problems: Sequence[Problem],
    *,
    size: int | None,
    policy: Policy,
    sampling: Sampling,
    config: BaselineConfig,
    method_name: str,
    max_flops: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Trace]:
    """Return one response per problem, whose thought is extended or cut (Muennighoff et al., s1, arXiv 2501.19393).

    Where the policy closes its thought, the closing tag is taken back and `wait_text` ("Wait") is written instead, up
    to `size` times. Where the thought reaches its limit, the closing tag is written. Then the policy answers.

    Args:
        size: how often the end of the thought is suppressed. None: as long as the budget leaves tokens for a thought.
        max_flops: budget per problem, the prompt included. It shortens the longest thought, and an answer that would
            go beyond it. A quarter of the longest response is left for the answer, whatever the budget.
        method_name: name of the method in the traces.
        batch_size: problems worked on together.

    Raises:
        ValueError: as `check_thinking`. Also neither size nor budget, or both.
    """
    if (size is None) == (not max_flops):
        raise ValueError(f"{method_name} needs a size or a budget of FLOPs, one of them")
    check_thinking(policy, config)
    engine = Engine(policy, None, num_slots=batch_size)
    meta = build_trace_meta(policy, "none", f"{sampling} {config.get_thinking_settings()}")

    async def force(problem: Problem) -> Trace:
        try:
            prompt_ids, limit = encode_prompt(problem, policy, None, sampling.max_new_tokens)
        except ValueError as error:
            return build_error_trace(problem, method_name, seed, str(error), meta)
        draft = _Draft(problem, engine, sampling, seed, prompt_ids, limit)
        draft.cache, _ = await engine.read_prompt(Sample(problem, prompt_ids, []))
        await _think_and_answer(draft, size, config, max_flops)
        return build_response_trace(
            policy,
            problem,
            method=method_name,
            seed=seed,
            prompt_ids=prompt_ids,
            response_ids=draft.ids,
            reward=math.nan,
            cost=engine.flop_counter.get_cost(problem.id),
            meta=meta,
            stop_reason="max_flops" if max_flops else "single",
        )

    return engine.run_problems(problems, force, max_concurrent=batch_size)


async def _think_and_answer(draft: _Draft, size: int | None, config: BaselineConfig, max_flops: float) -> None:
    policy = draft.engine.policy
    closing_ids, wait_ids = (_encode(policy, text) for text in (policy.thought_closings[0], config.wait_text))
    thought_limit = min(config.max_thinking_tokens or int(THOUGHT_SHARE * draft.limit), draft.limit - len(closing_ids))
    num_extensions, is_closed = 0, False
    while (num_left := _count_thought_tokens(draft, thought_limit, max_flops)) > 0:
        length = len(draft.ids)
        await draft.draw(num_left, policy.thought_closings)
        if draft.is_finished:  # the policy ended its turn, so there is no thought to go on with
            return
        thought_length = draft.find_thought_end(policy.thought_closings, length)
        is_closed = thought_length is not None
        num_left = _count_thought_tokens(draft, thought_limit, max_flops)
        if thought_length is None or num_extensions == size or num_left <= len(wait_ids):
            break
        draft.take_back(thought_length)
        await draft.write(wait_ids)
        num_extensions, is_closed = num_extensions + 1, False
    if not is_closed:
        await draft.write(closing_ids)
    num_left = draft.limit - len(draft.ids)
    if max_flops:  # a thought that the budget cut short leaves no more tokens for the answer
        num_left = min(num_left, max(_count_affordable_tokens(draft, max_flops), draft.limit - thought_limit))
    if num_left > 0:
        await draft.draw(num_left, ())


def _count_thought_tokens(draft: _Draft, thought_limit: int, max_flops: float) -> int:
    """Return how many more tokens the thought may have, so that an answer still fits into limit and budget."""
    num_left = thought_limit - len(draft.ids)
    if max_flops:
        num_left = min(num_left, _count_affordable_tokens(draft, max_flops) - (draft.limit - thought_limit))
    # The first thought has at least one token, whatever is left.
    return num_left if draft.ids else max(1, num_left)


def _count_affordable_tokens(draft: _Draft, max_flops: float) -> int:
    """Return how many more tokens fit into the budget, each at the cost of the next one."""
    policy, counter = draft.engine.policy, draft.engine.flop_counter
    token_flops = policy.size.compute_forward_flops(len(draft.prompt_ids) + len(draft.ids), 1)
    return int((max_flops - counter.get_cost(draft.problem.id).flops) / token_flops)


@dataclass
class _Draft:
    """A response that is being written.

    Attributes:
        limit: most tokens of the response.
        ids: tokens so far.
        cache: state of the prompt and the response but the last token.
        is_finished: the policy has ended its turn.
    """

    problem: Problem
    engine: Engine
    sampling: Sampling
    seed: int
    prompt_ids: list[int]
    limit: int
    ids: list[int] = field(default_factory=list)
    cache: PrefixState | None = None
    is_finished: bool = False
    num_requests: int = 0

    async def draw(self, max_new_tokens: int, closings: tuple[str, ...]) -> None:
        """Draw tokens up to the end of the turn, or up to one of these texts."""
        policy, new_ids = self.engine.policy, list[int]()
        stops = policy.get_stop_strings(self.problem)
        # A token writes at least a byte of a text. Stop strings do not see special tokens, which tags may be.
        window = max((len(text.encode()) for text in closings), default=0)

        def closes_thought(token: int) -> bool:
            new_ids.append(token)
            return any(text in policy.decode(new_ids[-window:]) for text in closings)

        self.num_requests += 1
        request = GenerationRequest(
            self.problem.id,
            self.prompt_ids + self.ids,
            make_rng(self.seed, self.problem.id, "thought", self.num_requests),
            max_new_tokens,
            self.cache,
            stops,
            should_stop=closes_thought,
        )
        [output] = await self.engine.generate([request], self.sampling, return_cache=True)
        self.ids, self.cache = self.ids + output.ids, output.get_cache()
        self.is_finished = output.finished

    def find_thought_end(self, closings: tuple[str, ...], begin: int) -> int | None:
        """Return how many tokens stand before the text that closes the thought. None: it is not closed.

        Args:
            begin: tokens that were there before.
        """
        policy, length = self.engine.policy, len(self.ids)
        while length > begin and any(text in policy.decode(self.ids[begin:length]) for text in closings):
            length -= 1
        return length if length < len(self.ids) else None

    def take_back(self, length: int) -> None:
        """Drop all tokens but the first ones."""
        assert self.cache is not None
        self.ids, self.cache = self.ids[:length], self.cache.cut(len(self.prompt_ids) + length - 1)

    async def write(self, token_ids: Sequence[int]) -> None:
        """Append given tokens. The policy reads each of them once, as it reads tokens of its own."""
        for token in token_ids:
            self.num_requests += 1
            rng = make_rng(self.seed, self.problem.id, "thought", self.num_requests)
            request = GenerationRequest(self.problem.id, self.prompt_ids + self.ids, rng, 1, self.cache)
            # A step of the decoder reads the last token. What it draws is replaced by the given token.
            [output] = await self.engine.generate([request], self.sampling, return_cache=True)
            self.ids, self.cache = [*self.ids, token], output.get_cache()


def check_thinking(policy: Policy, config: BaselineConfig) -> None:
    """Refuse a policy that does not think, or that cannot write the text that goes on with a thought."""
    if not policy.thought_closings:
        raise ValueError(f"budget_forcing needs a policy that thinks: {policy.name} has no token that ends a thought")
    if not policy.backend.returns_caches:
        raise ValueError("budget_forcing writes tokens into a thought, which a vLLM server cannot: leave out vllm_url")
    if policy.decode(_encode(policy, config.wait_text)).strip() != config.wait_text.strip():
        raise ValueError(f"{policy.name} cannot write {config.wait_text!r}: give another wait_text")


def _encode(policy: Policy, text: str) -> list[int]:
    return list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
