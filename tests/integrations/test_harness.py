"""The harness itself: it accepts the real clip and refuses every planted fault."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import fusedclip
from fusedclip.backends import plain
from tests.integrations import record
from tests.integrations.harness import Run, parameters_of, twice
from tests.integrations.record import verifies

_MAX_NORM = 1.0


def _train(model_norm: Callable[[float], float] = lambda norm: norm) -> Run:
    """Six steps of SGD on a regression whose gradients start above the threshold."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for _ in range(6):
        inputs = torch.randn(32, 8)
        loss = (model(inputs) - 5 * inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        norms.append(model_norm(norm.item()))
        optimizer.step()
    return Run(norms, parameters_of(model))


@contextmanager
def _broken_kernel(max_norm: float = _MAX_NORM, factor: float = 1.0) -> Iterator[None]:
    """fusedclip on, with a kernel of another threshold, which returns ``factor`` × the norm."""
    real = plain.clip_
    wrong = plain.prepared(
        max_norm, from_parameters=True, infinity=False, nonfinite="propagate", backend="auto"
    )

    def sabotaged(clip: Any, tensors: Any) -> Any:
        return real(lambda tensors: _times(wrong(tensors), factor), tensors)

    plain.clip_ = sabotaged
    try:
        with fusedclip.patch():
            yield
    finally:
        plain.clip_ = real


def _times(done: Any, factor: float) -> Any:
    return (done[0] * factor, *done[1:]) if isinstance(done, tuple) else done * factor


@verifies("plain PyTorch loop", what="6 steps of SGD, `patch()`")
def test_the_real_clip_passes() -> None:
    seen = twice(_train, max_norm=_MAX_NORM)
    assert seen.kernels.calls == ["cpu.clip_"] * 6
    assert seen.kernels.bites > 0


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        (lambda: _broken_kernel(2 * _MAX_NORM), "grad_norm of step 1|parameter"),
        (lambda: _broken_kernel(math.inf), "6 steps were above the threshold, 0 clipped"),
        (lambda: _broken_kernel(factor=1.001), "grad_norm of step 0"),
        (nullcontext, "kernels ran 0 times"),
        (lambda: nullcontext(fusedclip.patch()), "still patched"),
    ],
    ids=["coefficient doubled", "never clips", "wrong norm", "not switched on", "left patched"],
)
def test_a_fault_is_caught(
    patch: Callable[[], AbstractContextManager[Any]], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        twice(_train, max_norm=_MAX_NORM, patch=patch)


def test_a_threshold_never_reached_is_caught() -> None:
    with pytest.raises(AssertionError, match="nothing was tested"):
        twice(_train, max_norm=1e9)


def test_a_first_run_with_fusedclip_is_caught() -> None:
    def train() -> Run:
        with fusedclip.patch():
            return _train()

    with pytest.raises(AssertionError, match="run without it"):
        twice(train, max_norm=_MAX_NORM)


def test_torch_agrees_with_itself_bit_for_bit() -> None:
    """What the tolerances are for is the clip alone."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(_train())
    assert runs[0].grad_norms == runs[1].grad_norms
    for name, value in runs[0].parameters.items():
        assert torch.equal(value, runs[1].parameters[name])


class TestRecord:
    _OLD = (
        record.Entry("test_harness.py::gone", "a", {"torch": "1"}, "was here"),
        record.Entry("test_record.py::kept", "b", {"torch": "1", "p": "2"}, "another file"),
        record.Entry("test_no_such_file.py::x", "c", {"torch": "1"}, "its file is gone"),
    )

    def test_a_run_replaces_the_entries_of_its_files(self) -> None:
        new = record.Entry("test_harness.py::new", "a", {"torch": "1"}, "passes now")
        collected = {"test_harness.py::new", "test_harness.py::failed"}
        after = record.updated(self._OLD, [new], collected)
        assert [e.test for e in after] == ["test_record.py::kept", "test_harness.py::new"]

    def test_the_table_names_versions_and_what_ran(self) -> None:
        text = record.table(self._OLD)
        assert "| a | torch 1 | was here |" in text
        assert "| b | p 2 | another file |" in text
        assert record.shown(f"<!-- verified:begin -->\n{text}<!-- verified:end -->") == text
