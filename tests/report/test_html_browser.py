"""report.html in a real headless Chromium, opened from the file system: on a page, on a phone, dark and light.

Without Chromium (`apt-get install chromium`) these tests are skipped. All share one browser, `browser.Browser`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from browser import Browser

from nabla_trl.evaluation.method import list_methods
from nabla_trl.report.html import viewer
from nabla_trl.report.html.figures import render_svg
from nabla_trl.report.plots.canvas import NARROW, WIDE, FigureSize
from nabla_trl.report.plots.figures import plot_accuracy
from nabla_trl.report.summary import Summary, summarize

INSPECT = (Path(__file__).parents[1] / "inspect_page.js").read_text(encoding="utf-8")
STYLE = Path(viewer.__file__).parent / "web" / "style.css"
PAGE, PHONE = 1400, 390  # widths
ALL_CONTROLS = "[...document.querySelectorAll('button, summary, select, input, a:not([download]), .item, circle')]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


class View:
    """The page in the browser, as a reader uses it."""

    def __init__(
        self, browser: Browser, folder: Path, *, width: int = PAGE, scheme: str = "light", scripts: bool = True
    ):
        self.browser = browser
        browser.set_view(width, scheme=scheme)
        browser.open(folder / "report.html", scripts=scripts)

    def text(self, query: str) -> str:
        return self.browser.run(f"document.querySelector({json.dumps(query)})?.textContent ?? ''")

    def texts(self, query: str) -> list[str]:
        return self.browser.run(f"[...document.querySelectorAll({json.dumps(query)})].map((node) => node.textContent)")

    def count_shown(self, query: str) -> int:
        nodes = f"[...document.querySelectorAll({json.dumps(query)})]"
        return self.browser.run(f"{nodes}.filter((node) => node.getClientRects().length > 0).length")

    def click(self, query: str) -> None:
        self.browser.run(f"document.querySelector({json.dumps(query)}).click()")

    def choose(self, query: str, value: str) -> None:
        """Choose an option of a list, or write into a field."""
        self.browser.run(
            f"(() => {{ const node = document.querySelector({json.dumps(query)}); node.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change']) node.dispatchEvent(new Event(kind, { bubbles: true })); })()"
        )

    def open_traces(self) -> None:
        """Go to the viewer, which loads its data when it is near."""
        self.browser.run("document.querySelector('#viewer').scrollIntoView()")
        self.browser.until("document.querySelector('#step-position') !== null")

    def wait_for_text(self, query: str, words: str) -> None:
        node = f"document.querySelector({json.dumps(query)})"
        self.browser.until(f"({node}?.textContent ?? '').includes({json.dumps(words)})")


@pytest.fixture
def view(browser: Browser, report_folder: Path) -> View:
    return View(browser, report_folder)


@pytest.fixture
def traces(view: View) -> View:
    view.open_traces()
    return view


# --- what a reader sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [PAGE, PHONE])
def test_it_fits_reads_and_fetches_nothing_from_outside(browser: Browser, report_folder: Path, width: int) -> None:
    view = View(browser, report_folder, width=width)
    assert view.text("h1") == pages.FACTS["title"].replace("\x00", "")
    assert view.count_shown("figure svg") == 8, "the figures of two costs are behind their tabs"
    assert view.count_shown("#figure-accuracy_flops .mark") == len(pages.WORLD)
    view.open_traces()
    browser.run("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    for at in range(3):
        browser.run(f"document.querySelectorAll('.tabs button')[{at}].click()")
        assert browser.run(INSPECT) == []
    browser.set_view(width, scheme="dark")
    assert browser.run(INSPECT) == []
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}
    assert browser.run("window.broken === undefined")


def test_what_scrolls_sideways_shows_it_and_keeps_the_names(browser: Browser, report_folder: Path) -> None:
    View(browser, report_folder, width=PHONE)
    for query in ("nav", ".scroll:has(.headline)"):
        node = f"document.querySelector('{query}')"
        assert browser.run(f"{node}.scrollWidth > {node}.clientWidth")
        assert "linear-gradient" in browser.run(f"getComputedStyle({node}).backgroundImage")
    cell = "document.querySelector('.headline td')"
    before = browser.run(f"{cell}.getBoundingClientRect().left")
    browser.run("document.querySelector('.scroll:has(.headline)').scrollLeft = 200")
    assert browser.run(f"{cell}.getBoundingClientRect().left") == before
    assert (
        browser.run("document.querySelector('.headline td:nth-child(2)').getBoundingClientRect().left") < before + 150
    )


def test_faults_would_be_found(browser: Browser, tmp_path: Path) -> None:
    svg = '<div class="plot"><svg viewBox="0 0 50 10" width="400"><text x="40" y="9" {}>{}</text></svg></div>'
    texts = svg.format("", "far too long") + svg.format('font-size="1"', "tiny") + '<p style="color: #999">gray</p>'
    wide = '<div style="width: 3000px; height: 1px"></div>'
    (tmp_path / "report.html").write_text(f"<!doctype html>{texts}{wide}", encoding="utf-8")
    View(browser, tmp_path)
    kinds = [fault.partition(":")[0] for fault in browser.run(INSPECT)]
    assert kinds == [kinds[0], "clipped", "small", "pale"] and kinds[0].startswith("the page is 30")


def make_crowded_summary() -> Summary:
    """Every family of methods at two budgets, with the longest names."""
    names = ("best_of", "weighted_best_of", "self_consistency", "adaptive_consistency", "dirichlet_consistency")
    votes = [f"{name}_{n}" for name in names for n in (4, 32)]
    searches = ("beam_search", "particle_filter", "nabla", "control", "shuffled", "paper", "something_else")
    methods = [
        *votes,
        *(f"{name}@best_of_{n}" for name in searches for n in (4, 8, 16, 32)),
        "greedy",
        "dpo_best_of_8",
    ]
    values = {
        "accuracy": lambda at: 0.4 + 0.01 * at,
        "flops": lambda at: 1e8 * 8 ** (at % 2),
        "seconds": lambda at: 1.0,
    }
    return {
        f"{metric}.{method}": {"value": value(at), "low": value(at) * 0.9, "high": value(at) * 1.1, "problems": 9}
        for metric, value in values.items()
        for at, method in enumerate(methods)
    }


def test_many_lines_stand_in_panels_of_their_groups(browser: Browser, tmp_path: Path) -> None:
    summary = make_crowded_summary()
    titles = {"flops": "Accuracy", "subject": "9 problems"}

    def draw(size: FigureSize, name: str) -> str:
        figure = plot_accuracy(summary, "flops", titles, size)
        assert figure is not None
        return render_svg(figure, name, summary)[2]

    plots = f'<figure><div class="plot wide">{draw(WIDE, "a")}</div><div class="plot narrow">{draw(NARROW, "b")}</div>'
    head = f'<meta name="viewport" content="width=device-width"><style>{STYLE.read_text()}</style>'
    (tmp_path / "report.html").write_text(f"<!doctype html>{head}<main>{plots}</figure></main>", encoding="utf-8")
    for width in (PAGE, PHONE):
        view = View(browser, tmp_path, width=width)
        assert browser.run(INSPECT) == []
        assert view.count_shown(".mark") == len(list_methods(summary))
        shown = [text for text in view.texts(f".{'wide' if width == PAGE else 'narrow'} text") if text[:1].isalpha()]
        groups = ["Single pass", "Votes and best-of-N", "Step-level searches", "nabla and its controls"]
        assert [text for text in shown if text in groups] == groups and "something_else" in shown


def test_themes_follow_the_system_and_the_button(browser: Browser, view: View) -> None:
    def get_ground() -> str:
        return browser.run("getComputedStyle(document.body).backgroundColor")

    light = get_ground()
    browser.set_view(PAGE, scheme="dark")
    dark = get_ground()
    assert light != dark
    view.click("#theme")
    assert get_ground() == light
    browser.press("d")
    assert get_ground() == dark


# --- tables and controls ------------------------------------------------------------------------------


def test_the_table_sorts_by_click_and_by_keyboard(browser: Browser, view: View) -> None:
    heads = "document.querySelectorAll('table.headline th button')"

    def list_accuracies() -> list[str]:
        return view.texts("table.headline td:nth-child(2)")

    def get_order(column: int) -> str:
        return browser.run(f"{heads}[{column}].parentElement.getAttribute('aria-sort')")

    grouped, groups = list_accuracies(), view.count_shown("tr.group")
    assert groups == 4 and get_order(1) == "none"
    browser.run(f"{heads}[1].click()")
    assert list_accuracies() == sorted(grouped, reverse=True) != grouped
    assert get_order(1) == "descending" and view.count_shown("tr.group") == 0
    browser.run(f"{heads}[1].focus()")
    browser.press("Enter")
    assert list_accuracies() == sorted(grouped) and get_order(1) == "ascending"
    browser.press(" ")
    assert list_accuracies() == grouped and get_order(1) == "none" and view.count_shown("tr.group") == groups
    browser.run(f"{heads}[4].click()")  # FLOPs, with units
    costs = [pages.WORLD[name.split()[0]][2] for name in view.texts("table.headline td:first-child")]
    assert costs == sorted(costs, reverse=True)
    browser.run(f"{heads}[0].click()")
    names = view.texts("table.headline td:first-child code")
    assert (
        (names[0], names[1], names[-1]) == ("best_of_1", "best_of_4", "sft_greedy")
        and get_order(0) == "ascending"
        and get_order(4) == "none"
    )


def test_tables_of_text_sort_by_their_units(browser: Browser, view: View) -> None:
    row = "Object.assign(document.createElement('tr'), { innerHTML: `<td>${text}</td>` })"
    texts = [
        "1.31 GFLOPs",
        "26.4 ms",
        "≤ 0.19",
        "-2.48 [-3, -1]",
        "10,000",
        "2.5 million",
        "3.29 min",
        "< 0.001",
        "never",
    ]
    values = browser.run(f"{json.dumps(texts)}.map((text) => sortKey({row}, 0))")
    assert values[:-1] == pytest.approx([1.31e9, 0.0264, 0.19, -2.48, 10_000, 2.5e6, 197.4, 0.001])
    assert values[-1] == "never"


@pytest.mark.parametrize("complete", [True, False])
def test_every_control_works_on_a_phone(browser: Browser, report_folder: Path, tmp_path: Path, complete: bool) -> None:
    shutil.copytree(report_folder, tmp_path, dirs_exist_ok=True)
    if not complete:
        shutil.rmtree(tmp_path / "report_data")
    view = View(browser, tmp_path, width=PHONE)
    browser.run("document.querySelector('#viewer').scrollIntoView()")
    if complete:
        browser.until("document.querySelector('#step-position') !== null")
    else:
        view.wait_for_text("#detail", "beside report.html")
    clicked = browser.run(
        f"(() => {{ let count = 0; for (const node of {ALL_CONTROLS}) {{ node.dispatchEvent(new "
        "MouseEvent('click', { bubbles: true, cancelable: true })); count += 1; } return count; })()"
    )
    for key in (*"dajk/", "ArrowRight", "ArrowLeft", "Home", "End"):
        browser.run("document.activeElement.blur()")
        browser.press(key)
    assert clicked > 60
    missing = "net::ERR_FILE_NOT_FOUND"
    assert [error for error in browser.errors if complete or missing not in error] == []
    assert ("beside report.html" in view.text("#detail")) != complete
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_without_scripts_it_is_a_plain_page(browser: Browser, report_folder: Path) -> None:
    view = View(browser, report_folder, scripts=False)
    assert view.count_shown("table.headline td:first-child") == len(pages.WORLD)
    assert view.count_shown("figure svg") == 10 and view.count_shown("button, select") == 0
    assert "needs JavaScript" in view.text("noscript")


# --- traces -------------------------------------------------------------------------------------------


def test_steps_through_a_refinement(browser: Browser, traces: View) -> None:
    view = traces
    assert view.text("#step-position") == "first response"
    assert view.text("#step .tokens") == "1+2=3;#3</script><|end|>"
    view.click("#next")
    assert "rejected" in view.text("#step .change")
    browser.press("ArrowRight")
    assert view.text("#step-position") == "proposal 2 of 3"
    assert "accepted" in view.text("#step .change") and "-1.000 → 1.000" in view.text("#step .change")
    assert view.texts("#step .tokens") == ["1+2=3;#3</script><|end|>", "1+2=7;#7<|end|>"]
    assert view.texts("#step .gone") == ["3", "3", "</script>"]
    assert view.texts("#step .added") == ["7", "7"]
    assert view.texts("#step .branch") == ["3", "7"]
    assert len(view.texts("#step .others tbody tr")) == 2, "both were proposed against the first response"
    assert len(view.texts(".curve circle")) == 4
    view.click("#last")
    assert "gold 7" in view.text("#step") and "Final response" in view.text("#step")
    browser.press("Home")
    assert view.text("#step-position") == "first response"
    browser.press("End")
    assert view.text("#step-position") == "proposal 3 of 3"
    browser.press("a", "ArrowLeft", "ArrowLeft")
    assert view.text("#step-position") == "first response"
    browser.press("ArrowRight")
    assert view.text("#step-position") == "proposal 2 of 3"
    assert browser.errors == []


def test_steps_through_the_search_of_a_held_out_problem(browser: Browser, traces: View) -> None:
    view = traces
    view.click("[data-source=rows]")
    view.wait_for_text("#detail h3", "p0")
    assert view.text("#step-position") == "first response"
    assert len(view.texts("#detail .others")) == 2, "the methods, and what was proposed"
    browser.press("ArrowRight", "ArrowRight")
    assert view.text("#step-position") == "proposal 2 of 3" and "accepted" in view.text("#step .change")
    view.choose("#search", "p2")
    view.wait_for_text("#detail h3", "p2")
    assert view.text("#step-position") == "" and "nothing to step through" in view.text("#detail")
    assert browser.errors == []


def test_gradients_color_the_tokens(browser: Browser, traces: View) -> None:
    traces.choose("#color", "gradient")
    spans = "[...document.querySelectorAll('#step .tokens span')]"
    shades = browser.run(f"{spans}.map((node) => getComputedStyle(node).backgroundColor)")
    assert shades[0] == "rgba(0, 0, 0, 0)"
    assert len({shades[4], shades[5], shades[0]}) == 3
    assert "8.00" in browser.run(f"{spans}[4].title")


def test_filters_switches_problems_and_finds(browser: Browser, traces: View) -> None:
    view = traces
    browser.press("j")
    view.wait_for_text("#detail h3", "train/1 ")
    for outcome, count in (("01", 3), ("10", 1), ("11", 1), ("00", 0)):
        view.choose("#outcome", outcome)
        assert len(view.texts("#items .item")) == count
    assert view.text("#detail") == "No problem matches these filters."
    view.choose("#outcome", "10")
    view.wait_for_text("#detail h3", "train/3 ")
    view.choose("#outcome", "")
    view.choose("#search", "train/4")
    view.wait_for_text("#detail h3", "train/4 ")
    assert view.text("#count") == "1 of 5"
    view.choose("#search", "")
    view.click("[data-source=rows]")
    view.choose("#outcome", "10")
    view.wait_for_text("#detail h3", f"p{pages.PROBLEMS - 1}")
    assert view.text("#count") == f"1 of {pages.PROBLEMS}"
    assert browser.errors == []


@pytest.mark.slow
def test_thousands_of_long_traces_are_quick_to_pick(browser: Browser, report_folder: Path, tmp_path: Path) -> None:
    shutil.copy(report_folder / "report.html", tmp_path)
    rows, traces = pages.make_rows(), pages.long_traces(5_000, 1_000)
    viewer.write_viewer_data(
        tmp_path, traces, [], viewer.TokenTable(), rows, pages.FACTS, summarize(rows, pages.FACTS)
    )
    view = View(browser, tmp_path)
    view.open_traces()
    assert view.text("#count") == "5000 of 5000"
    assert len(view.texts("#items .item")) < 60
    browser.run("document.querySelector('#items').scrollTop = 52 * 4000")
    item = "[...document.querySelectorAll('#items .item')].find((node) => node.textContent.includes('train/4000 '))"
    browser.until(f"{item} !== undefined")
    browser.run(f"{item}.click()")
    view.wait_for_text("#detail h3", "train/4000 ")
    spent = browser.run(
        "(() => { const t = performance.now(); showStep(1); showStep(2); return performance.now() - t; })()"
    )
    assert spent < 3_000  # milliseconds, on a machine that may be busy
    assert len(view.texts("#step .tokens span")) == 2_000
    assert browser.errors == []
