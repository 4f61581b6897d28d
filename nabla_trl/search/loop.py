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
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, make_rng, prepare_prompt_caches
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import acceptance, proposals
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import MetropolisAcceptance, SequentialProposals
from nabla_trl.search.state import EncodedPrompt, Proposal, ScoredResponse, SearchState
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Revision, Trace

# Ends of a chain that leave the budget as it is.
RESTARTABLE_STOP_REASONS = ("exhausted", "patience", "scanned", "unreadable")


def run_search(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    seed: int = 0,
    on_round: Callable[[Search], None] | None = None,
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
        traces += Search(policy, reward, config, seed, on_round).refine_batch(batch)
    return traces


class Search:
    """One batch of chains and the meter of their work."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        config: SearchConfig,
        seed: int,
        on_round: Callable[[Search], None] | None = None,
    ):
        self.policy, self.reward, self.seed, self.on_round = policy, reward, seed, on_round
        self.config = config = config.with_default_gradient_at(reward.gradient_at)
        self.is_metropolis = isinstance(config.acceptance, MetropolisAcceptance)
        self.is_sequential = isinstance(config.proposals, SequentialProposals)
        self.flop_counter = FlopCounter()
        self.chains_by_problem: dict[str, list[SearchState]] = {}  # by problem
        self.num_first_responses: Counter[str] = Counter()  # first responses, by problem
        self.run_metadata = build_trace_meta(policy, reward.name, config.compute_hash())

    def refine_batch(self, problems: Sequence[Problem]) -> list[Trace]:
        failed: dict[str, Trace] = {}
        self.chains_by_problem = self.start_chains(problems, failed)
        while active := self.update_active_chains():
            with self.flop_counter.measure_seconds([chain.problem.id for chain in active]):
                self.run_round(active)
        return [failed[p.id] if p.id in failed else self.build_trace(self.chains_by_problem[p.id]) for p in problems]

    # --- first responses --------------------------------------------------------------------------------

    def start_chains(
        self, problems: Sequence[Problem], error_traces: dict[str, Trace]
    ) -> dict[str, list[SearchState]]:
        """The chains of every problem that can be read, by its id."""
        prompts: list[tuple[Problem, list[int], int]] = []
        for problem in problems:
            try:
                ids = self.policy.encode(problem)
                prompts.append((problem, ids, self.compute_max_new_tokens(problem, ids)))
            except ValueError as error:
                error_traces[problem.id] = build_error_trace(
                    problem, self.config.method, self.seed, str(error), self.run_metadata
                )
        if not prompts:
            return {}
        with self.flop_counter.measure_seconds([problem.id for problem, _, _ in prompts]):
            bare = self.reward.compute_prompt_caches(
                [Sample(problem, ids, []) for problem, ids, _ in prompts], self.flop_counter
            )
            read = [EncodedPrompt(*one, memos) for one, memos in zip(prompts, bare, strict=True)]
            rows = prepare_prompt_caches(
                self.policy, [(prompt.problem.id, prompt.ids) for prompt in read], self.flop_counter
            )
            pairs = list(zip(read, rows, strict=True))
            count = 1 if self.config.max_flops else self.config.num_starts
            found = self.draw_first_responses([(*pair, at) for pair in pairs for at in range(count)])
            states = [found[begin : begin + count] for begin in range(0, len(found), count)]
            if self.config.max_flops:
                self.add_first_responses(pairs, states)
        return {prompt.problem.id: self.build_chains(own) for prompt, own in zip(read, states, strict=True)}

    def add_first_responses(
        self,
        prompts_and_caches: Sequence[tuple[EncodedPrompt, Tensor]],
        responses_by_prompt: list[list[ScoredResponse]],
    ) -> None:
        """Add to each problem's one first response those of `starts` that are expected to fit into the budget.

        As long as the first, that is; its cost is known.
        """
        wanted: list[tuple[EncodedPrompt, Tensor, int]] = []
        owners: list[list[ScoredResponse]] = []
        for pair, own in zip(prompts_and_caches, responses_by_prompt, strict=True):
            left = self.config.max_flops - self.flop_counter.get_cost(pair[0].problem.id).flops
            fit = 1 + max(0, int(left // proposals.estimate_first_response_flops(own[0], self.policy, self.reward)))
            wanted += [(*pair, at) for at in range(1, min(self.config.num_starts, fit))]
            owners += [own] * (len(wanted) - len(owners))
        for own, state in zip(owners, self.draw_first_responses(wanted) if wanted else [], strict=True):
            own.append(state)

    def draw_first_responses(self, draws: Sequence[tuple[EncodedPrompt, Tensor, int]]) -> list[ScoredResponse]:
        """Scored first responses, from the caches of prompts; number n is that of best-of-N under the same seed."""
        jobs = []
        for prompt, cache, number in draws:
            stream = make_rng(self.seed, prompt.problem.id, "suffix", f"pool-{number}" if number else 0)
            stop = self.policy.get_stop_strings(prompt.problem)
            jobs.append(GenerationRequest(prompt.problem.id, prompt.ids, stream, prompt.max_new_tokens, cache, stop))
            self.num_first_responses[prompt.problem.id] += 1
        states = [
            ScoredResponse(
                p,
                d.ids,
                d.finished,
                d.candidates,
                d.logp,
                d.log_importance_weight,
                d.get_cache(),
                p.score_caches,
                math.nan,
            )
            for (p, _, _), d in zip(draws, self.generate_continuations(jobs), strict=True)
        ]
        self.compute_rewards(states, [0] * len(states))
        return states

    def update_active_chains(self) -> list[SearchState]:
        """Chains that go on; where all of a problem's have ended with some of the budget left, one more begins."""
        if self.config.restarts_enabled:
            ended = [
                chains
                for chains in self.chains_by_problem.values()
                if all(chain.stop_reason in RESTARTABLE_STOP_REASONS for chain in chains)
            ]
            self.restart_chains([chains for chains in ended if self.can_restart(chains)])
        if self.on_round:
            self.on_round(self)
        return [chain for chains in self.chains_by_problem.values() for chain in chains if not chain.stop_reason]

    def restart_chains(self, ended_chains: list[list[SearchState]]) -> None:
        """Begin another chain for each of these problems."""
        if not ended_chains:
            return
        with self.flop_counter.measure_seconds([chains[0].problem.id for chains in ended_chains]):
            wanted = [
                (*_get_prompt_and_cache(chains[0]), self.num_first_responses[chains[0].problem.id])
                for chains in ended_chains
            ]
            for chains, state in zip(ended_chains, self.draw_first_responses(wanted), strict=True):
                chains.append(SearchState(state, initial=state, index=chains[-1].index + 1, beta=chains[0].beta))
                self.stop_on_invalid_reward(chains[-1], state.reward)

    def can_restart(self, chains: list[SearchState]) -> bool:
        """Whether another first response, as long as the last one, is expected to fit into the budget."""
        config, state = self.config, chains[-1].incumbent
        if config.max_rollouts and self.count_rollouts(state.problem) >= config.max_rollouts:
            return False
        spent = self.flop_counter.get_cost(state.problem.id).flops
        return (
            not config.max_flops
            or spent + proposals.estimate_first_response_flops(state, self.policy, self.reward) <= config.max_flops
        )

    def count_rollouts(self, problem: Problem) -> int:
        """Responses drawn for a problem so far."""
        return self.num_first_responses[problem.id] + sum(
            chain.num_rollouts for chain in self.chains_by_problem[problem.id]
        )

    def build_chains(self, first_responses: list[ScoredResponse]) -> list[SearchState]:
        """The chains of one problem: from its responses of highest reward, the first of equals."""
        failed = next(
            (state for state in first_responses if math.isnan(state.reward) or state.reward == math.inf), None
        )
        kept = (
            [failed] if failed else sorted(first_responses, key=lambda state: -state.reward)[: self.config.num_chains]
        )
        kept = [state for state in kept if state.reward > -math.inf] or kept[:1]
        chains = [
            SearchState(state, initial=state, index=index, beta=beta)
            for index, (state, beta) in enumerate(zip(kept, self.config.compute_chain_betas(), strict=False))
        ]
        for chain in chains:
            self.stop_on_invalid_reward(chain, chain.incumbent.reward)
        return chains

    # --- rounds -----------------------------------------------------------------------------------------

    def run_round(self, active_chains: list[SearchState]) -> None:
        """One round of every active chain: solve where needed, propose, regenerate, score, accept."""
        together = _group_by_problem(active_chains)
        for chains in together:
            self.stop_at_limits(chains)
        self.update_proposal_scores([chain for chain in active_chains if not chain.stop_reason])
        proposals: list[Proposal] = []
        for chains in together:
            going = [
                (chain, drawn) for chain in chains if not chain.stop_reason and (drawn := self.draw_proposals(chain))
            ]
            places = {chain.index: [one.position for one in drawn] for chain, drawn in going}
            self.stop_over_budget([chain for chain, _ in going], places)
            proposals += [one for chain, drawn in going if not chain.stop_reason for one in drawn]
        if proposals:
            self.regenerate_suffixes(proposals)
            self.score_and_decide(proposals)
        if self.config.acceptance.parallel_tempering > 1:
            for chains in together:
                self.exchange_betas([chain for chain in chains if not chain.stop_reason])

    def stop_at_limits(self, chains: list[SearchState]) -> None:
        """Stop the chains of one problem that have come to a limit."""
        config, sweeping = self.config, self.is_metropolis and self.is_sequential
        for chain in chains:
            if config.max_rounds and (chain.num_sweeps if sweeping else chain.num_rounds) >= config.max_rounds:
                chain.stop_reason = "max_rounds"
            elif config.patience and chain.rounds_since_acceptance >= config.patience:
                chain.stop_reason = "patience"
        going = [chain for chain in chains if not chain.stop_reason]
        drawn = self.count_rollouts(chains[0].problem)
        for number, chain in enumerate(going, 1):
            if config.max_rollouts and drawn + number * config.proposals.proposals_per_round > config.max_rollouts:
                chain.stop_reason = "max_rollouts"
        middles = {
            chain.index: [len(chain.incumbent.response_ids) // 2] * config.proposals.proposals_per_round
            for chain in going
        }
        self.stop_over_budget([chain for chain in going if not chain.stop_reason], middles)

    def stop_over_budget(self, chains: list[SearchState], positions_by_chain: dict[int, list[int]]) -> None:
        """Stop chains of one problem, those of the lowest reward first, until their next round is expected to fit."""
        if not self.config.max_flops or not chains:
            return
        spent = self.flop_counter.get_cost(chains[0].problem.id).flops
        left = sorted(chains, key=lambda chain: -chain.incumbent.reward)
        while (
            left
            and spent + sum(self.estimate_round_flops(chain, positions_by_chain[chain.index]) for chain in left)
            > self.config.max_flops
        ):
            left.pop().stop_reason = "max_flops"

    def estimate_round_flops(self, chain: SearchState, positions: list[int]) -> float:
        return proposals.estimate_round_flops(chain.incumbent, positions, self.policy, self.reward, self.config)

    def update_proposal_scores(self, chains: list[SearchState]) -> None:
        due = [chain for chain in chains if chain.incumbent.proposal_scores is None]
        self.compute_proposal_scores([chain.incumbent for chain in due], [chain.beta for chain in due])
        for chain in due:
            if chain.incumbent.get_proposal_scores().isnan().any():
                chain.error, chain.stop_reason = f"the token gradient of {self.reward.name} holds NaN", "error"
        for chain in chains:
            if (
                chain.incumbent.reward_gradient is not None
                and len(chain.predicted_gain) == chain.num_accepted
                and not chain.stop_reason
            ):
                chain.predicted_gain.append(
                    proposals.compute_predicted_gain(chain.incumbent, self.reward.in_vocabulary, self.config)
                )

    def compute_proposal_scores(self, responses: list[ScoredResponse], betas: list[float | None]) -> None:
        if responses:
            proposals.compute_proposal_scores(
                responses, self.policy, self.reward, self.config, self.flop_counter, betas
            )

    def draw_proposals(self, chain: SearchState) -> list[Proposal]:
        """What follows on the incumbent; where nothing does, the chain stops or a new sweep begins."""
        if self.is_independence_round(chain):
            chain.num_sweeps += self.is_sequential  # in place of a sweep
            return [Proposal(chain, [])]
        branches = self.propose_sequentially(chain) if self.is_sequential else self.propose_globally(chain)
        return [Proposal(chain, [*chain.incumbent.response_ids[:position], token]) for position, token in branches]

    def is_independence_round(self, chain: SearchState) -> bool:
        """Whether this round, or this sweep of a scan, draws the whole response anew."""
        if not self.config.acceptance.independence_prob or chain.scan_position:
            return False
        uniform = self.make_random_stream(
            chain, "redraw", chain.num_sweeps if self.is_sequential else chain.num_rounds
        ).random()
        return uniform < math.exp(
            proposals.compute_independence_logp(chain.incumbent, self.reward.in_vocabulary, self.config)
        )

    def propose_globally(self, chain: SearchState) -> list[tuple[int, int]]:
        shape = tuple(chain.incumbent.candidates.shape)
        noise = torch.from_numpy(self.make_random_stream(chain, "branch", chain.num_rounds).gumbel(size=shape))
        branches = proposals.draw_global_branches(chain, noise, self.reward.in_vocabulary, self.config)
        chain.stop_reason = "" if branches else "exhausted"
        return branches

    def propose_sequentially(self, chain: SearchState) -> list[tuple[int, int]]:
        sweep = [chain.num_sweeps] if self.is_metropolis else []
        stream = self.make_random_stream(chain, "resample", chain.num_rounds, *sweep)
        branches = proposals.draw_sequential_branch(
            chain, stream, self.reward.in_vocabulary, self.config, self.recompute_scores_at
        )
        if not branches and self.is_metropolis:
            chain.scan_position, chain.num_sweeps = 0, chain.num_sweeps + 1
        elif not branches:
            chain.stop_reason = "scanned"
        return branches

    def recompute_scores_at(self, response: ScoredResponse, position: int) -> Tensor:
        return proposals.compute_ste_scores_at(
            response, position, self.policy, self.reward, self.config, self.flop_counter
        )

    def regenerate_suffixes(self, proposals: list[Proposal]) -> None:
        """Draw the suffixes of all open branches, and whole responses, in one batch from the incumbents' caches."""
        jobs, open_ = [], []
        for proposal in proposals:
            chain, prompt = proposal.chain, proposal.chain.incumbent.prompt
            chain.num_rollouts += 1
            limit = prompt.max_new_tokens - len(proposal.response_ids)
            if proposal.is_finished(self.policy) or limit < 1:
                continue
            stream = self.make_random_stream(chain, "suffix", chain.num_rollouts)
            given, stop = proposal.response_ids, self.policy.get_stop_strings(chain.problem)
            jobs.append(
                GenerationRequest(
                    chain.problem.id,
                    prompt.ids + given,
                    stream,
                    limit,
                    proposal.get_prefix_cache(),
                    stop,
                    response_tokens_in_prefix=len(given),
                )
            )
            open_.append(proposal)
        for proposal, draft in zip(open_, self.generate_continuations(jobs), strict=True):
            proposal.generation = draft

    def compute_rewards(self, responses: Sequence[ScoredResponse], num_shared_tokens: Sequence[int]) -> None:
        """Rewards and memos of states, which share so many tokens with the responses that their memos are of."""
        rewards, memos = self.reward.score(
            [state.make_sample_with_draw_info(self.policy.model) for state in responses],
            [state.score_caches for state in responses],
            flop_counter=self.flop_counter,
            num_shared=num_shared_tokens,
            return_caches=True,
        )
        for state, value, kept in zip(responses, rewards, memos, strict=True):
            state.reward, state.score_caches = value, kept

    # --- decisions --------------------------------------------------------------------------------------

    def score_and_decide(self, proposals: list[Proposal]) -> None:
        """Score all proposals as incumbents are scored, and decide in each chain."""
        states = [proposal.to_scored_response(self.policy) for proposal in proposals]
        self.compute_rewards(states, [proposal.position for proposal in proposals])
        if self.is_metropolis:
            # The scores weigh the way back. A response drawn anew has none to weigh, and is solved once it is taken.
            sound = [at for at, state in enumerate(states) if math.isfinite(state.reward) and proposals[at].prefix_ids]
            self.compute_proposal_scores([states[at] for at in sound], [proposals[at].chain.beta for at in sound])
        rows: dict[int, list[int]] = {}
        for index, proposal in enumerate(proposals):
            rows.setdefault(id(proposal.chain), []).append(index)
        for own in rows.values():
            self.decide_proposals([proposals[index] for index in own], [states[index] for index in own])

    def decide_proposals(self, proposals: list[Proposal], responses: list[ScoredResponse]) -> None:
        """Note one chain's proposals and take one of them, or none."""
        chain = proposals[0].chain
        for state in responses:
            if state.reward > -math.inf or math.isnan(state.reward):  # an unreadable proposal is merely not taken
                self.stop_on_invalid_reward(chain, state.reward)
        if chain.stop_reason:
            return
        keep = (
            self.choose_by_metropolis(proposals[0], responses[0])
            if self.is_metropolis
            else acceptance.choose_best_proposal(chain.incumbent, responses)
        )
        if chain.stop_reason:
            return
        spent = self.flop_counter.get_cost(chain.problem.id).flops
        for index, (proposal, state) in enumerate(zip(proposals, responses, strict=True)):
            chain.revisions.append(
                Revision(
                    round=chain.num_rounds,
                    position=proposal.position,
                    old_token=chain.incumbent.response_ids[proposal.position],
                    new_token=proposal.response_ids[proposal.position],
                    suffix=tuple(proposal.response_ids[proposal.position :]),
                    reward_before=chain.incumbent.reward,
                    reward_after=state.reward,
                    accepted=index == keep,
                    cumulative_flops=spent,
                )
            )
            if not self.is_metropolis:
                chain.rejected_branches.add((proposal.position, proposal.prefix_ids[-1]))
        chain.num_rounds += 1
        chain.rounds_since_acceptance += 1
        if keep is not None:
            chain.replace_incumbent(responses[keep])

    def choose_by_metropolis(self, proposal: Proposal, response: ScoredResponse) -> int | None:
        """0 if the proposal is taken, None if not; the same number is drawn either way."""
        chain, uniform = (
            proposal.chain,
            self.make_random_stream(proposal.chain, "accept", proposal.chain.num_rollouts).random(),
        )
        if not math.isfinite(response.reward):
            return None
        if proposal.prefix_ids and response.get_proposal_scores().isnan().any():
            chain.error, chain.stop_reason = f"the token gradient of {self.reward.name} holds NaN", "error"
            return None
        return (
            0
            if math.log(max(uniform, 1e-300)) < self.compute_log_acceptance_ratio(chain, proposal, response)
            else None
        )

    def compute_log_acceptance_ratio(self, chain: SearchState, proposal: Proposal, response: ScoredResponse) -> float:
        """Of the move from a chain's incumbent to the state that a proposal led to."""
        assert chain.beta is not None
        old, beta, position = chain.incumbent, chain.beta, proposal.position
        if proposal.prefix_ids:
            chosen = self.compute_branch_logp(old, position), self.compute_branch_logp(response, position)
            return acceptance.compute_branch_log_ratio(old, response, position, beta=beta, branch_logp=chosen)
        before, after = (
            proposals.compute_independence_logp(one, self.reward.in_vocabulary, self.config) for one in (old, response)
        )
        return acceptance.compute_independence_log_ratio(old, response, beta=beta, attempt_logp=(before, after))

    def compute_branch_logp(self, response: ScoredResponse, position: int) -> Tensor:
        """[K] log-probability that a proposal from this state puts each candidate at the position."""
        if not self.is_sequential:
            return proposals.compute_global_branch_logp(response, self.reward.in_vocabulary, self.config)[position]
        proposals.refresh_stale_scores(response, position, self.recompute_scores_at)
        return proposals.compute_scan_logp(response, position, self.reward.in_vocabulary, self.config)

    def exchange_betas(self, chains: list[SearchState]) -> None:
        """Exchange β between neighbouring chains of one problem, even and odd pairs in turn."""
        ladder = sorted(chains, key=lambda chain: chain.beta or 0.0)
        number = max((chain.num_rounds for chain in chains), default=0)
        for cold, hot in zip(ladder[number % 2 :: 2], ladder[number % 2 + 1 :: 2], strict=False):
            assert cold.beta is not None and hot.beta is not None
            ratio = acceptance.compute_swap_log_ratio(
                (cold.beta, cold.incumbent.reward), (hot.beta, hot.incumbent.reward)
            )
            if (
                math.log(max(self.make_random_stream(cold, "swap", cold.num_rollouts, hot.index).random(), 1e-300))
                < ratio
            ):
                cold.beta, hot.beta = hot.beta, cold.beta
                cold.incumbent.proposal_scores = hot.incumbent.proposal_scores = None

    # --- ends -------------------------------------------------------------------------------------------

    def generate_continuations(self, requests: list[GenerationRequest]) -> list[GenerationOutput]:
        config = self.config
        return generate_continuations(
            self.policy,
            requests,
            config.get_sampling(),
            flop_counter=self.flop_counter,
            top_k_candidates=config.top_k_candidates,
            return_cache=True,
            return_log_importance_weight=self.is_metropolis,
            batch_size=config.batch_size,
        )

    def compute_max_new_tokens(self, problem: Problem, prompt_ids: list[int]) -> int:
        """Most tokens of a response; ValueError where the reward cannot read the prompt."""
        room = self.reward.compute_max_new_tokens(problem, prompt_ids)
        return min(self.config.max_new_tokens, self.policy.context_length - len(prompt_ids), room)

    def make_random_stream(self, chain: SearchState, *key: int | str) -> np.random.Generator:
        own = ("chain", chain.index) if chain.index else ()
        return make_rng(self.seed, chain.problem.id, *own, *key)

    def stop_on_invalid_reward(self, chain: SearchState, reward: float) -> None:
        if reward == -math.inf:
            chain.stop_reason = "unreadable"
        elif not math.isfinite(reward):
            chain.error, chain.stop_reason = f"the reward {self.reward.name} gave {reward}", "error"

    def select_chain(self, chains: list[SearchState]) -> SearchState:
        """The chain of the highest reward; of a Metropolis search the one that samples at β itself."""
        if self.is_metropolis:
            return min(chains, key=lambda one: (one.beta or 0.0, one.index))
        return max(chains, key=lambda one: (one.incumbent.reward, -one.index))

    def build_trace(self, chains: list[SearchState]) -> Trace:
        """Of the chain that is kept, or of one that failed.

        Its meta counts what all chains did: first responses, proposals, and accepted ones.
        """
        moves = [revision.accepted for chain in chains for revision in chain.revisions]
        totals = {
            "starts": self.num_first_responses[chains[0].problem.id],
            "proposals": len(moves),
            "accepted": sum(moves),
        }
        chain = next((chain for chain in chains if chain.error is not None), None) or self.select_chain(chains)
        if chain.stop_reason == "unreadable":
            chain.error, chain.stop_reason = f"the reward {self.reward.name} cannot read the response", "error"
        return build_response_trace(
            self.policy,
            chain.problem,
            method=self.config.method,
            seed=self.seed,
            prompt_ids=chain.incumbent.prompt.ids,
            response_ids=chain.incumbent.response_ids,
            reward=chain.incumbent.reward,
            cost=self.flop_counter.get_cost(chain.problem.id),
            meta=self.run_metadata | {name: str(count) for name, count in totals.items()},
            stop_reason=chain.stop_reason,
            initial_ids=chain.initial.response_ids,
            reward_initial=chain.initial.reward,
            revisions=chain.revisions,
            predicted_gain=chain.predicted_gain,
            error=chain.error,
        )


def _get_prompt_and_cache(chain: SearchState) -> tuple[EncodedPrompt, Tensor]:
    """The prompt and the cache of all but its last token."""
    state = chain.incumbent
    return state.prompt, state.policy_cache[:, :, :, : len(state.prompt.ids) - 1]


def _group_by_problem(chains: Sequence[SearchState]) -> list[list[SearchState]]:
    together: dict[str, list[SearchState]] = {}
    for chain in chains:
        together.setdefault(chain.problem.id, []).append(chain)
    return list(together.values())
