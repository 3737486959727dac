"""Which versions of Python and torch were tried: ``python -m bench.support --python PATH ...``.

Each interpreter needs setuptools, pybind11, ninja and apache-tvm-ffi. With it the native module is
built in a copy of the tree, without CUDA, and loaded, and all modules are compiled to byte code;
where it has a torch as well, a clip is made.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .section import write

_ROOT = Path(__file__).parent.parent
_TREE = ("bench", "csrc", "fusedclip", "triton_kernels", "setup.py", "pyproject.toml", "README.md",
         "LICENSE", "MANIFEST.in")  # fmt: skip

_PROBE = """
import importlib.util, json, pathlib, platform, sys
(path,) = pathlib.Path("fusedclip").glob("_C*.so")
spec = importlib.util.spec_from_file_location("fusedclip._C", path)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert native.cpu_isa()
found = None
if importlib.util.find_spec("torch"):
    import torch, fusedclip
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    assert fusedclip.clip_([p], 1.0, backend="cpu") == 2.0
    found = torch.__version__
print(json.dumps([platform.python_version(), found]))
"""


@dataclass(frozen=True)
class Row:
    python: str
    torch: str | None
    did: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.support", description=__doc__)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--json", type=Path, help="write what was run to this file")
    arguments = parser.parse_args(argv)
    rows = [dataclasses.asdict(tried(python)) for python in arguments.python]
    print(*tables(rows).values())
    if arguments.json is not None:
        write(rows, arguments.json)
    return 0


def tried(python: str) -> Row:
    """Raises ``CalledProcessError`` where anything fails."""
    with tempfile.TemporaryDirectory() as folder:
        for name in _TREE:
            source, target = _ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pyc*"))
            else:
                shutil.copy(source, target)
        variables = {"FUSEDCLIP_CUDA": "0", "FUSEDCLIP_REQUIRE_NATIVE": "1"}
        for command in (
            ["setup.py", "-q", "build_ext", "--inplace"],
            ["-m", "compileall", "-q", "fusedclip", "bench", "triton_kernels"],
        ):
            subprocess.run(
                [python, *command], cwd=folder, env={**os.environ, **variables}, check=True
            )
        probe = subprocess.run(
            [python, "-W", "ignore", "-c", _PROBE],
            cwd=folder, env={**os.environ, "PYTHONPATH": folder}, stdout=subprocess.PIPE,
            text=True, check=True,
        )  # fmt: skip
    version, torch = json.loads(probe.stdout)
    did = "native module built and loaded, all modules compiled"
    return Row(version, torch, did + ("" if torch is None else ", a clip made"))


def tables(result: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    rows = [Row(**row) for row in result]
    lines = ["| Python | torch | what was run |", "|---|---|---|"]
    lines += [f"| {row.python} | {row.torch or 'none'} | {row.did} |" for row in rows]
    return {"support": "\n".join(lines) + "\n"}


if __name__ == "__main__":
    sys.exit(main())
