"""Builds the native module ``fusedclip._C`` from ``csrc/`` with ninja. torch is not needed.

Environment variables:
    FUSEDCLIP_REQUIRE_NATIVE=1   a failed build is an error; else it is a warning, and the package
                                 installs with the reference backend only.
    CXX                          the C++17 compiler (default: c++).
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FLAGS = ["-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# A fused multiply-add rounds once where the baseline rounds twice: without this flag the bits of a
# norm would depend on the machine's instruction set.
FLAGS += ["-ffp-contract=off"]
ISA_FLAGS = {
    "kernels_avx2.cpp": "-mavx2 -mf16c -mfma",
    "kernels_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c -mfma",
}


class NinjaBuild(build_ext):
    """Compiles the sources in parallel; unchanged ones are not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a stale module must not survive a failed build
        try:
            build_native(target, ROOT / "build" / f"native-{sys.implementation.cache_tag}")
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if os.environ.get("FUSEDCLIP_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"\nWARNING: fusedclip's native module was not built: {error}\n"
                "Only backend 'reference' will be available, which is correct and slow. A C++17 "
                "compiler is needed;\nFUSEDCLIP_REQUIRE_NATIVE=1 makes this an error.\n",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                self.copy_file(str(built), str(ROOT / "fusedclip" / built.name))


def build_native(target: Path, build_dir: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    openmp = openmp_flags(compiler)
    flags = [*FLAGS, *openmp, f"-I{ROOT / 'csrc'}", *include_flags()]
    build_dir.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(ninja_file(compiler, flags, openmp, target))
    ninja = [sys.executable, "-m", "ninja"] if has_module("ninja") else ["ninja"]
    run = subprocess.run([*ninja, "-C", str(build_dir)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the compiler failed:\n{run.stdout}{run.stderr}")


def ninja_file(compiler: str, flags: list[str], openmp: list[str], target: Path) -> str:
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    lines = [
        f"flags = {' '.join(map(escape, flags))}",
        "rule compile",
        f"  command = {compiler} $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared {' '.join([*openmp, *link])} $in -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {escape(str(source))}")
        if source.name in ISA_FLAGS and platform.machine().lower() in ("x86_64", "amd64"):
            lines.append(f"  isa = {ISA_FLAGS[source.name]}")
    lines.append(f"build {escape(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def include_flags() -> list[str]:
    """Python, pybind11 and dlpack.h: from their packages, else from an installed torch."""
    folders = [Path(sysconfig.get_path("include"))]
    if has_module("pybind11"):
        folders.append(package_dir("pybind11") / "include")
    if has_module("tvm_ffi"):
        folders.append(package_dir("tvm_ffi") / "include")
    if len(folders) < 3 and has_module("torch"):
        folders.append(package_dir("torch") / "include")
    return [f"-I{folder}" for folder in folders]


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def package_dir(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def openmp_flags(compiler: str) -> list[str]:
    """``-fopenmp`` where the compiler has it; without it the kernels run on one thread."""
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C++ compiler: {compiler!r} was not found (set CXX)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n")
        probe = [*compiler.split(), "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        return ["-fopenmp"] if subprocess.run(probe, capture_output=True).returncode == 0 else []


setup(
    ext_modules=[Extension("fusedclip._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
