"""The figure of the duality: how far laws are from π*, against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nabla_trl.report.canvas import GREY, STYLES, Labels, Style, engineering, page, panel, style

_LOOKS = {
    "π": Style(GREY, "D"),
    "best of N": STYLES["best_of"],
    "metropolis + gradient": STYLES["nabla"],
    "metropolis": STYLES["control"],
    "greedy search + gradient": Style("#56B4E9", "v", (0, (1, 1.5))),
    "greedy search": Style("#000000", "P", (0, (1, 1.5)), size=1.2),
    "sft": Style("#009E73", "*", (0, (6, 1.5, 1, 1.5)), size=1.9),
    "reward-weighted": Style("#0072B2", "P", (0, (6, 1.5)), size=1.35),
    "dpo": Style("#CC79A7", "X", (0, (3, 1.5)), size=1.35),
    "dpo, Bradley-Terry labels": Style("#CC79A7", "v", (0, (1, 1.5)), size=1.2),
    "rloo": Style("#D55E00", "d", size=1.25),
    "grpo": Style("#B07500", ">", (0, (4, 2)), size=1.2),
}

Curves = Mapping[str, Sequence[tuple[float, float]]]


def duality_figure(test_time: Curves, trained: Curves, noise: float | None, title: str, subject: str) -> Figure:
    """Curves of (FLOPs, KL(q‖π*)) by method: a panel of FLOPs per answer, and one of FLOPs of training if there are.

    Args:
        noise: what counted laws cannot be told from π* below; their points end on that line.
    """
    figure = page(title, subject)
    heights = [kl for curves in (test_time, trained) for curve in curves.values() for _, kl in curve]
    panels = [(test_time, "FLOPs per answer"), (trained, "FLOPs of training")][: 2 if trained else 1]
    width = (0.87 - 0.06 * (len(panels) - 1)) / len(panels)
    for column, (curves, cost) in enumerate(panels):
        axes = panel(figure, (0.1 + column * (width + 0.06), 0.11, width, 0.74))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{cost} (log scale)")
        axes.set_ylabel("" if column else "KL(q‖π*) beyond noise, nats (log scale)")
        axes.tick_params(labelleft=not column)
        for method, curve in curves.items():
            look = _look(method)
            axes.plot(*zip(*curve, strict=True), color=look.colour, ls=look.line, lw=1.5, **look.look(5))
        axes.set_ylim(min(heights) / 1.5, max(heights) * 1.6)
        axes.margins(x=0.3)
        _decimal(axes.yaxis)
        engineering(axes.xaxis, "")
        labels = Labels(figure, axes)
        for curve in curves.values():
            labels.avoid_line(curve)
        least = None if column else noise  # counted laws stand in the first panel alone
        left, right = axes.get_xlim()
        if least is not None:
            axes.axhline(least, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
            labels.avoid_line([(left, least), (right, least)])
        for method, curve in curves.items():
            # The names are long for half a page.
            labels.place(
                method.replace("greedy search", "greedy"), *curve[-1], _look(method).colour, size=8, weight="bold"
            )
        if least is not None:
            labels.place("within noise of π*", left * (right / left) ** 0.15, least, GREY, size=7)
    return figure


def _look(method: str) -> Style:
    return _LOOKS.get(method) or style(method)


def _decimal(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of a logarithmic axis, as decimal numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
