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


@pytest.mark.parametrize(("spike", "said"), [(99.0, False), (100.0, True)], ids=str)
def test_a_spike_is_in_the_advice(spike: float, said: bool) -> None:
    monitor = Monitor(math.inf, names=["embed", "head"])
    for _ in range(STEPS - 1):
        monitor.update(1.0, torch.tensor([0.6, 0.8]))
    monitor.update(spike, torch.tensor([0.1, spike]))
    assert _rules(monitor) == (["spike"] if said else [])
    if said:
        assert "100 at step 99, 100 times the median, 100% of its square in 'head'" in str(
            monitor.advice()
        )


def test_always_above_is_a_question_of_the_threshold_first() -> None:
    text = str(_monitor(1.0, (STEPS, 3.0)).advice())
    assert text.index("Is the threshold too low") < text.index("lower the learning rate")


def test_a_layer_is_meant_only_where_one_is_named() -> None:
    for names in (None, ["embed", "head"]):
        monitor = Monitor(1.0, names=names)
        monitor.update(math.nan, None if names is None else torch.tensor([1.0, math.nan]))
        assert ("in that layer" in str(monitor.advice())) == (names is not None)


@pytest.mark.parametrize(("row", "said"), [(4, False), (5, True)], ids=str)
def test_a_row_of_steps_left_out(row: int, said: bool) -> None:
    monitor = Monitor(math.inf)
    for step in range(30):
        monitor.update(1.0 + 8.0 * (10 <= step < 10 + row), skipped=10 <= step < 10 + row)
    assert _rules(monitor) == (["skipped"] if said else [])
    summary = monitor.summary()
    assert (summary.skipped_steps, summary.skipped_run, summary.skipped_run_step) == (row, row, 10)
    assert f"left out   {row} steps" in str(summary)
    if said:
        assert "5 steps in a row were left out, from step 10 on" in str(monitor.advice())


def test_the_group_that_clips_is_named() -> None:
    monitor = Monitor(1.0, segments=["embed", "body", "head"])
    for step in range(STEPS):
        monitor.update(
            torch.tensor([0.5, 2.0 + step, 0.9]), threshold=torch.tensor([1.0, 1.0, 5.0])
        )
    summary = monitor.summary()
    assert [scope.name for scope in summary.scopes] == ["body"]
    assert summary.scopes[0].clipped == 1.0 and summary.last_norm == 101.0
    assert "body" in str(summary) and "most often 'body', 100%" in str(monitor.advice())
    resumed = Monitor(1.0)
    resumed.load_state_dict(monitor.state_dict())
    assert str(resumed.summary()) == str(summary)


def test_two_steps_of_another_kind_between() -> None:
    """A clip by the global norm among those by group: its norms are not the groups'."""
    monitor = Monitor(1.0)
    for _ in range(3):
        monitor.update(torch.tensor([3.0, 0.5]))
        monitor.update(0.5)
    assert monitor.summary().scopes[0].clipped == 0.5
    assert monitor.summary().median == pytest.approx(1.75)
