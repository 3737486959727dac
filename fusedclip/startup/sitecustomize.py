"""Python imports this at its start where ``fusedclip run`` has put its folder on PYTHONPATH.

With ``FUSEDCLIP_PATCH=1`` torch is patched as soon as it has been imported, before any module can
take its functions by name. A process that never imports torch imports nothing more than this file.
"""

from __future__ import annotations  # a child's Python may be older than fusedclip's

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class AfterTorch:
    """A finder of ``torch``: the one that the others find, and then the patch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Also asked by those who only want to know whether torch is installed.
        if name != "torch":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._follow(spec)
                return spec
        return None

    def _follow(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                patch_torch()

        loader.exec_module = execute_and_patch  # type: ignore[method-assign]


def patch_torch() -> None:
    try:
        from fusedclip.run import activate
    except ImportError as error:
        # The Python of a child may be another one, which has torch and not fusedclip.
        print(
            f"fusedclip run: {sys.executable} cannot import fusedclip ({error}); torch's own clip "
            "is in use there",
            file=sys.stderr,
        )
        return
    activate(os.environ)


def import_the_hidden_one() -> None:
    """The user's own sitecustomize, which Python would have imported but for this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("FUSEDCLIP_PATCH") == "1":
    sys.meta_path.insert(0, AfterTorch())
import_the_hidden_one()
