"""report.html: the sections of report.md with figures that take the page's colors, and the trace viewer.

The page is one file that fetches only its own report_data/ (see `nabla_trl.report.html.viewer`), and can be read
without that. Its templates, style and scripts are in web/. Every number comes from the summary, which the page holds.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from nabla_trl.evaluation.method import list_methods
from nabla_trl.evaluation.rows import Row
from nabla_trl.report.conclusions import evaluate_targets, format_cost, format_relative_flops, format_reward
from nabla_trl.report.groups import describe_method, group_methods, list_families
from nabla_trl.report.html import viewer
from nabla_trl.report.html.figures import FigureRecord, collect_figure_data, get_css_color, render_svg
from nabla_trl.report.markdown import markdown_to_html
from nabla_trl.report.summary import Summary, find_pareto_front, get_value, group_problems_by_level
from nabla_trl.tasks.shards import list_run_folders
from nabla_trl.traces.storage import EVAL_TRACES_DIR, TRACES_DIR
from nabla_trl.utils.formatting import format_count, format_interval, format_seconds, format_si
from nabla_trl.utils.statistics import Interval

_HEADING_WORDS = {"flops": "FLOPs", "kl": "KL", "maj@k": "maj@k"}


def render_page(
    folder: Path,
    sections: Mapping[str, Sequence[str]],
    summary: Summary,
    rows: Sequence[Row],
    facts: Mapping,
    reward_by_round: Mapping[str, Sequence[Interval]],
    figures: Mapping[str, Figure | None],
    narrow_figures: Mapping[str, Figure | None],
) -> str:
    """Return the page and write `folder`/report_data.

    Args:
        sections: Heading -> blocks of Markdown, as in report.md.
        figures: Name -> figure. The figures lose their titles.
        narrow_figures: The same figures for phones.
    """
    settings = folder / "config.yaml"
    levels = group_problems_by_level(facts)
    return (
        _create_environment(summary)
        .get_template("report.html")
        .render(
            texts=sections,
            summary=summary,
            facts=dict(facts),
            methods=list_methods(summary),
            has_errors=any(get_value(summary, "errors", method) for method in list_methods(summary)),
            groups=group_methods(list_methods(summary)),
            extra_costs=[
                cost for cost in ("calls", "dollars") if any(name.startswith(f"{cost}.") for name in summary)
            ],
            targets=evaluate_targets(summary) if facts.get("show_targets") else [],
            pareto_front=find_pareto_front(summary, "flops"),
            levels=levels,
            figures={name: _render_figure(name, figures, narrow_figures, summary) for name in figures},
            records=collect_figure_data(summary, reward_by_round)
            | {"levels": _collect_level_records(summary, levels)},
            trace_notes=write_trace_viewer(folder, rows, facts, summary),
            settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        )
    )


def _create_environment(summary: Summary) -> jinja2.Environment:
    loader = jinja2.PackageLoader("nabla_trl.report.html", "web")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "anchor": lambda name: re.sub(r"\W+", "-", name.lower()).strip("-"),
        "asset": lambda name: Markup(loader.get_source(environment, name)[0]),  # as it is, not a template
        "cell": _format_cell,
        "color": get_css_color,
        "cost": lambda method, cost: format_cost(summary, cost, method),
        "count": format_count,
        "csv": _to_csv,
        "description": describe_method,
        "families": list_families,
        "heading": lambda key: " ".join(_HEADING_WORDS.get(word, word) for word in key.split("_")),
        "image_name": _get_image_name,
        "interval": format_interval,
        "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False),
        "markdown": lambda block: Markup(markdown_to_html(block)),
        "reward": lambda method: format_reward(summary, method),
        "relative_flops": lambda method: format_relative_flops(summary, method),
        "script_json": lambda value: Markup(viewer.to_script_json(value)),
    }
    return environment


def _format_cell(value: Any, key: str) -> str:
    """Return a value of a figure's data as text, in the unit that its key names."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no", None: "–"}.get(value, str(value))
    if "flops" in key:
        return format_si(value, "FLOPs")
    if key.startswith("seconds"):
        return format_seconds(value)
    return format_count(value) if isinstance(value, int) or key.startswith(("queries", "tokens")) else f"{value:.4g}"


def _to_csv(records: Sequence[FigureRecord]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _get_image_name(block: str) -> str:
    """Return the name of the plot that a block of Markdown shows, empty if it is no image."""
    image = re.fullmatch(r"!\[[^]]*\]\(plots/(\w+)\.png\)", block)
    return image[1] if image else ""


def _render_figure(
    name: str, figures: Mapping[str, Figure | None], narrow_figures: Mapping[str, Figure | None], summary: Summary
) -> tuple[str, str, Markup, Markup] | None:
    """Return title, subject, and the SVG of a page and of a phone. None: there is no such figure."""
    figure, narrow_figure = figures[name], narrow_figures[name]
    if figure is None or narrow_figure is None:
        return None
    title, subject, svg = render_svg(figure, name, summary)
    return title, subject, Markup(svg), Markup(render_svg(narrow_figure, f"{name}-narrow", summary)[2])


def _collect_level_records(summary: Summary, levels: Mapping[str, Any]) -> list[FigureRecord]:
    records = []
    for level in levels:
        for method in list_methods(summary):
            entry = dict(summary.get(f"level.{level}.{method}", {}))
            if entry:
                records.append({"level": level, "method": method, "accuracy": entry.pop("value")} | entry)
    return records


def write_trace_viewer(folder: Path, rows: Sequence[Row], facts: Mapping, summary: Summary) -> list[str]:
    """Write report_data/ and return notes to the reader. A report is also made where traces are damaged."""
    names = (TRACES_DIR, EVAL_TRACES_DIR)
    sources = {name: [run_folder / name for run_folder in list_run_folders(folder)] for name in names}
    try:
        tables = [table for source in chain(*sources.values()) if (table := viewer.TokenTable.read(source)).texts]
        table = tables[0] if tables else viewer.TokenTable()
        traces, eval_traces = (chain.from_iterable(map(viewer.iterate_traces, sources[name])) for name in names)
        counts = viewer.write_viewer_data(folder, traces, eval_traces, table, rows, facts, summary)
    except ValueError as error:
        viewer.write_viewer_data(folder, (), (), viewer.TokenTable(), rows, facts, summary)
        return [f"The traces cannot be shown: {error}"]
    notes = []
    if counts["traces"] and not table.texts:
        notes.append("There is no tokens.json beside the traces, so tokens are shown by their ids.")
    if counts["traces"] == viewer.MAX_TRACES:
        notes.append(f"Only the first {viewer.MAX_TRACES} traces are shown.")
    return notes
