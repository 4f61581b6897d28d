"""The figures of training against search: reward and divergence, accuracy against total compute, break-even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from nabla_trl.evaluation.method import list_methods, list_policy_labels, parse_family, split_label
from nabla_trl.report.canvas import (
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
from nabla_trl.report.compute_tradeoff import (
    KIND_TRAINED,
    METHOD_KINDS,
    QUERY_COUNTS,
    compute_total_flops,
    find_best_by_total,
    find_best_trained,
    select_methods_of_kind,
)
from nabla_trl.report.conclusions import describe_best_for_budget
from nabla_trl.report.summary import Summary
from nabla_trl.utils.formatting import format_si

MAX_QUERIES = 10**6
# Ticks of a divergence in nats, on an axis of its square root.
_KL_TICKS = (0, 0.1, 0.25, 0.5, 1, 2, 4, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000)


def plot_tradeoff_figures(summary: Summary, subject: str) -> dict[str, Figure | None]:
    """What the numbers allow to be drawn; nothing without a trained policy."""
    if not list_policy_labels(list_methods(summary)):
        return dict.fromkeys(("reward_kl", "total_compute", "break_even"))
    return {
        "reward_kl": plot_reward_kl(summary, subject),
        "total_compute": plot_total_compute(summary, subject),
        "break_even": plot_break_even(summary, subject),
    }


# --- reward and divergence ----------------------------------------------------------------------------


def plot_reward_kl(summary: Summary, subject: str) -> Figure | None:
    """Mean reward against KL to the base policy, over its square root: best-of-N's curve, and trained policies."""
    known = [method for method in list_methods(summary) if f"kl.{method}" in summary and f"reward.{method}" in summary]
    points = [_make_kl_point(summary, method) for method in known]
    if not points:
        return None
    figure, axes = create_figure_with_axes(
        _build_frontier_title(summary, points), f"{subject}; bars: 95% bootstrap intervals over problems"
    )
    axes.set_xscale("function", functions=(lambda nats: np.sqrt(np.maximum(nats, 0)), np.square))
    axes.set_xlabel("KL to the base policy, nats per response (square-root scale; best-of-N: upper bound)")
    axes.set_ylabel("mean reward of the kept response")
    whose = ["", *list_policy_labels(known)]
    curves = {label: [point for point in points if split_label(point.method)[0] == label] for label in whose}
    for label, curve in curves.items():
        curve.sort(key=lambda point: parse_family(split_label(point.method)[1])[1])
        line = {"lw": 1.5} if not label else {"lw": 1.0, "ls": (0, (2, 2)), "alpha": 0.7}
        colour = (METHOD_STYLES["best_of"] if not label else get_style(f"{label}_greedy")).color
        axes.plot([point.x for point in curve], [point.y for point in curve], color=colour, zorder=2, **line)
    for point in points:
        _draw_point(axes, summary, point)
    axes.set_xlim(0, 1.12 * max(point.x for point in points) + 0.02)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(FixedLocator(_select_ticks(axes.get_xlim()[1])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    named = LabelPlacer(figure, axes)
    for point in points:
        kl = summary[f"kl.{point.method}"]
        named.avoid_line([(max(0.0, kl["low"]), point.y), (max(0.0, kl["high"]), point.y)], penalty=1.0)
    _label_kl_points(named, points, curves)
    return figure


def _make_kl_point(summary: Summary, method: str) -> PlotPoint:
    one = summary[f"reward.{method}"]
    # An estimate of a small divergence may come out below zero, where none can be.
    return PlotPoint(method, max(0.0, summary[f"kl.{method}"]["value"]), one["value"], one["low"], one["high"])


def _draw_point(axes: Axes, summary: Summary, point: PlotPoint) -> None:
    label, rest = split_label(point.method)
    own = get_style(f"{label}_greedy" if label and rest == "best_of_1" else point.method)
    kl = summary[f"kl.{point.method}"]
    bars = {"xerr": [[point.x - max(0.0, kl["low"])], [max(0.0, kl["high"]) - point.x]]} if label else {}
    bars["yerr"] = [[point.y - point.low], [point.high - point.y]]
    axes.errorbar(point.x, point.y, **bars, fmt="none", ecolor=own.color, elinewidth=1, alpha=0.55)
    axes.plot([point.x], [point.y], zorder=3, clip_on=False, **own.get_marker_options(6.5))


def _select_ticks(max_kl: float) -> list[float]:
    """Those of `_NATS` that stand well apart on a square-root axis up to `most`, zero first."""
    kept = [0.0]
    for nats in _KL_TICKS:
        if nats <= max_kl and math.sqrt(nats) - math.sqrt(kept[-1]) > math.sqrt(max_kl) / 14:
            kept.append(float(nats))
    return kept


def _label_kl_points(
    labels: LabelPlacer, points: Sequence[PlotPoint], curves: Mapping[str, Sequence[PlotPoint]]
) -> None:
    for point in points:
        labels.avoid_bar(point)
    for curve in curves.values():
        labels.avoid_line([(point.x, point.y) for point in curve])
    for label, curve in curves.items():
        for point in curve:
            first, last = point is curve[0], point is curve[-1]
            text = (
                label
                if label and first
                else shorten_method(point.method)
                if label
                else _format_curve_label(point.method, last)
            )
            weight = "bold" if first else "normal"
            labels.place_label(
                text, point.x, point.y, get_style(point.method).color, weight=weight, size=8 if first else 7
            )


def _format_curve_label(method: str, last: bool) -> str:
    """Of best-of-N's curve the beginning and the end are named; between them N is enough."""
    size = parse_family(method)[1]
    return "base" if size == 1 else f"best of {size:g}" if last else f"{size:g}"


def _build_frontier_title(summary: Summary, points: Sequence[PlotPoint]) -> str:
    curve = [point for point in points if not split_label(point.method)[0]]
    sampled = [point for point in points if point not in curve and split_label(point.method)[1] == "best_of_1"]
    best = max(sampled, key=lambda point: point.y, default=None)
    parts = [f"{split_label(best.method)[0]} {best.y:.2f} at {best.x:.2f} nats"] if best else []
    if curve:
        end = max(curve, key=lambda point: point.x)
        parts.append(f"{end.method} {end.y:.2f} at ≤ {end.x:.2f}")
    return f"Mean reward by divergence: {', '.join(parts)}"


# --- total compute ------------------------------------------------------------------------------------


def plot_total_compute(summary: Summary, subject: str) -> Figure | None:
    """A panel for each number of queries: every method's accuracy against its total FLOPs, and the best of them."""
    if all(
        compute_total_flops(summary, method, 0) is None for method in select_methods_of_kind(summary, KIND_TRAINED)
    ):
        return None
    title = describe_best_for_budget(summary) or "Accuracy against total FLOPs"
    figure = create_figure(
        title, f"{subject}; steps: the highest accuracy that a total of FLOPs can buy, training included"
    )
    for number, queries in enumerate(QUERY_COUNTS):
        left, bottom = 0.085 + 0.475 * (number % 2), 0.52 - 0.41 * (number // 2)
        axes = add_axes(figure, (left, bottom, 0.42, 0.32))
        _plot_totals(figure, axes, summary, queries)
        if number % 2 == 0:
            axes.set_ylabel("accuracy")
        if number // 2:
            axes.set_xlabel("total FLOPs (log scale)")
    return figure


def _plot_totals(figure: Figure, axes: Axes, summary: Summary, queries: int) -> None:
    axes.set_xscale("log")
    axes.set_title(_format_query_count(queries), fontsize=9, color=INK, loc="left", pad=3)
    totals = {
        method: compute_total_flops(summary, method, queries)
        for method in select_methods_of_kind(summary, *METHOD_KINDS)
    }
    for method, total in totals.items():
        if total:
            axes.plot(
                [total],
                [summary[f"accuracy.{method}"]["value"]],
                zorder=3,
                alpha=0.9,
                **get_style(method).get_marker_options(4),
            )
    best = find_best_by_total(summary, queries)
    heights = [summary[f"accuracy.{one.method}"]["value"] for one in best]
    axes.margins(x=0.12, y=0.16)
    end = axes.get_xlim()[1]
    corners = [(one.total_flops, height) for one, height in zip(best, heights, strict=True)]
    stairs = [corners[0]]
    for (total, height), (_, before) in zip(corners[1:], corners, strict=False):
        stairs += [(total, before), (total, height)]
    stairs.append((end, heights[-1]))
    axes.plot(*zip(*stairs, strict=True), color=INK, lw=1.1, zorder=2)
    axes.set_xlim(right=end)
    format_si_axis(axes.xaxis, "")
    named = LabelPlacer(figure, axes)
    for method, total in totals.items():
        if total:
            height = summary[f"accuracy.{method}"]["value"]
            named.avoid_bar(PlotPoint(method, total, height, height, height))
    named.avoid_line(stairs)
    firsts = {parse_family(one.method)[0]: one for one in reversed(best)}
    for one, corner in zip(best, corners, strict=True):
        if one in (best[-1], firsts[parse_family(one.method)[0]]):  # there is no room for more
            named.place_label(shorten_method(one.method), *corner, get_style(one.method).color, size=7)


def _format_query_count(queries: int) -> str:
    return f"{format_si(queries)} quer{'y' if queries == 1 else 'ies'}"


# --- break-even ---------------------------------------------------------------------------------------


def plot_break_even(summary: Summary, subject: str) -> Figure | None:
    """Total FLOPs against queries: greedy decodes of trained policies, and what they are trained to replace."""
    greedy = [method for method in select_methods_of_kind(summary, KIND_TRAINED) if split_label(method)[1] == "greedy"]
    trained = {method: spent for method in greedy if (spent := compute_total_flops(summary, method, 0)) is not None}
    rivals = [name for name in ("best_of_16", "nabla", "greedy") if f"flops.{name}" in summary]
    if not trained or not rivals:
        return None
    own = find_best_trained(summary)
    own = own if own in trained else next(iter(trained))
    crossings = {name: summary.get(f"break_even.{own}-{name}", {"value": math.inf})["value"] for name in rivals}
    shown = {name: value for name, value in crossings.items() if 1 <= value <= MAX_QUERIES}
    paid = ", ".join(f"{format_si(value)} against {name}" for name, value in shown.items())
    title = f"Queries until {own} is paid back: {paid}" if paid else "Total FLOPs against queries answered"
    figure, axes = create_figure_with_axes(
        title, f"{subject}; training once, then FLOPs per query; trained policies decode greedily", left=0.15
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("queries answered (log scale)")
    axes.set_ylabel("total FLOPs, training included (log scale)")
    queries = np.logspace(0, math.log10(MAX_QUERIES), 61)
    paid_once = dict.fromkeys(rivals, 0.0) | trained
    totals = {name: once + queries * summary[f"flops.{name}"]["value"] for name, once in paid_once.items()}
    for name, total in totals.items():
        look = get_style(name)
        axes.plot(queries, total, ls=look.line_style, color=look.color, lw=1.7)
        first = 2 * list(trained).index(name) if name in trained else 0  # level lines lie close: markers side by side
        axes.plot(queries[first::10], total[first::10], ls="", clip_on=False, zorder=3, **look.get_marker_options(5))
    axes.set_xlim(1, MAX_QUERIES)
    format_si_axis(axes.xaxis, "")
    format_si_axis(axes.yaxis, "FLOPs")
    named = LabelPlacer(figure, axes)
    for total in totals.values():
        named.avoid_line(list(zip(queries, total, strict=True)))
    for name, value in shown.items():
        height = value * summary[f"flops.{name}"]["value"]
        axes.plot([value], [height], "o", ms=9, mfc="none", mec=INK, mew=1.2, zorder=4)
        named.place_label(f"{format_si(value)} queries", value, height, INK, size=8)
    for name, total in totals.items():
        turn = list(trained).index(name) if name in trained else -1
        place = 8 if turn < 0 else 2 * turn + (10 if turn % 2 == 0 else 20)  # at one of its markers
        named.place_label(shorten_method(name), queries[place], total[place], get_style(name).color, weight="bold")
    return figure
