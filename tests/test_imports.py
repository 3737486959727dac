"""Which module of the package imports which: no circle, and every import points one way.

The imports are read from the source. Those under ``if TYPE_CHECKING:`` are left out, since they
never run; those inside of functions count for the direction.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent

# A module imports from its own layer and from the layers before it.
LAYERS = (
    ("_version", "aliasing", "ambient", "errors", "parameters", "rule"),
    ("backends", "triton_kernels"),
    ("checks", "decision"),
    ("sharded",),
    ("gradients",),
    ("pipeline",),
    ("policies", "monitor", "dispatched"),
    ("call",),
    ("agc", "actions", "ops", "functional"),
    ("leaving_out",),
    ("attachment", "in_backward"),
    ("clipper", "amp"),
    ("config", "recommendation", "compare", "integrations"),
    ("",),  # fusedclip itself: the public names
    ("demo", "doctor", "launcher", "cli", "__main__"),
)
_LAYER_OF = {name: place for place, names in enumerate(LAYERS) for name in names}


def _sources() -> dict[str, Path]:
    """The file of each module of the package, by dotted name."""
    found = {}
    for folder, package in (("fusedclip", "fusedclip"), ("triton_kernels", _KERNELS)):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(_ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


_KERNELS = "fusedclip.triton_kernels"
SOURCES = _sources()


def _statements(nodes: list[ast.stmt], inside_functions: bool) -> Iterator[ast.stmt]:
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _statements(node.orelse, inside_functions)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []), inside_functions)
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body, inside_functions)


def imports(module: str, text: str, *, is_package: bool, inside_functions: bool) -> set[str]:
    """The modules of the package that ``module`` imports, by dotted name."""
    found = set()
    for node in _statements(ast.parse(text).body, inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = module.split(".")[: None if is_package else -1]
            base = outer[: len(outer) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{name}.{alias.name}"
                found.add(whole if whole in SOURCES else name)
    return {name for name in found if name in SOURCES} - {module}


def _graph(*, inside_functions: bool) -> dict[str, set[str]]:
    return {
        module: imports(
            module,
            path.read_text(),
            is_package=path.name == "__init__.py",
            inside_functions=inside_functions,
        )
        for module, path in SOURCES.items()
    }


def _layer(module: str) -> int:
    part = [*module.split("."), ""][1]
    assert part in _LAYER_OF, f"{module}: no layer of tests/test_imports.py names it"
    return _LAYER_OF[part]


def test_no_circle() -> None:
    graph = _graph(inside_functions=False)
    assert sum(map(len, graph.values())) > 100  # it was read
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_every_import_points_one_way() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, found in _graph(inside_functions=True).items()
        for imported in found
        if _layer(imported) > _layer(module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import fusedclip.call", {"fusedclip.call"}),
        ("from fusedclip import call, clip_", {"fusedclip.call", "fusedclip"}),
        ("from fusedclip.backends import cpu", {"fusedclip.backends.cpu"}),
        ("from .table import CODES", {f"{_KERNELS}.table"}),
        ("from . import table, interpreted", {f"{_KERNELS}.table", _KERNELS}),
        ("try:\n    import fusedclip.call\nexcept ImportError:\n    pass", {"fusedclip.call"}),
        ("if TYPE_CHECKING:\n    import fusedclip.call\nelse:\n    import fusedclip.amp",
         {"fusedclip.amp"}),
        ("class A:\n    import fusedclip.call", {"fusedclip.call"}),
        ("def f():\n    import fusedclip.call", set()),
        ("import torch", set()),
    ],
)  # fmt: skip
def test_imports_are_found(text: str, found: set[str]) -> None:
    module = f"{_KERNELS}.clip"
    assert imports(module, text, is_package=False, inside_functions=False) == found
    if text.startswith("def"):
        assert imports(module, text, is_package=False, inside_functions=True) == {"fusedclip.call"}
