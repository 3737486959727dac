"""Builds the native module with the emulator in place of CUDA: ``python -m tests.emulator.build``.

The module has the CPU kernels too, and AddressSanitizer in all of it.
"""

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import tvm_ffi

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}"

_FLAGS = [
    "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing",
    "-ffp-contract=off", "-DNDEBUG", "-fsanitize=address", "-w",
    "-DFUSEDCLIP_EMULATED", "'-DFUSEDCLIP_CUDA=\"emulated\"'",
]  # fmt: skip


def build(csrc: Path = ROOT / "csrc", folder: Path = BUILD) -> Path:
    """Compile what has changed; returns the module. Raises ``CalledProcessError``."""
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [
        HERE / "include", csrc, sysconfig.get_path("include"),
        pybind11.get_include(), Path(tvm_ffi.__file__).parent / "include",
    ]  # fmt: skip
    sources = {*csrc.rglob("*.cpp"), *csrc.rglob("*.cu")} - {*csrc.glob("python/*.cpp")}
    sources = [HERE / "emulator.cpp", *sorted(sources)]
    compiler = os.environ.get("CXX", "c++")
    flags = " ".join([*_FLAGS, *(f"-I{folder}" for folder in includes)])
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $level -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared -fsanitize=address $in -o $out",
    ]
    objects = [f"{source.parent.name}_{source.stem}.o" for source in sources]
    for name, source in zip(objects, sources, strict=True):
        # To optimize the binding, which runs once a call, takes longer than it saves.
        level = "-O0" if source.stem == "binding" else "-O1"
        lines += [f"build {name}: compile {source}", f"  level = {level}"]
    lines.append(f"build {target}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may ask for it at once
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "--quiet"], check=True)
    return target


def environment(module: Path, **variables: str) -> dict[str, str]:
    """For a Python process that is to use ``module`` as ``fusedclip._C``: see plugin.py."""
    # AddressSanitizer has to come first, and finds C++ exceptions in what is loaded by then.
    preloaded = " ".join(map(_compilers_library, ("libasan.so", "libstdc++.so")))
    return {
        **os.environ,
        "FUSEDCLIP_EMULATED_MODULE": str(module),
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        **variables,
    }


def _compilers_library(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    print(build())
