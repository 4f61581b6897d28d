"""The search for one problem: draw responses, then propose branches, regenerate suffixes, and keep some of them.

One loop serves every solver, so the control (solver "none") differs in nothing but the gradient. A search knows one
problem. Its requests are batched with those of all other problems by the engine (`nabla_trl.engine`). Each chain has
random numbers of its own, so in float32 a trace depends on seed, problem and configuration alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nabla_trl.engine.engine import Engine
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.grading.voting import vote
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.sampling import make_response_rng, make_rng
from nabla_trl.rewards.reward import Reward, encode_prompt
from nabla_trl.search import acceptance, proposals
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import (
    MetropolisAcceptance,
    NoGradient,
    RewardSelection,
    SequentialProposals,
    SteSolver,
    VoteSelection,
)
from nabla_trl.search.refinement import SoftTargetRecorder
from nabla_trl.search.state import EncodedPrompt, Proposal, ScoredResponse, SearchState, Voter
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Revision, Trace

# A chain that ended for one of these reasons leaves some of the budget to a new chain.
RESTARTABLE_STOP_REASONS = ("exhausted", "patience", "scanned", "unreadable")

SearchCallback = Callable[["Search"], None]


def run_search(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    seed: int = 0,
    on_round: SearchCallback | None = None,
) -> list[Trace]:
    """Return one trace per problem: of its best chain, or of a sample of π* with Metropolis acceptance.

    A problem that cannot be searched gives a trace with `error` set: its prompt is longer than a context or holds
    characters that the reward cannot read, or its reward or gradient is NaN. Other problems are not affected.

    Args:
        on_round: called with each problem's search before every round and after the last one.

    Raises:
        ValueError: two problems have the same id, or the solver needs a gradient and the reward is a function.
    """
    check_gradient(reward, config)
    engine = Engine(policy, reward, num_slots=config.batch_size)
    return engine.run_problems(
        problems,
        lambda problem: Search(problem, engine, config, seed, on_round).run(),
        max_concurrent=config.batch_size,
    )


def check_gradient(reward: Reward, config: SearchConfig) -> None:
    """Refuse a solver that needs the gradient of a reward without one."""
    if not reward.has_gradient and not isinstance(config.solver, NoGradient):
        raise ValueError(
            f"the reward {reward.name} is a function, which has no gradient: search with solver none (in Python: "
            'solver="none"), or use best_of_N or control'
        )


class _OutOfBudget(Exception):
    """The next gradient of a scan does not fit into the budget of FLOPs."""


class Search:
    """The search for one problem: its chains and how they go on.

    Args:
        rng_id: selects the random numbers together with the seed. None: the problem's id, which pays for the work.
        start_flops: FLOPs within which the prompt and all first responses but one have to stay. None: the budget of
            the configuration.

    Attributes:
        error: why the prompt cannot be read. None: it can.
        chains: in the order in which they began. A search within a budget begins new ones while some of it is left.
        num_first_responses: whole responses drawn from the prompt.
        voters: what votes for the answer, if the configuration asks for a vote: every scored response. With
            Metropolis acceptance: the state of the chain at β after every round.
    """

    def __init__(
        self,
        problem: Problem,
        engine: Engine,
        config: SearchConfig,
        seed: int,
        on_round: SearchCallback | None = None,
        rng_id: str | None = None,
        start_flops: float | None = None,
    ):
        assert engine.reward is not None
        self.rng_id = problem.id if rng_id is None else rng_id
        self.problem, self.engine, self.seed, self.on_round = problem, engine, seed, on_round
        self.policy, self.reward, self.flop_counter = engine.policy, engine.reward, engine.flop_counter
        self.config = config = config.with_default_gradient_at(self.reward.gradient_at)
        self.start_flops = config.max_flops if start_flops is None else start_flops
        self.is_metropolis = isinstance(config.acceptance, MetropolisAcceptance)
        self.is_sequential = isinstance(config.proposals, SequentialProposals)
        self.error: str | None = None
        self.chains: list[SearchState] = []
        self.num_first_responses = 0
        self.recompute_flops = 0.0  # of the last position whose scores were computed again
        self.voters: list[Voter] = []
        self.recorder = SoftTargetRecorder(self.reward, config) if config.soft_target_top_k else None
        self.solve_kind = self.find_solve_kind()
        self.trace_meta = build_trace_meta(self.policy, self.reward.name, config.compute_hash())

    async def run(self) -> Trace:
        """Draw first responses, refine them round by round until a limit is reached, and return the trace."""
        while await self.advance():
            pass
        return self.build_trace()

    async def advance(self) -> bool:
        """Draw the first responses, or take the search one round further. False: it has ended."""
        if self.error is None and not self.chains:
            await self.begin()
            return self.error is None
        active = [] if self.error else await self.update_active_chains()
        if active:
            await self.run_round(active)
        return bool(active)

    async def begin(self) -> None:
        """Read the prompt and begin chains from first responses. Set `error` if the prompt cannot be read."""
        try:
            ids, max_new_tokens = encode_prompt(self.problem, self.policy, self.reward, self.config.max_new_tokens)
        except ValueError as error:
            self.error = str(error)
            return
        self.prompt_cache, score_caches = await self.engine.read_prompt(Sample(self.problem, ids, []))
        self.prompt = EncodedPrompt(self.problem, ids, max_new_tokens, score_caches)
        self.chains = self.begin_chains(await self.draw_starts())

    # --- first responses --------------------------------------------------------------------------------

    async def draw_starts(self) -> list[ScoredResponse]:
        """Return `num_starts` scored first responses, or as many as are expected to fit into the FLOPs budget.

        The first one tells what a response costs.
        """
        if not self.start_flops:
            return await self.draw_first_responses(self.config.num_starts)
        responses = await self.draw_first_responses(1)
        cost = proposals.estimate_first_response_flops(responses[0], self.policy, self.reward)
        affordable = 1 + max(0, int((self.start_flops - self.count_flops()) // cost))
        return responses + await self.draw_first_responses(min(self.config.num_starts, affordable) - 1)

    async def draw_first_responses(self, count: int) -> list[ScoredResponse]:
        """Return scored responses from the prompt. Response n is response n of best-of-N under the same seed."""
        requests = []
        for number in range(self.num_first_responses, self.num_first_responses + count):
            rng = make_response_rng(self.seed, self.rng_id, number)
            requests.append(
                GenerationRequest(
                    self.problem.id,
                    self.prompt.ids,
                    rng,
                    self.prompt.max_new_tokens,
                    self.prompt_cache,
                    self.policy.get_stop_strings(self.problem),
                )
            )
        self.num_first_responses += count
        responses = [
            ScoredResponse(
                self.prompt,
                output.ids,
                output.finished,
                output.candidates,
                output.logp,
                output.log_importance_weight,
                output.get_cache(),
                self.prompt.score_caches,
                math.nan,
                hidden_states=output.hidden_states,
            )
            for output in await self.generate(requests)
        ]
        await self.score(responses, [0] * count)
        if not self.is_metropolis:
            self.record_voters(responses)
        return responses

    def begin_chains(self, responses: list[ScoredResponse]) -> list[SearchState]:
        """Return chains from the responses of the highest reward, the first ones of equals."""
        broken = next((one for one in responses if math.isnan(one.reward) or one.reward == math.inf), None)
        ranked = [broken] if broken else sorted(responses, key=lambda response: -response.reward)
        ranked = ranked[: self.config.num_chains]
        ranked = [response for response in ranked if response.reward > -math.inf] or ranked[:1]
        chains = [
            SearchState(response, initial=response, index=index, beta=beta)
            for index, (response, beta) in enumerate(zip(ranked, self.config.compute_chain_betas(), strict=False))
        ]
        for chain in chains:
            self.stop_on_invalid_reward(chain, chain.incumbent.reward)
        return chains

    async def update_active_chains(self) -> list[SearchState]:
        """Return the chains that go on. Begin a new one if all have ended and some of the budget is left."""
        ended = all(chain.stop_reason in RESTARTABLE_STOP_REASONS for chain in self.chains)
        if ended and self.config.restarts_enabled and self.can_restart():
            [response] = await self.draw_first_responses(1)
            for chain in self.chains:
                chain.incumbent.drop_caches()
            index = self.chains[-1].index + 1
            self.chains.append(SearchState(response, initial=response, index=index, beta=self.chains[0].beta))
            self.stop_on_invalid_reward(self.chains[-1], response.reward)
        if self.on_round:
            self.on_round(self)
        return [chain for chain in self.chains if not chain.stop_reason]

    def can_restart(self) -> bool:
        """Return whether a first response as long as the last one is expected to fit into the budget."""
        config = self.config
        if config.max_rollouts and self.count_rollouts() >= config.max_rollouts:
            return False
        cost = proposals.estimate_first_response_flops(self.chains[-1].incumbent, self.policy, self.reward)
        return not config.max_flops or self.count_flops() + cost <= config.max_flops

    # --- one round --------------------------------------------------------------------------------------

    async def run_round(self, active: list[SearchState]) -> None:
        """Take every active chain one round further: solve, propose, regenerate, score, accept."""
        self.stop_at_limits(active)
        await self.update_proposal_scores([chain for chain in active if not chain.stop_reason])
        drawn = {chain.index: self.draw_proposals(chain) for chain in active if not chain.stop_reason}
        proposing = [chain for chain in active if drawn.get(chain.index)]
        positions = {index: [proposal.position for proposal in branches] for index, branches in drawn.items()}
        self.stop_over_budget(proposing, positions)
        branches = [proposal for chain in proposing if not chain.stop_reason for proposal in drawn[chain.index]]
        if branches:
            await self.regenerate_suffixes(branches)
            responses = await self.score_proposals(branches)
            for chain in active:
                rows = [row for row, proposal in enumerate(branches) if proposal.chain is chain]
                if rows:
                    self.decide(chain, [branches[row] for row in rows], [responses[row] for row in rows])
            if not self.is_metropolis:
                self.record_voters(responses)
        if self.is_metropolis and self.config.acceptance.parallel_tempering > 1:
            self.exchange_betas([chain for chain in active if not chain.stop_reason])
        if self.is_metropolis:
            target_beta = min(chain.beta or 0.0 for chain in self.chains)
            moved = {id(proposal.chain) for proposal in branches}
            at_target = [chain for chain in active if id(chain) in moved and chain.beta == target_beta]
            self.record_voters([chain.incumbent for chain in at_target])

    def stop_at_limits(self, chains: list[SearchState]) -> None:
        """Stop the chains that have reached a limit of the configuration."""
        config = self.config
        branches = config.proposals.proposals_per_round
        for chain in chains:
            # One round of a sequential Metropolis chain is a sweep over the whole response.
            rounds = chain.num_sweeps if self.is_metropolis and self.is_sequential else chain.num_rounds
            if config.max_rounds and rounds >= config.max_rounds:
                chain.stop_reason = "max_rounds"
            elif config.patience and chain.rounds_since_acceptance >= config.patience:
                chain.stop_reason = "patience"
        active = [chain for chain in chains if not chain.stop_reason]
        num_rollouts = self.count_rollouts()
        for number, chain in enumerate(active, 1):
            if config.max_rollouts and num_rollouts + number * branches > config.max_rollouts:
                chain.stop_reason = "max_rollouts"
        # Where the round will branch is not known yet: take the middle.
        middles = {chain.index: [len(chain.incumbent.response_ids) // 2] * branches for chain in active}
        self.stop_over_budget([chain for chain in active if not chain.stop_reason], middles)

    def stop_over_budget(self, chains: list[SearchState], positions: dict[int, list[int]]) -> None:
        """Stop chains, those of the lowest reward first, until the next round is expected to fit into the budget.

        Args:
            positions: where each chain branches, by its index.
        """
        if not self.config.max_flops:
            return
        cost = {
            chain.index: proposals.estimate_round_flops(
                chain.incumbent, positions[chain.index], self.policy, self.reward, self.config
            )
            for chain in chains
        }
        left = sorted(chains, key=lambda chain: -chain.incumbent.reward)
        while left and self.count_flops() + sum(cost[chain.index] for chain in left) > self.config.max_flops:
            left.pop().stop_reason = "max_flops"

    async def update_proposal_scores(self, chains: list[SearchState]) -> None:
        """Solve for the proposal scores of incumbents that have none yet."""
        new = [chain for chain in chains if chain.incumbent.proposal_scores is None]
        await self.solve([chain.incumbent for chain in new], [chain.beta for chain in new])
        for chain in new:
            if chain.incumbent.get_proposal_scores().isnan().any():
                chain.error, chain.stop_reason = f"the token gradient of {self.reward.name} holds NaN", "error"
        for chain in chains:
            is_new = len(chain.predicted_gain) == chain.num_accepted and not chain.stop_reason
            if is_new and chain.incumbent.reward_gradient is not None:
                chain.predicted_gain.append(
                    proposals.compute_predicted_gain(chain.incumbent, self.reward.in_vocabulary, self.config)
                )
                if self.recorder:
                    self.recorder.add_incumbent(chain)

    def draw_proposals(self, chain: SearchState) -> list[Proposal]:
        """Return the next proposals of a chain. Without any the chain stops, or a new sweep begins."""
        if self.is_independence_round(chain):
            chain.num_sweeps += self.is_sequential  # in place of a sweep
            return [Proposal(chain, [])]
        branches = self.draw_sequential_branch(chain) if self.is_sequential else self.draw_global_branches(chain)
        return [Proposal(chain, [*chain.incumbent.response_ids[:position], token]) for position, token in branches]

    def is_independence_round(self, chain: SearchState) -> bool:
        """Return whether this round, or this sweep of a scan, proposes a completely new response."""
        if not self.is_metropolis or not self.config.acceptance.independence_prob or chain.scan_position:
            return False
        logp = proposals.compute_independence_logp(chain.incumbent, self.reward.in_vocabulary, self.config)
        number = chain.num_sweeps if self.is_sequential else chain.num_rounds
        return self.make_rng(chain, "redraw", number).random() < math.exp(logp)

    def draw_global_branches(self, chain: SearchState) -> list[tuple[int, int]]:
        noise = self.make_rng(chain, "branch", chain.num_rounds).gumbel(size=tuple(chain.incumbent.candidates.shape))
        branches = proposals.draw_global_branches(
            chain, torch.from_numpy(noise), self.reward.in_vocabulary, self.config
        )
        chain.stop_reason = "" if branches else "exhausted"
        return branches

    def draw_sequential_branch(self, chain: SearchState) -> list[tuple[int, int]]:
        sweep = [chain.num_sweeps] if self.is_metropolis else []
        rng = self.make_rng(chain, "resample", chain.num_rounds, *sweep)
        try:
            branches = proposals.draw_sequential_branch(
                chain, rng, self.reward.in_vocabulary, self.config, self.recompute_scores_at
            )
        except _OutOfBudget:
            chain.stop_reason = "max_flops"
            return []
        if not branches and chain.incumbent.get_proposal_scores().isnan().any():
            chain.error, chain.stop_reason = f"the token gradient of {self.reward.name} holds NaN", "error"
        elif not branches and self.is_metropolis:
            chain.scan_position, chain.num_sweeps = 0, chain.num_sweeps + 1
        elif not branches:
            chain.stop_reason = "scanned"
        return branches

    def recompute_scores_at(self, response: ScoredResponse, position: int) -> Tensor:
        before, max_flops = self.count_flops(), self.config.max_flops
        # With hard tokens "argmax" every scanned position costs a gradient, which no estimate of a round knows.
        is_usual = isinstance(self.config.solver, SteSolver) and self.config.solver.hard_tokens == "argmax"
        if is_usual and max_flops and before + self.recompute_flops > max_flops:
            raise _OutOfBudget
        scores = proposals.compute_ste_scores_at(
            response, position, self.policy, self.reward, self.config, self.flop_counter
        )
        self.recompute_flops = self.count_flops() - before
        return scores

    async def regenerate_suffixes(self, branches: list[Proposal]) -> None:
        """Draw the tokens after each branch, or whole responses, from the caches of the incumbents."""
        requests, open_branches = [], []
        for proposal in branches:
            chain, given = proposal.chain, proposal.response_ids
            chain.num_rollouts += 1
            max_new_tokens = self.prompt.max_new_tokens - len(given)
            if proposal.is_finished(self.policy) or max_new_tokens < 1:
                continue
            requests.append(
                GenerationRequest(
                    self.problem.id,
                    self.prompt.ids + given,
                    self.make_rng(chain, "suffix", chain.num_rollouts),
                    max_new_tokens,
                    proposal.get_prefix_cache(),
                    self.policy.get_stop_strings(self.problem),
                    response_tokens_in_prefix=len(given),
                )
            )
            open_branches.append(proposal)
        for proposal, output in zip(open_branches, await self.generate(requests), strict=True):
            proposal.generation = output

    async def score_proposals(self, branches: list[Proposal]) -> list[ScoredResponse]:
        """Return what the proposals lead to, scored as incumbents are scored."""
        responses = [proposal.to_scored_response(self.policy) for proposal in branches]
        await self.score(responses, [proposal.position for proposal in branches])
        if self.is_metropolis:
            # The scores weigh the way back. A completely new response has none: it is solved once it is accepted.
            rows = [row for row, one in enumerate(responses) if math.isfinite(one.reward) and branches[row].prefix_ids]
            await self.solve([responses[row] for row in rows], [branches[row].chain.beta for row in rows])
        return responses

    # --- decisions --------------------------------------------------------------------------------------

    def decide(self, chain: SearchState, branches: list[Proposal], responses: list[ScoredResponse]) -> None:
        """Record the proposals of a chain, and accept one of them or none."""
        for response in responses:
            if response.reward != -math.inf:  # a proposal that the reward cannot read is merely rejected
                self.stop_on_invalid_reward(chain, response.reward)
        if chain.stop_reason:
            return
        if self.is_metropolis:
            accepted = self.choose_by_metropolis(chain, branches[0], responses[0])
        else:
            accepted = acceptance.choose_best_proposal(chain.incumbent, responses)
        if chain.stop_reason:
            return
        flops = self.count_flops()
        for row, (proposal, response) in enumerate(zip(branches, responses, strict=True)):
            chain.revisions.append(
                Revision(
                    round=chain.num_rounds,
                    position=proposal.position,
                    old_token=chain.incumbent.response_ids[proposal.position],
                    new_token=proposal.response_ids[proposal.position],
                    suffix=tuple(proposal.response_ids[proposal.position :]),
                    reward_before=chain.incumbent.reward,
                    reward_after=response.reward,
                    accepted=row == accepted,
                    cumulative_flops=flops,
                )
            )
            if not self.is_metropolis:
                chain.rejected_branches.add((proposal.position, proposal.prefix_ids[-1]))
        chain.num_rounds += 1
        chain.rounds_since_acceptance += 1
        if accepted is not None:
            chain.replace_incumbent(responses[accepted])

    def choose_by_metropolis(self, chain: SearchState, proposal: Proposal, response: ScoredResponse) -> int | None:
        """Return 0 if the proposal is accepted, and None if not. Draw the same random number in both cases."""
        uniform = self.make_rng(chain, "accept", chain.num_rollouts).random()
        if not math.isfinite(response.reward):
            return None
        if proposal.prefix_ids and response.get_proposal_scores().isnan().any():
            chain.error, chain.stop_reason = f"the token gradient of {self.reward.name} holds NaN", "error"
            return None
        return 0 if math.log(max(uniform, 1e-300)) < self.compute_log_ratio(chain, proposal, response) else None

    def compute_log_ratio(self, chain: SearchState, proposal: Proposal, response: ScoredResponse) -> float:
        """Return the log Metropolis-Hastings ratio of the move from a chain's incumbent to a response."""
        assert chain.beta is not None
        old, position = chain.incumbent, proposal.position
        if not proposal.prefix_ids:
            before, after = (
                proposals.compute_independence_logp(one, self.reward.in_vocabulary, self.config)
                for one in (old, response)
            )
            return acceptance.compute_independence_log_ratio(
                old, response, beta=chain.beta, attempt_logp=(before, after)
            )
        branch_logp = self.compute_branch_logp(old, position), self.compute_branch_logp(response, position)
        return acceptance.compute_branch_log_ratio(old, response, position, beta=chain.beta, branch_logp=branch_logp)

    def compute_branch_logp(self, response: ScoredResponse, position: int) -> Tensor:
        """Return [K] the log-probability that a proposal from a response puts each candidate at the position."""
        if not self.is_sequential:
            return proposals.compute_global_branch_logp(response, self.reward.in_vocabulary, self.config)[position]
        proposals.refresh_stale_scores(response, position, self.recompute_scores_at)
        return proposals.compute_scan_logp(response, position, self.reward.in_vocabulary, self.config)

    def exchange_betas(self, chains: list[SearchState]) -> None:
        """Exchange β between neighboring chains by parallel tempering, even and odd pairs in turn."""
        by_beta = sorted(chains, key=lambda chain: chain.beta or 0.0)
        first = max((chain.num_rounds for chain in chains), default=0) % 2
        for cold, hot in zip(by_beta[first::2], by_beta[first + 1 :: 2], strict=False):
            assert cold.beta is not None and hot.beta is not None
            log_ratio = acceptance.compute_swap_log_ratio(
                (cold.beta, cold.incumbent.reward), (hot.beta, hot.incumbent.reward)
            )
            uniform = self.make_rng(cold, "swap", cold.num_rollouts, hot.index).random()
            if math.log(max(uniform, 1e-300)) < log_ratio:
                cold.beta, hot.beta = hot.beta, cold.beta
                cold.incumbent.proposal_scores = hot.incumbent.proposal_scores = None

    # --- requests to the engine -------------------------------------------------------------------------

    async def generate(self, requests: list[GenerationRequest]) -> list[GenerationOutput]:
        return await self.engine.generate(
            requests,
            self.config.get_sampling(),
            top_k_candidates=self.config.top_k_candidates,
            return_cache=True,
            return_log_importance_weight=self.is_metropolis,
        )

    async def score(self, responses: Sequence[ScoredResponse], num_shared: Sequence[int]) -> None:
        """Set the rewards and score caches of responses.

        Args:
            num_shared: tokens that each response shares with the one that its score caches are of.
        """
        scored = await self.engine.score(
            [response.make_sample_with_draw_info(self.policy.model) for response in responses],
            [response.score_caches for response in responses],
            num_shared,
        )
        for response, (reward, score_caches) in zip(responses, scored, strict=True):
            response.reward, response.score_caches = reward, score_caches
        if self.recorder:
            self.recorder.learn(responses)

    async def solve(self, responses: Sequence[ScoredResponse], betas: Sequence[float | None]) -> None:
        """Set the proposal scores of responses, together with other problems' under the same configuration."""

        def solve_together(items: list[tuple[ScoredResponse, float | None]]) -> list[None]:
            batch, batch_betas = zip(*items, strict=True)
            with self.flop_counter.measure_seconds([response.problem.id for response in batch]):
                proposals.compute_proposal_scores(
                    batch, self.policy, self.reward, self.config, self.flop_counter, batch_betas
                )
            return [None] * len(items)

        kind = ("proposal scores", self.solve_kind)
        await self.engine.batch(kind, solve_together, list(zip(responses, betas, strict=True)))

    def find_solve_kind(self) -> Hashable:
        """Return what the proposal scores depend on, so that searches that agree in it are solved together.

        β is given for every response. Solver ste takes it from the configuration.
        """
        config = self.config
        beta = config.beta if isinstance(config.solver, SteSolver) else None
        return (
            *(config.solver, config.proposals, type(config.acceptance)),
            *(config.candidate_min_p, config.top_k_candidates, beta),
        )

    # --- the end ----------------------------------------------------------------------------------------

    def count_flops(self) -> float:
        """Return the FLOPs spent on the problem so far."""
        return self.flop_counter.get_cost(self.problem.id).flops

    def count_rollouts(self) -> int:
        """Return the number of responses drawn so far."""
        return self.num_first_responses + sum(chain.num_rollouts for chain in self.chains)

    def make_rng(self, chain: SearchState, *draw: int | str) -> np.random.Generator:
        """Return the random numbers of one draw of a chain."""
        label = ("chain", chain.index) if chain.index else ()
        return make_rng(self.seed, self.rng_id, *label, *draw)

    def stop_on_invalid_reward(self, chain: SearchState, reward: float) -> None:
        if reward == -math.inf:
            chain.stop_reason = "unreadable"
        elif not math.isfinite(reward):
            chain.error, chain.stop_reason = f"the reward {self.reward.name} gave {reward}", "error"

    def select_chain(self) -> SearchState:
        """Return the chain of the highest reward, or with Metropolis acceptance the one that samples at β itself."""
        if self.is_metropolis:
            return min(self.chains, key=lambda chain: (chain.beta or 0.0, chain.index))
        return max(self.chains, key=lambda chain: (chain.incumbent.reward, -chain.index))

    def record_voters(self, responses: Sequence[ScoredResponse]) -> None:
        """Let the answers of scored responses vote, if the configuration asks for a vote."""
        if isinstance(self.config.select, RewardSelection):
            return
        stops = self.policy.get_stop_strings(self.problem)
        for response in responses:
            answer = extract_answer(self.policy.decode_response(response.response_ids, stops))
            self.voters.append(Voter(response.response_ids, response.reward, answer))

    def select_by_vote(self) -> Voter | None:
        """Return the response of the highest reward that has the winning answer. None: no response has an answer."""
        voters = [voter for voter in self.voters if voter.reward > -math.inf]
        log_weights = None
        if isinstance(self.config.select, VoteSelection):
            voters = voters[int(self.config.select.burn_in * len(voters)) :]
        else:
            log_weights = [voter.reward / self.config.vote_beta for voter in voters]
        winners = vote([voter.answer for voter in voters], log_weights)
        return max((voters[index] for index in winners), key=lambda voter: voter.reward, default=None)

    def build_trace(self) -> Trace:
        """Return the trace of the selected chain, or of a chain that failed.

        A response that wins a vote is returned with the revisions of its chain if it is the last of a chain, and
        without revisions if it is not. The meta counts what all chains did: first responses, proposals and accepted
        proposals.
        """
        if self.error is not None:
            return build_error_trace(self.problem, self.config.method, self.seed, self.error, self.trace_meta)
        accepted = [revision.accepted for chain in self.chains for revision in chain.revisions]
        counts = {"starts": self.num_first_responses, "proposals": len(accepted), "accepted": sum(accepted)}
        failed = next((chain for chain in self.chains if chain.error is not None), None)
        chain = failed or self.select_chain()
        if chain.stop_reason == "unreadable":
            chain.error, chain.stop_reason = f"the reward {self.reward.name} cannot read the response", "error"
        shared: dict[str, Any] = {
            "method": self.config.method,
            "seed": self.seed,
            "prompt_ids": self.prompt.ids,
            "cost": self.flop_counter.get_cost(self.problem.id),
            "meta": self.trace_meta | {name: str(count) for name, count in counts.items()},
        }
        winner = self.select_by_vote() if chain.error is None else None
        if winner is not None:
            of_winner = [one for one in self.chains if one.incumbent.response_ids == winner.response_ids]
            if not of_winner:
                return build_response_trace(
                    self.policy,
                    self.problem,
                    response_ids=winner.response_ids,
                    reward=winner.reward,
                    stop_reason=chain.stop_reason,
                    **shared,
                )
            [chain, *_] = of_winner
        return build_response_trace(
            self.policy,
            self.problem,
            response_ids=chain.incumbent.response_ids,
            reward=chain.incumbent.reward,
            stop_reason=chain.stop_reason,
            initial_ids=chain.initial.response_ids,
            reward_initial=chain.initial.reward,
            revisions=chain.revisions,
            predicted_gain=chain.predicted_gain,
            soft_targets=self.recorder.build(chain) if self.recorder else (),
            error=chain.error,
            **shared,
        )
