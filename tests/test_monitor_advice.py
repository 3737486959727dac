"""Each rule of the advice at its boundary: the last step on one side, the first on the other."""

import math

import pytest
import torch

from fusedclip.monitor import Monitor
from fusedclip.monitor.advice import CONSTANTLY, FEWEST_STEPS, OFTEN

STEPS = 100


def _rules(monitor: Monitor) -> list[str]:
    return [finding.rule for finding in monitor.advice().findings]


def _monitor(max_norm: float, *runs: tuple[int, float]) -> Monitor:
    """``count`` steps of each norm."""
    monitor = Monitor(max_norm)
    for count, norm in runs:
        for _ in range(count):
            monitor.update(norm)
    return monitor


@pytest.mark.parametrize(
    ("largest", "idle"), [(0.2999, True), (0.3, False), (0.3001, False)], ids=str
)
def test_idle_is_always_below_0_3(largest: float, idle: bool) -> None:
    monitor = _monitor(1.0, (STEPS - 1, 0.1), (1, largest))
    assert _rules(monitor) == (["idle"] if idle else [])
    if idle:
        text = str(monitor.advice())
        assert "median 0.1, largest 0.3 at step 99" in text and "1.5 to 2 times" in text


def test_one_step_above_0_3_is_forgotten_with_its_window() -> None:
    monitor = Monitor(1.0, window=50)
    monitor.update(5.0)
    for _ in range(49):
        monitor.update(0.1)
    assert _rules(monitor) == []
    monitor.update(0.1)
    assert _rules(monitor) == ["idle"]
    assert "largest 0.1 at step 1)" in str(monitor.advice())  # not the 5.0 of long ago


@pytest.mark.parametrize(("norm", "high"), [(0.9, False), (0.9001, True)], ids=str)
def test_high_begins_above_0_9(norm: float, high: bool) -> None:
    monitor = _monitor(1.0, (STEPS // 2, 0.5), (STEPS // 2, norm))
    assert _rules(monitor) == (["high"] if high else [])


@pytest.mark.parametrize(("count", "high"), [(int(OFTEN * STEPS), False), (26, True)], ids=str)
def test_high_is_often(count: int, high: bool) -> None:
    monitor = _monitor(1.0, (STEPS - count, 0.5), (count, 2.0))
    assert _rules(monitor) == (["high"] if high else [])
    if high:
        assert "26 of 100 steps were above 0.9 × max_norm" in str(monitor.advice())
        assert "bad samples" in str(monitor.advice())


@pytest.mark.parametrize(
    ("norm", "rule"), [(0.9499, "high"), (0.95, "high"), (0.9501, "unstable")], ids=str
)
def test_unstable_begins_above_0_95(norm: float, rule: str) -> None:
    assert _rules(_monitor(1.0, (STEPS, norm))) == [rule]


@pytest.mark.parametrize(
    ("count", "rule"), [(int(CONSTANTLY * STEPS), "high"), (91, "unstable")], ids=str
)
def test_unstable_is_constantly(count: int, rule: str) -> None:
    assert _rules(_monitor(1.0, (STEPS - count, 0.5), (count, 3.0))) == [rule]


@pytest.mark.parametrize(
    ("max_norm", "clipped", "squeezed"),
    [(0.1, 50, True), (0.1, 49, False), (0.1001, 50, False)],
    ids=str,
)
def test_squeezed_is_a_tiny_threshold_that_bites(
    max_norm: float, clipped: int, squeezed: bool
) -> None:
    monitor = _monitor(max_norm, (STEPS - clipped, 0.05), (clipped, 1.0))
    assert ("squeezed" in _rules(monitor)) == squeezed
    if squeezed:
        assert str(monitor.advice()).startswith("- max_norm is 0.1 and 50 of 100 steps")


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_one_bad_norm_is_worth_a_word_at_once(bad: float) -> None:
    monitor = Monitor(1.0, names=["embed", "head"])
    monitor.update(0.5, torch.tensor([0.3, 0.4]))
    assert _rules(monitor) == []
    monitor.update(bad, torch.tensor([0.3, bad]))
    assert _rules(monitor) == ["nonfinite"]
    text = str(monitor.advice())
    assert "in 1 of 2 steps, the last time at step 1 in 'head'" in text
    assert "unscale_()" in text and "'embed'" not in text


def test_bad_norms_of_long_ago_are_not_advice() -> None:
    monitor = Monitor(1.0, window=30)
    monitor.update(math.nan)
    for _ in range(29):
        monitor.update(0.5)
    assert _rules(monitor) == ["nonfinite"]
    assert "last time at step 0" in str(monitor.advice())
    monitor.update(0.5)
    assert _rules(monitor) == [] and monitor.summary().nonfinite_steps == 1


def test_few_steps_are_not_judged() -> None:
    monitor = _monitor(1.0, (FEWEST_STEPS - 1, 0.1))
    assert _rules(monitor) == [] and "too few" in str(monitor.advice())
    monitor.update(0.1)
    assert _rules(monitor) == ["idle"]


def test_a_threshold_that_clips_nothing_is_not_called_idle() -> None:
    assert _rules(_monitor(math.inf, (STEPS, 0.1))) == []


def test_a_policy_is_judged_by_the_threshold_of_each_step() -> None:
    monitor = Monitor(math.inf)
    for step in range(STEPS):
        monitor.update(float(step + 1), threshold=(step + 1) / 0.98)
    assert _rules(monitor) == ["unstable"]


def test_nothing_stands_out() -> None:
    assert str(_monitor(1.0, (STEPS, 0.6)).advice()) == (
        "Nothing stands out in the last 100 steps; leave max_norm as it is."
    )


def test_the_most_urgent_comes_first() -> None:
    assert _rules(_monitor(0.1, (STEPS, 4.0), (1, math.nan))) == [
        "nonfinite", "squeezed", "unstable",
    ]  # fmt: skip
