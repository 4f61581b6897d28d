"""The decoding loop: draw responses, then propose branches, regenerate suffixes, and keep some of them.

One loop for every solver, so the control (`solver="none"`) differs in nothing but the gradient. Many problems, and
several chains of each, run in one batch; each chain owns its randomness, so a trace does not depend on batch, order or
shard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import Meter
from nabla_trl.models.generation import generate, prompt_caches, random_stream
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import Draft, Job
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import acceptance, proposals
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.state import Chain, Prompt, Proposal, State
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import error_trace, response_trace, run_meta
from nabla_trl.traces.schema import Revision, Trace

# Ends of a chain that leave the budget as it is.
ENDED = ("exhausted", "patience", "scanned", "unreadable")


def solve(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    seed: int = 0,
    watch: Callable[[Search], None] | None = None,
) -> list[Trace]:
    """Refine responses to each problem and give one trace of each: of its best chain, or of a sample of π*.

    A problem that cannot be run (prompt longer than a context, unreadable characters, NaN reward or gradient)
    gives a trace with `error` set; the others are not affected.

    Args:
        watch: called before each round of a batch and after the last, to look at its `walks` and `meter`.

    Raises:
        ValueError: duplicate problem ids.
    """
    name, count = Counter(problem.id for problem in problems).most_common(1)[0] if problems else ("", 0)
    if count > 1:
        raise ValueError(f"problem id {name!r} occurs {count} times")
    traces: list[Trace] = []
    for begin in range(0, len(problems), config.batch_size):
        batch = problems[begin : begin + config.batch_size]
        traces += Search(policy, reward, config, seed, watch).run(batch)
    return traces


class Search:
    """One batch of chains and the meter of their work."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        config: ReasonerConfig,
        seed: int,
        watch: Callable[[Search], None] | None = None,
    ):
        self.policy, self.reward, self.seed, self.watch = policy, reward, seed, watch
        self.config = config = config.at(reward.point)
        self.metropolis, self.scanning = config.acceptance == "metropolis", config.proposals == "sequential"
        self.meter = Meter()
        self.walks: dict[str, list[Chain]] = {}  # by problem
        self.drawn: Counter[str] = Counter()  # first responses, by problem
        self.meta = run_meta(policy, reward.name, config.hash())

    def run(self, problems: Sequence[Problem]) -> list[Trace]:
        failed: dict[str, Trace] = {}
        self.walks = self.start(problems, failed)
        while active := self.active():
            with self.meter.clock([chain.problem.id for chain in active]):
                self.round(active)
        return [failed[p.id] if p.id in failed else self.trace(self.walks[p.id]) for p in problems]

    # --- first responses --------------------------------------------------------------------------------

    def start(self, problems: Sequence[Problem], failed: dict[str, Trace]) -> dict[str, list[Chain]]:
        """The chains of every problem that can be read, by its id."""
        prompts: list[tuple[Problem, list[int], int]] = []
        for problem in problems:
            try:
                ids = self.policy.encode(problem)
                prompts.append((problem, ids, self.room(problem, ids)))
            except ValueError as error:
                failed[problem.id] = error_trace(problem, self.config.method, self.seed, str(error), self.meta)
        if not prompts:
            return {}
        with self.meter.clock([problem.id for problem, _, _ in prompts]):
            bare = self.reward.prompt_memos([Sample(problem, ids, []) for problem, ids, _ in prompts], self.meter)
            read = [Prompt(*one, memos) for one, memos in zip(prompts, bare, strict=True)]
            rows = prompt_caches(self.policy, [(prompt.problem.id, prompt.ids) for prompt in read], self.meter)
            pairs = list(zip(read, rows, strict=True))
            count = 1 if self.config.flops else self.config.starts
            found = self.first_states([(*pair, at) for pair in pairs for at in range(count)])
            states = [found[begin : begin + count] for begin in range(0, len(found), count)]
            if self.config.flops:
                self.more_starts(pairs, states)
        return {prompt.problem.id: self.chains(own) for prompt, own in zip(read, states, strict=True)}

    def more_starts(self, pairs: Sequence[tuple[Prompt, Tensor]], states: list[list[State]]) -> None:
        """Add to each problem's one first response those of `starts` that are expected to fit into the budget.

        As long as the first, that is; its cost is known.
        """
        wanted: list[tuple[Prompt, Tensor, int]] = []
        owners: list[list[State]] = []
        for pair, own in zip(pairs, states, strict=True):
            left = self.config.flops - self.meter.cost(pair[0].problem.id).flops
            fit = 1 + max(0, int(left // proposals.start_flops(own[0], self.policy, self.reward)))
            wanted += [(*pair, at) for at in range(1, min(self.config.starts, fit))]
            owners += [own] * (len(wanted) - len(owners))
        for own, state in zip(owners, self.first_states(wanted) if wanted else [], strict=True):
            own.append(state)

    def first_states(self, wanted: Sequence[tuple[Prompt, Tensor, int]]) -> list[State]:
        """Scored first responses, from the caches of prompts; number n is that of best-of-N under the same seed."""
        jobs = []
        for prompt, cache, number in wanted:
            stream = random_stream(self.seed, prompt.problem.id, "suffix", f"pool-{number}" if number else 0)
            stop = self.policy.stops(prompt.problem)
            jobs.append(Job(prompt.problem.id, prompt.ids, stream, prompt.room, cache, stop))
            self.drawn[prompt.problem.id] += 1
        states = [
            State(p, d.ids, d.finished, d.candidates, d.logp, d.tilt, d.kept(), p.memos, math.nan)
            for (p, _, _), d in zip(wanted, self.draw(jobs), strict=True)
        ]
        self.score(states, [0] * len(states))
        return states

    def active(self) -> list[Chain]:
        """Chains that go on; where all of a problem's have ended with some of the budget left, one more begins."""
        if self.config.restarts:
            ended = [chains for chains in self.walks.values() if all(chain.stop in ENDED for chain in chains)]
            self.restart([chains for chains in ended if self.may_start(chains)])
        if self.watch:
            self.watch(self)
        return [chain for chains in self.walks.values() for chain in chains if not chain.stop]

    def restart(self, walks: list[list[Chain]]) -> None:
        """Begin another chain for each of these problems."""
        if not walks:
            return
        with self.meter.clock([chains[0].problem.id for chains in walks]):
            wanted = [(*_prompt_of(chains[0]), self.drawn[chains[0].problem.id]) for chains in walks]
            for chains, state in zip(walks, self.first_states(wanted), strict=True):
                chains.append(Chain(state, initial=state, index=chains[-1].index + 1, beta=chains[0].beta))
                self.check(chains[-1], state.reward)

    def may_start(self, chains: list[Chain]) -> bool:
        """Whether another first response, as long as the last one, is expected to fit into the budget."""
        config, state = self.config, chains[-1].state
        if config.rollouts and self.rollouts(state.problem) >= config.rollouts:
            return False
        spent = self.meter.cost(state.problem.id).flops
        return not config.flops or spent + proposals.start_flops(state, self.policy, self.reward) <= config.flops

    def rollouts(self, problem: Problem) -> int:
        """Responses drawn for a problem so far."""
        return self.drawn[problem.id] + sum(chain.rollouts for chain in self.walks[problem.id])

    def chains(self, states: list[State]) -> list[Chain]:
        """The chains of one problem: from its responses of highest reward, the first of equals."""
        failed = next((state for state in states if math.isnan(state.reward) or state.reward == math.inf), None)
        kept = [failed] if failed else sorted(states, key=lambda state: -state.reward)[: self.config.chains]
        kept = [state for state in kept if state.reward > -math.inf] or kept[:1]
        chains = [
            Chain(state, initial=state, index=index, beta=beta)
            for index, (state, beta) in enumerate(zip(kept, self.config.betas(), strict=False))
        ]
        for chain in chains:
            self.check(chain, chain.state.reward)
        return chains

    # --- rounds -----------------------------------------------------------------------------------------

    def round(self, active: list[Chain]) -> None:
        """One round of every active chain: solve where needed, propose, regenerate, score, accept."""
        together = _by_problem(active)
        for chains in together:
            self.stop_at_limits(chains)
        self.solve_tokens([chain for chain in active if not chain.stop])
        proposals: list[Proposal] = []
        for chains in together:
            going = [(chain, drawn) for chain in chains if not chain.stop and (drawn := self.propose(chain))]
            places = {chain.index: [one.position for one in drawn] for chain, drawn in going}
            self.stop_over_budget([chain for chain, _ in going], places)
            proposals += [one for chain, drawn in going if not chain.stop for one in drawn]
        if proposals:
            self.regenerate(proposals)
            self.judge(proposals)
        if self.config.tempering > 1:
            for chains in together:
                self.swap([chain for chain in chains if not chain.stop])

    def stop_at_limits(self, chains: list[Chain]) -> None:
        """Stop the chains of one problem that have come to a limit."""
        config, sweeping = self.config, self.metropolis and self.scanning
        for chain in chains:
            if config.rounds and (chain.sweeps if sweeping else chain.rounds) >= config.rounds:
                chain.stop = "rounds"
            elif config.patience and chain.idle >= config.patience:
                chain.stop = "patience"
        going = [chain for chain in chains if not chain.stop]
        drawn = self.rollouts(chains[0].problem)
        for number, chain in enumerate(going, 1):
            if config.rollouts and drawn + number * config.branches > config.rollouts:
                chain.stop = "rollouts"
        middles = {chain.index: [len(chain.state.response) // 2] * config.branches for chain in going}
        self.stop_over_budget([chain for chain in going if not chain.stop], middles)

    def stop_over_budget(self, chains: list[Chain], positions: dict[int, list[int]]) -> None:
        """Stop chains of one problem, those of the lowest reward first, until their next round is expected to fit."""
        if not self.config.flops or not chains:
            return
        spent = self.meter.cost(chains[0].problem.id).flops
        left = sorted(chains, key=lambda chain: -chain.state.reward)
        while left and spent + sum(self.expected(chain, positions[chain.index]) for chain in left) > self.config.flops:
            left.pop().stop = "budget"

    def expected(self, chain: Chain, positions: list[int]) -> float:
        return proposals.expected_flops(chain.state, positions, self.policy, self.reward, self.config)

    def solve_tokens(self, chains: list[Chain]) -> None:
        due = [chain for chain in chains if chain.state.scores is None]
        self.solve_states([chain.state for chain in due], [chain.beta for chain in due])
        for chain in due:
            if chain.state.solved().isnan().any():
                chain.error, chain.stop = f"the token gradient of {self.reward.name} holds NaN", "error"
        for chain in chains:
            if chain.state.gradient is not None and len(chain.pull) == chain.moves and not chain.stop:
                chain.pull.append(proposals.pull(chain.state, self.reward.readable, self.config))

    def solve_states(self, states: list[State], betas: list[float | None]) -> None:
        if states:
            proposals.solve_tokens(states, self.policy, self.reward, self.config, self.meter, betas)

    def propose(self, chain: Chain) -> list[Proposal]:
        """What follows on the incumbent; where nothing does, the chain stops or a new sweep begins."""
        if self.redraws(chain):
            chain.sweeps += self.scanning  # in place of a sweep
            return [Proposal(chain, [])]
        branches = self.scan(chain) if self.scanning else self.branches(chain)
        return [Proposal(chain, [*chain.state.response[:position], token]) for position, token in branches]

    def redraws(self, chain: Chain) -> bool:
        """Whether this round, or this sweep of a scan, draws the whole response anew."""
        if not self.config.redraw or chain.position:
            return False
        uniform = self.stream(chain, "redraw", chain.sweeps if self.scanning else chain.rounds).random()
        return uniform < math.exp(proposals.redraw_logp(chain.state, self.reward.readable, self.config))

    def branches(self, chain: Chain) -> list[tuple[int, int]]:
        shape = tuple(chain.state.candidates.shape)
        noise = torch.from_numpy(self.stream(chain, "branch", chain.rounds).gumbel(size=shape))
        branches = proposals.global_branches(chain, noise, self.reward.readable, self.config)
        chain.stop = "" if branches else "exhausted"
        return branches

    def scan(self, chain: Chain) -> list[tuple[int, int]]:
        sweep = [chain.sweeps] if self.metropolis else []
        stream = self.stream(chain, "resample", chain.rounds, *sweep)
        branches = proposals.sequential_branch(chain, stream, self.reward.readable, self.config, self.rescore)
        if not branches and self.metropolis:
            chain.position, chain.sweeps = 0, chain.sweeps + 1
        elif not branches:
            chain.stop = "scanned"
        return branches

    def rescore(self, state: State, position: int) -> Tensor:
        return proposals.ste_row(state, position, self.policy, self.reward, self.config, self.meter)

    def regenerate(self, proposals: list[Proposal]) -> None:
        """Draw the suffixes of all open branches, and whole responses, in one batch from the incumbents' caches."""
        jobs, open_ = [], []
        for proposal in proposals:
            chain, prompt = proposal.chain, proposal.chain.state.prompt
            chain.rollouts += 1
            limit = prompt.room - len(proposal.response)
            if proposal.finished(self.policy) or limit < 1:
                continue
            stream = self.stream(chain, "suffix", chain.rollouts)
            given, stop = proposal.response, self.policy.stops(chain.problem)
            jobs.append(
                Job(chain.problem.id, prompt.ids + given, stream, limit, proposal.cache(), stop, given=len(given))
            )
            open_.append(proposal)
        for proposal, draft in zip(open_, self.draw(jobs), strict=True):
            proposal.draft = draft

    def score(self, states: Sequence[State], shared: Sequence[int]) -> None:
        """Rewards and memos of states, which share so many tokens with the responses that their memos are of."""
        rewards, memos = self.reward.score(
            [state.drawn(self.policy.model) for state in states],
            [state.memos for state in states],
            meter=self.meter,
            shared=shared,
            keep=True,
        )
        for state, value, kept in zip(states, rewards, memos, strict=True):
            state.reward, state.memos = value, kept

    # --- decisions --------------------------------------------------------------------------------------

    def judge(self, proposals: list[Proposal]) -> None:
        """Score all proposals as incumbents are scored, and decide in each chain."""
        states = [proposal.state(self.policy) for proposal in proposals]
        self.score(states, [proposal.position for proposal in proposals])
        if self.metropolis:
            # The scores weigh the way back. A response drawn anew has none to weigh, and is solved once it is taken.
            sound = [at for at, state in enumerate(states) if math.isfinite(state.reward) and proposals[at].given]
            self.solve_states([states[at] for at in sound], [proposals[at].chain.beta for at in sound])
        rows: dict[int, list[int]] = {}
        for index, proposal in enumerate(proposals):
            rows.setdefault(id(proposal.chain), []).append(index)
        for own in rows.values():
            self.decide([proposals[index] for index in own], [states[index] for index in own])

    def decide(self, proposals: list[Proposal], states: list[State]) -> None:
        """Note one chain's proposals and take one of them, or none."""
        chain = proposals[0].chain
        for state in states:
            if state.reward > -math.inf or math.isnan(state.reward):  # an unreadable proposal is merely not taken
                self.check(chain, state.reward)
        if chain.stop:
            return
        keep = (
            self.metropolis_choice(proposals[0], states[0])
            if self.metropolis
            else acceptance.best(chain.state, states)
        )
        if chain.stop:
            return
        spent = self.meter.cost(chain.problem.id).flops
        for index, (proposal, state) in enumerate(zip(proposals, states, strict=True)):
            chain.revisions.append(
                Revision(
                    round=chain.rounds,
                    position=proposal.position,
                    old=chain.state.response[proposal.position],
                    new=proposal.response[proposal.position],
                    suffix=tuple(proposal.response[proposal.position :]),
                    reward_before=chain.state.reward,
                    reward_after=state.reward,
                    accepted=index == keep,
                    flops=spent,
                )
            )
            if not self.metropolis:
                chain.tried.add((proposal.position, proposal.given[-1]))
        chain.rounds += 1
        chain.idle += 1
        if keep is not None:
            chain.move(states[keep])

    def metropolis_choice(self, proposal: Proposal, state: State) -> int | None:
        """0 if the proposal is taken, None if not; the same number is drawn either way."""
        chain, uniform = proposal.chain, self.stream(proposal.chain, "accept", proposal.chain.rollouts).random()
        if not math.isfinite(state.reward):
            return None
        if proposal.given and state.solved().isnan().any():
            chain.error, chain.stop = f"the token gradient of {self.reward.name} holds NaN", "error"
            return None
        return 0 if math.log(max(uniform, 1e-300)) < self.log_ratio(chain, proposal, state) else None

    def log_ratio(self, chain: Chain, proposal: Proposal, state: State) -> float:
        """Of the move from a chain's incumbent to the state that a proposal led to."""
        assert chain.beta is not None
        old, beta, position = chain.state, chain.beta, proposal.position
        if proposal.given:
            chosen = self.chosen(old, position), self.chosen(state, position)
            return acceptance.log_ratio(old, state, position, beta=beta, chosen=chosen)
        before, after = (proposals.redraw_logp(one, self.reward.readable, self.config) for one in (old, state))
        return acceptance.redraw_log_ratio(old, state, beta=beta, chances=(before, after))

    def chosen(self, state: State, position: int) -> Tensor:
        """[K] log-probability that a proposal from this state puts each candidate at the position."""
        if not self.scanning:
            return proposals.global_logp(state, self.reward.readable, self.config)[position]
        proposals.refresh(state, position, self.rescore)
        return proposals.row_logp(state, position, self.reward.readable, self.config)

    def swap(self, chains: list[Chain]) -> None:
        """Exchange β between neighbouring chains of one problem, even and odd pairs in turn."""
        ladder = sorted(chains, key=lambda chain: chain.beta or 0.0)
        number = max((chain.rounds for chain in chains), default=0)
        for cold, hot in zip(ladder[number % 2 :: 2], ladder[number % 2 + 1 :: 2], strict=False):
            assert cold.beta is not None and hot.beta is not None
            ratio = acceptance.swap_log_ratio((cold.beta, cold.state.reward), (hot.beta, hot.state.reward))
            if math.log(max(self.stream(cold, "swap", cold.rollouts, hot.index).random(), 1e-300)) < ratio:
                cold.beta, hot.beta = hot.beta, cold.beta
                cold.state.scores = hot.state.scores = None

    # --- ends -------------------------------------------------------------------------------------------

    def draw(self, jobs: list[Job]) -> list[Draft]:
        config = self.config
        return generate(
            self.policy,
            jobs,
            config.sampling(),
            meter=self.meter,
            candidates=config.candidates,
            keep_cache=True,
            keep_tilt=self.metropolis,
            batch_size=config.batch_size,
        )

    def room(self, problem: Problem, prompt: list[int]) -> int:
        """Most tokens of a response; ValueError where the reward cannot read the prompt."""
        room = self.reward.room(problem, prompt)
        return min(self.config.max_new_tokens, self.policy.context - len(prompt), room)

    def stream(self, chain: Chain, *draw: int | str) -> np.random.Generator:
        own = ("chain", chain.index) if chain.index else ()
        return random_stream(self.seed, chain.problem.id, *own, *draw)

    def check(self, chain: Chain, value: float) -> None:
        if value == -math.inf:
            chain.stop = "unreadable"
        elif not math.isfinite(value):
            chain.error, chain.stop = f"the reward {self.reward.name} gave {value}", "error"

    def kept(self, chains: list[Chain]) -> Chain:
        """The chain of the highest reward; of a Metropolis search the one that samples at β itself."""
        if self.metropolis:
            return min(chains, key=lambda one: (one.beta or 0.0, one.index))
        return max(chains, key=lambda one: (one.state.reward, -one.index))

    def trace(self, chains: list[Chain]) -> Trace:
        """Of the chain that is kept, or of one that failed.

        Its meta counts what all chains did: first responses, proposals, and accepted ones.
        """
        moves = [revision.accepted for chain in chains for revision in chain.revisions]
        totals = {"starts": self.drawn[chains[0].problem.id], "proposals": len(moves), "accepted": sum(moves)}
        chain = next((chain for chain in chains if chain.error is not None), None) or self.kept(chains)
        if chain.stop == "unreadable":
            chain.error, chain.stop = f"the reward {self.reward.name} cannot read the response", "error"
        return response_trace(
            self.policy,
            chain.problem,
            method=self.config.method,
            seed=self.seed,
            prompt=chain.state.prompt.ids,
            response=chain.state.response,
            reward=chain.state.reward,
            cost=self.meter.cost(chain.problem.id),
            meta=self.meta | {name: str(count) for name, count in totals.items()},
            stop=chain.stop,
            initial=chain.initial.response,
            reward_initial=chain.initial.reward,
            revisions=chain.revisions,
            pull=chain.pull,
            error=chain.error,
        )


def _prompt_of(chain: Chain) -> tuple[Prompt, Tensor]:
    """The prompt and the cache of all but its last token."""
    state = chain.state
    return state.prompt, state.cache[:, :, :, : len(state.prompt.ids) - 1]


def _by_problem(chains: Sequence[Chain]) -> list[list[Chain]]:
    together: dict[str, list[Chain]] = {}
    for chain in chains:
        together.setdefault(chain.problem.id, []).append(chain)
    return list(together.values())
