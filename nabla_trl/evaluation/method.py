"""Names of methods: whose policy runs them, what they do, at which size or budget, and their order in a report.

A name is `greedy`, `best_of_8`, `nabla@0.33`, …; of a trained policy it begins with the policy's label, as
`sft_greedy` or `dpo_nabla@0.33`. Text only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

RIVAL = "reward_model_sampling"
SEARCHES = ("nabla", "control", "shuffled", "paper", "released")
# Searches over steps: beams, subtrees, states, rollouts are their sizes.
STEPWISE = ("beam_search", "dvts", "tot", "rap")
# Trained policies: of an adapter from elsewhere, and of each way to train one.
LABELS = ("distilled", "sft", "reward_weighted", "dpo", "rloo", "grpo")

# All names, for people.
SYNTAX = (
    "greedy, best_of_N, weighted_best_of_N, self_consistency_N, samples_N (N to 999; for pass@k, maj@k and avg@N); "
    "the searches nabla, control (without the gradient), shuffled (its rows in disorder), paper and released "
    "(presets), each also as nabla@best_of_N (at that method's FLOPs) or nabla@F (at F times best_of_16's); the "
    "searches over steps beam_search, dvts (N beams), tot (N states) and rap (N rollouts), each as tot_N, "
    f"tot@best_of_N or tot@F; {RIVAL} (log-ratio rewards); of a trained policy L_greedy, L_best_of_N, L_samples_N, "
    f"and L_nabla and L_control, also with a budget; L is one of {', '.join(LABELS)}"
)

_ORDER = ("greedy", "self_consistency", "best_of", "weighted_best_of", *STEPWISE, *reversed(SEARCHES))
_LABELLED = re.compile(rf"(?P<label>{'|'.join(LABELS)})_(?P<rest>.+)")
_NUMBERED = re.compile(r"(?P<family>.+)_(?P<number>\d+)")


def split(method: str) -> tuple[str, str]:
    """Method -> (label, rest): sft_best_of_8 -> (sft, best_of_8). The base policy's label is empty."""
    match = _LABELLED.fullmatch(method)
    return (match["label"], match["rest"]) if match else ("", method)


def labelled(label: str, rest: str) -> str:
    """The method whose `split` this is."""
    return f"{label}_{rest}" if label else rest


def labels(methods: Iterable[str]) -> list[str]:
    """Labels of the trained policies among these methods' ones, in the order of the report."""
    found = {split(method)[0] for method in methods}
    return [label for label in LABELS if label in found]


def methods(summary: Iterable[str]) -> list[str]:
    """The methods that the names of a summary speak of, in its order."""
    return [name.partition(".")[2] for name in summary if name.startswith("accuracy.")]


def family(method: str) -> tuple[str, float]:
    """Method -> (family, size): nabla@0.33 -> (nabla, 0.33), sft_best_of_8 -> (sft_best_of, 8).

    nabla@best_of_8 -> (nabla, 0.5): shares are of best_of_16.

    The size of an unnumbered method is infinite: it is the run at the configuration's own budget. ValueError where a
    budget is no number.
    """
    name, _, fraction = method.partition("@")
    if fraction.startswith("best_of_"):
        count = _number(fraction.removeprefix("best_of_"), method)
        return name, count / 16  # shares are of best_of_16, which costs about that
    if fraction:
        return name, _number(fraction, method)
    match = _NUMBERED.fullmatch(name)
    return (match["family"], float(match["number"])) if match else (name, math.inf)


def _number(text: str, method: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{method!r} is no method: its budget is no number") from None


def sample_count(method: str) -> int:
    """How many independent samples of a problem a row of this method holds; 0 where it holds one answer."""
    name, size = family(split(method)[1])
    return int(size) if name == "samples" and size < math.inf else 0


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of the report, the base policy's first; unknown ones last, as they came."""

    def rank(method: str) -> tuple[int, int, float]:
        label, rest = split(method)
        name, size = family(rest)
        whose = LABELS.index(label) + 1 if label else 0
        return (whose, _ORDER.index(name), size) if name in _ORDER else (len(LABELS) + 1, 0, 0.0)

    return sorted(dict.fromkeys(methods), key=rank)


def main_search(methods: Iterable[str]) -> str | None:
    """The search that a report is about: the base policy's last nabla run in its order; None without one."""
    ours = [method for method in in_order(methods) if family(method)[0] == "nabla"]
    return ours[-1] if ours else None
