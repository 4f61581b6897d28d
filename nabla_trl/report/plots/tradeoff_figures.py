"""The figures of training against search: reward and divergence, accuracy against total compute, break-even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from nabla_trl.evaluation.method import Method, list_methods, list_policy_labels
from nabla_trl.report.compute_tradeoff import (
    QUERY_COUNTS,
    TRADEOFF_FIGURES,
    compute_total_flops,
    describe_best_for_budget,
    find_best_by_total,
)
from nabla_trl.report.plots import canvas
from nabla_trl.report.summary import (
    KIND_TRAINED,
    Summary,
    find_best_trained,
    get_value,
    list_trained_greedy,
    select_methods_of_kind,
)
from nabla_trl.utils.formatting import format_count

MAX_QUERIES = 10**6
# Ticks of a divergence in nats, on an axis of its square root.
_KL_TICKS = (0.1, 0.25, 0.5, 1, 2, 4, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000)


def plot_tradeoff_figures(
    summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE
) -> dict[str, Figure | None]:
    """Return the figures by name, None where the numbers do not allow one, or no policy was trained."""
    if not list_policy_labels(list_methods(summary)):
        return dict.fromkeys(TRADEOFF_FIGURES)
    return {
        "reward_kl": plot_reward_kl(summary, subject, size),
        "total_compute": plot_total_compute(summary, subject, size),
        "break_even": plot_break_even(summary, subject, size),
    }


# --- reward and divergence ----------------------------------------------------------------------------


def plot_reward_kl(summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE) -> Figure | None:
    """Plot the mean reward against KL to the base policy: the curve of best-of-N, and the trained policies."""
    # An estimate of a small divergence may be below zero, where no divergence can be.
    points = [
        replace(point, x={side: max(0.0, point.x[side]) for side in ("value", "low", "high")})
        for point in canvas.collect_points(summary, "kl", "reward")
    ]
    if not points:
        return None
    curves: dict[str, list[canvas.PlotPoint]] = {}  # of each policy, by its label
    for label in ["", *list_policy_labels(point.method for point in points)]:
        curve = [point for point in points if point.parsed.policy == label]
        curves[label] = sorted(curve, key=lambda point: point.parsed.size)
    title = _build_frontier_title(curves)
    figure, axes = canvas.create_figure_with_axes(title, f"{subject}; bars: 95% intervals over problems", size)
    axes.set_xscale("function", functions=(lambda nats: np.sqrt(np.maximum(nats, 0)), np.square))
    axes.set_xlabel(
        "KL to the base policy, nats per response (square-root scale; best-of-N: upper bound)"
        if size == canvas.WIDE
        else "KL to the base policy, nats per response"
    )
    axes.set_ylabel("mean reward of the selected response")
    for label, curve in curves.items():
        line = {"lw": 1.0, "ls": (0, (2, 2)), "alpha": 0.7} if label else {"lw": 1.5}
        color = canvas.get_style(f"{label}_greedy").color if label else canvas.METHOD_STYLES["best_of"].color
        axes.plot([point.xy[0] for point in curve], [point.xy[1] for point in curve], color=color, zorder=2, **line)
        for point in curve:
            single = label and point.parsed.size == 1
            style = canvas.get_style(f"{label}_greedy" if single else point.method)
            canvas.draw_point(axes, point, style, size=6.5, x_bar=bool(label))
    axes.set_xlim(0, 1.12 * max(point.xy[0] for point in points) + 0.02)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(FixedLocator(_select_ticks(axes.get_xlim()[1], 14 if size == canvas.WIDE else 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    _label_kl_points(canvas.LabelPlacer(figure, axes), curves)
    return figure


def _select_ticks(max_kl: float, max_ticks: int) -> list[float]:
    """Return zero and at most `max_ticks` of `_KL_TICKS`, well apart on a square-root axis up to `max_kl`."""
    ticks = [0.0]
    for nats in _KL_TICKS:
        if nats <= max_kl and math.sqrt(nats) - math.sqrt(ticks[-1]) > math.sqrt(max_kl) / max_ticks:
            ticks.append(float(nats))
    return ticks


def _label_kl_points(labels: canvas.LabelPlacer, curves: Mapping[str, Sequence[canvas.PlotPoint]]) -> None:
    for curve in curves.values():
        for point in curve:
            labels.avoid_line([(point.x["low"], point.xy[1]), (point.x["high"], point.xy[1])], penalty=1.0)
            labels.avoid_bar(point)
        labels.avoid_line([point.xy for point in curve])
    for label, curve in curves.items():
        for number, point in enumerate(curve):
            first, last, num_samples = number == 0, point is curve[-1], point.parsed.size
            if label:
                text = label if first else canvas.shorten_method(point.method)
            else:  # between the ends of best-of-N's curve, N is enough
                text = "base" if num_samples == 1 else f"best of {num_samples:g}" if last else f"{num_samples:g}"
            weight, size = ("bold", 8) if first else ("normal", 7)
            labels.place_label(text, *point.xy, canvas.get_style(point.method).color, weight=weight, size=size)


def _build_frontier_title(curves: Mapping[str, Sequence[canvas.PlotPoint]]) -> str:
    singles = [point for label in curves if label for point in curves[label] if point.parsed.size == 1]
    best = max(singles, key=lambda point: point.xy[1], default=None)
    parts = [f"{best.parsed.policy} {best.xy[1]:.2f} at {best.xy[0]:.2f} nats"] if best else []
    if curves[""]:
        end = max(curves[""], key=lambda point: point.xy[0])
        parts.append(f"{end.method} {end.xy[1]:.2f} at ≤ {end.xy[0]:.2f}")
    return f"Mean reward by divergence: {', '.join(parts)}"


# --- total compute ------------------------------------------------------------------------------------


def plot_total_compute(summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE) -> Figure | None:
    """Plot every method's accuracy against its total FLOPs, and the best methods, for several numbers of queries."""
    trained = select_methods_of_kind(summary, KIND_TRAINED)
    if all(math.isnan(compute_total_flops(summary, method, 0)) for method in trained):
        return None
    title = describe_best_for_budget(summary) or "Accuracy against total FLOPs"
    subject = f"{subject}; steps: highest accuracy within a total of FLOPs, training included"
    num_columns = 2 if size == canvas.WIDE else 1
    num_rows = len(QUERY_COUNTS) // num_columns
    figure = canvas.create_figure(title, subject, canvas.FigureSize(size.width, canvas.HEADER + 1.94 * num_rows + 0.2))
    for number, queries in enumerate(QUERY_COUNTS):
        row, column = divmod(number, num_columns)
        axes = canvas.add_axes(figure, 0.58 + 3.45 * column, 0.1 + 1.94 * row, 2.95, 1.5)
        axes.set_xlabel("total FLOPs (log scale)" if row == num_rows - 1 else "")
        axes.set_ylabel("" if column else "accuracy")
        _plot_totals(figure, axes, summary, queries)
    return figure


def _plot_totals(figure: Figure, axes: Axes, summary: Summary, queries: int) -> None:
    axes.set_xscale("log")
    name = f"{format_count(queries)} quer{'y' if queries == 1 else 'ies'}"
    axes.set_title(name, fontsize=9, color=canvas.INK, loc="left", pad=3)
    points = {}
    for method in list_methods(summary):
        total, accuracy = compute_total_flops(summary, method, queries), get_value(summary, "accuracy", method)
        if total > 0:  # and known
            points[method] = canvas.PlotPoint(
                method, {"value": total}, {"low": accuracy, "value": accuracy, "high": accuracy}
            )
    for method, point in points.items():
        canvas.draw_marker(axes, point, canvas.get_style(method), 4)
    best = find_best_by_total(summary, queries)
    corners = [points[method].xy for _, method in best]
    axes.margins(x=0.12, y=0.16)
    canvas.limit_to_shares(axes)
    end = axes.get_xlim()[1]
    axes.set_xlim(right=end)
    stairs = [corners[0]]
    for (total, height), (_, height_before) in zip(corners[1:], corners, strict=False):
        stairs += [(total, height_before), (total, height)]
    stairs.append((end, corners[-1][1]))
    axes.plot(*zip(*stairs, strict=True), color=canvas.INK, lw=1.1, zorder=2)
    canvas.format_si_axis(axes.xaxis, "")
    labels = canvas.LabelPlacer(figure, axes)
    for point in points.values():
        labels.avoid_bar(point)
    labels.avoid_line(stairs)
    # Only the last step and the first step of each family have a label, as there is no space for more.
    families = {Method.parse(method).family: method for _, method in reversed(best)}
    for (_, method), corner in zip(best, corners, strict=True):
        if method in (best[-1].method, *families.values()):
            labels.place_label(canvas.shorten_method(method), *corner, canvas.get_style(method).color, size=7)


# --- break-even ---------------------------------------------------------------------------------------


def plot_break_even(summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE) -> Figure | None:
    """Plot total FLOPs against queries, for trained greedy decodes and for what they are trained to replace."""
    trained = {method: compute_total_flops(summary, method, 0) for method in list_trained_greedy(summary)}
    trained = {method: flops for method, flops in trained.items() if math.isfinite(flops)}
    baselines = [name for name in ("best_of_16", "nabla", "greedy") if f"flops.{name}" in summary]
    if not trained or not baselines:
        return None
    best = find_best_trained(summary)
    best = best if best in trained else next(iter(trained))
    crossings = {name: get_value(summary, "break_even", f"{best}-{name}") for name in baselines}
    crossings = {name: queries for name, queries in crossings.items() if 1 <= queries <= MAX_QUERIES}
    parts = [f"{format_count(queries)} queries against {name}" for name, queries in crossings.items()]
    title = f"Break-even of {best}: {', '.join(parts)}" if parts else "Total FLOPs against queries answered"
    figure, axes = canvas.create_figure_with_axes(
        title,
        f"{subject}; training once, then FLOPs per query; trained policies decode greedily",
        size,
        left=1.08 if size == canvas.WIDE else 0.72,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("queries answered (log scale)")
    axes.set_ylabel("total FLOPs, training included (log scale)" if size == canvas.WIDE else "total FLOPs (log scale)")
    queries = np.logspace(0, math.log10(MAX_QUERIES), 61)
    methods = [*baselines, *trained]
    totals = {m: trained.get(m, 0.0) + queries * get_value(summary, "flops", m) for m in methods}
    for method, total in totals.items():
        style = canvas.get_style(method)
        axes.plot(queries, total, ls=style.line_style, color=style.color, lw=1.7)
        # Level lines lie close to each other, so their markers stand side by side.
        first = 2 * list(trained).index(method) if method in trained else 0
        axes.plot(queries[first::10], total[first::10], ls="", clip_on=False, zorder=3, **style.get_marker_options(5))
    axes.set_xlim(1, MAX_QUERIES)
    canvas.format_si_axis(axes.xaxis, "")
    canvas.format_si_axis(axes.yaxis, "FLOPs" if size == canvas.WIDE else "")
    labels = canvas.LabelPlacer(figure, axes)
    for total in totals.values():
        labels.avoid_line(list(zip(queries, total, strict=True)))
    for name, crossing in crossings.items():
        height = crossing * get_value(summary, "flops", name)
        axes.plot([crossing], [height], "o", ms=9, mfc="none", mec=canvas.INK, mew=1.2, zorder=4)
        labels.place_label(f"{format_count(crossing)} queries", crossing, height, canvas.INK, size=8)
    for method, total in totals.items():
        number = list(trained).index(method) if method in trained else -1
        at = 8 if number < 0 else 2 * number + (10 if number % 2 == 0 else 20)  # beside one of its markers
        labels.place_label(
            canvas.shorten_method(method), queries[at], total[at], canvas.get_style(method).color, weight="bold"
        )
    return figure
