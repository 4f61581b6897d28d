"""How the searches over steps are set: beam search, diverse verifier tree search, tree of thoughts, RAP.

Depends on nothing heavy, so that `--help` needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from nabla_trl.gradient.step_ends import BLANK_LINE, parse_delimiter
from nabla_trl.utils.fields import option


@dataclass(frozen=True)
class StepSearchConfig:
    """What beam_search, dvts, tot and rap share. How tokens are drawn is the search's (`config.ReasonerConfig`).

    Raises:
        ValueError: a value out of range, or a delimiter that cannot be read.
    """

    step_delimiter: str | None = option(
        None,
        r"searches over steps: what ends a step (escapes \n, \t, \\, \xHH); empty = what ends those of a process "
        "reward, else a blank line",
    )
    max_step_tokens: int = option(256, "searches over steps: longest step, in tokens")
    steps_per_prefix: int = option(
        4,
        "searches over steps: beam_search, dvts: one beam in so many is kept; tot, rap: steps drawn from each prefix",
    )
    exploration: float = option(1.0, "rap: weight of UCT's bonus for what was seldom visited")

    def __post_init__(self) -> None:
        if self.step_delimiter is not None:
            parse_delimiter(self.step_delimiter)
        if self.max_step_tokens < 1 or self.steps_per_prefix < 1:
            raise ValueError("max_step_tokens and steps_per_prefix must be at least 1")
        if not 0 <= self.exploration < math.inf:
            raise ValueError(f"exploration must be a number of at least 0, not {self.exploration}")

    def resolve_delimiter(self, reward_delimiter: str) -> str:
        """What ends a step, where the reward's steps end with `own` (empty: it has none)."""
        return (
            parse_delimiter(self.step_delimiter) if self.step_delimiter is not None else reward_delimiter or BLANK_LINE
        )

    def get_settings(self, reward_delimiter: str) -> dict[str, str]:
        """All that can change a trace, for `claim_settings`."""
        return {name: str(value) for name, value in asdict(self).items()} | {
            "step_delimiter": self.resolve_delimiter(reward_delimiter)
        }
