"""The report's figures, in the style of `canvas`. Those of training are in `tradeoff_figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.method import Method, list_methods
from nabla_trl.report.plots import canvas, tradeoff_figures
from nabla_trl.report.plots.panels import is_crowded, plot_panels
from nabla_trl.report.summary import Summary, find_pareto_front, get_value
from nabla_trl.utils.statistics import Interval

COST_AXES = {  # cost -> label of the axis, and its unit
    "flops": ("FLOPs per problem (log scale)", "FLOPs"),
    "seconds": ("seconds per problem (log scale)", "s"),
    "tokens": ("tokens generated per problem (log scale)", ""),
}
_BARS, _BANDS = (f"{mark}: 95% intervals over problems" for mark in ("bars", "bands"))


def plot_figures(
    summary: Summary,
    reward_by_round: Mapping[str, Sequence[Interval]],
    titles: Mapping[str, str],
    size: canvas.FigureSize = canvas.WIDE,
) -> dict[str, Figure | None]:
    """Return the figures by name, None where the numbers do not allow one.

    Args:
        size: `WIDE` or `NARROW`, for a page or for a phone.
        reward_by_round: Method -> mean reward before the first round and after each round.
        titles: Titles of the accuracy figures by cost, and the "subject" of all figures.
    """
    subject = titles["subject"]
    return {
        **{f"accuracy_{cost}": plot_accuracy(summary, cost, titles, size) for cost in COST_AXES},
        "scaling": plot_scaling(summary, subject, size),
        "reward_accuracy": plot_reward_accuracy(summary, subject, size),
        "reward_rounds": plot_reward_rounds(reward_by_round, subject, size),
        "samples": plot_samples(summary, subject, size),
        **tradeoff_figures.plot_tradeoff_figures(summary, subject, size),
    }


def save_figures(folder: Path, figures: Mapping[str, Figure | None]) -> dict[str, Path]:
    """Save the figures that exist as PNG files in `folder`. Returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # a figure of an earlier report must not pass for one of this report
        if figure is not None:
            draft = folder / f"{name}.tmp.png"
            figure.savefig(draft)
            paths[name] = draft.replace(path)
    return paths


# --- accuracy and cost --------------------------------------------------------------------------------


def plot_accuracy(
    summary: Summary, cost: str, titles: Mapping[str, str], size: canvas.FigureSize = canvas.WIDE
) -> Figure | None:
    """Plot accuracy against a cost (flops, seconds or tokens), with the Pareto front. None: the cost is not known."""
    # Single samples of trained policies measure their divergence. A greedy decode at the same cost is their answer.
    points = [
        point
        for point in canvas.collect_points(summary, cost, "accuracy")
        if point.xy[0] > 0 and not (point.parsed.policy and str(point.parsed.base_method) == "best_of_1")
    ]
    points.sort(key=lambda point: point.xy[0])
    if not points:
        return None
    label, unit = COST_AXES[cost]
    if is_crowded(points):
        subject = f"{titles['subject']}; {_BARS}; gray: all other groups"
        return plot_panels(points, titles[cost], subject, size, x_label=label, y_label="accuracy")
    subject = f"{titles['subject']}; {_BARS}; dotted: Pareto front"
    figure, axes = canvas.create_figure_with_axes(titles[cost], subject, size)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy on held-out problems")
    for point in points:
        canvas.draw_point(axes, point, canvas.get_style(point.method))
    front = [point.xy for point in points if point.method in find_pareto_front(summary, cost)]
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=canvas.GRAY, lw=1.0, ls=(0, (1, 1.6)), zorder=1)
    curves = [[point for point in points if point.parsed.family == name] for name in canvas.CURVE_FAMILIES]
    curves = [curve for curve in curves if curve]
    for curve in curves:
        style = canvas.get_style(curve[0].method)
        line = [point.xy for point in curve]
        axes.plot(*zip(*line, strict=True), ls=style.line_style, color=style.color, lw=1.5, zorder=2)
    axes.margins(x=0.1, y=0.1)
    canvas.limit_to_shares(axes)
    canvas.format_si_axis(axes.xaxis, unit if size == canvas.WIDE else "", max_ticks=7 if size == canvas.WIDE else 5)
    _label_points(canvas.LabelPlacer(figure, axes), points, curves, label_budgets=size == canvas.WIDE)
    return figure


def _label_points(
    labels: canvas.LabelPlacer,
    points: Sequence[canvas.PlotPoint],
    curves: Sequence[Sequence[canvas.PlotPoint]],
    *,
    label_budgets: bool,
) -> None:
    """Write the full names first, as they need most space: one per curve and per single point. Then the budgets."""
    for point in points:
        labels.avoid_bar(point)
    for curve in curves:
        labels.avoid_line([point.xy for point in curve])
    ends = [max(curve, key=lambda point: point.parsed.size) for curve in curves]
    for point in ends:
        labels.place_label(point.method, *point.xy, canvas.get_style(point.method).color, weight="bold")
    on_curves = [point for curve in curves for point in curve]
    for point in points:
        if point not in on_curves:
            trained, searched = bool(point.parsed.policy), point.parsed.name != "greedy"
            color = canvas.get_style(point.method).color if trained else canvas.INK
            size = 7 if trained and searched else 8
            labels.place_label(canvas.shorten_method(point.method), *point.xy, color, size=size)
    for point in points:
        if label_budgets and point in on_curves and point not in ends:
            sign = "" if point.parsed.name == "best_of" else "@"
            labels.place_label(f"{sign}{point.parsed.size:g}", *point.xy, canvas.get_style(point.method).color, size=7)


def group_budget_curves(summary: Summary) -> dict[str, list[str]]:
    """Return family -> its methods with FLOPs and a reward, cheapest first, for families with two budgets or more."""
    families: dict[str, list[str]] = {}
    for method in list_methods(summary):
        if f"reward.{method}" in summary:
            families.setdefault(Method.parse(method).family, []).append(method)
    curves = {name: methods for name, methods in families.items() if len(methods) > 1}
    return {name: sorted(curves[name], key=lambda method: get_value(summary, "flops", method)) for name in curves}


def plot_scaling(summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE) -> Figure | None:
    """Plot accuracy, and below it the reward, against FLOPs for the families at several budgets."""
    curves = group_budget_curves(summary)
    if not curves:
        return None
    shown = {method for methods in curves.values() for method in methods}
    rewards = [point for point in canvas.collect_points(summary, "flops", "reward") if point.method in shown]
    if is_crowded(rewards):
        title = "Reward (the target of the search) against FLOPs: compare with the accuracy above"
        subject = f"{subject}; {_BARS}; gray: all other groups"
        return plot_panels(
            rewards, title, subject, size, x_label="FLOPs per problem (log scale)", y_label="mean reward"
        )
    figure = canvas.create_figure(
        "Accuracy and reward (the target of the search) against FLOPs", f"{subject}; {_BANDS}", size
    )
    left, right = (0.72, 0.22) if size == canvas.WIDE else (0.55, 0.1)
    height = (size.height - canvas.HEADER - 0.53 - 0.28) / 2
    for metric, label, top in (("accuracy", "accuracy", 0.0), ("reward", "mean reward", height + 0.28)):
        points = {point.method: point for point in canvas.collect_points(summary, "flops", metric)}
        axes = canvas.add_axes(figure, left, top, size.width - left - right, height)
        axes.set_xscale("log")
        axes.set_ylabel(label)
        lines = []
        for name, methods in curves.items():
            style = canvas.get_style(methods[-1])
            xs, entries = zip(*((points[method].xy[0], points[method].y) for method in methods), strict=True)
            lines.append((name, style.color, canvas.draw_band(axes, xs, entries, style, markers=False)))
            for method in methods:
                canvas.draw_marker(axes, points[method], canvas.get_style(method), 5)
        axes.margins(x=0.12, y=0.1)
        if metric == "accuracy":
            canvas.limit_to_shares(axes)
        canvas.format_si_axis(
            axes.xaxis, "FLOPs" if size == canvas.WIDE else "", max_ticks=7 if size == canvas.WIDE else 5
        )
        axes.tick_params(labelbottom=metric == "reward")
        canvas.label_curve_ends(figure, axes, lines, size=8)
    figure.axes[-1].set_xlabel("FLOPs per problem (log scale)")
    return figure


# --- reward -------------------------------------------------------------------------------------------


def plot_reward_accuracy(summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE) -> Figure | None:
    """Plot accuracy against the mean reward. A line that bends down to the right shows over-optimization."""
    points = {point.method: point for point in canvas.collect_points(summary, "reward", "accuracy")}
    if len(points) < 2:
        return None
    title = "Accuracy against reward: under over-optimization a line bends down to the right"
    if is_crowded(list(points.values())):
        subject = f"{subject}; lines join the budgets of one family; {_BARS}; gray: all other groups"
        return plot_panels(
            list(points.values()), title, subject, size, x_label="mean reward", y_label="accuracy", log_x=False
        )
    subject = f"{subject}; lines join the budgets of one family; {_BARS}"
    figure, axes = canvas.create_figure_with_axes(title, subject, size)
    axes.set_xlabel("mean reward of the selected response")
    axes.set_ylabel("accuracy on held-out problems")
    for method, point in points.items():
        canvas.draw_point(axes, point, canvas.get_style(method), size=5.5, x_bar=True)
    curves = group_budget_curves(summary)
    lines = {name: [points[method].xy for method in methods] for name, methods in curves.items()}
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), color=canvas.get_style(curves[name][0]).color, lw=1.2, alpha=0.8, zorder=2)
    axes.margins(x=0.12, y=0.1)
    canvas.limit_to_shares(axes)
    labels = canvas.LabelPlacer(figure, axes)
    for point in points.values():
        labels.avoid_bar(point)
    for line in lines.values():
        labels.avoid_line(line)
    ends = [max(methods, key=lambda method: Method.parse(method).size) for methods in curves.values()]
    for method, point in points.items():
        if method in ends:
            labels.place_label(method, *point.xy, canvas.get_style(method).color, size=8, weight="bold")
        elif point.parsed.family not in curves:
            labels.place_label(canvas.shorten_method(method), *point.xy, canvas.INK, size=8)
    return figure


def plot_reward_rounds(
    reward_by_round: Mapping[str, Sequence[Interval]], subject: str, size: canvas.FigureSize = canvas.WIDE
) -> Figure | None:
    """Plot the mean reward over the rounds of nabla and of the control, each at its largest budget."""
    curves = {}
    for name in ("nabla", "control"):
        runs = [m for m, curve in reward_by_round.items() if Method.parse(m).family == name and len(curve) > 1]
        if runs:
            method = max(runs, key=lambda run: Method.parse(run).size)
            curves[method] = reward_by_round[method]
    if not curves:
        return None
    num_rounds = max(map(len, curves.values())) - 1
    changes = [f"{method} {curve[0].value:.2f} to {curve[-1].value:.2f}" for method, curve in curves.items()]
    title = f"Mean reward over {num_rounds} round{'s' * (num_rounds > 1)}: {', '.join(changes)}"
    figure, axes = canvas.create_figure_with_axes(title, f"{subject}; {_BANDS}", size)
    axes.set_xlabel("round of search (0: before the first round)")
    axes.set_ylabel("mean reward of the selected response")
    lines = []
    for method, curve in curves.items():
        points = canvas.draw_band(
            axes, range(len(curve)), [reward.to_dict() for reward in curve], canvas.get_style(method)
        )
        lines.append((method, canvas.get_style(method).color, points))
    axes.set_xlim(-0.03 * num_rounds, 1.16 * num_rounds)
    axes.set_xticks(range(0, num_rounds + 1, math.ceil(num_rounds / 10)))
    canvas.label_curve_ends(figure, axes, lines)
    return figure


def plot_reward_weight_curves(
    reward_weights: Sequence[float], panels: Mapping[str, Sequence[Interval]], title: str, subject: str
) -> Figure:
    """Plot curves over one logarithmic axis of λ, one panel per label from the top down."""
    figure = canvas.create_figure(title, f"{subject}; {_BANDS}")
    height = (canvas.WIDE.height - canvas.HEADER - 0.53) / len(panels)
    for row, (label, curve) in enumerate(panels.items()):
        axes = canvas.add_axes(figure, 0.72, height * row + 0.1, canvas.WIDE.width - 0.94, height - 0.2)
        canvas.draw_band(
            axes, reward_weights, [interval.to_dict() for interval in curve], canvas.METHOD_STYLES["nabla"]
        )
        axes.set_xscale("log")
        axes.set_ylabel(label)
        axes.tick_params(labelbottom=row == len(panels) - 1)
    axes.set_xlabel("λ = 1/β, weight of the reward's gradient relative to log π (log scale)")
    return figure


# --- samples ------------------------------------------------------------------------------------------


def plot_samples(summary: Summary, subject: str, size: canvas.FigureSize = canvas.WIDE) -> Figure | None:
    """Plot pass@k (solid) and maj@k (dashed) of every policy. None without at least two samples."""
    samples = metrics.group_sample_metrics(summary)
    samples = {policy: curves for policy, curves in samples.items() if len(curves["pass"]) > 1}
    if not samples:
        return None
    title = "Problems with a correct sample among k (pass@k, solid), and with a correct majority (maj@k, dashed)"
    figure, axes = canvas.create_figure_with_axes(title, f"{subject}; {_BANDS}", size)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k, independent samples per problem (log scale)")
    axes.set_ylabel("fraction of held-out problems")
    lines = []
    for policy, curves in samples.items():
        # The base policy looks like its best-of-N, a trained policy like its greedy decode.
        style = canvas.get_style("best_of_1" if policy == metrics.BASE_POLICY else f"{policy}_greedy")
        for name, line_style in (("pass", "-"), ("maj", (0, (4, 2)))):
            line = canvas.draw_band(
                axes, list(curves[name]), list(curves[name].values()), style, line_style=line_style
            )
            lines.append((f"{name}@k, {policy}", style.color, line))
    axes.xaxis.set_major_locator(FixedLocator(sorted({k for curves in samples.values() for k in curves["pass"]})))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.1)
    canvas.limit_to_shares(axes)
    canvas.label_curve_ends(figure, axes, lines, size=8)
    return figure
