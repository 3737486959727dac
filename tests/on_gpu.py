"""All that needs a GPU, in one go: ``make gpu``, or ``python -m tests.on_gpu``.

For any machine with a CUDA device, a torch >= 2.10 that sees it and nvcc; nothing is downloaded.
Installs this checkout into the Python that runs it (editable), runs the tests marked ``gpu`` and
the common suite on CUDA tensors, compute-sanitizer over the kernels' driver, and the benchmark,
whose figures go to bench/results/. A step that fails does not stop the next; the exit status says
whether one did.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

_ROOT = Path(__file__).parent.parent
_COMMON = [
    f"tests/test_{name}.py"
    for name in ("accuracy", "semantics", "bad_input", "torch_dropin", "compile", "patch")
]
_SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def main() -> int:
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device")
        return 1
    install = ("pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    steps = {"build": _run(_python("-m", *install), FUSEDCLIP_CUDA="1")}
    # A prebuilt module will do where there is no compiler.
    backends = [name for name, state in _backends().items() if name != "cpu" and state == "ok"]
    steps["tests marked gpu"] = _run(_pytest("tests/test_gpu.py"))
    steps[f"common suite, {', '.join(backends)}"] = _run(
        _pytest(*_COMMON), FUSEDCLIP_TEST_BACKENDS=",".join(backends)
    )
    steps |= _sanitize()
    steps["benchmark"] = _benchmark()
    print("\n" + "\n".join(f"{'ok  ' if good else 'FAIL'}  {name}" for name, good in steps.items()))
    return 0 if all(steps.values()) else 1


def _backends() -> dict[str, str]:
    script = "import fusedclip, json; print(json.dumps(fusedclip.available_backends()))"
    run = subprocess.run(_python("-c", script), cwd=_ROOT, capture_output=True, text=True)
    print(run.stdout, run.stderr, sep="")
    return dict(json.loads(run.stdout)) if run.returncode == 0 else {}


def _sanitize() -> dict[str, bool]:
    """compute-sanitizer's four tools over the driver, built with the real compiler."""
    folder = _ROOT / "build"
    folder.mkdir(exist_ok=True)
    driver = folder / "driver"
    major, minor = torch.cuda.get_device_capability()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    built = _run(
        [nvcc, "-std=c++17", "-O2", "-lineinfo", "-Icsrc", arch, "csrc/cuda/clip_cuda.cu",
         "csrc/cuda/launch_shape.cpp", "tests/emulator/driver.cu", "-o", str(driver)]
    )  # fmt: skip
    steps = {"driver": built and _run([str(driver), "3"])}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for name in _SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "9", str(driver)]
        steps[f"compute-sanitizer {name}"] = built and _run(command)
    return steps


def _benchmark() -> bool:
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    stem = _ROOT / "bench" / "results" / f"{gpu}-torch{torch.__version__.partition('+')[0]}"
    return _run(
        _python(
            "-m", "bench", "--device", "cuda", "--json", f"{stem}.json", "--text", f"{stem}.txt"
        )
    )


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _pytest(*arguments: str) -> list[str]:
    return _python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments)


def _run(command: list[str], **variables: str) -> bool:
    print(f"\n$ {' '.join(command)}", flush=True)
    begin = time.perf_counter()
    try:
        status = subprocess.run(
            command, cwd=_ROOT, env={**os.environ, "FUSEDCLIP_REQUIRE_NATIVE": "1", **variables}
        ).returncode
    except OSError as error:
        print(error)
        return False
    print(f"exit status {status} after {time.perf_counter() - begin:.0f} s", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
