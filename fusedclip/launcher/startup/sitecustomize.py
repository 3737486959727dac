"""Python imports this at its start where ``fusedclip run`` has put its folder on PYTHONPATH.

With ``FUSEDCLIP_PATCH=1`` torch is patched as soon as it has been imported, before any module can
take its functions by name, and so are the frameworks that clip by functions of their own. A process
that imports none of them imports nothing more than this file.
"""

from __future__ import annotations  # a child's Python may be older than fusedclip's

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class After:
    """A finder for one module: it finds what the others find, and acts once the module has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Python also calls this for importlib.util.find_spec, which does not execute the module;
        # so the action follows the execution.
        if name != self._name:
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

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        loader.exec_module = execute_and_act  # type: ignore[method-assign]


def patch_torch() -> None:
    try:
        from fusedclip.launcher.command import activate
    except ImportError as error:
        # The Python of a child may be another one, which has torch and not fusedclip.
        print(
            f"fusedclip run: {sys.executable} cannot import fusedclip ({error}); torch's own clip "
            "is in use there",
            file=sys.stderr,
        )
        return
    activate(os.environ)


def patch_framework(name: str) -> None:
    try:
        integration = importlib.import_module(f"fusedclip.integrations.{name}")
    except ImportError:
        return  # patch_torch has printed why
    integration.patch()


def import_the_hidden_one() -> None:
    """Import the sitecustomize that Python would have imported if this one were not on the path."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("FUSEDCLIP_PATCH") == "1":
    sys.meta_path[:0] = [
        After("torch", patch_torch),
        After("deepspeed", lambda: patch_framework("deepspeed")),
        After("megatron.core", lambda: patch_framework("megatron")),
    ]
import_the_hidden_one()
