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

from nabla_trl.evaluation.method import methods
from nabla_trl.report import samples
from nabla_trl.report.conclusions import cost_in_words, relative_in_words, targets
from nabla_trl.report.html import viewer
from nabla_trl.report.html.figures import Record, figure_data, inline_svg, page_figures
from nabla_trl.report.summary import Summary, front, is_known, levels
from nabla_trl.traces.storage import HELD_OUT
from nabla_trl.utils.formatting import span
from nabla_trl.utils.markdown import as_html, bullets, html_table
from nabla_trl.utils.statistics import Interval

COSTS = ("flops", "seconds", "tokens")
MARKS = {"reached": "good", "NOT reached": "bad", "not measured": "none"}
NO_LEVELS = "Missing: the problems have no levels, or one only, or the run's facts do not tell them."
_SHOWN_ROWS = 400  # of a figure's data; all of it can be downloaded


def page(
    folder: Path,
    sections: Mapping[str, Sequence[str]],
    summary: Summary,
    rows: Sequence[Mapping],
    facts: Mapping,
    rounds: Mapping[str, Sequence[Interval]],
    figures: Mapping[str, Figure | None],
    titles: Mapping[str, str],
) -> str:
    """The page, as text; `folder`/report_data is written on the way.

    Args:
        sections: heading -> blocks of Markdown, as in report.md.
        figures: name -> figure; those of the page alone are added here. Their titles are taken off.
    """
    drawn = Figures(summary, {**figures, **page_figures(summary, titles)}, figure_data(summary, rounds))
    body = {
        "Results": _results(sections, summary),
        "Accuracy against compute": _tabs(drawn),
        "Scaling, and is the reward being hacked?": _sound(sections, drawn),
        samples.HEADING: _with_figures(sections[samples.HEADING], drawn),
        "Test-time against train-time": _with_figures(sections["Test-time against train-time"], drawn),
        "By level": _by_level(summary, facts),
        "Traces": traces_section(folder, rows, facts, summary),
        "Provenance": _provenance(folder, sections, summary, facts),
    }
    title, statement = facts["title"], as_html(sections[""][1])
    parts = {
        "title": html.escape(title),
        "style": _asset("style.css"),
        "statement": statement,
        "nav": "".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in body),
        "body": "\n".join(
            f'<section id="{_anchor(name)}"><h2>{html.escape(name)}</h2>\n{text}\n</section>'
            for name, text in body.items()
        ),
        "summary": json.dumps(summary, allow_nan=False).replace("<", "\\u003c"),
        "script": _asset("page.js") + _asset("trace.js") + _asset("viewer.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("template.html"))


def _asset(name: str) -> str:
    return (files("nabla_trl.report.html") / "web" / name).read_text(encoding="utf-8")


def _anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


# --- figures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Figures by name, each with the numbers it shows."""

    summary: Summary
    figures: Mapping[str, Figure | None]
    data: Mapping[str, Sequence[Record]]

    def html(self, name: str) -> str:
        """A figure with its data one click away; a sentence where it could not be drawn."""
        figure = self.figures.get(name)
        if figure is None:
            return f"<p>Not drawn for want of rows or facts: {name.replace('_', ' ')}.</p>"
        title, subject, svg = inline_svg(figure, name, self.summary)
        caption = f"<figcaption><b>{html.escape(title)}</b> <span>{html.escape(subject)}</span></figcaption>"
        plot = f'<div class="plot" tabindex="0">{svg}</div>'
        return f'<figure id="figure-{name}">{caption}{plot}{data_html(name, self.data[name])}</figure>'


def data_html(name: str, records: Sequence[Record]) -> str:
    """Numbers behind a click: a table, and downloads as CSV and JSON that the page holds itself."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    links = _download(f"{name}.csv", "text/csv", out.getvalue())
    links += " " + _download(f"{name}.json", "application/json", json.dumps(records, indent=1))
    heads = [html.escape(one.replace("_", " ")) for one in (records[0] if records else ())]
    lines = [[_plain(one) for one in record.values()] for record in islice(records, _SHOWN_ROWS)]
    more = len(records) - len(lines)
    note = f"<p>{more} more rows are in the downloads.</p>" if more > 0 else ""
    table = html_table(heads, lines)
    return f'<details class="data"><summary>Data</summary><p class="links">{links}</p>{table}{note}</details>'


def _download(name: str, kind: str, text: str) -> str:
    return f'<a download="{name}" href="data:{kind};charset=utf-8,{quote(text)}">{name}</a>'


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else html.escape(str(value))


# --- sections -----------------------------------------------------------------------------------------


def _blocks(blocks: Sequence[str]) -> str:
    return "\n".join(map(as_html, blocks))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _results(sections: Mapping[str, Sequence[str]], summary: Summary) -> str:
    cards = "".join(
        f'<li class="{MARKS[verdict]}"><b>{html.escape(verdict)}</b><span>{html.escape(target)}</span>'
        f"<small>{html.escape(measured)}</small></li>"
        for target, measured, verdict in targets(summary)
    )
    note = "\n".join(map(as_html, sections["Figures to reach"][1:]))
    return "\n".join(
        [
            f'<ul class="cards">{cards}</ul>',
            _headline(summary) if methods(summary) else as_html(sections["Results"][0]),
            *map(as_html, sections["Results"][1:]),
            _folded("Verdict, comparison by comparison", _blocks(sections["Verdict"]) + note),
            _folded("Paired differences of accuracy", _blocks(sections["Paired differences of accuracy"])),
        ]
    )


def _headline(summary: Summary) -> str:
    heads = ["method", "accuracy", "", "reward", "FLOPs", "× best_of_16", "seconds", "tokens", "seeds", "errors"]
    best = front(summary, "flops")
    lines = []
    for method in methods(summary):
        one, reward = summary[f"accuracy.{method}"], summary.get(f"reward.{method}")
        mark = ' <b title="Pareto front">●</b>' if method in best else ""
        cells = [
            f"<code>{html.escape(method)}</code>{mark}",
            _valued(span(one), one["value"]),
            _bar(one),
            _valued(span(reward, ".3g"), reward["value"]) if reward else "–",
            _cost(summary, "flops", method),
            relative_in_words(summary, method),
            _cost(summary, "seconds", method),
            _cost(summary, "tokens", method),
            str(one["seeds"]),
            str(round(summary[f"errors.{method}"]["value"])),
        ]
        lines.append(cells)
    note = '<p class="note">● on the Pareto front of accuracy and FLOPs. A heading sorts by its column.</p>'
    return f"{html_table(heads, lines, 'headline')}\n{note}"


def _cost(summary: Summary, cost: str, method: str) -> str:
    one = summary.get(f"{cost}.{method}")
    if one is None:
        return "–"
    words = f"{one['value']:.0f}" if cost == "tokens" else cost_in_words(summary, cost, method)
    return _valued(words, one["value"])


def _valued(words: str, value: float) -> str:
    """Text in a cell that sorts by a number."""
    return f'{words}<data value="{value!r}"></data>'


def _bar(one: Mapping[str, float]) -> str:
    low, value, high = (100 * one[side] for side in ("low", "value", "high"))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="rail" d="M0 5H100"/><path class="range" d="M{low:.1f} 5H{high:.1f}"/>'
        f'<path class="at" d="M{value:.1f} 1V9"/></svg>'
    )


def _tabs(drawn: Figures) -> str:
    panels = "".join(f'<div data-tab="{cost}">{drawn.html("accuracy_" + cost)}</div>' for cost in COSTS)
    return f'<div class="tabs">{panels}</div>'


def _sound(sections: Mapping[str, Sequence[str]], drawn: Figures) -> str:
    pictures = [drawn.html(name) for name in ("scaling", "reward_accuracy", "reward_rounds")]
    return "\n".join([*pictures, *map(as_html, sections["Is the reward sound under search?"])])


def _with_figures(blocks: Sequence[str], drawn: Figures) -> str:
    """A section of report.md, its images replaced by the page's own figures."""

    def shown(block: str) -> str:
        image = re.fullmatch(r"!\[[^]]*\]\(plots/(\w+)\.png\)", block)
        return drawn.html(image[1]) if image else as_html(block)

    return "\n".join(map(shown, blocks))


def _by_level(summary: Summary, facts: Mapping) -> str:
    found = levels(facts)
    if not found:
        return f"<p>{NO_LEVELS}</p>"
    keys = ("low", "high", "seeds", "problems")
    records = [
        {"level": level, "method": method, "accuracy": one["value"], **{key: one[key] for key in keys}}
        for level in found
        for method in methods(summary)
        if (one := summary.get(f"level.{level}.{method}"))
    ]
    heads = ["method", *(f"{html.escape(level)} <small>n = {len(own)}</small>" for level, own in found.items())]
    lines = [
        [f"<code>{html.escape(method)}</code>", *(_level_cell(summary.get(f"level.{one}.{method}")) for one in found)]
        for method in methods(summary)
    ]
    return html_table(heads, lines, "levels") + data_html("levels", records)


def _level_cell(one: Mapping[str, float] | None) -> str:
    if one is None:
        return "–"
    words = f"{one['value']:.3f}<small>[{one['low']:.2f}, {one['high']:.2f}]</small>"
    return f'{words}<i style="--share:{one["value"]:.3f}"></i>'


# --- traces and provenance ----------------------------------------------------------------------------


def traces_section(folder: Path, rows: Sequence[Mapping], facts: Mapping, summary: Summary) -> str:
    """The viewer's frame; what it shows lies in report_data/. Damaged traces do not keep a report from being made."""
    sources, notes = [folder / name for name in ("traces", HELD_OUT)], []
    try:
        tokens = next((found for source in sources if (found := viewer.Tokens.read(source)).texts), viewer.Tokens())
        training, held_out = (viewer.stored_traces(source) for source in sources)
        shown = viewer.write_data(folder, training, held_out, tokens, rows, facts, summary)
        if shown["traces"] and not tokens.texts:
            notes.append("The traces come without tokens.json, so tokens are shown by their ids.")
        if shown["traces"] == viewer.MOST_TRACES:
            notes.append(f"The first {viewer.MOST_TRACES} traces are shown.")
    except ValueError as error:
        viewer.write_data(folder, (), (), viewer.Tokens(), rows, facts, summary)
        notes.append(f"The traces cannot be shown: {error}")
    text = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return text + _asset("viewer.html")


def _provenance(folder: Path, sections: Mapping[str, Sequence[str]], summary: Summary, facts: Mapping) -> str:
    extra = [f"hardware: {facts['hardware']}"] if is_known(facts, "hardware") else []
    command, made_with = sections["Provenance"]
    settings = folder / "config.yaml"
    parts = [as_html(command), as_html(f"{made_with}\n{bullets(extra)}".rstrip())]
    if settings.is_file():
        parts.append(_folded("config.yaml", f"<pre>{html.escape(settings.read_text(encoding='utf-8'))}</pre>"))
    parts.append(_folded("Files", _blocks(sections["Files"])))
    whole = _download("summary.json", "application/json", json.dumps(summary, indent=1, allow_nan=False))
    facts_link = _download("facts.json", "application/json", json.dumps(dict(facts), indent=1, ensure_ascii=False))
    return "\n".join([*parts, f'<p class="links">All numbers: {whole} {facts_link}</p>'])
