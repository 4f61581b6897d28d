"""The live view: within the columns, gone when it ends, and of no effect on what is found."""

from __future__ import annotations

import io
from dataclasses import replace

import pyte
import pytest
from rich.console import Console

from nabla_trl.cli.live import LiveView, format_sparkline
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search
from nabla_trl.search.reasoner import NablaReasoner
from nabla_trl.tasks.problem import Problem

CONFIG = SearchConfig(max_rounds=6, max_new_tokens=40)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=24, color_system=None)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_state_of_a_search_fits_the_columns(
    policy: Policy, scalar_reward: Reward, problems: list[Problem], width: int
) -> None:
    paper, shown = terminal(width), []

    def watch(search: Search) -> None:
        view(search)
        with paper.capture() as capture:
            paper.print(view)
        shown.append(capture.get())

    reasoner = NablaReasoner(policy, scalar_reward, replace(CONFIG, num_starts=2, num_chains=2))
    with LiveView(policy.decode, terminal(width)) as view:
        trace = reasoner.solve(problems[0], on_round=watch)
    assert trace == replace(reasoner.solve(problems[0]), cost=trace.cost)
    assert len(shown) > CONFIG.max_rounds
    for text in shown:
        lines = text.splitlines()
        assert all(len(line) <= width for line in lines) and len(lines) <= 24
    if width == 200:
        made = trace.meta["accepted"], trace.meta["proposals"]
        assert f"{made[0]} of {made[1]} proposals accepted, 2 first responses" in shown[-1]
        assert f"reward {trace.reward_initial:.3f} → {trace.reward:.3f}" in shown[-1]
        assert "100% of the limit" in shown[-1] and "0% of the limit" in shown[0]


def test_nothing_of_it_stays(policy: Policy, scalar_reward: Reward, problems: list[Problem]) -> None:
    console = terminal(80)
    with LiveView(policy.decode, console) as view:
        NablaReasoner(policy, scalar_reward, CONFIG).solve(problems[0], on_round=view)
    assert isinstance(console.file, io.StringIO)
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(console.file.getvalue().replace("\n", "\r\n"))
    assert not "".join(screen.display).strip()


def test_a_problem_that_cannot_be_read_shows_no_state(policy: Policy, scalar_reward: Reward) -> None:
    with LiveView(policy.decode, terminal(80)) as view:
        trace = NablaReasoner(policy, scalar_reward, CONFIG).solve(Problem("p", "?!"), on_round=view)
    assert trace.error and view.snapshot is None


def test_sparkline_spans_the_values() -> None:
    assert format_sparkline([0.0, 7.0, float("nan"), 3.5]) == "▁█ ▅"
    assert format_sparkline([2.0, 2.0]) == "▁▁" and format_sparkline([]) == ""
