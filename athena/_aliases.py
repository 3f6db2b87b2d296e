"""Short names for modules: `athena.data` is `athena.experiments.data`, loaded when first asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "athena.data": "athena.experiments.data",
    "athena.figures": "athena.book.figures",
    "athena.models": "athena.experiments.models",
    "athena.quality": "athena.evaluation",
    "athena.statistics": "athena.experiments.statistics",
    "athena.tables": "athena.book.tables",
    "athena.training": "athena.experiments.training",
    "athena.widgets": "athena.book.widgets",
}


class Aliases(MetaPathFinder, Loader):
    """Imports the module that a short name stands for, and gives that very module the short name too."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a name in `MODULES`, else None."""
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself. The import system overwrites its `__spec__`, which `exec_module` puts back."""
        module = import_module(MODULES[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing: the module has been imported under its own name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


# First, so that a file or folder left by an earlier version of the package is not taken instead.
sys.meta_path.insert(0, Aliases())
