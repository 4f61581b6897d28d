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
from nabla_trl.evaluation.method import family, labelled, methods, split
from nabla_trl.report.canvas import INK, STYLES, Labels, Point, canvas, engineering, page, panel, short, style
from nabla_trl.report.compute_tradeoff import KINDS, QUERIES, of_kind, total_flops
from nabla_trl.report.conclusions import accuracy, cost_in_words
from nabla_trl.report.figures import accuracy_figure
from nabla_trl.report.summary import Summary, front
from nabla_trl.utils.statistics import Interval

Record = dict[str, Any]

_HEADER = 2  # texts above a figure, which the page writes itself: title and subject
# Colours of `canvas` to variables of the page's style sheet, which differ by light and dark.
_VARIABLES = {
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


def page_figures(summary: Summary, titles: Mapping[str, str]) -> dict[str, Figure | None]:
    """The figures that report.md does not have."""
    return {
        "accuracy_tokens": accuracy_figure(summary, "tokens", titles),
        "scaling": scaling(summary, titles["subject"]),
        "reward_accuracy": reward_accuracy(summary, titles["subject"]),
    }


def curves(summary: Summary, *needed: str) -> dict[str, list[str]]:
    """Family -> its methods at two or more budgets, cheapest first, where all that is `needed` of each is known."""
    found: dict[str, list[str]] = {}
    for method in methods(summary):
        label, rest = split(method)
        if all(f"{name}.{method}" in summary for name in needed):
            found.setdefault(labelled(label, family(rest)[0]), []).append(method)
    ordered = {name: sorted(own, key=lambda one: summary[f"flops.{one}"]["value"]) for name, own in found.items()}
    return {name: own for name, own in ordered.items() if len(own) > 1}


def scaling(summary: Summary, subject: str) -> Figure | None:
    """Accuracy, and below it the reward, against FLOPs: families at several budgets, with intervals as bands."""
    found = curves(summary, "flops", "accuracy", "reward")
    if not found:
        return None
    title = "More compute: what happens to accuracy, and to the reward that is searched for"
    figure = page(title, f"{subject}; bands: 95% bootstrap intervals over problems")
    for metric, bottom in (("accuracy", 0.51), ("reward", 0.11)):
        axes = panel(figure, (0.1, bottom, 0.87, 0.34))
        axes.set_xscale("log")
        for own in found.values():
            _band(axes, summary, own, metric)
        axes.set_ylabel({"accuracy": "accuracy", "reward": "mean reward"}[metric])
        axes.margins(x=0.12, y=0.1)
        engineering(axes.xaxis, "FLOPs")
        axes.tick_params(labelbottom=metric == "reward")
        named = Labels(figure, axes)
        for own in found.values():
            named.avoid_line([_place(summary, "flops", metric, method) for method in own])
        for name, own in found.items():
            x, y = _place(summary, "flops", metric, own[-1])
            named.place(name, x, y, style(own[-1]).colour, size=8, weight="bold")
    figure.axes[-1].set_xlabel("FLOPs per problem (log scale)")
    return figure


def _band(axes: Axes, summary: Summary, own: Sequence[str], metric: str) -> None:
    xs = [summary[f"flops.{method}"]["value"] for method in own]
    ends = [[summary[f"{metric}.{method}"][side] for method in own] for side in ("low", "high")]
    look, line = style(own[-1]), STYLES.get(family(own[-1])[0], style(own[-1])).line
    axes.fill_between(xs, *ends, color=look.colour, alpha=0.12, lw=0)
    ys = [summary[f"{metric}.{method}"]["value"] for method in own]
    axes.plot(xs, ys, ls=line, color=look.colour, lw=1.5)
    for method, x, y in zip(own, xs, ys, strict=True):
        axes.plot([x], [y], zorder=3, gid=f"method {method}", **style(method).look(5))


def reward_accuracy(summary: Summary, subject: str) -> Figure | None:
    """Accuracy against the mean reward: where a line bends down to the right, the reward is being hacked."""
    known = [method for method in methods(summary) if f"reward.{method}" in summary]
    if len(known) < 2:
        return None
    title = "Is the reward being hacked? Then its line bends down to the right"
    figure, axes = canvas(title, f"{subject}; lines join the budgets of one kind; bars: 95% bootstrap intervals")
    axes.set_xlabel("mean reward of the kept response")
    axes.set_ylabel("accuracy on held-out problems")
    points = [_point(summary, method) for method in known]
    for point in points:
        colour = style(point.method).colour
        reward = summary[f"reward.{point.method}"]
        bars = {"xerr": [[point.x - reward["low"]], [reward["high"] - point.x]]}
        bars["yerr"] = [[point.y - point.low], [point.high - point.y]]
        axes.errorbar(point.x, point.y, **bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.4)
        axes.plot([point.x], [point.y], zorder=3, gid=f"method {point.method}", **style(point.method).look(5.5))
    lines = {
        name: [_place(summary, "reward", "accuracy", one) for one in own]
        for name, own in curves(summary, "flops", "accuracy", "reward").items()
    }
    for name, line in lines.items():
        colour = next(style(one).colour for one in known if _kind(one) == name)
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.2, alpha=0.8, zorder=2)
    axes.margins(x=0.12, y=0.1)
    named = Labels(figure, axes)
    for point in points:
        named.avoid_bar(point)
    for line in lines.values():
        named.avoid_line(line)
    ends = {name: max((one for one in known if _kind(one) == name), key=_size) for name in lines}
    for point in points:
        name, (x, y) = _kind(point.method), (point.x, point.y)
        if name not in lines:
            named.place(short(point.method), x, y, INK, size=8)
        elif point.method == ends[name]:
            named.place(point.method, x, y, style(point.method).colour, size=8, weight="bold")
    return figure


def _kind(method: str) -> str:
    label, rest = split(method)
    return labelled(label, family(rest)[0])


def _size(method: str) -> float:
    return family(split(method)[1])[1]


def _point(summary: Summary, method: str) -> Point:
    one = summary[f"accuracy.{method}"]
    return Point(method, summary[f"reward.{method}"]["value"], one["value"], one["low"], one["high"])


def _place(summary: Summary, across: str, up: str, method: str) -> tuple[float, float]:
    return summary[f"{across}.{method}"]["value"], summary[f"{up}.{method}"]["value"]


# --- SVG ----------------------------------------------------------------------------------------------


def inline_svg(figure: Figure, name: str, summary: Summary) -> tuple[str, str, str]:
    """A figure of `canvas` as (title, subject, SVG for a page): colours are variables, texts are texts.

    Markers of methods get tool tips with their figures.
    """
    title, subject = (" ".join(text.get_text().split()) for text in figure.texts[:_HEADER])
    for text in figure.texts[:_HEADER]:
        text.remove()
    for text in figure.findobj(Text):
        text.set_path_effects([])  # they would turn letters into shapes; the style sheet does the same
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.04, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (?:(\w+) )?([\d.]+px)[^;\"]*", _font, svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _variable(match[0]), svg)
    svg = re.sub(r'<g id="method ([^"]+)">', lambda match: _tip(summary, match[1]), svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    head = f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{html.escape(title)}">'
    return title, subject, head + svg[svg.index(">") + 1 :].rstrip()


def _font(match: re.Match[str]) -> str:
    return f"font: {match[1] or '400'} {match[2]} system-ui, sans-serif"


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour)
    return f"var({name})" if name else colour


def _tip(summary: Summary, method: str) -> str:
    costs = ", ".join(cost_in_words(summary, cost, method) for cost in ("flops", "seconds"))
    return f'<g class="mark"><title>{html.escape(f"{method}: {accuracy(summary, method)}; {costs}")}</title>'


# --- the numbers behind them --------------------------------------------------------------------------


def figure_data(summary: Summary, rounds: Mapping[str, Sequence[Interval]]) -> dict[str, list[Record]]:
    """Figure -> the numbers that it shows, as records of plain values."""
    return {
        **{f"accuracy_{cost}": _against(summary, cost) for cost in ("flops", "seconds", "tokens")},
        "scaling": [
            {"kind": name, "method": one, **_spread(summary, "flops", "accuracy", "reward", method=one)}
            for name, own in curves(summary, "flops", "accuracy", "reward").items()
            for one in own
        ],
        "reward_accuracy": [
            {"method": one, **_spread(summary, "reward", "accuracy", method=one)}
            for one in methods(summary)
            if f"reward.{one}" in summary
        ],
        "reward_rounds": [
            {"method": method, "round": number, "reward": one.value, "reward_low": one.low, "reward_high": one.high}
            for method, curve in rounds.items()
            for number, one in enumerate(curve)
        ],
        "samples": [
            {"policy": policy, "estimator": f"{name}@k", "k": k, **_entry("value", one)}
            for policy, own in metrics.curves(summary).items()
            for name in ("pass", "maj")
            for k, one in own[name].items()
        ],
        "reward_kl": [
            {"method": one, **_spread(summary, "kl", "reward", method=one)}
            for one in methods(summary)
            if f"kl.{one}" in summary and f"reward.{one}" in summary
        ],
        "total_compute": [
            {"queries": queries, "method": one, "total_flops": total, **_spread(summary, "accuracy", method=one)}
            for queries in QUERIES
            for one in of_kind(summary, *KINDS)
            if (total := total_flops(summary, one, queries)) is not None
        ],
        "break_even": [
            {"trained": own, "against": rival, **_entry("queries", summary[f"break_even.{own}-{rival}"])}
            for own, rival in _crossings(summary)
        ],
    }


def _against(summary: Summary, cost: str) -> list[Record]:
    best = front(summary, cost)
    return [
        {"method": one, **_spread(summary, cost, "accuracy", method=one), "pareto_front": one in best}
        for one in methods(summary)
        if f"{cost}.{one}" in summary
    ]


def _crossings(summary: Summary) -> Iterable[tuple[str, str]]:
    for name in summary:
        if name.startswith("break_even."):
            own, _, rival = name.removeprefix("break_even.").partition("-")
            yield own, rival


def _spread(summary: Summary, *metrics: str, method: str) -> Record:
    found: Record = {}
    for metric in metrics:
        found |= _entry(metric, summary[f"{metric}.{method}"])
    return found


def _entry(name: str, one: Mapping[str, float]) -> Record:
    return {name: one["value"], f"{name}_low": one["low"], f"{name}_high": one["high"]}
