"""The static page in headless Chromium: sorting, filters, the plot by mouse and by keyboard, dialog, themes, phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.harness.page_records import HOSTILE, make_trials
from tests.harness.trials import Trials, perplexity

from evenbits.page import write_page
from evenbits.tables import gather

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-prefers-reduced-motion --window-size=1280,900"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for all: each test loads the page anew."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    steering = shutil.which("chromedriver")
    if browser is None or steering is None:
        pytest.skip("Chromium and chromedriver are not on the path: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for switch in [*SWITCHES.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(steering))
    try:
        yield found
    finally:
        found.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    trials = make_trials(folder / "results")
    path = write_page(folder, gather(trials.records, trials.folders), command="evenbits run tests.toml")
    return path.as_uri()


class Browser:
    def __init__(self, driver: Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def load(self, fragment: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.address + fragment)

    def said(self) -> list[Any]:
        """What the console has since it was last asked."""
        log: Any = self.driver
        return list(log.get_log("browser"))

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Of what is rendered."""
        found: list[str] = self.every(selector, "e.checkVisibility() ? [e.textContent] : []")
        return found

    def every(self, selector: str, script: str) -> Any:
        """Of each element `e` what a script makes of it; lists are joined."""
        return self.js(f"return [...document.querySelectorAll(arguments[0])].flatMap((e) => {script})", selector)

    def wait(self, script: str) -> None:
        """Until it is true; what a dialog does when it closes comes a moment later."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 10, poll_frequency=0.05).until(lambda _: self.js(f"return {script}"))

    def choose(self, name: str, value: str) -> None:
        self.js(
            "const f = document.querySelector(`[name=${arguments[0]}]`); f.value = arguments[1];"
            "f.dispatchEvent(new Event('input', {bubbles: true}))", name, value,
        )  # fmt: skip

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, theme: str) -> None:
        features = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)

    def scripts(self, on: bool) -> None:
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not on})


@pytest.fixture
def browser(driver: Chrome, address: str) -> Iterator[Browser]:
    """The page, just loaded. Whatever a test does, the console stays empty and nothing is fetched."""
    found = Browser(driver, address)
    found.size(1280)
    found.prefer("light")
    found.load()
    found.said()
    yield found
    assert found.said() == []
    assert found.js("return performance.getEntriesByType('resource').length") == 0
    assert "owned" not in driver.title


ROWS = "#m0 .board tbody tr[data-entry] > :first-child a"
SPOTS = "#m0 .spot"
OPEN = 'a.open[href="#t-%s"]'


def test_columns_sort_within_their_groups(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    before = browser.texts(ROWS)
    heading = "#m0 .board th[data-col='m:perplexity']"
    assert browser.one(heading).get_attribute("aria-sort") == "none"
    browser.one(f"{heading} button").click()
    assert browser.one(heading).get_attribute("aria-sort") == "ascending"
    values = "[[...e.querySelectorAll('tr[data-entry]')].map((r) => Number(r.cells[7].dataset.v))]"
    groups = browser.every("#m0 .board tbody", values)
    assert sum(map(len, groups)) == 8
    assert all(group == sorted(group) for group in groups)
    browser.one(f"{heading} button").send_keys(Keys.ENTER)  # by keyboard, and the focus stays
    assert browser.one(heading).get_attribute("aria-sort") == "descending"
    assert browser.every("#m0 .board tbody", values) == [sorted(group, reverse=True) for group in groups]
    assert browser.js("return document.activeElement.closest('th').dataset.col") == "m:perplexity"
    assert "sort=m%3Aperplexity&dir=descending" in browser.driver.current_url
    browser.one(f"{heading} button").click()
    assert browser.one(heading).get_attribute("aria-sort") == "none"
    assert browser.texts(ROWS) == before
    heads = browser.every("#m0 .board thead th", "e.hidden ? [] : [e.dataset.col]")
    assert len(heads) == 11
    for col in heads:
        browser.js("document.querySelector(`#m0 [data-col='${arguments[0]}'] button`).click()", col)
        assert browser.every("#m0 .board th[aria-sort=ascending]", "[e.dataset.col]") == [col]


def test_filters_change_rows_points_and_what_is_said(browser: Browser) -> None:
    assert browser.one(".count").text == "10 rows"
    assert (len(browser.texts(ROWS)), len(browser.texts(SPOTS))) == (8, 7)
    browser.choose("budget", "3 ±0.05")
    assert browser.texts(ROWS) == ["dense", "gptq"]
    assert len(browser.texts(SPOTS)) == 1
    browser.choose("budget", "")
    browser.choose("stage", "distill")
    assert browser.texts(ROWS) == ["dense", "gptq"]
    browser.choose("stage", "")
    browser.choose("text", "GPTQ group_size=64")
    assert browser.texts(ROWS) == ["dense", "gptq"]
    assert browser.one(".count").text == "3 of 10 rows"
    browser.choose("text", "no such method")
    assert browser.texts(SPOTS) == []
    assert browser.texts(".nothing")[0] == "No compressed model in view has a finite perplexity."
    browser.one("button[type=reset]").click()
    assert len(browser.texts(SPOTS)) == 7
    browser.choose("model", "m1")
    assert browser.texts("section.model h2") == ["other"]
    browser.choose("model", "")
    browser.choose("metric", "acc")
    assert browser.texts("#m0 .plot .name")[1].startswith("acc, higher is better")
    browser.choose("x", "model")
    assert browser.texts("#m0 .plot .name")[0] == "model bits per parameter"


def test_columns_can_be_chosen(browser: Browser) -> None:
    heads = "#m0 .board thead th[data-metric]"
    assert len(browser.texts(heads)) == 4  # two qualities, each with its ratio to dense
    browser.one(".choose summary").click()
    browser.one(".choose input[value=latency_ms]").click()
    assert browser.texts(heads)[-1].startswith("latency_ms")
    browser.one(".choose input[value=acc]").click()
    assert not [one for one in browser.texts(heads) if one.startswith("acc")]
    assert set(browser.every("#m0 .board .group th", "[e.colSpan]")) == {7 + 3}


def test_a_point_tells_what_it_is_by_mouse_and_by_keyboard(browser: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    spot = browser.one(f"{SPOTS}[data-entry=gptq0] .point")
    assert browser.texts("#tip") == []
    ActionChains(browser.driver).move_to_element(spot).perform()
    (tip,) = browser.texts("#tip")
    for words in (
        "gptq",
        "group_size=64",
        "budget2 ±0.05",
        "linear bits2.000",
        "perplexity1.8",
        "vs dense1.11",
        "seeds2",
    ):
        assert words in tip
    browser.js("document.querySelector('#m0 .spot[data-entry=\"08tests\"]').dispatchEvent(new Event('pointerenter'))")
    assert "linear bits2.312" in browser.texts("#tip")[0]  # to even, as in the leaderboard
    browser.press(Keys.ESCAPE)
    assert browser.texts("#tip") == []
    browser.js("document.querySelector('#m0 .spot[tabindex=\"0\"]').focus()")
    first = browser.js("return document.activeElement.dataset.entry")
    assert len(browser.texts("#tip")) == 1
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    third = browser.js("return document.activeElement.dataset.entry")
    assert third != first
    assert browser.js("return document.querySelectorAll('#m0 .spot[tabindex=\"0\"]').length") == 1  # one stop for Tab
    label = browser.js("return document.activeElement.getAttribute('aria-label')")
    assert re.search(r"budget .*; .* linear bits.*; perplexity \d", label)
    browser.press(Keys.ENTER)
    assert browser.js("return document.querySelector('#trial').open")
    browser.press(Keys.ESCAPE)
    browser.wait("document.querySelectorAll('#trials article').length === 10")
    assert browser.js("return document.activeElement.dataset.entry") == third
    off = browser.texts("#m0 .spot .off")
    assert len(off) == 1  # kmeans diverged
    assert off[0].endswith("↑")


def test_the_legend_picks_methods_and_the_plots_numbers_stand_in_a_table(browser: Browser) -> None:
    button = browser.one("#m0 .legend [data-method=nf4] button")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    clear = browser.every("#m0 .spot:not(.dim)", "[e.dataset.method]")
    assert clear == ["nf4"]
    button.click()
    browser.one("#m0 .numbers summary").click()
    browser.wait("document.querySelectorAll('#m0 .numbers tbody tr').length === 7")
    browser.choose("text", "nf4")
    (line,) = browser.texts("#m0 .numbers tbody tr")
    assert line.startswith("nf4")
    assert "1.733" in line


def test_a_trial_opens_in_a_dialog_and_gives_the_focus_back(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    link = browser.one("#m0 .board a.open[href='#t-gptq0']")
    link.send_keys(Keys.ENTER)
    assert browser.js("return document.querySelector('#trial').open")
    assert "trial=gptq0" in browser.driver.current_url
    assert browser.js("return document.querySelector('#trial').contains(document.activeElement)")
    whole = "".join(browser.texts("#trial article"))
    for words in ("Bytes by role", "Error of the layers", "--seed 0 --seed 1", "slow disk", " a time there was a cat."):
        assert words in whole
    assert len(browser.texts("#trial .heat rect")) == 6
    cells = browser.texts("#trial .heat .cell")
    browser.js("document.querySelectorAll('#trial .heatbar button')[1].click()")
    assert browser.texts("#trial .heat .cell") != cells
    browser.one("#trial .map summary").click()
    browser.wait("document.querySelectorAll('#trial .map tbody tr').length === 6")
    assert browser.texts("#trial .map tbody tr td:nth-child(2)") == ["2.062"] * 6
    browser.one("#trial .pulled summary").click()
    assert "corpus.sha256ab" in "".join(browser.texts("#trial .pulled[open] dl"))
    browser.press(Keys.ESCAPE)
    assert browser.js("return document.activeElement.getAttribute('href')") == "#t-gptq0"
    browser.wait("!location.hash.includes('trial=')")
    assert browser.js("return document.querySelectorAll('#trials article').length") == 10  # it went back to its place
    browser.js("[...document.querySelectorAll('a.open')].find((a) => a.textContent.startsWith('<img')).click()")
    assert browser.texts("#trial h3") == [HOSTILE]
    assert browser.js("return document.querySelectorAll('img, #trial script').length") == 0
    assert any("</script>" in one for one in browser.texts("#trial .said"))
    browser.one("#trial .close").click()
    assert not browser.js("return document.querySelector('#trial').open")


def test_back_closes_a_trial_and_a_quick_hand_loses_none(browser: Browser) -> None:
    browser.choose("budget", "2 ±0.05")
    before = browser.js("return location.hash")
    browser.js("document.querySelector('a.open[href=\"#t-gptq0\"]').click()")
    browser.driver.back()
    browser.wait("!document.querySelector('#trial').open")
    assert browser.js("return location.hash") == before
    browser.driver.forward()
    browser.wait("document.querySelector('#trial').open")
    browser.js("document.querySelector('#trial').close()")
    browser.wait("!location.hash.includes('trial=')")
    for link in ("gptq0", "03tests", "gptq0"):  # before the last one's closing was told
        browser.js(
            "document.querySelector('#trial').close(); document.querySelector(arguments[0]).click()", OPEN % link
        )
    browser.js(
        "const next = document.querySelector(arguments[0]);"
        "document.querySelector('#trial').addEventListener('close', () => next.click(), { once: true });"
        "document.querySelector('#trial').close()", OPEN % "03tests",
    )  # fmt: skip
    browser.wait("location.hash.includes('trial=03tests')")  # while the step back from the other is on its way
    assert browser.js("return document.querySelector('#trial').open")
    browser.js("document.querySelector('#trial').close()")
    browser.wait("document.querySelectorAll('#trials article').length === 10")
    browser.wait(f"location.hash === {before!r}")
    assert not browser.js("return history.state")  # no step is left that Back would take for nothing


def test_a_page_without_a_plot_is_alive(driver: Chrome, tmp_path: Path) -> None:
    trials = Trials(tmp_path / "results")
    trials.add("dense", perplexity(np.full(4, 0.5)))
    path = write_page(tmp_path, gather(trials.records, trials.folders), command="evenbits run tests.toml")
    found = Browser(driver, path.as_uri())
    found.said()
    found.load()
    assert found.one(".count").text == "1 row"
    found.one(".board a.open").click()
    assert found.js("return document.querySelector('#trial').open")
    assert found.said() == []


def test_a_fragment_restores_a_view(browser: Browser) -> None:
    browser.choose("budget", "2 ±0.05")
    browser.choose("metric", "acc")
    browser.choose("text", "gptq")
    browser.one("#m0 .board th[data-col=linear] button").click()
    fragment = browser.js("return location.hash")
    rows = browser.texts(ROWS)
    browser.load(fragment)
    assert browser.texts(ROWS) == rows
    assert browser.js("return document.querySelector('[name=budget]').value") == "2 ±0.05"
    assert browser.one("#m0 .board th[data-col=linear]").get_attribute("aria-sort") == "ascending"
    browser.load("#model=m1&trial=gptq0&metric=nonsense&sort=linear&dir=sideways")
    assert browser.texts("#trial h3") == ["gptq"]
    assert browser.texts("section.model h2") == ["other"]
    browser.load("#t-gptq1")  # a seed of a row has no trial of its own
    assert browser.texts("#trial h3") == []


PIXELS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const seen = (colour) => {
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
};
const styles = [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e));
return styles.map((s) => [seen(s.fill), seen(s.stroke)]);
"""  # fill and edge of marks in sRGB, however they are written


def contrast(a: list[float], b: list[float]) -> float:
    """Of WCAG 2.2, from sRGB in 0..255."""

    def light(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_both_themes_can_be_read(browser: Browser) -> None:
    def colour(name: str) -> list[float]:
        browser.js("document.body.style.outlineColor = `var(--${arguments[0]})`", name)
        found = browser.js("return getComputedStyle(document.body).outlineColor")
        return [float(part) for part in re.findall(r"[\d.]+", found)[:3]]

    grounds = {}
    for theme in ("light", "dark"):
        browser.prefer(theme)
        grounds[theme] = colour("bg")
        for ground in ("bg", "panel", "raised"):
            for ink in ("ink", "muted", "accent"):
                assert contrast(colour(ink), colour(ground)) >= 4.5, (theme, ink, ground)
        assert contrast(colour("strong-rule"), colour("bg")) >= 3, theme
        assert contrast(colour("ink"), colour("parted")) >= 4.5
        points = browser.js(PIXELS, "#m0 .spot .point")
        assert len({tuple(fill) for fill, _ in points}) == 5  # four methods, and what is hollow
        assert all(max(contrast(fill, grounds[theme]), contrast(edge, grounds[theme])) >= 3 for fill, edge in points)
    assert grounds["light"] != grounds["dark"]
    browser.load()
    assert browser.one("#theme").get_attribute("aria-checked") == "true"
    browser.one("#theme").click()
    assert colour("bg") == grounds["light"]
    browser.load()
    assert colour("bg") == grounds["light"]  # kept
    browser.js("localStorage.clear()")


@pytest.mark.parametrize("width", [360, 800])
def test_no_page_scrolls_sideways(browser: Browser, width: int) -> None:
    browser.size(width)
    browser.load()
    assert browser.js("return document.documentElement.scrollWidth") <= width
    browser.js("document.querySelectorAll('#samples details, #protocols details').forEach((d) => { d.open = true; })")
    assert browser.js("return document.documentElement.scrollWidth") <= width
    browser.js("document.querySelector('a.open[href=\"#t-gptq0\"]').click()")
    assert browser.js("const d = document.querySelector('#trial'); return d.scrollWidth <= d.clientWidth")
    controls = "#filters button, #filters select, #filters summary"
    small = browser.every(
        controls, "e.checkVisibility() && e.getBoundingClientRect().height < 24 ? [e.textContent] : []"
    )
    assert not small


def test_without_scripts_everything_stands_there(browser: Browser) -> None:
    browser.scripts(False)
    try:
        browser.load()
        for selector in ("#m0 .board", "#t-gptq0 .command", "#protocols details"):
            assert browser.one(selector).is_displayed(), selector
        for selector in ("#filters", "#theme", ".numbers"):  # what only scripts can do is not offered
            assert not browser.one(selector).is_displayed(), selector
        assert len(browser.driver.find_elements("css selector", "svg.plot .point")) == 8
        assert len(browser.driver.find_elements("css selector", "#m0 .board thead button")) == 0
    finally:
        browser.scripts(True)
        browser.load()
