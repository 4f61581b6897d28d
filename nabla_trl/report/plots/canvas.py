"""The house style of figures, drawn with matplotlib's object interface (Agg): no window and no global state.

Colors are those of Okabe and Ito. Every family also has its own marker and line, so that figures can be read in gray.
Names stand beside what they name: `LabelPlacer` puts each where it covers least.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from nabla_trl.evaluation.method import Method, list_methods
from nabla_trl.report.summary import Summary

INK, GRAY = "#222222", "#6b6b6b"
DPI = 150
MIN_LEADER_PENALTY = 6.0  # a label with this penalty or more is so far off that it needs a leader line


@dataclass(frozen=True)
class MethodStyle:
    """How a family is drawn. Hollow markers are white inside."""

    color: str
    marker: str
    line_style: object = "-"
    marker_scale: float = 1.0  # so that thin shapes look as large as full ones
    hollow: bool = False

    def get_marker_options(self, size: float) -> dict[str, object]:
        """Return matplotlib's options of a marker of about `size` points."""
        inside, edge, width = ("white", self.color, 0.9) if self.hollow else (self.color, "white", 0.6)
        return {"marker": self.marker, "ms": size * self.marker_scale, "mfc": inside, "mec": edge, "mew": width}


# Colors that can be read as text on white. `nabla_trl.report.html.figures` has their names in the page's style sheet.
BLUE, VERMILION, ORANGE, TEAL, PINK, PLUM = "#0072b2", "#b84a00", "#8f5e00", "#00798c", "#b0468a", "#8e4585"
GREEN, INDIGO, OLIVE, RED, BROWN = "#007a58", "#4b4fc4", "#6b7000", "#b3261e", "#8a4b2a"
METHOD_STYLES = {
    "greedy": MethodStyle("#000000", "D", (0, (1, 1.5))),
    "budget_forcing": MethodStyle(TEAL, "^", (0, (4, 2))),
    "reward_model_sampling": MethodStyle(PINK, "X", marker_scale=1.35),
    "best_of": MethodStyle(BLUE, "o"),
    "weighted_best_of": MethodStyle(INDIGO, "h", (0, (5, 1.5)), marker_scale=1.2),
    "self_consistency": MethodStyle(TEAL, "p", (0, (3, 1.5)), marker_scale=1.2),
    "adaptive_consistency": MethodStyle(OLIVE, "v", (0, (1, 1))),
    "dirichlet_consistency": MethodStyle(BROWN, "^", (0, (5, 1.5))),
    "confidence_vote": MethodStyle(PINK, "d", (0, (3, 1, 1, 1)), marker_scale=1.2),
    "self_certainty": MethodStyle(RED, "s", (0, (2, 1))),
    "deepconf_tail": MethodStyle(PLUM, "<", (0, (8, 2)), marker_scale=1.2),
    "deepconf_bottom": MethodStyle(ORANGE, ">", (0, (1, 1)), marker_scale=1.2),
    "deepconf_online": MethodStyle("#000000", "P", (0, (6, 1.5, 1, 1.5)), marker_scale=1.2),
    "nabla": MethodStyle(VERMILION, "s"),
    "control": MethodStyle(ORANGE, "^", (0, (4, 2))),
    "shuffled": MethodStyle(OLIVE, "v", (0, (2, 1))),
    "paper": MethodStyle(BROWN, "P", (0, (5, 1.5)), marker_scale=1.2),
    "released": MethodStyle(RED, "X", (0, (1, 1)), marker_scale=1.2),
    "qalign": MethodStyle(PINK, "d", (0, (3, 1, 1, 1)), marker_scale=1.2),
    "beam_search": MethodStyle(PLUM, "<", (0, (5, 1.5)), marker_scale=1.2),
    "dvts": MethodStyle(RED, "v", (0, (3, 1, 1, 1)), marker_scale=1.2),
    "tot": MethodStyle(BROWN, "P", (0, (1, 1)), marker_scale=1.3),
    "rap": MethodStyle(TEAL, "H", (0, (8, 2)), marker_scale=1.2),
    "particle_filter": MethodStyle(OLIVE, ">", (0, (3, 1.5)), marker_scale=1.2),
    "entropic_particle_filter": MethodStyle(INDIGO, "p", (0, (8, 2)), marker_scale=1.2),
    "entropy_branching": MethodStyle(PINK, "d", (0, (2, 1)), marker_scale=1.2),
    "ggro": MethodStyle(ORANGE, "^", (0, (4, 2))),
    "low_temperature": MethodStyle(TEAL, "p", (0, (3, 1.5)), marker_scale=1.2),
    "power_smc": MethodStyle(PLUM, ">", (0, (5, 1.5)), marker_scale=1.2),
    "power_uniform": MethodStyle(BROWN, "v", (0, (1, 1))),
    "power_entropy": MethodStyle(OLIVE, "^", (0, (4, 2))),
    "power_jump": MethodStyle(RED, "d", (0, (3, 1, 1, 1)), marker_scale=1.2),
    "power_gradient": MethodStyle(INDIGO, "s"),
}
_TRAINED_STYLES = {
    "distilled": MethodStyle(GREEN, "*", (0, (6, 1.5, 1, 1.5)), marker_scale=1.9),
    "sft": MethodStyle(GREEN, "*", (0, (6, 1.5, 1, 1.5)), marker_scale=1.9),
    "reward_weighted": MethodStyle(GREEN, "P", (0, (6, 1.5, 1, 1.5, 1, 1.5)), marker_scale=1.35),
    "dpo": MethodStyle(GREEN, "X", (0, (3, 1.5)), marker_scale=1.35),
    "soft_targets": MethodStyle(GREEN, "h", (0, (1, 1)), marker_scale=1.25),
    "rloo": MethodStyle(GREEN, "d", (0, (8, 2)), marker_scale=1.25),
    "grpo": MethodStyle(GREEN, ">", (0, (2, 1)), marker_scale=1.2),
    "on_policy_distillation": MethodStyle(GREEN, "p", (0, (4, 1, 1, 1)), marker_scale=1.25),
}
# Of families without a style of their own. The name decides, so that a family looks the same in every report.
_OTHER_STYLES = [
    MethodStyle(color, marker, line_style)
    for color, marker, line_style in zip(
        (INDIGO, BROWN, TEAL, PINK, OLIVE, RED, PLUM), "v<>dphH", ("-", (0, (5, 1.5)), (0, (3, 1.5))) * 3, strict=False
    )
]
CURVE_FAMILIES = ("best_of", "control", "nabla")


def get_style(method: str) -> MethodStyle:
    """Return how a method is drawn. Trained policies share a color, and are hollow where they sample or search."""
    parsed = Method.parse(method)
    if parsed.policy:
        return replace(_TRAINED_STYLES[parsed.policy], hollow=parsed.name != "greedy")
    return METHOD_STYLES.get(parsed.name) or _OTHER_STYLES[zlib.crc32(parsed.name.encode()) % len(_OTHER_STYLES)]


def shorten_method(method: str) -> str:
    """Return a method's name in a figure. A trained policy's greedy decode has its label as its name."""
    parsed = Method.parse(method)
    if not parsed.policy or parsed.name == "greedy":
        return parsed.policy or method
    name = str(parsed.base_method)
    return f"{parsed.policy} {'sampled' if name == 'best_of_1' else name.replace('best_of_', 'best of ')}"


@dataclass(frozen=True)
class PlotPoint:
    """A method at an x and a y, each an entry of a summary: {"value", "low", "high"}."""

    method: str
    x: Mapping[str, float]
    y: Mapping[str, float]

    @property
    def parsed(self) -> Method:
        return Method.parse(self.method)

    @property
    def xy(self) -> tuple[float, float]:
        return self.x["value"], self.y["value"]


def collect_points(summary: Summary, x_metric: str, y_metric: str) -> list[PlotPoint]:
    """Return a point per method of which both metrics are known, in the order of the report."""
    keys = {method: (f"{x_metric}.{method}", f"{y_metric}.{method}") for method in list_methods(summary)}
    return [
        PlotPoint(method, fill_unknown_ends(summary[x]), fill_unknown_ends(summary[y]))
        for method, (x, y) in keys.items()
        if {x, y} <= summary.keys()
    ]


def fill_unknown_ends(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return an entry of a summary in which an end that is not known (None) is the value itself."""
    return {end: entry["value"] if entry[end] is None else entry[end] for end in ("value", "low", "high")}


def draw_marker(axes: Axes, point: PlotPoint, style: MethodStyle, size: float) -> None:
    """Draw a marker. The page finds it by its id."""
    x, y = point.xy
    axes.plot([x], [y], ls="", zorder=3, clip_on=False, gid=f"method {point.method}", **style.get_marker_options(size))


def draw_point(
    axes: Axes, point: PlotPoint, style: MethodStyle, *, size: float = 6, x_bar: bool = False, bar_alpha: float = 0.5
) -> None:
    """Draw a marker with the interval of y as a bar, and with that of x if asked for."""
    (x, y), ends = point.xy, point.y
    bars = {"yerr": [[y - ends["low"]], [ends["high"] - y]]}
    if x_bar:
        bars["xerr"] = [[x - point.x["low"]], [point.x["high"] - x]]
    axes.errorbar(x, y, **bars, fmt="none", ecolor=style.color, elinewidth=1, alpha=bar_alpha)
    draw_marker(axes, point, style, size)


def draw_band(
    axes: Axes,
    xs: Sequence[float],
    entries: Sequence[Mapping[str, float]],
    style: MethodStyle,
    *,
    line_style: object = None,
    markers: bool = True,
) -> list[tuple[float, float]]:
    """Draw a curve with its intervals as a band. Returns the points of the curve."""
    filled = map(fill_unknown_ends, entries)
    low, value, high = np.array([[entry[side] for side in ("low", "value", "high")] for entry in filled]).T
    axes.fill_between(xs, low, high, color=style.color, alpha=0.14, lw=0)
    marker = style.get_marker_options(5) if markers else {}
    axes.plot(xs, value, ls=line_style or style.line_style, color=style.color, lw=1.5, **marker)
    return list(zip(xs, value, strict=True))


@dataclass(frozen=True)
class FigureSize:
    """Width and height of a figure in inches."""

    width: float
    height: float


WIDE, NARROW = FigureSize(7.2, 4.8), FigureSize(3.6, 4.2)  # for a page and for a phone, with letters of one size
HEADER = 0.72  # inches at the top of a figure, for its title and subject


def create_figure_with_axes(
    title: str, subject: str, size: FigureSize = WIDE, left: float = 0.72
) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes. `left` is their margin for labels in inches."""
    figure = create_figure(title, subject, size)
    left = min(left, 0.6 + (left - 0.72)) if size == NARROW else left
    right = 0.1 if size == NARROW else 0.22
    return figure, add_axes(figure, left, 0.0, size.width - left - right, size.height - HEADER - 0.53)


def create_figure(title: str, subject: str, size: FigureSize = WIDE) -> Figure:
    """Return an empty figure with a title and, below it, a line on what is shown."""
    figure = Figure(figsize=(size.width, size.height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    wrapped = textwrap.fill(title, 95)
    figure.text(0.02, 1 - 0.384 / size.height, wrapped, fontsize=9, fontweight="bold", color=INK, va="bottom")
    figure.text(0.02, 1 - 0.552 / size.height, subject, fontsize=8, color=GRAY, va="bottom")
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes in the house style. Lengths are in inches, the top is measured from the end of the header."""
    size = figure.get_size_inches()
    bottom = size[1] - HEADER - top - height
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(colors=GRAY, labelsize=8, which="both")
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def format_si_axis(axis: Axis, unit: str, *, max_ticks: int = 7) -> None:
    """Use SI prefixes on a logarithmic axis, and ticks at 2 and 5 as well as at 1 where it spans little."""
    low, high = axis.get_view_interval()
    if high < 1.1 * low:  # equal costs up to rounding, between which no place can be computed
        low, high = low / 1.5, high * 1.5
        set_limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
        set_limits(low, high)
    decades = math.log10(high / low)
    subs = (1, 2, 5) if 3 * decades <= max_ticks + 0.5 else (1, 3) if 2 * decades <= max_ticks else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12 if max_ticks > 6 else max_ticks + 2))
    axis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    axis.set_minor_formatter(NullFormatter())


def limit_to_shares(axes: Axes) -> None:
    """End an axis of accuracies, which are from 0 to 1, just beyond these values."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.03), min(high, 1.03))


class LabelPlacer:
    """Places texts one after another, each where it covers least of what is already drawn or written."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that data has pixel coordinates
        self.figure, self.axes = figure, axes
        self.occupied_boxes: list[tuple[float, float, float, float]] = []
        self.obstacles = np.zeros((0, 3))  # [n, 3]: x, y and the penalty for covering it

    def avoid_line(self, points: Sequence[tuple[float, float]], penalty: float = 4.0) -> None:
        """Keep texts off the straight segments between the points."""
        ends = self.axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
        for a, b in pairwise(ends):
            steps = np.linspace(0, 1, max(2, int(np.hypot(*(b - a)) / 3)))[:, None]
            dots = np.insert(a + steps * (b - a), 2, penalty, axis=1)
            self.obstacles = np.concatenate([self.obstacles, dots])

    def avoid_bar(self, point: PlotPoint) -> None:
        """Keep texts off a marker and, less strictly, off its interval bar."""
        self.avoid_line([(point.xy[0], point.y["low"]), (point.xy[0], point.y["high"])], penalty=1.0)
        x, y = self.axes.transData.transform(point.xy)
        self.occupied_boxes.append((x - 7, y - 7, x + 7, y + 7))

    def place_label(
        self, text: str, x: float, y: float, color: str, *, size: float = 9, weight: str = "normal"
    ) -> None:
        """Write `text` near the data point (x, y), with a thin leader line where it is far from the point."""
        look = {"fontsize": size, "fontweight": weight, "color": color, "ha": "center", "va": "center"}
        label = self.axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", zorder=5, **look)
        label.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
        extent = label.get_window_extent(self.figure.canvas.get_renderer())
        anchor = self.axes.transData.transform((x, y))
        offsets = _list_offsets(extent.width, extent.height)
        boxes = [_make_box(anchor + offset, extent.width, extent.height) for offset, _ in offsets]
        penalties = [self._compute_penalty(box) + far for box, (_, far) in zip(boxes, offsets, strict=True)]
        best = int(np.argmin(penalties))
        to_points = 72 / self.figure.dpi  # offsets in points stay right at any resolution
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


def label_curve_ends(
    figure: Figure, axes: Axes, curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], size: float = 9
) -> None:
    """Write a name at the end of each curve. A curve is (name, color, points)."""
    labels = LabelPlacer(figure, axes)
    for _, _, points in curves:
        labels.avoid_line(points)
    for name, color, points in curves:
        labels.place_label(name, *points[-1], color, size=size, weight="bold")


def _list_offsets(width: float, height: float) -> list[tuple[np.ndarray, float]]:
    """Return offsets around a point for a text of this size in pixels, with penalties that grow with distance."""
    offsets = []
    for ring, gap in enumerate((11.0, 18.0, 30.0, 46.0)):
        for sector in range(16):
            angle = 2 * math.pi * sector / 16
            direction = np.array([math.cos(angle), math.sin(angle)])
            offset = direction * (np.array([width, height]) / 2 + gap)
            offsets.append((offset, 3.0 * ring + (0.0 if sector % 4 == 0 else 0.5)))
    return offsets


def _make_box(center: np.ndarray, width: float, height: float) -> tuple[float, float, float, float]:
    x, y = center
    return (x - width / 2 - 1, y - height / 2 - 1, x + width / 2 + 1, y + height / 2 + 1)
