"""The reasoner's configuration: one dataclass, read from keywords, YAML and the command line alike.

Depends on nothing, so that `--help` needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nabla_trl.models.options import HARD_GRADIENT_POINT, GradientPoint, Sampling, ScanConfig, SteConfig
from nabla_trl.utils.fields import option

SOLVERS = ("mirror", "ste", "none")
PROPOSALS = ("global", "sequential")
ACCEPTANCES = ("greedy", "metropolis")
OPTIMIZE_POSITIONS = ("all", "first")

# The paper's settings (arXiv 2603.04948): one response scanned left to right, eight rollouts at most; the logits of
# all positions from the scanned one on move. At a budget in a comparison (paper@…) it begins anew until that is spent.
_PAPER_OPTIONS: dict[str, Any] = {
    "solver": "ste",
    "proposals": "sequential",
    "beta": 1.0,
    "max_rollouts": 8,
    "restarts": False,
    "max_rounds": 0,
    "temperature": 0.7,
    "ste_steps": 20,
    "ste_learning_rate": 0.01,
    "ste_final_learning_rate": 0.001,
    "ste_tau": 1.0,
    "likelihood_token_grad": True,
    "likelihood_suffix_grad": True,
    "optimize_positions": "all",
    "confidence": 0.97,
    "resample_temperature": 0.5,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _PAPER_OPTIONS,
    # What the released code does where it differs: the log-likelihood counts 1e-3 (λ = 1000 at its scripts' reward
    # coefficient of 1), only the scanned position's logits move, and it samples with top-p. Without its defects (both
    # responses are scored with the prompt once, float32) and its selector by the norm of ∂L/∂Y over the vocabulary.
    "released": {
        **_PAPER_OPTIONS,
        "beta": 0.001,
        "optimize_positions": "first",
        "temperature": 0.6,
        "top_p": 0.95,
        "resample_top_p": 0.95,
    },
}

# Options that only one solver, one kind of proposal or one acceptance reads, with their defaults.
_STE_DEFAULTS = {
    "ste_steps": 20,
    "ste_learning_rate": 0.01,
    "ste_final_learning_rate": 0.001,
    "ste_tau": 1.0,
    "likelihood_token_grad": True,
    "likelihood_suffix_grad": True,
    "optimize_positions": "all",
}
_MIRROR_DEFAULTS = {"gradient_at": None, "step_size": 1.0, "shuffle_gradient": False}  # point: the reward's own
_SEQUENTIAL_DEFAULTS = {
    "confidence": 0.97,
    "min_gradient_norm": 0.0,
    "resample_temperature": 0.5,
    "resample_top_p": 1.0,
}
_METROPOLIS_DEFAULTS = {"independence_prob": 0.1}
# Without a β, branches are moved from the policy's by this much (EXPERIMENTS.md).
DEFAULT_TARGET_KL = 2.0


@dataclass
class SearchConfig:
    """How a response is refined. Options of another solver, proposal or acceptance are refused, not ignored.

    Raises:
        ValueError: a value out of range, or an option that the chosen solver, proposal or acceptance does not read.
    """

    solver: str = option("mirror", "mirror (closed form), ste (Adam on logits, the paper) or none (the control)")
    proposals: str = option("global", "global (best branches over all positions) or sequential (scan left to right)")
    acceptance: str = option(
        "greedy", "greedy (keep what scores strictly higher) or metropolis (sample π·exp(r/β): the last state counts)"
    )
    beta: float | None = option(
        None,
        "KL coefficient β; the reward counts λ = 1/β times against log π; empty = set by kl, solvers ste, none: 1",
    )
    target_kl: float | None = option(
        None,
        f"mirror, global: instead of β, how far branches may move from the policy's, in nats ({DEFAULT_TARGET_KL:g})",
    )
    num_starts: int = option(1, "first responses drawn per problem; within a budget of FLOPs, as many as fit")
    num_chains: int = option(1, "how many of them are refined side by side: those of the highest reward")
    parallel_tempering: float = option(
        1.0, "metropolis: β of each chain over that of the chain before it; states are swapped"
    )
    independence_prob: float | None = option(
        None,
        "metropolis: share of the rounds (of sequential ones: sweeps) that draw the whole response anew, so that no "
        "token is held for lack of a candidate; 0 = none (0.1)",
    )
    max_rounds: int = option(
        16, "most rounds of proposals, in each chain; of sequential metropolis, sweeps; 0 = no limit"
    )
    max_rollouts: int = option(0, "most responses drawn per problem, the first ones included; 0 = no limit")
    max_flops: float = option(
        0.0, "FLOPs budget per problem; no round starts that is expected to end above it; 0 = none"
    )
    restarts: bool = option(
        True,
        "within a budget of FLOPs or rollouts, begin anew from a fresh response when all chains have ended before it",
    )
    patience: int = option(0, "stop after this many rounds without an acceptance; 0 = never")
    proposals_per_round: int = option(1, "branches regenerated per round (global proposals)")
    top_k_candidates: int = option(16, "policy tokens considered per position")
    candidate_min_p: float = option(0.0, "drop candidates below this fraction of the position's likeliest token")
    temperature: float = option(1.0, "sampling temperature of responses and suffixes; 0 = greedy")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 = all")
    top_p: float = option(1.0, "nucleus sampling mass; 1 = all")
    min_p: float = option(0.0, "min-p sampling threshold; 0 = off")
    max_new_tokens: int = option(512, "longest response, in tokens")
    batch_size: int = option(64, "problems refined together; best-of-N and its like draw 4 times as many responses")
    gradient_at: str | None = option(
        None,
        "mirror: which gradient of the reward: direct (what scoring shows, no backward pass), hard (at the response's "
        "tokens), mixture:A[,A…] (at mixtures of them and the policy's candidates in shares 1−A and A), direct+hard, "
        "direct+mixture:A; empty = the reward's own: that of its audit, direct for a log-ratio, else mixture:0.5",
    )
    step_size: float | None = option(
        None, "mirror: share of the full step; 0.5 is the locally balanced proposal of a Metropolis chain (1)"
    )
    shuffle_gradient: bool | None = option(
        None, "mirror: give each position the gradient of another, a control for where it points (false)"
    )
    ste_steps: int | None = option(None, "ste: optimiser steps (20)")
    ste_learning_rate: float | None = option(None, "ste: first learning rate (0.01)")
    ste_final_learning_rate: float | None = option(None, "ste: last learning rate of the cosine (0.001)")
    ste_tau: float | None = option(None, "ste: softmax temperature of the backward (1)")
    likelihood_token_grad: bool | None = option(
        None, "ste: gradient of the policy's likelihood at the token itself (true)"
    )
    likelihood_suffix_grad: bool | None = option(
        None, "ste: gradient of the policy's likelihood through later tokens (true)"
    )
    optimize_positions: str | None = option(
        None, "ste: whose logits are optimised at a scanned position: all from there on, or the first alone (all)"
    )
    confidence: float | None = option(
        None, "sequential: skip positions where the policy's top token exceeds it (0.97)"
    )
    min_gradient_norm: float | None = option(
        None, "sequential: skip positions where the loss's gradient by the logits has a smaller norm; 0 = none (0)"
    )
    resample_temperature: float | None = option(None, "sequential: temperature of the resampled token (0.5)")
    resample_top_p: float | None = option(None, "sequential: nucleus of the resampled token; 1 = all (1)")

    def __post_init__(self) -> None:
        self._check_choice("solver", SOLVERS)
        self._check_choice("proposals", PROPOSALS)
        self._check_choice("acceptance", ACCEPTANCES)
        self._apply_defaults(_STE_DEFAULTS, self.solver == "ste", "solver ste")
        self._apply_defaults(_MIRROR_DEFAULTS, self.solver == "mirror", "solver mirror")
        self._apply_defaults(_SEQUENTIAL_DEFAULTS, self.proposals == "sequential", "sequential proposals")
        self._apply_defaults(_METROPOLIS_DEFAULTS, self.acceptance == "metropolis", "acceptance metropolis")
        self._set_beta_or_target_kl()
        for name in ("max_rounds", "max_rollouts", "max_flops", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative")
        for name in ("num_starts", "num_chains", "proposals_per_round", "top_k_candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.num_chains > self.num_starts:
            raise ValueError(
                f"chains must be at most starts: {self.num_starts} first responses cannot start {self.num_chains}"
            )
        if 0 < self.max_rollouts < self.num_starts:
            raise ValueError(
                f"rollouts {self.max_rollouts} are fewer than the first responses, starts {self.num_starts}"
            )
        if not 0 <= self.candidate_min_p < 1:
            raise ValueError(f"candidate_min_p must be in [0, 1), not {self.candidate_min_p}")
        if self.proposals == "sequential" and self.proposals_per_round != 1:
            raise ValueError("sequential proposals regenerate one branch at a time: branches must be 1")
        if (
            not (self.max_rounds or self.max_rollouts or self.max_flops or self.patience)
            and self.proposals == "global"
        ):
            raise ValueError("the search would never end: set rounds, rollouts, flops or patience")
        self.get_sampling()
        if self.gradient_at is not None:
            self.get_gradient_point()
        if self.solver == "ste":
            self._check_choice("optimize_positions", OPTIMIZE_POSITIONS)
            self.get_ste_config()
        if self.proposals == "sequential":
            self.get_scan_config()
        if self.acceptance == "metropolis":
            self._check_metropolis()
        elif self.parallel_tempering != 1:
            raise ValueError("tempering belongs to acceptance metropolis")

    def _set_beta_or_target_kl(self) -> None:
        """β or a KL budget: mirror with global branches takes a budget by default, all others β."""
        budgeted = self.solver == "mirror" and self.proposals == "global" and self.acceptance == "greedy"
        if self.target_kl is not None:
            if not budgeted:
                raise ValueError("kl belongs to solver mirror, global proposals and acceptance greedy: give beta")
            if self.beta is not None:
                raise ValueError("beta and kl both set the size of the step: give one of them")
            if not 0 < self.target_kl < math.inf:
                raise ValueError(f"kl must be a positive number, not {self.target_kl}")
        elif self.beta is None and budgeted:
            self.target_kl = DEFAULT_TARGET_KL
        elif self.beta is None:
            self.beta = 1.0
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a positive number, not {self.beta}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step must be a positive number, not {self.step_size}")

    def _check_metropolis(self) -> None:
        """What an exact chain excludes: choosing among branches or ends by what they turned out to be."""
        if self.proposals_per_round != 1:
            raise ValueError("metropolis decides on one branch at a time: branches must be 1 (use starts and chains)")
        if self.temperature == 0:
            raise ValueError("metropolis needs a sampler that can draw any response: temperature must be above 0")
        if self.patience:
            raise ValueError("a metropolis chain that ends when nothing is accepted is no sample: patience must be 0")
        if self.min_gradient_norm:
            raise ValueError("gradient_norm chooses positions by the later tokens, which metropolis cannot undo")
        if self.max_flops or (self.max_rollouts and self.proposals == "sequential"):
            raise ValueError("a metropolis chain that ends by what its states cost is no sample: limit it by rounds")
        if self.proposals == "sequential" and not self.max_rounds:
            raise ValueError("a sequential metropolis chain may propose nothing for ever: set rounds, its sweeps")
        assert self.independence_prob is not None
        if not 0 <= self.independence_prob <= 1:
            raise ValueError(f"redraw must be in [0, 1], not {self.independence_prob}")
        if not 1 <= self.parallel_tempering < math.inf:
            raise ValueError(f"tempering must be a number of at least 1, not {self.parallel_tempering}")
        if self.parallel_tempering > 1 and (
            self.num_chains < 2 or self.solver == "ste" or self.proposals == "sequential"
        ):
            raise ValueError("tempering needs two chains or more, solver mirror or none, and global proposals")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SearchConfig:
        """A named setting with overrides.

        Raises:
            ValueError: unknown preset or option.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        known = {option.name for option in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}: choose from {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **overrides})

    def with_no_gradient(self) -> SearchConfig:
        """The same loop without the gradient."""
        unset: dict[str, Any] = dict.fromkeys([*_STE_DEFAULTS, *_MIRROR_DEFAULTS, "target_kl"])
        return replace(self, solver="none", **unset)

    def with_shuffled_gradient(self) -> SearchConfig:
        """The same loop with the rows of the gradient shuffled over the positions.

        Raises:
            ValueError: another solver than mirror.
        """
        return replace(self, shuffle_gradient=True)

    @property
    def method(self) -> str:
        return "control" if self.solver == "none" else "shuffled" if self.shuffle_gradient else "nabla"

    @property
    def reward_weight(self) -> float:
        """λ = 1/β; 1 where a KL budget sets it for each response apart."""
        return 1.0 if self.beta is None else 1.0 / self.beta

    def compute_chain_betas(self) -> list[float | None]:
        """β of each chain."""
        if self.beta is None:
            return [None] * self.num_chains
        return [self.beta * self.parallel_tempering**index for index in range(self.num_chains)]

    def get_sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.max_new_tokens)

    def with_default_gradient_at(self, gradient_at: str) -> SearchConfig:
        """This configuration, with a reward's own point where solver mirror is left to it."""
        return replace(self, gradient_at=gradient_at) if self.solver == "mirror" and self.gradient_at is None else self

    def get_gradient_point(self) -> GradientPoint:
        """Which gradient mirror follows; ste takes the hard tokens'.

        Raises:
            RuntimeError: it is the reward's own, which is not known here (`at`).
        """
        if self.solver == "mirror" and self.gradient_at is None:
            raise RuntimeError("the configuration was not told the reward's own point")
        return (
            HARD_GRADIENT_POINT
            if self.gradient_at is None
            else GradientPoint.parse(self.gradient_at, self.candidate_min_p)
        )

    def get_ste_config(self) -> SteConfig:
        names = ("steps", "learning_rate", "final_learning_rate", "tau")
        return SteConfig(**{name: getattr(self, f"ste_{name}") for name in names})

    def get_scan_config(self) -> ScanConfig:
        return ScanConfig(**{name: getattr(self, name) for name in _SEQUENTIAL_DEFAULTS})

    @property
    def restarts_enabled(self) -> bool:
        """A budget is spent on fresh starts where the chains leave some of it. A sample of π* is not chosen so."""
        return self.restarts and self.acceptance == "greedy" and bool(self.max_flops or self.max_rollouts)

    def compute_hash(self) -> str:
        """Identifies everything that can change a trace; the batch size cannot."""
        values = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def _apply_defaults(self, defaults: dict[str, Any], applies: bool, requirement: str) -> None:
        """Fill in the defaults of options that apply; refuse those that do not."""
        for name, default in defaults.items():
            if applies and getattr(self, name) is None:
                setattr(self, name, default)
            elif not applies and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} belongs to {requirement}; this configuration has solver {self.solver}, {self.proposals} "
                    f"proposals, acceptance {self.acceptance}"
                )
