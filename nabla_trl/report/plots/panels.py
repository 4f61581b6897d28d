"""Small multiples: a panel for each group of methods, for comparisons with too many lines for one pair of axes.

All panels have the same axes. Each shows the lines of its group in color, and those of all other groups in gray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nabla_trl.report.groups import METHOD_GROUPS, MethodGroup, get_method_group, list_families
from nabla_trl.report.plots import canvas

MAX_CURVES, MAX_POINTS = 8, 24  # of one pair of axes
_PANEL_HEIGHT, _TITLE_HEIGHT = 1.75, 0.24  # inches
_LEFT, _AXIS_HEIGHT = 0.48, 0.5  # margins in inches: numbers, and the axis at the bottom
_CHARACTER_WIDTH = 0.062  # inches of a character in the name of a curve
_LINE_HEIGHT = 0.125  # inches between names of curves

Curves = Mapping[str, Sequence[canvas.PlotPoint]]  # family -> its points


def group_points(points: Sequence[canvas.PlotPoint]) -> Curves:
    """Return family -> its points, from left to right."""
    by_method = {point.method: point for point in points}
    curves = {family: [by_method[name] for name in names] for family, names in list_families(by_method).items()}
    return {family: sorted(curve, key=lambda point: point.xy[0]) for family, curve in curves.items()}


def is_crowded(points: Sequence[canvas.PlotPoint]) -> bool:
    """Return whether one pair of axes is too small for all points."""
    return len(points) > MAX_POINTS or len(group_points(points)) > MAX_CURVES


def plot_panels(
    points: Sequence[canvas.PlotPoint],
    title: str,
    subject: str,
    size: canvas.FigureSize,
    *,
    x_label: str,
    y_label: str,
    log_x: bool = True,
) -> Figure:
    """Plot the points of each group in a panel of its own, one below the other on a phone, else in two columns."""
    curves = group_points(points)
    groups: dict[MethodGroup, list[str]] = {group: [] for group in METHOD_GROUPS}
    for family, curve in curves.items():
        groups[get_method_group(curve[-1].method)].append(family)
    groups = {group: families for group, families in groups.items() if families}
    right = 0.2 + _CHARACTER_WIDTH * max(map(len, curves))  # the margin for names of curves
    num_columns, panel_width = (1, size.width) if size == canvas.NARROW else (2, 4.1)
    num_rows = math.ceil(len(groups) / num_columns)
    height = canvas.HEADER + num_rows * _PANEL_HEIGHT + _AXIS_HEIGHT
    figure = canvas.create_figure(title, subject, canvas.FigureSize(num_columns * panel_width, height))
    first: Axes | None = None
    for number, (group, families) in enumerate(groups.items()):
        row, column = divmod(number, num_columns)
        axes = canvas.add_axes(
            figure,
            column * panel_width + _LEFT,
            row * _PANEL_HEIGHT + _TITLE_HEIGHT,
            panel_width - _LEFT - right,
            _PANEL_HEIGHT - _TITLE_HEIGHT - 0.22,
        )
        axes.set_title(group.title, fontsize=9, fontweight="bold", color=canvas.INK, loc="left", pad=4)
        if log_x:
            axes.set_xscale("log")
        if first is None:
            axes.set_ylabel(y_label, fontsize=8)
        else:
            axes.sharex(first)
            axes.sharey(first)
        first = first or axes
        _draw_context(axes, [curve for family, curve in curves.items() if family not in families])
        for family in families:
            _draw_curve(axes, curves[family])
        if number >= len(groups) - num_columns:  # nothing below
            axes.set_xlabel(x_label, fontsize=8)
    for axes in figure.axes:
        axes.margins(x=0.06, y=0.08)
        if y_label == "accuracy":
            canvas.limit_to_shares(axes)
        if log_x:
            canvas.format_si_axis(axes.xaxis, "", max_ticks=4)
    for axes, families in zip(figure.axes, groups.values(), strict=True):
        _name_curves(axes, {family: curves[family] for family in families})
    return figure


def _draw_context(axes: Axes, curves: Sequence[Sequence[canvas.PlotPoint]]) -> None:
    """Draw curves in gray, all as one line with gaps, which keeps the page small."""
    look = {"color": canvas.GRAY, "alpha": 0.4, "zorder": 1}
    gap = (math.nan, math.nan)
    lines = [xy for curve in curves for xy in (*(point.xy for point in curve), gap) if len(curve) > 1]
    dots = [curve[0].xy for curve in curves if len(curve) == 1]
    axes.plot(*np.reshape(lines, (-1, 2)).T, lw=0.8, **look)
    axes.plot(*np.reshape(dots, (-1, 2)).T, "o", ms=2.5, mew=0, **look)


def _draw_curve(axes: Axes, curve: Sequence[canvas.PlotPoint]) -> None:
    style = canvas.get_style(curve[-1].method)
    axes.plot(
        *zip(*(point.xy for point in curve), strict=True), ls=style.line_style, color=style.color, lw=1.4, zorder=2
    )
    for point in curve:
        canvas.draw_point(axes, point, canvas.get_style(point.method), size=4, bar_alpha=0.3)


def _name_curves(axes: Axes, curves: Curves) -> None:
    """Write names to the right of the axes, in the order of the ends of their curves, with lines that lead there."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi  # inches
    ends = {family: (curve[-1].xy[1] - low) / (high - low) * height for family, curve in curves.items()}
    places = spread_out(list(ends.values()), _LINE_HEIGHT, height)
    width = axes.get_window_extent().width / axes.figure.dpi
    for (family, curve), place in zip(curves.items(), places, strict=True):
        color = canvas.get_style(curve[-1].method).color
        axes.annotate(
            family,
            curve[-1].xy,
            xytext=(1 + 0.12 / width, place / height),
            textcoords="axes fraction",
            fontsize=7.5,
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def spread_out(places: Sequence[float], gap: float, height: float) -> list[float]:
    """Return places from 0 to `height` near those given, in the same order and at least `gap` apart where they fit.

    Args:
        places: where things should be, in any unit.
        gap: least distance.
        height: end of the space. More things than fit are evenly spaced.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    gap = min(gap, height / max(len(places) - 1, 1))
    free = [
        min(max(places[index] - rank * gap, 0.0), height - gap * (len(places) - 1)) for rank, index in enumerate(order)
    ]
    # What is left without the gaps must only rise: neighbors that would fall share their mean.
    blocks: list[list[float]] = []
    for value in free:
        blocks.append([value])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [mean for block in blocks for mean in [_mean(block)] * len(block)]
    result = [0.0] * len(places)
    for rank, index in enumerate(order):
        result[index] = level[rank] + rank * gap
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
