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
from importlib.machinery import PathFinder
from types import ModuleType


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


def load_by_path(*parts: str) -> ModuleType:
    """A module of the package, which may not be importable here."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    spec = importlib.util.spec_from_file_location(parts[-1], os.path.join(package, *parts) + ".py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ.get("FUSEDCLIP_PATCH") == "1":
    after_import = load_by_path("integrations", "after").after_import
    after_import("torch", patch_torch)
    after_import("deepspeed", lambda: patch_framework("deepspeed"))
    after_import("megatron.core", lambda: patch_framework("megatron"))
import_the_hidden_one()
