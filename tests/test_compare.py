"""The control experiment: what a training function is given, when an arm ends, what is shown."""

import io
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from rich.console import Console
from torch import nn

import fusedclip
from fusedclip import cli
from fusedclip.compare import (
    ARMS,
    Comparison,
    Finished,
    History,
    Run,
    Settings,
    compare,
    load_function,
    report,
)
from fusedclip.compare.history import apart_at
from tests import forked


def quadratic(run: Run, *, lr: float = 0.1) -> None:
    """The loss |w|² / 2 from w = (3, 4): its gradient is w, of norm 5."""
    model = nn.Linear(2, 1, bias=False).to(run.device)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in run:
        loss = model.weight.square().sum() / 2
        loss.backward()
        run.clip_(model)
        optimizer.step()
        optimizer.zero_grad()
        run.report(loss, lr=lr)


def exploding(run: Run) -> None:
    """The loss exp(w²) from w = 2: without clipping the second is infinite.

    With max_norm = 1 w falls by 0.1 a step; the gradient is above 1 down to w = 0.5.
    """
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in run:
        loss = w.square().exp()
        loss.sum().backward()
        run.clip_([w])
        optimizer.step()
        optimizer.zero_grad()
        run.report(loss, lr=0.1)


def scripted(*losses: float, norm: float = 2.0) -> Callable[[Run], None]:
    """The control arm reports these losses, the other one half of them."""

    def train(run: Run) -> None:
        for step in run:
            scale = 1.0 if math.isinf(run.max_norm) or step == 0 else 0.5
            run.report(scale * losses[step], grad_norm=norm)

    return train


class TestArms:
    def test_one_clips_and_the_other_does_not(self) -> None:
        control, clipped = compare(quadratic, Settings(max_norm=1.0, steps=3)).arms
        assert (control.arm, clipped.arm) == ("no clipping", "fusedclip")
        assert (control.max_norm, clipped.max_norm) == (math.inf, 1.0)
        assert control.norms == pytest.approx([5.0, 4.5, 4.05])
        assert clipped.norms == pytest.approx([5.0, 4.9, 4.8], rel=1e-5)  # 0.1 · 1 less each
        assert control.losses[0] == clipped.losses[0] == 12.5
        assert (control.steps_clipped, clipped.steps_clipped) == (0, 3)
        assert control.rates == [0.1] * 3

    def test_any_functions_can_be_arms(self) -> None:
        arms = {"none": None, "torch": nn.utils.clip_grad_norm_, "ours": fusedclip.clip_}
        _, theirs, ours = compare(quadratic_with_list, Settings(steps=5), arms).arms
        assert theirs.losses == pytest.approx(ours.losses, rel=1e-6)

    def test_the_control_arm_comes_first(self) -> None:
        for arms in ({}, {"ours": fusedclip.clip_, "none": None}):
            with pytest.raises(ValueError, match=r"^arms: expected the control arm, None, first"):
                compare(quadratic, Settings(), arms)

    def test_an_arm_ends_after_its_steps(self) -> None:
        for history in compare(quadratic, Settings(steps=7)).arms:
            assert len(history.losses) == len(history.norms) == 7

    def test_an_arm_ends_at_the_first_loss_that_is_not_finite(self) -> None:
        control, clipped = compare(exploding, Settings(max_norm=1.0, steps=20)).arms
        assert control.diverged_at == 1 and len(control.losses) == 2
        assert clipped.diverged_at is None and len(clipped.losses) == 20

    def test_every_arm_begins_from_the_seed(self) -> None:
        def train(run: Run) -> None:
            for _ in run:
                drawn = random.random() + np.random.rand() + torch.rand(()).item()
                run.report(drawn, grad_norm=0.0)

        one, other = compare(train, Settings(steps=3, seed=5)).arms
        assert one.losses == other.losses
        assert compare(train, Settings(steps=3, seed=6)).arms[0].losses != one.losses

    def test_what_the_function_is_told(self) -> None:
        seen: list[tuple[object, ...]] = []

        def train(run: Run) -> None:
            seen.append((run.arm, run.max_norm, run.steps, run.seed, run.device))
            run.report(1.0, grad_norm=1.0)

        compare(train, Settings(max_norm=0.5, steps=9, seed=3))
        cpu = torch.device("cpu")
        assert seen == [("no clipping", math.inf, 9, 3, cpu), ("fusedclip", 0.5, 9, 3, cpu)]

    def test_after_each_step_somebody_may_look(self) -> None:
        seen: list[tuple[str, int]] = []
        compare(
            quadratic,
            Settings(steps=2),
            on_step=lambda history: seen.append((history.arm, len(history.losses))),
        )
        assert seen == [("no clipping", 1), ("no clipping", 2), ("fusedclip", 1), ("fusedclip", 2)]

    def test_interrupted_it_keeps_what_there_is(self) -> None:
        def train(run: Run) -> None:
            for step in run:
                if run.max_norm == 1.0 and step == 2:
                    raise KeyboardInterrupt
                run.report(1.0, grad_norm=1.0)

        found = compare(train, Settings(steps=4))
        assert found.interrupted
        assert [len(history.losses) for history in found.arms] == [4, 2]


def quadratic_with_list(run: Run) -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    for _ in run:
        w.grad = w.detach().clone()
        run.clip_([w])
        with torch.no_grad():
            w -= 0.1 * w.grad
        run.report(w.detach().square().sum())


class TestLoopsOfOthers:
    """A framework's loop does not ask whether to go on."""

    def test_it_is_stopped(self) -> None:
        calls = []

        def train(run: Run) -> None:
            while True:
                calls.append(run.arm)
                run.report(1.0, grad_norm=1.0)

        found = compare(train, Settings(steps=3))
        assert [len(history.losses) for history in found.arms] == [3, 3]
        assert len(calls) == 8  # the fourth report of each arm ends it

    def test_in_clip_too(self) -> None:
        history = History("x", 1.0, losses=[math.nan], norms=[1.0])
        run = Run(Settings(), history, fusedclip.clip_, lambda _: None)
        with pytest.raises(Finished, match="x: 1 steps were reported"):
            run.clip_([])

    def test_it_may_clip_by_itself(self) -> None:
        def train(run: Run) -> None:
            w = nn.Parameter(torch.tensor([3.0, 4.0]))
            for _ in run:
                w.grad = torch.tensor([3.0, 4.0])
                norm = nn.utils.clip_grad_norm_([w], run.max_norm)
                run.report(w.grad.norm(), grad_norm=norm)

        control, clipped = compare(train, Settings(steps=1)).arms
        assert (control.losses, control.norms) == ([5.0], [5.0])
        assert (clipped.losses, clipped.norms) == (pytest.approx([1.0]), [5.0])

    def test_several_networks_have_one_norm(self) -> None:
        """The largest, and NaN is larger than all."""
        a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

        def train(run: Run) -> None:
            for step in run:
                a.grad, b.grad = torch.tensor([2.0]), torch.tensor([3.0])
                if step == 1:
                    a.grad = torch.tensor([math.nan])
                run.clip_([b])
                run.clip_([a])
                run.report(1.0)

        norms = compare(train, Settings(steps=2)).arms[0].norms
        assert norms[0] == 3.0 and math.isnan(norms[1])


class TestMistakes:
    def test_a_step_without_a_norm(self) -> None:
        with pytest.raises(RuntimeError, match=r"without a gradient norm: call run\.clip_"):
            compare(lambda run: run.report(1.0), Settings())

    def test_the_norm_of_the_step_before_does_not_count(self) -> None:
        def train(run: Run) -> None:
            for step in run:
                if step == 0:
                    run.clip_([nn.Parameter(torch.zeros(1))])
                run.report(1.0)

        with pytest.raises(RuntimeError, match="without a gradient norm"):
            compare(train, Settings())

    def test_a_step_without_a_report(self) -> None:
        def train(run: Run) -> None:
            for _ in run:
                run.clip_([nn.Parameter(torch.zeros(1))])

        with pytest.raises(
            RuntimeError, match=r"step 0 of 'no clipping' ended without run\.report"
        ):
            compare(train, Settings())

    def test_no_step_at_all(self) -> None:
        with pytest.raises(RuntimeError, match=r"^no clipping: .* never called run\.report\(\)"):
            compare(lambda run: None, Settings())

    @pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
    def test_a_threshold_that_is_none(self, max_norm: float) -> None:
        with pytest.raises(ValueError, match=r"^max_norm: expected a number > 0 and < inf, got"):
            Settings(max_norm=max_norm)

    def test_too_few_steps(self) -> None:
        with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0"):
            Settings(steps=0)

    def test_errors_of_the_function_are_its_own(self) -> None:
        def train(run: Run) -> None:
            raise ZeroDivisionError("mine")

        with pytest.raises(ZeroDivisionError, match="mine"):
            compare(train, Settings())


class TestHistory:
    def make(self, *losses: float, max_norm: float = 1.0) -> History:
        return History("x", max_norm, list(losses), [0.5, 1.0, 2.0, math.nan])

    def test_figures(self) -> None:
        history = self.make(3.0, 2.0, 4.5, 1.0)
        assert history.worst_spike == 2.5
        assert history.final_loss == pytest.approx(10.5 / 4)
        assert history.diverged_at is None
        assert history.steps_clipped == 2  # NaN is above every threshold, 1.0 is not above 1.0

    def test_the_final_loss_is_of_the_last_20_steps(self) -> None:
        assert self.make(100.0, *[1.0] * 20).final_loss == 1.0
        assert self.make(100.0, *[1.0] * 19).final_loss == pytest.approx(119 / 20)

    def test_divergence(self) -> None:
        history = self.make(3.0, math.inf)
        assert history.diverged_at == 1
        assert history.worst_spike == 0.0

    def test_nothing_is_clipped_in_the_control_arm(self) -> None:
        assert self.make(1.0, max_norm=math.inf).steps_clipped == 0


losses = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf]), max_size=20)


@given(losses, losses)
def test_apart_at(one: list[float], other: list[float]) -> None:
    step = apart_at(one, other)
    assert apart_at(other, one) == step
    assert apart_at(one, one) is None
    both = list(zip(one, other, strict=False))
    for a, b in both if step is None else both[:step]:
        assert (
            a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-3 * max(abs(a), abs(b))
        )
    if step is not None:
        a, b = both[step]
        assert not abs(a - b) <= 1e-3 * max(abs(a), abs(b)) or math.isinf(a) or math.isinf(b)


def test_apart_at_the_first_step_that_differs() -> None:
    assert apart_at([1.0, 4.0, 2.0], [1.0005, 3.0, 3.0, 9.0]) == 1


class TestVerdict:
    def of(self, train: Callable[[Run], None], steps: int = 3, max_norm: float = 1.0) -> str:
        return compare(train, Settings(max_norm=max_norm, steps=steps)).verdict()

    def test_only_clipping_saves_it(self) -> None:
        verdict = self.of(exploding, steps=20)
        assert verdict.startswith("Without clipping the loss is NaN or infinite at step 1; with it")

    def test_clipping_does_not_save_it(self) -> None:
        verdict = self.of(scripted(1.0, 2.0, math.nan))
        assert "With max_norm=1 the loss is NaN or infinite at step 2" in verdict

    def test_it_never_bites(self) -> None:
        verdict = self.of(scripted(1.0, 1.0, 1.0, norm=0.25))
        assert verdict == (
            "No norm was above max_norm=1, the largest was 0.25: clipping changed nothing."
        )
        assert "clipping changed nothing" not in self.of(scripted(1.0, 1.0, 1.0, norm=1.1))

    def test_both_finish(self) -> None:
        verdict = self.of(scripted(4.0, 4.0, 4.0))
        assert verdict == (
            "3 of 3 steps were clipped; the final loss is 4 without and 2.667 with clipping."
        )

    def test_two_different_runs(self) -> None:
        """A seed of one's own that is not the run's."""
        start = iter([1.0, 1.0001])

        def train(run: Run) -> None:
            run.report(next(start), grad_norm=2.0)

        found = compare(train, Settings())
        assert not found.begin_alike
        assert "do not begin with the same loss" in found.verdict()
        assert "seed whatever is random with run.seed" in found.verdict()

    def test_noise_of_the_device_is_not_a_different_run(self) -> None:
        start = iter([1.0, 1.000001, math.nan, math.nan])
        train = lambda run: run.report(next(start), grad_norm=2.0)  # noqa: E731
        assert compare(train, Settings()).begin_alike
        assert compare(train, Settings()).begin_alike

    def test_one_arm_alone(self) -> None:
        found = Comparison(Settings(), [History("no clipping", math.inf, [1.0], [1.0])], True)
        assert "only one arm has run" in found.verdict()


def shown(found: Comparison) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table(found, "title"))
    return console.export_text()


class TestTable:
    def test_rows(self) -> None:
        text = shown(compare(exploding, Settings(steps=20)))
        control = next(line for line in text.splitlines() if "no clipping" in line)
        clipped = next(line for line in text.splitlines() if "fusedclip" in line)
        assert "inf at step 1" in control and control.count(" - ") == 3
        assert "16 of 20" in clipped and "µs" in clipped
        assert "title, max_norm=1" in text

    def test_a_median_and_not_a_mean(self) -> None:
        history = History("torch", 1.0, [1.0] * 3, [2.0] * 3, clip_seconds=[4e-6, 5e-6, 9.0])
        control = History("no clipping", math.inf, [1.0] * 3, [2.0] * 3, clip_seconds=[1.0] * 3)
        assert "5 µs" in shown(Comparison(Settings(), [control, history], False))

    def test_a_loop_that_clips_by_itself_has_no_times(self) -> None:
        history = History("torch", 1.0, [1.0], [2.0])
        text = shown(Comparison(Settings(), [history], False))
        assert "µs" not in text and "nan" not in text

    @pytest.mark.parametrize(
        ("losses", "said"),
        [([3.0, 2.0, 1.0], "at all steps."), ([3.0, 2.0, 1.1], "up to step 2. ")],
    )
    def test_where_the_clipping_arms_part(self, losses: list[float], said: str) -> None:
        arms = [
            History("no clipping", math.inf, [3.0, 9.0, 9.0]),
            History("torch", 1.0, [3.0, 2.0, 1.0]),
            History("fusedclip", 1.0, losses),
        ]
        line = report.parting(Comparison(Settings(), arms, False))
        assert line.startswith(f"The losses of 'torch' and 'fusedclip' are the same to 0.1% {said}")

    def test_advice_is_that_of_a_monitor(self) -> None:
        history = History("x", 1.0, norms=[0.2] * 30)
        assert [f.rule for f in report.advice(history).findings] == ["idle"]
        history.norms[-1] = 0.4
        assert not report.advice(history).findings


class TestPicture:
    def lines(self, found: Comparison) -> dict[str, tuple[list[float], list[float]]]:
        """By colour what is drawn: losses and norms."""
        top, bottom = report.plot(found, "title").axes
        drawn = {to_hex(line.get_color()): list(line.get_ydata()) for line in top.lines}
        norms = {to_hex(line.get_color()): list(line.get_ydata()) for line in bottom.lines}
        assert norms.pop(to_hex("black")) == [found.settings.max_norm] * 2  # the threshold
        assert drawn.keys() == norms.keys()
        return {color: (drawn[color], norms[color]) for color in drawn}

    def test_every_arm_is_a_line_of_its_own_colour(self) -> None:
        arms = {"none": None, "torch": nn.utils.clip_grad_norm_, "ours": fusedclip.clip_}
        found = compare(quadratic_with_list, Settings(max_norm=2.0, steps=5), arms)
        lines = self.lines(found)
        assert list(lines) == [to_hex(c) for c in ("tab:red", "tab:blue", "tab:green")]
        for history, (drawn, norms) in zip(found.arms, lines.values(), strict=True):
            assert (drawn, norms) == (history.losses, history.norms)

    def test_two_arms_are_red_and_green(self) -> None:
        lines = self.lines(compare(quadratic, Settings(steps=5)))
        assert list(lines) == [to_hex("tab:red"), to_hex("tab:green")]

    def test_where_an_arm_diverges_is_written(self) -> None:
        top, _ = report.plot(compare(exploding, Settings(steps=20))).axes
        assert [text.get_text() for text in top.texts] == ["no clipping: inf at step 1"]

    def test_an_arm_that_diverges_does_not_flatten_the_others(self) -> None:
        control = History("no clipping", math.inf, [2.0, 1e9, math.nan], [3.0, 1e9, math.nan])
        clipped = History("fusedclip", 1.0, [2.0, 1.0, 1.0], [3.0, 1.0, 1.0])
        top, bottom = report.plot(Comparison(Settings(), [control, clipped], False)).axes
        assert top.get_ylim() == pytest.approx((0.9, 1.35 * 2.0))
        assert bottom.get_ylim() == pytest.approx((0.5, 8 * 3.0))
        assert bottom.get_yscale() == "log"

    def test_otherwise_the_axes_hold_every_value(self) -> None:
        found = compare(quadratic, Settings(steps=30))
        for axes in report.plot(found).axes:
            low, high = axes.get_ylim()
            for line in axes.lines[:2]:
                assert low < min(line.get_ydata()) and max(line.get_ydata()) < high

    def test_the_pixels_show_them(self) -> None:
        """The line of the arm that stays, and the red one that leaves."""
        figure = report.plot(compare(exploding, Settings(steps=20)))
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)

        def count(color: str) -> int:
            wanted = np.array([int(to_hex(color)[i : i + 2], 16) for i in (1, 3, 5)])
            return int((np.abs(pixels - wanted).sum(axis=2) < 30).sum())

        assert count("tab:green") > 500
        assert count("tab:red") > 100
        assert count("tab:blue") == 0  # the twin: what is not drawn is not found

    def test_nothing_finite_at_all(self) -> None:
        history = History("torch", 1.0, [math.nan], [math.nan])
        report.plot(Comparison(Settings(), [history], False)).canvas.draw()


class TestReport:
    def run(self, tmp_path: Path, train: Callable[[Run], None], steps: int) -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        report.run(train, Settings(steps=steps), tmp_path / "new", console, title="mine")
        return console.export_text()

    def test_how_long_it_will_take(self, tmp_path: Path) -> None:
        text = self.run(tmp_path, scripted(*[4.0] * 30), 30)
        assert text.count("2 arms of 30 steps, one after the other: at most about") == 1
        assert "at most about" not in self.run(tmp_path, scripted(*[4.0] * 4), 4)

    def test_everything_is_written(self, tmp_path: Path) -> None:
        text = self.run(tmp_path, exploding, 30)
        assert "no clipping [Train Step 0] loss=54.60, grad_norm=218.39, lr=0.1" in text
        assert "no clipping [Train Step 1] loss=inf" in text  # the last one is always shown
        assert "fusedclip   [Train Step 25]" in text
        assert "Without clipping the loss is NaN or infinite at step 1" in text
        assert "17 of 30 steps were above 0.9 × max_norm" in text  # a Monitor's advice
        picture, figures = (tmp_path / "new" / f"compare.{x}" for x in ("png", "json"))
        assert str(picture) in text and str(figures) in text
        assert picture.read_bytes().startswith(b"\x89PNG")

        saved = json.loads(figures.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
        assert (saved["max_norm"], saved["steps"], saved["seed"]) == (1.0, 30, 0)
        assert saved["begin_alike"] and not saved["interrupted"]
        control, clipped = saved["arms"]
        assert control["max_norm"] is None and control["diverged_at"] == 1
        assert control["losses"] == [pytest.approx(54.598, rel=1e-4), None]
        assert clipped["steps_clipped"] == 16 and len(clipped["losses"]) == 30
        assert clipped["rates"] == [0.1] * 30


TRAINING = """
import torch
from torch import nn

def main(run):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in run:
        loss = model(torch.ones(8, 4)).square().mean()
        loss.backward()
        run.clip_(model)
        optimizer.step()
        optimizer.zero_grad()
        run.report(loss)

not_a_function = 3
"""


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "my_training.py").write_text(TRAINING)
        (tmp_path / "my_broken.py").write_text("import surely_missing")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
        for name in ("my_training", "my_broken"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path

    def test_the_console_script_finds_modules_of_the_folder(self, folder: Path) -> None:
        """Installed as a script, its first path is not the current folder."""
        script = Path(sys.executable).with_name("fusedclip")
        done = subprocess.run(
            [script, "compare", "my_training:main", "--steps", "30", "--out", "found"],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "my_training:main, max_norm=1" in done.stdout
        assert sorted(p.name for p in (folder / "found").iterdir()) == [
            "compare.json",
            "compare.png",
        ]

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("my_training", "expected module:function, such as train:main .*, got 'my_training'"),
            ("my_training.py:main", "expected module:function"),
            (":main", "expected module:function"),
            ("my_trainin:main", "no module named 'my_trainin', neither in /"),
            (
                "my_training:mian",
                "module 'my_training' has no function 'mian'; did you mean 'main'",
            ),
            ("my_training:not_a_function", "has no function 'not_a_function'"),
        ],
    )
    def test_mistakes(
        self, folder: Path, name: str, complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ValueError, match=complaint):
            load_function(name)
        assert cli.main(["compare", name]) == cli.BAD_USAGE
        error = capsys.readouterr().err
        assert error.startswith("fusedclip compare: ") and error.count("\n") == 1

    def test_what_the_module_lacks_is_its_own_error(self, folder: Path) -> None:
        with pytest.raises(ModuleNotFoundError, match="surely_missing"):
            load_function("my_broken:main")

    @pytest.mark.parametrize("option", [("--max-norm", "0"), ("--steps", "0")])
    @pytest.mark.parametrize("command", [("compare", "my_training:main"), ("demo",)])
    def test_bad_settings(
        self,
        folder: Path,
        command: tuple[str, ...],
        option: tuple[str, str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert cli.main([*command, *option]) == cli.BAD_USAGE
        assert f"fusedclip {command[0]}: {option[0][2:].replace('-', '_')}: expected" in (
            capsys.readouterr().err
        )

    @pytest.mark.parametrize("missing", ["rich", "matplotlib"])
    def test_a_missing_extra_is_named(
        self,
        folder: Path,
        missing: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setitem(sys.modules, f"{missing}.console", None)
        monkeypatch.delitem(sys.modules, "fusedclip.compare.report", raising=False)
        for name in [n for n in sys.modules if n.startswith("matplotlib.") and missing in n]:
            monkeypatch.setitem(sys.modules, name, None)
        assert cli.main(["compare", "my_training:main"]) == 1
        assert "pip install 'fusedclip[compare]'" in capsys.readouterr().out

    def test_interrupted(self, folder: Path) -> None:
        (folder / "my_stop.py").write_text(
            "def main(run):\n    run.report(1.0, grad_norm=1.0)\n    raise KeyboardInterrupt\n"
        )
        assert cli.main(["compare", "my_stop:main"]) == cli.INTERRUPTED
        saved = json.loads((folder / "compare" / "compare.json").read_text())
        assert saved["interrupted"] and len(saved["arms"]) == 1


def test_the_module_is_there_when_it_is_asked_for() -> None:
    script = "import fusedclip; assert fusedclip.compare.Run.__name__ == 'Run'"
    forked.python("-c", script, check=True)


def test_the_arms_of_the_command_are_two() -> None:
    assert list(ARMS) == ["no clipping", "fusedclip"]
