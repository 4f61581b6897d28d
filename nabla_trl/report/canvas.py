"""The house style of figures, drawn with matplotlib's object interface (Agg): no window, no global state.

Colours are those of Okabe and Ito; every family also has its own marker and line, so that the figures read in
grey. Names stand beside what they name: `Labels` puts each where it covers least.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from nabla_trl.evaluation.method import parse_family, split_label

INK, GRAY = "#222222", "#6b6b6b"
DPI = 150
MIN_LEADER_PENALTY = 6.0  # a label at this price or more stands too far off to be read without a line


@dataclass(frozen=True)
class MethodStyle:
    """How a family looks; `hollow` markers are white inside."""

    color: str
    marker: str
    line_style: object = "-"
    marker_scale: float = 1.0  # so that thin shapes look as large as full ones
    hollow: bool = False

    def get_marker_options(self, size: float) -> dict[str, object]:
        """Options of a marker of about `size` points."""
        inside, edge, width = ("white", self.color, 0.9) if self.hollow else (self.color, "white", 0.6)
        return {"marker": self.marker, "ms": size * self.marker_scale, "mfc": inside, "mec": edge, "mew": width}


_PURPLE = "#8E4585"  # searches over steps; reddish purple, darkened until text in it can be read
METHOD_STYLES = {
    "best_of": MethodStyle("#0072B2", "o"),
    "weighted_best_of": MethodStyle("#0072B2", "h", marker_scale=1.2),
    "nabla": MethodStyle("#D55E00", "s"),
    "control": MethodStyle("#B07500", "^", (0, (4, 2))),  # orange, darkened until text in it can be read
    "greedy": MethodStyle("#000000", "D", (0, (1, 1.5))),
    "self_consistency": MethodStyle("#56B4E9", "p", marker_scale=1.2),
    "reward_model_sampling": MethodStyle("#CC79A7", "X", marker_scale=1.35),
    "beam_search": MethodStyle(_PURPLE, "<", (0, (5, 1.5)), marker_scale=1.2),
    "dvts": MethodStyle(_PURPLE, "v", (0, (3, 1, 1, 1)), marker_scale=1.2),
    "tot": MethodStyle(_PURPLE, "P", (0, (1, 1)), marker_scale=1.3),
    "rap": MethodStyle(_PURPLE, "H", (0, (8, 2)), marker_scale=1.2),
}
_GREEN = "#009E73"
_TRAINED_STYLES = {
    "distilled": MethodStyle(_GREEN, "*", (0, (6, 1.5, 1, 1.5)), marker_scale=1.9),
    "sft": MethodStyle(_GREEN, "*", (0, (6, 1.5, 1, 1.5)), marker_scale=1.9),
    "reward_weighted": MethodStyle(_GREEN, "P", (0, (6, 1.5, 1, 1.5, 1, 1.5)), marker_scale=1.35),
    "dpo": MethodStyle(_GREEN, "X", (0, (3, 1.5)), marker_scale=1.35),
    "rloo": MethodStyle(_GREEN, "d", (0, (8, 2)), marker_scale=1.25),
    "grpo": MethodStyle(_GREEN, ">", (0, (2, 1)), marker_scale=1.2),
}
_DEFAULT_STYLE = MethodStyle(GRAY, "v")
CURVE_FAMILIES = ("best_of", "control", "nabla")


def get_style(method: str) -> MethodStyle:
    """Trained policies have one colour and a marker each, hollow where they go on to sample or search."""
    label, rest = split_label(method)
    if label:
        return replace(_TRAINED_STYLES[label], hollow=rest != "greedy")
    return METHOD_STYLES.get(parse_family(method)[0], METHOD_STYLES.get(method, _DEFAULT_STYLE))


def shorten_method(method: str) -> str:
    """A method's name in a figure: a trained policy's greedy decode goes by its label alone."""
    label, rest = split_label(method)
    if not label or rest == "greedy":
        return label or method
    return f"{label} {'sampled' if rest == 'best_of_1' else rest.replace('best_of_', 'best of ')}"


@dataclass(frozen=True)
class PlotPoint:
    method: str
    x: float
    y: float
    low: float
    high: float


def create_figure_with_axes(title: str, subject: str, left: float = 0.1) -> tuple[Figure, Axes]:
    figure = create_figure(title, subject)
    return figure, add_axes(figure, (left, 0.11, 0.97 - left, 0.74))


def create_figure(title: str, subject: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.8), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.92, textwrap.fill(title, 95), fontsize=9, fontweight="bold", color=INK, va="bottom")
    figure.text(0.02, 0.885, subject, fontsize=8, color=GRAY, va="bottom")
    return figure


def add_axes(figure: Figure, bounds: tuple[float, float, float, float]) -> Axes:
    """Axes in the house style; `place` is left, bottom, width and height as shares of the page."""
    axes = figure.add_axes(bounds)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(colors=GRAY, labelsize=8, which="both")
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def format_si_axis(axis: Axis, unit: str) -> None:
    """SI prefixes on a logarithmic axis; where it spans little, ticks at 2 and 5 as well as at 1."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    axis.set_minor_formatter(NullFormatter())


class LabelPlacer:
    """Places texts one after another, each where it covers least of what is drawn or written already."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        figure.draw_without_rendering()  # fixes the limits, so that data has its place in pixels
        axes.autoscale(False)
        self.figure, self.axes = figure, axes
        self.occupied_boxes: list[tuple[float, float, float, float]] = []
        self.obstacles = np.zeros((0, 3))  # x, y and the price of covering it

    def avoid_line(self, points: Sequence[tuple[float, float]], penalty: float = 4.0) -> None:
        """Keep texts off the straight segments between the points."""
        ends = self.axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
        for a, b in pairwise(ends):
            steps = np.linspace(0, 1, max(2, int(np.hypot(*(b - a)) / 3)))[:, None]
            dots = np.insert(a + steps * (b - a), 2, penalty, axis=1)
            self.obstacles = np.concatenate([self.obstacles, dots])

    def avoid_bar(self, point: PlotPoint) -> None:
        """Keep texts off a marker and, less strictly, off its interval bar."""
        self.avoid_line([(point.x, point.low), (point.x, point.high)], penalty=1.0)
        x, y = self.axes.transData.transform((point.x, point.y))
        self.occupied_boxes.append((x - 7, y - 7, x + 7, y + 7))

    def place_label(
        self, text: str, x: float, y: float, color: str, *, size: float = 9, weight: str = "normal"
    ) -> None:
        """Write `text` near the data point (x, y), with a thin line to it where it can't stand beside it."""
        look = {"fontsize": size, "fontweight": weight, "color": color, "ha": "center", "va": "center"}
        label = self.axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", zorder=5, **look)
        label.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
        extent = label.get_window_extent(self.figure.canvas.get_renderer())
        anchor = self.axes.transData.transform((x, y))
        offsets = _list_offsets(extent.width, extent.height)
        boxes = [_make_box(anchor + offset, extent.width, extent.height) for offset, _ in offsets]
        prices = [self._compute_penalty(box) + far for box, (_, far) in zip(boxes, offsets, strict=True)]
        best = int(np.argmin(prices))
        to_points = 72 / self.figure.dpi  # which stand where they should whatever a figure is saved at
        label.set_position(tuple(offsets[best][0] * to_points))
        self.occupied_boxes.append(boxes[best])
        if offsets[best][1] >= MIN_LEADER_PENALTY:
            left, bottom, right, top = boxes[best]
            near = np.clip(anchor, (left, bottom), (right, top)) - anchor
            line = {"arrowstyle": "-", "color": GRAY, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
            self.axes.annotate("", (x, y), xytext=tuple(near * to_points), textcoords="offset points", arrowprops=line)

    def _compute_penalty(self, box: tuple[float, float, float, float]) -> float:
        left, bottom, right, top = box
        frame = self.axes.bbox
        outside = max(0, frame.x0 + 3 - left) + max(0, right - self.figure.bbox.x1 + 4)
        outside += max(0, top - frame.y1 - 4) + max(0, frame.y0 + 3 - bottom)
        covered = sum(
            max(0, min(right, r) - max(left, x)) * max(0, min(top, t) - max(bottom, b))
            for x, b, r, t in self.occupied_boxes
        )
        xy = self.obstacles[:, :2]
        inside = ((xy > (left - 1, bottom - 1)) & (xy < (right + 1, top + 1))).all(axis=1)
        return 200.0 * outside + 5.0 * covered + float(self.obstacles[inside, 2].sum())


def _list_offsets(width: float, height: float) -> list[tuple[np.ndarray, float]]:
    """Places round a point for a text of this size in pixels, each with a price that grows with distance."""
    places = []
    for ring, gap in enumerate((11.0, 18.0, 30.0, 46.0)):
        for turn in range(16):
            angle = 2 * math.pi * turn / 16
            away = np.array([math.cos(angle), math.sin(angle)])
            offset = away * (np.array([width, height]) / 2 + gap)
            places.append((offset, 3.0 * ring + (0.0 if turn % 4 == 0 else 0.5)))
    return places


def _make_box(center: np.ndarray, width: float, height: float) -> tuple[float, float, float, float]:
    x, y = center
    return (x - width / 2 - 1, y - height / 2 - 1, x + width / 2 + 1, y + height / 2 + 1)
