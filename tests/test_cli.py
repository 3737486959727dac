"""The command line, as a user runs it: doctor and demo."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedclip
from fusedclip import cli, doctor
from fusedclip.backends import native
from fusedclip.compare import Run, Settings, compare
from fusedclip.demo import training
from fusedclip.demo.language_model import LanguageModel, batches, standard_library_text
from tests import forked
from tests.helpers import interruptible


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.python("-m", "fusedclip", *arguments, env={**os.environ, **environment})


class TestDoctor:
    def test_says_what_runs_here_and_succeeds(self) -> None:
        """As a user starts it; the others are forks."""
        command = [sys.executable, "-m", "fusedclip", "doctor"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        for expected in (fusedclip.__version__, torch.__version__, native.module.cpu_isa()):
            assert expected in done.stdout
        for name, state in fusedclip.available_backends().items():
            assert any(
                line.split(maxsplit=1)[0] == name and state in line
                for line in done.stdout.splitlines()
                if line
            )
        assert "cpu         ok, self-test ok" in done.stdout

    @pytest.mark.parametrize(
        ("variable", "value", "complaint"),
        [
            ("FUSEDCLIP_BACKEND", "nope", "expected one of"),
            ("FUSEDCLIP_BACKEND", "triton", "cannot run here"),
            ("FUSEDCLIP_CPU_ISA", "sse9", "sse9"),
        ],
    )
    def test_a_bad_setting_is_reported(self, variable: str, value: str, complaint: str) -> None:
        done = run("doctor", **{variable: value})
        assert done.returncode == 1
        assert "What should work and does not" in done.stdout
        assert complaint in done.stdout

    def test_a_missing_native_module_is_a_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "module", None)
        monkeypatch.setattr(native, "problem", "no compiler")
        found = doctor.examine()
        assert found.problems == ["backend cpu: no compiler"]
        assert found.instruction_set == "none"
        assert "no compiler" in doctor.render(found)

    @pytest.mark.parametrize(
        ("mistake", "complaint"),
        [
            (lambda norm, grads: norm * 1.001, "expected a norm of"),
            (lambda norm, grads: grads[-1][-1].mul_(1.1) is None or norm, "scaled wrongly"),
            (lambda norm, grads: 1 / 0, "ZeroDivisionError"),
        ],
        ids=["norm", "scaling", "crash"],
    )
    def test_the_self_test_can_fail(
        self, monkeypatch: pytest.MonkeyPatch, mistake, complaint: str
    ) -> None:
        def broken(parameters, max_norm, **options):
            norm = fusedclip.clip_(parameters, max_norm, **options)
            return mistake(norm, [p.grad for p in parameters])

        monkeypatch.setattr(doctor, "clip_", broken)
        assert complaint in doctor.self_test("reference")
        found = doctor.examine()
        assert len(found.problems) == len(found.self_tests) >= 2

    def test_the_self_test_is_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A few calls on megabytes: about a second."""
        sizes = []

        def counted(parameters, max_norm, **options):
            sizes.append(sum(p.numel() for p in parameters))
            return fusedclip.clip_(parameters, max_norm, **options)

        monkeypatch.setattr(doctor, "clip_", counted)
        assert doctor.self_test("cpu") == doctor.self_test("reference") == "ok"
        assert len(sizes) <= 12 and sum(sizes) <= 5_000_000


class TestDemo:
    def test_three_arms_end_to_end(self, tmp_path: Path) -> None:
        done = run("demo", "--steps", "30", "--max-norm", "1", "--out", str(tmp_path / "new"))
        assert done.returncode == 0, done.stderr
        for arm in training.ARMS:
            assert arm in done.stdout
        assert "[Train Step 25] loss=" in done.stdout
        assert "steps clipped" in done.stdout
        picture = tmp_path / "new" / "demo.png"
        assert str(picture) in done.stdout
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_clipping_saves_the_run(self) -> None:
        """The claim of the picture, on a shortened run: NaN without clipping, learning with it."""
        found = compare(self.train, Settings(training.MAX_NORM, steps=80))
        control, clipped = found.arms
        assert control.diverged_at is not None
        assert clipped.diverged_at is None
        assert clipped.final_loss < 3.4 < clipped.losses[0]

    def test_the_arms_begin_alike(self) -> None:
        found = compare(self.train, Settings(training.MAX_NORM, steps=3), training.ARMS)
        control, theirs, ours = found.arms
        assert control.losses[0] == theirs.losses[0] == ours.losses[0]
        assert theirs.norms == pytest.approx(ours.norms, rel=1e-4)

    def train(self, run: Run) -> None:
        training.train(run, standard_library_text(), training.LR)

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
    def test_interrupted_it_shows_what_it_has(self, tmp_path: Path) -> None:
        with interruptible():
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "fusedclip", "demo", "--out", str(tmp_path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        assert process.stdout is not None
        for line in process.stdout:
            if "[Train Step 25]" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
        assert process.returncode == cli.INTERRUPTED, errors
        assert "no clipping" in rest and "Interrupted" in rest
        assert "Traceback" not in errors
        assert (tmp_path / "demo.png").exists()

    @pytest.mark.parametrize("missing", ["rich", "matplotlib"])
    def test_a_missing_extra_is_named(
        self, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, "fusedclip.compare.report", raising=False)
        if missing == "rich":
            monkeypatch.setitem(sys.modules, "rich.console", None)
        assert cli.main(["demo", "--steps", "1"]) == 1
        assert "pip install 'fusedclip[demo]'" in capsys.readouterr().out


def test_the_language_model_is_small_and_causal() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 500_000
    symbols, targets = next(batches(standard_library_text(), 0, torch.device("cpu")))
    assert torch.equal(symbols[:, 1:], targets[:, :-1])
    changed = symbols.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90
    with torch.no_grad():
        assert torch.allclose(model(symbols)[:, :-1], model(changed)[:, :-1], atol=1e-5)


def test_settings_of_the_command_line_are_those_of_the_demo() -> None:
    """argparse repeats the defaults so that --help shows them without importing torch."""
    done = run("demo", "--help").stdout.replace("\n", " ")
    defaults = Settings()
    for value in (training.LR, training.MAX_NORM, defaults.steps, defaults.device, defaults.seed):
        assert f"default: {value}" in done


@pytest.mark.parametrize("arguments", [(), ("nope",), ("demo", "--steps", "many")])
def test_bad_usage(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: fusedclip" in done.stderr
