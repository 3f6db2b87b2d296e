"""Prints the whole book as one PDF, by a Chromium that is already installed: book/_build/athena.pdf.

It takes the chapters as `make book` has executed them, and runs none. What print leaves out is said in
_assets/athena.css.

    python book/pdf.py
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from playwright.sync_api import sync_playwright

OUTPUT = Path(__file__).resolve().parent / "_build"
PDF = OUTPUT / "athena.pdf"
PAGE_NUMBER = '<p style="font: 8pt sans-serif; width: 100%; text-align: center"><span class="pageNumber"></span></p>'

# Each chapter counts its figures and citations from id1, and so does the literature: on one page its entries need names
# of their own, and cannot tell where they are cited.
OWN_NAMES = """
    document.querySelectorAll("div.citation[id]").forEach(entry => { entry.id = "literature-" + entry.id; });
    document.querySelectorAll("div.citation a[role=doc-backlink]").forEach(a => { a.removeAttribute("href"); });
    document.querySelectorAll(".bibtex-citation a").forEach(a => { a.hash = "literature-" + a.hash.slice(1); });
"""

# The first page: title, author, and the chapters, each with a link.
FRONT = """
    ([title, author]) => {
        const front = document.createElement("section");
        front.className = "front";
        front.innerHTML = `<h1></h1><p></p><p class="day"></p><h2>Contents</h2><ol></ol>`;
        front.querySelector("h1").textContent = title;
        front.querySelector("p").textContent = author;
        front.querySelector(".day").textContent = new Date().toLocaleDateString("en-GB", {dateStyle: "long"});
        document.querySelectorAll('span[id^="document-"] + section > h2').forEach(heading => {
            const link = document.createElement("a");
            link.textContent = heading.firstChild.textContent;
            link.hash = heading.parentElement.id;
            front.querySelector("ol").appendChild(document.createElement("li")).appendChild(link);
        });
        document.querySelector("article").prepend(front);
    }
"""
# MathJax draws formulae. Their TeX lies over each as text in a colour that cannot be seen, to be searched and copied.
AS_TEXT = """
    () => {
        for (const formula of window.MathJax?.startup?.document?.math ?? []) {
            const text = document.createElement("span");
            text.className = "as-text";
            text.textContent = formula.math;
            formula.typesetRoot.style.position = "relative";
            formula.typesetRoot.append(text);
        }
    }
"""


def print_page(page: Path, chromium: str) -> None:
    """Print a page on A4, once its formulae and pictures stand."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme="light")
        tab.emulate_media(media="print")
        tab.goto(page.as_uri(), wait_until="networkidle")
        tab.evaluate("window.MathJax?.startup?.promise")
        if tab.locator(".math").count() != tab.locator(".math:has(mjx-container)").count():
            sys.exit("The formulae could not be drawn: without npm, `make book` leaves them to the network.")
        tab.evaluate(OWN_NAMES)
        settings = yaml.safe_load((Path(__file__).resolve().parent / "_config.yml").read_text("utf8"))
        tab.evaluate(FRONT, [settings["title"], settings["author"]])
        tab.evaluate(AS_TEXT)
        tab.pdf(
            path=PDF,
            format="A4",
            scale=0.85,  # a page's text is set for screens
            margin={"top": "18mm", "bottom": "18mm", "left": "18mm", "right": "18mm"},
            print_background=True,
            display_header_footer=True,
            header_template="<p></p>",
            footer_template=PAGE_NUMBER,
            outline=True,
            tagged=True,
        )
        browser.close()


def main() -> None:
    """Make one page of all chapters, print it, and say where the PDF is."""
    if not (OUTPUT / "executed").is_dir():
        sys.exit("There are no executed chapters to print: run `make book` first.")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("There is no Chromium here to print with: install it, as by `apt-get install chromium`.")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    where = (str(OUTPUT / "executed"), "--path-output", str(OUTPUT.parent))
    command = [str(jupyter_book), "build", *where, "--builder", "singlehtml"]
    if subprocess.run(command, check=False).returncode:
        sys.exit("The chapters could not be put on one page; why is said above.")
    print_page(OUTPUT / "singlehtml" / "index.html", chromium)
    print(f"\nThe book: {PDF.as_uri()}, {PDF.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
