"""recipes/minimal.py: its gradient, and the whole file at a small size."""

from __future__ import annotations

import sys
from pathlib import Path

import minimal
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def refiner() -> minimal.Refiner:
    return minimal.Refiner(str(ROOT / "data/tiny/policy"), str(ROOT / "data/tiny/reward"))


def test_the_reward_is_that_of_the_classifier(refiner: minimal.Refiner) -> None:
    prompt = refiner.encode("1+2*3")
    response = refiner.draw(prompt, 20, do_sample=False)
    with torch.no_grad():
        expected = float(refiner.reward(torch.tensor([prompt + response])).logits)
    assert refiner.score(prompt, response) == pytest.approx(expected, abs=1e-4)


def test_a_search_never_ends_below_its_first_response(refiner: minimal.Refiner) -> None:
    torch.manual_seed(0)
    first = refiner.refine("9-5*4+7*2-6", rounds=0)
    torch.manual_seed(0)
    refined = refiner.refine("9-5*4+7*2-6", rounds=3)
    assert first[0] == refined[0] and refined[2] >= first[2]


def test_it_searches_trains_and_saves_an_adapter(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    sizes = ["--train_problems", "2", "--test_problems", "2", "--rounds", "1", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["minimal.py", *sizes, "--output_dir", str(tmp_path)])
    minimal.main()
    assert "greedy after training" in capsys.readouterr().out
    assert (tmp_path / "adapter_config.json").is_file()
