"""Claims about the built book in a browser with the network off. Build it first: `make book` or `make book QUICK=1`."""

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "book" / "_build" / "html"
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [CONTENTS["root"], *(chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"])]
DESKTOP, PHONE = 1280, 390
LARGEST_PDF = 15_000_000
LARGEST_PAGE = 3_000_000  # bytes, without the assets that all pages share
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not (HTML / "index.html").is_file():
        pytest.fail("there is no built book to look at: run `make book QUICK=1` first")
    if not (HTML / "_static" / "vendor" / "embed-amd.js").is_file():
        pytest.skip("this book was built without npm, so its widgets and formulae need the network")
    if CHROMIUM is None:
        pytest.fail("there is no Chromium here: install it, as by `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    width, scheme = getattr(request, "param", (DESKTOP, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    context.set_default_timeout(60_000)
    yield context
    context.close()


def opened(context: BrowserContext, path: Path) -> tuple[Page, list[str]]:
    """The page, once its formulae and sliders stand, and what went wrong on the way."""
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("request", lambda request: None if inside(request.url) else faults.append(f"outside: {request.url}"))
    page.goto(path.as_uri())
    text = path.read_text("utf8")
    if 'class="math' in text:
        page.wait_for_selector("mjx-container")
    expected = text.count('"_model_name": "SelectionSliderModel"')
    page.wait_for_function("n => document.querySelectorAll('.noUi-handle').length === n", arg=expected)
    page.wait_for_load_state("networkidle")
    return page, faults


def inside(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


def widgets(page: Page) -> list[Locator]:
    """The sliders with their pictures."""
    return page.locator(".widget-vbox:has(.noUi-handle)").all()


def picture(widget: Locator) -> str:
    """What a reader sees of a widget's pictures, as the bytes of a screenshot."""
    return widget.locator("img:visible").first.screenshot().hex()


def moved(widget: Locator) -> tuple[bool, bool]:
    """Whether the slider, by keyboard, comes to another picture, and the way back brings the first one again.

    Stops beside each other may show the same, as where two arms have learned nothing yet.
    """
    handle = widget.locator(".noUi-handle")
    now, *ends = (float(handle.get_attribute(f"aria-value{name}") or 0) for name in ("now", "min", "max"))
    below, above = now - ends[0], ends[1] - now
    there, back = ("ArrowLeft", "ArrowRight") if below > above else ("ArrowRight", "ArrowLeft")
    first, other, taken = picture(widget), False, 0
    while not other and taken < max(below, above):
        handle.press(there)
        taken, other = taken + 1, picture(widget) != first
    for _ in range(taken):
        handle.press(back)
    return other, picture(widget) == first


@pytest.mark.parametrize(
    "context", [(width, scheme) for width in (DESKTOP, PHONE) for scheme in ("light", "dark")], indirect=True, ids=str
)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_no_error_no_outside_request_and_nothing_cut_off(context: BrowserContext, name: str) -> None:
    page, faults = opened(context, HTML / f"{name}.html")
    assert not faults
    width, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= room, "the page is wider than the screen"


@pytest.mark.parametrize("context", [(DESKTOP, "light"), (PHONE, "light")], indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_every_slider_moves_its_picture_by_keyboard_with_no_kernel(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    for widget in widgets(page):
        assert moved(widget) == (True, True)


@pytest.mark.parametrize("context", [(DESKTOP, "light"), (PHONE, "light")], indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_every_slider_says_in_full_where_it_stands(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    for widget in widgets(page):
        handle, readout = widget.locator(".noUi-handle"), widget.locator(".widget-readout")
        handle.press("Home")
        for _ in range(round(float(handle.get_attribute("aria-valuemax") or 0)) + 1):
            said, cut = readout.evaluate("one => [one.textContent, one.scrollWidth > one.clientWidth]")
            assert not cut, said
            handle.press("ArrowRight")


@pytest.mark.parametrize("context", [(PHONE, "light")], indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_figures_can_be_read_on_a_phone(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    sizes = page.locator(".bd-article div.cell_output :is(figure, .widget-box) > img:visible").evaluate_all(
        "images => images.map(image => [image.naturalWidth, image.width])"
    )
    assert all(width >= min(natural, 600) for natural, width in sizes), sizes


def test_there_are_sliders_to_move(context: BrowserContext) -> None:
    assert len(widgets(opened(context, HTML / "03-lrp-heatmaps.html")[0])) == 3


def test_a_slider_that_has_lost_its_link_is_noticed(context: BrowserContext) -> None:
    """The check of the test above, on a page broken on purpose."""
    text = (HTML / "index.html").read_text("utf8")
    broken, times = re.subn(r'("target": \["IPY_MODEL_\w+"), "selected_index"\]', r'\1, "nothing"]', text)
    assert times, "the page has no link to break"
    path = HTML / "broken-on-purpose.html"
    path.write_text(broken, "utf8")
    try:
        page, _ = opened(context, path)
        assert moved(widgets(page)[0]) == (False, True)
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["index", "play"])
def test_a_reader_can_move_the_factor_before_scrolling(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    for part in ("input[type=range]", ".lab-go"):
        place = page.locator(f".athena-lab {part}").bounding_box()
        assert place is not None and place["y"] + place["height"] < 900, part


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_says_in_words_what_it_shows(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    silent = page.locator("main img:not(.widget-image):not([alt]), main img:not(.widget-image)[alt='']")
    assert silent.count() == 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_no_burden_on_a_phone(browser: Browser, name: str) -> None:
    path = HTML / f"{name}.html"
    pictures = re.findall(r'src="(_images/[^"]+)"', path.read_text("utf8"))
    assert path.stat().st_size + sum((HTML / name).stat().st_size for name in set(pictures)) < LARGEST_PAGE


def test_the_book_prints_as_one_pdf_with_every_chapter(browser: Browser) -> None:
    subprocess.run([sys.executable, ROOT / "book" / "pdf.py"], check=True)
    pdf = (ROOT / "book" / "_build" / "athena.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(pdf) < LARGEST_PDF
    assert len(re.findall(rb"/Type /Page\b", pdf)) > len(PAGES)
    plain = {title.decode("latin-1") for title in re.findall(rb"/Title \((.*)\)", pdf)}
    other = {bytes.fromhex(title.decode()).decode("utf-16") for title in re.findall(rb"/Title <(\w+)>", pdf)}
    headings = {"".join(title.split()) for title in plain | other}  # where a title breaks its line, its space is lost
    for name in PAGES:
        page = (HTML / f"{name}.html").read_text("utf8")
        title = html.unescape(re.sub(r"<a.*|<[^>]*>", "", re.findall(r"<h1>(.*?)</h1>", page, re.DOTALL)[-1]))
        assert "".join(title.split()) in headings, name
