"""Plot the KL of distributions to π* against their FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nabla_trl.report.plots.canvas import (
    GRAY,
    METHOD_STYLES,
    LabelPlacer,
    MethodStyle,
    add_axes,
    create_figure,
    format_si_axis,
    get_style,
)

_METHOD_STYLES = {
    "π": MethodStyle(GRAY, "D"),
    "best of N": METHOD_STYLES["best_of"],
    "metropolis + gradient": METHOD_STYLES["nabla"],
    "metropolis": METHOD_STYLES["control"],
    "greedy search + gradient": MethodStyle("#56B4E9", "v", (0, (1, 1.5))),
    "greedy search": MethodStyle("#000000", "P", (0, (1, 1.5)), marker_scale=1.2),
    "sft": MethodStyle("#009E73", "*", (0, (6, 1.5, 1, 1.5)), marker_scale=1.9),
    "reward-weighted": MethodStyle("#0072B2", "P", (0, (6, 1.5)), marker_scale=1.35),
    "dpo": MethodStyle("#CC79A7", "X", (0, (3, 1.5)), marker_scale=1.35),
    "dpo, Bradley-Terry labels": MethodStyle("#CC79A7", "v", (0, (1, 1.5)), marker_scale=1.2),
    "soft-targets": MethodStyle("#332288", "h", (0, (1, 1)), marker_scale=1.25),
    "soft-targets, reverse KL": MethodStyle("#332288", "H", (0, (4, 1, 1, 1)), marker_scale=1.25),
    "rloo": MethodStyle("#D55E00", "d", marker_scale=1.25),
    "grpo": MethodStyle("#B07500", ">", (0, (4, 2)), marker_scale=1.2),
    "on-policy-distillation": MethodStyle("#882255", "p", (0, (6, 1.5, 1, 1.5)), marker_scale=1.25),
}

MethodCurves = Mapping[str, Sequence[tuple[float, float]]]


def make_duality_figure(
    test_time: MethodCurves, trained: MethodCurves, noise_kl: float | None, title: str, subject: str
) -> Figure:
    """Plot curves of KL(q‖π*) against FLOPs: a panel for FLOPs per answer, and one for FLOPs of training if needed.

    Args:
        test_time, trained: points (FLOPs, KL) of each method.
        noise_kl: KL in nats below which empirical distributions cannot be distinguished from π*.
        title: title of the figure.
        subject: subtitle of the figure.
    """
    figure = create_figure(title, subject)
    heights = [kl for curves in (test_time, trained) for curve in curves.values() for _, kl in curve]
    panels = [(test_time, "FLOPs per answer"), (trained, "FLOPs of training")][: 2 if trained else 1]
    width = (6.26 - 0.43 * (len(panels) - 1)) / len(panels)  # inches
    for column, (curves, cost) in enumerate(panels):
        axes = add_axes(figure, 0.72 + column * (width + 0.43), 0.0, width, 3.55)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{cost} (log scale)")
        axes.set_ylabel("" if column else "KL(q‖π*) beyond noise, nats (log scale)")
        axes.tick_params(labelleft=not column)
        for method, curve in curves.items():
            style = _get_style(method)
            axes.plot(
                *zip(*curve, strict=True),
                color=style.color,
                ls=style.line_style,
                lw=1.5,
                **style.get_marker_options(5),
            )
        axes.set_ylim(min(heights) / 1.5, max(heights) * 1.6)
        axes.margins(x=0.3)
        _use_decimal_ticks(axes.yaxis)
        format_si_axis(axes.xaxis, "")
        labels = LabelPlacer(figure, axes)
        for curve in curves.values():
            labels.avoid_line(curve)
        noise_line = None if column else noise_kl  # only the first panel has empirical distributions
        left, right = axes.get_xlim()
        if noise_line is not None:
            axes.axhline(noise_line, color=GRAY, lw=1, ls=(0, (2, 2)), zorder=1)
            labels.avoid_line([(left, noise_line), (right, noise_line)])
        for method, curve in curves.items():
            name = method.replace("greedy search", "greedy")  # shorter, because a panel may be half a page wide
            labels.place_label(name, *curve[-1], _get_style(method).color, size=8, weight="bold")
        if noise_line is not None:
            labels.place_label("within noise of π*", left * (right / left) ** 0.15, noise_line, GRAY, size=7)
    return figure


def _get_style(method: str) -> MethodStyle:
    return _METHOD_STYLES.get(method) or get_style(method)


def _use_decimal_ticks(axis: Axis) -> None:
    """Set ticks at 1, 2 and 5 of a logarithmic axis and write them as decimal numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
