"""Claims about the built book in a browser with the network off. Build it first: `make book` or `make book QUICK=1`."""

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
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
LARGEST_TEXT = 800_000  # bytes of HTML: pictures are files, which load when they are shown
HIDDEN_PANELS = re.compile(r'<span class="panels"[^>]* hidden>(<span class="panel"[^>]*><img[^>]*></span>)+</span>')
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not (HTML / "index.html").is_file():
        pytest.fail("there is no built book to look at: run `make book QUICK=1` first")
    if not (HTML / "_static" / "vendor" / "tex-svg.js").is_file():
        pytest.skip("this book was built without npm, so its formulae need the network")
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
    page.wait_for_load_state("networkidle")
    return page, faults


def inside(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))


def sliders(page: Page) -> list[Locator]:
    """The sliders and buttons with their pictures."""
    return page.locator(".athena-frames").all()


def shown(slider: Locator) -> tuple[str, str]:
    """The stop whose picture is shown, and the file of that picture, once it is loaded."""
    at = slider.locator("[data-stop]:not([hidden])")
    assert at.count() == 1
    picture = at.locator("img").first if at.locator("img").count() else at  # of several panels, or of one
    picture.scroll_into_view_if_needed()
    loaded = picture.evaluate("one => one.decode().then(() => one.naturalWidth > 0, () => false)")
    assert loaded, picture.get_attribute("src")
    return at.get_attribute("data-stop") or "", picture.get_attribute("src") or ""


def stops(slider: Locator) -> Iterator[tuple[str, str]]:
    """Goes through the stops by keyboard, from the first: what is said of each, and its picture.

    Where there are buttons beside a slider, it goes through the slider's stops for each of them.
    """
    by_range = slider.locator("input[type=range]")
    buttons = slider.locator("input[type=radio]").all() if by_range.count() else []
    for button in buttons or [None]:
        if button is not None:
            button.check()
        control = by_range if by_range.count() else slider.locator("input").first
        control.press("Home") if by_range.count() else control.check()
        control.focus()  # a button that was chosen already is not clicked
        for _ in range(slider.locator("[data-stop]").count() // max(1, len(buttons))):
            stop, picture = shown(slider)
            control = slider.locator("input:focus")
            said = control.evaluate("one => one.getAttribute('aria-valuetext') || one.labels[0].textContent.trim()")
            assert said == stop
            yield (stop if button is None else f"{button.get_attribute('value')}: {stop}"), picture
            control.press("ArrowRight")


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
def test_every_slider_goes_by_keyboard_through_its_pictures_and_says_where_it_stands(
    context: BrowserContext, name: str
) -> None:
    page, faults = opened(context, HTML / f"{name}.html")
    for slider in sliders(page):
        pictures = dict(stops(slider))
        assert len(pictures) == slider.locator("[data-stop]").count()
        assert len(set(pictures.values())) > 1, "every stop shows the same"
    assert not faults


@pytest.mark.parametrize(
    "wanted, page",
    [
        ("gradient explosion", "05-guided-training"),
        ("label smoothing", "10-beyond"),
        ("Grad-CAM", "02-explaining"),
        ("early stopping patience", "08-cifar10-early-stopping"),
    ],
)
def test_search_finds_what_stands_in_the_text_without_a_network(
    context: BrowserContext, wanted: str, page: str
) -> None:
    search = context.new_page()
    search.goto(f"{(HTML / 'search.html').as_uri()}?q={wanted.replace(' ', '+')}")
    found = search.locator(f"#search-results a[href*='{page}']").first
    found.wait_for()
    assert found.is_visible()


@pytest.mark.parametrize("context", [(PHONE, "light")], indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_figures_can_be_read_on_a_phone(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    sizes = page.locator(".bd-article div.cell_output :is(figure, .athena-frames) > img:visible").evaluate_all(
        "images => images.map(image => [image.naturalWidth, image.width])"
    )
    assert all(width >= min(natural, 600) for natural, width in sizes), sizes


@pytest.mark.parametrize("context", [(PHONE, "light"), (DESKTOP, "light")], indirect=True, ids=str)
def test_panels_of_a_chart_stand_side_by_side_or_on_a_phone_one_below_the_other(context: BrowserContext) -> None:
    page, _ = opened(context, HTML / "06-mnist-factors.html")
    on_phone = page.viewport_size is not None and page.viewport_size["width"] == PHONE
    charts = page.locator(".panels:not([hidden])").all()
    assert len(charts) > 1
    for chart in charts:
        boxes = [box for panel in chart.locator(".panel").all() if (box := panel.bounding_box())]
        assert len(boxes) > 1
        for above, below in pairwise(boxes):
            assert below["y"] > above["y"] if on_phone else below["y"] == above["y"]
        room, picture = chart.bounding_box(), chart.locator("img").first.bounding_box()
        assert room and picture
        assert all(box["x"] + box["width"] <= room["x"] + room["width"] + 1 for box in boxes)
        if on_phone:  # each panel is as wide as the page, not as its share of it
            assert picture["width"] > 1.4 * room["width"]
        else:
            assert abs(picture["width"] - room["width"]) < 2


def test_there_are_sliders_to_move(context: BrowserContext) -> None:
    assert len(sliders(opened(context, HTML / "03-lrp-heatmaps.html")[0])) == 3


def test_a_slider_that_does_not_move_is_noticed(context: BrowserContext) -> None:
    """The check of the test above, on a page broken on purpose."""
    page, _ = opened(context, HTML / "index.html")
    slider = sliders(page)[0]
    slider.locator("input").evaluate("one => { one.oninput = null; }")
    assert len(dict(stops(slider))) == 1 < slider.locator("[data-stop]").count()


CUT = """
    all => all.map(table => {
        const box = table.closest('.output, .cell_output, .pst-scrollable-table-container') || table.parentElement;
        const frame = box.getBoundingClientRect();
        const cells = [...table.rows].flatMap(row => [...row.cells].map((cell, i) => [cell, i]));
        const beyond = most => cells.filter(([cell, i]) => i < most && (
            cell.getBoundingClientRect().right > frame.right + 1 || cell.scrollWidth > cell.clientWidth + 1));
        return {all: beyond(99).map(([cell]) => cell.textContent), first: beyond(2).map(([cell]) => cell.textContent)};
    })
"""
"""For each table the texts of its cells that reach out of what is seen of it: of all columns, and of the first two."""


@pytest.mark.parametrize("name", PAGES)
def test_no_cell_of_a_table_is_cut(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    for found in page.locator("main table").evaluate_all(CUT):
        assert not found["all"]


@pytest.mark.parametrize("context", [(PHONE, "light")], indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_what_a_row_is_and_the_column_after_it(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    for found in page.locator("main table.dataframe").evaluate_all(CUT):
        assert not found["first"]


def test_a_cut_cell_is_noticed(context: BrowserContext) -> None:
    page, _ = opened(context, HTML / "09-does-it-hold-up.html")
    table = page.locator("main table.dataframe").first
    table.evaluate("one => { one.style.whiteSpace = 'nowrap'; one.style.fontSize = '3rem'; }")
    assert table.evaluate_all(CUT)[0]["all"]


@pytest.mark.parametrize("context", [(DESKTOP, "light"), (PHONE, "light")], indirect=True, ids=str)
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_fault_in_a_page(context: BrowserContext, name: str) -> None:
    """What a screen reader or a keyboard would miss, by the rules of axe-core that are not about the theme's frame."""
    page, _ = opened(context, HTML / f"{name}.html")
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run('article', {preload: false, resultTypes: ['violations']})")
    faults = {
        fault["id"]: [" > ".join(map(str, node["target"])) for node in fault["nodes"]][:5]
        for fault in found["violations"]
    }
    assert not faults


@pytest.mark.parametrize("name", ["index", "play"])
def test_a_reader_can_move_the_factor_before_scrolling(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    for part in ("input[type=range]", ".lab-go"):
        place = page.locator(f".athena-lab {part}").bounding_box()
        assert place is not None and place["y"] + place["height"] < 900, part


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_says_in_words_what_it_shows(context: BrowserContext, name: str) -> None:
    page, _ = opened(context, HTML / f"{name}.html")
    silent = page.locator("main img:not([alt]), main img[alt='']:not(.panel + .panel > img)")
    assert silent.count() == 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_no_burden_on_a_phone(browser: Browser, name: str) -> None:
    path = HTML / f"{name}.html"
    text = path.read_text("utf8")
    assert len(text) < LARGEST_TEXT
    at_once = HIDDEN_PANELS.sub("", text)
    pictures = re.findall(r'<img(?![^>]* hidden>)[^>]* src="(_images/[^"]+)"', at_once)
    assert path.stat().st_size + sum((HTML / name).stat().st_size for name in set(pictures)) < LARGEST_PAGE


@pytest.mark.parametrize("name", PAGES)
def test_no_large_script_is_loaded_before_the_text(name: str) -> None:
    head = (HTML / f"{name}.html").read_text("utf8").partition("</head>")[0]
    before = re.findall(r'<script(?![^>]*defer)[^>]* src="([^"?]+)', head)
    assert not [script for script in before if (HTML / script).stat().st_size > 100_000]


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
