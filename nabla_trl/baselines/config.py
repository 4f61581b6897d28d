"""Options of the methods that the search is compared with.

Loads nothing heavy, so that `--help` needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nabla_trl.engine.allocation import PILOT_RESPONSES
from nabla_trl.gradient.step_ends import BLANK_LINE, parse_delimiter
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option

_STEP_OPTIONS = (
    *("step_delimiter", "max_step_tokens", "steps_per_prefix", "exploration"),
    *("particle_beta", "particle_potential", "entropy_threshold"),
)
_POWER_OPTIONS = ("power_alpha", "power_select", "smc_block_tokens", "smc_ess_threshold", "smc_ramp_tokens")
_VOTE_OPTIONS = (
    *("confidence_top_k", "confidence_window", "deepconf_keep", "deepconf_warmup"),
    *("borda_power", "confidence_temperature"),
)


@dataclass(frozen=True)
class BaselineConfig:
    """Options of the baselines. How tokens are sampled is set in `SearchConfig`.

    Raises:
        ValueError: a value out of range, or a delimiter that cannot be parsed.
    """

    step_delimiter: str | None = option(
        None,
        r"Step-level searches: text that ends a reasoning step (escapes \n, \t, \\, \xHH). Unset: the delimiter of a "
        "process reward, else a blank line.",
    )
    max_step_tokens: int = option(
        256, "Step-level searches: longest reasoning step, in tokens. Raise it where steps are cut off."
    )
    steps_per_prefix: int = option(
        4,
        "Step-level searches: beam_search and dvts keep one beam of so many. tot and rap draw so many steps from each "
        "prefix.",
    )
    exploration: float = option(
        1.0, "rap: weight of the bonus that UCT gives to rarely visited nodes. Raise it to search more widely."
    )
    particle_beta: float = option(
        1.0, "particle_filter: β of the target π·exp(r/β). Lower it to follow the reward more closely."
    )
    particle_potential: str = option(
        "difference",
        "particle_filter: what a resampling weighs by. difference is what the last step added to the reward, for "
        "samples of π·exp(r/β). score is the reward of the whole prefix at every step, as in the paper.",
    )
    power_alpha: float = option(
        4.0, "low_temperature and power methods: exponent α of π^α. They draw at temperature 1/α.", common=True
    )
    power_select: str = option(
        "vote",
        "power methods: what they return. vote is the most common answer of their samples. sample is a single sample, "
        "as published. Chains at a budget of FLOPs need vote, because a chain that ends by its cost is biased.",
    )
    smc_block_tokens: int = option(64, "power_smc: tokens between two checks whether to resample.")
    smc_ess_threshold: float = option(
        0.5, "power_smc: resample below this effective sample size, as a fraction of the particles."
    )
    smc_ramp_tokens: int = option(
        0,
        "power_smc: tokens over which the exponent rises from 1 to α. Set it where few particles survive the first "
        "blocks.",
    )
    entropy_threshold: float = option(
        1.5,
        "entropy_branching and ggro: entropy of the policy, in nats, from which on it counts as uncertain. Lower it "
        "where steps are hardly ever branched.",
    )
    wait_text: str = option(
        "Wait", "budget_forcing: text that is written in place of the end of a thought, so that the policy goes on."
    )
    max_thinking_tokens: int = option(
        0,
        "budget_forcing: longest thought, in tokens. The end of the thought is written there. 0 leaves a quarter of "
        "max_new_tokens for the answer.",
    )
    confidence_top_k: int = option(
        20, "deepconf: number of likeliest tokens whose mean log-probability is the confidence of a token."
    )
    confidence_window: int = option(
        2048,
        "deepconf: tokens of a group, whose mean confidence is compared. Lower it where responses are shorter, since "
        "a response shorter than the window is a single group.",
    )
    deepconf_keep: float = option(
        0.1, "deepconf: share of the most confident responses that vote. Raise it where few responses are drawn."
    )
    deepconf_warmup: int = option(
        16, "deepconf_online: responses drawn whole, from which the threshold for stopping others comes."
    )
    borda_power: float = option(
        0.5, "self_certainty: exponent p of the (N − r + 1)^p votes of the response of rank r. 0 gives equal votes."
    )
    confidence_temperature: float | None = option(
        None,
        "confidence_vote: temperature of a softmax over the confidences, whose values are the weights. Unset: the "
        "confidences are the weights.",
    )

    allocation_pilot: int = option(
        PILOT_RESPONSES,
        "allocated_ methods: responses to each problem before it is decided which problems get more. Fewer are drawn "
        "where they would cost more than half of the budget.",
    )

    def __post_init__(self) -> None:
        checks = Checks()
        if self.step_delimiter is not None:
            checks.call(parse_delimiter, self.step_delimiter)
        checks.require_minimum(self, 1, "max_step_tokens", "steps_per_prefix", "smc_block_tokens", "allocation_pilot")
        checks.require_minimum(self, 1, "confidence_top_k", "confidence_window", "deepconf_warmup")
        checks.require_choice(self, particle_potential=("difference", "score"), power_select=("vote", "sample"))
        alpha, threshold, ramp = self.power_alpha, self.smc_ess_threshold, self.smc_ramp_tokens
        checks.require(1 < alpha < math.inf, f"power_alpha must be a number above 1, not {alpha}")
        checks.require(0 <= threshold <= 1, f"smc_ess_threshold must be in [0, 1], not {threshold}")
        checks.require(
            self.entropy_threshold >= 0, f"entropy_threshold must not be negative: {self.entropy_threshold}"
        )
        checks.require(bool(self.wait_text.strip()), "wait_text must not be empty")
        checks.require(self.max_thinking_tokens >= 0, "max_thinking_tokens must not be negative")
        checks.require(ramp >= 0, f"smc_ramp_tokens must not be negative, not {ramp}")
        for name in ("particle_beta", "confidence_temperature"):
            value = getattr(self, name)
            checks.require(value is None or 0 < value < math.inf, f"{name} must be a positive number, not {value}")
        checks.require(0 < self.deepconf_keep <= 1, f"deepconf_keep must be in (0, 1], not {self.deepconf_keep}")
        for name in ("exploration", "borda_power"):
            value = getattr(self, name)
            checks.require(0 <= value < math.inf, f"{name} must be a number of at least 0, not {value}")
        checks.raise_faults()

    def resolve_delimiter(self, reward_delimiter: str) -> str:
        """Return the text that ends a step.

        Args:
            reward_delimiter: the text that ends the steps of the reward. Empty: the reward has no steps.
        """
        if self.step_delimiter is not None:
            return parse_delimiter(self.step_delimiter)
        return reward_delimiter or BLANK_LINE

    def get_settings(self, reward_delimiter: str) -> dict[str, str]:
        """Return all that can change the trace of a step-level search, for `claim_settings`."""
        return self.select_settings(_STEP_OPTIONS) | {"step_delimiter": self.resolve_delimiter(reward_delimiter)}

    def get_vote_settings(self) -> dict[str, str]:
        """Return all that can change the trace of a vote by confidence, for `claim_settings`."""
        return self.select_settings(_VOTE_OPTIONS)

    def get_power_settings(self) -> dict[str, str]:
        """Return all that can change the trace of a sampler of π^α, for `claim_settings`."""
        return self.select_settings(_POWER_OPTIONS)

    def get_thinking_settings(self) -> dict[str, str]:
        """Return all that can change the trace of budget forcing, for `claim_settings`."""
        return self.select_settings(("wait_text", "max_thinking_tokens"))

    def select_settings(self, names: Sequence[str]) -> dict[str, str]:
        """Return the values of options as text."""
        return {name: str(getattr(self, name)) for name in names}
