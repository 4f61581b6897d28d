"""Figures as SVG that takes the colors of a page, and the numbers behind each figure."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.method import list_methods
from nabla_trl.report.compute_tradeoff import QUERY_COUNTS, compute_total_flops
from nabla_trl.report.conclusions import format_accuracy, format_cost
from nabla_trl.report.plots import canvas
from nabla_trl.report.plots.canvas import HEADER
from nabla_trl.report.plots.figures import COST_AXES, group_budget_curves
from nabla_trl.report.summary import Summary, find_pareto_front, parse_pairs
from nabla_trl.utils.statistics import Interval

FigureRecord = dict[str, Any]

_SPACE_ABOVE = 0.22  # inches above the axes, for their titles and the names at the tops of lines
_NUM_HEADER_TEXTS = 2  # texts above a figure, title and subject, which the page writes itself
_CSS_VARIABLES = {  # colors of `plots.canvas` -> variables of style.css, which differ by light and dark
    canvas.INK: "--ink",
    "#000000": "--ink",
    canvas.GRAY: "--gray",
    "#e4e4e4": "--grid",
    "#ffffff": "--paper",
    canvas.BLUE: "--blue",
    canvas.VERMILION: "--vermilion",
    canvas.ORANGE: "--orange",
    canvas.TEAL: "--teal",
    canvas.PINK: "--pink",
    canvas.PLUM: "--plum",
    canvas.GREEN: "--green",
    canvas.INDIGO: "--indigo",
    canvas.OLIVE: "--olive",
    canvas.RED: "--red",
    canvas.BROWN: "--brown",
}


def get_css_color(method: str) -> str:
    """Return the color of a method's lines and markers, for a style sheet."""
    return f"var({_CSS_VARIABLES[canvas.get_style(method).color]})"


def render_svg(figure: Figure, name: str, summary: Summary) -> tuple[str, str, str]:
    """Return a figure as (title, subject, SVG). The figure loses its title and subject.

    In the SVG colors are variables, texts stay texts, and markers of methods have tooltips with their numbers.
    """
    header = figure.texts[:_NUM_HEADER_TEXTS]
    title, subject = (" ".join(text.get_text().split()) for text in header)
    for text in header:
        text.remove()
    for text in figure.findobj(Text):
        text.set_path_effects([])  # they would turn letters into shapes. The style sheet outlines texts instead
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True)

    def render_tooltip(match: re.Match[str]) -> str:
        costs = ", ".join(format_cost(summary, cost, match[1]) for cost in ("flops", "seconds"))
        text = f"{match[1]}: {format_accuracy(summary, match[1])}; {costs}"
        return f'<g class="mark"><title>{html.escape(text)}</title>'

    def use_css_variable(match: re.Match[str]) -> str:
        return f"var({_CSS_VARIABLES[match[0]]})" if match[0] in _CSS_VARIABLES else match[0]

    svg = out.getvalue()
    width, height = (72 * inches for inches in figure.get_size_inches())
    top = 72 * (HEADER - _SPACE_ABOVE)  # below the header
    view_box = f'viewBox="0 {top:.6g} {width:.6g} {height - top:.6g}"'
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r"font: (?:(\w+) )?([\d.]+px)[^;\"]*", lambda m: f"font: {m[1] or '400'} {m[2]} system-ui, sans-serif", svg
    )
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', _round_numbers, svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", use_css_variable, svg)
    svg = re.sub(r'<g id="method ([^"]+)">', render_tooltip, svg)
    used_ids = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used_ids else "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    attributes = f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{html.escape(title)}"'
    return title, subject, f"<svg {view_box} {attributes}>{svg[svg.index('>') + 1 :].rstrip()}"


def _round_numbers(match: re.Match[str]) -> str:
    """Return an attribute with hundredths of a point, which nobody sees and which halve a page."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", match[0])


def collect_figure_data(
    summary: Summary, reward_by_round: Mapping[str, Sequence[Interval]]
) -> dict[str, list[FigureRecord]]:
    """Return figure -> the numbers that it shows, as records of plain values."""
    fronts = {cost: find_pareto_front(summary, cost) for cost in COST_AXES}
    return {
        **{
            f"accuracy_{cost}": [
                record | {"pareto_front": record["method"] in front}
                for record in _collect_records(summary, cost, "accuracy")
            ]
            for cost, front in fronts.items()
        },
        "scaling": [
            {"family": name} | record
            for name, methods in group_budget_curves(summary).items()
            for record in _collect_records(summary, "flops", "accuracy", "reward", methods=methods)
        ],
        "reward_accuracy": _collect_records(summary, "reward", "accuracy"),
        "reward_rounds": [
            {"method": method, "round": number} | _flatten("reward", reward.to_dict())
            for method, curve in reward_by_round.items()
            for number, reward in enumerate(curve)
        ],
        "samples": [
            {"policy": policy, "estimator": f"{name}@k", "k": k} | _flatten("value", entry)
            for policy, curves in metrics.group_sample_metrics(summary).items()
            for name in ("pass", "maj")
            for k, entry in curves[name].items()
        ],
        "reward_kl": _collect_records(summary, "kl", "reward"),
        "total_compute": [
            {"queries": queries} | record | {"total_flops": total}
            for queries in QUERY_COUNTS
            for record in _collect_records(summary, "accuracy")
            if (total := compute_total_flops(summary, record["method"], queries)) >= 0  # not NaN
        ],
        "break_even": [
            {"trained_method": trained, "baseline": baseline}
            | _flatten("queries", summary[f"break_even.{trained}-{baseline}"])
            for trained, baseline in parse_pairs(summary, "break_even")
        ],
    }


def _collect_records(summary: Summary, *names: str, methods: Sequence[str] | None = None) -> list[FigureRecord]:
    """Return a record per method of which all the metrics are known."""
    records = []
    for method in list_methods(summary) if methods is None else methods:
        if all(f"{name}.{method}" in summary for name in names):
            record: FigureRecord = {"method": method}
            for name in names:
                record |= _flatten(name, summary[f"{name}.{method}"])
            records.append(record)
    return records


def _flatten(name: str, entry: Mapping[str, float]) -> FigureRecord:
    return {name: entry["value"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
