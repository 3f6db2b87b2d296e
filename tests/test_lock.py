"""Claims about the files that say what is installed: hashes in requirements.txt, licences in licences.csv."""

import csv
import json
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text("utf8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
OPEN = re.compile(r"MIT|BSD|Apache|ISC|MPL|Mozilla Public|PSF|Python Software Foundation|0BSD|Zlib|CC0|BSL")


def licence(name: str) -> str:
    """The licence of an installed package, in the words of its own metadata."""
    found = metadata(name)
    classified = [text.split(" :: ")[-1] for text in found.get_all("Classifier") or [] if text.startswith("License ::")]
    lines = (found.get("License") or "").strip().splitlines()
    return found.get("License-Expression") or "; ".join(sorted(classified)) or (lines[0][:60] if lines else "")


def listed() -> dict[str, dict[str, str]]:
    with (ROOT / "licences.csv").open(encoding="utf8", newline="") as file:
        return {row["package"]: row for row in csv.DictReader(file)}


def test_every_pinned_package_is_locked_in_the_same_version_with_its_hashes() -> None:
    text = (ROOT / "requirements.txt").read_text("utf8")
    locked: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?! )", text.strip()):
        requirement, *hashes = (part.strip(" \\") for part in entry.splitlines())
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", part) for part in hashes), requirement
        locked.setdefault(canonicalize_name(Requirement(requirement).name), []).append(requirement)
    assert not PINS.keys() - locked.keys()
    for name, pin in PINS.items():
        for requirement in locked[name]:
            assert Requirement(requirement).specifier == pin.specifier, requirement


def test_the_lock_names_no_server_and_no_place_of_a_machine() -> None:
    assert not re.search(r"://|file:|index-url|find-links", (ROOT / "requirements.txt").read_text("utf8"))


def test_every_pinned_package_is_listed_with_the_licence_that_it_has() -> None:
    rows = listed()
    assert rows.keys() == PINS.keys()
    checked = 0
    for name, row in rows.items():
        try:
            installed = metadata(name)["Version"]
        except PackageNotFoundError:  # another Python may need no such package
            continue
        if PINS[canonicalize_name(name)].specifier.contains(installed):
            assert row["licence"] == licence(name), name
            checked += 1
    assert checked > 0.9 * len(rows), "run `make test`: it installs what constraints.txt names"


@pytest.mark.parametrize("name", sorted(PINS))
def test_a_licence_lets_one_use_the_package_or_a_note_says_why_it_may_be_here(name: str) -> None:
    row = listed()[name]
    assert row["note"] or all(OPEN.search(part) for part in re.split(r"; | AND ", row["licence"])), row


def test_the_scripts_of_the_pages_have_such_licences_too() -> None:
    packages = json.loads((ROOT / "package-lock.json").read_text("utf8"))["packages"]
    shipped = [name for name, its in packages.items() if name and not its.get("dev")]
    assert shipped
    for name in shipped:
        assert OPEN.search(packages[name]["license"]), name
