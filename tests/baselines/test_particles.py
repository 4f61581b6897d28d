"""Resampling of particles."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from nabla_trl.baselines.particles import resample


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999])
def test_every_particle_is_drawn_as_often_as_its_weight_says_give_or_take_one(uniform: float) -> None:
    weights = [0.5, 0.0, 0.3, 0.15, 0.05]
    counts = Counter(resample([math.log(w) if w else -math.inf for w in weights], 10, uniform))
    assert sum(counts.values()) == 10 and counts[1] == 0
    for index, weight in enumerate(weights):
        assert math.floor(10 * weight - 1e-9) <= counts[index] <= math.ceil(10 * weight + 1e-9)


def test_the_mean_number_of_draws_is_proportional_to_the_weight() -> None:
    logs = [-1000.0, -1001.5, -999.0]
    total: Counter[int] = Counter()
    for number in range(1000):
        total.update(resample(logs, 3, (number + 0.5) / 1000))
    norm = sum(math.exp(log + 1000) for log in logs)
    for index, log in enumerate(logs):
        assert total[index] / 3000 == pytest.approx(math.exp(log + 1000) / norm, abs=2e-3)
