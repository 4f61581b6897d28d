"""report.html in a real headless Chromium, opened from the file system: run with -m slow.

Needs Debian's chromium and chromium-driver (or any pair on the path), and the package selenium.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from nabla_trl.report.html import viewer  # noqa: E402
from nabla_trl.report.summary import summarize  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="no Chromium here: apt-get install chromium chromium-driver"),
]
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET += ("--force-prefers-reduced-motion",)  # no smooth scrolling: what is clicked stands still
QUIET += ("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    pages.write_run(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for one in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER, env=dict(os.environ)))
    yield driver
    driver.quit()


class View:
    """The page in the browser, as a reader uses it."""

    def __init__(self, browser: webdriver.Chrome, path: Path):
        self.browser = browser
        browser.get_log("browser"), browser.get_log("performance")  # those of earlier pages
        browser.get(path.as_uri())

    def all(self, query: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, query)

    def one(self, query: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, query)

    def until(self, true: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 30).until(lambda _: true())

    def text(self, query: str) -> str:
        return self.browser.execute_script("return document.querySelector(arguments[0]).textContent", query)

    def traces(self) -> None:
        """Go to the viewer, which loads its data once it is near."""
        self.browser.execute_script("document.querySelector('#viewer').scrollIntoView()")
        self.until(lambda: self.all("#step-position"))

    def press(self, *keys: str) -> None:
        self.one("body").send_keys(*keys)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] != "INFO"]

    def requested(self) -> set[str]:
        """The schemes and hosts that were asked for anything."""
        sent = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
        assert urls
        return {url.partition(":")[0] for url in urls}


@pytest.fixture
def view(browser: webdriver.Chrome, folder: Path) -> View:
    return View(browser, folder / "report.html")


def test_it_opens_draws_and_fetches_nothing_from_outside(view: View) -> None:
    assert view.text("h1") == pages.FACTS["title"].replace("\x00", "")
    sizes = [figure.size for figure in view.all("figure svg") if figure.is_displayed()]
    assert len(sizes) == 8  # the figures of two costs are behind their tabs
    assert all(one["width"] > 500 and one["height"] > 250 for one in sizes)
    marks = view.browser.execute_script("return document.querySelectorAll('#figure-accuracy_flops .mark').length")
    assert marks == len(pages.WORLD)
    view.traces()
    view.one("[data-source=rows]").click()
    view.until(lambda: "p0" in view.text("#detail h3"))
    assert view.errors() == []
    assert view.requested() <= {"file", "data"}
    assert view.browser.execute_script("return window.broken === undefined")


def test_tabs_data_and_sorting(view: View) -> None:
    view.all(".tabs button")[2].click()
    assert view.one("#figure-accuracy_tokens svg").is_displayed()
    assert not view.one("#figure-accuracy_flops svg").is_displayed()
    details = view.one("#figure-accuracy_tokens details")
    details.find_element(By.TAG_NAME, "summary").click()
    assert "best_of_16" in details.text and "accuracy_tokens.csv" in details.text
    view.all("table.headline th button")[1].send_keys(Keys.ENTER)
    down = [cell.text for cell in view.all("table.headline td:nth-child(2)")]
    assert down == sorted(down, reverse=True) and down[0] > down[-1]
    view.all("table.headline th button")[1].send_keys(Keys.ENTER)
    assert [cell.text for cell in view.all("table.headline td:nth-child(2)")] == sorted(down)


def test_steps_through_a_refinement(view: View) -> None:
    view.traces()
    assert view.text("#step-position") == "first response"
    assert view.text("#step .tokens") == "1+2=3;#3</script><|end|>"
    view.one("#next").click()
    assert "rejected" in view.text("#step .change")
    view.press(Keys.ARROW_RIGHT)
    assert view.text("#step-position") == "proposal 2 of 3"
    assert "accepted" in view.text("#step .change") and "-1.000 → 1.000" in view.text("#step .change")
    old, new = view.all("#step .tokens")
    assert (old.text, new.text) == ("1+2=3;#3</script><|end|>", "1+2=7;#7<|end|>")
    assert [one.text for one in old.find_elements(By.CSS_SELECTOR, ".gone")] == ["3", "3", "</script>"]
    assert [one.text for one in new.find_elements(By.CSS_SELECTOR, ".added")] == ["7", "7"]
    assert [one.text for one in view.all("#step .branch")] == ["3", "7"]
    assert len(view.all("#step .others tbody tr")) == 2  # both proposed against the first response
    assert len(view.all(".curve circle")) == 4
    view.one("#last").click()
    assert "gold 7" in view.text("#step") and "Final response" in view.text("#step")
    view.press(Keys.HOME)
    assert view.text("#step-position") == "first response"
    view.press(Keys.END)
    assert view.text("#step-position") == "proposal 3 of 3"
    view.press("a", Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert view.text("#step-position") == "first response"
    view.press(Keys.ARROW_RIGHT)
    assert view.text("#step-position") == "proposal 2 of 3"
    assert view.errors() == []


def test_steps_through_the_search_of_a_held_out_problem(view: View) -> None:
    view.traces()
    view.one("[data-source=rows]").click()
    view.until(lambda: view.text("#detail h3") == "p0")
    assert view.text("#step-position") == "first response"
    assert len(view.all("#detail .others")) == 2  # the methods, and what was proposed
    view.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert view.text("#step-position") == "proposal 2 of 3" and "accepted" in view.text("#step .change")
    view.one("#search").send_keys("p2")
    view.until(lambda: view.text("#detail h3") == "p2")
    assert not view.all("#step-position") and "nothing to step through" in view.text("#detail")
    assert view.errors() == []


def test_gradients_color_the_tokens(view: View) -> None:
    view.traces()
    Select(view.one("#color")).select_by_value("gradient")
    spans = view.all("#step .tokens span")
    shades = [one.value_of_css_property("background-color") for one in spans]
    assert shades[0] == "rgba(0, 0, 0, 0)"
    assert len({shades[4], shades[5], shades[0]}) == 3
    assert "8.00" in spans[4].get_attribute("title")


def test_filters_switches_problems_and_finds(view: View) -> None:
    view.traces()
    view.press("j")
    view.until(lambda: view.text("#detail h3").startswith("train/1 "))
    for outcome, found in (("01", 3), ("10", 1), ("11", 1), ("00", 0)):
        Select(view.one("#outcome")).select_by_value(outcome)
        assert len(view.all("#items .item")) == found
    assert view.text("#detail") == "No problem matches these filters."
    Select(view.one("#outcome")).select_by_value("10")
    view.until(lambda: view.all("#detail h3") and view.text("#detail h3").startswith("train/3 "))
    Select(view.one("#outcome")).select_by_value("")
    view.one("#search").send_keys("train/4")
    view.until(lambda: view.text("#detail h3").startswith("train/4 "))
    assert view.text("#count") == "1 of 5"
    view.one("#search").clear()
    view.one("[data-source=rows]").click()
    Select(view.one("#outcome")).select_by_value("10")
    view.until(lambda: view.text("#detail h3") == f"p{pages.PROBLEMS - 1}")
    assert view.text("#count") == f"1 of {pages.PROBLEMS}"
    assert view.errors() == []


def test_themes_follow_the_system_and_the_button(view: View) -> None:
    def ground() -> str:
        return view.one("body").value_of_css_property("background-color")

    def system(name: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": name}
        view.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    system("light")
    light = ground()
    system("dark")
    dark = ground()
    assert light != dark
    view.one("#theme").click()
    assert ground() == light
    view.press("d")
    assert ground() == dark


def test_a_phone_scrolls_down_only(view: View) -> None:
    phone = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    view.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        view.traces()
        assert view.browser.execute_script("return document.documentElement.scrollWidth") == 375
    finally:
        view.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_its_data_the_page_still_reads(browser: webdriver.Chrome, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "report.html", tmp_path)
    view = View(browser, tmp_path / "report.html")
    view.browser.execute_script("document.querySelector('#viewer').scrollIntoView()")
    view.until(lambda: "beside report.html" in view.text("#detail"))
    assert view.one("#figure-accuracy_flops svg").is_displayed()


def test_thousands_of_long_traces_are_quick_to_pick(browser: webdriver.Chrome, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "report.html", tmp_path)
    rows, traces = pages.make_rows(), pages.long_traces(5_000, 1_000)
    viewer.write_viewer_data(
        tmp_path, traces, [], viewer.TokenTable(), rows, pages.FACTS, summarize(rows, pages.FACTS)
    )
    view = View(browser, tmp_path / "report.html")
    view.traces()
    assert view.text("#count") == "5000 of 5000"
    assert len(view.all("#items .item")) < 60
    view.browser.execute_script("document.querySelector('#items').scrollTop = 52 * 4000")
    view.until(lambda: any("train/4000 " in one.text for one in view.all("#items .item")))
    next(one for one in view.all("#items .item") if "train/4000 " in one.text).click()
    view.until(lambda: view.text("#detail h3").startswith("train/4000 "))
    spent = view.browser.execute_script(
        "const t = performance.now(); showStep(1); showStep(2); return performance.now() - t"
    )
    assert spent < 3_000  # milliseconds, on a machine that may be busy
    assert len(view.all("#step .tokens span")) == 2_000
    assert view.errors() == []
