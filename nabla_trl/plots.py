"""The figures of reports and recipes, drawn with matplotlib's object interface (Agg): no window, no global state.

Colours are those of Okabe and Ito; every family also has its own marker and line, so that the figures read in
grey. Names stand beside what they name: `_Labels` puts each where it covers least.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from nabla_trl.stats import Interval, family

INK, GREY = "#222222", "#6b6b6b"
DPI = 150
MOST_QUERIES = 10**6
LEADER_FROM = 6.0  # a label at this price or more stands too far off to be read without a line


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    line: object = "-"
    size: float = 1.0  # so that thin shapes look as large as full ones


STYLES = {
    "best_of": Style("#0072B2", "o"),
    "weighted_best_of": Style("#0072B2", "h", size=1.2),
    "nabla": Style("#D55E00", "s"),
    "control": Style("#B07500", "^", (0, (4, 2))),  # orange, darkened until text in it can be read
    "greedy": Style("#000000", "D", (0, (1, 1.5))),
    "self_consistency": Style("#56B4E9", "p", size=1.2),
    "distilled_greedy": Style("#009E73", "*", (0, (6, 1.5, 1, 1.5)), size=1.9),
    "distilled_best_of": Style("#009E73", "P", size=1.35),
    "reward_model_sampling": Style("#CC79A7", "X", size=1.35),
}
_OTHER = Style(GREY, "v")
_DUAL = {
    "π": Style(GREY, "D"),
    "best of N": STYLES["best_of"],
    "metropolis + gradient": STYLES["nabla"],
    "metropolis": STYLES["control"],
    "greedy search + gradient": Style("#56B4E9", "v", (0, (1, 1.5))),
    "greedy search": Style("#000000", "P", (0, (1, 1.5)), size=1.2),
}
# Trained policies, in the order in which they come; they have a panel of their own.
_TRAINED = [STYLES[name] for name in ("distilled_greedy", "reward_model_sampling", "nabla", "best_of", "control")]
CURVES = ("best_of", "control", "nabla")


@dataclass(frozen=True)
class _Point:
    method: str
    x: float
    y: float
    low: float
    high: float


def draw(
    folder: Path,
    summary: Mapping[str, Mapping[str, float]],
    rounds: Mapping[str, Sequence[Interval]],
    titles: Mapping[str, str],
) -> dict[str, Path]:
    """Draw what the numbers allow into `folder`; returns the name and path of each figure drawn.

    `rounds`: method -> mean reward by round. `titles`: what "flops" and "seconds" show, and the "subject".
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy_flops": _accuracy(summary, "flops", titles),
        "accuracy_seconds": _accuracy(summary, "seconds", titles),
        "reward_rounds": _rounds(rounds, titles),
        "break_even": _break_even(summary, titles),
    }
    drawn = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # a figure of an earlier report must not pass for one of this
        if figure is not None:
            draft = folder / f"{name}.tmp.png"
            figure.savefig(draft)
            drawn[name] = draft.replace(path)
    return drawn


def _accuracy(summary: Mapping, cost: str, titles: Mapping[str, str]) -> Figure | None:
    points = [_point(summary, name, cost) for name in summary if name.startswith("accuracy.")]
    points = sorted((point for point in points if point.x > 0), key=lambda point: point.x)
    if not points:
        return None
    curves = {name: [point for point in points if family(point.method)[0] == name] for name in CURVES}
    figure, axes = _canvas(titles[cost], f"{titles['subject']}; bars: 95% bootstrap intervals over problems")
    axes.set_xscale("log")
    axes.set_xlabel(f"{'FLOPs' if cost == 'flops' else 'seconds'} per problem (log scale)")
    axes.set_ylabel("accuracy on held-out problems")
    for point in points:
        style = _style(point.method)
        bars = np.array([[point.y - point.low], [point.high - point.y]])
        axes.errorbar(point.x, point.y, yerr=bars, fmt="none", ecolor=style.colour, elinewidth=1, alpha=0.55)
        look = {"color": style.colour, "ms": 6 * style.size, "mec": "white", "mew": 0.6, "zorder": 3}
        axes.plot([point.x], [point.y], style.marker, **look)
    for name, curve in curves.items():
        xs, ys = [point.x for point in curve], [point.y for point in curve]
        axes.plot(xs, ys, ls=STYLES[name].line, color=STYLES[name].colour, lw=1.5, zorder=2)
    axes.margins(x=0.1, y=0.1)
    _engineering(axes.xaxis, "FLOPs" if cost == "flops" else "s")
    labels = _Labels(figure, axes)
    for point in points:
        labels.avoid_bar(point)
    for curve in curves.values():
        labels.avoid_line([(point.x, point.y) for point in curve])
    _label_points(labels, points, curves)
    return figure


def _label_points(labels: _Labels, points: Sequence[_Point], curves: Mapping[str, Sequence[_Point]]) -> None:
    """Full names first, as they need the room: one per curve and one per single point; then the budgets."""
    named = [max(curve, key=lambda point: family(point.method)[1]) for curve in curves.values() if curve]
    for point in named:
        labels.place(point.method, point.x, point.y, _style(point.method).colour, weight="bold")
    for point in points:
        name, size = family(point.method)
        if name not in CURVES:
            labels.place(point.method, point.x, point.y, INK, size=8)
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
    figure, axes = _canvas(f"Mean reward over {most} rounds: {moves}", subject)
    axes.set_xlabel("round of search (0: before the first)")
    axes.set_ylabel("mean reward of the kept response")
    for method, curve in curves.items():
        style, steps = _style(method), np.arange(len(curve))
        low, value, high = np.array([(one.low, one.value, one.high) for one in curve]).T
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.15, lw=0)
        look = {"color": style.colour, "ls": style.line, "lw": 1.5, "ms": 5 * style.size}
        axes.plot(steps, value, marker=style.marker, mec="white", mew=0.5, **look)
    axes.set_xlim(-0.03 * most, 1.16 * most)
    axes.set_xticks(range(0, most + 1, math.ceil(most / 10)))
    labels = _Labels(figure, axes)
    for curve in curves.values():
        labels.avoid_line([(step, one.value) for step, one in enumerate(curve)])
    for method, curve in curves.items():
        labels.place(method, len(curve) - 1, curve[-1].value, _style(method).colour, weight="bold")
    return figure


def _break_even(summary: Mapping, titles: Mapping[str, str]) -> Figure | None:
    own = "distilled_greedy"
    rivals = [name for name in ("best_of_16", "nabla", "greedy") if f"flops.{name}" in summary]
    if "flops.training" not in summary or f"flops.{own}" not in summary or not rivals:
        return None
    count = EngFormatter(places=1, sep="")
    crossings = {name: summary.get(f"break_even.{own}-{name}", {"value": math.inf})["value"] for name in rivals}
    shown = {name: value for name, value in crossings.items() if 1 <= value <= MOST_QUERIES}
    paid = ", ".join(f"{count(value)} against {name}" for name, value in shown.items())
    title = f"Queries until training is paid back: {paid}" if paid else "Total FLOPs against queries answered"
    figure, axes = _canvas(title, f"{titles['subject']}; training once, then FLOPs per query", left=0.15)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("queries answered (log scale)")
    axes.set_ylabel("total FLOPs, training included (log scale)")
    queries = np.logspace(0, math.log10(MOST_QUERIES), 61)
    totals = {name: summary[f"flops.{name}"]["value"] * queries for name in rivals}
    totals[own] = summary["flops.training"]["value"] + summary[f"flops.{own}"]["value"] * queries
    for name, total in totals.items():
        style = _style(name)
        axes.plot(queries, total, ls=style.line, color=style.colour, lw=1.7)
        look = {"color": style.colour, "ms": 5 * style.size, "mec": "white", "mew": 0.5, "zorder": 3}
        axes.plot(queries[::10], total[::10], style.marker, clip_on=False, **look)
    axes.set_xlim(1, MOST_QUERIES)
    _engineering(axes.xaxis, "")
    _engineering(axes.yaxis, "FLOPs")
    labels = _Labels(figure, axes)
    for total in totals.values():
        labels.avoid_line(list(zip(queries, total, strict=True)))
    for name, value in shown.items():
        height = value * summary[f"flops.{name}"]["value"]
        axes.plot([value], [height], "o", ms=9, mfc="none", mec=INK, mew=1.2, zorder=4)
        labels.place(f"{count(value)} queries", value, height, INK, size=8)
    for name, total in totals.items():
        labels.place(name, queries[8], total[8], _style(name).colour, weight="bold")
    return figure


def _canvas(title: str, subject: str, left: float = 0.1) -> tuple[Figure, Axes]:
    figure = _page(title, subject)
    return figure, _panel(figure, (left, 0.11, 0.97 - left, 0.74))


def _page(title: str, subject: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.8), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.92, textwrap.fill(title, 95), fontsize=9, fontweight="bold", color=INK, va="bottom")
    figure.text(0.02, 0.885, subject, fontsize=8, color=GREY, va="bottom")
    return figure


def _panel(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes in the house style; `place` is left, bottom, width and height as shares of the page."""
    axes = figure.add_axes(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=8, which="both")
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _engineering(axis: Axis, unit: str) -> None:
    """SI prefixes on a logarithmic axis; where it spans little, ticks at 2 and 5 as well as at 1."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(EngFormatter(unit=unit, sep=" " if unit else ""))
    axis.set_minor_formatter(NullFormatter())


def _style(method: str) -> Style:
    return STYLES.get(family(method)[0], STYLES.get(method, _OTHER))


def _point(summary: Mapping, name: str, cost: str) -> _Point:
    method = name.removeprefix("accuracy.")
    one, spent = summary[name], summary.get(f"{cost}.{method}")
    return _Point(method, spent["value"] if spent else 0.0, one["value"], one["low"], one["high"])


def step_figure(lams: Sequence[float], panels: Mapping[str, Sequence[Interval]], title: str, subject: str) -> Figure:
    """Curves over one logarithmic axis of λ, a panel each from the top down; shaded: 95% bootstrap intervals."""
    figure = _page(title, f"{subject}; shaded: 95% bootstrap intervals over problems")
    height = 0.74 / len(panels)
    for row, (label, curve) in enumerate(panels.items()):
        axes = _panel(figure, (0.1, 0.85 - height * (row + 1) + 0.02, 0.87, height - 0.04))
        style = STYLES["nabla"]
        axes.fill_between(
            lams, [one.low for one in curve], [one.high for one in curve], color=style.colour, alpha=0.2, lw=0
        )
        axes.plot(lams, [one.value for one in curve], style.marker, ls="-", color=style.colour, lw=1.5, mec="white")
        axes.set_xscale("log")
        axes.set_ylabel(label)
        axes.tick_params(labelbottom=row == len(panels) - 1)
    axes.set_xlabel("λ = 1/β, how often the reward's gradient counts against log π (log scale)")
    return figure


def duality_figure(
    test_time: Mapping[str, Sequence[tuple[float, float]]],
    trained: Mapping[str, Sequence[tuple[float, float]]],
    noise: float | None,
    title: str,
    subject: str,
) -> Figure:
    """Curves of (FLOPs, KL(q‖π*)) by method: a panel of FLOPs per answer, and one of FLOPs of training if there are.

    Args:
        noise: what counted laws cannot be told from π* below; their points end on that line.
    """
    figure = _page(title, subject)
    styles = _DUAL | dict(zip(trained, _TRAINED * len(trained), strict=False))
    heights = [kl for curves in (test_time, trained) for curve in curves.values() for _, kl in curve]
    panels = [(test_time, "FLOPs per answer"), (trained, "FLOPs of training")][: 2 if trained else 1]
    width = (0.87 - 0.06 * (len(panels) - 1)) / len(panels)
    for column, (curves, cost) in enumerate(panels):
        axes = _panel(figure, (0.1 + column * (width + 0.06), 0.11, width, 0.74))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{cost} (log scale)")
        axes.set_ylabel("" if column else "KL(q‖π*) beyond noise, nats (log scale)")
        axes.tick_params(labelleft=not column)
        for method, curve in curves.items():
            style = styles.get(method, _OTHER)
            look = {"color": style.colour, "ls": style.line, "lw": 1.5, "ms": 5 * style.size}
            axes.plot(*zip(*curve, strict=True), marker=style.marker, mec="white", mew=0.5, **look)
        axes.set_ylim(min(heights) / 1.5, max(heights) * 1.6)
        axes.margins(x=0.18)
        _decimal(axes.yaxis)
        _engineering(axes.xaxis, "")
        labels = _Labels(figure, axes)
        for curve in curves.values():
            labels.avoid_line(curve)
        for method, curve in curves.items():
            labels.place(method, *curve[-1], styles.get(method, _OTHER).colour, size=8, weight="bold")
        if noise is not None and not column:
            left, right = axes.get_xlim()
            axes.axhline(noise, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
            labels.avoid_line([(left, noise), (right, noise)])
            labels.place("within noise of π*", left * (right / left) ** 0.15, noise, GREY, size=7)
    return figure


def _decimal(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of a logarithmic axis, as decimal numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


class _Labels:
    """Places texts one after another, each where it covers least of what is drawn or written already."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        figure.canvas.draw()  # fixes the limits, so that data has its place in pixels
        axes.autoscale(False)
        self.figure, self.axes = figure, axes
        self.taken: list[tuple[float, float, float, float]] = []
        self.ink = np.zeros((0, 3))  # x, y and the price of covering it

    def avoid_line(self, points: Sequence[tuple[float, float]], price: float = 4.0) -> None:
        """Keep texts off the straight segments between the points."""
        ends = self.axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
        for a, b in pairwise(ends):
            steps = np.linspace(0, 1, max(2, int(np.hypot(*(b - a)) / 3)))[:, None]
            dots = np.insert(a + steps * (b - a), 2, price, axis=1)
            self.ink = np.concatenate([self.ink, dots])

    def avoid_bar(self, point: _Point) -> None:
        """Keep texts off a marker and, less strictly, off its interval bar."""
        self.avoid_line([(point.x, point.low), (point.x, point.high)], price=1.0)
        x, y = self.axes.transData.transform((point.x, point.y))
        self.taken.append((x - 7, y - 7, x + 7, y + 7))

    def place(self, text: str, x: float, y: float, colour: str, *, size: float = 9, weight: str = "normal") -> None:
        """Write `text` near the data point (x, y), with a thin line to it where it can't stand beside it."""
        look = {"fontsize": size, "fontweight": weight, "color": colour, "ha": "center", "va": "center"}
        label = self.axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset pixels", zorder=5, **look)
        label.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
        extent = label.get_window_extent(self.figure.canvas.get_renderer())
        anchor = self.axes.transData.transform((x, y))
        offsets = _offsets(extent.width, extent.height)
        boxes = [_box(anchor + offset, extent.width, extent.height) for offset, _ in offsets]
        prices = [self._price(box) + far for box, (_, far) in zip(boxes, offsets, strict=True)]
        best = int(np.argmin(prices))
        label.set_position(tuple(offsets[best][0]))
        self.taken.append(boxes[best])
        if offsets[best][1] >= LEADER_FROM:
            left, bottom, right, top = boxes[best]
            near = np.clip(anchor, (left, bottom), (right, top)) - anchor
            line = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
            self.axes.annotate("", (x, y), xytext=tuple(near), textcoords="offset pixels", arrowprops=line)

    def _price(self, box: tuple[float, float, float, float]) -> float:
        left, bottom, right, top = box
        frame = self.axes.bbox
        outside = max(0, frame.x0 + 3 - left) + max(0, right - self.figure.bbox.x1 + 4)
        outside += max(0, top - frame.y1 - 4) + max(0, frame.y0 + 3 - bottom)
        covered = sum(
            max(0, min(right, r) - max(left, x)) * max(0, min(top, t) - max(bottom, b)) for x, b, r, t in self.taken
        )
        xy = self.ink[:, :2]
        inside = ((xy > (left - 1, bottom - 1)) & (xy < (right + 1, top + 1))).all(axis=1)
        return 50.0 * outside + 5.0 * covered + float(self.ink[inside, 2].sum())


def _offsets(width: float, height: float) -> list[tuple[np.ndarray, float]]:
    """Places round a point for a text of this size in pixels, each with a price that grows with distance."""
    places = []
    for ring, gap in enumerate((11.0, 18.0, 30.0, 46.0)):
        for turn in range(16):
            angle = 2 * math.pi * turn / 16
            away = np.array([math.cos(angle), math.sin(angle)])
            offset = away * (np.array([width, height]) / 2 + gap)
            places.append((offset, 3.0 * ring + (0.0 if turn % 4 == 0 else 0.5)))
    return places


def _box(centre: np.ndarray, width: float, height: float) -> tuple[float, float, float, float]:
    x, y = centre
    return (x - width / 2 - 1, y - height / 2 - 1, x + width / 2 + 1, y + height / 2 + 1)
