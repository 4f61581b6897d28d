"""Names of methods: whose policy runs them, what they do, at which size or budget, and their order in a report.

A name is `greedy`, `best_of_8`, `nabla@0.33`, …; of a trained policy it begins with the policy's label, as
`sft_greedy` or `dpo_nabla@0.33`. Text only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

REWARD_MODEL_SAMPLING = "reward_model_sampling"
SEARCHES = ("nabla", "control", "shuffled", "paper", "released")
# Searches over steps: beams, subtrees, states, rollouts are their sizes.
STEP_SEARCHES = ("beam_search", "dvts", "tot", "rap")
# Trained policies: of an adapter from elsewhere, and of each way to train one.
POLICY_LABELS = ("distilled", "sft", "reward_weighted", "dpo", "rloo", "grpo")

# All names, for people.
METHOD_SYNTAX = (
    "greedy, best_of_N, weighted_best_of_N, self_consistency_N, samples_N (N to 999; for pass@k, maj@k and avg@N); "
    "the searches nabla, control (without the gradient), shuffled (its rows in disorder), paper and released "
    "(presets), each also as nabla@best_of_N (at that method's FLOPs) or nabla@F (at F times best_of_16's); the "
    "searches over steps beam_search, dvts (N beams), tot (N states) and rap (N rollouts), each as tot_N, "
    f"tot@best_of_N or tot@F; {REWARD_MODEL_SAMPLING} (log-ratio rewards); of a trained policy L_greedy, L_best_of_N, L_samples_N, "
    f"and L_nabla and L_control, also with a budget; L is one of {', '.join(POLICY_LABELS)}"
)

_REPORT_ORDER = ("greedy", "self_consistency", "best_of", "weighted_best_of", *STEP_SEARCHES, *reversed(SEARCHES))
_LABELED_METHOD = re.compile(rf"(?P<label>{'|'.join(POLICY_LABELS)})_(?P<rest>.+)")
_NUMBERED_METHOD = re.compile(r"(?P<family>.+)_(?P<number>\d+)")


def split_label(method: str) -> tuple[str, str]:
    """Method -> (label, rest): sft_best_of_8 -> (sft, best_of_8). The base policy's label is empty."""
    match = _LABELED_METHOD.fullmatch(method)
    return (match["label"], match["rest"]) if match else ("", method)


def join_label(label: str, method: str) -> str:
    """The method whose `split` this is."""
    return f"{label}_{method}" if label else method


def list_policy_labels(methods: Iterable[str]) -> list[str]:
    """Labels of the trained policies among these methods' ones, in the order of the report."""
    found = {split_label(method)[0] for method in methods}
    return [label for label in POLICY_LABELS if label in found]


def list_methods(summary: Iterable[str]) -> list[str]:
    """The methods that the names of a summary speak of, in its order."""
    return [name.partition(".")[2] for name in summary if name.startswith("accuracy.")]


def parse_family(method: str) -> tuple[str, float]:
    """Method -> (family, size): nabla@0.33 -> (nabla, 0.33), sft_best_of_8 -> (sft_best_of, 8).

    nabla@best_of_8 -> (nabla, 0.5): shares are of best_of_16.

    The size of an unnumbered method is infinite: it is the run at the configuration's own budget. ValueError where a
    budget is no number.
    """
    name, _, fraction = method.partition("@")
    if fraction.startswith("best_of_"):
        count = _parse_budget_number(fraction.removeprefix("best_of_"), method)
        return name, count / 16  # shares are of best_of_16, which costs about that
    if fraction:
        return name, _parse_budget_number(fraction, method)
    match = _NUMBERED_METHOD.fullmatch(name)
    return (match["family"], float(match["number"])) if match else (name, math.inf)


def _parse_budget_number(text: str, method: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{method!r} is no method: its budget is no number") from None


def get_num_samples(method: str) -> int:
    """How many independent samples of a problem a row of this method holds; 0 where it holds one answer."""
    name, size = parse_family(split_label(method)[1])
    return int(size) if name == "samples" and size < math.inf else 0


def sort_methods(methods: Iterable[str]) -> list[str]:
    """Methods in the order of the report, the base policy's first; unknown ones last, as they came."""

    def rank(method: str) -> tuple[int, int, float]:
        label, rest = split_label(method)
        name, size = parse_family(rest)
        whose = POLICY_LABELS.index(label) + 1 if label else 0
        return (whose, _REPORT_ORDER.index(name), size) if name in _REPORT_ORDER else (len(POLICY_LABELS) + 1, 0, 0.0)

    return sorted(dict.fromkeys(methods), key=rank)


def get_main_search(methods: Iterable[str]) -> str | None:
    """The search that a report is about: the base policy's last nabla run in its order; None without one."""
    ours = [method for method in sort_methods(methods) if parse_family(method)[0] == "nabla"]
    return ours[-1] if ours else None
