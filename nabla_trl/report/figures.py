"""The report's figures, in the style of `nabla_trl.report.canvas`; `nabla_trl.report.compute_tradeoff_figures` makes those of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nabla_trl.evaluation.method import family, methods, split
from nabla_trl.report import compute_tradeoff_figures
from nabla_trl.report.canvas import (
    CURVES,
    GREY,
    INK,
    STYLES,
    Labels,
    Point,
    canvas,
    engineering,
    page,
    panel,
    short,
    style,
)
from nabla_trl.report.sample_figures import samples_figure
from nabla_trl.report.summary import Summary, front
from nabla_trl.utils.statistics import Interval

AXES = {  # cost -> what the axis says, and its unit
    "flops": ("FLOPs per problem (log scale)", "FLOPs"),
    "seconds": ("seconds per problem (log scale)", "s"),
    "tokens": ("tokens drawn per problem (log scale)", ""),
}


def figures(
    summary: Summary, rounds: Mapping[str, Sequence[Interval]], titles: Mapping[str, str]
) -> dict[str, Figure | None]:
    """The figures by name; None where the numbers do not allow one.

    `rounds`: method -> mean reward by round. `titles`: what "flops" and "seconds" show, and the "subject".
    """
    return {
        "accuracy_flops": accuracy_figure(summary, "flops", titles),
        "accuracy_seconds": accuracy_figure(summary, "seconds", titles),
        "reward_rounds": _rounds(rounds, titles),
        "samples": samples_figure(summary, titles["subject"]),
    } | compute_tradeoff_figures.figures(summary, titles["subject"])


def draw(folder: Path, figures: Mapping[str, Figure | None]) -> dict[str, Path]:
    """Draw figures into `folder`; returns the name and path of each one drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # a figure of an earlier report must not pass for one of this
        if figure is not None:
            draft = folder / f"{name}.tmp.png"
            figure.savefig(draft)
            drawn[name] = draft.replace(path)
    return drawn


def accuracy_figure(summary: Summary, cost: str, titles: Mapping[str, str]) -> Figure | None:
    """Accuracy against a cost (flops, seconds or tokens), with the Pareto front; None where it is not known."""
    # Samples of trained policies measure their divergence; where a greedy decode costs the same they are no answer.
    shown = [method for method in methods(summary) if not split(method)[0] or split(method)[1] != "best_of_1"]
    points = [_point(summary, method, cost) for method in shown]
    points = sorted((point for point in points if point.x > 0), key=lambda point: point.x)
    if not points:
        return None
    curves = {name: [point for point in points if family(point.method)[0] == name] for name in CURVES}
    subject = f"{titles['subject']}; bars: 95% bootstrap intervals over problems; dotted: Pareto front"
    figure, axes = canvas(titles[cost], subject)
    axes.set_xscale("log")
    label, unit = AXES[cost]
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy on held-out problems")
    for point in points:
        bars = np.array([[point.y - point.low], [point.high - point.y]])
        colour = style(point.method).colour
        axes.errorbar(point.x, point.y, yerr=bars, fmt="none", ecolor=colour, elinewidth=1, alpha=0.55)
        axes.plot([point.x], [point.y], zorder=3, gid=f"method {point.method}", **style(point.method).look(6))
    on_front = [point for point in points if point.method in front(summary, cost)]
    edge = [(point.x, point.y) for point in on_front]
    axes.plot(*zip(*edge, strict=True), drawstyle="steps-post", color=GREY, lw=1.0, ls=(0, (1, 1.6)), zorder=1)
    for name, curve in curves.items():
        xs, ys = [point.x for point in curve], [point.y for point in curve]
        axes.plot(xs, ys, ls=STYLES[name].line, color=STYLES[name].colour, lw=1.5, zorder=2)
    axes.margins(x=0.1, y=0.1)
    engineering(axes.xaxis, unit)
    labels = Labels(figure, axes)
    for point in points:
        labels.avoid_bar(point)
    for curve in curves.values():
        labels.avoid_line([(point.x, point.y) for point in curve])
    _label_points(labels, points, curves)
    return figure


def _label_points(labels: Labels, points: Sequence[Point], curves: Mapping[str, Sequence[Point]]) -> None:
    """Full names first, as they need the room: one per curve and one per single point; then the budgets."""
    named = [max(curve, key=lambda point: family(point.method)[1]) for curve in curves.values() if curve]
    for point in named:
        labels.place(point.method, point.x, point.y, style(point.method).colour, weight="bold")
    for point in points:
        name, size = family(point.method)
        if name not in CURVES:
            label, rest = split(point.method)
            colour = style(point.method).colour if label else INK
            labels.place(short(point.method), point.x, point.y, colour, size=7 if label and rest != "greedy" else 8)
    for point in points:
        name, size = family(point.method)
        if name in CURVES and point not in named:
            text = f"{size:g}" if name == "best_of" else f"@{size:g}"
            labels.place(text, point.x, point.y, STYLES[name].colour, size=7)


def _rounds(rounds: Mapping[str, Sequence[Interval]], titles: Mapping[str, str]) -> Figure | None:
    curves = {}
    for name in ("nabla", "control"):
        runs = [method for method, curve in rounds.items() if family(method)[0] == name and len(curve) > 1]
        if runs:
            method = max(runs, key=lambda one: family(one)[1])
            curves[method] = rounds[method]
    if not curves:
        return None
    most = max(map(len, curves.values())) - 1
    ends = {method: (curve[0].value, curve[-1].value) for method, curve in curves.items()}
    moves = ", ".join(f"{method} {first:.2f} to {last:.2f}" for method, (first, last) in ends.items())
    subject = f"{titles['subject']}; bands: 95% bootstrap intervals over problems"
    figure, axes = canvas(f"Mean reward over {most} rounds: {moves}", subject)
    axes.set_xlabel("round of search (0: before the first)")
    axes.set_ylabel("mean reward of the kept response")
    for method, curve in curves.items():
        own, steps = style(method), np.arange(len(curve))
        low, value, high = np.array([(one.low, one.value, one.high) for one in curve]).T
        axes.fill_between(steps, low, high, color=own.colour, alpha=0.15, lw=0)
        axes.plot(steps, value, ls=own.line, color=own.colour, lw=1.5, **own.look(5))
    axes.set_xlim(-0.03 * most, 1.16 * most)
    axes.set_xticks(range(0, most + 1, math.ceil(most / 10)))
    labels = Labels(figure, axes)
    for curve in curves.values():
        labels.avoid_line([(step, one.value) for step, one in enumerate(curve)])
    for method, curve in curves.items():
        labels.place(method, len(curve) - 1, curve[-1].value, style(method).colour, weight="bold")
    return figure


def _point(summary: Summary, method: str, cost: str) -> Point:
    one, spent = summary[f"accuracy.{method}"], summary.get(f"{cost}.{method}")
    return Point(method, spent["value"] if spent else 0.0, one["value"], one["low"], one["high"])


def step_figure(lams: Sequence[float], panels: Mapping[str, Sequence[Interval]], title: str, subject: str) -> Figure:
    """Curves over one logarithmic axis of λ, a panel each from the top down; shaded: 95% bootstrap intervals."""
    figure = page(title, f"{subject}; shaded: 95% bootstrap intervals over problems")
    height = 0.74 / len(panels)
    for row, (label, curve) in enumerate(panels.items()):
        axes = panel(figure, (0.1, 0.85 - height * (row + 1) + 0.02, 0.87, height - 0.04))
        own = STYLES["nabla"]
        low, value, high = np.array([(one.low, one.value, one.high) for one in curve]).T
        axes.fill_between(lams, low, high, color=own.colour, alpha=0.2, lw=0)
        axes.plot(lams, value, ls=own.line, color=own.colour, lw=1.5, **own.look(6))
        axes.set_xscale("log")
        axes.set_ylabel(label)
        axes.tick_params(labelbottom=row == len(panels) - 1)
    axes.set_xlabel("λ = 1/β, how often the reward's gradient counts against log π (log scale)")
    return figure
