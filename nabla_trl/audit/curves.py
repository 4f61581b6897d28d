"""Accuracy against a budget, and where it turns: one rule for best-of-N and for rounds of the search. Numpy only.

A budget is better or worse than another if the paired difference of the problems' scores has a 95% bootstrap
interval that lies above or below zero, and a sign-flip test agrees: on a handful of problems an interval alone is too
sure of itself. Small audits therefore see neither gains nor harm: trust has to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nabla_trl.utils.statistics import SIGNIFICANCE_LEVEL, Interval, mean_interval, sign_flip_p_value


@dataclass(frozen=True)
class OveroptimizationPoint:
    """How a curve goes.

    Attributes:
        peak: the budget of the highest score, the smallest among equals.
        fall: paired difference of the largest budget against the peak, at most 0.
        helps: some budget is better than the smallest.
        trusted: the largest budget up to which the curve has nowhere become worse than its peak; the smallest
            budget where none helps.
    """

    peak_budget: int
    drop_from_peak: Interval
    is_helpful: bool
    validated_budget: int

    @property
    def has_overoptimization(self) -> bool:
        """The largest budget is worse than the peak."""
        return self.drop_from_peak.high < 0


def find_overoptimization(curve: Mapping[int, np.ndarray]) -> OveroptimizationPoint:
    """Read a curve of budget → scores of the problems [P], in the same order for every budget.

    Raises:
        ValueError: no budgets.
    """
    if not curve:
        raise ValueError("a curve needs at least one budget")
    budgets = sorted(curve)
    peak = max(budgets, key=lambda budget: (curve[budget].mean(), -budget))
    helps = any(_compare_budgets(curve, budget, budgets[0]) > 0 for budget in budgets)
    later = [budget for budget in budgets if budget > peak]
    fallen = [budget for budget in later if _compare_budgets(curve, budget, peak) < 0]
    safe = [budget for budget in budgets if not fallen or budget < fallen[0]]
    return OveroptimizationPoint(
        peak, _estimate_difference(curve, budgets[-1], peak), helps, safe[-1] if helps else budgets[0]
    )


def _compare_budgets(curve: Mapping[int, np.ndarray], budget: int, other: int) -> int:
    """1 or −1 where a budget is better or worse than another beyond chance, else 0."""
    gap = _estimate_difference(curve, budget, other)
    if not (gap.low > 0 or gap.high < 0) or sign_flip_p_value(curve[budget] - curve[other]) >= SIGNIFICANCE_LEVEL:
        return 0
    return 1 if gap.low > 0 else -1


def _estimate_difference(curve: Mapping[int, np.ndarray], budget: int, other: int) -> Interval:
    return mean_interval((curve[budget] - curve[other])[:, None])
