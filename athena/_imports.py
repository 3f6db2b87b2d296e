"""Imports at the moment they are needed: short names for modules, and packages that an extra of the project brings.

`athena.data` is `athena.experiments.data`, as an attribute and in imports, and so on for each of `SHORT_NAMES`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SHORT_NAMES = {
    "athena.data": "athena.experiments.data",
    "athena.figures": "athena.book.figures",
    "athena.models": "athena.experiments.models",
    "athena.quality": "athena.evaluation",
    "athena.statistics": "athena.experiments.statistics",
    "athena.tables": "athena.book.tables",
    "athena.training": "athena.experiments.training",
    "athena.widgets": "athena.book.widgets",
}
EXTRAS = {"attribution": "attribution", "book": "book", "evaluation": "attribution", "experiments": "experiments"}
"""Which extra brings the packages that a room needs."""


def needed(name: str, extra: str, user: str) -> Any:
    """The module `name`, for `user`; where a package is not installed, the error says which extra brings it.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "athena":
            raise
        raise ModuleNotFoundError(
            f"{user} needs the package {error.name}: pip install 'athena-lrp[{extra}]'", name=error.name
        ) from error


def room(name: str) -> Any:
    """The module `name` of this package, which may be a short name."""
    place = SHORT_NAMES.get(name, name)
    extra = EXTRAS.get(place.split(".")[1])
    return import_module(name) if extra is None else needed(place, extra, name)


class ShortNames(MetaPathFinder, Loader):
    """Imports the module that a short name stands for, and gives that very module the short name too."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a name in `SHORT_NAMES`, else None."""
        return ModuleSpec(fullname, self) if fullname in SHORT_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself. The import system overwrites its `__spec__`, which `exec_module` puts back."""
        module: ModuleType = room(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing: the module has been imported under its own name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


# First, so that a file or folder left by an earlier version of the package is not taken instead.
sys.meta_path.insert(0, ShortNames())
