"""The decoding loop: draw a response, then propose branches, regenerate suffixes, keep what scores higher.

One loop for every solver, so the control (`solver="none"`) differs in nothing but the gradient. Many problems
run in one batch; each owns its randomness, so a trace does not depend on batch, order or shard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nabla_trl import propose
from nabla_trl.chain import Chain, Proposal
from nabla_trl.compute import Meter
from nabla_trl.config import ReasonerConfig
from nabla_trl.generate import Draft, Job, generate, prompt_caches, random_stream
from nabla_trl.models import Policy
from nabla_trl.records import error_trace, response_trace, run_meta
from nabla_trl.rewards import Reward
from nabla_trl.tasks import Problem
from nabla_trl.terms import Known, Memo, Sample
from nabla_trl.traces import Revision, Trace


def solve(
    problems: Sequence[Problem], *, policy: Policy, reward: Reward, config: ReasonerConfig, seed: int = 0
) -> list[Trace]:
    """Refine one response per problem.

    A problem that cannot be run (prompt longer than a context, unreadable characters, NaN reward or gradient)
    gives a trace with `error` set; the others are not affected.

    Raises:
        ValueError: duplicate problem ids.
    """
    name, count = Counter(problem.id for problem in problems).most_common(1)[0] if problems else ("", 0)
    if count > 1:
        raise ValueError(f"problem id {name!r} occurs {count} times")
    traces: list[Trace] = []
    for begin in range(0, len(problems), config.batch_size):
        batch = problems[begin : begin + config.batch_size]
        traces += _Search(policy, reward, config, seed).run(batch)
    return traces


class _Search:
    """One batch of chains and the meter of their work."""

    def __init__(self, policy: Policy, reward: Reward, config: ReasonerConfig, seed: int):
        self.policy, self.reward, self.seed = policy, reward, seed
        self.config = config = config.at(reward.point)
        self.meter = Meter()
        self.meta = run_meta(policy, reward.name, config.hash())

    def run(self, problems: Sequence[Problem]) -> list[Trace]:
        failed: dict[str, Trace] = {}
        chains = self.start(problems, failed)
        while active := [chain for chain in chains if not chain.stop]:
            with self.meter.clock([chain.problem.id for chain in active]):
                self.round(active)
        done = {chain.problem.id: self.trace(chain) for chain in chains}
        return [failed[p.id] if p.id in failed else done[p.id] for p in problems]

    def start(self, problems: Sequence[Problem], failed: dict[str, Trace]) -> list[Chain]:
        prompts: list[tuple[Problem, list[int]]] = []
        rooms: list[int] = []
        for problem in problems:
            try:
                ids = self.policy.encode(problem)
                rooms.append(self.room(problem, ids))
                prompts.append((problem, ids))
            except ValueError as error:
                failed[problem.id] = error_trace(problem, self.config.method, self.seed, str(error), self.meta)
        if not prompts:
            return []
        keys = [problem.id for problem, _ in prompts]
        with self.meter.clock(keys):
            caches = prompt_caches(self.policy, [(p.id, ids) for p, ids in prompts], self.meter)
            jobs = [
                Job(p.id, ids, self.stream(p, "suffix", 0), room, cache)
                for (p, ids), room, cache in zip(prompts, rooms, caches, strict=True)
            ]
            drafts = self.draw(jobs)
            samples = [
                Sample(p, ids, d.ids, known=Known(self.policy.model, d.candidates, d.logp))
                for (p, ids), d in zip(prompts, drafts, strict=True)
            ]
            bare = self.reward.prompt_memos(samples, self.meter)
            rewards, memos = self.reward.score(samples, bare, meter=self.meter, keep=True)
        chains = [
            Chain(
                problem=sample.problem,
                prompt=sample.prompt,
                room=room,
                response=draft.ids,
                finished=draft.finished,
                candidates=draft.candidates,
                logp=draft.logp,
                cache=draft.kept(),
                prompt_memos=first,
                memos=memo,
                reward=value,
                initial=draft.ids,
                initial_reward=value,
            )
            for sample, room, draft, first, memo, value in zip(
                samples, rooms, drafts, bare, memos, rewards, strict=True
            )
        ]
        for chain in chains:
            self.check(chain, chain.reward)
        return chains

    def round(self, active: list[Chain]) -> None:
        """One round of every active chain: solve where needed, propose, regenerate, score, accept."""
        for chain in active:
            chain.stop = self.limit_reached(chain)
        active = [chain for chain in active if not chain.stop]
        self.solve_tokens([chain for chain in active if chain.scores is None])
        active = [chain for chain in active if not chain.stop]
        proposals: list[Proposal] = []
        for chain in active:
            drawn = self.propose(chain)
            if not drawn:
                chain.stop = "exhausted" if self.config.proposals == "global" else "scanned"
            elif self.over_budget(chain, [position for position, _ in drawn]):
                chain.stop = "budget"
            else:
                proposals += [self.branch(chain, position, token) for position, token in drawn]
        if proposals:
            self.regenerate(proposals)
            self.judge(proposals)

    def limit_reached(self, chain: Chain) -> str:
        config = self.config
        if config.rounds and chain.rounds >= config.rounds:
            return "rounds"
        if config.rollouts and chain.rollouts + config.branches > config.rollouts:
            return "rollouts"
        if config.patience and chain.idle >= config.patience:
            return "patience"
        if self.over_budget(chain, [len(chain.response) // 2] * config.branches):
            return "budget"
        return ""

    def over_budget(self, chain: Chain, positions: list[int]) -> bool:
        """Whether branches at these positions would be expected to end beyond the FLOPs budget."""
        if not self.config.flops:
            return False
        spent = self.meter.cost(chain.problem.id).flops
        return (
            spent + propose.expected_flops(chain, positions, self.policy, self.reward, self.config) > self.config.flops
        )

    def solve_tokens(self, chains: list[Chain]) -> None:
        if not chains:
            return
        propose.solve_tokens(chains, self.policy, self.reward, self.config, self.meter)
        for chain in chains:
            if chain.solved().isnan().any():
                chain.error, chain.stop = f"the token gradient of {self.reward.name} holds NaN", "error"

    def propose(self, chain: Chain) -> list[tuple[int, int]]:
        readable = self.reward.readable
        if self.config.proposals == "global":
            noise = self.stream(chain.problem, "branch", chain.rounds).gumbel(size=tuple(chain.candidates.shape))
            return propose.global_branches(chain, torch.from_numpy(noise), readable, self.config)
        stream = self.stream(chain.problem, "resample", chain.rounds)
        return propose.sequential_branch(chain, stream, readable, self.config)

    def branch(self, chain: Chain, position: int, token: int) -> Proposal:
        return Proposal(chain, position, token, [*chain.response[:position], token])

    def regenerate(self, proposals: list[Proposal]) -> None:
        """Draw the suffixes of all open branches in one batch, from the incumbents' caches."""
        jobs, open_ = [], []
        for proposal in proposals:
            chain = proposal.chain
            chain.rollouts += 1
            limit = chain.room - len(proposal.response)
            if proposal.finished(self.policy.stop_ids) or limit < 1:
                continue
            stream = self.stream(chain.problem, "suffix", chain.rollouts - 1)
            prefix = chain.prompt + proposal.response
            jobs.append(Job(chain.problem.id, prefix, stream, limit, self.prefix_cache(proposal)))
            open_.append(proposal)
        for proposal, draft in zip(open_, self.draw(jobs), strict=True):
            proposal.draft = draft
            proposal.response = proposal.response + draft.ids

    def prefix_cache(self, proposal: Proposal) -> Tensor:
        """kv row of the prompt and the response before the branch."""
        return proposal.chain.cache[:, :, :, : len(proposal.chain.prompt) + proposal.position]

    def judge(self, proposals: list[Proposal]) -> None:
        """Score all proposals as incumbents are scored, and keep each chain's best if it is strictly higher."""
        rewards, memos = self.reward.score(
            [p.drawn(self.policy.model) for p in proposals],
            [p.chain.memos for p in proposals],
            meter=self.meter,
            shared=[p.position for p in proposals],
            keep=True,
        )
        rounds: dict[str, list[int]] = {}
        for index, proposal in enumerate(proposals):
            rounds.setdefault(proposal.chain.problem.id, []).append(index)
        for rows in rounds.values():
            self.judge_chain([proposals[i] for i in rows], [rewards[i] for i in rows], [memos[i] for i in rows])

    def judge_chain(self, proposals: list[Proposal], rewards: list[float], memos: list[list[Memo]]) -> None:
        chain = proposals[0].chain
        if any(math.isnan(value) for value in rewards):
            self.check(chain, math.nan)
            return
        best = max(range(len(rewards)), key=rewards.__getitem__)
        keep = best if rewards[best] > chain.reward else None
        spent = self.meter.cost(chain.problem.id).flops
        for index, (proposal, value) in enumerate(zip(proposals, rewards, strict=True)):
            chain.revisions.append(
                Revision(
                    round=chain.rounds,
                    position=proposal.position,
                    old=chain.response[proposal.position],
                    new=proposal.token,
                    suffix=tuple(proposal.response[proposal.position :]),
                    reward_before=chain.reward,
                    reward_after=value,
                    accepted=index == keep,
                    flops=spent,
                )
            )
            chain.tried.add((proposal.position, proposal.token))
        chain.rounds += 1
        chain.idle += 1
        if keep is not None:
            self.accept(chain, proposals[keep], rewards[keep], memos[keep])

    def accept(self, chain: Chain, proposal: Proposal, value: float, memos: list[Memo]) -> None:
        cache = self.prefix_cache(proposal) if proposal.draft is None else proposal.draft.kept()
        (chain.candidates, chain.logp), chain.cache = proposal.tables(), cache
        chain.response, chain.reward, chain.memos = proposal.response, value, memos
        chain.finished = proposal.finished(self.policy.stop_ids)
        chain.scores, chain.tried, chain.idle = None, set(), 0

    def draw(self, jobs: list[Job]) -> list[Draft]:
        config = self.config
        return generate(
            self.policy,
            jobs,
            config.sampling(),
            meter=self.meter,
            candidates=config.candidates,
            keep_cache=True,
            batch_size=config.batch_size,
        )

    def room(self, problem: Problem, prompt: list[int]) -> int:
        """Most tokens of a response; ValueError where the reward cannot read the prompt."""
        room = self.reward.room(problem, prompt)
        return min(self.config.max_new_tokens, self.policy.context - len(prompt), room)

    def stream(self, problem: Problem, *draw: int | str) -> np.random.Generator:
        return random_stream(self.seed, problem.id, *draw)

    def check(self, chain: Chain, value: float) -> None:
        if not math.isfinite(value):
            what = "cannot read the response" if value == -math.inf else f"gave {value}"
            chain.error, chain.stop = f"the reward {self.reward.name} {what}", "error"

    def trace(self, chain: Chain) -> Trace:
        if chain.error is None:
            self.check(chain, chain.reward)
        return response_trace(
            self.policy,
            chain.problem,
            method=self.config.method,
            seed=self.seed,
            prompt=chain.prompt,
            response=chain.response,
            reward=chain.reward,
            cost=self.meter.cost(chain.problem.id),
            meta=self.meta,
            stop=chain.stop,
            initial=chain.initial,
            reward_initial=chain.initial_reward,
            revisions=chain.revisions,
            error=chain.error,
        )
