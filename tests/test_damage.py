"""10,000 damaged stores, studies and caches: each ends in the documented error or in the right answer."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import SEEDS, STUDY, line_of

from athena import data
from athena.experiments import Store, StoreError, Study
from athena.experiments.study import MOST_RUNS

pytestmark = pytest.mark.slow

Damage = list[tuple[str, float, bytes]]
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["put", "insert", "cut", "end", "again"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=6),
            st.sampled_from(
                [b'"', b"{", b"[", b"9", b"-", b".", b"e999", b"NaN", b"null", b"true", b"\n", b"\r", b"\0"]
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damage: Damage) -> bytes:
    """`content` with bytes written over, put in or taken out, cut off at a place, or repeated from there."""
    for kind, share, put in damage:
        place = int(share * len(content))
        before, after = content[:place], content[place:]
        content = {
            "put": before + put + after[len(put) :],
            "insert": before + put + after,
            "cut": before + after[len(put) :],
            "end": before,
            "again": content + after,
        }[kind]
    return content


def many(count: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=quiet)


@many(4000)
@given(damage=DAMAGE)
def test_a_damaged_store_gives_lines_that_were_written_or_an_error_that_names_it(
    tmp_path: Path, damage: Damage
) -> None:
    store = Store(tmp_path / "s.jsonl")
    lines = [line_of(run, "0123456789abcdef", accuracy=0.8437) for run in SEEDS]
    if not (tmp_path / "whole").exists():
        with store.open() as append:
            for line in lines:
                append(line)
        store.path.rename(tmp_path / "whole")
    content = damaged((tmp_path / "whole").read_bytes(), damage)
    store.path.write_bytes(content)
    store.path.with_suffix(".torn").unlink(missing_ok=True)
    try:
        found = store.lines()
    except StoreError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith(str(store.path))
        return
    assert all(line in lines for line in found)
    with warnings.catch_warnings(action="ignore"), store.open():
        assert store.lines() == found
    aside = store.path.with_suffix(".torn")
    kept = store.path.read_bytes() + (aside.read_bytes() if aside.exists() else b"")
    assert kept.removesuffix(b"\n") == content.removesuffix(b"\n"), "something is lost"


@many(1000)
@given(place=st.floats(0, 1, exclude_max=True), digit=st.sampled_from("0123456789"))
def test_a_changed_digit_of_a_line_without_checksum_leaves_what_a_run_can_have_measured(
    tmp_path: Path, place: float, digit: str
) -> None:
    text = json.dumps(line_of(SEEDS[1], "0123456789abcdef", accuracy=0.8437))
    digits = [n for n, character in enumerate(text) if character.isdigit()]
    at = digits[int(place * len(digits))]
    store = Store(tmp_path / "s.jsonl")
    store.path.write_text(text[:at] + digit + text[at + 1 :] + "\n")
    try:
        (line,) = store.lines()
    except StoreError:
        return
    assert line["key"] == SEEDS[1].key and line["run"] == json.loads(text)["run"]
    assert all(0 <= accuracy <= 1 for accuracy in line["accuracy"]) and line["seconds"] > 0


@many(3000)
@given(damage=DAMAGE)
def test_a_damaged_study_is_a_study_or_is_refused_by_its_file(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(damaged(STUDY.encode(), damage))
    try:
        study = Study.read(path)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{path} is not a study: "
        assert 1 <= len(study.runs) <= 2 * MOST_RUNS and len(set(study.runs)) == len(study.runs)
    assert said.startswith(f"{path} is not a study: ")


@many(2500)
@given(damage=DAMAGE, within=st.sampled_from(["anywhere", "the first header", "the directory"]))
def test_a_damaged_cache_gives_the_images_that_were_converted_or_is_refused(
    tmp_path: Path, damage: Damage, within: str
) -> None:
    path, whole = tmp_path / "cifar10.npz", tmp_path / "whole.npz"
    if not whole.exists():
        chance = np.random.RandomState(0)
        parts = {"train": 20, "test": 10}
        images = {
            f"{part}_images": chance.randint(0, 256, (n, 3, 32, 32)).astype(np.uint8) for part, n in parts.items()
        }
        labels = {f"{part}_labels": (np.arange(n) % 10).astype(np.uint8) for part, n in parts.items()}
        np.savez(whole, **images, **labels, source=np.array("CIFAR-10, JPEG image folders"))
    stored = whole.read_bytes()
    record = replace(data.DATA_SETS["cifar10"], train=20, test=10)
    path.write_bytes(stored)
    expected = record.load(tmp_path).fingerprint
    first, last = {
        "anywhere": (0, len(stored)),
        "the first header": (0, 300),
        "the directory": (len(stored) - 500, len(stored)),
    }[within]
    path.write_bytes(stored[:first] + damaged(stored[first:last], damage) + stored[last:])
    with warnings.catch_warnings(action="ignore"):  # numpy has some for headers that it does not know
        try:
            arrays = record.load(tmp_path)
        except data.DamagedData as error:
            said = str(error)
        else:
            said = str(path)
            assert arrays.fingerprint == expected
    assert str(path) in said or "cifar10 in" in said
