"""Claims about a notebook with a kernel behind it, in JupyterLab and a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 180_000  # ms; a first import of everything, on two busy cores


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab of its own, in a folder with a copy of the notebook."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "book" / "play.ipynb", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    quiet = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *settings, f"--ServerApp.root_dir={folder}"],
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "JupyterLab ended as soon as it was started"
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer within a minute")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def notebook(server: str) -> Iterator[Page]:
    """The notebook in JupyterLab, all its cells run."""
    if CHROMIUM is None:
        pytest.fail("there is no Chromium here: install it, as by `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 2000})
        page.set_default_timeout(PATIENCE)
        page.goto(f"{server}/lab/tree/play.ipynb")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.get_by_text("| Idle").wait_for()  # the kernel answers
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator("li[data-command='runmenu:run-all']").click()
        page.locator(".jp-Notebook .widget-button:has-text('Train')").wait_for()
        yield page
        browser.close()


def panel(page: Page, having: str) -> Locator:
    """The explorer that has a certain part."""
    return page.locator(f".jp-OutputArea-output > .widget-vbox:has({having}), .widget-vbox:has({having})").first


def test_the_factor_explorer_trains_its_curve_moves_and_it_stops(notebook: Page) -> None:
    explorer = panel(notebook, ".widget-button:has-text('Train')")
    train, stop = (explorer.locator(f".widget-button:has-text('{name}')") for name in ("Train", "Stop"))
    explorer.locator(".widget-hslider:has-text('epochs') .widget-readout").fill("10")
    notebook.keyboard.press("Enter")
    train.scroll_into_view_if_needed()
    train.click()
    image = explorer.locator("img.widget-image")
    seen = set()
    for _ in range(3):  # three pictures after one another, each another one
        notebook.wait_for_function(
            "([image, seen]) => image.src && !seen.includes(image.src)", arg=[image.element_handle(), list(seen)]
        )
        seen.add(image.get_attribute("src"))
    stop.click()
    explorer.locator(".widget-html:has-text('Stopped. Run 1, epoch')").wait_for()
    assert train.is_enabled()
    assert stop.is_disabled()


def test_the_relevance_explorer_follows_a_choice_and_a_drawing(notebook: Page) -> None:
    explorer = panel(notebook, "canvas")
    image = explorer.locator("img.widget-image")

    def another(act: object) -> None:
        before = image.get_attribute("src")
        assert callable(act)
        act()
        notebook.wait_for_function("([image, before]) => image.src !== before", arg=[image.element_handle(), before])

    another(lambda: explorer.locator("select").first.select_option("7"))
    pad = explorer.locator("canvas")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    assert box is not None

    def draw() -> None:
        x, y = box["x"] + box["width"] / 2, box["y"]
        notebook.mouse.move(x, y + 40)
        notebook.mouse.down()
        notebook.mouse.move(x, y + 180, steps=8)
        notebook.mouse.up()

    another(draw)
    explorer.locator(".widget-html:has-text('Your drawing')").wait_for()
    another(lambda: explorer.locator("button:has-text('Clear')").click())
