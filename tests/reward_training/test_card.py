"""A reward's README: complete, and true to reward.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nabla_trl.reward_training.card import render_reward_readme, write_reward_readme
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.rewards.spec import RewardManifest


def span(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def a_round(number: int, *, labels: bool = True) -> dict[str, Any]:
    scores = {"top1": span(0.7), "top3": span(0.8), "repair_at_error": span(0.9), "repair": span(0.65)}
    point = {
        "first_error_scores": scores if labels else None,
        "sign_accuracy_informative": span(0.88),
        "correlation": None,
    }
    curve = {"accuracy": {"0": span(0.5), "16": span(0.91)}, "reward": {"0": 0.0, "16": 1.0}}
    return {
        "round": number,
        "ranking": {
            "auc": 0.95,
            "step_auc": 0.99 if labels else None,
            "best_of_n_accuracy": {"1": span(0.5), "64": span(0.93)},
        },
        "over_optimization": {"curves": {"nabla": curve, "control": curve}},
        "gradient": {"baseline": scores if labels else None, "gradient_points": {"mixture:0.5": point}},
    }


def test_the_metadata_is_the_hubs_and_the_figures_are_all_there() -> None:
    manifest = RewardManifest(
        "scalar",
        base_model="b/base",
        policy="p/policy",
        validated_limits=ValidatedLimits(64, 32),
        gradient_at="mixture:0.5",
    )
    text = render_reward_readme(
        RewardManifest(
            **{**vars(manifest), "training_rounds": [a_round(0), a_round(1)], "training_settings": {"seed": "3"}}
        )
    )
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "b/base"
    assert "best-of-64 and 32 rounds" in body and "follow: mixture:0.5" in body and "- seed: 3" in body
    assert body.count("| 0.950 | 0.990 | 0.930 [0.920, 0.940] at 64 | 0.910 [0.900, 0.920] at 16 |") == 2
    assert "| mixture:0.5 | 0.700 [0.690, 0.710] | 0.650 [0.640, 0.660] | 0.880 [0.870, 0.890] |  |" in body
    assert "| none (entropy, log π) | 0.700" in body


@pytest.mark.parametrize("kind", ["scalar", "log_ratio", "ensemble"])
def test_a_reward_that_was_not_audited_claims_nothing(kind: str, tmp_path: Path) -> None:
    options = {"log_ratio": {"reference_model": "r"}, "ensemble": {"members": ["a", "b"]}}.get(kind, {})
    write_reward_readme(tmp_path, RewardManifest(kind, base_model="b", policy="p", **options))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Validated" not in text and "## Measured" not in text and "No gradient" in text


def test_without_step_labels_their_cells_are_empty() -> None:
    text = render_reward_readme(
        RewardManifest("scalar", base_model="b", policy="p", training_rounds=[a_round(0, labels=False)])
    )
    assert "| 0 | 0.950 |  | 0.930" in text and "| mixture:0.5 |  |  | 0.880" in text and "entropy, log π" not in text
