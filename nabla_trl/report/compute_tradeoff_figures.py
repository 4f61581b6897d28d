"""The figures of training against search: reward and divergence, accuracy against total compute, break-even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from nabla_trl.evaluation.method import family, labels, methods, split
from nabla_trl.report.canvas import INK, STYLES, Labels, Point, canvas, engineering, page, panel, short, style
from nabla_trl.report.compute_tradeoff import (
    KINDS,
    QUERIES,
    TRAINED,
    best_trained,
    best_under,
    of_kind,
    total_flops,
)
from nabla_trl.report.conclusions import bought_in_words
from nabla_trl.report.summary import Summary
from nabla_trl.utils.formatting import si

MOST_QUERIES = 10**6
# Ticks of a divergence in nats, on an axis of its square root.
_NATS = (0, 0.1, 0.25, 0.5, 1, 2, 4, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000)


def figures(summary: Summary, subject: str) -> dict[str, Figure | None]:
    """What the numbers allow to be drawn; nothing without a trained policy."""
    if not labels(methods(summary)):
        return dict.fromkeys(("reward_kl", "total_compute", "break_even"))
    return {
        "reward_kl": reward_kl(summary, subject),
        "total_compute": total_compute(summary, subject),
        "break_even": break_even(summary, subject),
    }


# --- reward and divergence ----------------------------------------------------------------------------


def reward_kl(summary: Summary, subject: str) -> Figure | None:
    """Mean reward against KL to the base policy, over its square root: best-of-N's curve, and trained policies."""
    known = [method for method in methods(summary) if f"kl.{method}" in summary and f"reward.{method}" in summary]
    points = [_against_kl(summary, method) for method in known]
    if not points:
        return None
    figure, axes = canvas(_frontier_title(summary, points), f"{subject}; bars: 95% bootstrap intervals over problems")
    axes.set_xscale("function", functions=(lambda nats: np.sqrt(np.maximum(nats, 0)), np.square))
    axes.set_xlabel("KL to the base policy, nats per response (square-root scale; best-of-N: upper bound)")
    axes.set_ylabel("mean reward of the kept response")
    whose = ["", *labels(known)]
    curves = {label: [point for point in points if split(point.method)[0] == label] for label in whose}
    for label, curve in curves.items():
        curve.sort(key=lambda point: family(split(point.method)[1])[1])
        line = {"lw": 1.5} if not label else {"lw": 1.0, "ls": (0, (2, 2)), "alpha": 0.7}
        colour = (STYLES["best_of"] if not label else style(f"{label}_greedy")).colour
        axes.plot([point.x for point in curve], [point.y for point in curve], color=colour, zorder=2, **line)
    for point in points:
        _draw_point(axes, summary, point)
    axes.set_xlim(0, 1.12 * max(point.x for point in points) + 0.02)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(FixedLocator(_spread_ticks(axes.get_xlim()[1])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
    named = Labels(figure, axes)
    for point in points:
        kl = summary[f"kl.{point.method}"]
        named.avoid_line([(max(0.0, kl["low"]), point.y), (max(0.0, kl["high"]), point.y)], price=1.0)
    _name_points(named, points, curves)
    return figure


def _against_kl(summary: Summary, method: str) -> Point:
    one = summary[f"reward.{method}"]
    # An estimate of a small divergence may come out below zero, where none can be.
    return Point(method, max(0.0, summary[f"kl.{method}"]["value"]), one["value"], one["low"], one["high"])


def _draw_point(axes: Axes, summary: Summary, point: Point) -> None:
    label, rest = split(point.method)
    own = style(f"{label}_greedy" if label and rest == "best_of_1" else point.method)
    kl = summary[f"kl.{point.method}"]
    bars = {"xerr": [[point.x - max(0.0, kl["low"])], [max(0.0, kl["high"]) - point.x]]} if label else {}
    bars["yerr"] = [[point.y - point.low], [point.high - point.y]]
    axes.errorbar(point.x, point.y, **bars, fmt="none", ecolor=own.colour, elinewidth=1, alpha=0.55)
    axes.plot([point.x], [point.y], zorder=3, clip_on=False, **own.look(6.5))


def _spread_ticks(most: float) -> list[float]:
    """Those of `_NATS` that stand well apart on a square-root axis up to `most`, zero first."""
    kept = [0.0]
    for nats in _NATS:
        if nats <= most and math.sqrt(nats) - math.sqrt(kept[-1]) > math.sqrt(most) / 14:
            kept.append(float(nats))
    return kept


def _name_points(named: Labels, points: Sequence[Point], curves: Mapping[str, Sequence[Point]]) -> None:
    for point in points:
        named.avoid_bar(point)
    for curve in curves.values():
        named.avoid_line([(point.x, point.y) for point in curve])
    for label, curve in curves.items():
        for point in curve:
            first, last = point is curve[0], point is curve[-1]
            text = label if label and first else short(point.method) if label else _on_curve(point.method, last)
            weight = "bold" if first else "normal"
            named.place(text, point.x, point.y, style(point.method).colour, weight=weight, size=8 if first else 7)


def _on_curve(method: str, last: bool) -> str:
    """Of best-of-N's curve the beginning and the end are named; between them N is enough."""
    size = family(method)[1]
    return "base" if size == 1 else f"best of {size:g}" if last else f"{size:g}"


def _frontier_title(summary: Summary, points: Sequence[Point]) -> str:
    curve = [point for point in points if not split(point.method)[0]]
    sampled = [point for point in points if point not in curve and split(point.method)[1] == "best_of_1"]
    best = max(sampled, key=lambda point: point.y, default=None)
    parts = [f"{split(best.method)[0]} {best.y:.2f} at {best.x:.2f} nats"] if best else []
    if curve:
        end = max(curve, key=lambda point: point.x)
        parts.append(f"{end.method} {end.y:.2f} at ≤ {end.x:.2f}")
    return f"Mean reward by divergence: {', '.join(parts)}"


# --- total compute ------------------------------------------------------------------------------------


def total_compute(summary: Summary, subject: str) -> Figure | None:
    """A panel for each number of queries: every method's accuracy against its total FLOPs, and the best of them."""
    if all(total_flops(summary, method, 0) is None for method in of_kind(summary, TRAINED)):
        return None
    title = bought_in_words(summary) or "Accuracy against total FLOPs"
    figure = page(title, f"{subject}; steps: the highest accuracy that a total of FLOPs can buy, training included")
    for number, queries in enumerate(QUERIES):
        left, bottom = 0.085 + 0.475 * (number % 2), 0.52 - 0.41 * (number // 2)
        axes = panel(figure, (left, bottom, 0.42, 0.32))
        _totals(figure, axes, summary, queries)
        if number % 2 == 0:
            axes.set_ylabel("accuracy")
        if number // 2:
            axes.set_xlabel("total FLOPs (log scale)")
    return figure


def _totals(figure: Figure, axes: Axes, summary: Summary, queries: int) -> None:
    axes.set_xscale("log")
    axes.set_title(_count(queries), fontsize=9, color=INK, loc="left", pad=3)
    totals = {method: total_flops(summary, method, queries) for method in of_kind(summary, *KINDS)}
    for method, total in totals.items():
        if total:
            axes.plot([total], [summary[f"accuracy.{method}"]["value"]], zorder=3, alpha=0.9, **style(method).look(4))
    best = best_under(summary, queries)
    heights = [summary[f"accuracy.{one.method}"]["value"] for one in best]
    axes.margins(x=0.12, y=0.16)
    end = axes.get_xlim()[1]
    corners = [(one.total, height) for one, height in zip(best, heights, strict=True)]
    stairs = [corners[0]]
    for (total, height), (_, before) in zip(corners[1:], corners, strict=False):
        stairs += [(total, before), (total, height)]
    stairs.append((end, heights[-1]))
    axes.plot(*zip(*stairs, strict=True), color=INK, lw=1.1, zorder=2)
    axes.set_xlim(right=end)
    engineering(axes.xaxis, "")
    named = Labels(figure, axes)
    for method, total in totals.items():
        if total:
            height = summary[f"accuracy.{method}"]["value"]
            named.avoid_bar(Point(method, total, height, height, height))
    named.avoid_line(stairs)
    firsts = {family(one.method)[0]: one for one in reversed(best)}
    for one, corner in zip(best, corners, strict=True):
        if one in (best[-1], firsts[family(one.method)[0]]):  # there is no room for more
            named.place(short(one.method), *corner, style(one.method).colour, size=7)


def _count(queries: int) -> str:
    return f"{si(queries)} quer{'y' if queries == 1 else 'ies'}"


# --- break-even ---------------------------------------------------------------------------------------


def break_even(summary: Summary, subject: str) -> Figure | None:
    """Total FLOPs against queries: greedy decodes of trained policies, and what they are trained to replace."""
    greedy = [method for method in of_kind(summary, TRAINED) if split(method)[1] == "greedy"]
    trained = {method: spent for method in greedy if (spent := total_flops(summary, method, 0)) is not None}
    rivals = [name for name in ("best_of_16", "nabla", "greedy") if f"flops.{name}" in summary]
    if not trained or not rivals:
        return None
    own = best_trained(summary)
    own = own if own in trained else next(iter(trained))
    crossings = {name: summary.get(f"break_even.{own}-{name}", {"value": math.inf})["value"] for name in rivals}
    shown = {name: value for name, value in crossings.items() if 1 <= value <= MOST_QUERIES}
    paid = ", ".join(f"{si(value)} against {name}" for name, value in shown.items())
    title = f"Queries until {own} is paid back: {paid}" if paid else "Total FLOPs against queries answered"
    figure, axes = canvas(
        title, f"{subject}; training once, then FLOPs per query; trained policies decode greedily", left=0.15
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("queries answered (log scale)")
    axes.set_ylabel("total FLOPs, training included (log scale)")
    queries = np.logspace(0, math.log10(MOST_QUERIES), 61)
    paid_once = dict.fromkeys(rivals, 0.0) | trained
    totals = {name: once + queries * summary[f"flops.{name}"]["value"] for name, once in paid_once.items()}
    for name, total in totals.items():
        look = style(name)
        axes.plot(queries, total, ls=look.line, color=look.colour, lw=1.7)
        first = 2 * list(trained).index(name) if name in trained else 0  # level lines lie close: markers side by side
        axes.plot(queries[first::10], total[first::10], ls="", clip_on=False, zorder=3, **look.look(5))
    axes.set_xlim(1, MOST_QUERIES)
    engineering(axes.xaxis, "")
    engineering(axes.yaxis, "FLOPs")
    named = Labels(figure, axes)
    for total in totals.values():
        named.avoid_line(list(zip(queries, total, strict=True)))
    for name, value in shown.items():
        height = value * summary[f"flops.{name}"]["value"]
        axes.plot([value], [height], "o", ms=9, mfc="none", mec=INK, mew=1.2, zorder=4)
        named.place(f"{si(value)} queries", value, height, INK, size=8)
    for name, total in totals.items():
        turn = list(trained).index(name) if name in trained else -1
        place = 8 if turn < 0 else 2 * turn + (10 if turn % 2 == 0 else 20)  # at one of its markers
        named.place(short(name), queries[place], total[place], style(name).colour, weight="bold")
    return figure
