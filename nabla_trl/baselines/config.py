"""Options of the methods that the search is compared with.

Loads nothing heavy, so that `--help` needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from nabla_trl.gradient.step_ends import BLANK_LINE, parse_delimiter
from nabla_trl.utils.fields import option


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

    def __post_init__(self) -> None:
        if self.step_delimiter is not None:
            parse_delimiter(self.step_delimiter)
        if self.max_step_tokens < 1 or self.steps_per_prefix < 1:
            raise ValueError("max_step_tokens and steps_per_prefix must be at least 1")
        if not 0 <= self.exploration < math.inf:
            raise ValueError(f"exploration must be a number of at least 0, not {self.exploration}")
        if not 0 < self.particle_beta < math.inf:
            raise ValueError(f"particle_beta must be a positive number, not {self.particle_beta}")

    def resolve_delimiter(self, reward_delimiter: str) -> str:
        """Return the text that ends a step.

        Args:
            reward_delimiter: the text that ends the steps of the reward. Empty: the reward has no steps.
        """
        if self.step_delimiter is not None:
            return parse_delimiter(self.step_delimiter)
        return reward_delimiter or BLANK_LINE

    def get_settings(self, reward_delimiter: str) -> dict[str, str]:
        """Return all that can change a trace, for `claim_settings`."""
        settings = {name: str(value) for name, value in asdict(self).items()}
        return settings | {"step_delimiter": self.resolve_delimiter(reward_delimiter)}
