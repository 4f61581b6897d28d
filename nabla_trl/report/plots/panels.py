"""Small multiples: a panel for each group of methods, for comparisons with too many lines for one pair of axes.

All panels have the same axes. Each shows the lines of its group in color, and those of all other groups in gray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nabla_trl.report.groups import MethodGroup, get_method_group, list_families
from nabla_trl.report.plots.canvas import (
    GRAY,
    HEADER,
    INK,
    NARROW,
    FigureSize,
    PlotPoint,
    add_axes,
    create_figure,
    draw_point,
    format_si_axis,
    get_style,
)

MAX_CURVES, MAX_POINTS = 8, 24  # of one pair of axes
_PANEL_WIDTH, _PANEL_HEIGHT, _TITLE_HEIGHT = NARROW.width, 1.75, 0.24  # inches
_LEFT, _RIGHT, _AXIS_HEIGHT = 0.48, 1.12, 0.5  # margins in inches: numbers, names of curves, the axis at the bottom
_LINE_HEIGHT = 0.125  # inches between names of curves

Curves = Mapping[str, Sequence[PlotPoint]]  # family -> its points


def group_points(points: Sequence[PlotPoint]) -> Curves:
    """Return family -> its points, from left to right."""
    by_method = {point.method: point for point in points}
    curves = {family: [by_method[name] for name in names] for family, names in list_families(by_method).items()}
    return {family: sorted(curve, key=lambda point: point.xy[0]) for family, curve in curves.items()}


def is_crowded(points: Sequence[PlotPoint]) -> bool:
    """Return whether one pair of axes is too small for all points."""
    return len(points) > MAX_POINTS or len(group_points(points)) > MAX_CURVES


def plot_panels(
    points: Sequence[PlotPoint],
    title: str,
    subject: str,
    size: FigureSize,
    *,
    x_label: str,
    y_label: str,
    log_x: bool = True,
) -> Figure:
    """Plot the points of each group in a panel of its own. Panels stand in columns that fit the width of `size`."""
    curves = group_points(points)
    groups: dict[MethodGroup, list[str]] = {}
    for family, curve in curves.items():
        groups.setdefault(get_method_group(curve[-1].method), []).append(family)
    num_columns = max(1, int(size.width / _PANEL_WIDTH))
    num_rows = math.ceil(len(groups) / num_columns)
    height = HEADER + num_rows * _PANEL_HEIGHT + _AXIS_HEIGHT
    figure = create_figure(title, subject, FigureSize(size.width, height))
    first: Axes | None = None
    for number, (group, families) in enumerate(groups.items()):
        row, column = divmod(number, num_columns)
        axes = add_axes(
            figure,
            column * _PANEL_WIDTH + _LEFT,
            row * _PANEL_HEIGHT + _TITLE_HEIGHT,
            _PANEL_WIDTH - _LEFT - _RIGHT,
            _PANEL_HEIGHT - _TITLE_HEIGHT - 0.22,
        )
        axes.set_title(group.title, fontsize=9, fontweight="bold", color=INK, loc="left", pad=4)
        if log_x:
            axes.set_xscale("log")
        if first is None:
            axes.set_ylabel(y_label, fontsize=8)
        else:
            axes.sharex(first)
            axes.sharey(first)
        first = first or axes
        for family, curve in curves.items():
            if family not in families:
                axes.plot(*zip(*(point.xy for point in curve), strict=True), color=GRAY, lw=0.8, alpha=0.35, zorder=1)
                single = len(curve) == 1
                axes.plot(
                    *zip(*(point.xy for point in curve), strict=True), ".", color=GRAY, ms=3, alpha=0.35 + single / 4
                )
        for family in families:
            _draw_curve(axes, curves[family])
        if number >= len(groups) - num_columns:  # nothing below
            axes.set_xlabel(x_label, fontsize=8)
    for axes in figure.axes:
        axes.margins(x=0.06, y=0.08)
        if log_x:
            format_si_axis(axes.xaxis, "", max_ticks=4)
    for axes, families in zip(figure.axes, groups.values(), strict=True):
        _name_curves(axes, {family: curves[family] for family in families})
    return figure


def _draw_curve(axes: Axes, curve: Sequence[PlotPoint]) -> None:
    style = get_style(curve[-1].method)
    axes.plot(
        *zip(*(point.xy for point in curve), strict=True), ls=style.line_style, color=style.color, lw=1.4, zorder=2
    )
    for point in curve:
        draw_point(axes, point, get_style(point.method), size=4)


def _name_curves(axes: Axes, curves: Curves) -> None:
    """Write names to the right of the axes, in the order of the ends of their curves, with lines that lead there."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi  # inches
    ends = {family: (curve[-1].xy[1] - low) / (high - low) * height for family, curve in curves.items()}
    places = spread_out(list(ends.values()), _LINE_HEIGHT, height)
    width = axes.get_window_extent().width / axes.figure.dpi
    for (family, curve), place in zip(curves.items(), places, strict=True):
        color = get_style(curve[-1].method).color
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
