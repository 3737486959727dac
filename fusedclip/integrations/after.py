"""Act once a module has been imported.

Stands alone: ``launcher/startup/sitecustomize.py`` loads this file by its path, for the Python of a
child may have no fusedclip.
"""

from __future__ import annotations  # a child's Python may be older than fusedclip's

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
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


def after_import(name: str, action: Callable[[], None]) -> After | None:
    """Call ``action`` when module ``name`` has been imported: now, if it has been already.

    Returns:
        What waits for it, which ``sys.meta_path.remove`` takes back; ``None`` when nothing does.
    """
    if name in sys.modules:
        action()
        return None
    waiting = After(name, action)
    sys.meta_path.insert(0, waiting)
    return waiting
