"""The package as a stranger gets it: built without torch, installed elsewhere, or without compiler.

Each installation goes to a fresh virtual environment that sees this one's torch through a path
file, so that nothing large is downloaded and no trace of the editable installation is left.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fusedclip

_ROOT = Path(__file__).parent.parent
_SOURCES = [
    "bench",
    "csrc",
    "fusedclip",
    "triton_kernels",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
]

_CLIP = """
import torch, fusedclip
p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4)
print(fusedclip.__file__, fusedclip.available_backends()["cpu"])
print(fusedclip.clip_([p], 1.0, backend={backend!r}).item())
"""


def _run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a checkout holds, without anything built."""
    target = tmp_path / "source"
    target.mkdir()
    for name in _SOURCES:
        path = _ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=shutil.ignore_patterns("*.so", "__pyc*"))
        else:
            shutil.copy(path, target / name)
    return target


def _environment(folder: Path) -> Path:
    """A fresh virtual environment that can import torch; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(_run(python, "-c", purelib, cwd=folder).stdout.strip())
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


@pytest.mark.timeout(600)
def test_wheel_built_in_isolation_without_torch(source: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = _run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", wheels, ".",
        cwd=source, FUSEDCLIP_REQUIRE_NATIVE="1", FUSEDCLIP_CUDA_ARCHS="90",
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = wheels.glob("fusedclip-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    native = [name for name in names if name.startswith("fusedclip/_C.") and "cpython" in name]
    installed = {name for name in names if not name.startswith("fusedclip-")} - {*native}
    assert installed == {*_python_files(source), "fusedclip/py.typed", "fusedclip/_C.pyi"}
    assert len(native) == 1
    info = {name.partition("/")[2] for name in names if name.startswith("fusedclip-")}
    assert info == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"
    }  # fmt: skip

    python = _environment(tmp_path / "clean")
    install = _run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    assert install.returncode == 0, install.stderr
    used = _run(python, "-W", "ignore", "-c", _CLIP.format(backend="cpu"), cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    where, status, norm = used.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "clean")
    assert (status, norm) == ("ok", "2.0")


@pytest.mark.timeout(300)
def test_source_distribution_has_what_a_build_needs_and_no_more(
    source: Path, tmp_path: Path
) -> None:
    build = _run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, ".", cwd=source
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (archive,) = tmp_path.glob("fusedclip-*.tar.gz")
    version = fusedclip.__version__
    assert archive.name == f"fusedclip-{version}.tar.gz"
    with tarfile.open(archive) as tar:
        files = {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}
    sources = {
        str(path.relative_to(source))
        for name in _SOURCES
        for path in [source / name, *(source / name).rglob("*")]
        if path.is_file() and path.suffix not in (".json", ".pyc")
    }
    generated = {name for name in files if name.startswith("fusedclip.egg-info/")}
    assert files - generated - {"PKG-INFO", "setup.cfg"} == sources - {"bench/test_speed.py"}


def _python_files(source: Path) -> set[str]:
    """Where the source tree's modules are once installed."""
    folders = {
        "fusedclip": "fusedclip",
        "bench": "fusedclip/bench",
        "triton_kernels": "fusedclip/triton_kernels",
    }
    return {
        f"{target}/{path.relative_to(source / folder)}"
        for folder, target in folders.items()
        for path in (source / folder).rglob("*.py")
    }


@pytest.mark.timeout(300)
def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """The installation succeeds and says what is missing; with REQUIRE_NATIVE it does not."""
    python = _environment(tmp_path / "clean")
    command = [python, "-m", "pip", "install", "-v", "--no-deps", "."]
    refused = _run(*command, cwd=source, CXX="/bin/false", FUSEDCLIP_REQUIRE_NATIVE="1")
    assert refused.returncode != 0
    assert "the compiler failed" in refused.stdout + refused.stderr
    install = _run(*command, cwd=source, CXX="/bin/false")
    assert install.returncode == 0, install.stdout + install.stderr
    assert "WARNING: fusedclip's native module was not built" in install.stdout + install.stderr
    used = _run(python, "-W", "ignore", "-c", _CLIP.format(backend="auto"), cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert "the native module fusedclip._C is not available" in used.stdout
    assert used.stdout.split()[-1] == "2.0"


@pytest.mark.timeout(300)
def test_headers_from_torch_when_their_packages_are_absent(tmp_path: Path) -> None:
    """An offline build needs nothing beside torch: it ships both headers."""
    include = Path(torch.__file__).parent / "include"
    compile_only = _run(
        os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", f"-I{_ROOT / 'csrc'}",
        f"-I{include}", f"-I{_python_include()}", _ROOT / "csrc/binding.cpp",
        cwd=tmp_path,
    )  # fmt: skip
    assert compile_only.returncode == 0, compile_only.stderr


def test_import_is_quick(tmp_path: Path) -> None:
    """It adds less than 1.5 % to ``import torch``, with the byte code that a user has.

    Both in the same process and by its own processor time, so that a busy machine slows both.
    """
    script = (
        "import sys, time; sys.dont_write_bytecode = False; start = time.process_time(); "
        "import torch; middle = time.process_time(); import fusedclip; "
        "print((time.process_time() - middle) / (middle - start))"
    )
    cached = {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    shares = [
        float(_run(sys.executable, "-W", "ignore", "-c", script, cwd=_ROOT, **cached).stdout)
        for _ in range(4)
    ]
    assert min(shares[1:]) < 0.015  # the first has no byte code yet


def _python_include() -> str:
    import sysconfig

    return sysconfig.get_path("include")
