"""How far a search may go with a reward: limits that an audit validated, and warnings beyond these limits.

Imports nothing heavy, so that options can be checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ValidatedLimits:
    """The largest search budgets at which an audit measured that a reward still helps.

    Attributes:
        max_samples: N of best-of-N. 1 (a plain sample) where no N was measured to help.
        max_rounds: rounds of the search. 0 (the first response) where no number of rounds was measured to help.

    Raises:
        ValueError: a number is negative or not whole.
    """

    max_samples: int
    max_rounds: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"validated_limits: {name} must be a whole number of at least 0, not {value!r}")

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ValidatedLimits:
        """Return the limits of an object in reward.json or in an audit file.

        Raises:
            ValueError: not an object, or a number is missing or malformed.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"validated_limits must be an object, not {data!r}")
        for name in ("max_samples", "max_rounds"):
            if name not in data:
                raise ValueError(f"validated_limits: {name} is missing")
        return cls(data["max_samples"], data["max_rounds"])


def past_sample_limit(limits: ValidatedLimits | None, num_samples: int) -> str | None:
    """Return a one-line warning if best-of-N uses more samples than the audit validated.

    Args:
        limits: None = the reward was not audited, so there is nothing to warn of.
        num_samples: the largest N of best-of-N or weighted best-of-N. 1 = nothing is chosen.
    """
    if limits is None or num_samples <= max(1, limits.max_samples):
        return None
    validated = f"up to best of {limits.max_samples}" if limits.max_samples > 1 else "for no choice among samples"
    return (
        f"the audit validated this reward {validated}, but best of {num_samples} is requested: answers may get worse"
    )


def past_limits(limits: ValidatedLimits | None, max_rounds: int, *, by_budget: bool = False) -> str | None:
    """Return a one-line warning if a search has more rounds than the audit validated.

    Args:
        limits: None = the reward was not audited, so there is nothing to warn of.
        max_rounds: the most rounds of the search. 0 = unlimited, which is more than any limit.
        by_budget: a budget that searches share has led to these rounds. Nobody asked for them.
    """
    if limits is None or 0 < max_rounds <= limits.max_rounds:
        return None
    validated = f"up to {limits.max_rounds} rounds" if limits.max_rounds else "for no search at all"
    requested = f"a search of {max_rounds} rounds" if max_rounds else "a search without a limit of rounds"
    reason = f"the shared budget led to {requested}" if by_budget else f"{requested} is requested"
    return f"the audit validated this reward {validated}, but {reason}: answers may get worse"
