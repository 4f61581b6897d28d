"""The configuration of a search: one dataclass, filled from keywords, a YAML file or the command line.

Nothing here needs torch, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nabla_trl.models.options import HARD_GRADIENT_POINT, GradientPoint, Sampling
from nabla_trl.search.options import (
    DEFAULT_TARGET_KL,
    Acceptance,
    GlobalProposals,
    GreedyAcceptance,
    MetropolisAcceptance,
    MirrorSolver,
    NoGradient,
    Proposals,
    RewardSelection,
    Selection,
    SequentialProposals,
    Solver,
    SteSolver,
    VoteSelection,
    WeightedVoteSelection,
)
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import (
    OptionGroup,
    coerce_fields,
    get_option_groups,
    merge_options,
    name_unknown_options,
    option,
)
from nabla_trl.utils.identity import hash_json

DEFAULT_BETA = 1.0  # where no KL target sets the steps
DEFAULT_PATIENCE = 4  # of searches that share a budget: rounds without an accepted proposal, before a new chain begins
# Of β and 1/β: rewards that are multiplied by more are no numbers in float32 before long.
MAX_REWARD_WEIGHT = 1e6
MAX_SHARED_FLOPS = 1e30  # the sum over all problems of a budget is a finite number

# The paper's settings (arXiv 2603.04948): one response is scanned from left to right, with eight rollouts at most. The
# logits of the scanned position and of all later ones are optimized. In a comparison at equal FLOPs (paper@…) the
# search restarts until the budget is spent.
_PAPER_SOLVER: dict[str, Any] = {
    "name": "ste",
    "steps": 20,
    "learning_rate": 0.01,
    "final_learning_rate": 0.001,
    "tau": 1.0,
    "likelihood_token_grad": True,
    "likelihood_suffix_grad": True,
    "optimize_positions": "all",
}
_PAPER_PROPOSALS: dict[str, Any] = {"name": "sequential", "confidence": 0.97, "resample_temperature": 0.5}
_PAPER_OPTIONS: dict[str, Any] = {
    "solver": _PAPER_SOLVER,
    "proposals": _PAPER_PROPOSALS,
    "beta": 1.0,
    "max_rollouts": 8,
    "restarts": False,
    "max_rounds": 0,
    "temperature": 0.7,
    "candidate_min_p": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _PAPER_OPTIONS,
    # The released code (github.com/VITA-Group/Nabla-Reasoner), where it differs from the paper. The log-likelihood has
    # a weight of 1e-3 (λ = 1000 at its scripts' reward coefficient of 1). Only the scanned position's logits are
    # optimized, at the most likely token of every later position. The learning rate is clipped, the end of a turn is
    # read twice, and it samples with top-p. Where the candidates are the whole vocabulary, the logits are those of a
    # literal reference (tests/search/test_released.py). Not taken over: that the current response is scored with its
    # prompt twice and the proposal with none, bfloat16, and the choice of positions by the norm of ∂L/∂Y over the
    # vocabulary.
    "released": {
        **_PAPER_OPTIONS,
        "solver": {
            **_PAPER_SOLVER,
            "optimize_positions": "first",
            "hard_tokens": "argmax",
            "schedule": "clipped_cosine",
            "repeat_turn_end": True,
        },
        "proposals": {**_PAPER_PROPOSALS, "resample_top_p": 0.95},
        "beta": 0.001,
        "temperature": 0.6,
        "top_p": 0.95,
    },
    # QAlign (Faria et al., arXiv 2504.03790): a Metropolis chain on π·exp(r/β) that cuts the response at a uniform
    # position, and a vote over its states. Other than there, the token at the cut always changes, and one step in ten
    # proposes a whole new response.
    "qalign": {
        "solver": {"name": "none", "cut": "uniform"},
        "acceptance": "metropolis",
        "select": "vote",
        "beta": 1.0,
        "candidate_min_p": 0.0,
    },
    # Samples of π·exp(r), meant for rewards power:ALPHA, with locally balanced proposals (Zanella 2020).
    "power": {
        "solver": {"name": "mirror", "gradient_at": "direct", "step_size": 0.5},
        "acceptance": {"name": "metropolis", "independence_prob": 0.0},
        "beta": 1.0,
        "candidate_min_p": 0.0,
    },
}


@name_unknown_options
@dataclass
class SearchConfig:
    """Search: how a response is refined.

    Each of `solver`, `proposals`, `acceptance` and `select` takes an instance (`SteSolver(steps=3)`), a name ("ste")
    or a mapping ({"name": "ste", "steps": 3}), and holds the instance.

    Raises:
        ValueError: a value out of range, an unknown option, or options that do not go together.
    """

    solver: OptionGroup[Solver] = OptionGroup(
        MirrorSolver, SteSolver, NoGradient, help_text="How new tokens are chosen."
    )
    proposals: OptionGroup[Proposals] = OptionGroup(
        GlobalProposals, SequentialProposals, help_text="Where to change the response."
    )
    acceptance: OptionGroup[Acceptance] = OptionGroup(
        GreedyAcceptance,
        MetropolisAcceptance,
        help_text="When to keep a proposal. Use metropolis for samples of the optimum.",
    )
    select: OptionGroup[Selection] = OptionGroup(
        RewardSelection,
        VoteSelection,
        WeightedVoteSelection,
        help_text="Which of the scored responses is returned. Use weighted_vote where the reward makes mistakes, "
        "because a long search finds them.",
    )
    beta: float | None = option(
        None,
        "KL coefficient β. The reward counts 1/β times relative to log π. Lower it to follow the reward more closely. "
        "Cannot be combined with --solver.target_kl (default: set by --solver.target_kl, and 1 where that does not "
        "apply).",
        common=True,
    )
    num_starts: int = option(
        1,
        "Number of first responses drawn per problem. With a FLOPs budget, as many are drawn as the budget allows. "
        "Increase it if the search gets stuck in bad first responses.",
        common=True,
    )
    num_chains: int = option(
        1,
        "Number of first responses that are refined in parallel, those with the highest reward. At most --num_starts.",
    )
    max_rounds: int = option(
        16,
        "Maximum number of proposal rounds in each chain. For sequential Metropolis, the number of sweeps. Increase "
        "it for better answers at a higher cost. 0 sets no limit.",
        common=True,
    )
    max_rollouts: int = option(
        0, "Maximum number of responses drawn per problem, including the first ones. 0 sets no limit."
    )
    max_flops: float = option(
        0.0,
        "FLOPs budget per problem. No round starts that is expected to exceed it. Set it to compare methods at equal "
        "cost. 0 sets no limit.",
        common=True,
    )
    restarts: bool = option(
        True,
        "Start again from a new response if all chains end before the budget of FLOPs or rollouts is used. Disable it "
        "to refine one response only.",
    )
    patience: int = option(
        0, "Stop after this many rounds without an accepted proposal. Set it to save compute. 0 never stops early."
    )
    top_k_candidates: int = option(
        16, "Tokens of the policy considered at each position. Increase it if good tokens are missing.", common=True
    )
    candidate_min_p: float = option(
        0.02,
        "Drop candidates whose probability is below this fraction of the most likely token's. 0 keeps all candidates, "
        "and then a search may find unlikely text that misleads a reward.",
    )
    soft_target_top_k: int = option(
        0,
        "Tokens of the refined distribution that a trace records at each position, for training by soft-targets. "
        "Needs solver mirror. 16 is enough for most models. 0 records none.",
    )
    temperature: float = option(
        1.0, "Sampling temperature of responses and suffixes. 0 is greedy decoding.", common=True
    )
    top_k: int = option(0, "Sample from the k most likely tokens. 0 uses all tokens.")
    top_p: float = option(
        1.0, "Nucleus sampling: sample from the smallest set of tokens with this total probability. 1 uses all tokens."
    )
    min_p: float = option(
        0.0, "Do not sample tokens whose probability is below this fraction of the most likely token's. 0 disables it."
    )
    max_new_tokens: int = option(
        512, "Maximum length of a response in tokens. Increase it if responses are cut off.", common=True
    )
    batch_size: int = option(
        64,
        "Problems refined together. Best-of-N and similar methods draw 4 times as many responses together. Lower it "
        "if memory runs out.",
        common=True,
    )

    def __post_init__(self) -> None:
        groups = get_option_groups(type(self))
        values = {name: value for name, value in vars(self).items() if name not in groups}
        vars(self).update(coerce_fields(values, [type(self)], source="SearchConfig"))
        checks = Checks()
        for name in ("max_rounds", "max_rollouts", "max_flops", "patience", "soft_target_top_k"):
            checks.require(getattr(self, name) >= 0, f"{name} must not be negative")
        checks.require_minimum(self, 1, "num_starts", "num_chains", "top_k_candidates", "batch_size")
        checks.require(
            self.num_chains <= self.num_starts,
            f"num_chains must be at most num_starts: {self.num_starts} first responses cannot start "
            f"{self.num_chains} chains",
        )
        checks.require(
            not 0 < self.max_rollouts < self.num_starts,
            f"max_rollouts {self.max_rollouts} is less than the number of first responses, num_starts "
            f"{self.num_starts}",
        )
        checks.require(0 <= self.candidate_min_p < 1, f"candidate_min_p must be in [0, 1), not {self.candidate_min_p}")
        sequential = isinstance(self.proposals, SequentialProposals)
        checks.require(
            bool(self.max_rounds or self.max_rollouts or self.max_flops or self.patience or sequential),
            "the search would never end: set max_rounds, max_rollouts, max_flops or patience",
        )
        checks.require(
            not self.soft_target_top_k or isinstance(self.solver, MirrorSolver),
            f"soft_target_top_k needs solver mirror, since solver {self.solver.name} refines no distribution",
        )
        checks.call(self.get_sampling)  # refuses invalid sampling options
        checks.call(self._set_beta_or_target_kl)
        checks.require(
            not self.proposals.min_gradient_norm or isinstance(self.solver, SteSolver),
            "min_gradient_norm needs solver ste, because no other solver computes that gradient",
        )
        if isinstance(self.solver, SteSolver) and self.solver.hard_tokens == "argmax":
            checks.require(
                sequential, "hard_tokens argmax needs proposals sequential: it depends on the scanned position"
            )
            checks.require(
                not self.proposals.min_gradient_norm,
                "min_gradient_norm needs hard_tokens response, at which its gradient is taken",
            )
        if isinstance(self.acceptance, MetropolisAcceptance):
            self._check_metropolis(checks)
        else:
            checks.require(
                not (isinstance(self.select, VoteSelection) and self.select.burn_in),
                "burn_in needs metropolis acceptance: other searches have no states that forget the start",
            )
        checks.raise_faults()

    def _set_beta_or_target_kl(self) -> None:
        """Set the default of β or of the KL target, and refuse both."""
        solver = self.solver
        takes_target = isinstance(self.proposals, GlobalProposals) and isinstance(self.acceptance, GreedyAcceptance)
        if isinstance(solver, MirrorSolver) and solver.target_kl is not None:
            if not takes_target:
                raise ValueError("target_kl needs global proposals and greedy acceptance: set beta instead")
            if self.beta is not None:
                raise ValueError("beta and target_kl both set the size of the step: set one of them")
        elif self.beta is None and isinstance(solver, MirrorSolver) and takes_target:
            self.solver = replace(solver, target_kl=DEFAULT_TARGET_KL)
            vars(self)["_default_name"] = "target_kl"  # for `with_options`
        elif self.beta is None:
            self.beta = DEFAULT_BETA
            vars(self)["_default_name"] = "beta"
        if self.beta is not None and not 1 / MAX_REWARD_WEIGHT <= self.beta <= MAX_REWARD_WEIGHT:
            bounds = f"{1 / MAX_REWARD_WEIGHT:g} to {MAX_REWARD_WEIGHT:g}"
            raise ValueError(f"beta must be from {bounds}, not {self.beta}")

    def _check_metropolis(self, checks: Checks) -> None:
        """Refuse options with which the last response of a chain is no sample of π*."""
        sequential = isinstance(self.proposals, SequentialProposals)
        checks.require(
            self.proposals.proposals_per_round == 1,
            "metropolis decides on one proposal at a time: proposals_per_round must be 1 (use num_starts and "
            "num_chains)",
        )
        checks.require(
            self.temperature != 0, "metropolis needs a sampler that can draw any response: temperature must be above 0"
        )
        checks.require(
            not isinstance(self.select, WeightedVoteSelection),
            "the states of a metropolis chain are samples of π*, weighted already: use select vote",
        )
        checks.require(
            not self.patience, "metropolis samples are biased if a chain ends after rejections: patience must be 0"
        )
        checks.require(
            not self.proposals.min_gradient_norm,
            "metropolis cannot reverse a choice of positions by later tokens: remove min_gradient_norm",
        )
        # A vote weighs all states, so what the end of the chain depends on matters less the longer the chain is.
        by_vote = isinstance(self.select, VoteSelection)
        checks.require(
            by_vote or not (self.max_flops or (self.max_rollouts and sequential)),
            "metropolis samples are biased if a chain ends by its cost: limit it by max_rounds, or use select vote",
        )
        checks.require(
            not sequential or bool(self.max_rounds),
            "a sequential metropolis chain may never propose anything: set max_rounds, its sweeps",
        )
        can_temper = self.num_chains >= 2 and not isinstance(self.solver, SteSolver) and not sequential
        checks.require(
            self.acceptance.parallel_tempering <= 1 or can_temper,
            "parallel_tempering needs at least two chains, solver mirror or none, and global proposals",
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SearchConfig:
        """Return a named setting with overrides. An override of a group without a name changes the preset's member.

        Args:
            overrides: options by name. One of a group may be written as **{"solver.step_size": 0.5}.

        Raises:
            ValueError: unknown preset or option.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**merge_options(PRESETS[name], overrides, cls))

    def with_options(self, **overrides: Any) -> SearchConfig:
        """Return the same search with other values of some options.

        Defaults that depend on other options are chosen anew. β replaces a KL target, and a KL target replaces β.

        Args:
            overrides: as for `from_preset`.

        Raises:
            ValueError: unknown option, or options that do not go together.
        """
        options = self.to_dict()
        default_name = vars(self).get("_default_name")
        if default_name == "beta":
            options["beta"] = None
        elif default_name == "target_kl":
            options["solver"] = {**options["solver"], "target_kl": None}
        merged = merge_options(options, overrides, type(self))
        solver = merged["solver"]
        sets_target = options["solver"].get("target_kl") != solver.get("target_kl")
        if overrides.get("beta") is not None and not sets_target:
            merged["solver"] = {name: value for name, value in solver.items() if name != "target_kl"}
        elif sets_target and solver.get("target_kl") is not None and "beta" not in overrides:
            merged["beta"] = None
        return type(self)(**merged)

    def with_beta(self, beta: float) -> SearchConfig:
        """Return the same search at this β, without a KL target."""
        solver = replace(self.solver, target_kl=None) if isinstance(self.solver, MirrorSolver) else self.solver
        return replace(self, beta=beta, solver=solver)

    def with_no_gradient(self) -> SearchConfig:
        """Return the same search without the gradient."""
        return replace(self, solver=NoGradient(), soft_target_top_k=0)

    def with_shared_budget(self, max_flops: float) -> SearchConfig:
        """Return the configuration of searches that share a budget, which alone ends them.

        A chain ends after `patience` rounds without an accepted proposal, or `DEFAULT_PATIENCE` of them, and another
        one begins. With Metropolis acceptance it goes on instead.

        Args:
            max_flops: total FLOPs of all problems.

        Raises:
            ValueError: a configuration that cannot have a budget of FLOPs.
        """
        is_greedy = isinstance(self.acceptance, GreedyAcceptance)
        patience = self.patience or (DEFAULT_PATIENCE if is_greedy else 0)
        return replace(self, max_flops=max_flops, max_rounds=0, max_rollouts=0, patience=patience, restarts=True)

    def with_shuffled_gradient(self) -> SearchConfig:
        """Return the same search with the rows of the gradient shuffled over the positions.

        Raises:
            ValueError: another solver than mirror.
        """
        if not isinstance(self.solver, MirrorSolver):
            raise ValueError(f"only solver mirror can shuffle its gradient, not solver {self.solver.name}")
        return replace(self, solver=replace(self.solver, shuffle_gradient=True))

    def with_default_gradient_at(self, gradient_at: str) -> SearchConfig:
        """Return this configuration, with a reward's own `gradient_at` if solver mirror has none."""
        if not isinstance(self.solver, MirrorSolver) or self.solver.gradient_at is not None:
            return self
        return replace(self, solver=replace(self.solver, gradient_at=gradient_at))

    @property
    def method(self) -> str:
        """The name of this search in reports."""
        if isinstance(self.solver, NoGradient):
            return "control"
        return "shuffled" if isinstance(self.solver, MirrorSolver) and self.solver.shuffle_gradient else "nabla"

    @property
    def reward_weight(self) -> float:
        """λ = 1/β, or 1 if a KL target sets λ for each response."""
        return 1.0 if self.beta is None else 1.0 / self.beta

    @property
    def restarts_enabled(self) -> bool:
        """If the rest of a budget is spent on new chains. Metropolis samples would be biased by it."""
        greedy = isinstance(self.acceptance, GreedyAcceptance)
        return self.restarts and greedy and bool(self.max_flops or self.max_rollouts)

    @property
    def vote_beta(self) -> float:
        """β of weighted votes."""
        own_beta = self.select.vote_beta if isinstance(self.select, WeightedVoteSelection) else None
        return 1.0 / self.reward_weight if own_beta is None else own_beta

    def compute_chain_betas(self) -> list[float | None]:
        """Return the β of each chain: β·c^i for chain i and c = parallel_tempering. None: the KL target decides."""
        if self.beta is None:
            return [None] * self.num_chains
        return [self.beta * self.acceptance.parallel_tempering**index for index in range(self.num_chains)]

    def get_sampling(self) -> Sampling:
        """Return how tokens are sampled."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.max_new_tokens)

    def get_gradient_point(self) -> GradientPoint:
        """Return where the gradient is taken. For solver ste these are the hard tokens.

        Raises:
            RuntimeError: solver mirror leaves it to the reward (see `with_default_gradient_at`).
        """
        if not isinstance(self.solver, MirrorSolver):
            return HARD_GRADIENT_POINT
        if self.solver.gradient_at is None:
            raise RuntimeError("the configuration has no gradient_at: call with_default_gradient_at first")
        return GradientPoint.parse(self.solver.gradient_at, self.candidate_min_p)

    def to_dict(self) -> dict[str, Any]:
        """Return all options, those of a group as a mapping with its name. `SearchConfig(**options)` takes them."""
        names = {name: {"name": getattr(self, name).name} for name in get_option_groups(type(self))}
        return {name: {**names[name], **value} if name in names else value for name, value in asdict(self).items()}

    def get_settings(self) -> dict[str, str]:
        """Return every option that can change a trace, by flag name. The batch size cannot."""
        settings = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                settings[name] = value.pop("name")
                settings |= {f"{name}.{key}": str(option_value) for key, option_value in value.items()}
            elif name != "batch_size" and (name != "soft_target_top_k" or value):  # earlier traces do not know it
                settings[name] = str(value)
        return settings

    def compute_hash(self) -> str:
        """Return a hash of everything that can change a trace."""
        return hash_json(self.get_settings(), length=16)


@dataclass(frozen=True)
class SharedBudget:
    """Budget of traces: searches of many problems may share their FLOPs.

    Raises:
        ValueError: a value of another type or out of range.
    """

    shared_flops: float = option(
        0.0,
        "FLOPs per problem of a budget that many problems share. Their searches end by it alone, not by --max_rounds, "
        "--max_rollouts or --max_flops. Rounds go to problems whose reward may still rise. Set it for traces at a "
        "lower cost. 0 lets each search end by its own limits.",
        common=True,
    )
    problems_per_budget: int = option(
        256,
        "Problems that share one budget of --shared_flops. Their traces are stored at its end, and until then all of "
        "them take memory. Lower it if memory runs out, or if there are fewer budgets than processes.",
    )

    def __post_init__(self) -> None:
        vars(self).update(coerce_fields(vars(self), [type(self)], source="budget"))
        checks = Checks()
        checks.require(
            0 <= self.shared_flops <= MAX_SHARED_FLOPS,
            f"shared_flops must be from 0 to {MAX_SHARED_FLOPS:g}, not {self.shared_flops:g}",
        )
        checks.require_minimum(self, 2, "problems_per_budget")
        checks.raise_faults()

    @property
    def block_size(self) -> int:
        """Problems that stay together where problems are shared out. 1: each search is on its own."""
        return self.problems_per_budget if self.shared_flops else 1

    def check(self, config: SearchConfig) -> None:
        """Refuse searches that no budget may end.

        Raises:
            ValueError: a configuration that cannot have a budget of FLOPs.
        """
        if self.shared_flops:
            try:
                config.with_shared_budget(max_flops=1.0)
            except ValueError as error:
                raise ValueError(f"these searches cannot share a budget, so set shared_flops 0: {error}") from error

    def get_settings(self) -> dict[str, str]:
        """Return every option that can change a trace. Without a shared budget there is none, as in earlier traces."""
        return {name: str(value) for name, value in vars(self).items()} if self.shared_flops else {}


NO_BUDGET = SharedBudget()  # every search ends by its own limits


def make_search_config(config: SearchConfig | Mapping[str, Any] | str | None) -> SearchConfig:
    """Return a configuration of the search from its options, the name of a preset, or None for the defaults.

    Raises:
        ValueError: an unknown preset or option, or another type.
    """
    if isinstance(config, SearchConfig):
        return config
    if isinstance(config, Mapping):
        options = dict(config)
        return SearchConfig.from_preset(str(options.pop("preset", "default")), **options)
    if config is None or isinstance(config, str):
        return SearchConfig.from_preset(config or "default")
    raise ValueError(f"config is a SearchConfig, a mapping of its options or a preset, not {type(config).__name__}")
