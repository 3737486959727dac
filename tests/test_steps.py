"""Steps: what each leaves behind, however it ends. None of them needs more than a shell."""

import json
import os
import sys
from pathlib import Path

import pytest

from bench import json_file
from tests import steps
from tests.steps import Step


def _sh(name: str, script: str, seconds: float = 60) -> Step:
    return Step(name, ["sh", "-c", script], seconds)


def _outcomes(folder: Path) -> dict[str, str]:
    return {n: own["outcome"] for n, own in json.loads((folder / "steps.json").read_text()).items()}


def test_one_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    missing = Step("missing", ["/nowhere/program"], 60)
    assert not steps.run([_sh("bad", "echo one; exit 3"), missing, _sh("good", "echo two")], folder)
    assert _outcomes(folder) == {"bad": "failed (3)", "missing": "failed", "good": "ok"}
    log = (folder / "log.txt").read_text()
    assert log.index("one\n") < log.index("No such file") < log.index("two\n")
    assert steps.run([_sh("bad", "exit 0")], folder)  # again, into the same folder
    assert _outcomes(folder) == {"missing": "failed", "good": "ok", "bad": "ok"}


def test_one_that_hangs_says_where_and_costs_itself_alone(tmp_path: Path) -> None:
    script = "import time\ndef hanging(): time.sleep(1000)\nprint('before')\nhanging()"
    stuck = Step("stuck", [sys.executable, "-S", "-c", script], 3)
    assert not steps.run([stuck, _sh("next", "echo after")], tmp_path)
    assert _outcomes(tmp_path) == {"stuck": "timed out", "next": "ok"}
    log = (tmp_path / "log.txt").read_text()
    assert log.index("before\n") < log.index("in hanging") < log.index("after\n")


def test_the_children_of_one_that_hangs_end_with_it(tmp_path: Path) -> None:
    """SIGABRT is not heard: it is killed."""
    script = "trap '' ABRT; sleep 1000 & echo child $!; wait; sleep 1000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_GRACE", 0.2)
        steps.run([_sh("stuck", script, seconds=2)], tmp_path)
    line = next(t for t in (tmp_path / "log.txt").read_text().splitlines() if t.startswith("child"))
    status = Path(f"/proc/{line.split()[1]}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_while_one_runs_the_folder_says_so(tmp_path: Path) -> None:
    """Whoever kills all of it finds what was running and what it printed."""
    copy = tmp_path / "then"
    steps.run(
        [_sh("first", "echo one"), _sh("now", f"cp -r {tmp_path}/in {copy}")], tmp_path / "in"
    )
    assert _outcomes(copy) == {"first": "ok", "now": "running"}
    assert "one\n" in (copy / "log.txt").read_text()


def test_what_is_left_of_the_time_is_shared(tmp_path: Path) -> None:
    assert not steps.run([_sh("a", "exit 0"), _sh("b", "exit 0")], tmp_path, within=0.0)
    assert _outcomes(tmp_path) == {"a": "left out", "b": "left out"}
    assert steps.run([_sh("a", "exit 0", seconds=1000)], tmp_path, within=30.0)
    assert json.loads((tmp_path / "steps.json").read_text())["a"]["limit"] <= 30.0
    assert "ok" in steps.summary(tmp_path) and "left out" in steps.summary(tmp_path)


def test_a_quiet_step_shows_its_last_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "for i in $(seq 100); do echo line $i; done"
    steps.run([Step("quiet", ["sh", "-c", script], 60, quiet=True)], tmp_path)
    shown = capfd.readouterr().out
    assert "line 100\n" in shown and "line 50\n" not in shown
    assert "line 50\n" in (tmp_path / "log.txt").read_text()


def test_a_step_has_its_variables(tmp_path: Path) -> None:
    steps.run([Step("v", ["sh", "-c", "echo $MINE"], 60, {"MINE": "yes"})], tmp_path)
    assert "\nyes\n" in (tmp_path / "log.txt").read_text()


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    json_file.write_whole({"n": 1}, file)

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        json_file.write_whole({"n": 2}, file)
    assert json.loads(file.read_text()) == {"n": 1}
