"""Solvers, kinds of proposals and acceptances that a search can use, each with its own options.

Nothing here needs torch, so that `--help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from nabla_trl.models.options import MAX_TEMPERATURE, MIN_TEMPERATURE, GradientPoint
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option

# Default KL target of a mirror step, in nats. EXPERIMENTS.md has the measurements behind it.
DEFAULT_TARGET_KL = 2.0


@dataclass(frozen=True)
class MirrorSolver:
    """One closed-form mirror-descent step along the reward's gradient."""

    name: ClassVar[str] = "mirror"

    gradient_at: str | None = option(
        None,
        "Where the gradient of the reward is taken. direct uses values that scoring already computed and needs no "
        "backward pass. hard is at the tokens of the response. mixture:A[,A…] is at mixtures of these tokens (share "
        "1−A) and the policy's candidates (share A). direct+hard and direct+mixture:A add both. nabla-trl audit "
        "--gradient shows which is best for a reward (default: what the reward's audit advises, direct for a "
        "log-ratio, else mixture:0.5).",
        common=True,
    )
    step_size: float = option(
        1.0, "Fraction of the full mirror-descent step. 0.5 is the locally balanced proposal of a Metropolis chain."
    )
    target_kl: float | None = option(
        None,
        "How far the proposal distribution may move from the policy, in nats of KL. Replaces --beta in searches with "
        "global proposals and greedy acceptance. Lower it if responses become unnatural (default: "
        f"{DEFAULT_TARGET_KL:g}, unless --beta is set).",
        common=True,
    )
    shuffle_gradient: bool = option(
        False,
        "Give each position the gradient of another position. This is a control that shows if the gradient points to "
        "the right positions.",
    )

    def __post_init__(self) -> None:
        checks = Checks()
        if self.gradient_at is not None:
            checks.call(GradientPoint.parse, self.gradient_at)
        checks.require(0 < self.step_size < math.inf, f"step_size must be a positive number, not {self.step_size}")
        checks.require(
            self.target_kl is None or 0 < self.target_kl < math.inf,
            f"target_kl must be a positive number, not {self.target_kl}",
        )
        checks.raise_faults()


@dataclass(frozen=True)
class SteSolver:
    """Adam on the logits with a straight-through estimator, as in the paper (arXiv 2603.04948)."""

    name: ClassVar[str] = "ste"

    steps: int = option(20, "Optimizer steps. Increase it for a closer optimum at a higher cost.")
    learning_rate: float = option(0.01, "First learning rate.")
    final_learning_rate: float = option(0.001, "Last learning rate of the cosine schedule.")
    tau: float = option(1.0, "Softmax temperature of the backward pass.")
    likelihood_token_grad: bool = option(
        True, "Include the gradient of the policy's likelihood at the changed token itself."
    )
    likelihood_suffix_grad: bool = option(
        True, "Include the gradient of the policy's likelihood through later tokens."
    )
    optimize_positions: str = option(
        "all",
        "Positions whose logits are optimized at a scanned position. all is this position and all later ones. first "
        "is this position alone.",
    )
    hard_tokens: str = option(
        "response",
        "Tokens at which the gradient is taken. response is those of the response, until the most likely token of a "
        "position changes. argmax is the most likely token at the scanned position and at all later ones, as in the "
        "released code. It computes a gradient at every scanned position, and needs sequential proposals.",
    )
    schedule: str = option(
        "cosine",
        "Learning rates of the steps. cosine falls from the first to the last. clipped_cosine falls towards 0, but "
        "never below the last, as in the released code.",
    )
    repeat_turn_end: bool = option(
        False,
        "Read the end of the turn twice after a response that ends with it, where the gradient of a reward model is "
        "taken, as in the released code.",
    )

    def __post_init__(self) -> None:
        checks = Checks()
        # Written so that NaN is refused too.
        checks.require(
            self.steps >= 1 and self.learning_rate > 0 and self.final_learning_rate >= 0 and self.tau > 0,
            "solver ste needs steps >= 1, learning_rate > 0, final_learning_rate >= 0 and tau > 0",
        )
        checks.require_choice(self, optimize_positions=("all", "first"), hard_tokens=("response", "argmax"))
        checks.require_choice(self, schedule=("cosine", "clipped_cosine"))
        checks.raise_faults()

    def compute_learning_rate(self, step: int) -> float:
        """Return the learning rate of step i of n.

        With c_i = (1 + cos(π·i/n))/2 it is lr_n + (lr_0 − lr_n)·c_i, or clipped max(lr_n, lr_0·c_i).
        """
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if self.schedule == "clipped_cosine":
            return max(self.final_learning_rate, self.learning_rate * cosine)
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine


@dataclass(frozen=True)
class NoGradient:
    """No gradient, as a control."""

    name: ClassVar[str] = "none"

    cut: str = option(
        "token",
        "How the position of a change is drawn. token prefers positions where another token is likely. uniform gives "
        "all positions the same probability (power sampling, arXiv 2510.14901). entropy prefers positions where the "
        "policy is uncertain, and jump those where it becomes uncertain (arXiv 2605.30327).",
    )

    def __post_init__(self) -> None:
        if self.cut not in ("token", "uniform", "entropy", "jump"):
            raise ValueError(f"cut must be one of token, uniform, entropy, jump, not {self.cut!r}")


@dataclass(frozen=True)
class GlobalProposals:
    """Change the most promising of all positions."""

    name: ClassVar[str] = "global"
    min_gradient_norm: ClassVar[float] = 0.0

    proposals_per_round: int = option(
        1,
        "Number of proposals generated and scored per round. Increase it to use a GPU better. Metropolis searches "
        "need 1.",
        common=True,
    )

    def __post_init__(self) -> None:
        if self.proposals_per_round < 1:
            raise ValueError("proposals_per_round must be at least 1")


@dataclass(frozen=True)
class SequentialProposals:
    """Scan the response from left to right, as the paper does."""

    name: ClassVar[str] = "sequential"
    proposals_per_round: ClassVar[int] = 1

    confidence: float = option(
        0.97,
        "Skip positions where the policy's most likely token has a higher probability than this. Lower it to scan "
        "faster.",
    )
    min_gradient_norm: float = option(
        0.0,
        "Skip positions where the norm of ∂L/∂z, the loss gradient with respect to the candidates' logits, is smaller "
        "than this. Needs solver ste. 0 skips none.",
    )
    resample_temperature: float = option(0.5, "Temperature of the resampled token.")
    resample_top_p: float = option(1.0, "Nucleus sampling mass of the resampled token. 1 uses all candidates.")

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(0 < self.confidence <= 1, f"confidence must be in (0, 1], not {self.confidence}")
        checks.require(
            0 <= self.min_gradient_norm < math.inf,
            f"min_gradient_norm must be a number of at least 0, not {self.min_gradient_norm}",
        )
        bounds = f"{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        checks.require(
            MIN_TEMPERATURE <= self.resample_temperature <= MAX_TEMPERATURE,
            f"resample_temperature must be from {bounds}, not {self.resample_temperature}",
        )
        checks.require(0 < self.resample_top_p <= 1, f"resample_top_p must be in (0, 1], not {self.resample_top_p}")
        checks.raise_faults()


@dataclass(frozen=True)
class GreedyAcceptance:
    """Keep a proposal if its reward is strictly higher."""

    name: ClassVar[str] = "greedy"
    independence_prob: ClassVar[float] = 0.0
    parallel_tempering: ClassVar[float] = 1.0


@dataclass(frozen=True)
class MetropolisAcceptance:
    """Sample from π·exp(r/β) by Metropolis–Hastings, with the last state as the answer."""

    name: ClassVar[str] = "metropolis"

    independence_prob: float = option(
        0.1,
        "Probability that a Metropolis step (of a sequential search: a sweep) proposes a completely new response "
        "instead of changing one token. Needed because tokens outside the top-k candidates can otherwise never be "
        "replaced. 0 disables it.",
    )
    parallel_tempering: float = option(
        1.0,
        "Ratio between the β of neighboring chains, which exchange states (parallel tempering). Increase it if "
        "Metropolis chains mix slowly. 1 disables it.",
    )

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(
            0 <= self.independence_prob <= 1, f"independence_prob must be in [0, 1], not {self.independence_prob}"
        )
        checks.require(
            1 <= self.parallel_tempering < math.inf,
            f"parallel_tempering must be a number of at least 1, not {self.parallel_tempering}",
        )
        checks.raise_faults()


@dataclass(frozen=True)
class RewardSelection:
    """Return the response with the highest reward. With Metropolis acceptance: the last state."""

    name: ClassVar[str] = "reward"


@dataclass(frozen=True)
class VoteSelection:
    """Return the most common answer of all scored responses. With Metropolis acceptance: of the chain's states.

    The vote over the states of a Metropolis chain is QAlign (Faria et al., arXiv 2504.03790).
    """

    name: ClassVar[str] = "vote"

    burn_in: float = option(
        0.0,
        "Share of the first states of a Metropolis chain that do not vote. Increase it if the chain starts far from "
        "its target.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.burn_in < 1:
            raise ValueError(f"burn_in must be in [0, 1), not {self.burn_in}")


@dataclass(frozen=True)
class WeightedVoteSelection:
    """Return the answer with the largest sum of exp(r/β) over all scored responses, as weighted best-of-N does."""

    name: ClassVar[str] = "weighted_vote"

    vote_beta: float | None = option(
        None,
        "β of the weights exp(r/β). Lower it to follow the reward more closely (default: --beta, and 1 where "
        "--solver.target_kl sets the step).",
    )

    def __post_init__(self) -> None:
        if self.vote_beta is not None and not 0 < self.vote_beta < math.inf:
            raise ValueError(f"vote_beta must be a positive number, not {self.vote_beta}")


Solver = MirrorSolver | SteSolver | NoGradient
Proposals = GlobalProposals | SequentialProposals
Acceptance = GreedyAcceptance | MetropolisAcceptance
Selection = RewardSelection | VoteSelection | WeightedVoteSelection
