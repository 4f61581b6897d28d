"""A reward folder's README.md: what reward.json says, for people. The metadata block is the model hub's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nabla_trl.rewards.spec import RewardCard

_KINDS = {
    "scalar": "A score head: a sequence classifier with one label",
    "process": "The sum of a score head (a sequence classifier with one label) over the ends of steps",
    "implicit": "A causal LM's adapter: r = scale · (log π − log π_reference)",
    "ensemble": "An ensemble of score heads: mean − caution · std",
}


def write_readme(folder: Path, card: RewardCard) -> None:
    """Write the folder's README.md from its card."""
    (folder / "README.md").write_text(readme(card), encoding="utf-8")


def readme(card: RewardCard) -> str:
    """The text of a reward's README.md."""
    head = {"library_name": "transformers", "tags": ["reward-model", "nabla-trl"], "base_model": card.base}
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n", "# Reward\n", _what(card), _how(card)]
    if card.rounds:
        parts += ["## Measured\n", _NOTE, _rounds(card.rounds), _points(card.rounds[-1])]
    parts += ["## Trained with\n", _listed(card.settings)] if card.settings else []
    return "\n".join(part for part in parts if part)


_NOTE = """\
On problems apart from training; brackets are 95% bootstrap intervals over problems. Search: accuracy of the incumbent
after the rounds, with the gradient at the advised point and without (control).
"""


def _what(card: RewardCard) -> str:
    lines = [
        f"{_KINDS[card.kind]}.",
        f"Begun from `{card.base}`, trained for and audited with the policy `{card.policy}`.",
    ]
    if card.kind == "process":
        lines.append(f"A step ends with {json.dumps(card.step_delimiter, ensure_ascii=False)}.")
    if card.trust is not None:
        trust = card.trust
        lines.append(
            f"Trusted up to best-of-{trust.samples} and {trust.rounds} rounds of search; beyond that nothing was "
            "measured, or answers got worse."
        )
    lines.append(
        f"The gradient to follow: {card.point}." if card.point else "No gradient of it was measured to help a search."
    )
    return "\n".join(lines) + "\n"


def _how(card: RewardCard) -> str:
    return f"""\
```sh
nabla-trl solve QUESTION --policy {card.policy} --reward THIS_FOLDER
nabla-trl audit --policy {card.policy} --reward THIS_FOLDER --dataset D --gradient --pressure
```
"""


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| round | AUC, answer | AUC, steps | best of N | search | control |", "| --- |" + " --- |" * 5]
    for one in rounds:
        ranking, curves = one["ranking"], one["pressure"]["curves"]
        cells = [str(one["round"]), _number(ranking["auc"]), _number(ranking["step_auc"]), _end(ranking["best_of_n"])]
        cells += [_end(curves[name]["accuracy"]) if name in curves else "" for name in ("nabla", "control")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _points(last: Mapping[str, Any]) -> str:
    gradient = last["gradient"]
    rows = [
        "The gradient, last round: shares of wrong answers in which the first error is ranked first, and in which\n"
        "the best swap repairs it; of telling swaps whose direction is predicted.\n",
        "| point | first error first | repair | direction | correlation |",
        "| --- |" + " --- |" * 4,
    ]
    base = gradient["baseline"]
    if base is not None:
        rows.append(f"| none (entropy, log π) | {_span(base['first'])} | {_span(base['repair'])} | | |")
    for name, one in gradient["points"].items():
        found = one["finding"]
        cells = [name, _span(found["first"]) if found else "", _span(found["repair"]) if found else ""]
        rows.append(f"| {' | '.join([*cells, _span(one['sign_telling']), _span(one['correlation'])])} |")
    return "\n".join(rows) + "\n"


def _end(curve: Mapping[str, Mapping[str, float]]) -> str:
    """The largest budget of a curve, and what it reached."""
    largest = max(curve, key=int)
    return f"{_span(curve[largest])} at {largest}"


def _span(one: Mapping[str, float] | None) -> str:
    return "" if one is None else f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _listed(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in settings.items()) + "\n"
