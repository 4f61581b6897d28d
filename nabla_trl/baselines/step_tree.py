"""Step-level searches: the tree of one problem, and the loop that extends the trees of many problems together.

A reasoning step ends with the token that completes a delimiter, with a stop token, or at a limit
(`nabla_trl.gradient.step_ends`). A method (`nabla_trl.baselines.step_methods`) is a generator. It yields the nodes
from which it wants a step drawn, and receives the children. The generators of a batch advance together: all steps that
they want are drawn by one call of `generate_continuations` and scored by one call of `Reward.score`, each from the
cache of its prefix.

Every draw has its own random stream, by its place in the tree. So a trace depends neither on the batch nor on the
order of problems, and methods that reach the same prefix in the same attempt draw the same steps from it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from nabla_trl.baselines.sampling import encode_prompts
from nabla_trl.baselines.step_config import StepSearchConfig
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.gradient.step_ends import StepEndDetector, StepFinder
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, make_rng, prepare_prompt_caches
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Trace

UNLIMITED = sys.maxsize


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
        num_drawn: steps drawn from this node.
        children: the distinct steps drawn from this node, in the order of their first draw.
    """

    tree_path: tuple[int, ...]
    token_ids: list[int]
    logp: Tensor
    partial_delimiter: str
    is_complete: bool
    policy_cache: Tensor | None
    score_caches: list[ScoreCache]
    reward: float = math.nan
    num_drawn: int = 0
    children: list[StepNode] = field(default_factory=list)

    def release_caches(self) -> None:
        """Release what is needed to draw from this node."""
        self.policy_cache, self.score_caches = None, []


@dataclass(eq=False)
class StepTree:
    """What a method sees of its problem.

    Attributes:
        max_new_tokens: most tokens of a response.
        policy_cache, score_caches: caches of the prompt in policy and reward.
        max_flops: budget of FLOPs for the problem. 0: none.
        prompt_flops: FLOPs of reading the prompt.
        num_attempts: roots that were started.
        num_tokens, num_steps: tokens and steps that were drawn.
        responses: complete responses that the reward can read.
        error: why the problem cannot be searched.
    """

    problem: Problem
    prompt_ids: list[int]
    max_new_tokens: int
    policy_cache: Tensor
    score_caches: list[ScoreCache]
    config: StepSearchConfig
    max_flops: float
    flop_counter: FlopCounter
    prompt_flops: float
    num_attempts: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    responses: list[StepNode] = field(default_factory=list)
    error: str | None = None

    def start_attempt(self) -> StepNode:
        """Return the root of a new attempt: the empty response, with random streams that no other attempt has."""
        self.num_attempts += 1
        return StepNode((self.num_attempts - 1,), [], torch.zeros(0), "", False, self.policy_cache, self.score_caches)

    @property
    def spent_flops(self) -> float:
        return self.flop_counter.get_cost(self.problem.id).flops

    def count_affordable_responses(self, nodes: Sequence[StepNode] | None = None) -> int:
        """Return how many responses are expected to fit into the rest of the budget.

        A response is expected to be as long as the mean of the complete ones, and a token to cost what tokens cost so
        far, their scoring included. Before the first complete response nothing is known, so any number fits. The first
        attempt always goes on, whatever is left. Without a budget any number fits.

        Args:
            nodes: count the responses that continue these nodes, the first ones first. None: count new responses.
        """
        remaining_flops = self.max_flops - self.spent_flops if self.max_flops else math.inf
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

    def get_best_response(self) -> StepNode | None:
        """Return the response with the highest reward, the first among equals. None: there is no response."""
        return max(self.responses, key=lambda response: response.reward, default=None)


NodeGenerator = Generator[list[StepNode], list[StepNode], None]
# A tree and the size of the method (None: as large as the budget allows) -> the generator of the method.
StepSearchMethod = Callable[[StepTree, int | None], NodeGenerator]


def run_step_search(
    problems: Sequence[Problem],
    *,
    method: StepSearchMethod,
    size: int | None,
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    step_config: StepSearchConfig,
    method_name: str,
    max_flops: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
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

    Raises:
        ValueError: neither size nor budget, or both. Also as `create_step_finder`.
    """
    if (size is None) == (not max_flops) or max_flops < 0:
        raise ValueError(f"{method_name} needs a size or a budget of FLOPs, one of them")
    step_search = _StepSearchBatch(policy, reward, sampling, step_config, seed, batch_size)
    meta = build_trace_meta(policy, reward.name, f"{sampling} {step_config.get_settings(reward.step_delimiter)}")
    problems_per_batch = max(1, batch_size // (size or 1))
    traces: list[Trace] = []
    for begin in range(0, len(problems), problems_per_batch):
        batch = problems[begin : begin + problems_per_batch]
        trees, errors = step_search.build_trees(batch, max_flops)
        step_search.run_generators([(tree, method(tree, size)) for tree in trees.values()])
        for problem in batch:
            if problem.id in errors:
                traces.append(build_error_trace(problem, method_name, seed, errors[problem.id], meta))
            else:
                traces.append(_build_trace(policy, reward, trees[problem.id], method_name, seed, meta))
    return traces


def create_step_finder(policy: Policy, delimiter: str) -> StepFinder:
    """Return the finder of the ends of a policy's steps.

    Raises:
        ValueError: no tokens of the policy write the delimiter, or a server generates in its place.
    """
    if not policy.backend.supports_should_stop:
        raise ValueError("step-level searches draw step by step, which a vLLM server cannot: leave out vllm_url")
    finder = StepFinder(policy.tokenizer, delimiter)
    delimiter_ids = policy.tokenizer(delimiter, add_special_tokens=False)["input_ids"]
    if policy.forbidden_mask[delimiter_ids].any() or not finder.find_step_ends(delimiter_ids):
        raise ValueError(f"no step could end, as no tokens of {policy.name} write {delimiter!r}: give step_delimiter")
    return finder


def _build_trace(
    policy: Policy, reward: Reward, tree: StepTree, method_name: str, seed: int, run_metadata: dict[str, str]
) -> Trace:
    best, cost = tree.get_best_response(), tree.flop_counter.get_cost(tree.problem.id)
    if best is None or tree.error is not None:
        message = tree.error or f"the reward {reward.name} cannot read any response"
        return build_error_trace(tree.problem, method_name, seed, message, run_metadata, cost)
    return build_response_trace(
        policy,
        tree.problem,
        method=method_name,
        seed=seed,
        prompt_ids=tree.prompt_ids,
        response_ids=best.token_ids,
        reward=best.reward,
        cost=cost,
        meta=run_metadata,
        stop_reason="max_flops" if tree.max_flops else "single",
    )


class _StepSearchBatch:
    """Extends the trees of a batch of problems together."""

    def __init__(
        self, policy: Policy, reward: Reward, sampling: Sampling, config: StepSearchConfig, seed: int, batch_size: int
    ):
        self.policy, self.reward, self.sampling, self.config = policy, reward, sampling, config
        self.seed, self.batch_size = seed, batch_size
        self.step_finder = create_step_finder(policy, config.resolve_delimiter(reward.step_delimiter))
        self.flop_counter = FlopCounter()

    def build_trees(self, problems: Sequence[Problem], max_flops: float) -> tuple[dict[str, StepTree], dict[str, str]]:
        """Return the trees of the problems that can be run, and why the others cannot, by problem id."""
        self.flop_counter = FlopCounter()
        prompts, limits, errors = encode_prompts(problems, self.policy, self.reward, self.sampling)
        if not prompts:
            return {}, errors
        with self.flop_counter.measure_seconds([problem.id for problem, _ in prompts]):
            prompt_ids = [(problem.id, ids) for problem, ids in prompts]
            policy_caches = prepare_prompt_caches(self.policy, prompt_ids, self.flop_counter)
            samples = [Sample(problem, ids, []) for problem, ids in prompts]
            score_caches = self.reward.compute_prompt_caches(samples, self.flop_counter)
        return {
            problem.id: StepTree(
                problem,
                ids,
                limit,
                policy_cache,
                prompt_score_caches,
                self.config,
                max_flops,
                self.flop_counter,
                prompt_flops=self.flop_counter.get_cost(problem.id).flops,
            )
            for (problem, ids), limit, policy_cache, prompt_score_caches in zip(
                prompts, limits, policy_caches, score_caches, strict=True
            )
        }, errors

    def run_generators(self, generators: Sequence[tuple[StepTree, NodeGenerator]]) -> None:
        """Advance all generators until each of them, or its tree, has ended."""
        active = [(tree, generator, nodes) for tree, generator in generators if (nodes := next(generator, []))]
        while active:
            with self.flop_counter.measure_seconds([tree.problem.id for tree, _, _ in active]):
                children = iter(self.draw_steps([(tree, node) for tree, _, nodes in active for node in nodes]))
                still_active = []
                for tree, generator, nodes in active:
                    own_children = [next(children) for _ in nodes]
                    if tree.error is None and (next_nodes := _send_children(generator, own_children)):
                        still_active.append((tree, generator, next_nodes))
                active = still_active

    def draw_steps(self, requests: Sequence[tuple[StepTree, StepNode]]) -> list[StepNode]:
        """Draw a step from each of these nodes and score the new ones. Equal steps of a node share one child."""
        generation_requests, paths, detectors = [], [], []
        for tree, node in requests:
            paths.append((*node.tree_path, node.num_drawn))
            detectors.append(StepEndDetector(self.step_finder, node.partial_delimiter))
            node.num_drawn += 1
            generation_requests.append(
                GenerationRequest(
                    tree.problem.id,
                    tree.prompt_ids + node.token_ids,
                    make_rng(self.seed, tree.problem.id, "step", *paths[-1]),
                    min(self.config.max_step_tokens, tree.max_new_tokens - len(node.token_ids)),
                    node.policy_cache,
                    stop_strings=self.policy.get_stop_strings(tree.problem),
                    response_tokens_in_prefix=len(node.token_ids),
                    should_stop=detectors[-1],
                )
            )
        outputs = generate_continuations(
            self.policy,
            generation_requests,
            self.sampling,
            flop_counter=self.flop_counter,
            return_cache=True,
            batch_size=self.batch_size,
        )
        children, new_children = [], []
        for (tree, node), path, detector, output in zip(requests, paths, detectors, outputs, strict=True):
            tree.num_tokens, tree.num_steps = tree.num_tokens + len(output.ids), tree.num_steps + 1
            token_ids = node.token_ids + output.ids
            child = next((child for child in node.children if child.token_ids == token_ids), None)
            if child is None:
                child = _add_child(tree, node, path, detector.pending_text, output)
                new_children.append((tree, node, child))
            children.append(child)
        self.compute_rewards(new_children)
        return children

    def compute_rewards(self, new_children: Sequence[tuple[StepTree, StepNode, StepNode]]) -> None:
        """Compute the rewards of new children (tree, parent, child), each from the cache of its parent."""
        samples = [
            Sample(
                tree.problem,
                tree.prompt_ids,
                child.token_ids,
                draw_info=DrawInfo(self.policy.model, torch.tensor(child.token_ids)[:, None], child.logp[:, None]),
                is_partial=not child.is_complete,
            )
            for tree, _, child in new_children
        ]
        rewards, score_caches = self.reward.score(
            samples,
            [parent.score_caches for _, parent, _ in new_children],
            flop_counter=self.flop_counter,
            num_shared=[len(parent.token_ids) for _, parent, _ in new_children],
            return_caches=True,
        )
        for (tree, _, child), reward, caches in zip(new_children, rewards, score_caches, strict=True):
            child.reward, child.score_caches = reward, caches
            if math.isnan(reward) or reward == math.inf:
                tree.error = tree.error or f"the reward {self.reward.name} gave {reward}"
            if child.is_complete and reward > -math.inf:
                tree.responses.append(child)
            if child.is_complete or reward == -math.inf:
                child.release_caches()


def _add_child(
    tree: StepTree, parent: StepNode, tree_path: tuple[int, ...], partial_delimiter: str, output: GenerationOutput
) -> StepNode:
    token_ids = parent.token_ids + output.ids
    is_complete = output.finished or len(token_ids) >= tree.max_new_tokens
    logp = torch.cat((parent.logp, output.logp[:, 0]))
    child = StepNode(tree_path, token_ids, logp, partial_delimiter, is_complete, output.cache, [])
    parent.children.append(child)
    return child


def _send_children(generator: NodeGenerator, children: list[StepNode]) -> list[StepNode]:
    """Return the nodes that a generator wants next. Empty: it has ended."""
    try:
        return generator.send(children)
    except StopIteration:
        return []
