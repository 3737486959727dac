"""Clips through fusedclip's functions as seen by ``call.observers``, and ``run --monitor``'s."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fusedclip
from fusedclip import call
from fusedclip.launcher.report import Watching
from tests.helpers import parameters


@pytest.fixture
def watching() -> Iterator[Watching]:
    made = Watching()
    call.observers.append(made)
    yield made
    call.observers.remove(made)


def _monitor(watching: Watching, tensors: list[nn.Parameter]) -> fusedclip.Monitor:
    monitor = watching(tensors)
    assert monitor is not None
    return monitor


def test_norms_and_thresholds_of_every_entry(watching: Watching) -> None:
    params = parameters(torch.tensor([3.0, 4.0]), torch.tensor([12.0]))
    fusedclip.clip_grad_norm_(params, math.inf)
    fusedclip.clip_(params, 6.5)
    fusedclip.clip_grads_with_norm_(params, 100.0, torch.tensor(6.5))
    summary = _monitor(watching, params).summary()
    assert summary.steps == 3
    assert summary.max == 13.0
    assert [(part.name, part.norm) for part in summary.top] == [
        ("parameters[1]", 12.0),
        ("parameters[0]", 5.0),
    ]
    assert (summary.last_norm, summary.max_norm) == (6.5, 100.0)


def test_the_gradients_are_the_same_bits_when_watched(watching: Watching) -> None:
    values = [torch.randn(1000), torch.randn(33, 7).bfloat16()]
    seen, unseen = parameters(*values), parameters(*(v.clone() for v in values))
    norm = fusedclip.clip_grad_norm_(seen, 0.5)
    call.observers.remove(watching)
    expected = fusedclip.clip_grad_norm_(unseen, 0.5)
    call.observers.append(watching)
    assert torch.equal(norm, expected)
    for a, b in zip(seen, unseen, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_clip_that_raises_is_seen_too(watching: Watching) -> None:
    params = parameters(torch.tensor([math.nan]), torch.tensor([1.0]))
    with pytest.raises(fusedclip.NonfiniteGradientError):
        fusedclip.clip_(params, 1.0, nonfinite="error")
    summary = _monitor(watching, params).summary()
    assert (summary.steps, summary.nonfinite_names) == (1, ("parameters[0]",))


def test_bad_arguments_are_no_step(watching: Watching) -> None:
    params = parameters(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="max_norm"):
        fusedclip.clip_(params, -1.0)
    fusedclip.clip_grad_norm_([], 1.0)
    assert _monitor(watching, params).summary().steps == 0
    assert watching([]) is None


def test_the_newest_observer_that_wants_it_gets_it(watching: Watching) -> None:
    params = parameters(torch.tensor([1.0]))
    newer = fusedclip.Monitor(1.0)
    observers = [lambda tensors: newer, lambda tensors: None]
    call.observers.extend(observers)
    try:
        fusedclip.clip_grad_norm_(params, 1.0)
    finally:
        del call.observers[-2:]
    assert newer.summary().steps == 1
    assert _monitor(watching, params).summary().steps == 0


def test_names_are_those_of_the_module_that_has_all(watching: Watching) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    model(torch.ones(1, 2)).sum().backward()
    fusedclip.clip_grad_norm_(model.parameters(), 1.0)
    monitor = _monitor(watching, list(model.parameters()))
    assert monitor.names == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert "4 tensors of Sequential: 1 steps, max_norm 1\n" in watching.report()


def test_a_new_model_where_an_old_one_was(watching: Watching) -> None:
    """An address may be used again; the first tensor must be the same object."""
    first = parameters(torch.tensor([1.0]))
    fusedclip.clip_grad_norm_(first, 1.0)
    (key,) = watching._watched
    second = parameters(torch.tensor([1.0]))
    watching._watched[(id(second[0]), 1)] = watching._watched.pop(key)
    fusedclip.clip_grad_norm_(second, 1.0)
    assert _monitor(watching, second).summary().steps == 1


def test_other_ranks_are_silent(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    params = parameters(torch.tensor([1.0]))
    fusedclip.clip_grad_norm_(params, 1.0)
    assert _monitor(watching, params).summary().steps == 1
    assert watching.report() == ""
