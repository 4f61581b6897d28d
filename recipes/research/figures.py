"""What `bench.py` makes of its measurements: profiles, slopes and tables."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Functions whose calls are the stages of a search; none calls another.
STAGE_BY_FUNCTION = {
    ("generation.py", "generate_continuations"): "decoding",
    ("reward.py", "score"): "scoring",
    ("token_gradient.py", "compute_token_gradient"): "gradients",
}
NUM_LISTED_FUNCTIONS = 6  # functions a profile names


def profile_stages(function: Callable[[], object]) -> dict[str, float]:
    """Seconds (under a profiler, which slows Python) of the rooms of a search, and of the largest functions' own."""
    recorder = cProfile.Profile()
    recorder.runcall(function)
    stats = pstats.Stats(recorder).stats  # type: ignore[attr-defined]  # (file, line, name) -> (…, own, cumulative, …)
    found = dict.fromkeys([*STAGE_BY_FUNCTION.values(), "the rest of the search"], 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in stats.items():
        stage = STAGE_BY_FUNCTION.get((Path(file).name, name))
        if stage:
            found[stage] += cumulative
        elif (Path(file).name, name) == ("loop.py", "solve"):
            found["the rest of the search"] += cumulative
    found["the rest of the search"] -= sum(found[stage] for stage in STAGE_BY_FUNCTION.values())
    largest = sorted(stats.items(), key=lambda item: -item[1][2])[:NUM_LISTED_FUNCTIONS]
    return found | {f"of it in {name} ({Path(file).name})": own for (file, _, name), (_, _, own, _, _) in largest}


def fit_power_law_exponent(rows: Sequence[dict[str, float]], x_key: str, y_key: str) -> float:
    """The exponent p of the power law what ∝ by^p that fits best."""
    return float(np.polyfit(np.log([row[x_key] for row in rows]), np.log([row[y_key] for row in rows]), 1)[0])


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    texts = [list(header), *([one if isinstance(one, str) else f"{one:.4g}" for one in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)), flush=True)
