"""report.html: the same numbers as summary.json, nothing from outside, texts that stay texts, and its pieces."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pages
import pytest
import worlds

from nabla_trl.evaluation.method import list_methods
from nabla_trl.evaluation.rows import Row
from nabla_trl.grading.equivalence import VERIFIER_PREFIX
from nabla_trl.models.policy import Policy
from nabla_trl.report.conclusions import format_accuracy
from nabla_trl.report.groups import group_methods
from nabla_trl.report.html import viewer
from nabla_trl.report.markdown import format_table, markdown_to_html
from nabla_trl.report.summary import Summary, find_pareto_front, summarize
from nabla_trl.search.batches import write_token_texts

FIGURES = {
    *("accuracy_flops", "accuracy_seconds", "accuracy_tokens", "scaling", "reward_accuracy", "reward_rounds"),
    *("samples", "reward_kl", "total_compute", "break_even"),
}


class Page(HTMLParser):
    """What a page is made of: start tags with attributes, cells of table rows by their table's class, all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self._table, self._cell, self._script = "", False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"
        if tag == "table":
            self._table = dict(attrs).get("class") or ""
        if tag == "tr":
            self.rows.setdefault(self._table, []).append([])
        if tag in ("td", "th"):
            self.rows[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._script = False
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts.append(data)
        if self._cell:
            self.rows[self._table][-1][-1] += data


@pytest.fixture(scope="module")
def folder(report_folder: Path) -> Path:
    return report_folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def read_data(path: Path) -> Any:
    """The value that a file of report_data hands over."""
    text = path.read_text(encoding="utf-8")
    head = f'nablaData("{path.stem}",'
    assert text.startswith(head) and text.endswith(")\n")
    return json.loads(text[len(head) : -2])


def downloads(page: Page) -> dict[str, str]:
    links = [attrs for tag, attrs in page.tags if tag == "a" and "download" in attrs]
    return {str(one["download"]): unquote(str(one["href"]).partition(",")[2]) for one in links}


def test_the_page_holds_the_numbers_of_the_summary(page: Page, summary: Summary) -> None:
    assert json.loads(next(one for one in page.scripts if one.startswith("{"))) == summary
    heads, *lines = page.rows["headline"]
    titles = [line[0].split("  ")[0] for line in lines if len(line) == 1]
    groups = group_methods(list_methods(summary))
    assert [title for title, group in zip(titles, groups, strict=True) if title.startswith(group.title)] == titles
    lines = [line for line in lines if len(line) > 1]
    methods = [method for names in groups.values() for method in names]
    assert [line[0].split()[0] for line in lines] == methods and sorted(methods) == sorted(list_methods(summary))
    for method, line in zip(methods, lines, strict=True):
        assert line[heads.index("accuracy [95%]")] == format_accuracy(summary, method)
        assert line[heads.index("tokens")] == f"{summary[f'tokens.{method}']['value']:.0f}"
        assert ("●" in line[0]) == (method in find_pareto_front(summary, "flops"))


def test_every_figure_is_drawn_and_its_data_are_those_of_the_summary(page: Page, summary: Summary) -> None:
    drawn = [str(attrs["id"]).removeprefix("figure-") for tag, attrs in page.tags if tag == "figure"]
    assert set(drawn) == FIGURES and len(drawn) == len(FIGURES)
    files = downloads(page)
    for name in (*FIGURES, "levels"):
        as_csv = list(csv.DictReader(io.StringIO(files[f"{name}.csv"])))
        as_json = json.loads(files[f"{name}.json"])
        assert as_csv == [{key: str(one) for key, one in record.items()} for record in as_json] != []
    for record in json.loads(files["accuracy_tokens.json"]):
        for metric in ("tokens", "accuracy"):
            one = summary[f"{metric}.{record['method']}"]
            assert [record[metric], record[f"{metric}_low"], record[f"{metric}_high"]] == [*one.values()][:3]
    for record in json.loads(files["levels.json"]):
        assert record["accuracy"] == summary[f"level.{record['level']}.{record['method']}"]["value"]
    for record in json.loads(files["samples.json"]):
        one = summary[f"{record['estimator'].removesuffix('k')}{record['k']}.{record['policy']}"]
        assert [record["value"], record["value_low"], record["value_high"]] == [*one.values()][:3]
    for record in json.loads(files["break_even.json"]):
        assert record["queries"] == summary[f"break_even.{record['trained_method']}-{record['baseline']}"]["value"]
    assert json.loads(files["summary.json"]) == summary


def test_nothing_is_fetched_from_outside(folder: Path, page: Page) -> None:
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    text = (folder / "report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    known = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[\w./]+", text)) <= known


def test_texts_stay_texts(folder: Path, page: Page) -> None:
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{}, {"type": "application/json", "id": "summary"}, {}]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    for path in (folder / "report_data").iterdir():
        assert "<" not in path.read_text(encoding="utf-8").replace("\n", ""), path.name


def test_the_pieces_hold_the_traces(folder: Path) -> None:
    index = read_data(folder / "report_data" / "index.js")
    texts = read_data(folder / "report_data" / "tokens.js")
    for item, trace in zip(index["traces"], pages.make_traces(), strict=True):
        found = read_data(folder / "report_data" / f"traces-{item['chunk'][0]:04d}.js")[item["chunk"][1]]
        assert found["initial_ids"] == trace.initial_ids
        assert [one[2] for one in found["revisions"]] == [list(one.suffix) for one in trace.revisions]
        assert [texts["texts"][str(one)] for one in found["initial_ids"]] == [
            pages.TOKENS[one] for one in trace.initial_ids
        ]
        assert found["prompt"] == trace.prompt
        gain = found["predicted_gain"]
        step = gain["max"] / gain["levels_per_max"]
        assert np.abs(np.array(gain["levels"][0]) * step - trace.predicted_gain[0]).max() <= step
    assert texts["special_ids"] == [pages.END]


def test_held_out_problems_have_the_traces_of_the_search(folder: Path) -> None:
    items = read_data(folder / "report_data" / "index.js")["rows"]["items"]
    places = {item["name"].split()[0]: item["trace"] for item in items if item["trace"] is not None}
    assert set(places) == {"p0", "p1"}
    for trace in pages.make_held_out()[:2]:
        file, place = places[trace.problem_id]
        found = read_data(folder / "report_data" / f"eval_traces-{file:04d}.js")[place]
        assert (found["id"], found["initial_ids"]) == (trace.problem_id, trace.initial_ids)


def test_results_of_first_and_last_answers(folder: Path) -> None:
    index = read_data(folder / "report_data" / "index.js")
    assert [item["correct"] for item in index["traces"]] == [[0, 1]] * 3 + [[1, 0], [1, 1]]
    rows = index["rows"]
    assert (rows["base"], rows["search"]) == ("greedy", "nabla")
    expected = [[int(n < 10 or n == 23), int(n < 21)] for n in range(pages.PROBLEMS)]
    assert [item["correct"] for item in rows["items"]] == expected


def test_without_tokens_the_first_answer_is_known_where_it_is_the_last(tmp_path: Path) -> None:
    kept = pages.long_traces(1, 4)[0]
    viewer.write_viewer_data(tmp_path, [pages.make_trace(0), kept], [], viewer.TokenTable(), *_rows())
    index = read_data(tmp_path / "report_data" / "index.js")
    assert [item["correct"] for item in index["traces"]] == [[None, 1], [1, 1]]
    pages.write_tokens(tmp_path, tokenizer="another")
    assert not viewer.TokenTable.read(tmp_path).matches(kept)


def test_a_first_answer_that_a_scorer_judges_is_not_held_against_the_gold_one(tmp_path: Path) -> None:
    """Several answers may be right there, so without the scorer nothing is known of another than the last one."""
    judged = {"verifier": VERIFIER_PREFIX + "{}"}
    traces = [pages.make_trace(number) for number in range(2)]
    traces[1] = replace(traces[1], meta=traces[1].meta | judged)
    pages.write_tokens(tmp_path)
    viewer.write_viewer_data(tmp_path, traces, [], viewer.TokenTable.read(tmp_path), *_rows())
    index = read_data(tmp_path / "report_data" / "index.js")
    assert [item["correct"] for item in index["traces"]] == [[0, 1], [None, 1]]


def _rows() -> tuple[list[Row], dict[str, Any], Summary]:
    rows = pages.make_rows()
    return rows, pages.FACTS, summarize(rows, pages.FACTS)


def test_a_damaged_shard_is_named_on_the_page_and_costs_nothing_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "traces-00000-00000.parquet").write_bytes(b"PAR1 torn")
    html = viewer_section(tmp_path)
    assert "damaged trace shard" in html and "traces-00000-00000.parquet" in html
    index = read_data(tmp_path / "report_data" / "index.js")
    assert index["traces"] == [] and len(index["rows"]["items"]) == pages.PROBLEMS
    (tmp_path / "traces" / "traces-00000-00000.parquet").unlink()
    (tmp_path / "traces" / "tokens.json").write_text("[]")
    assert "tokens.json is not a table of tokens" in viewer_section(tmp_path)


def viewer_section(folder: Path) -> str:
    from nabla_trl.report.html.page import write_trace_viewer

    return " ".join(write_trace_viewer(folder, *_rows()))


def test_many_long_traces_are_split_and_written_in_seconds(tmp_path: Path) -> None:
    traces, rows = pages.long_traces(5_000, 1_000), _rows()
    began = time.process_time()  # of this process: other ones may hold the cores
    shown = viewer.write_viewer_data(tmp_path, traces, [], viewer.TokenTable(), *rows)
    assert time.process_time() - began < 12
    assert shown["traces"] == 5_000
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "report_data").iterdir()}
    pieces = [size for name, size in sizes.items() if name.startswith("traces-")]
    assert len(pieces) > 100 and max(pieces) < 2 * viewer.CHUNK_CHARS
    assert sizes["index.js"] < 2_000_000


def test_levels_are_those_of_the_facts() -> None:
    rows, facts, summary = _rows()
    right = [row.correct for row in rows if row.method == "nabla" and int(row.problem[1:]) % 2]
    assert summary["level.10.nabla"]["value"] == pytest.approx(sum(right) / len(right))
    assert summary["level.10.nabla"]["problems"] == len(right)
    assert list(dict.fromkeys(name.split(".")[1] for name in summary if name.startswith("level."))) == ["9", "10"]
    without = summarize(rows, facts | {"problems": None})
    assert without == {name: one for name, one in summary.items() if not name.startswith("level.")}


def test_the_front_holds_what_nothing_cheaper_or_equal_beats() -> None:
    summary = _rows()[2]
    points = {
        one: (summary[f"flops.{one}"]["value"], summary[f"accuracy.{one}"]["value"]) for one in list_methods(summary)
    }
    found = find_pareto_front(summary, "flops")
    assert found == sorted(found, key=lambda one: points[one])
    for method, (cost, right) in points.items():
        beaten = [other for other in found if points[other][0] <= cost and points[other][1] >= right]
        assert beaten, method
        if method in found:
            assert beaten[-1] == method


def test_markdown_blocks_as_html() -> None:
    assert markdown_to_html("### A & `b<c`") == "<h3>A &amp; <code>b&lt;c</code></h3>"
    assert markdown_to_html("```\na <b>\n```") == "<pre>a &lt;b&gt;</pre>"
    assert markdown_to_html("- one\n- `two`") == "<ul><li>one</li><li><code>two</code></li></ul>"
    html = markdown_to_html(format_table(["a", "n"], [["<x>", "0.5 [0.4, 0.6]"]]))
    assert "<td>&lt;x&gt;</td>" in html and '<td class="n">0.5 [0.4, 0.6]</td>' in html
    assert '<th scope="col">a</th><th scope="col" class="n">n</th>' in html


def test_token_texts_join_to_what_the_tokenizer_decodes(tmp_path: Path, policy: Policy) -> None:
    write_token_texts(tmp_path, policy)
    tokens = viewer.TokenTable.read(tmp_path)
    for question in worlds.QUESTIONS:
        ids = policy.tokenizer.encode(question, add_special_tokens=False)
        assert tokens.decode(ids) == policy.decode(ids) != ""
    assert tokens.decode(sorted(policy.stop_ids)) == ""
    written = (tmp_path / "tokens.json").stat().st_mtime_ns
    write_token_texts(tmp_path, policy)
    assert (tmp_path / "tokens.json").stat().st_mtime_ns == written


def test_costs_that_are_not_known_can_be_written_for_a_browser():
    row = Row(method="m", task="t", problem="p", seed=0, correct=True, flops=math.nan, seconds=math.nan)
    encoded = json.loads(viewer.to_script_json(viewer._encode_row(row)))
    assert encoded["flops"] is None and encoded["seconds"] is None
