"""All that needs a GPU: ``make gpu``, or ``python -m tests.on_gpu --results DIR [--only STEP …]``.

For any machine with a CUDA device, a torch >= 2.10 that sees it and nvcc; nothing is downloaded,
and what is missing there (pytest's plugins, hypothesis) is said and done without. Installs this
checkout into the Python that runs it (editable). A step that fails or hangs does not stop the next;
the exit status says whether one did.

DIR holds few files, each of them whole at every moment: log.txt, steps.json, sweep.json and the
benchmark's, DEVICE-torchVERSION.json, which belongs in bench/results/.

--only takes steps and groups of them. The groups "figures", "tests", "sanitizers" and "compiled"
take less than ten minutes each, with the build before them. --within SECONDS ends in time, whatever
happens: the last steps get what is left.
"""

import argparse
import importlib.util
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests import steps
from tests.steps import Step

_ROOT = Path(__file__).parent.parent
_COMMON = [
    f"tests/test_{name}.py"
    for name in ("accuracy", "semantics", "bad_input", "torch_dropin", "compile", "patch")
]
_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
GROUPS = {
    "figures": ("check", "benchmark", "sweep"),
    "tests": ("gpu", "sharded", "common"),
    "sanitizers": ("driver", "kernels", *_TOOLS),
    "compiled": ("compiled",),
}
_WISHED = {
    "pytest": "no tests run",
    "pytest_timeout": "a test that hangs ends its whole step",
    "hypothesis": "the random lists of tests/test_accuracy.py are left out",
    "ninja": "the program of that name has to be there",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tests.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=_ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP")
    parser.add_argument("--within", type=float, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device")
        return 1
    folder = arguments.results.resolve()
    try:
        chosen = choose(all_steps(folder), arguments.only)
    except ValueError as error:
        parser.error(str(error))
    for name, loss in _WISHED.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: {loss}")
    # What is running is ended with this process: it is a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    good = steps.run(chosen, folder, arguments.within)
    print(f"\n{steps.summary(folder)}\n{folder}:", *sorted(f.name for f in folder.iterdir()))
    return 0 if good else 1


def choose(known: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps of these names, or of groups, with what they need, in the order of ``known``."""
    by_name = {step.name: step for step in known}
    wanted = {own for name in names for own in GROUPS.get(name, (name,))} or set(by_name)
    unknown = sorted(wanted - set(by_name))
    if unknown:
        raise ValueError(
            f"--only: expected {', '.join([*GROUPS, *by_name])}, got {', '.join(unknown)}"
        )
    wanted |= {by_name[name].needs for name in wanted}
    return [step for step in known if step.name in wanted]


def all_steps(folder: Path) -> list[Step]:
    """In the order of what is missed most if the time runs out."""
    install = ("pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = str(folder / f"{gpu}-torch{torch.__version__.partition('+')[0]}.json")
    sweep = ("bench.gpu_sweep", "--json", str(folder / "sweep.json"))
    strict = {"FUSEDCLIP_CUDA": "1", "FUSEDCLIP_REQUIRE_NATIVE": "1"}
    both = {"FUSEDCLIP_TEST_BACKENDS": "cuda,triton"}
    bench = ("bench", "--device", "cuda", "--json", results)
    return [
        Step("build", _python(*install), 150, strict),
        Step("check", _python("tests.gpu_check"), 60, needs="build"),
        Step("benchmark", _python(*bench), 200, needs="build"),
        Step("sweep", _python(*sweep), 150, needs="build"),
        Step("gpu", _pytest("tests/test_gpu.py"), 150, needs="build", quiet=True),
        Step("sharded", _pytest("tests/test_distributed_gpu.py"), 90, needs="build", quiet=True),
        Step("common", _pytest(*_COMMON), 190, both, needs="build", quiet=True),
        *_sanitizers(),
        Step("compiled", _python(*bench, "--compiled"), 240, needs="build"),
    ]


def _sanitizers() -> list[Step]:
    """compute-sanitizer's four tools over the kernels' driver, built with the real compiler."""
    driver = _ROOT / "build" / "driver"
    driver.parent.mkdir(exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    compile_driver = [
        _tool("nvcc"), "-std=c++17", "-O2", "-lineinfo", "-Icsrc",
        f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}",
        *(str(p) for kind in ("cu", "cpp") for p in (_ROOT / "csrc/cuda").glob(f"*.{kind}")),
        "tests/emulator/driver.cu",
        "-o", str(driver),
    ]  # fmt: skip
    tool = (_tool("compute-sanitizer"), "--error-exitcode", "9", "--tool")
    tools = [Step(name, (*tool, name, str(driver)), 100, needs="driver") for name in _TOOLS]
    kernels = Step("kernels", [str(driver), "3"], 30, needs="driver")
    return [Step("driver", compile_driver, 150), kernels, *tools]


def _tool(name: str) -> str:
    return shutil.which(name) or f"/usr/local/cuda/bin/{name}"


def _python(*module: str) -> list[str]:
    return [sys.executable, "-m", *module]


def _pytest(*arguments: str) -> list[str]:
    """A line for each test, so that the log names the one that hangs."""
    limit = ()
    if importlib.util.find_spec("pytest_timeout") is not None:
        # A signal cannot interrupt a synchronisation that blocks; a thread ends the process.
        limit = ("--timeout-method=thread",)
    return _python(
        "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--durations=10", *limit, *arguments
    )


if __name__ == "__main__":
    sys.exit(main())
