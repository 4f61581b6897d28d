"""Export from Python: which checkpoint, and what is wrong all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import worlds

from nabla_trl import export
from nabla_trl.pipeline import export as stage


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str | None]]:
    """The runs and methods that a checkpoint was looked for in."""
    calls: list[tuple[Path, str | None]] = []

    def find(run_dir: Path, method: str | None) -> None:
        calls.append((run_dir, method))
        raise ValueError("no checkpoint")

    monkeypatch.setattr(stage, "find_checkpoint", find)
    return calls


def test_a_run_or_the_folder_of_its_weights_is_meant(asked: list[tuple[Path, str | None]], tmp_path: Path) -> None:
    weights = tmp_path / "run" / "trained" / "dpo" / "adapter"
    for source in (tmp_path / "run", weights, str(weights)):
        worlds.refused(lambda source=source: export(source, tmp_path / "out"), "no checkpoint")
    assert asked == [(tmp_path / "run", None), (tmp_path / "run", "dpo"), (tmp_path / "run", "dpo")]
    worlds.refused(lambda: export(weights, tmp_path / "out", train_method="sft"), "checkpoint of dpo, not of sft")


def test_all_that_is_wrong_is_said_at_once(asked: list[tuple[Path, str | None]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here", encoding="utf-8")
    worlds.refused(lambda: export(tmp_path / "run", tmp_path), "is not an empty folder", "no checkpoint")
    worlds.refused(lambda: export(tmp_path / "run", tmp_path / "out", private=True), "private needs push_to_hub")
