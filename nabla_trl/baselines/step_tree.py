"""Searches over the steps of a response: the tree of one problem, and the loop that grows the trees of many.

A step ends with the token that completes a delimiter, with a stop token, or at a limit (`nabla_trl.gradient.step_ends`). A method
(`nabla_trl.baselines.step_methods`) is a walk: a generator that yields the nodes from which it wants a step drawn, and is sent
what was drawn. The walks of a batch go on together: all that they want is drawn by one `generate` and scored by one
`Reward.score`, each from the cache of its prefix.

Every draw has randomness of its own by its place in the tree, so a trace depends on neither batch nor order, and
methods that come to the same prefix in the same attempt draw the same steps from it.
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
    """The beginning of a response, which ends where a step does; or a whole response.

    Attributes:
        place: which attempt of the walk, and which draw of each node on the way here.
        tokens: ids so far; `logp`: [T] log π of each.
        begun: the end of the text in which a delimiter may have begun.
        ended: nothing can follow: a stop token, or no room.
        reward: of the response if it has ended, else what the reward gives a turn that is not closed yet.
        cache, memos: of this prefix in policy and reward; None and empty where nothing is drawn from it any more.
        drawn: steps drawn from here; `children`: the distinct ones among them, in the order in which they came.
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
        """Forget what is needed to go on from here."""
        self.policy_cache, self.score_caches = None, []


@dataclass(eq=False)
class StepTree:
    """What a walk sees of its problem.

    Attributes:
        room: most tokens of a response.
        flops: budget; 0 = none.
        bare: FLOPs of reading the prompt.
        tokens, steps: how many were drawn.
        responses: those that have ended and can be read.
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
        """The root of a fresh attempt: the empty response, and draws that no other attempt has."""
        self.num_attempts += 1
        return StepNode((self.num_attempts - 1,), [], torch.zeros(0), "", False, self.policy_cache, self.score_caches)

    @property
    def spent_flops(self) -> float:
        return self.flop_counter.get_cost(self.problem.id).flops

    def count_affordable_responses(self, nodes: Sequence[StepNode] | None = None) -> int:
        """How many of the responses that go on from these nodes, the first ones, are expected to fit into the budget;
        None: how many that begin anew.

        They are expected to be as long as those that have ended, and a token to cost what it did so far, its scoring
        included. Until one has ended nothing is known, and any number fits; the first attempt is at one, which goes on
        whatever is left. Without a budget any number fits.
        """
        left = self.max_flops - self.spent_flops if self.max_flops else math.inf
        if left <= 0 and (self.num_attempts > 1 or self.responses or nodes is None):
            return 0
        if left == math.inf or not self.responses:
            return UNLIMITED if nodes is None else len(nodes)
        fit = left * self.num_tokens / (self.spent_flops - self.prompt_flops)  # in tokens
        length = sum(len(one.token_ids) for one in self.responses) / len(self.responses)
        if nodes is None:
            return int(fit / length)
        least = min(length, self.num_tokens / self.num_steps)  # where a response is longer than others were
        rests = accumulate(max(length - len(node.token_ids), least) for node in nodes)
        return sum(rest <= fit for rest in rests)

    def get_best_response(self) -> StepNode | None:
        """The response of the highest reward, the first of equals."""
        return max(self.responses, key=lambda one: one.reward, default=None)


NodeGenerator = Generator[list[StepNode], list[StepNode], None]
# A tree and the size that was asked for (None: as its budget allows) to the walk.
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
    """The response of the highest reward that a search over steps comes to, for each problem.

    A problem that cannot be run (a prompt that leaves no room, a reward that cannot read it, NaN) gives a trace with
    `error` set, and what was spent on it.

    Args:
        size: of the method (`nabla_trl.baselines.step_methods`); None: given by `flops`.
        flops: budget per problem, the prompt included. The first response is drawn whatever it costs; later no step
            is drawn unless the rest of its response is expected to fit.
        batch_size: prefixes drawn and scored together.
        name: of the method in the traces.

    Raises:
        ValueError: neither size nor budget, or both; a delimiter that the policy cannot write; a policy with a server.
    """
    if (size is None) == (not max_flops) or max_flops < 0:
        raise ValueError(f"{method_name} needs a size or a budget of FLOPs, one of them")
    loop = _StepSearchBatch(policy, reward, sampling, step_config, seed, batch_size)
    meta = build_trace_meta(policy, reward.name, f"{sampling} {step_config.get_settings(reward.step_delimiter)}")
    together = max(1, batch_size // (size or 1))
    traces: list[Trace] = []
    for begin in range(0, len(problems), together):
        batch = problems[begin : begin + together]
        trees, errors = loop.build_trees(batch, max_flops)
        loop.run_generators([(tree, method(tree, size)) for tree in trees.values()])
        for problem in batch:
            if problem.id in errors:
                traces.append(build_error_trace(problem, method_name, seed, errors[problem.id], meta))
            else:
                traces.append(_build_trace(policy, reward, trees[problem.id], method_name, seed, meta))
    return traces


def create_step_finder(policy: Policy, delimiter: str) -> StepFinder:
    """Finds the ends of a policy's steps.

    Raises:
        ValueError: no tokens of the policy write the delimiter, or a server draws in its place.
    """
    if not policy.backend.supports_should_stop:
        raise ValueError("searches over steps draw step by step, which a vLLM server cannot: leave out vllm_url")
    finder = StepFinder(policy.tokenizer, delimiter)
    written = policy.tokenizer(delimiter, add_special_tokens=False)["input_ids"]
    if policy.forbidden_mask[written].any() or not finder.find_step_ends(written):
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
    """Grows trees side by side."""

    def __init__(
        self, policy: Policy, reward: Reward, sampling: Sampling, config: StepSearchConfig, seed: int, batch_size: int
    ):
        self.policy, self.reward, self.sampling, self.config = policy, reward, sampling, config
        self.seed, self.batch_size = seed, batch_size
        self.step_finder = create_step_finder(policy, config.resolve_delimiter(reward.step_delimiter))
        self.flop_counter = FlopCounter()

    def build_trees(self, problems: Sequence[Problem], max_flops: float) -> tuple[dict[str, StepTree], dict[str, str]]:
        """Trees of the problems that can be read, by id, and why the others cannot."""
        self.flop_counter = meter = FlopCounter()
        prompts, rooms, errors = encode_prompts(problems, self.policy, self.reward, self.sampling)
        if not prompts:
            return {}, errors
        with meter.measure_seconds([problem.id for problem, _ in prompts]):
            caches = prepare_prompt_caches(self.policy, [(problem.id, ids) for problem, ids in prompts], meter)
            memos = self.reward.compute_prompt_caches([Sample(problem, ids, []) for problem, ids in prompts], meter)
        read = zip(prompts, rooms, caches, memos, strict=True)
        return {
            problem.id: StepTree(
                problem,
                ids,
                room,
                cache,
                memo,
                self.config,
                max_flops,
                meter,
                prompt_flops=meter.get_cost(problem.id).flops,
            )
            for (problem, ids), room, cache, memo in read
        }, errors

    def run_generators(self, generators: Sequence[tuple[StepTree, NodeGenerator]]) -> None:
        """Go on with all walks until each has come to its end, or its tree to an error."""
        live = [(tree, walk, wanted) for tree, walk in generators if (wanted := next(walk, []))]
        while live:
            with self.flop_counter.measure_seconds([tree.problem.id for tree, _, _ in live]):
                children = iter(self.draw_steps([(tree, node) for tree, _, wanted in live for node in wanted]))
                following = []
                for tree, walk, wanted in live:
                    drawn = [next(children) for _ in wanted]
                    if tree.error is None and (more := _send_children(walk, drawn)):
                        following.append((tree, walk, more))
                live = following

    def draw_steps(self, requests: Sequence[tuple[StepTree, StepNode]]) -> list[StepNode]:
        """Draw a step from each of these nodes and score what is new: the children, one of them for equal steps."""
        jobs, places, ends = [], [], []
        for tree, node in requests:
            places.append((*node.tree_path, node.num_drawn))
            ends.append(StepEndDetector(self.step_finder, node.partial_delimiter))
            node.num_drawn += 1
            stream = make_rng(self.seed, tree.problem.id, "step", *places[-1])
            limit = min(self.config.max_step_tokens, tree.max_new_tokens - len(node.token_ids))
            jobs.append(
                GenerationRequest(
                    tree.problem.id,
                    tree.prompt_ids + node.token_ids,
                    stream,
                    limit,
                    node.policy_cache,
                    stop_strings=self.policy.get_stop_strings(tree.problem),
                    response_tokens_in_prefix=len(node.token_ids),
                    should_stop=ends[-1],
                )
            )
        drafts = generate_continuations(
            self.policy,
            jobs,
            self.sampling,
            flop_counter=self.flop_counter,
            return_cache=True,
            batch_size=self.batch_size,
        )
        children, fresh = [], []
        for (tree, node), place, end, draft in zip(requests, places, ends, drafts, strict=True):
            tree.num_tokens, tree.num_steps = tree.num_tokens + len(draft.ids), tree.num_steps + 1
            tokens = node.token_ids + draft.ids
            child = next((one for one in node.children if one.token_ids == tokens), None)
            if child is None:
                child = _add_child(tree, node, place, end.pending_text, draft)
                fresh.append((tree, node, child))
            children.append(child)
        self.compute_rewards(fresh)
        return children

    def compute_rewards(self, new_children: Sequence[tuple[StepTree, StepNode, StepNode]]) -> None:
        """Rewards of new children (tree, parent, child), from where their parents end."""
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
        values, memos = self.reward.score(
            samples,
            [node.score_caches for _, node, _ in new_children],
            flop_counter=self.flop_counter,
            num_shared=[len(node.token_ids) for _, node, _ in new_children],
            return_caches=True,
        )
        for (tree, _, child), value, memo in zip(new_children, values, memos, strict=True):
            child.reward, child.score_caches = value, memo
            if math.isnan(value) or value == math.inf:
                tree.error = tree.error or f"the reward {self.reward.name} gave {value}"
            if child.is_complete and value > -math.inf:
                tree.responses.append(child)
            if child.is_complete or value == -math.inf:
                child.release_caches()


def _add_child(
    tree: StepTree, parent: StepNode, tree_path: tuple[int, ...], partial_delimiter: str, generation: GenerationOutput
) -> StepNode:
    tokens = parent.token_ids + generation.ids
    ended = generation.finished or len(tokens) >= tree.max_new_tokens
    child = StepNode(
        tree_path,
        tokens,
        torch.cat((parent.logp, generation.logp[:, 0])),
        partial_delimiter,
        ended,
        generation.cache,
        [],
    )
    parent.children.append(child)
    return child


def _send_children(generator: NodeGenerator, children: list[StepNode]) -> list[StepNode]:
    """What a walk wants next; nothing where it has ended."""
    try:
        return generator.send(children)
    except StopIteration:
        return []
