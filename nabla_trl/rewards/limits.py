"""How far a reward may be searched with: what an audit measured, and the warning for a search that goes beyond.

Imports nothing heavy, so that options can be checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ValidatedLimits:
    """The largest budgets up to which searching with a reward was measured to help, and not yet to harm.

    Attributes:
        samples: of best-of-N; 1 (a plain sample) where no N was measured to help.
        rounds: of the search; 0 (the first response) where no number of rounds was measured to help.

    Raises:
        ValueError: a number that is not whole, or negative.
    """

    max_samples: int
    max_rounds: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"trust: {name} must be a whole number of at least 0, not {value!r}")

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ValidatedLimits:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a number is missing or malformed.
        """
        missing = [name for name in ("samples", "rounds") if name not in data]
        if missing:
            raise ValueError(f"trust: {missing[0]} is missing")
        return cls(data["samples"], data["rounds"])


def past_sample_limit(limits: ValidatedLimits | None, num_samples: int) -> str | None:
    """The warning, in one line, for choosing among more samples than a reward is trusted for.

    Args:
        trust: as for `past_trust`.
        samples: the largest N of best-of-N or weighted best-of-N; 1 = nothing is chosen.
    """
    if limits is None or num_samples <= max(1, limits.max_samples):
        return None
    known = f"up to best of {limits.max_samples}" if limits.max_samples > 1 else "for no choice among samples"
    return (
        f"the audit trusts this reward {known}, and best of {num_samples} was asked for: answers may get worse with it"
    )


def past_limits(limits: ValidatedLimits | None, max_rounds: int) -> str | None:
    """The warning, in one line, for a search of more rounds than its reward is trusted for.

    Args:
        trust: what the reward's audit found; None = it was not audited, and nothing is said.
        rounds: the most rounds of the search; 0 = no limit, which is more than any trust.

    Returns:
        None where there is nothing to warn of.
    """
    if limits is None or 0 < max_rounds <= limits.max_rounds:
        return None
    known = f"up to {limits.max_rounds} rounds" if limits.max_rounds else "for no search at all"
    asked = f"a search of {max_rounds} rounds" if max_rounds else "one without a limit of rounds"
    return f"the audit trusts this reward {known}, and {asked} was asked for: answers may get worse on the way"
