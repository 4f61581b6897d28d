"""report.html: the sections of report.md with figures that take the page's colours, and the trace viewer.

One file that fetches nothing but its own report_data/ (see `nabla_trl.report.html.viewer`), and reads well without that. Words and
tables are report.md's; every number comes from the same summary, which the page also holds.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from matplotlib.figure import Figure

from nabla_trl.evaluation.method import list_methods
from nabla_trl.evaluation.rows import Row
from nabla_trl.report import samples
from nabla_trl.report.conclusions import evaluate_targets, format_cost, format_relative_flops
from nabla_trl.report.html import viewer
from nabla_trl.report.html.figures import FigureRecord, collect_figure_data, plot_page_figures, render_svg
from nabla_trl.report.summary import Summary, find_pareto_front, group_problems_by_level, has_fact
from nabla_trl.traces.storage import EVAL_TRACES_DIR
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.markdown import format_bullets, format_html_table, markdown_to_html
from nabla_trl.utils.statistics import Interval

COST_TABS = ("flops", "seconds", "tokens")
CARD_CLASSES = {"reached": "good", "NOT reached": "bad", "not measured": "none"}
NO_LEVELS_NOTE = "Missing: the problems have no levels, or one only, or the run's facts do not tell them."
_MAX_TABLE_ROWS = 400  # of a figure's data; all of it can be downloaded


def render_page(
    folder: Path,
    sections: Mapping[str, Sequence[str]],
    summary: Summary,
    rows: Sequence[Row],
    facts: Mapping,
    reward_by_round: Mapping[str, Sequence[Interval]],
    figures: Mapping[str, Figure | None],
    titles: Mapping[str, str],
) -> str:
    """The page, as text; `folder`/report_data is written on the way.

    Args:
        sections: heading -> blocks of Markdown, as in report.md.
        figures: name -> figure; those of the page alone are added here. Their titles are taken off.
    """
    drawn = FigureSet(
        summary, {**figures, **plot_page_figures(summary, titles)}, collect_figure_data(summary, reward_by_round)
    )
    body = {
        "Results": _render_results(sections, summary),
        "Accuracy against compute": _render_cost_tabs(drawn),
        "Scaling, and is the reward being hacked?": _render_scaling(sections, drawn),
        samples.SAMPLES_HEADING: _render_with_figures(sections[samples.SAMPLES_HEADING], drawn),
        "Test-time against train-time": _render_with_figures(sections["Test-time against train-time"], drawn),
        "By level": _render_levels(summary, facts),
        "Traces": render_traces(folder, rows, facts, summary),
        "Provenance": _render_provenance(folder, sections, summary, facts),
    }
    title, statement = facts["title"], markdown_to_html(sections[""][1])
    parts = {
        "title": html.escape(title),
        "style": _read_asset("style.css"),
        "statement": statement,
        "nav": "".join(f'<a href="#{_make_anchor(name)}">{html.escape(name)}</a>' for name in body),
        "body": "\n".join(
            f'<section id="{_make_anchor(name)}"><h2>{html.escape(name)}</h2>\n{text}\n</section>'
            for name, text in body.items()
        ),
        "summary": json.dumps(summary, allow_nan=False).replace("<", "\\u003c"),
        "script": _read_asset("page.js") + _read_asset("trace.js") + _read_asset("viewer.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read_asset("template.html"))


def _read_asset(name: str) -> str:
    return (files("nabla_trl.report.html") / "web" / name).read_text(encoding="utf-8")


def _make_anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


# --- figures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FigureSet:
    """Figures by name, each with the numbers it shows."""

    summary: Summary
    figures: Mapping[str, Figure | None]
    data: Mapping[str, Sequence[FigureRecord]]

    def render_html(self, name: str) -> str:
        """A figure with its data one click away; a sentence where it could not be drawn."""
        figure = self.figures.get(name)
        if figure is None:
            return f"<p>Not drawn for want of rows or facts: {name.replace('_', ' ')}.</p>"
        title, subject, svg = render_svg(figure, name, self.summary)
        caption = f"<figcaption><b>{html.escape(title)}</b> <span>{html.escape(subject)}</span></figcaption>"
        plot = f'<div class="plot" tabindex="0">{svg}</div>'
        return f'<figure id="figure-{name}">{caption}{plot}{render_data(name, self.data[name])}</figure>'


def render_data(name: str, records: Sequence[FigureRecord]) -> str:
    """Numbers behind a click: a table, and downloads as CSV and JSON that the page holds itself."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    links = _render_download(f"{name}.csv", "text/csv", out.getvalue())
    links += " " + _render_download(f"{name}.json", "application/json", json.dumps(records, indent=1))
    heads = [html.escape(one.replace("_", " ")) for one in (records[0] if records else ())]
    lines = [[_format_value(one) for one in record.values()] for record in islice(records, _MAX_TABLE_ROWS)]
    more = len(records) - len(lines)
    note = f"<p>{more} more rows are in the downloads.</p>" if more > 0 else ""
    table = format_html_table(heads, lines)
    return f'<details class="data"><summary>Data</summary><p class="links">{links}</p>{table}{note}</details>'


def _render_download(name: str, kind: str, text: str) -> str:
    return f'<a download="{name}" href="data:{kind};charset=utf-8,{quote(text)}">{name}</a>'


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else html.escape(str(value))


# --- sections -----------------------------------------------------------------------------------------


def _render_blocks(blocks: Sequence[str]) -> str:
    return "\n".join(map(markdown_to_html, blocks))


def _render_details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _render_results(sections: Mapping[str, Sequence[str]], summary: Summary) -> str:
    cards = "".join(
        f'<li class="{CARD_CLASSES[verdict]}"><b>{html.escape(verdict)}</b><span>{html.escape(target)}</span>'
        f"<small>{html.escape(measured)}</small></li>"
        for target, measured, verdict in evaluate_targets(summary)
    )
    note = "\n".join(map(markdown_to_html, sections["Figures to reach"][1:]))
    return "\n".join(
        [
            f'<ul class="cards">{cards}</ul>',
            _render_method_table(summary) if list_methods(summary) else markdown_to_html(sections["Results"][0]),
            *map(markdown_to_html, sections["Results"][1:]),
            _render_details("Verdict, comparison by comparison", _render_blocks(sections["Verdict"]) + note),
            _render_details(
                "Paired differences of accuracy", _render_blocks(sections["Paired differences of accuracy"])
            ),
        ]
    )


def _render_method_table(summary: Summary) -> str:
    heads = ["method", "accuracy", "", "reward", "FLOPs", "× best_of_16", "seconds", "tokens", "seeds", "errors"]
    best = find_pareto_front(summary, "flops")
    lines = []
    for method in list_methods(summary):
        one, reward = summary[f"accuracy.{method}"], summary.get(f"reward.{method}")
        mark = ' <b title="Pareto front">●</b>' if method in best else ""
        cells = [
            f"<code>{html.escape(method)}</code>{mark}",
            _render_sortable(format_interval(one), one["value"]),
            _render_interval_bar(one),
            _render_sortable(format_interval(reward, ".3g"), reward["value"]) if reward else "–",
            _render_cost(summary, "flops", method),
            format_relative_flops(summary, method),
            _render_cost(summary, "seconds", method),
            _render_cost(summary, "tokens", method),
            str(one["seeds"]),
            str(round(summary[f"errors.{method}"]["value"])),
        ]
        lines.append(cells)
    note = '<p class="note">● on the Pareto front of accuracy and FLOPs. A heading sorts by its column.</p>'
    return f"{format_html_table(heads, lines, 'headline')}\n{note}"


def _render_cost(summary: Summary, cost: str, method: str) -> str:
    one = summary.get(f"{cost}.{method}")
    if one is None:
        return "–"
    words = f"{one['value']:.0f}" if cost == "tokens" else format_cost(summary, cost, method)
    return _render_sortable(words, one["value"])


def _render_sortable(words: str, value: float) -> str:
    """Text in a cell that sorts by a number."""
    return f'{words}<data value="{value!r}"></data>'


def _render_interval_bar(one: Mapping[str, float]) -> str:
    low, value, high = (100 * one[side] for side in ("low", "value", "high"))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="rail" d="M0 5H100"/><path class="range" d="M{low:.1f} 5H{high:.1f}"/>'
        f'<path class="at" d="M{value:.1f} 1V9"/></svg>'
    )


def _render_cost_tabs(figures: FigureSet) -> str:
    panels = "".join(f'<div data-tab="{cost}">{figures.render_html("accuracy_" + cost)}</div>' for cost in COST_TABS)
    return f'<div class="tabs">{panels}</div>'


def _render_scaling(sections: Mapping[str, Sequence[str]], figures: FigureSet) -> str:
    pictures = [figures.render_html(name) for name in ("scaling", "reward_accuracy", "reward_rounds")]
    return "\n".join([*pictures, *map(markdown_to_html, sections["Is the reward sound under search?"])])


def _render_with_figures(blocks: Sequence[str], figures: FigureSet) -> str:
    """A section of report.md, its images replaced by the page's own figures."""

    def shown(block: str) -> str:
        image = re.fullmatch(r"!\[[^]]*\]\(plots/(\w+)\.png\)", block)
        return figures.render_html(image[1]) if image else markdown_to_html(block)

    return "\n".join(map(shown, blocks))


def _render_levels(summary: Summary, facts: Mapping) -> str:
    found = group_problems_by_level(facts)
    if not found:
        return f"<p>{NO_LEVELS_NOTE}</p>"
    keys = ("low", "high", "seeds", "problems")
    records = [
        {"level": level, "method": method, "accuracy": one["value"], **{key: one[key] for key in keys}}
        for level in found
        for method in list_methods(summary)
        if (one := summary.get(f"level.{level}.{method}"))
    ]
    heads = ["method", *(f"{html.escape(level)} <small>n = {len(own)}</small>" for level, own in found.items())]
    lines = [
        [
            f"<code>{html.escape(method)}</code>",
            *(_render_level_cell(summary.get(f"level.{one}.{method}")) for one in found),
        ]
        for method in list_methods(summary)
    ]
    return format_html_table(heads, lines, "levels") + render_data("levels", records)


def _render_level_cell(one: Mapping[str, float] | None) -> str:
    if one is None:
        return "–"
    words = f"{one['value']:.3f}<small>[{one['low']:.2f}, {one['high']:.2f}]</small>"
    return f'{words}<i style="--share:{one["value"]:.3f}"></i>'


# --- traces and provenance ----------------------------------------------------------------------------


def render_traces(folder: Path, rows: Sequence[Row], facts: Mapping, summary: Summary) -> str:
    """The viewer's frame; what it shows lies in report_data/. Damaged traces do not keep a report from being made."""
    sources, notes = [folder / name for name in ("traces", EVAL_TRACES_DIR)], []
    try:
        tokens = next(
            (found for source in sources if (found := viewer.TokenTable.read(source)).texts), viewer.TokenTable()
        )
        training, held_out = (viewer.iterate_traces(source) for source in sources)
        shown = viewer.write_viewer_data(folder, training, held_out, tokens, rows, facts, summary)
        if shown["traces"] and not tokens.texts:
            notes.append("The traces come without tokens.json, so tokens are shown by their ids.")
        if shown["traces"] == viewer.MAX_TRACES:
            notes.append(f"The first {viewer.MAX_TRACES} traces are shown.")
    except ValueError as error:
        viewer.write_viewer_data(folder, (), (), viewer.TokenTable(), rows, facts, summary)
        notes.append(f"The traces cannot be shown: {error}")
    text = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return text + _read_asset("viewer.html")


def _render_provenance(folder: Path, sections: Mapping[str, Sequence[str]], summary: Summary, facts: Mapping) -> str:
    extra = [f"hardware: {facts['hardware']}"] if has_fact(facts, "hardware") else []
    command, made_with = sections["Provenance"]
    settings = folder / "config.yaml"
    parts = [markdown_to_html(command), markdown_to_html(f"{made_with}\n{format_bullets(extra)}".rstrip())]
    if settings.is_file():
        parts.append(_render_details("config.yaml", f"<pre>{html.escape(settings.read_text(encoding='utf-8'))}</pre>"))
    parts.append(_render_details("Files", _render_blocks(sections["Files"])))
    whole = _render_download("summary.json", "application/json", json.dumps(summary, indent=1, allow_nan=False))
    facts_link = _render_download(
        "facts.json", "application/json", json.dumps(dict(facts), indent=1, ensure_ascii=False)
    )
    return "\n".join([*parts, f'<p class="links">All numbers: {whole} {facts_link}</p>'])
