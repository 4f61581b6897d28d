"""Validated limits: what an audit allows, and the warning beyond it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import worlds

from nabla_trl.rewards.limits import ValidatedLimits, past_limits, past_sample_limit


def test_limits_survive_a_round_trip():
    limits = ValidatedLimits(max_samples=8, max_rounds=16)
    assert ValidatedLimits.from_dict(limits.to_dict()) == limits
    assert ValidatedLimits.from_dict({**limits.to_dict(), "later": 1}) == limits


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"max_samples": 1}, ["max_rounds is missing"]),
        ({"max_rounds": 1}, ["max_samples is missing"]),
        ({"max_samples": 1, "max_rounds": -1}, ["max_rounds", "-1"]),
        ({"max_samples": 1.5, "max_rounds": 1}, ["max_samples", "1.5"]),
        ({"max_samples": True, "max_rounds": 1}, ["max_samples", "True"]),
        ({"max_samples": 1, "max_rounds": "2"}, ["max_rounds", "'2'"]),
    ],
)
def test_broken_limits_are_refused(data, words):
    worlds.refused(lambda: ValidatedLimits.from_dict(data), "validated_limits", *words)


@pytest.mark.parametrize(
    ("limits", "rounds", "words"),
    [
        (None, 0, []),
        (None, 99, []),
        (ValidatedLimits(1, 8), 8, []),
        (ValidatedLimits(1, 8), 9, ["up to 8 rounds", "9 rounds"]),
        (ValidatedLimits(1, 8), 0, ["up to 8 rounds", "a search without a limit of rounds"]),
        (ValidatedLimits(1, 0), 1, ["for no search at all", "1 rounds"]),
        (ValidatedLimits(1, 0), 0, ["for no search at all", "a search without a limit of rounds"]),
    ],
)
def test_a_search_beyond_the_limits_is_warned_of_in_one_line(limits, rounds, words):
    warning = past_limits(limits, rounds)
    assert (warning is None) == (not words)
    assert all(word in (warning or "") for word in words) and "\n" not in (warning or "")


@pytest.mark.parametrize(
    ("limits", "samples", "words"),
    [
        (None, 99, []),
        (ValidatedLimits(8, 1), 8, []),
        (ValidatedLimits(8, 1), 9, ["up to best of 8", "best of 9 is"]),
        (ValidatedLimits(1, 1), 1, []),
        (ValidatedLimits(0, 1), 1, []),
        (ValidatedLimits(1, 1), 2, ["for no choice among samples", "best of 2 is"]),
    ],
)
def test_best_of_n_beyond_the_limits_is_warned_of_in_one_line(limits, samples, words):
    warning = past_sample_limit(limits, samples)
    assert (warning is None) == (not words)
    assert all(word in (warning or "") for word in words) and "\n" not in (warning or "")


def test_limits_need_no_torch():
    code = "import sys, nabla_trl.rewards.limits; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
