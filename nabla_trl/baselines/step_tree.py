"""Step-level searches: the tree of one problem, and the steps that are drawn in it.

A reasoning step ends with the token that completes a delimiter, with a stop token, or at a limit
(`nabla_trl.gradient.step_ends`). A method (`nabla_trl.baselines.step_methods`) is a coroutine. It awaits
`StepTree.draw_steps` with the nodes from which it wants a step drawn, and receives the children. The engine batches
the draws and the scoring of all problems, each from the cache of its prefix.

Every draw has its own random stream, by its place in the tree. So a trace depends neither on the batch nor on the
order of problems, and methods that reach the same prefix in the same attempt draw the same steps from it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.engine.engine import Engine
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.gradient.step_ends import StepEndDetector, StepFinder
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.sampling import TokenStatistic, find_token_columns, make_rng
from nabla_trl.rewards.reward import Reward, encode_prompt
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Trace

UNLIMITED = sys.maxsize
MIN_SEGMENT_TOKENS = 4  # before a step may end at its entropy, the uncertain token included, as in GGRO's code


@dataclass(eq=False)
class StepNode:
    """A prefix of a response that ends where a reasoning step ends, or a whole response.

    Attributes:
        tree_path: number of the attempt, then number of the draw at each node from the root to this one.
        token_ids: T ids of the prefix.
        logp: [T] log π of each id.
        partial_delimiter: the end of the text in which a delimiter may have begun.
        is_complete: nothing can follow, because of a stop token or the limit of tokens.
        policy_cache, score_caches: caches of the prefix in policy and reward. Released when no step is drawn from it.
        reward: reward of a complete response, else what the reward gives a turn that is not closed yet.
        log_importance_weight: log π − log q of the last step, where q is the sampler. 0 if it was not asked for.
        num_scored: tokens that the score caches hold. None: all of them.
        output: what the decoder returned of the last step. None of the root, and of a fork.
        num_drawn: steps drawn from this node.
        hidden_states: [T, d] the policy's hidden states that predicted the ids. None: the reward reads none.
        children: the distinct steps drawn from this node, in the order of their first draw.
    """

    tree_path: tuple[int, ...]
    token_ids: list[int]
    logp: Tensor
    partial_delimiter: str
    is_complete: bool
    policy_cache: PrefixState | None
    score_caches: list[ScoreCache]
    reward: float = math.nan
    log_importance_weight: float = 0.0
    num_scored: int | None = None
    output: GenerationOutput | None = None
    num_drawn: int = 0
    hidden_states: Tensor | None = None
    children: list[StepNode] = field(default_factory=list)

    def release_caches(self) -> None:
        """Release what is needed to draw from this node."""
        self.policy_cache, self.score_caches, self.output = None, [], None

    def get_output(self) -> GenerationOutput:
        """Return what the decoder returned of the last step of a node that was drawn and not released."""
        if self.output is None:
            raise RuntimeError("the node was not drawn, or its caches are released")
        return self.output


@dataclass(frozen=True)
class StepDrawing:
    """What a method needs of its draws.

    Attributes:
        is_power_sampling: the reward is (α − 1)·log π. Steps are blocks of `smc_block_tokens` with importance weights.
        top_k_candidates: K, tokens recorded per position.
        records_entropy: record the entropy of every distribution.
        stops_at_entropy: a step ends before the first token whose distribution has at least `entropy_threshold`.
        keeps_caches: complete nodes keep their caches, which the method releases.
    """

    is_power_sampling: bool = False
    top_k_candidates: int = 1
    records_entropy: bool = False
    stops_at_entropy: bool = False
    keeps_caches: bool = False


@dataclass(frozen=True)
class StepSearchSettings:
    """What the trees of a search share.

    Attributes:
        step_finder: finds the ends of steps. None: a step is a block of `max_step_tokens`.
        max_step_tokens: longest step.
        max_flops: budget of FLOPs per problem. 0: none.
        drawing: what the method needs of its draws.
    """

    engine: Engine
    sampling: Sampling
    config: BaselineConfig
    step_finder: StepFinder | None
    max_step_tokens: int
    max_flops: float
    seed: int
    drawing: StepDrawing


@dataclass(eq=False)
class StepTree:
    """What a method sees of its problem.

    Attributes:
        max_new_tokens: most tokens of a response.
        policy_cache, score_caches: caches of the prompt in policy and reward.
        settings: what all problems of the search share.
        prompt_flops: FLOPs of reading the prompt.
        num_attempts: roots that were started.
        num_tokens, num_steps: tokens and steps that were drawn.
        responses: complete responses that the reward can read.
        chosen: the response that the method returns. None: that of the highest reward.
    """

    problem: Problem
    prompt_ids: list[int]
    max_new_tokens: int
    policy_cache: PrefixState
    score_caches: list[ScoreCache]
    settings: StepSearchSettings
    prompt_flops: float
    num_attempts: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    responses: list[StepNode] = field(default_factory=list)
    chosen: StepNode | None = None

    def start_attempt(self) -> StepNode:
        """Return the root of a new attempt: the empty response, with random streams that no other attempt has."""
        self.num_attempts += 1
        return StepNode((self.num_attempts - 1,), [], torch.zeros(0), "", False, self.policy_cache, self.score_caches)

    @property
    def config(self) -> BaselineConfig:
        return self.settings.config

    @property
    def spent_flops(self) -> float:
        return self.settings.engine.flop_counter.get_cost(self.problem.id).flops

    @property
    def is_budget_spent(self) -> bool:
        """Return whether nothing is left of the budget, if there is one."""
        return 0 < self.settings.max_flops <= self.spent_flops

    def count_affordable_responses(self, nodes: Sequence[StepNode] | None = None) -> int:
        """Return how many responses are expected to fit into the rest of the budget.

        A response is expected to be as long as the mean of the complete ones, and a token to cost what tokens cost so
        far, their scoring included. Before the first complete response nothing is known, so any number fits. The first
        attempt always goes on, whatever is left. Without a budget any number fits.

        Args:
            nodes: count the responses that continue these nodes, the first ones first. None: count new responses.
        """
        max_flops = self.settings.max_flops
        remaining_flops = max_flops - self.spent_flops if max_flops else math.inf
        if remaining_flops <= 0 and (self.num_attempts > 1 or self.responses or nodes is None):
            return 0
        if remaining_flops == math.inf or not self.responses:
            return UNLIMITED if nodes is None else len(nodes)
        affordable_tokens = remaining_flops * self.num_tokens / (self.spent_flops - self.prompt_flops)
        mean_length = sum(len(response.token_ids) for response in self.responses) / len(self.responses)
        if nodes is None:
            return int(affordable_tokens / mean_length)
        # A prefix that is longer than the mean response still needs about one step.
        min_tokens = min(mean_length, self.num_tokens / self.num_steps)
        needed_tokens = accumulate(max(mean_length - len(node.token_ids), min_tokens) for node in nodes)
        return sum(tokens <= affordable_tokens for tokens in needed_tokens)

    async def draw_steps(self, nodes: Sequence[StepNode]) -> list[StepNode]:
        """Draw a step from each of these nodes and score the new ones. Equal steps of a node share one child.

        Raises:
            StepSearchError: the reward is NaN or +∞.
        """
        settings, policy, drawing = self.settings, self.settings.engine.policy, self.settings.drawing
        requests, paths, detectors = [], [], []
        for node in nodes:
            paths.append((*node.tree_path, node.num_drawn))
            finder = settings.step_finder
            detectors.append(None if finder is None else StepEndDetector(finder, node.partial_delimiter))
            node.num_drawn += 1
            requests.append(
                GenerationRequest(
                    self.problem.id,
                    self.prompt_ids + node.token_ids,
                    make_rng(settings.seed, self.problem.id, "step", *paths[-1]),
                    min(settings.max_step_tokens, self.max_new_tokens - len(node.token_ids)),
                    node.policy_cache,
                    stop_strings=policy.get_stop_strings(self.problem),
                    response_tokens_in_prefix=len(node.token_ids),
                    should_stop=detectors[-1],
                    stop_entropy=self.config.entropy_threshold if drawing.stops_at_entropy else math.inf,
                    stop_entropy_after=MIN_SEGMENT_TOKENS,
                )
            )
        outputs = await settings.engine.generate(
            requests,
            settings.sampling,
            top_k_candidates=drawing.top_k_candidates,
            return_cache=True,
            return_log_importance_weight=drawing.is_power_sampling,
            statistics_top_k=int(drawing.records_entropy or drawing.stops_at_entropy),
        )
        children, new_children = [], []
        for node, path, detector, output in zip(nodes, paths, detectors, outputs, strict=True):
            self.num_tokens, self.num_steps = self.num_tokens + len(output.ids), self.num_steps + 1
            if drawing.stops_at_entropy:
                output = self._drop_uncertain_end(node, output)
            token_ids = node.token_ids + output.ids
            child = next((child for child in node.children if child.token_ids == token_ids), None)
            if child is None:
                pending_text = "" if detector is None else detector.pending_text
                child = self._add_child(node, path, pending_text, output)
                new_children.append((node, child))
            children.append(child)
        await self._score_children(new_children)
        return children

    def _add_child(
        self, parent: StepNode, tree_path: tuple[int, ...], partial_delimiter: str, output: GenerationOutput
    ) -> StepNode:
        token_ids = parent.token_ids + output.ids
        is_complete = output.finished or len(token_ids) >= self.max_new_tokens
        own_columns = find_token_columns(output.candidates, output.ids)
        logp = torch.cat((parent.logp, output.logp.gather(1, own_columns[:, None])[:, 0]))
        states = output.hidden_states
        if states is not None and parent.hidden_states is not None:
            states = torch.cat((parent.hidden_states, states))
        child = StepNode(
            tree_path, token_ids, logp, partial_delimiter, is_complete, output.cache, [], hidden_states=states
        )
        if self.settings.drawing.keeps_caches:
            child.output = replace(output, cache=None)
        if output.log_importance_weight is not None:
            child.log_importance_weight = float(output.log_importance_weight[:, 0].double().sum())
        parent.children.append(child)
        return child

    def _drop_uncertain_end(self, parent: StepNode, output: GenerationOutput) -> GenerationOutput:
        """Return a step without the token at which it became uncertain, if that is why it ended."""
        assert output.statistics is not None
        limit = self.max_new_tokens - len(parent.token_ids)
        is_uncertain = output.statistics[-1, TokenStatistic.ENTROPY] >= self.config.entropy_threshold
        if output.finished or len(output.ids) < MIN_SEGMENT_TOKENS or len(output.ids) >= limit or not is_uncertain:
            return output
        kept = slice(len(output.ids) - 1)
        cache = output.get_cache()
        return replace(
            output,
            ids=output.ids[kept],
            candidates=output.candidates[kept],
            logp=output.logp[kept],
            statistics=output.statistics[kept],
            hidden_states=None if output.hidden_states is None else output.hidden_states[kept],
            cache=cache.cut(cache.length - 1),
        )

    def fork(self, parent: StepNode, child: StepNode, position: int, token: int | None = None) -> StepNode:
        """Return the prefix of a drawn child up to a position, to draw another continuation from.

        Args:
            position: response tokens of the child that are kept, at least those of its parent.
            token: put behind them in place of the child's own. It is a recorded candidate, and no stop token.
        """
        kept, row, output = slice(position), position - len(parent.token_ids), child.get_output()
        token_ids, logp = child.token_ids[kept], child.logp[kept]
        if token is not None:
            column = int((output.candidates[row] == token).nonzero()[0])
            token_ids, logp = [*token_ids, token], torch.cat((logp, output.logp[row, column : column + 1]))
        assert child.policy_cache is not None
        finder, pending_text = self.settings.step_finder, ""
        if finder is not None:
            detector = StepEndDetector(finder, parent.partial_delimiter)
            for own_token in token_ids[len(parent.token_ids) :]:
                detector(own_token)
            pending_text = detector.pending_text
        return StepNode(
            (*child.tree_path, -1 - position, -1 if token is None else token),
            token_ids,
            logp,
            pending_text,
            False,
            child.policy_cache.cut(len(self.prompt_ids) + len(token_ids) - 1),
            child.score_caches,
            num_scored=position,
            hidden_states=None if child.hidden_states is None else child.hidden_states[: len(token_ids)],
        )

    async def _score_children(self, new_children: Sequence[tuple[StepNode, StepNode]]) -> None:
        """Score new children (parent, child), each from the cache of its parent."""
        engine = self.settings.engine
        samples = [
            Sample(
                self.problem,
                self.prompt_ids,
                child.token_ids,
                draw_info=DrawInfo(
                    engine.policy.model,
                    torch.tensor(child.token_ids)[:, None],
                    child.logp[:, None],
                    child.hidden_states,
                ),
                is_partial=not child.is_complete,
            )
            for _, child in new_children
        ]
        scored = await engine.score(
            samples,
            [parent.score_caches for parent, _ in new_children],
            [len(parent.token_ids) if parent.num_scored is None else parent.num_scored for parent, _ in new_children],
        )
        for (_, child), (reward, caches) in zip(new_children, scored, strict=True):
            child.reward, child.score_caches = reward, caches
            if child.is_complete and reward > -math.inf:
                self.responses.append(child)
            if (child.is_complete and not self.settings.drawing.keeps_caches) or reward == -math.inf:
                child.release_caches()
        broken = next(
            (child.reward for _, child in new_children if child.reward == math.inf or math.isnan(child.reward)), None
        )
        if broken is not None:
            raise StepSearchError(f"the reward {engine.reward.name if engine.reward else ''} gave {broken}")


async def run_with_size(tree: StepTree, size: int | None, search: Callable[[int], Awaitable[object]]) -> None:
    """Search for `size` responses. None: for as many as the budget allows."""
    await (run_to_budget(tree, search) if size is None else search(size))


async def run_to_budget(tree: StepTree, search: Callable[[int], Awaitable[object]]) -> None:
    """Draw one response, and then search for as many more as fit, until the budget is spent.

    Args:
        search: takes the number of responses to search for.
    """
    await search(1)
    # If the first response could not be read, what one costs is not known yet.
    while not tree.responses and tree.count_affordable_responses():
        await search(1)
    while num_responses := tree.count_affordable_responses():
        await search(num_responses)


class StepSearchError(ValueError):
    """A problem that cannot be searched any further."""


# A tree and the size of the method (None: as large as the budget allows) -> the coroutine of the method.
StepSearchMethod = Callable[[StepTree, int | None], Awaitable[None]]


def run_step_search(
    problems: Sequence[Problem],
    *,
    method: StepSearchMethod,
    size: int | None,
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    step_config: BaselineConfig,
    method_name: str,
    max_flops: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    drawing: StepDrawing = StepDrawing(),  # it is frozen
) -> list[Trace]:
    """Return the response with the highest reward that a step-level search finds, for each problem.

    A problem that cannot be run (a prompt that is too long, a reward that cannot read it, NaN) gives a trace with
    `error` set and with what was spent on the problem.

    Args:
        size: size of the method (`nabla_trl.baselines.step_methods`). None: set by `max_flops`.
        max_flops: budget per problem, the prompt included. The first response is drawn whatever it costs. Later a step
            is drawn only if the rest of its response is expected to fit.
        method_name: name of the method in the traces.
        batch_size: prefixes drawn and scored together.
        drawing: what the method needs of its draws.

    Raises:
        ValueError: neither size nor budget, or both. Also as `create_step_finder`.
    """
    if (size is None) == (not max_flops) or max_flops < 0:
        raise ValueError(f"{method_name} needs a size or a budget of FLOPs, one of them")
    step_finder, max_step_tokens = None, step_config.max_step_tokens
    if drawing.is_power_sampling:
        max_step_tokens = step_config.smc_block_tokens
    elif drawing.stops_at_entropy:
        max_step_tokens = sampling.max_new_tokens
    else:
        step_finder = create_step_finder(policy, step_config.resolve_delimiter(reward.step_delimiter))
    settings = StepSearchSettings(
        Engine(policy, reward, num_slots=batch_size),
        sampling,
        step_config,
        step_finder,
        max_step_tokens,
        max_flops,
        seed,
        drawing,
    )
    meta = build_trace_meta(policy, reward.name, f"{sampling} {step_config.get_settings(reward.step_delimiter)}")
    return settings.engine.run_problems(
        problems,
        lambda problem: _search_problem(problem, method, size, settings, method_name, meta),
        max_concurrent=max(1, batch_size // (size or 1)),
    )


async def _search_problem(
    problem: Problem,
    method: StepSearchMethod,
    size: int | None,
    settings: StepSearchSettings,
    method_name: str,
    meta: dict[str, str],
) -> Trace:
    engine = settings.engine
    assert engine.reward is not None
    try:
        ids, limit = encode_prompt(problem, engine.policy, engine.reward, settings.sampling.max_new_tokens)
    except ValueError as failure:
        return build_error_trace(problem, method_name, settings.seed, str(failure), meta)
    policy_cache, score_caches = await engine.read_prompt(Sample(problem, ids, []))
    prompt_flops = engine.flop_counter.get_cost(problem.id).flops
    tree = StepTree(problem, ids, limit, policy_cache, score_caches, settings, prompt_flops)
    error = ""
    try:
        await method(tree, size)
    except StepSearchError as failure:
        error = str(failure)
    best, cost = (
        tree.chosen or max(tree.responses, key=lambda response: response.reward, default=None),
        engine.flop_counter.get_cost(problem.id),
    )
    if best is None or error:
        message = error or f"the reward {engine.reward.name} cannot read any response"
        return build_error_trace(problem, method_name, settings.seed, message, meta, cost)
    return build_response_trace(
        engine.policy,
        problem,
        method=method_name,
        seed=settings.seed,
        prompt_ids=ids,
        response_ids=best.token_ids,
        reward=best.reward,
        cost=cost,
        meta=meta,
        stop_reason="max_flops" if settings.max_flops else "single",
    )


def create_step_finder(policy: Policy, delimiter: str) -> StepFinder:
    """Return the finder of the ends of a policy's steps.

    Raises:
        ValueError: no tokens of the policy write the delimiter, or a server generates in its place.
    """
    if not policy.backend.supports_should_stop:
        raise ValueError("step-level searches draw step by step, which a vLLM server cannot: leave out vllm_url")
    return check_step_delimiter(policy.tokenizer, delimiter, policy.name, policy.forbidden_mask)


def check_step_delimiter(
    tokenizer: PreTrainedTokenizerBase, delimiter: str, name: str, forbidden_mask: Tensor | None = None
) -> StepFinder:
    """Return the finder of the ends of steps. A tokenizer is enough, so that this can be checked before loading.

    Args:
        name: of the policy.
        forbidden_mask: [V] bool, tokens that are never sampled. None: not known yet.

    Raises:
        ValueError: no tokens write the delimiter.
    """
    finder = StepFinder(tokenizer, delimiter)
    delimiter_ids = tokenizer(delimiter, add_special_tokens=False)["input_ids"]
    is_forbidden = forbidden_mask is not None and bool(forbidden_mask[delimiter_ids].any())
    if is_forbidden or not finder.find_step_ends(delimiter_ids):
        raise ValueError(f"no step could end, as no tokens of {name} write {delimiter!r}: give step_delimiter")
    return finder
