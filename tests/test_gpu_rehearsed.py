"""``make gpu`` without a GPU: its own steps, over the emulator, on a GPU that is made up.

What of them needs a device is left out; one step fails and one hangs. Afterwards the folder holds
all that came before, each row of it.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import on_gpu
from tests.emulator import build
from tests.steps import Step

pytestmark = pytest.mark.timeout(600)

_NAME = "Pretended H100 80GB"
_FILE = f"pretended-h100-80gb-torch{torch.__version__.partition('+')[0]}.json"
_TEN_MINUTES = 600
_all_steps = on_gpu.all_steps


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: _NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def _rehearsed(folder: Path, variables: dict[str, str]) -> list[Step]:
    """The real steps that can run; the build fails, and one more hangs before the sweep."""
    real = {step.name: step for step in _all_steps(folder)}

    def emulated(name: str, *options: str) -> Step:
        python, _, *module = real[name].command
        command = (python, "-m", "tests.rehearsal", *module, *options)
        return Step(name, command, 300, variables, needs=real[name].needs)

    short = ("--seconds", "0", "--yardstick-bytes", "4096")

    hanging = "import time\nprint('one figure')\ntime.sleep(1000)"
    return [
        Step("build", ["sh", "-c", "echo no compiler; exit 1"], 60),
        emulated("check", "--elements", "640", "--tensors", "20"),
        emulated("benchmark", *short),
        Step("hangs", [sys.executable, "-S", "-c", hanging], 3),
        emulated("sweep", *short),
    ]


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    return build.environment(build.build(), FUSEDCLIP_EMULATOR_SEED="1")


@pytest.mark.usefixtures("gpu")
def test_the_folder_holds_all_that_came_before(
    tmp_path: Path,
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(on_gpu, "all_steps", functools.partial(_rehearsed, variables=variables))
    folder = tmp_path / "results"
    assert on_gpu.main(["--results", str(folder)]) == 1
    log, shown = (folder / "log.txt").read_text(), capfd.readouterr().out
    ended = {n: s["outcome"] for n, s in json.loads((folder / "steps.json").read_text()).items()}
    assert ended == {
        "build": "failed (1)", "check": "failed (1)", "benchmark": "ok", "hangs": "timed out",
        "sweep": "ok",
    }, log  # fmt: skip
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        ["log.txt", "steps.json", "sweep.json", _FILE]
    )

    # The check: the emulated kernels are right, and it says that Triton has not run.
    assert "no compiler\n" in log and "ok   cuda, 20 tensors, order inf, clipped\n" in log
    (failed,) = [line for line in log.splitlines() if line.startswith("FAIL")]
    assert failed.startswith("FAIL triton: ")
    assert "one figure\n" in log

    _check_the_benchmark(json.loads((folder / _FILE).read_text()), log)
    _check_the_sweep(json.loads((folder / "sweep.json").read_text()), log)
    assert "ResNet-50, 84 B, clipped" in shown and "best:" in shown and "s of  300  sweep" in shown


def _check_the_benchmark(result: dict[str, Any], log: str) -> None:
    where = result["environment"]
    assert (where["device"], where["backend"]) == (_NAME, "cuda")
    assert where["gpu"]["multiprocessors"] == 4 and where["gpu"]["architectures"] == ["emulated"]
    assert where["clocks"] == {} or "sm_mhz" in where["clocks"]
    assert set(result["yardsticks"]) == {"read", "copy"}
    assert [(r["workload"], r["case"]) for r in result["results"]] == [
        (w, c)
        for w in ("ResNet-50", "mixed")
        for c in ("measure", "not clipped", "scale", "clipped")
    ]
    for row in result["results"]:
        names = {"torch", "fusedclip"}
        assert names <= set(row["timings"]) == set(row["ratios"]) == set(row["fractions"])
        assert row["ratios"]["torch"] == 1.0
        names = {"threads", "blocks", "chunk_bytes", "resident_bytes", "launches"}
        assert set(row["layout"]) == names
        assert f"{row['workload']}, " in log


def _check_the_sweep(result: dict[str, Any], log: str) -> None:
    rows = result["results"]
    assert {r["case"] for r in rows} == {"not clipped", "clipped"}
    assert len({r["layout"] for r in rows}) == len(rows) / 2 == 21
    assert all(row["device"] > 0 and row["layout"] in log for row in rows)


def _steps(names: str | tuple[str, ...] = (), folder: Path = Path("/tmp/x")) -> list[Step]:
    return on_gpu.choose(_all_steps(folder), (names,) if isinstance(names, str) else names)


@pytest.mark.usefixtures("gpu")
def test_the_figures_come_first_and_the_optional_column_last() -> None:
    names = [step.name for step in _steps()]
    assert names[:4] == ["build", "check", "benchmark", "sweep"]
    assert names[-1] == "compiled"
    assert names.index("common") < names.index("driver") < names.index("memcheck")
    assert set(names) == {"build"} | {n for group in on_gpu.GROUPS.values() for n in group}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("group", on_gpu.GROUPS)
def test_each_group_fits_ten_minutes(group: str) -> None:
    assert sum(step.seconds for step in _steps(group)) < _TEN_MINUTES


@pytest.mark.usefixtures("gpu")
def test_steps_bring_what_they_need() -> None:
    assert [s.name for s in _steps("sweep")] == ["build", "sweep"]
    assert [s.name for s in _steps(("sweep", "check"))] == ["build", "check", "sweep"]
    assert [s.name for s in _steps("memcheck")] == ["driver", "memcheck"]
    with pytest.raises(ValueError, match="got nonsense"):
        _steps(("build", "nonsense"))


@pytest.mark.usefixtures("gpu")
def test_pytest_is_limited_by_a_thread_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all("--timeout-method=thread" in s.command for s in _steps("tests")[1:])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pytest_timeout" else find(name)
    )
    assert not any("timeout" in part for s in _steps("tests") for part in s.command)


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert on_gpu.main(["--results", str(tmp_path / "new")]) == 1
    assert "sees no CUDA device" in capsys.readouterr().out


_BARE = """
import sys
class Without:
    def find_spec(self, name, *rest):
        if name in ("hypothesis", "pytest_timeout"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_tests_for_a_gpu_run_without_plugins() -> None:
    """No hypothesis, no pytest-timeout: one test says that it is left out, the others run."""
    files = ["tests/test_accuracy.py", "tests/test_gpu.py", "tests/test_distributed_gpu.py"]
    chosen = "random_lists or thousand or fsdp2"
    run = subprocess.run(
        [sys.executable, "-c", _BARE, "-q", "-rs", "-k", chosen, *files],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "hypothesis is not installed" in run.stdout and "needs a CUDA device" in run.stdout
