"""The page in a real browser, headless and offline: it renders, logs no error, asks for nothing, its viewer works."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from pte.cli import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NO_BROWSER = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
pytestmark = [pytest.mark.system, pytest.mark.skipif(not (BROWSER and DRIVER), reason=NO_BROWSER)]


@pytest.fixture(scope="module")
def browser(
    train_run: Path, evidence_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[webdriver.Chrome]:
    """The page of a real run and of made-up evidence, opened."""
    directory = tmp_path_factory.mktemp("browser")
    page = directory / "report.html"
    assert main(["report", str(evidence_run), str(train_run), "--output", str(page)]) == 0
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # A proxy that does not exist: whatever the page asked of a network would fail and be logged.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--proxy-server=127.0.0.1:9")
    options.add_argument(f"--user-data-dir={directory / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_window_size(1400, 1200)
        # The browser's own first page has requests of its own.
        driver.get("about:blank")
        driver.get_log("performance")
        driver.get(page.as_uri())
        yield driver
        # Last of all, so that it holds for everything the tests did.
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def role(browser: webdriver.Chrome, name: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f'[data-role="{name}"]')


def go(browser: webdriver.Chrome, step: int) -> None:
    """Moves the slider as a hand does."""
    browser.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'));",
        role(browser, "slider"),
        step,
    )


def tokens(browser: webdriver.Chrome, where: str, kind: str) -> list[str]:
    # Read in one go: after a change of the window's size the page draws again, a little later.
    read = "return [...arguments[0].querySelectorAll(arguments[1])].map((one) => one.textContent)"
    return browser.execute_script(read, role(browser, where), f".token.{kind}")


def test_the_page_renders_without_an_error_and_asks_the_network_for_nothing(browser: webdriver.Chrome) -> None:
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("Report: evidence")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert sum(url.startswith("file://") for url in asked) == 1, "one file"


def test_every_figure_has_a_size_and_a_caption(browser: webdriver.Chrome) -> None:
    figures = browser.find_elements(By.TAG_NAME, "figure")
    assert len(figures) > 10
    for figure in figures:
        size = figure.find_element(By.TAG_NAME, "svg").size
        assert size["width"] > 300 and size["height"] > 60
        assert len(figure.find_element(By.TAG_NAME, "figcaption").text) > 40


def test_every_link_of_the_contents_leads_to_a_section(browser: webdriver.Chrome) -> None:
    links = browser.find_elements(By.CSS_SELECTOR, "nav a")
    assert len(links) > 10
    for link in links:
        target = link.get_attribute("href").partition("#")[2]
        assert browser.find_element(By.ID, target).is_displayed()


@pytest.mark.parametrize("width", [1400, 420])
def test_the_page_fits_its_window(browser: webdriver.Chrome, width: int) -> None:
    browser.set_window_size(width, 1200)
    inside, outside = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    browser.set_window_size(1400, 1200)
    time.sleep(0.5)
    assert inside <= outside


def test_the_slider_shows_window_and_prompt_as_they_were_at_each_step(
    browser: webdriver.Chrome, train_run: Path
) -> None:
    rollout = json.loads((train_run / "rollouts.json").read_text())[0]
    evictions, length = rollout["evictions"], len(rollout["completion_tokens"])
    assert len(evictions) >= 3
    for step in (0, 1, 10, evictions[0]["before_token"], evictions[0]["before_token"] + 1, length - 1, length):
        go(browser, step)
        entered = min(step, length - 1)
        gone = {token for one in evictions if one["before_token"] < entered for token in one["evicted_tokens"]}
        kept = [text for index, text in enumerate(rollout["completion_tokens"][:entered]) if index not in gone]
        assert tokens(browser, "now", "prompt") == rollout["prompt_tokens"]
        assert tokens(browser, "now", "kept") == kept == tokens(browser, "stream", "kept")
        assert len(tokens(browser, "stream", "evicted")) == len(gone)
        assert role(browser, "step").text == f"token {step} of {length}"
        assert f"{len(kept)} reasoning tokens (budget 16)" in role(browser, "cached").text


def test_a_token_has_a_tooltip_with_its_log_prob(browser: webdriver.Chrome, train_run: Path) -> None:
    rollout = json.loads((train_run / "rollouts.json").read_text())[0]
    token = role(browser, "stream").find_element(By.CSS_SELECTOR, '[data-token="5"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", token)
    ActionChains(browser).move_to_element(token).perform()
    tooltip = browser.find_element(By.CSS_SELECTOR, ".tooltip")
    assert tooltip.is_displayed()
    assert f"log-prob {rollout['logprobs'][5]:.4f} nats" in tooltip.text
    cut = role(browser, "stream").find_elements(By.CSS_SELECTOR, ".cut[data-step]")[0]
    ActionChains(browser).move_to_element(cut).perform()
    assert "eviction 1, before token 16 enters" in tooltip.text and "4 tokens leave" in tooltip.text


def test_the_charts_show_each_layer_s_norm_and_change_at_each_eviction(
    browser: webdriver.Chrome, train_run: Path
) -> None:
    rollout = json.loads((train_run / "rollouts.json").read_text())[0]
    layers, evictions = len(rollout["evictions"][0]["state_norm"]), len(rollout["evictions"])
    charts = role(browser, "charts").find_elements(By.TAG_NAME, "svg")
    assert len(charts) == 3
    points = [len(chart.find_elements(By.CSS_SELECTOR, ".point")) for chart in charts]
    assert points == [0, layers * (evictions + 1), layers * evictions], "|S| starts with the first state"
    point = charts[1].find_elements(By.CSS_SELECTOR, ".point")[1]
    assert point.get_attribute("data-tip").startswith("layer 1, eviction before token 16")


def test_a_click_on_a_token_and_the_buttons_move_the_step(browser: webdriver.Chrome) -> None:
    stream = role(browser, "stream")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", stream)
    stream.find_element(By.CSS_SELECTOR, '[data-token="7"]').click()
    assert role(browser, "step").text.startswith("token 7 of")
    browser.execute_script("arguments[0].click()", role(browser, "on"))
    browser.execute_script("arguments[0].click()", role(browser, "on"))
    browser.execute_script("arguments[0].click()", role(browser, "back"))
    assert role(browser, "step").text.startswith("token 8 of")
    browser.execute_script("arguments[0].click()", role(browser, "next-eviction"))
    assert role(browser, "step").text.startswith("token 17 of")


def test_another_completion_can_be_picked(browser: webdriver.Chrome, train_run: Path) -> None:
    rollouts = json.loads((train_run / "rollouts.json").read_text())
    picks = role(browser, "picks").find_elements(By.TAG_NAME, "button")
    assert len(picks) == len(rollouts) == 4
    browser.execute_script("arguments[0].click()", picks[2])
    assert rollouts[2]["problem"] in role(browser, "problem").text
    assert picks[2].get_attribute("aria-pressed") == "true" and picks[0].get_attribute("aria-pressed") == "false"
    browser.execute_script("arguments[0].click()", picks[0])


def test_a_log_prob_that_is_not_known_is_a_dash(browser: webdriver.Chrome, train_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(train_run, tmp_path / "half")
    rollouts = json.loads((run / "rollouts.json").read_text())
    rollouts[0]["logprobs"][5] = None
    rollouts[0]["evictions"][0]["state_norm"][0] = math.nan
    rollouts[1]["logprobs"] = None
    (run / "rollouts.json").write_text(json.dumps(rollouts))
    assert main(["report", str(run), "--output", str(tmp_path / "half.html")]) == 0
    whole = browser.current_url
    browser.get((tmp_path / "half.html").as_uri())
    try:
        go(browser, 5)
        assert role(browser, "drawn").text.endswith(", log-prob -")
        go(browser, 6)
        assert role(browser, "drawn").text.endswith(f", log-prob {rollouts[0]['logprobs'][6]:.3f}")
        token = role(browser, "stream").find_element(By.CSS_SELECTOR, '[data-token="5"]')
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", token)
        ActionChains(browser).move_to_element(token).perform()
        assert "log-prob -" in browser.find_element(By.CSS_SELECTOR, ".tooltip").text
        points = role(browser, "charts").find_elements(By.CSS_SELECTOR, "svg:nth-of-type(1) .point")
        layers, evictions = len(rollouts[0]["first_state_norm"]), len(rollouts[0]["evictions"])
        assert len(points) == layers * (2 * evictions + 1) - 1
        browser.execute_script("arguments[0].click()", role(browser, "picks").find_elements(By.TAG_NAME, "button")[1])
        assert role(browser, "drawn").text.endswith(", log-prob -")
        assert browser.get_log("browser") == []
    finally:
        browser.get(whole)


def test_the_theme_changes_the_colours_of_page_and_figures(browser: webdriver.Chrome) -> None:
    def colours() -> list[str]:
        title = browser.find_element(By.CSS_SELECTOR, "figure svg [style*='var(--ink)']")
        body = browser.find_element(By.TAG_NAME, "body")
        return [body.value_of_css_property("background-color"), title.value_of_css_property("fill")]

    before = colours()
    browser.execute_script("arguments[0].click()", browser.find_element(By.ID, "theme"))
    after = colours()
    browser.execute_script("arguments[0].click()", browser.find_element(By.ID, "theme"))
    assert before[0] != after[0] and before[1] != after[1] and colours() == before
