"""Claims about what has to be installed: PyTorch alone for the engine, extras for the rest, and which Pythons do."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import athena
from athena._imports import SHORT_NAMES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
PYTHONS = ("3.11.0", "3.11.2", "3.12.0", "3.13.0")


def brought_by(package: str, found: set[str]) -> set[str]:
    """The names of a package and of all that its installation brings along."""
    if package not in found:
        found.add(package)
        for text in distribution(package).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                brought_by(requirement.name, found)
    return found


def run_with(modules: set[str], program: str) -> subprocess.CompletedProcess[str]:
    """Runs `program` where nothing but athena, the standard library and these modules can be imported."""
    block = f"""
import sys, warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
allowed = {modules!r} | set(sys.stdlib_module_names) | {{"athena"}}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
    return subprocess.run([sys.executable, "-c", block + program], capture_output=True, text=True, cwd=ROOT)


def torch_alone() -> set[str]:
    files = (file for package in brought_by("torch", set()) for file in distribution(package).files or [])
    return {file.parts[0].removesuffix(".py") for file in files}


EXPLAIN_AND_GUIDE = """
import torch
import athena

model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3))
x = torch.rand(2, 1, 4, 4)
r = athena.lrp(model, x)
assert r.input.shape == x.shape and len(r.layers) == 2
with athena.Guidance(model, factor=0.1, scope="all"):
    model(x).sum().backward()
assert not {"numpy", "pandas", "torch._dynamo"} & set(sys.modules)
"""


def test_explaining_and_guiding_need_pytorch_alone() -> None:
    done = run_with(torch_alone(), EXPLAIN_AND_GUIDE)
    assert done.returncode == 0, done.stderr


NEEDS_MORE = {
    "import athena.data": "experiments",
    "athena.experiments": "experiments",
    "athena.Run": "experiments",
    "athena.attribution": "attribution",
    "athena.quality": "attribution",
    "from athena.widgets import frames": "book",
    "r.conservation()": "experiments",
}


def test_what_needs_more_says_which_extra_brings_it() -> None:
    program = "".join(
        f"try:\n    {use}\nexcept ModuleNotFoundError as error:\n    print(error)\n" for use in NEEDS_MORE
    )
    done = run_with(torch_alone(), EXPLAIN_AND_GUIDE + program)
    assert done.returncode == 0, done.stderr
    for said, extra in zip(done.stdout.splitlines(), NEEDS_MORE.values(), strict=True):
        assert re.search(rf"needs the package \w+: pip install 'athena-lrp\[{extra}\]'", said)


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_a_short_name_is_the_module_itself_as_attribute_and_in_imports(name: str) -> None:
    module = importlib.import_module(SHORT_NAMES[name])
    assert importlib.import_module(name) is module is getattr(athena, name.partition(".")[2])
    assert module.__name__ == SHORT_NAMES[name]
    assert module.__spec__ is not None and module.__spec__.name == SHORT_NAMES[name]


def test_the_core_depends_on_pytorch_alone() -> None:
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["torch"]


def test_dev_brings_every_other_extra_but_the_frameworks_of_others() -> None:
    extras = PROJECT["optional-dependencies"]
    brought, ahead = set[str](), ["dev"]
    while ahead:
        extra = ahead.pop()
        brought.add(extra)
        ahead += [e for text in extras[extra] for e in Requirement(text).extras if text.startswith("athena-lrp[")]
    assert brought == set(extras) - {"frameworks"}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pinned_package_allows_each_python_that_the_project_does(python: str) -> None:
    """By the metadata of what is installed, in the version that is pinned; `make` installs those."""
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    installed = {pin.name: metadata(pin.name) for pin in pins()}
    allowed = {
        pin.name: Requirement(f"python{installed[pin.name].get('Requires-Python') or ''}").specifier.contains(python)
        for pin in pins()
        if pin.specifier.contains(installed[pin.name]["Version"])
    }
    assert len(allowed) > 0.9 * len(pins()), "run `make test`: it installs what constraints.txt names"
    assert not [name for name, holds in allowed.items() if not holds]


# The Makefile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a Python that makes environments whose pip does nothing, or fails."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "pip").write_text("#!/bin/sh\necho Python $(cat .venv/bin/version)\n[ ! -e offline ]\n")
    (tmp_path / "python").write_text("""#!/bin/sh
case "$*" in
  *--version) echo Python $VERSION ;;
  -c*) [ "$VERSION" != 3.10.13 ] ;;
  "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp pip .venv/bin/python &&
    echo $VERSION >.venv/bin/version && echo made ;;
esac
""")
    for name in ("pip", "python"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "-C", str(folder), ".venv/.installed", "PYTHON=./python"]
    return subprocess.run(command, env=os.environ | {"VERSION": version}, capture_output=True, text=True)


def test_make_says_which_python_it_needs_before_it_does_anything(folder: Path) -> None:
    done = make(folder, "3.10.13")
    assert done.returncode != 0 and not (folder / ".venv").exists()
    assert "needs Python 3.11 or newer, and ./python is Python 3.10.13." in done.stdout
    assert "PYTHON=/path/to/python3.12" in done.stdout


def test_make_begins_an_environment_that_failed_or_is_of_another_python_anew(folder: Path) -> None:
    (folder / ".venv").mkdir()
    (folder / ".venv" / "left by an old Python").touch()
    (folder / "offline").touch()
    assert make(folder, "3.11.2").returncode != 0
    (folder / "offline").unlink()
    for version, made in (("3.11.2", True), ("3.11.2", False), ("3.13.0", True)):
        done = make(folder, version)
        assert done.returncode == 0 and (folder / ".venv" / ".installed").exists()
        assert ("made" in done.stdout.splitlines()) == made
        assert sorted(path.name for path in (folder / ".venv").iterdir()) == [".installed", "bin"]
        os.utime(folder / ".venv" / ".installed", (0, 0))  # as after a change of pyproject.toml
