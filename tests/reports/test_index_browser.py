"""The page of all runs in Chromium: sort, filter, select, hover.

Skipped without the package playwright or without Chromium: pip install playwright; apt-get install chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_data import add_run

from reports.index import write_index

TIMEOUT_MS = 30_000  # the page is ready in a second; the machine may be busy
EVIL = "<img src=x onerror=window.hacked=1>"
ROW, LEGEND = "#runs tbody td.link", "#chart-0 .infolayer .legendtext"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with api.sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, NAMES)), None) or playwright.chromium.executable_path
        if not Path(program).is_file():
            pytest.skip("Chromium is not installed")
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory) -> Iterator:
    """The page of two settings with two seeds each, and a run with markup in its name; ends without any message."""
    runs = tmp_path_factory.mktemp("browser") / "runs"
    for seed in (0, 1):
        add_run(runs / f"mlp-seed{seed}", seed, 0.5 + 0.1 * seed, feed_forward="mlp")
        add_run(runs / f"geglu-seed{seed}", seed, 0.3, feed_forward="geglu")
    add_run(runs / EVIL, 0, 0.2, feed_forward=EVIL)
    shown = browser.new_page(viewport={"width": 1600, "height": 1200}, color_scheme="dark")
    shown.set_default_timeout(TIMEOUT_MS)
    messages: list[str] = []
    shown.on("console", lambda message: messages.append(message.text))
    shown.on("pageerror", lambda error: messages.append(str(error)))
    shown.on("request", lambda request: messages.append(request.url) if request.url.startswith("http") else None)
    shown.goto(write_index(runs, None).path.as_uri())
    shown.wait_for_selector("html[data-ready=true]")
    yield shown
    assert messages == [] and shown.evaluate("window.hacked") is None


def names(page) -> list[str]:
    return page.locator(f"{ROW} a").all_text_contents()


def wait_for_count(page, selector: str, count: int) -> None:
    """Wait until so many elements are there. The page's policy forbids the script that `wait_for_function` needs."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=TIMEOUT_MS)


def wait_for_text(page, selector: str, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=TIMEOUT_MS)


def test_the_table_is_sorted_by_a_click(page):
    head = page.locator("#runs thead th", has_text="test_accuracy")
    for first, last in (("mlp-seed1", EVIL), (EVIL, "mlp-seed1")):
        head.click()
        wait_for_text(page, f":nth-match({ROW}, 1)", first)  # the table is drawn a moment after the click
        assert names(page)[0] == first and names(page)[-1] == last


def test_the_table_is_filtered_by_a_setting_and_by_a_number(page):
    def add(column: str, operator: str) -> None:
        page.get_by_role("button", name="Add condition").click()
        page.locator(".dtsb-data").last.select_option(label=column)
        page.locator(".dtsb-condition").last.select_option(value=operator)

    add("model.feed_forward", "=")
    page.locator("select.dtsb-value").first.select_option(label=EVIL)
    wait_for_count(page, ROW, 1)
    assert names(page) == [EVIL]
    page.locator("select.dtsb-value").first.select_option(label="mlp")
    wait_for_count(page, ROW, 2)
    add("test_accuracy", ">")
    page.locator("input.dtsb-value").last.fill("0.52")
    wait_for_count(page, ROW, 1)
    assert names(page) == ["mlp-seed1"]
    page.locator(".dtsb-clearAll").click()
    assert len(names(page)) == 5


def test_selected_runs_are_compared(page):
    for name in ("mlp-seed0", "mlp-seed1", "geglu-seed0", EVIL):
        page.locator("#runs tbody tr", has=page.get_by_role("link", name=name, exact=True)).locator("td").first.click()
    page.wait_for_selector("#chart-1 .main-svg")
    wait_for_count(page, LEGEND, 3)
    legend = page.locator(LEGEND).all_text_contents()
    assert set(legend) == {"mlp (2 seeds)", "geglu-seed0", EVIL}
    rows = dict(line.split("\t", 1) for line in page.locator("#differences").inner_text().splitlines() if "\t" in line)
    assert set(rows["model.feed_forward"].split("\t")) == {"mlp", "geglu", EVIL}
    assert "±" in rows["test_accuracy"] and "model.width" not in rows
    page.locator("#chart-0").scroll_into_view_if_needed()
    box = page.locator("#chart-0 .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    wait_for_text(page, "#chart-0 .hoverlayer", "(n = 2)")
    hover = page.locator("#chart-0 .hoverlayer").text_content()
    assert "epoch" in hover and f"{EVIL}: " in hover
    page.locator("#fold").uncheck()
    wait_for_count(page, LEGEND, 4)
    assert set(page.locator(LEGEND).all_text_contents()) >= {"mlp-seed0", "mlp-seed1"}


def test_text_is_readable_in_dark_mode_and_on_paper(page):
    def color(selector: str) -> str:
        return page.locator(selector).first.evaluate("element => getComputedStyle(element).fill")

    assert color("#chart-0 .xtick text") == "rgb(227, 232, 238)"
    page.emulate_media(media="print")
    assert color("#chart-0 .xtick text") == "rgb(0, 0, 0)"
    assert (
        not page.get_by_role("button", name="CSV").is_visible()
        and page.locator("#chart-0 .main-svg").first.is_visible()
    )
    page.emulate_media(media="screen")
