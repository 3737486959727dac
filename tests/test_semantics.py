"""The contract of ``clip_``: decision, non-finite policies, duplicates, kinds of gradients."""

import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fusedclip
from tests.helpers import (
    SMALL,
    assert_norm,
    assert_scaled,
    clones,
    exact_norm,
    parameters,
    same_bits,
)

_CHUNK = 65536
_PLACES = [17, _CHUNK] if SMALL else [0, 17, 1000, _CHUNK - 1, _CHUNK, _CHUNK + 30]


def test_below_the_threshold_nothing_is_written(backend: str) -> None:
    params = parameters(torch.randn(100), torch.randn(50).half())
    before, versions = clones(params), [p.grad._version for p in params]
    for max_norm in (math.inf, 2 * exact_norm(before)):
        fusedclip.clip_(params, max_norm, backend=backend)
        assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))
        # With a finite threshold only the device knows whether it wrote.
        if max_norm == math.inf or backend in ("reference", "cpu"):
            assert [p.grad._version for p in params] == versions


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_measuring_is_no_write_to_autograd(order: float, kind: str, backend: str) -> None:
    """Other orders, and lists that more than one backend serves, bumped the versions on a GPU: a
    backward pass that had saved such a tensor failed."""
    tensors = [torch.randn(5), torch.randn(3), torch.randn(6)[::2]]
    params = parameters(*tensors[: 3 if kind == "mixed" else 2])
    product = nn.Parameter(torch.ones(5)) * tensors[0]
    fusedclip.clip_(params, math.inf, order, backend=backend)
    fusedclip.get_total_norm([p.grad for p in params], order)
    product.sum().backward()
    assert [p.grad._version for p in params] == [0] * len(params)


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_refused_clip_is_no_write_to_autograd(scope: str, backend: str) -> None:
    """A clip that raised for NaN had bumped the versions on a GPU, and changed nothing else."""
    params = parameters(torch.tensor([1.0, math.nan]))
    clipper = fusedclip.Clipper(params, 0.1, scope=scope, nonfinite="error", backend=backend)
    version = params[0].grad._version
    with pytest.raises(fusedclip.NonfiniteGradientError):
        clipper.clip_()
    assert params[0].grad._version == version


def test_above_the_threshold_versions_are_bumped(backend: str) -> None:
    params = parameters(torch.randn(100), torch.randn(50).half())
    versions = [p.grad._version for p in params]
    fusedclip.clip_(params, 0.1, backend=backend)
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.999, 1 - 1e-6, 1.0, 1 + 1e-6, 1.001])
def test_decision_near_the_threshold(backend: str, dtype: torch.dtype, threshold: float) -> None:
    """The coefficient is torch's, 1e-6 included: at norm == max_norm = 5 it is just below 1."""
    params = parameters(torch.tensor([3.0, 4.0], dtype=dtype))
    fusedclip.clip_(params, 5 * threshold, backend=backend)
    factor = min(1.0, 5 * threshold / (5 + 1e-6))
    expected = torch.tensor([3.0, 4.0], dtype=dtype) * torch.tensor(factor, dtype=dtype)
    torch.testing.assert_close(params[0].grad, expected, rtol=2.0**-23, atol=0)


def test_ratios_and_directions_are_kept(backend: str) -> None:
    params = parameters(torch.randn(1000), torch.randn(10, 10) * 100)
    before = clones(params)
    fusedclip.clip_(params, 1.0, backend=backend)
    assert exact_norm([p.grad for p in params]) == pytest.approx(1.0, rel=1e-5)
    for p, old in zip(params, before, strict=True):
        cosine = nn.functional.cosine_similarity(p.grad.flatten(), old.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_nan_payload_reaches_the_half_types(
    backend: str, dtype: torch.dtype, payload: int
) -> None:
    """Rounding a NaN must not carry out of its exponent, whatever its payload."""
    bad = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    every_half = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    params = parameters(torch.randn(100, dtype=dtype), bad, every_half)
    assert fusedclip.clip_(params, 1.0, backend=backend).isnan()
    assert all(p.grad.isnan().all() for p in params)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", _PLACES, ids=str)
@pytest.mark.parametrize("order", [2.0, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
class TestNonfinite:
    def make(self, bad: float, place: int, dtype: torch.dtype) -> list[nn.Parameter]:
        values = torch.randn(_CHUNK + 31).clamp(-3, 3)
        values[place] = bad
        return parameters(torch.randn(5), values.to(dtype), torch.randn(7).to(dtype))

    def test_propagate(
        self, backend: str, bad: float, place: int, order: float, dtype: torch.dtype
    ) -> None:
        params = self.make(bad, place, dtype)
        norm = fusedclip.clip_(params, 1.0, order, backend=backend)
        if math.isnan(bad):
            assert norm.isnan()
            assert all(p.grad.isnan().all() for p in params)
        else:
            assert norm == math.inf
            assert params[1].grad[place].isnan()
            assert params[1].grad.isnan().sum() == 1
            assert not params[0].grad.any()

    def test_zero(
        self, backend: str, bad: float, place: int, order: float, dtype: torch.dtype
    ) -> None:
        params = self.make(bad, place, dtype)
        norm = fusedclip.clip_(params, 1.0, order, nonfinite="zero", backend=backend)
        assert not norm.isfinite()
        assert all(same_bits(p.grad, torch.zeros_like(p.grad)) for p in params)

    def test_error(
        self, backend: str, bad: float, place: int, order: float, dtype: torch.dtype
    ) -> None:
        params = self.make(bad, place, dtype)
        before = clones(params)
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped") as caught:
            fusedclip.clip_(params, 1.0, order, nonfinite="error", backend=backend)
        assert [c.index for c in caught.value.culprits] == [1]
        assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))


def test_culprits_are_named_and_counted(backend: str) -> None:
    model = nn.Sequential(*[nn.Linear(2, 3, bias=False) for _ in range(9)])
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, math.nan if i != 1 else 1.0)
    with pytest.raises(fusedclip.NonfiniteGradientError) as caught:
        fusedclip.clip_(model, 1.0, error_if_nonfinite=True, backend=backend)
    text = str(caught.value)
    assert "grads[0] '0.weight' of shape (3, 2)" in text
    assert "grads[1]" not in text
    assert text.endswith("and 3 more.")
    assert len(caught.value.culprits) == 8


def test_error_survives_pickling() -> None:
    culprit = fusedclip.errors.Culprit(3, (2, 2), "head.weight")
    error = fusedclip.NonfiniteGradientError(2.0, [culprit])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert copy.culprits == (culprit,)


def test_a_norm_beyond_fp32_has_no_culprit(backend: str) -> None:
    params = parameters(torch.full((100,), 3e38))
    with pytest.raises(RuntimeError, match="Every gradient is finite"):
        fusedclip.clip_(params, 1.0, nonfinite="error", backend=backend)


def test_infinite_threshold_never_writes(backend: str) -> None:
    params = parameters(torch.tensor([math.inf, 1.0]), torch.randn(3))
    before = clones(params)
    assert fusedclip.clip_(params, math.inf, backend=backend) == math.inf
    assert all(same_bits(p.grad, old) for p, old in zip(params, before, strict=True))


def test_zero_threshold_zeroes(backend: str) -> None:
    params = parameters(torch.randn(5), torch.randn(5).bfloat16())
    fusedclip.clip_(params, 0.0, backend=backend)
    assert not any(p.grad.any() for p in params)


def test_duplicates_count_and_scale_once(backend: str) -> None:
    (p,) = parameters(torch.tensor([3.0, 4.0]))
    assert_norm(fusedclip.clip_([p, p], 1.0, backend=backend), 5.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    # What only reads counts each as often as it is listed, as torch does.
    assert_norm(fusedclip.get_total_norm([p.grad, p.grad]), math.sqrt(2.0))


def test_duplicates_through_different_tensors(backend: str) -> None:
    grad = torch.tensor([3.0, 4.0])
    params = parameters(grad, grad.view(2))
    assert_norm(fusedclip.clip_(params, 1.0, backend=backend), 5.0)
    torch.testing.assert_close(grad, torch.tensor([0.6, 0.8]))


def test_adjacent_views_are_no_overlap(backend: str) -> None:
    flat = torch.randn(30)
    params = parameters(flat[20:], flat[:7], flat[7:20])
    assert_norm(fusedclip.clip_(params, math.inf, backend=backend), exact_norm([flat]))


def test_interleaved_views_are_no_overlap(backend: str) -> None:
    flat = torch.randn(30)
    before = flat.clone()
    assert_norm(
        fusedclip.clip_(parameters(flat[::2], flat[1::2]), 1.0, backend=backend),
        exact_norm([before]),
    )
    assert_scaled(flat, before, 1.0 / (exact_norm([before]) + 1e-6))


def test_one_list_of_all_kinds(backend: str) -> None:
    sparse = torch.sparse_coo_tensor([[1, 1, 3]], [1.0, 2.0, 4.0], (5,), check_invariants=True)
    params = parameters(
        torch.full((2,), 2.0),
        torch.full((3,), 1.0).bfloat16(),
        None,
        torch.full((4, 4), 0.5)[::2, ::2],
        torch.zeros(0),
        torch.tensor(3.0, dtype=torch.float64),
    )
    params += [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    params[-2].grad = sparse
    params[-1].grad = torch.tensor([3 + 4j, 0])
    squares = 2 * 4 + 3 * 1 + 4 * 0.25 + 9 + (9 + 16) + 25
    norm = fusedclip.clip_(params, 1.0, backend=backend)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(math.sqrt(squares), rel=1e-7)
    factor = 1 / (math.sqrt(squares) + 1e-6)
    assert params[3].grad[0, 0].item() == pytest.approx(0.5 * factor, rel=1e-6)
    assert sparse.to_dense()[1].item() == pytest.approx(3 * factor, rel=1e-6)
    assert params[-1].grad[0].imag.item() == pytest.approx(4 * factor, rel=1e-6)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_sparse_gradient_without_values(backend: str, order: float) -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 0), [], (4,), check_invariants=True)
    assert fusedclip.clip_([p, *parameters(torch.ones(4))], 9.0, order, backend=backend) > 0.9


def test_channels_last_and_permuted(backend: str) -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    permuted = torch.randn(3, 4, 5).permute(2, 0, 1)
    params = parameters(images, permuted)
    before = clones(params)
    norm = fusedclip.clip_(params, 0.5, backend=backend)
    for p, old in zip(params, before, strict=True):
        assert_scaled(p.grad, old, 0.5 / (norm.item() + 1e-6))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_create_graph_gradients_are_clipped_without_recording(backend: str) -> None:
    x = torch.randn(4, requires_grad=True)
    (x**3).sum().backward(create_graph=True)
    assert x.grad.requires_grad
    fusedclip.clip_([x], 0.01, backend=backend)
    assert exact_norm([x.grad]) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("kind", ["tensor", "list", "generator", "module", "optimizer"])
def test_kinds_of_parameters(backend: str, kind: str) -> None:
    model = nn.Linear(3, 3)
    model(torch.randn(2, 3)).sum().backward()
    expected = exact_norm([p.grad for p in model.parameters()])
    given = {
        "tensor": model.weight,
        "list": list(model.parameters()),
        "generator": model.parameters(),
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }[kind]
    if kind == "tensor":
        expected = exact_norm([model.weight.grad])
    assert_norm(fusedclip.clip_(given, 1.0, backend=backend), expected)


def test_no_gradients(backend: str) -> None:
    assert fusedclip.clip_([], 1.0, backend=backend) == 0.0
    assert fusedclip.clip_(parameters(None, None), 1.0, backend=backend) == 0.0
    assert fusedclip.clip_(parameters(torch.zeros(0)), 1.0, math.inf, backend=backend) == 0.0


def test_max_norm_as_a_tensor(backend: str) -> None:
    params = parameters(torch.tensor([3.0, 4.0]))
    fusedclip.clip_(params, torch.tensor(1.0), backend=backend)
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.8]))


def test_twenty_thousand_tensors(backend: str) -> None:
    params = parameters(*torch.randn(200 if SMALL else 20_000, 3).unbind())
    before = clones(params)
    norm = exact_norm(before)
    assert_norm(fusedclip.clip_(params, 1.0, backend=backend), norm)
    assert_scaled(params[-1].grad, before[-1], 1 / (norm + 1e-6))


def test_environment_variable_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCLIP_BACKEND", "no-such-backend")
    with pytest.raises(ValueError, match="no-such-backend"):
        fusedclip.clip_(parameters(torch.ones(2)), 1.0)
    monkeypatch.setenv("FUSEDCLIP_BACKEND", "reference")
    assert fusedclip.clip_(parameters(torch.ones(4)), 1.0) == 2.0


def test_default_device_does_not_matter(backend: str) -> None:
    params = parameters(torch.tensor([3.0, 4.0]))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = fusedclip.clip_(params, 1.0, backend=backend)
    assert norm.device == params[0].grad.device
    assert norm.item() == 5.0
