"""Trust: what an audit allows, and the warning beyond it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import worlds

from nabla_trl.rewards.limits import ValidatedLimits, past_limits, past_sample_limit


def test_trust_survives_a_round_trip():
    trust = ValidatedLimits(max_samples=8, max_rounds=16)
    assert ValidatedLimits.from_dict(trust.to_dict()) == trust
    assert ValidatedLimits.from_dict({**trust.to_dict(), "later": 1}) == trust


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"samples": 1}, ["rounds is missing"]),
        ({"rounds": 1}, ["samples is missing"]),
        ({"samples": 1, "rounds": -1}, ["rounds", "-1"]),
        ({"samples": 1.5, "rounds": 1}, ["samples", "1.5"]),
        ({"samples": True, "rounds": 1}, ["samples", "True"]),
        ({"samples": 1, "rounds": "2"}, ["rounds", "'2'"]),
    ],
)
def test_broken_trust_is_refused(data, words):
    worlds.refused(lambda: ValidatedLimits.from_dict(data), "trust", *words)


@pytest.mark.parametrize(
    ("trust", "rounds", "words"),
    [
        (None, 0, []),
        (None, 99, []),
        (ValidatedLimits(1, 8), 8, []),
        (ValidatedLimits(1, 8), 9, ["up to 8 rounds", "9 rounds"]),
        (ValidatedLimits(1, 8), 0, ["up to 8 rounds", "one without a limit of rounds"]),
        (ValidatedLimits(1, 0), 1, ["for no search at all", "1 rounds"]),
        (ValidatedLimits(1, 0), 0, ["for no search at all", "one without a limit of rounds"]),
    ],
)
def test_a_search_beyond_trust_is_warned_of_in_one_line(trust, rounds, words):
    warning = past_limits(trust, rounds)
    assert (warning is None) == (not words)
    assert all(word in (warning or "") for word in words) and "\n" not in (warning or "")


@pytest.mark.parametrize(
    ("trust", "samples", "words"),
    [
        (None, 99, []),
        (ValidatedLimits(8, 1), 8, []),
        (ValidatedLimits(8, 1), 9, ["up to best of 8", "best of 9 was"]),
        (ValidatedLimits(1, 1), 1, []),
        (ValidatedLimits(0, 1), 1, []),
        (ValidatedLimits(1, 1), 2, ["for no choice among samples", "best of 2 was"]),
    ],
)
def test_best_of_n_beyond_trust_is_warned_of_in_one_line(trust, samples, words):
    warning = past_sample_limit(trust, samples)
    assert (warning is None) == (not words)
    assert all(word in (warning or "") for word in words) and "\n" not in (warning or "")


def test_trust_needs_no_torch():
    code = "import sys, nabla_trl.rewards.limits; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
