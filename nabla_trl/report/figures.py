"""The report's figures, in the style of `nabla_trl.report.canvas`; `nabla_trl.report.compute_tradeoff_figures` makes those of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nabla_trl.evaluation.method import list_methods, parse_family, split_label
from nabla_trl.report import compute_tradeoff_figures
from nabla_trl.report.canvas import (
    CURVE_FAMILIES,
    GRAY,
    INK,
    METHOD_STYLES,
    LabelPlacer,
    PlotPoint,
    add_axes,
    create_figure,
    create_figure_with_axes,
    format_si_axis,
    get_style,
    shorten_method,
)
from nabla_trl.report.sample_figures import plot_samples
from nabla_trl.report.summary import Summary, find_pareto_front
from nabla_trl.utils.statistics import Interval

COST_AXES = {  # cost -> what the axis says, and its unit
    "flops": ("FLOPs per problem (log scale)", "FLOPs"),
    "seconds": ("seconds per problem (log scale)", "s"),
    "tokens": ("tokens drawn per problem (log scale)", ""),
}


def plot_figures(
    summary: Summary, reward_by_round: Mapping[str, Sequence[Interval]], titles: Mapping[str, str]
) -> dict[str, Figure | None]:
    """The figures by name; None where the numbers do not allow one.

    `rounds`: method -> mean reward by round. `titles`: what "flops" and "seconds" show, and the "subject".
    """
    return {
        "accuracy_flops": plot_accuracy(summary, "flops", titles),
        "accuracy_seconds": plot_accuracy(summary, "seconds", titles),
        "reward_rounds": _plot_reward_rounds(reward_by_round, titles),
        "samples": plot_samples(summary, titles["subject"]),
    } | compute_tradeoff_figures.plot_tradeoff_figures(summary, titles["subject"])


def save_figures(folder: Path, figures: Mapping[str, Figure | None]) -> dict[str, Path]:
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


def plot_accuracy(summary: Summary, cost: str, titles: Mapping[str, str]) -> Figure | None:
    """Accuracy against a cost (flops, seconds or tokens), with the Pareto front; None where it is not known."""
    # Samples of trained policies measure their divergence; where a greedy decode costs the same they are no answer.
    shown = [
        method
        for method in list_methods(summary)
        if not split_label(method)[0] or split_label(method)[1] != "best_of_1"
    ]
    points = [_make_accuracy_point(summary, method, cost) for method in shown]
    points = sorted((point for point in points if point.x > 0), key=lambda point: point.x)
    if not points:
        return None
    curves = {name: [point for point in points if parse_family(point.method)[0] == name] for name in CURVE_FAMILIES}
    subject = f"{titles['subject']}; bars: 95% bootstrap intervals over problems; dotted: Pareto front"
    figure, axes = create_figure_with_axes(titles[cost], subject)
    axes.set_xscale("log")
    label, unit = COST_AXES[cost]
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy on held-out problems")
    for point in points:
        bars = np.array([[point.y - point.low], [point.high - point.y]])
        colour = get_style(point.method).color
        axes.errorbar(point.x, point.y, yerr=bars, fmt="none", ecolor=colour, elinewidth=1, alpha=0.55)
        axes.plot(
            [point.x],
            [point.y],
            zorder=3,
            gid=f"method {point.method}",
            **get_style(point.method).get_marker_options(6),
        )
    on_front = [point for point in points if point.method in find_pareto_front(summary, cost)]
    edge = [(point.x, point.y) for point in on_front]
    axes.plot(*zip(*edge, strict=True), drawstyle="steps-post", color=GRAY, lw=1.0, ls=(0, (1, 1.6)), zorder=1)
    for name, curve in curves.items():
        xs, ys = [point.x for point in curve], [point.y for point in curve]
        axes.plot(xs, ys, ls=METHOD_STYLES[name].line_style, color=METHOD_STYLES[name].color, lw=1.5, zorder=2)
    axes.margins(x=0.1, y=0.1)
    format_si_axis(axes.xaxis, unit)
    labels = LabelPlacer(figure, axes)
    for point in points:
        labels.avoid_bar(point)
    for curve in curves.values():
        labels.avoid_line([(point.x, point.y) for point in curve])
    _label_points(labels, points, curves)
    return figure


def _label_points(labels: LabelPlacer, points: Sequence[PlotPoint], curves: Mapping[str, Sequence[PlotPoint]]) -> None:
    """Full names first, as they need the room: one per curve and one per single point; then the budgets."""
    named = [max(curve, key=lambda point: parse_family(point.method)[1]) for curve in curves.values() if curve]
    for point in named:
        labels.place_label(point.method, point.x, point.y, get_style(point.method).color, weight="bold")
    for point in points:
        name, size = parse_family(point.method)
        if name not in CURVE_FAMILIES:
            label, rest = split_label(point.method)
            colour = get_style(point.method).color if label else INK
            labels.place_label(
                shorten_method(point.method), point.x, point.y, colour, size=7 if label and rest != "greedy" else 8
            )
    for point in points:
        name, size = parse_family(point.method)
        if name in CURVE_FAMILIES and point not in named:
            text = f"{size:g}" if name == "best_of" else f"@{size:g}"
            labels.place_label(text, point.x, point.y, METHOD_STYLES[name].color, size=7)


def _plot_reward_rounds(reward_by_round: Mapping[str, Sequence[Interval]], titles: Mapping[str, str]) -> Figure | None:
    curves = {}
    for name in ("nabla", "control"):
        runs = [
            method for method, curve in reward_by_round.items() if parse_family(method)[0] == name and len(curve) > 1
        ]
        if runs:
            method = max(runs, key=lambda one: parse_family(one)[1])
            curves[method] = reward_by_round[method]
    if not curves:
        return None
    most = max(map(len, curves.values())) - 1
    ends = {method: (curve[0].value, curve[-1].value) for method, curve in curves.items()}
    moves = ", ".join(f"{method} {first:.2f} to {last:.2f}" for method, (first, last) in ends.items())
    subject = f"{titles['subject']}; bands: 95% bootstrap intervals over problems"
    figure, axes = create_figure_with_axes(f"Mean reward over {most} rounds: {moves}", subject)
    axes.set_xlabel("round of search (0: before the first)")
    axes.set_ylabel("mean reward of the kept response")
    for method, curve in curves.items():
        own, steps = get_style(method), np.arange(len(curve))
        low, value, high = np.array([(one.low, one.value, one.high) for one in curve]).T
        axes.fill_between(steps, low, high, color=own.color, alpha=0.15, lw=0)
        axes.plot(steps, value, ls=own.line_style, color=own.color, lw=1.5, **own.get_marker_options(5))
    axes.set_xlim(-0.03 * most, 1.16 * most)
    axes.set_xticks(range(0, most + 1, math.ceil(most / 10)))
    labels = LabelPlacer(figure, axes)
    for curve in curves.values():
        labels.avoid_line([(step, one.value) for step, one in enumerate(curve)])
    for method, curve in curves.items():
        labels.place_label(method, len(curve) - 1, curve[-1].value, get_style(method).color, weight="bold")
    return figure


def _make_accuracy_point(summary: Summary, method: str, cost: str) -> PlotPoint:
    one, spent = summary[f"accuracy.{method}"], summary.get(f"{cost}.{method}")
    return PlotPoint(method, spent["value"] if spent else 0.0, one["value"], one["low"], one["high"])


def plot_reward_weight_curves(
    reward_weights: Sequence[float], panels: Mapping[str, Sequence[Interval]], title: str, subject: str
) -> Figure:
    """Curves over one logarithmic axis of λ, a panel each from the top down; shaded: 95% bootstrap intervals."""
    figure = create_figure(title, f"{subject}; shaded: 95% bootstrap intervals over problems")
    height = 0.74 / len(panels)
    for row, (label, curve) in enumerate(panels.items()):
        axes = add_axes(figure, (0.1, 0.85 - height * (row + 1) + 0.02, 0.87, height - 0.04))
        own = METHOD_STYLES["nabla"]
        low, value, high = np.array([(one.low, one.value, one.high) for one in curve]).T
        axes.fill_between(reward_weights, low, high, color=own.color, alpha=0.2, lw=0)
        axes.plot(reward_weights, value, ls=own.line_style, color=own.color, lw=1.5, **own.get_marker_options(6))
        axes.set_xscale("log")
        axes.set_ylabel(label)
        axes.tick_params(labelbottom=row == len(panels) - 1)
    axes.set_xlabel("λ = 1/β, how often the reward's gradient counts against log π (log scale)")
    return figure
