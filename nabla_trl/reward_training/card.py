"""A reward folder's README.md: what reward.json says, for people. The metadata block is the model hub's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nabla_trl.rewards.spec import RewardManifest

_KIND_DESCRIPTIONS = {
    "scalar": "A score head: a sequence classifier with one label",
    "process": "The sum of a score head (a sequence classifier with one label) over the ends of steps",
    "implicit": "A causal LM's adapter: r = scale · (log π − log π_reference)",
    "ensemble": "An ensemble of score heads: mean − caution · std",
}


def write_reward_readme(folder: Path, manifest: RewardManifest) -> None:
    """Write the folder's README.md from its card."""
    (folder / "README.md").write_text(render_reward_readme(manifest), encoding="utf-8")


def render_reward_readme(manifest: RewardManifest) -> str:
    """The text of a reward's README.md."""
    head = {"library_name": "transformers", "tags": ["reward-model", "nabla-trl"], "base_model": manifest.base_model}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        "# Reward\n",
        _render_description(manifest),
        _render_usage(manifest),
    ]
    if manifest.training_rounds:
        parts += [
            "## Measured\n",
            _AUDIT_NOTE,
            _render_rounds_table(manifest.training_rounds),
            _render_gradient_table(manifest.training_rounds[-1]),
        ]
    parts += ["## Trained with\n", _render_settings(manifest.training_settings)] if manifest.training_settings else []
    return "\n".join(part for part in parts if part)


_AUDIT_NOTE = """\
On problems apart from training; brackets are 95% bootstrap intervals over problems. Search: accuracy of the incumbent
after the rounds, with the gradient at the advised point and without (control).
"""


def _render_description(manifest: RewardManifest) -> str:
    lines = [
        f"{_KIND_DESCRIPTIONS[manifest.kind]}.",
        f"Begun from `{manifest.base_model}`, trained for and audited with the policy `{manifest.policy}`.",
    ]
    if manifest.kind == "process":
        lines.append(f"A step ends with {json.dumps(manifest.step_delimiter, ensure_ascii=False)}.")
    if manifest.validated_limits is not None:
        trust = manifest.validated_limits
        lines.append(
            f"Trusted up to best-of-{trust.max_samples} and {trust.max_rounds} rounds of search; beyond that nothing was "
            "measured, or answers got worse."
        )
    lines.append(
        f"The gradient to follow: {manifest.gradient_at}."
        if manifest.gradient_at
        else "No gradient of it was measured to help a search."
    )
    return "\n".join(lines) + "\n"


def _render_usage(manifest: RewardManifest) -> str:
    return f"""\
```sh
nabla-trl solve QUESTION --policy {manifest.policy} --reward THIS_FOLDER
nabla-trl audit --policy {manifest.policy} --reward THIS_FOLDER --dataset D --gradient --over_optimization
```
"""


def _render_rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| round | AUC, answer | AUC, steps | best of N | search | control |", "| --- |" + " --- |" * 5]
    for one in rounds:
        ranking, curves = one["ranking"], one["pressure"]["curves"]
        cells = [
            str(one["round"]),
            _format_number(ranking["auc"]),
            _format_number(ranking["step_auc"]),
            _format_largest_budget(ranking["best_of_n"]),
        ]
        cells += [
            _format_largest_budget(curves[name]["accuracy"]) if name in curves else "" for name in ("nabla", "control")
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _render_gradient_table(last_round: Mapping[str, Any]) -> str:
    gradient = last_round["gradient"]
    rows = [
        "The gradient, last round: shares of wrong answers in which the first error is ranked first, and in which\n"
        "the best swap repairs it; of telling swaps whose direction is predicted.\n",
        "| point | first error first | repair | direction | correlation |",
        "| --- |" + " --- |" * 4,
    ]
    base = gradient["baseline"]
    if base is not None:
        rows.append(
            f"| none (entropy, log π) | {_format_interval(base['first'])} | {_format_interval(base['repair'])} | | |"
        )
    for name, one in gradient["points"].items():
        found = one["finding"]
        cells = [
            name,
            _format_interval(found["first"]) if found else "",
            _format_interval(found["repair"]) if found else "",
        ]
        rows.append(
            f"| {' | '.join([*cells, _format_interval(one['sign_telling']), _format_interval(one['correlation'])])} |"
        )
    return "\n".join(rows) + "\n"


def _format_largest_budget(curve: Mapping[str, Mapping[str, float]]) -> str:
    """The largest budget of a curve, and what it reached."""
    largest = max(curve, key=int)
    return f"{_format_interval(curve[largest])} at {largest}"


def _format_interval(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _render_settings(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in settings.items()) + "\n"
