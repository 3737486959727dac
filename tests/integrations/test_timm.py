"""timm's ``dispatch_clip_grad``, from a timm that lies apart.

``import timm`` wants torchvision. Its two files that clip do not, so the packages around them are
stood in for by empty ones, and no other test sees a timm.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

import fusedclip
from tests.integrations.harness import Run, counted_kernels, parameters_of, twice
from tests.integrations.record import APART, verifies

_STEPS = 10
_MAX_NORM = 5.0

Dispatch = Callable[..., None]


@pytest.fixture(scope="module")
def dispatch_clip_grad() -> Iterator[Dispatch]:
    for name in ("timm", "timm.utils"):
        package = ModuleType(name)
        package.__path__ = [str(APART / name.replace(".", "/"))]
        sys.modules[name] = package
    yield importlib.import_module("timm.utils.clip_grad").dispatch_clip_grad
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


def _train(dispatch: Dispatch, mode: str, value: float) -> Run:
    """A small convolutional net, as timm's train.py clips it: after backward, before the step."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    norms = []
    for _ in range(_STEPS):
        images, labels = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(4 * model(images), labels).backward()
        norms.append(sum(p.grad.double().square().sum().item() for p in model.parameters()) ** 0.5)
        dispatch(model.parameters(), value=value, mode=mode)
        optimizer.step()
    return Run(norms, parameters_of(model))


@verifies("timm", "timm", what='`dispatch_clip_grad`, `mode="norm"`')
def test_norm(dispatch_clip_grad: Dispatch) -> None:
    seen = twice(
        lambda: _train(dispatch_clip_grad, "norm", _MAX_NORM), max_norm=_MAX_NORM,
        parameter_atol=1e-5,
    )  # fmt: skip
    assert min(seen.torch.grad_norms) < _MAX_NORM
    assert seen.kernels.calls == ["cpu.clip_"] * _STEPS


@verifies("timm", "timm", what='`mode="value"`')
def test_value(dispatch_clip_grad: Dispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = _train(dispatch_clip_grad, "value", 0.05)
    called = []
    clamp = fusedclip.actions.cpu.clamp_
    monkeypatch.setattr(
        fusedclip.actions.cpu, "clamp_", lambda *arguments: [called.append(1), clamp(*arguments)]
    )
    torch.manual_seed(0)
    with fusedclip.patch():
        fused = _train(dispatch_clip_grad, "value", 0.05)
    assert len(called) == _STEPS
    assert fused.grad_norms == plain.grad_norms  # torch's results, bit for bit
    assert all(torch.equal(fused.parameters[k], v) for k, v in plain.parameters.items())


@verifies("timm", "timm", what='`mode="agc"` against `fusedclip.agc_`')
def test_agc(dispatch_clip_grad: Dispatch) -> None:
    """timm computes it by itself, whoever is patched; ``agc_`` in its place is the same clip."""

    def ours(parameters: Iterator[nn.Parameter], value: float, mode: str) -> None:
        assert mode == "agc"
        fusedclip.agc_(parameters, value)

    torch.manual_seed(0)
    with fusedclip.patch(), counted_kernels() as kernels:
        plain = _train(dispatch_clip_grad, "agc", 0.05)
    assert not kernels.calls
    torch.manual_seed(0)
    fused = _train(ours, "agc", 0.05)
    torch.manual_seed(0)
    unclipped = _train(lambda *_, **__: None, "agc", 0.05)
    for name, value in plain.parameters.items():
        torch.testing.assert_close(fused.parameters[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert any(
        not torch.allclose(unclipped.parameters[name], value, rtol=1e-2)
        for name, value in plain.parameters.items()
    ), "agc clipped nothing"
