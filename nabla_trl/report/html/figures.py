"""Figures of report.html alone, figures as SVG that takes the page's colours, and the numbers behind each figure."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.method import join_label, list_methods, parse_family, split_label
from nabla_trl.report.canvas import (
    INK,
    METHOD_STYLES,
    LabelPlacer,
    PlotPoint,
    add_axes,
    create_figure,
    create_figure_with_axes,
    format_si_axis,
    get_style,
    shorten_method,
)
from nabla_trl.report.compute_tradeoff import METHOD_KINDS, QUERY_COUNTS, compute_total_flops, select_methods_of_kind
from nabla_trl.report.conclusions import format_accuracy, format_cost
from nabla_trl.report.figures import plot_accuracy
from nabla_trl.report.summary import Summary, find_pareto_front
from nabla_trl.utils.statistics import Interval

FigureRecord = dict[str, Any]

_NUM_HEADER_TEXTS = 2  # texts above a figure, which the page writes itself: title and subject
# Colours of `canvas` to variables of the page's style sheet, which differ by light and dark.
_CSS_VARIABLES = {
    "#222222": "--ink",
    "#000000": "--ink",
    "#6b6b6b": "--grey",
    "#e4e4e4": "--grid",
    "#ffffff": "--paper",
    "#0072b2": "--blue",
    "#d55e00": "--vermilion",
    "#b07500": "--orange",
    "#56b4e9": "--sky",
    "#cc79a7": "--purple",
    "#8e4585": "--plum",
    "#009e73": "--green",
}


def plot_page_figures(summary: Summary, titles: Mapping[str, str]) -> dict[str, Figure | None]:
    """The figures that report.md does not have."""
    return {
        "accuracy_tokens": plot_accuracy(summary, "tokens", titles),
        "scaling": plot_scaling(summary, titles["subject"]),
        "reward_accuracy": plot_reward_accuracy(summary, titles["subject"]),
    }


def group_budget_curves(summary: Summary, *required_metrics: str) -> dict[str, list[str]]:
    """Family -> its methods at two or more budgets, cheapest first, where all that is `needed` of each is known."""
    found: dict[str, list[str]] = {}
    for method in list_methods(summary):
        label, rest = split_label(method)
        if all(f"{name}.{method}" in summary for name in required_metrics):
            found.setdefault(join_label(label, parse_family(rest)[0]), []).append(method)
    ordered = {name: sorted(own, key=lambda one: summary[f"flops.{one}"]["value"]) for name, own in found.items()}
    return {name: own for name, own in ordered.items() if len(own) > 1}


def plot_scaling(summary: Summary, subject: str) -> Figure | None:
    """Accuracy, and below it the reward, against FLOPs: families at several budgets, with intervals as bands."""
    found = group_budget_curves(summary, "flops", "accuracy", "reward")
    if not found:
        return None
    title = "More compute: what happens to accuracy, and to the reward that is searched for"
    figure = create_figure(title, f"{subject}; bands: 95% bootstrap intervals over problems")
    for metric, bottom in (("accuracy", 0.51), ("reward", 0.11)):
        axes = add_axes(figure, (0.1, bottom, 0.87, 0.34))
        axes.set_xscale("log")
        for own in found.values():
            _plot_band(axes, summary, own, metric)
        axes.set_ylabel({"accuracy": "accuracy", "reward": "mean reward"}[metric])
        axes.margins(x=0.12, y=0.1)
        format_si_axis(axes.xaxis, "FLOPs")
        axes.tick_params(labelbottom=metric == "reward")
        named = LabelPlacer(figure, axes)
        for own in found.values():
            named.avoid_line([_get_coordinates(summary, "flops", metric, method) for method in own])
        for name, own in found.items():
            x, y = _get_coordinates(summary, "flops", metric, own[-1])
            named.place_label(name, x, y, get_style(own[-1]).color, size=8, weight="bold")
    figure.axes[-1].set_xlabel("FLOPs per problem (log scale)")
    return figure


def _plot_band(axes: Axes, summary: Summary, curve_methods: Sequence[str], metric: str) -> None:
    xs = [summary[f"flops.{method}"]["value"] for method in curve_methods]
    ends = [[summary[f"{metric}.{method}"][side] for method in curve_methods] for side in ("low", "high")]
    look, line = (
        get_style(curve_methods[-1]),
        METHOD_STYLES.get(parse_family(curve_methods[-1])[0], get_style(curve_methods[-1])).line_style,
    )
    axes.fill_between(xs, *ends, color=look.color, alpha=0.12, lw=0)
    ys = [summary[f"{metric}.{method}"]["value"] for method in curve_methods]
    axes.plot(xs, ys, ls=line, color=look.color, lw=1.5)
    for method, x, y in zip(curve_methods, xs, ys, strict=True):
        axes.plot([x], [y], zorder=3, gid=f"method {method}", **get_style(method).get_marker_options(5))


def plot_reward_accuracy(summary: Summary, subject: str) -> Figure | None:
    """Accuracy against the mean reward: where a line bends down to the right, the reward is being hacked."""
    known = [method for method in list_methods(summary) if f"reward.{method}" in summary]
    if len(known) < 2:
        return None
    title = "Is the reward being hacked? Then its line bends down to the right"
    figure, axes = create_figure_with_axes(
        title, f"{subject}; lines join the budgets of one kind; bars: 95% bootstrap intervals"
    )
    axes.set_xlabel("mean reward of the kept response")
    axes.set_ylabel("accuracy on held-out problems")
    points = [_make_reward_point(summary, method) for method in known]
    for point in points:
        colour = get_style(point.method).color
        reward = summary[f"reward.{point.method}"]
        bars = {"xerr": [[point.x - reward["low"]], [reward["high"] - point.x]]}
        bars["yerr"] = [[point.y - point.low], [point.high - point.y]]
        axes.errorbar(point.x, point.y, **bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.4)
        axes.plot(
            [point.x],
            [point.y],
            zorder=3,
            gid=f"method {point.method}",
            **get_style(point.method).get_marker_options(5.5),
        )
    lines = {
        name: [_get_coordinates(summary, "reward", "accuracy", one) for one in own]
        for name, own in group_budget_curves(summary, "flops", "accuracy", "reward").items()
    }
    for name, line in lines.items():
        colour = next(get_style(one).color for one in known if _get_labeled_family(one) == name)
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.2, alpha=0.8, zorder=2)
    axes.margins(x=0.12, y=0.1)
    named = LabelPlacer(figure, axes)
    for point in points:
        named.avoid_bar(point)
    for line in lines.values():
        named.avoid_line(line)
    ends = {
        name: max((one for one in known if _get_labeled_family(one) == name), key=_get_method_size) for name in lines
    }
    for point in points:
        name, (x, y) = _get_labeled_family(point.method), (point.x, point.y)
        if name not in lines:
            named.place_label(shorten_method(point.method), x, y, INK, size=8)
        elif point.method == ends[name]:
            named.place_label(point.method, x, y, get_style(point.method).color, size=8, weight="bold")
    return figure


def _get_labeled_family(method: str) -> str:
    label, rest = split_label(method)
    return join_label(label, parse_family(rest)[0])


def _get_method_size(method: str) -> float:
    return parse_family(split_label(method)[1])[1]


def _make_reward_point(summary: Summary, method: str) -> PlotPoint:
    one = summary[f"accuracy.{method}"]
    return PlotPoint(method, summary[f"reward.{method}"]["value"], one["value"], one["low"], one["high"])


def _get_coordinates(summary: Summary, x_metric: str, y_metric: str, method: str) -> tuple[float, float]:
    return summary[f"{x_metric}.{method}"]["value"], summary[f"{y_metric}.{method}"]["value"]


# --- SVG ----------------------------------------------------------------------------------------------


def render_svg(figure: Figure, name: str, summary: Summary) -> tuple[str, str, str]:
    """A figure of `canvas` as (title, subject, SVG for a page): colours are variables, texts are texts.

    Markers of methods get tool tips with their figures.
    """
    title, subject = (" ".join(text.get_text().split()) for text in figure.texts[:_NUM_HEADER_TEXTS])
    for text in figure.texts[:_NUM_HEADER_TEXTS]:
        text.remove()
    for text in figure.findobj(Text):
        text.set_path_effects([])  # they would turn letters into shapes; the style sheet does the same
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.04, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (?:(\w+) )?([\d.]+px)[^;\"]*", _replace_font, svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _to_css_variable(match[0]), svg)
    svg = re.sub(r'<g id="method ([^"]+)">', lambda match: _render_tooltip(summary, match[1]), svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    head = f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{html.escape(title)}">'
    return title, subject, head + svg[svg.index(">") + 1 :].rstrip()


def _replace_font(match: re.Match[str]) -> str:
    return f"font: {match[1] or '400'} {match[2]} system-ui, sans-serif"


def _to_css_variable(color: str) -> str:
    name = _CSS_VARIABLES.get(color)
    return f"var({name})" if name else color


def _render_tooltip(summary: Summary, method: str) -> str:
    costs = ", ".join(format_cost(summary, cost, method) for cost in ("flops", "seconds"))
    return f'<g class="mark"><title>{html.escape(f"{method}: {format_accuracy(summary, method)}; {costs}")}</title>'


# --- the numbers behind them --------------------------------------------------------------------------


def collect_figure_data(
    summary: Summary, reward_by_round: Mapping[str, Sequence[Interval]]
) -> dict[str, list[FigureRecord]]:
    """Figure -> the numbers that it shows, as records of plain values."""
    return {
        **{f"accuracy_{cost}": _collect_accuracy_records(summary, cost) for cost in ("flops", "seconds", "tokens")},
        "scaling": [
            {"kind": name, "method": one, **_collect_metrics(summary, "flops", "accuracy", "reward", method=one)}
            for name, own in group_budget_curves(summary, "flops", "accuracy", "reward").items()
            for one in own
        ],
        "reward_accuracy": [
            {"method": one, **_collect_metrics(summary, "reward", "accuracy", method=one)}
            for one in list_methods(summary)
            if f"reward.{one}" in summary
        ],
        "reward_rounds": [
            {"method": method, "round": number, "reward": one.value, "reward_low": one.low, "reward_high": one.high}
            for method, curve in reward_by_round.items()
            for number, one in enumerate(curve)
        ],
        "samples": [
            {"policy": policy, "estimator": f"{name}@k", "k": k, **_flatten_interval("value", one)}
            for policy, own in metrics.group_sample_metrics(summary).items()
            for name in ("pass", "maj")
            for k, one in own[name].items()
        ],
        "reward_kl": [
            {"method": one, **_collect_metrics(summary, "kl", "reward", method=one)}
            for one in list_methods(summary)
            if f"kl.{one}" in summary and f"reward.{one}" in summary
        ],
        "total_compute": [
            {
                "queries": queries,
                "method": one,
                "total_flops": total,
                **_collect_metrics(summary, "accuracy", method=one),
            }
            for queries in QUERY_COUNTS
            for one in select_methods_of_kind(summary, *METHOD_KINDS)
            if (total := compute_total_flops(summary, one, queries)) is not None
        ],
        "break_even": [
            {"trained": own, "against": rival, **_flatten_interval("queries", summary[f"break_even.{own}-{rival}"])}
            for own, rival in _iterate_break_even_pairs(summary)
        ],
    }


def _collect_accuracy_records(summary: Summary, cost: str) -> list[FigureRecord]:
    best = find_pareto_front(summary, cost)
    return [
        {"method": one, **_collect_metrics(summary, cost, "accuracy", method=one), "pareto_front": one in best}
        for one in list_methods(summary)
        if f"{cost}.{one}" in summary
    ]


def _iterate_break_even_pairs(summary: Summary) -> Iterable[tuple[str, str]]:
    for name in summary:
        if name.startswith("break_even."):
            own, _, rival = name.removeprefix("break_even.").partition("-")
            yield own, rival


def _collect_metrics(summary: Summary, *metrics: str, method: str) -> FigureRecord:
    found: FigureRecord = {}
    for metric in metrics:
        found |= _flatten_interval(metric, summary[f"{metric}.{method}"])
    return found


def _flatten_interval(name: str, one: Mapping[str, float]) -> FigureRecord:
    return {name: one["value"], f"{name}_low": one["low"], f"{name}_high": one["high"]}
