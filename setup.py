"""Builds the native module ``fusedclip._C`` from ``csrc/`` with ninja. torch is not needed.

Environment variables:
    FUSEDCLIP_CUDA=auto|0|1      whether to build the CUDA backend; auto: where nvcc is found.
    FUSEDCLIP_CUDA_ARCHS         its architectures, as in "80;90;120+PTX". Default: sm_80, 86, 89,
                                 90, 100, 120 and PTX of the newest, as far as nvcc knows them; for
                                 an editable installation the present GPU alone.
    FUSEDCLIP_REQUIRE_NATIVE=1   a failed build is an error; else it is a warning, and the package
                                 installs with the backends that need no compiler.
    FUSEDCLIP_SANITIZE=NAMES     what the compiler's -fsanitize takes, for tests: the module is slow
                                 and loads only where the sanitizer's library was loaded first.
    CXX, CUDA_HOME               the C++17 compiler (default: c++), the CUDA toolkit.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
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


CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


class NinjaBuild(build_ext):
    """Compiles the sources in parallel; unchanged ones are not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a stale module must not survive a failed build
        try:
            editable = self.inplace or getattr(self, "editable_mode", False)
            kind = "sanitized" if os.environ.get("FUSEDCLIP_SANITIZE") else "native"
            build_dir = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
            build_native(target, build_dir, find_cuda(present_gpu_only=editable))
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


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and what to build with it."""

    nvcc: str
    archs: tuple[str, ...]  # sm_NN machine code, compute_NN PTX

    @property
    def flags(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{a.split('_')[1]},code={a}" for a in self.archs]
        return ["-O3", "-std=c++17", "-t0", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes]


def find_cuda(present_gpu_only: bool) -> Cuda | None:
    wanted = os.environ.get("FUSEDCLIP_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"FUSEDCLIP_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        if wanted == "1":
            raise RuntimeError("FUSEDCLIP_CUDA=1, but no nvcc was found (set CUDA_HOME)")
        return None
    return Cuda(nvcc, cuda_archs(nvcc, present_gpu_only))


def cuda_archs(nvcc: str, present_gpu_only: bool) -> tuple[str, ...]:
    text = os.environ.get("FUSEDCLIP_CUDA_ARCHS", "")
    if text:
        archs = []
        for name in text.replace(",", ";").replace(" ", ";").split(";"):
            number, _, suffix = name.replace(".", "").lower().removeprefix("sm_").partition("+")
            if not name or suffix not in ("", "ptx"):
                raise RuntimeError(
                    f'FUSEDCLIP_CUDA_ARCHS: expected a list as in "80;90+PTX", got {text!r}'
                )
            archs.append(f"sm_{number}")
            if suffix:
                archs.append(f"compute_{number}")
        return tuple(archs)
    if present_gpu_only and (present := present_gpus()):
        return tuple(f"sm_{number}" for number in present)
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [number for number in CUDA_ARCHS if f"compute_{number}" in listed.split()]
    return (*(f"sm_{number}" for number in known), f"compute_{known[-1]}")


def present_gpus() -> list[str]:
    """Compute capabilities, as in ["90"], of this machine's GPUs."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({line.replace(".", "") for line in lines})


def build_native(target: Path, build_dir: Path, cuda: Cuda | None) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C++ compiler: {compiler!r} was not found (set CXX)")
    sanitize = sanitizer_flags()
    flags = [*FLAGS, *sanitize, f"-I{ROOT / 'csrc'}", *include_flags()]
    build_dir.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    link = ["-pthread", *sanitize]
    (build_dir / "build.ninja").write_text(ninja_file(compiler, flags, link, cuda, target))
    ninja = [sys.executable, "-m", "ninja"] if has_module("ninja") else ["ninja"]
    run = subprocess.run([*ninja, "-C", str(build_dir)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the compiler failed:\n{run.stdout}{run.stderr}")


def ninja_file(
    compiler: str, flags: list[str], link: list[str], cuda: Cuda | None, target: Path
) -> str:
    csrc = ROOT / "csrc"
    sources = sorted({*csrc.rglob("*.cpp")} - {*csrc.glob("python/*.cpp")})  # binding.cpp has those
    link = [*link, *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    linker = compiler
    include_cuda = []
    if cuda is not None:
        sources += sorted(csrc.rglob("*.cu"))
        flags = [*flags, f"'-DFUSEDCLIP_CUDA=\"{','.join(cuda.archs)}\"'"]
        include_cuda = [f"-I{ROOT / 'csrc'}"]
        # nvcc links, since it knows where its static cudart is. Inside the module and hidden: no
        # CUDA library is needed where it is loaded.
        linker = cuda.nvcc
        link = [f"-Xcompiler={flag}" for flag in link]
        link += ["-cudart=static", "-Xlinker=--exclude-libs,ALL", "-lrt"]
    lines = [
        f"flags = {' '.join(map(escape, flags))}",
        "rule compile",
        f"  command = {compiler} $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} -shared $in {' '.join(map(escape, link))} -o $out",
    ]
    if cuda is not None:
        lines += [
            "rule compile_cuda",
            f"  command = {cuda.nvcc} {' '.join(map(escape, [*cuda.flags, *include_cuda]))} "
            "-MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []
    for source in sources:
        rule = "compile_cuda" if source.suffix == ".cu" else "compile"
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: {rule} {escape(str(source))}")
        if source.name in ISA_FLAGS and platform.machine().lower() in ("x86_64", "amd64"):
            lines.append(f"  isa = {ISA_FLAGS[source.name]}")
    lines.append(f"build {escape(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def sanitizer_flags() -> list[str]:
    names = os.environ.get("FUSEDCLIP_SANITIZE")
    if not names:
        return []
    # A finding of the undefined kind ends the process, as the others do.
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-O1", "-g1"]


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


setup(
    ext_modules=[Extension("fusedclip._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
