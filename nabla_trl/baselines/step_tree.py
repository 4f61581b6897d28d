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
from nabla_trl.baselines.step_config import StepConfig
from nabla_trl.gradient.objectives import Known, Memo, Sample
from nabla_trl.gradient.step_ends import StepEnd, StepFinder
from nabla_trl.models.flops import Meter
from nabla_trl.models.generation import generate, prompt_caches, random_stream
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import Draft, Job
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import error_trace, response_trace, run_meta
from nabla_trl.traces.schema import Trace

UNLIMITED = sys.maxsize


@dataclass(eq=False)
class Node:
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

    place: tuple[int, ...]
    tokens: list[int]
    logp: Tensor
    begun: str
    ended: bool
    cache: Tensor | None
    memos: list[Memo]
    reward: float = math.nan
    drawn: int = 0
    children: list[Node] = field(default_factory=list)

    def release(self) -> None:
        """Forget what is needed to go on from here."""
        self.cache, self.memos = None, []


@dataclass(eq=False)
class Tree:
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
    prompt: list[int]
    room: int
    cache: Tensor
    memos: list[Memo]
    config: StepConfig
    flops: float
    meter: Meter
    bare: float
    attempts: int = 0
    tokens: int = 0
    steps: int = 0
    responses: list[Node] = field(default_factory=list)
    error: str | None = None

    def begin(self) -> Node:
        """The root of a fresh attempt: the empty response, and draws that no other attempt has."""
        self.attempts += 1
        return Node((self.attempts - 1,), [], torch.zeros(0), "", False, self.cache, self.memos)

    @property
    def spent(self) -> float:
        return self.meter.cost(self.problem.id).flops

    def fit(self, nodes: Sequence[Node] | None = None) -> int:
        """How many of the responses that go on from these nodes, the first ones, are expected to fit into the budget;
        None: how many that begin anew.

        They are expected to be as long as those that have ended, and a token to cost what it did so far, its scoring
        included. Until one has ended nothing is known, and any number fits; the first attempt is at one, which goes on
        whatever is left. Without a budget any number fits.
        """
        left = self.flops - self.spent if self.flops else math.inf
        if left <= 0 and (self.attempts > 1 or self.responses or nodes is None):
            return 0
        if left == math.inf or not self.responses:
            return UNLIMITED if nodes is None else len(nodes)
        fit = left * self.tokens / (self.spent - self.bare)  # in tokens
        length = sum(len(one.tokens) for one in self.responses) / len(self.responses)
        if nodes is None:
            return int(fit / length)
        least = min(length, self.tokens / self.steps)  # where a response is longer than others were
        rests = accumulate(max(length - len(node.tokens), least) for node in nodes)
        return sum(rest <= fit for rest in rests)

    def best(self) -> Node | None:
        """The response of the highest reward, the first of equals."""
        return max(self.responses, key=lambda one: one.reward, default=None)


Walk = Generator[list[Node], list[Node], None]
# A tree and the size that was asked for (None: as its budget allows) to the walk.
Method = Callable[[Tree, int | None], Walk]


def solve(
    problems: Sequence[Problem],
    *,
    method: Method,
    size: int | None,
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    steps: StepConfig,
    name: str,
    flops: float = 0.0,
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
    if (size is None) == (not flops) or flops < 0:
        raise ValueError(f"{name} needs a size or a budget of FLOPs, one of them")
    loop = _Loop(policy, reward, sampling, steps, seed, batch_size)
    meta = run_meta(policy, reward.name, f"{sampling} {steps.settings(reward.delimiter)}")
    together = max(1, batch_size // (size or 1))
    traces: list[Trace] = []
    for begin in range(0, len(problems), together):
        batch = problems[begin : begin + together]
        trees, errors = loop.trees(batch, flops)
        loop.run([(tree, method(tree, size)) for tree in trees.values()])
        for problem in batch:
            if problem.id in errors:
                traces.append(error_trace(problem, name, seed, errors[problem.id], meta))
            else:
                traces.append(_trace(policy, reward, trees[problem.id], name, seed, meta))
    return traces


def step_finder(policy: Policy, delimiter: str) -> StepFinder:
    """Finds the ends of a policy's steps.

    Raises:
        ValueError: no tokens of the policy write the delimiter, or a server draws in its place.
    """
    if policy.server is not None:
        raise ValueError("searches over steps draw step by step, which a vLLM server cannot: leave out vllm_url")
    finder = StepFinder(policy.tokenizer, delimiter)
    written = policy.tokenizer(delimiter, add_special_tokens=False)["input_ids"]
    if policy.forbidden[written].any() or not finder.ends(written):
        raise ValueError(f"no step could end, as no tokens of {policy.name} write {delimiter!r}: give step_delimiter")
    return finder


def _trace(policy: Policy, reward: Reward, tree: Tree, name: str, seed: int, meta: dict[str, str]) -> Trace:
    best, cost = tree.best(), tree.meter.cost(tree.problem.id)
    if best is None or tree.error is not None:
        message = tree.error or f"the reward {reward.name} cannot read any response"
        return error_trace(tree.problem, name, seed, message, meta, cost)
    return response_trace(
        policy,
        tree.problem,
        method=name,
        seed=seed,
        prompt=tree.prompt,
        response=best.tokens,
        reward=best.reward,
        cost=cost,
        meta=meta,
        stop="budget" if tree.flops else "single",
    )


class _Loop:
    """Grows trees side by side."""

    def __init__(
        self, policy: Policy, reward: Reward, sampling: Sampling, config: StepConfig, seed: int, batch_size: int
    ):
        self.policy, self.reward, self.sampling, self.config = policy, reward, sampling, config
        self.seed, self.batch_size = seed, batch_size
        self.finder = step_finder(policy, config.delimiter(reward.delimiter))
        self.meter = Meter()

    def trees(self, problems: Sequence[Problem], flops: float) -> tuple[dict[str, Tree], dict[str, str]]:
        """Trees of the problems that can be read, by id, and why the others cannot."""
        self.meter = meter = Meter()
        prompts, rooms, errors = encode_prompts(problems, self.policy, self.reward, self.sampling)
        if not prompts:
            return {}, errors
        with meter.clock([problem.id for problem, _ in prompts]):
            caches = prompt_caches(self.policy, [(problem.id, ids) for problem, ids in prompts], meter)
            memos = self.reward.prompt_memos([Sample(problem, ids, []) for problem, ids in prompts], meter)
        read = zip(prompts, rooms, caches, memos, strict=True)
        return {
            problem.id: Tree(
                problem, ids, room, cache, memo, self.config, flops, meter, bare=meter.cost(problem.id).flops
            )
            for (problem, ids), room, cache, memo in read
        }, errors

    def run(self, walks: Sequence[tuple[Tree, Walk]]) -> None:
        """Go on with all walks until each has come to its end, or its tree to an error."""
        live = [(tree, walk, wanted) for tree, walk in walks if (wanted := next(walk, []))]
        while live:
            with self.meter.clock([tree.problem.id for tree, _, _ in live]):
                children = iter(self.grow([(tree, node) for tree, _, wanted in live for node in wanted]))
                following = []
                for tree, walk, wanted in live:
                    drawn = [next(children) for _ in wanted]
                    if tree.error is None and (more := _send(walk, drawn)):
                        following.append((tree, walk, more))
                live = following

    def grow(self, wanted: Sequence[tuple[Tree, Node]]) -> list[Node]:
        """Draw a step from each of these nodes and score what is new: the children, one of them for equal steps."""
        jobs, places, ends = [], [], []
        for tree, node in wanted:
            places.append((*node.place, node.drawn))
            ends.append(StepEnd(self.finder, node.begun))
            node.drawn += 1
            stream = random_stream(self.seed, tree.problem.id, "step", *places[-1])
            limit = min(self.config.step_tokens, tree.room - len(node.tokens))
            jobs.append(
                Job(
                    tree.problem.id,
                    tree.prompt + node.tokens,
                    stream,
                    limit,
                    node.cache,
                    stop=self.policy.stops(tree.problem),
                    given=len(node.tokens),
                    ends=ends[-1],
                )
            )
        drafts = generate(
            self.policy, jobs, self.sampling, meter=self.meter, keep_cache=True, batch_size=self.batch_size
        )
        children, fresh = [], []
        for (tree, node), place, end, draft in zip(wanted, places, ends, drafts, strict=True):
            tree.tokens, tree.steps = tree.tokens + len(draft.ids), tree.steps + 1
            tokens = node.tokens + draft.ids
            child = next((one for one in node.children if one.tokens == tokens), None)
            if child is None:
                child = _child(tree, node, place, end.begun, draft)
                fresh.append((tree, node, child))
            children.append(child)
        self.score(fresh)
        return children

    def score(self, fresh: Sequence[tuple[Tree, Node, Node]]) -> None:
        """Rewards of new children (tree, parent, child), from where their parents end."""
        samples = [
            Sample(
                tree.problem,
                tree.prompt,
                child.tokens,
                known=Known(self.policy.model, torch.tensor(child.tokens)[:, None], child.logp[:, None]),
                open=not child.ended,
            )
            for tree, _, child in fresh
        ]
        values, memos = self.reward.score(
            samples,
            [node.memos for _, node, _ in fresh],
            meter=self.meter,
            shared=[len(node.tokens) for _, node, _ in fresh],
            keep=True,
        )
        for (tree, _, child), value, memo in zip(fresh, values, memos, strict=True):
            child.reward, child.memos = value, memo
            if math.isnan(value) or value == math.inf:
                tree.error = tree.error or f"the reward {self.reward.name} gave {value}"
            if child.ended and value > -math.inf:
                tree.responses.append(child)
            if child.ended or value == -math.inf:
                child.release()


def _child(tree: Tree, node: Node, place: tuple[int, ...], begun: str, draft: Draft) -> Node:
    tokens = node.tokens + draft.ids
    ended = draft.finished or len(tokens) >= tree.room
    child = Node(place, tokens, torch.cat((node.logp, draft.logp[:, 0])), begun, ended, draft.cache, [])
    node.children.append(child)
    return child


def _send(walk: Walk, drawn: list[Node]) -> list[Node]:
    """What a walk wants next; nothing where it has ended."""
    try:
        return walk.send(drawn)
    except StopIteration:
        return []
