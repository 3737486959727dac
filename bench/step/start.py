"""A script: ``start.py ROOT THREADS`` measures for ``workers`` with the fusedclip below ROOT.

ROOT is a checkout or a folder of installed packages. All of fusedclip comes from there or is
missing, whatever else is installed: an editable installation would lend another checkout the
modules that only it has. The benchmark itself is the one that this file belongs to.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class From:
    """Finds fusedclip below a root, and knows that checkouts keep its kernels beside it."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, *inside = name.split(".")
        if package != "fusedclip":
            return None
        spec = PathFinder.find_spec(name, path or [self.root])
        if spec is None and len(inside) == 1:
            spec = PathFinder.find_spec(name, [self.root])
        if spec is None:
            raise ModuleNotFoundError(f"{self.root} has no {name}", name=name)
        return spec


def load_bench(folder: Path) -> None:
    """This benchmark as the package ``bench``, whether it is in a checkout or is installed."""
    spec = importlib.util.spec_from_file_location(
        "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["bench"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    root, threads = sys.argv[1:]
    del sys.path[0]  # the folder of this script
    sys.meta_path.insert(0, From(root))
    load_bench(Path(__file__).parent.parent)
    importlib.import_module("bench.step.child").serve(int(threads))
