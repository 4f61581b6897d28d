"""How confident the policy was of a response, from statistics of the distributions that its tokens were drawn from.

DeepConf (Fu et al., arXiv 2508.15260, section 3) measures the confidence of a token by the k likeliest tokens, and
that of a response by groups of successive tokens. Self-certainty (Kang et al., arXiv 2502.18581) measures how far π
is from the uniform distribution, over the whole vocabulary.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nabla_trl.models.sampling import TokenStatistic

BOTTOM_SHARE = 0.1  # of the groups, those of the lowest confidence


def compute_token_confidence(statistics: Tensor) -> np.ndarray:
    """Return the confidence of each token [T], −mean log π of the k likeliest tokens, in nats.

    Args:
        statistics: [T, 3], as in `GenerationOutput.statistics`.
    """
    return -statistics[:, TokenStatistic.TOP_LOGP].double().numpy()


def compute_group_confidence(token_confidence: np.ndarray, window: int) -> np.ndarray:
    """Return the mean confidence of every group of `window` successive tokens, [T − window + 1].

    A response that is shorter than the window is one group.
    """
    window = min(window, len(token_confidence))
    sums = np.concatenate(([0.0], np.cumsum(token_confidence)))
    return (sums[window:] - sums[:-window]) / window


def compute_lowest_group_confidence(token_confidence: np.ndarray, window: int) -> float:
    """Return the confidence of the least confident group."""
    return float(compute_group_confidence(token_confidence, window).min())


def compute_bottom_group_confidence(token_confidence: np.ndarray, window: int) -> float:
    """Return the mean confidence of the 10% least confident groups, at least one of them."""
    groups = np.sort(compute_group_confidence(token_confidence, window))
    return float(groups[: max(1, int(BOTTOM_SHARE * len(groups)))].mean())


def compute_tail_confidence(token_confidence: np.ndarray, window: int) -> float:
    """Return the mean confidence of the last `window` tokens."""
    return float(token_confidence[-window:].mean())


def compute_self_certainty(statistics: Tensor) -> float:
    """Return the mean over the tokens of KL(uniform ‖ π) = −log V − mean log π over the vocabulary, in nats."""
    return float(statistics[:, TokenStatistic.SELF_CERTAINTY].double().mean())


def find_early_stop(token_confidence: np.ndarray, window: int, threshold: float) -> int | None:
    """Return after how many tokens a group falls below the threshold. None: no full group does."""
    if len(token_confidence) < window:
        return None
    below = compute_group_confidence(token_confidence, window) < threshold
    return int(below.argmax()) + window if below.any() else None
