"""``fusedclip run``: scripts, modules, commands, their children and torchrun's workers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusedclip
from fusedclip.launcher.command import STARTUP, Options, exports
from tests import forked
from tests.helpers import interruptible

# Takes torch's function by name, clips (30, 40) at 1 and says who did it and what is left.
SCRIPT = """
import sys
import torch
from torch.nn.utils import clip_grad_norm_

p = torch.nn.Parameter(torch.zeros(2))
p.grad = torch.tensor([30.0, 40.0])
clip_grad_norm_([p], 1.0)
print(clip_grad_norm_.__module__, round(p.grad.norm().item(), 3), *sys.argv[1:])
"""


def _environment(**extra: str) -> dict[str, str]:
    """Without what another run may have left; fusedclip from wherever the tests have it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDCLIP_")}
    kept.pop("PYTHONPATH", None)
    return {**kept, **extra}


def _run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fork reads the command line and becomes the command, which is a process as a user's."""
    words = ("-m", "fusedclip", "run", *arguments)
    return forked.python(*words, cwd=cwd, env=_environment(**environment))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = tmp_path / "train-console"
    command.write_text(f"#!{sys.executable}\n{SCRIPT}")
    command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("--", "train.py", "--lr", "1"),
        ("train.py", "--lr", "1"),
        ("--", "-m", "train", "--lr", "1"),
        ("--", "train-console", "--lr", "1"),
        ("--", "sh", "-c", f"{sys.executable} train.py --lr 1"),
    ],
    ids=["script", "without --", "module", "console", "child"],
)
def test_the_command_clips_with_fusedclip(folder: Path, command: tuple[str, ...]) -> None:
    done = _run(*command, cwd=folder, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fusedclip.functional", "1.0", "--lr", "1"]
    assert "Warning" not in done.stderr


def test_without_it_the_same_script_clips_with_torch(folder: Path) -> None:
    """What the tests above see is the command's doing."""
    plain = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder, env=_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert plain.stdout.split() == ["torch.nn.utils.clip_grad", "1.0"]


@pytest.mark.parametrize("first", ["import fusedclip", "from fusedclip.functional import clip_"])
def test_a_script_that_imports_fusedclip_first(folder: Path, first: str) -> None:
    (folder / "train.py").write_text(first + SCRIPT)
    done = _run("--", "train.py", cwd=folder)
    assert done.stdout.split() == ["fusedclip.functional", "1.0"], done.stderr


def test_a_look_for_torch_before_its_import(folder: Path) -> None:
    """Libraries ask for the spec first, to see whether torch is there."""
    looks = "import importlib.util; assert importlib.util.find_spec('torch')\n"
    (folder / "train.py").write_text(looks + SCRIPT)
    done = _run("--", "train.py", cwd=folder)
    assert done.stdout.split() == ["fusedclip.functional", "1.0"], done.stderr


def test_spawned_workers_are_patched(folder: Path) -> None:
    (folder / "train.py").write_text(
        "import multiprocessing, runpy\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    worker = context.Process(target=runpy.run_path, args=('work.py',))\n"
        "    worker.start(); worker.join(); raise SystemExit(worker.exitcode)\n"
    )
    (folder / "work.py").write_text(SCRIPT)
    done = _run("--", "train.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["fusedclip.functional", "1.0"]


def test_torchrun_workers_are_patched(folder: Path) -> None:
    """Each says so in a file: their output may run into one line."""
    (folder / "train.py").write_text(
        "import os, sys\nsys.stdout = open(os.environ['RANK'], 'w')\n"
        "import torch.distributed\ntorch.distributed.init_process_group('gloo')\n"
        + SCRIPT
        + "torch.distributed.destroy_process_group()\n"
    )
    torchrun = Path(sys.executable).with_name("torchrun")
    done = _run(
        "--max-norm", "0.5", "--", torchrun, "--standalone", "--nproc-per-node=2", "train.py",
        cwd=folder, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert (folder / rank).read_text().split() == ["fusedclip.functional", "0.5"]


class TestMaxNorm:
    def test_takes_the_place_of_the_frameworks_threshold(self, folder: Path) -> None:
        done = _run("--max-norm", "0.5", "--", "train.py", cwd=folder)
        assert done.stdout.split() == ["fusedclip.functional", "0.5"], done.stderr

    def test_a_measure_stays_a_measure(self, folder: Path) -> None:
        (folder / "train.py").write_text(SCRIPT.replace("[p], 1.0", "[p], float('inf')"))
        done = _run("--max-norm", "0.5", "--", "train.py", cwd=folder)
        assert done.stdout.split() == ["fusedclip.functional", "50.0"], done.stderr

    @pytest.mark.parametrize("bad", ["-1", "nan", "much"])
    def test_no_threshold_is_an_error(self, folder: Path, bad: str) -> None:
        done = _run(f"--max-norm={bad}", "--", "train.py", cwd=folder)
        assert done.returncode == 2
        assert f"expected a threshold >= 0, got {bad!r}" in done.stderr
        assert done.stdout == ""

    @pytest.fixture
    def parameter(self) -> Iterator[torch.nn.Parameter]:
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([30.0, 40.0])
        yield p
        fusedclip.unpatch()

    def test_in_process(self, parameter: torch.nn.Parameter) -> None:
        with fusedclip.patch(max_norm=5.0):
            with fusedclip.patch():  # a framework's integration may patch again
                norm = torch.nn.utils.clip_grad_norm_([parameter], "1.0")
            assert norm == 50
            assert parameter.grad.norm().item() == pytest.approx(5.0)
            torch.nn.utils.clip_grads_with_norm_([parameter], 100.0, torch.tensor(50.0))
            assert parameter.grad.norm().item() == pytest.approx(0.5)
            with pytest.raises(ValueError, match=r"patched with max_norm=5\.0, got 2"):
                fusedclip.patch(max_norm=2)
        assert torch.nn.utils.clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"
        with fusedclip.patch():
            assert torch.nn.utils.clip_grad_norm_ is fusedclip.clip_grad_norm_
            with pytest.raises(ValueError, match="patched with max_norm=None"):
                fusedclip.patch(max_norm=2)
        with pytest.raises(ValueError, match="expected a threshold >= 0, got -1"):
            fusedclip.patch(max_norm=-1)
        assert torch.nn.utils.clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"


SPIKE = """
import torch
p = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([p], lr=0.5, fused={fused})
for step in range(4):
    p.grad = torch.full((2,), 1e6 if step == 2 else 1.0)
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    before = p.detach().clone()
    optimizer.step()
    print(int(torch.equal(before, p)), end=" ")
"""


class TestSkipAbove:
    @pytest.mark.parametrize("fused", [False, True])
    def test_the_step_is_left_out_and_counted(self, folder: Path, fused: bool) -> None:
        (folder / "train.py").write_text(SPIKE.format(fused=fused))
        done = _run("--skip-above", "100", "--monitor", "--", "train.py", cwd=folder)
        assert done.stdout.split() == ["0", "0", "1", "0"], done.stderr
        assert "left out   1 steps" in done.stderr
        done = _run("--", "train.py", cwd=folder)
        assert done.stdout.split() == ["0"] * 4  # the twin

    def test_no_threshold_is_an_error(self, folder: Path) -> None:
        done = _run("--skip-above=much", "--", "train.py", cwd=folder)
        assert done.returncode == 2
        assert "skip_above: expected a threshold >= 0, got 'much'" in done.stderr


class TestMonitor:
    def test_says_what_it_saw_and_names_the_layer(self, folder: Path) -> None:
        (folder / "train.py").write_text(
            "import torch\n"
            "def train():\n"
            "    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))\n"
            "    torch.nn.init.constant_(model[0].weight, 1)\n"
            "    torch.nn.init.constant_(model[1].weight, 10)\n"
            "    for scale in (1.0, 1000.0):\n"
            "        model.zero_grad()\n"
            "        model(torch.full((2, 4), scale)).sum().backward()\n"
            "        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.5)\n"
            "train()\n"
        )
        done = _run("--monitor", "--", "train.py", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, "Warning" in done.stderr) == ("", False)
        assert "gradient clipping, 4 tensors of Sequential: 2 steps, max_norm 2.5" in done.stderr
        assert "step 1, its largest parts:\n    0.weight" in done.stderr
        assert "2 steps are too few to judge" in done.stderr

    def test_several_models_are_told_apart(self, folder: Path) -> None:
        (folder / "train.py").write_text(
            "import torch\n"
            "for size in (2, 3):\n"
            "    p = torch.nn.Parameter(torch.zeros(size)); p.grad = torch.ones(size)\n"
            "    torch.nn.utils.clip_grad_norm_([p], 1.0)\n"
            "norm = torch.nn.utils.get_total_norm([p.grad])\n"
            "torch.nn.utils.clip_grads_with_norm_([p], 0.5, norm)\n"
        )
        done = _run("--monitor", "--", "train.py", cwd=folder)
        assert done.stderr.count("gradient clipping, 1 tensor: ") == 2
        assert "1 steps, max_norm 1" in done.stderr
        assert "2 steps, max_norm 0.5" in done.stderr

    def test_is_silent_where_nothing_was_clipped(self, folder: Path) -> None:
        (folder / "train.py").write_text("import torch\n")
        done = _run("--monitor", "--", "train.py", cwd=folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_speaks_for_rank_0_alone(self, folder: Path) -> None:
        torchrun = Path(sys.executable).with_name("torchrun")
        done = _run(
            "--monitor", "--", torchrun, "--standalone", "--nproc-per-node=2", "train.py",
            cwd=folder, OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("gradient clipping, 1 tensor") == 1


class TestLeavesAlone:
    def test_python_without_site(self, folder: Path) -> None:
        packages = f"import sys; sys.path += {[p for p in sys.path if p]!r}\n"
        (folder / "train.py").write_text(packages + SCRIPT)
        done = _run("--", sys.executable, "-S", "train.py", cwd=folder)
        assert done.stdout.split() == ["torch.nn.utils.clip_grad", "1.0"], done.stderr

    def test_a_child_that_switches_it_off(self, folder: Path) -> None:
        child = f"FUSEDCLIP_PATCH=0 {sys.executable} train.py"
        done = _run("--", "sh", "-c", child, cwd=folder)
        assert done.stdout.split() == ["torch.nn.utils.clip_grad", "1.0"], done.stderr

    def test_a_process_without_torch(self, folder: Path) -> None:
        """Neither torch nor fusedclip is imported for it, and a missing torch stays missing."""
        (folder / "train.py").write_text(
            "import sys\n"
            "assert not {'torch', 'fusedclip', 'numpy'} & set(sys.modules), sys.modules\n"
            "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
            "try:\n    import torch\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        )
        done = _run("--", sys.executable, "train.py", cwd=folder)
        assert done.stdout == "No module named 'torch'\n", done.stderr

    def test_a_python_without_fusedclip_says_so_and_clips_with_torch(self, folder: Path) -> None:
        hidden = "import sys; sys.modules['fusedclip.launcher.command'] = None\n"
        (folder / "train.py").write_text(hidden + SCRIPT)
        done = _run("--", "train.py", cwd=folder)
        assert done.stdout.split() == ["torch.nn.utils.clip_grad", "1.0"]
        assert "cannot import fusedclip" in done.stderr
        assert "torch's own clip is in use" in done.stderr

    def test_the_users_sitecustomize_still_runs(self, folder: Path) -> None:
        own = folder / "own"
        own.mkdir()
        (own / "sitecustomize.py").write_text("import builtins; builtins.mine = 'theirs'\n")
        check = "import sitecustomize; print(mine, sitecustomize.__file__)\n"
        (folder / "train.py").write_text(check + SCRIPT)
        done = _run("--", "train.py", cwd=folder, PYTHONPATH=str(own))
        said = ["theirs", str(own / "sitecustomize.py"), "fusedclip.functional", "1.0"]
        assert done.stdout.split() == said, done.stderr


class TestStatus:
    def test_of_the_command(self, folder: Path) -> None:
        (folder / "train.py").write_text("raise SystemExit(7)\n")
        assert _run("--", "train.py", cwd=folder).returncode == 7

    def test_of_a_missing_command(self, folder: Path) -> None:
        done = _run("--", "no-such-command", cwd=folder)
        assert done.returncode == 127
        assert "no-such-command: no such command on PATH" in done.stderr

    def test_of_a_file_that_cannot_be_executed(self, folder: Path) -> None:
        (folder / "job").write_text("echo no first line\n")
        (folder / "job").chmod(0o755)
        done = _run("--", "./job", cwd=folder)
        assert done.returncode == 126
        assert "job: Exec format error" in done.stderr

    def test_of_no_command(self, folder: Path) -> None:
        done = _run("--max-norm", "1", cwd=folder)
        assert done.returncode == 2
        assert "no COMMAND given" in done.stderr

    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 5)]
    )
    def test_of_a_signal(self, folder: Path, number: int, status: int) -> None:
        """Ctrl-C reaches the training, which may save its state and choose its own status."""
        (folder / "train.py").write_text(
            "import time\n"
            "try:\n    print('ready', flush=True); time.sleep(60)\n"
            "except KeyboardInterrupt:\n    raise SystemExit(5)\n"
        )
        with interruptible():
            process = subprocess.Popen(
                [sys.executable, "-m", "fusedclip", "run", "--", "train.py"],
                cwd=folder, env=_environment(), stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert process.stdout is not None
        with process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.wait() == status


def test_env_does_the_same_from_a_shell(folder: Path) -> None:
    lines = _run("--max-norm", "0.5", "--env", cwd=folder).stdout
    done = subprocess.run(
        ["sh", "-c", f"{lines}\n{sys.executable} train.py"],
        cwd=folder, env=_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["fusedclip.functional", "0.5"]


def test_env_twice_names_the_folder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{STARTUP}{os.pathsep}/elsewhere")
    assert exports(Options()).count(str(STARTUP)) == 1
    assert exports(Options()).count("/elsewhere") == 1


@pytest.mark.parametrize("package", ["deepspeed", "megatron"])
def test_a_framework_that_is_not_as_known_is_left_alone(folder: Path, package: str) -> None:
    """The twin of tests/integrations/test_deepspeed.py::test_run_patches_deepspeed."""
    inner = folder / "deepspeed" if package == "deepspeed" else folder / "megatron" / "core"
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text("clips = 'by itself'\n")
    name = "deepspeed" if package == "deepspeed" else "megatron.core"
    (folder / "train.py").write_text(
        f"import importlib.util, sys\n"
        f"assert importlib.util.find_spec({name!r}) is not None\n"  # only asked for
        f"print({name!r} in sys.modules)\n"
        f"import torch, {name} as framework\n"
        f"print(framework.clips)\n{SCRIPT}"
    )
    done = _run("--", "train.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "by", "itself", "fusedclip.functional", "1.0"]
    assert f"nothing was patched, this {package} of unknown version clips by itself" in done.stderr
