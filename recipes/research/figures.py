"""Profiles, slopes and tables of the measurements of `bench.py`."""

from __future__ import annotations

import cProfile
import inspect
import pstats
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.decoding import SlotDecoder
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.loop import run_search

# The stages of a search. None of these functions calls another.
STAGE_FUNCTIONS: dict[str, Callable[..., object]] = {
    "decoding": SlotDecoder.step,
    "scoring": Reward.score,
    "gradients": compute_token_gradient,
}
NUM_LISTED_FUNCTIONS = 6  # functions that a profile names


def profile_stages(function: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of each stage of a search and those of the slowest functions, without their callees.

    The profiler slows Python down, so the seconds are larger than without it.
    """
    profile = cProfile.Profile()
    profile.runcall(function)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # key -> (…, own seconds, cumulative seconds, …)

    def get_cumulative_seconds(profiled: Callable[..., object]) -> float:
        code = inspect.unwrap(profiled).__code__
        return stats[code.co_filename, code.co_firstlineno, code.co_name][3]

    seconds = {stage: get_cumulative_seconds(profiled) for stage, profiled in STAGE_FUNCTIONS.items()}
    seconds["the rest of the search"] = get_cumulative_seconds(run_search) - sum(seconds.values())
    slowest = sorted(stats.items(), key=lambda item: -item[1][2])[:NUM_LISTED_FUNCTIONS]
    return seconds | {f"of it in {name} ({Path(file).name})": entry[2] for (file, _, name), entry in slowest}


def fit_power_law_exponent(rows: Sequence[dict[str, float]], x_key: str, y_key: str) -> float:
    """Return the exponent p of the power law y ∝ x^p that fits best."""
    return float(np.polyfit(np.log([row[x_key] for row in rows]), np.log([row[y_key] for row in rows]), 1)[0])


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with columns aligned to the right and numbers of four significant digits."""
    texts = [list(header), *([cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)), flush=True)
