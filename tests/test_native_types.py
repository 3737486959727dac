"""``fusedclip/_C.pyi`` says of the native module what the module says of itself."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fusedclip
from fusedclip.backends import native, reference

pytestmark = pytest.mark.skipif(native.module is None, reason="there is no native module")

_STUB = Path(fusedclip.__file__).parent / "_C.pyi"
# Attributes that the Python side sets: fusedclip/backends/cpu.py and cuda.py.
_SET_BY_PYTHON = {"backend", "device"}

# A name with its parameters; for a class, its own names, inherited ones left out; else None.
Shape = tuple[str, ...] | dict[str, "Shape | None"]


def described(body: list[ast.stmt]) -> dict[str, Shape | None]:
    """What a stub declares. A property is a name without parameters."""
    found: dict[str, Shape | None] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = described(node.body)
        elif isinstance(node, ast.FunctionDef):
            names = tuple(a.arg for a in node.args.args if a.arg != "self")
            found[node.name] = None if node.decorator_list else names
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
    return {name: shape for name, shape in found.items() if is_ours(name)}


def built(names: Mapping[str, Any]) -> dict[str, Shape | None]:
    """What a module or class of pybind11 has."""
    found: dict[str, Shape | None] = {}
    for name, value in names.items():
        if not is_ours(name):
            continue
        if isinstance(value, type):
            found[name] = built(vars(value))
        else:
            found[name] = parameters(value) if callable(value) else None
    return found


def is_ours(name: str) -> bool:
    return name == "__len__" or not (name.startswith("_") or name in _SET_BY_PYTHON)


def parameters(function: Any) -> tuple[str, ...]:
    """From the first line of its docstring: ``name(self: …, a: int, b: object) -> None``."""
    signature = str(function.__doc__).splitlines()[0]
    inside = re.fullmatch(r"\w+\((.*)\) -> .*", signature)
    assert inside is not None, signature
    listed = re.findall(r"(?:^|, )(\w+): ", inside[1])
    return tuple(name for name in listed if name != "self")


def _differences(module: ModuleType) -> set[str]:
    stub = described(ast.parse(_STUB.read_text()).body)
    if not module.cuda_architectures():
        assert stub.pop("CudaGradients")
    return differences("", stub, built(vars(module)))


def differences(where: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    found = {where + name for name in one.keys() ^ other.keys()}
    for name in one.keys() & other.keys():
        if isinstance(one[name], dict) and isinstance(other[name], dict):
            found |= differences(f"{where}{name}.", one[name], other[name])
        elif one[name] != other[name]:
            found.add(where + name)
    return found


def test_the_stub_matches_the_module() -> None:
    assert _differences(native.module) == set()


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("def cpu_isa() -> str: ...\n", "", {"cpu_isa"}),
        ("def cpu_isa()", "def isa()", {"cpu_isa", "isa"}),
        ("limit: float, threads: int", "threads: int, limit: float", {"CpuGradients.clamp_"}),
        ("    def nonfinite_indices(self) -> list[int]: ...\n", "",
         {"CpuGradients.nonfinite_indices"}),
        ("NONFINITE: list[str]", "POLICIES: list[str]", {"NONFINITE", "POLICIES"}),
        ("def device_index(self)", "def index(self)",
         {"GradientList.device_index", "GradientList.index"}),
    ],
)  # fmt: skip
def test_a_difference_is_found(
    before: str, after: str, found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _STUB.read_text()
    assert text.count(before) == 1
    changed = tmp_path / "_C.pyi"
    changed.write_text(text.replace(before, after))
    monkeypatch.setattr(f"{__name__}._STUB", changed)
    assert _differences(native.module) == found


def test_policies_have_the_same_numbers_everywhere() -> None:
    """The table in ``backends.reference``, the kernels' own and Triton's constants."""
    assert tuple(native.module.NONFINITE) == reference.NONFINITE
    assert list(native.NONFINITE) == list(reference.NONFINITE)
    assert sorted(native.NONFINITE.values()) == list(range(len(reference.NONFINITE)))
    clip = pytest.importorskip("fusedclip.triton_kernels.clip")
    constants = {"zero": clip._ZERO, "error": clip._ERROR, "unclipped": clip._UNCLIPPED}
    for name, constant in constants.items():
        assert constant.value == reference.NONFINITE.index(name)
    assert clip.MEASURE_ONLY not in range(len(reference.NONFINITE))
