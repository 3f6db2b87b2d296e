"""Claims about the lab as a reader meets it: on a page opened as a file, with no network, by mouse and by keyboard."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

pytestmark = pytest.mark.browser

LAB = Path(__file__).resolve().parent.parent / "book" / "_assets" / "lab"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 240_000  # ms; training takes seconds, and minutes where many share a core
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Lab</title>
<link rel="stylesheet" href="{lab}/lab.css"><div class="athena-lab" {attributes}></div>
<script src="{lab}/lab.js" defer></script></html>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("there is no Chromium here: install it, as by `apt-get install chromium`")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, folder: Path, attributes: str = "") -> tuple[Page, list[str]]:
    """A page with a lab, and the files that it has loaded so far."""
    page, requests = browser.new_context(viewport={"width": 390, "height": 900}, offline=True).new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: requests.append(request.url.rpartition("/")[2]))
    (folder / "lab.html").write_text(PAGE.format(lab=LAB.as_uri(), attributes=attributes), "utf8")
    page.goto((folder / "lab.html").as_uri())
    page.locator(".lab-go").wait_for()
    return page, requests


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    page, _ = opened(browser, tmp_path)
    yield page
    page.context.close()


def trained(page: Page, preset: str) -> list[float]:
    """Test accuracy in percent, plain and guided, after training with a preset."""
    page.get_by_role("button", name=preset).click()
    expect(page.get_by_role("status")).to_contain_text("Done.")
    row = page.get_by_role("row", name="test accuracy").get_by_role("cell").all_text_contents()
    return [float(text.removesuffix(" %")) for text in row]


def is_blank(canvas: Locator) -> bool:
    return bool(
        canvas.evaluate(
            "one => !one.getContext('2d').getImageData(0, 0, one.width, one.height).data.some((v, i) => i % 4 < 3 && v)"
        )
    )


def test_the_presets_show_no_effect_a_collapse_and_damping(page: Page) -> None:
    plain, guided = trained(page, "no effect")
    assert plain > 80 and abs(guided - plain) < 2
    plain, guided = trained(page, "collapse")
    assert guided < plain - 10
    same, damped = trained(page, "damping")
    assert same == plain and damped > 80


def test_training_stops_and_starts_again_and_a_moved_slider_trains_anew(page: Page) -> None:
    page.get_by_role("button", name="Train both networks").click()
    expect(page.get_by_role("table")).to_have_accessible_name(re.compile("After [1-9]"))
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_contain_text("Stopped after")
    stopped = page.get_by_role("table").inner_text()
    page.wait_for_timeout(1000)
    assert page.get_by_role("table").inner_text() == stopped
    page.get_by_role("slider").press("ArrowRight")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("table")).to_have_accessible_name(re.compile("After 0"))
    page.get_by_role("button", name="Stop").click()


def test_a_drawn_digit_gets_two_heat_maps_also_by_keyboard(page: Page) -> None:
    page.get_by_role("button", name="Train both networks").click()
    expect(page.get_by_role("table")).to_have_accessible_name(re.compile("After [1-9]"))
    square = page.get_by_role("application")
    page.get_by_role("button", name="Clear").click()
    assert is_blank(square)
    square.press(" ")
    expect(square).to_have_accessible_name(re.compile("Pen down"))
    for key in ["ArrowDown"] * 6:
        square.press(key)
    assert not is_blank(square)
    expect(page.get_by_role("img", name="Your digit")).to_be_visible()
    for arm in ("plain", "guided"):
        expect(page.get_by_role("img", name=re.compile(rf"Heat map .*{arm}: \d, with \d+ %"))).to_be_visible()


def test_every_control_has_a_name_and_the_slider_speaks_its_factor(page: Page) -> None:
    page.get_by_text("More settings").click()
    controls = page.locator("button, input, select, canvas, svg").all()
    assert len(controls) > 15
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\w"))
    slider = page.get_by_role("slider", name="LRP factor")
    slider.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "λ = 0, plain training")
    slider.press("End")
    expect(slider).to_have_attribute("aria-valuetext", "λ = 100")
    page.get_by_label("it is damped").check()
    expect(slider).to_have_attribute("aria-valuetext", "λ = −100")
    page.get_by_label("λ, typed").fill("0.125")
    expect(slider).to_have_attribute("aria-valuetext", "λ = 0.125")
    expect(page.get_by_label("what is relevant learns faster")).to_be_checked()


def test_digits_and_training_are_loaded_when_they_are_asked_for(browser: Browser, tmp_path: Path) -> None:
    page, requests = opened(browser, tmp_path, "data-short")
    page.wait_for_timeout(500)
    assert sorted(requests) == ["drawing.js", "lab.css", "lab.html", "lab.js"]
    page.get_by_role("button", name="Train both networks").click()
    expect(page.get_by_role("table")).to_have_accessible_name(re.compile("After [1-9]"))
    assert {"digits.js", "guidance.js", "worker.js"} <= set(requests)
    page.context.close()


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.get_by_text("More settings").click()
    width, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= room
