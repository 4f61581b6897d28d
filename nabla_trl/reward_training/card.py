"""The README.md of a reward folder: reward.json as text, with the model hub's metadata on top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nabla_trl.rewards.spec import RewardManifest
from nabla_trl.utils.formatting import format_interval

_KIND_DESCRIPTIONS = {
    "scalar": "A score head: a sequence classifier with one label",
    "process": "The sum of a score head (a sequence classifier with one label) over the ends of reasoning steps",
    "head": "A head on the policy's own hidden states, which drawing a response has computed already",
    "log_ratio": "A causal LM's adapter: r = scale · (log π − log π_reference)",
    "ensemble": "An ensemble of scores: mean − uncertainty_penalty · std",
}
_AUDIT_NOTE = """\
On problems apart from training. Brackets are 95% intervals over problems. Search: accuracy of the incumbent after the
rounds, with the recommended gradient and without any gradient (control).
"""
_GRADIENT_NOTE = """\
The gradient in the last round: fraction of wrong responses in which the first error is ranked first, fraction in which
the best swap repairs it, fraction of informative swaps whose direction is predicted, and correlation of predicted and
true change.
"""


def write_reward_readme(folder: Path, manifest: RewardManifest) -> None:
    """Write the README.md of a reward folder from its manifest."""
    (folder / "README.md").write_text(render_reward_readme(manifest), encoding="utf-8")


def render_reward_readme(manifest: RewardManifest) -> str:
    """Return the text of a reward's README.md."""
    head = {"library_name": "transformers", "tags": ["reward-model", "nabla-trl"], "base_model": manifest.base_model}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        "# Reward\n",
        _render_description(manifest),
        "```sh\n"
        f"nabla-trl solve QUESTION --policy {manifest.policy} --reward THIS_FOLDER\n"
        f"nabla-trl audit --policy {manifest.policy} --reward THIS_FOLDER --dataset D --gradient --over_optimization\n"
        "```\n",
    ]
    if manifest.training_rounds:
        parts += ["## Measured\n", _AUDIT_NOTE, _render_rounds_table(manifest.training_rounds)]
        parts += [_GRADIENT_NOTE, _render_gradient_table(manifest.training_rounds[-1]["gradient"])]
    if manifest.training_settings:
        settings = "\n".join(f"- {name}: {value}" for name, value in manifest.training_settings.items())
        parts += ["## Trained with\n", settings + "\n"]
    return "\n".join(parts)


def _render_description(manifest: RewardManifest) -> str:
    lines = [
        f"{_KIND_DESCRIPTIONS[manifest.kind]}.",
        f"Begun from `{manifest.base_model}`, trained for and audited with the policy `{manifest.policy}`.",
    ]
    if manifest.kind == "process":
        lines.append(f"A step ends with {json.dumps(manifest.step_delimiter, ensure_ascii=False)}.")
    if manifest.validated_limits is not None:
        limits = manifest.validated_limits
        lines.append(
            f"Validated up to best-of-{limits.max_samples} and {limits.max_rounds} rounds of search. Beyond that "
            "nothing was measured, or answers got worse."
        )
    lines.append(
        f"The gradient to follow: {manifest.gradient_at}."
        if manifest.gradient_at
        else "No gradient of it was measured to help a search."
    )
    return "\n".join(lines) + "\n"


def _render_rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| round | AUC, answer | AUC, steps | best of N | search | control |", "| --- |" + " --- |" * 5]
    for training_round in rounds:
        ranking, curves = training_round["ranking"], training_round["over_optimization"]["curves"]
        cells = [str(training_round["round"])]
        cells += ["" if ranking[name] is None else f"{ranking[name]:.3f}" for name in ("auc", "step_auc")]
        cells.append(_format_largest_budget(ranking["best_of_n_accuracy"]))
        cells += [
            _format_largest_budget(curves[name]["accuracy"]) if name in curves else "" for name in ("nabla", "control")
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _render_gradient_table(gradient: Mapping[str, Any]) -> str:
    rows = ["| gradient at | first error first | repair | direction | correlation |", "| --- |" + " --- |" * 4]
    baseline = gradient["baseline"]
    if baseline is not None:
        cells = [format_interval(baseline[name]) for name in ("top1", "repair")]
        rows.append(f"| none (entropy, log π) | {' | '.join(cells)} | | |")
    for name, audit in gradient["gradient_points"].items():
        first_error = audit["first_error_scores"] or {"top1": None, "repair": None}
        intervals = (
            first_error["top1"],
            first_error["repair"],
            audit["sign_accuracy_informative"],
            audit["correlation"],
        )
        cells = ["" if interval is None else format_interval(interval) for interval in intervals]
        rows.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(rows) + "\n"


def _format_largest_budget(curve: Mapping[str, Mapping[str, float]]) -> str:
    """Return what the largest budget of a curve reached, and that budget."""
    largest = max(curve, key=int)
    return f"{format_interval(curve[largest])} at {largest}"
