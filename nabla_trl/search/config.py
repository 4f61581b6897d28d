"""The reasoner's configuration: one dataclass, read from keywords, YAML and the command line alike.

Depends on nothing, so that `--help` needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nabla_trl.models.options import HARD, Point, Sampling, ScanConfig, SteConfig

SOLVERS = ("mirror", "ste", "none")
PROPOSALS = ("global", "sequential")
ACCEPTANCES = ("greedy", "metropolis")
MOVING = ("all", "first")

# The paper's settings (arXiv 2603.04948): one response scanned left to right, eight rollouts at most; the logits of
# all positions from the scanned one on move. At a budget in a comparison (paper@…) it begins anew until that is spent.
_PAPER: dict[str, Any] = {
    "solver": "ste",
    "proposals": "sequential",
    "beta": 1.0,
    "rollouts": 8,
    "restart": False,
    "rounds": 0,
    "temperature": 0.7,
    "steps": 20,
    "lr": 0.01,
    "lr_end": 0.001,
    "tau": 1.0,
    "direct": True,
    "postfix": True,
    "moving": "all",
    "confidence": 0.97,
    "resample_temperature": 0.5,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    # What the released code does where it differs: the log-likelihood counts 1e-3 (λ = 1000 at its scripts' reward
    # coefficient of 1), only the scanned position's logits move, and it samples with top-p. Without its defects (both
    # responses are scored with the prompt once, float32) and its selector by the norm of ∂L/∂Y over the vocabulary.
    "released": {
        **_PAPER,
        "beta": 0.001,
        "moving": "first",
        "temperature": 0.6,
        "top_p": 0.95,
        "resample_top_p": 0.95,
    },
}

# Options that only one solver, one kind of proposal or one acceptance reads, with their defaults.
_STE = {"steps": 20, "lr": 0.01, "lr_end": 0.001, "tau": 1.0, "direct": True, "postfix": True, "moving": "all"}
_MIRROR = {"point": None, "step": 1.0, "shuffle": False}  # point: the reward's own
_SEQUENTIAL = {"confidence": 0.97, "gradient_norm": 0.0, "resample_temperature": 0.5, "resample_top_p": 1.0}
_METROPOLIS = {"redraw": 0.1}
# Without a β, branches are moved from the policy's by this much (EXPERIMENTS.md).
DEFAULT_KL = 2.0


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ReasonerConfig:
    """How a response is refined. Options of another solver, proposal or acceptance are refused, not ignored.

    Raises:
        ValueError: a value out of range, or an option that the chosen solver, proposal or acceptance does not read.
    """

    solver: str = _option("mirror", "mirror (closed form), ste (Adam on logits, the paper) or none (the control)")
    proposals: str = _option("global", "global (best branches over all positions) or sequential (scan left to right)")
    acceptance: str = _option(
        "greedy", "greedy (keep what scores strictly higher) or metropolis (sample π·exp(r/β): the last state counts)"
    )
    beta: float | None = _option(
        None,
        "KL coefficient β; the reward counts λ = 1/β times against log π; empty = set by kl, solvers ste, none: 1",
    )
    kl: float | None = _option(
        None, f"mirror, global: instead of β, how far branches may move from the policy's, in nats ({DEFAULT_KL:g})"
    )
    starts: int = _option(1, "first responses drawn per problem; within a budget of FLOPs, as many as fit")
    chains: int = _option(1, "how many of them are refined side by side: those of the highest reward")
    tempering: float = _option(1.0, "metropolis: β of each chain over that of the chain before it; states are swapped")
    redraw: float | None = _option(
        None,
        "metropolis: share of the rounds (of sequential ones: sweeps) that draw the whole response anew, so that no "
        "token is held for lack of a candidate; 0 = none (0.1)",
    )
    rounds: int = _option(
        16, "most rounds of proposals, in each chain; of sequential metropolis, sweeps; 0 = no limit"
    )
    rollouts: int = _option(0, "most responses drawn per problem, the first ones included; 0 = no limit")
    flops: float = _option(0.0, "FLOPs budget per problem; no round starts that is expected to end above it; 0 = none")
    restart: bool = _option(
        True,
        "within a budget of FLOPs or rollouts, begin anew from a fresh response when all chains have ended before it",
    )
    patience: int = _option(0, "stop after this many rounds without an acceptance; 0 = never")
    branches: int = _option(1, "branches regenerated per round (global proposals)")
    candidates: int = _option(16, "policy tokens considered per position")
    candidate_min_p: float = _option(0.0, "drop candidates below this fraction of the position's likeliest token")
    temperature: float = _option(1.0, "sampling temperature of responses and suffixes; 0 = greedy")
    top_k: int = _option(0, "sample from the k likeliest tokens; 0 = all")
    top_p: float = _option(1.0, "nucleus sampling mass; 1 = all")
    sample_min_p: float = _option(0.0, "min-p sampling threshold; 0 = off")
    max_new_tokens: int = _option(512, "longest response, in tokens")
    batch_size: int = _option(64, "problems refined together; best-of-N and its like draw 4 times as many responses")
    point: str | None = _option(
        None,
        "mirror: which gradient of the reward: direct (what scoring shows, no backward pass), hard (at the response's "
        "tokens), mixture:A[,A…] (at mixtures of them and the policy's candidates in shares 1−A and A), direct+hard, "
        "direct+mixture:A; empty = the reward's own: that of its audit, direct for a log-ratio, else mixture:0.5",
    )
    step: float | None = _option(
        None, "mirror: share of the full step; 0.5 is the locally balanced proposal of a Metropolis chain (1)"
    )
    shuffle: bool | None = _option(
        None, "mirror: give each position the gradient of another, a control for where it points (false)"
    )
    steps: int | None = _option(None, "ste: optimiser steps (20)")
    lr: float | None = _option(None, "ste: first learning rate (0.01)")
    lr_end: float | None = _option(None, "ste: last learning rate of the cosine (0.001)")
    tau: float | None = _option(None, "ste: softmax temperature of the backward (1)")
    direct: bool | None = _option(None, "ste: gradient of the policy's likelihood at the token itself (true)")
    postfix: bool | None = _option(None, "ste: gradient of the policy's likelihood through later tokens (true)")
    moving: str | None = _option(
        None, "ste: whose logits are optimised at a scanned position: all from there on, or the first alone (all)"
    )
    confidence: float | None = _option(
        None, "sequential: skip positions where the policy's top token exceeds it (0.97)"
    )
    gradient_norm: float | None = _option(
        None, "sequential: skip positions where the loss's gradient by the logits has a smaller norm; 0 = none (0)"
    )
    resample_temperature: float | None = _option(None, "sequential: temperature of the resampled token (0.5)")
    resample_top_p: float | None = _option(None, "sequential: nucleus of the resampled token; 1 = all (1)")

    def __post_init__(self) -> None:
        self._check_choice("solver", SOLVERS)
        self._check_choice("proposals", PROPOSALS)
        self._check_choice("acceptance", ACCEPTANCES)
        self._settle(_STE, self.solver == "ste", "solver ste")
        self._settle(_MIRROR, self.solver == "mirror", "solver mirror")
        self._settle(_SEQUENTIAL, self.proposals == "sequential", "sequential proposals")
        self._settle(_METROPOLIS, self.acceptance == "metropolis", "acceptance metropolis")
        self._settle_step()
        for name in ("rounds", "rollouts", "flops", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative")
        for name in ("starts", "chains", "branches", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.chains > self.starts:
            raise ValueError(
                f"chains must be at most starts: {self.starts} first responses cannot start {self.chains}"
            )
        if 0 < self.rollouts < self.starts:
            raise ValueError(f"rollouts {self.rollouts} are fewer than the first responses, starts {self.starts}")
        if not 0 <= self.candidate_min_p < 1:
            raise ValueError(f"candidate_min_p must be in [0, 1), not {self.candidate_min_p}")
        if self.proposals == "sequential" and self.branches != 1:
            raise ValueError("sequential proposals regenerate one branch at a time: branches must be 1")
        if not (self.rounds or self.rollouts or self.flops or self.patience) and self.proposals == "global":
            raise ValueError("the search would never end: set rounds, rollouts, flops or patience")
        self.sampling()
        if self.point is not None:
            self.gradient_point()
        if self.solver == "ste":
            self._check_choice("moving", MOVING)
            self.ste()
        if self.proposals == "sequential":
            self.scan()
        if self.acceptance == "metropolis":
            self._check_metropolis()
        elif self.tempering != 1:
            raise ValueError("tempering belongs to acceptance metropolis")

    def _settle_step(self) -> None:
        """β or a KL budget: mirror with global branches takes a budget by default, all others β."""
        budgeted = self.solver == "mirror" and self.proposals == "global" and self.acceptance == "greedy"
        if self.kl is not None:
            if not budgeted:
                raise ValueError("kl belongs to solver mirror, global proposals and acceptance greedy: give beta")
            if self.beta is not None:
                raise ValueError("beta and kl both set the size of the step: give one of them")
            if not 0 < self.kl < math.inf:
                raise ValueError(f"kl must be a positive number, not {self.kl}")
        elif self.beta is None and budgeted:
            self.kl = DEFAULT_KL
        elif self.beta is None:
            self.beta = 1.0
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a positive number, not {self.beta}")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step must be a positive number, not {self.step}")

    def _check_metropolis(self) -> None:
        """What an exact chain excludes: choosing among branches or ends by what they turned out to be."""
        if self.branches != 1:
            raise ValueError("metropolis decides on one branch at a time: branches must be 1 (use starts and chains)")
        if self.temperature == 0:
            raise ValueError("metropolis needs a sampler that can draw any response: temperature must be above 0")
        if self.patience:
            raise ValueError("a metropolis chain that ends when nothing is accepted is no sample: patience must be 0")
        if self.gradient_norm:
            raise ValueError("gradient_norm chooses positions by the later tokens, which metropolis cannot undo")
        if self.flops or (self.rollouts and self.proposals == "sequential"):
            raise ValueError("a metropolis chain that ends by what its states cost is no sample: limit it by rounds")
        if self.proposals == "sequential" and not self.rounds:
            raise ValueError("a sequential metropolis chain may propose nothing for ever: set rounds, its sweeps")
        assert self.redraw is not None
        if not 0 <= self.redraw <= 1:
            raise ValueError(f"redraw must be in [0, 1], not {self.redraw}")
        if not 1 <= self.tempering < math.inf:
            raise ValueError(f"tempering must be a number of at least 1, not {self.tempering}")
        if self.tempering > 1 and (self.chains < 2 or self.solver == "ste" or self.proposals == "sequential"):
            raise ValueError("tempering needs two chains or more, solver mirror or none, and global proposals")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ReasonerConfig:
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

    def control(self) -> ReasonerConfig:
        """The same loop without the gradient."""
        unset: dict[str, Any] = dict.fromkeys([*_STE, *_MIRROR, "kl"])
        return replace(self, solver="none", **unset)

    def shuffled(self) -> ReasonerConfig:
        """The same loop with the rows of the gradient shuffled over the positions.

        Raises:
            ValueError: another solver than mirror.
        """
        return replace(self, shuffle=True)

    @property
    def method(self) -> str:
        return "control" if self.solver == "none" else "shuffled" if self.shuffle else "nabla"

    @property
    def lam(self) -> float:
        """λ = 1/β; 1 where a KL budget sets it for each response apart."""
        return 1.0 if self.beta is None else 1.0 / self.beta

    def betas(self) -> list[float | None]:
        """β of each chain."""
        if self.beta is None:
            return [None] * self.chains
        return [self.beta * self.tempering**index for index in range(self.chains)]

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.sample_min_p, self.max_new_tokens)

    def at(self, point: str) -> ReasonerConfig:
        """This configuration, with a reward's own point where solver mirror is left to it."""
        return replace(self, point=point) if self.solver == "mirror" and self.point is None else self

    def gradient_point(self) -> Point:
        """Which gradient mirror follows; ste takes the hard tokens'.

        Raises:
            RuntimeError: it is the reward's own, which is not known here (`at`).
        """
        if self.solver == "mirror" and self.point is None:
            raise RuntimeError("the configuration was not told the reward's own point")
        return HARD if self.point is None else Point.parse(self.point, self.candidate_min_p)

    def ste(self) -> SteConfig:
        return SteConfig(**{name: getattr(self, name) for name in ("steps", "lr", "lr_end", "tau")})

    def scan(self) -> ScanConfig:
        return ScanConfig(**{name: getattr(self, name) for name in _SEQUENTIAL})

    @property
    def restarts(self) -> bool:
        """A budget is spent on fresh starts where the chains leave some of it. A sample of π* is not chosen so."""
        return self.restart and self.acceptance == "greedy" and bool(self.flops or self.rollouts)

    def hash(self) -> str:
        """Identifies everything that can change a trace; the batch size cannot."""
        values = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def _settle(self, defaults: dict[str, Any], applies: bool, owner: str) -> None:
        """Fill in the defaults of options that apply; refuse those that do not."""
        for name, default in defaults.items():
            if applies and getattr(self, name) is None:
                setattr(self, name, default)
            elif not applies and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} belongs to {owner}; this configuration has solver {self.solver}, {self.proposals} "
                    f"proposals, acceptance {self.acceptance}"
                )
