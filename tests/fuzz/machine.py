"""The state machine: parameters whose gradients come, go, move and change type between calls."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hypothesis.strategies as st
import torch
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

import fusedclip
from fusedclip import amp
from fusedclip.checks import CHOICES
from tests.fuzz import model
from tests.fuzz.memory import Arena, Held, bytes_needed
from tests.helpers import FLOAT_DTYPES

_MOST_PARAMETERS = 12
_CROWD = 1360  # more gradients than a CUDA kernel's parameters hold
_LR = 0.5

# Largest and smallest magnitudes whose squares, or third powers in fp64, the model can hold.
_HUGE = {torch.float64: 1e90}
_TINY = {torch.float64: 1e-90}
for _dtype in FLOAT_DTYPES:
    _info = torch.finfo(_dtype)
    _HUGE.setdefault(_dtype, min(1e30, _info.max / 2.2))
    _TINY.setdefault(_dtype, max(1e-38, 1.7 * _info.smallest_normal * _info.eps))

_REFUSED = ("nan", "negative", "policy", "backend", "meta", "entry", "overlap", "expanded", "csr",
            "integer", "order")  # fmt: skip

picks = st.lists(st.integers(0, _MOST_PARAMETERS - 1), max_size=_MOST_PARAMETERS)
shapes = st.sampled_from(
    [
        (),
        (0,),
        (1,),
        (3,),
        (7, 5),
        (2, 3, 4),
        (64,),
        (65,),
        (127,),
        (33, 17),
        (5, 0, 2),
        (4, 3, 3, 3),
    ]
)
layouts = st.sampled_from(["contiguous", "contiguous", "permuted", "holes"])
magnitudes = st.sampled_from(["usual", "usual", "tiny", "huge", "zeros", "any"])
thresholds = st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0, 1e9, math.inf])
orders = st.sampled_from([2.0, 2.0, 2.0, math.inf, math.inf, 1.0, 3.0, 0.5])
kernel_orders = st.sampled_from([2.0, math.inf])
policies = st.sampled_from(CHOICES)
seeds = st.integers(0, 2**16)


class Clipping(RuleBasedStateMachine):
    """Subclasses say which backend is attacked."""

    backend = "cpu"
    large: Sequence[int] = (66_000, 140_001)  # elements of the large gradients
    grids: Sequence[str] = ()

    # Over all runs.
    steps = 0
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        fusedclip.unpatch()
        self.arena = Arena([4096] * 8 + [8 * max(self.large) + 64] * 2, crowd_bytes=_CROWD * 24)
        self.params: list[nn.Parameter] = []
        self.held: dict[nn.Parameter, Held] = {}
        self.crowd: list[nn.Parameter] = []
        self.attached: tuple[fusedclip.Clipper, torch.optim.Optimizer, object] | None = None
        self.clip_seen = False  # since the last step of the attached optimizer
        self.policy: tuple[object, model.AutoClipModel | model.ZClipModel] | None = None
        self.patched = False

    def teardown(self) -> None:
        fusedclip.unpatch()
        torch.set_num_threads(1)

    # The gradients ------------------------------------------------------------------------------

    @initialize(dtypes=st.lists(st.sampled_from(FLOAT_DTYPES), max_size=4), seed=seeds)
    def begin(self, dtypes, seed) -> None:
        for dtype in dtypes:
            self._add(_values((33,), dtype, "usual", seed), "contiguous", seed % 4)

    @rule(shape=shapes, dtype=st.sampled_from(FLOAT_DTYPES), layout=layouts,
          magnitude=magnitudes, shift=st.integers(0, 3), seed=seeds)  # fmt: skip
    def add(self, shape, dtype, layout, magnitude, shift, seed) -> None:
        self._add(_values(shape, dtype, magnitude, seed), layout, shift)

    @rule(which=st.integers(0, 1), dtype=st.sampled_from(FLOAT_DTYPES), magnitude=magnitudes,
          seed=seeds)  # fmt: skip
    def add_large(self, which, dtype, magnitude, seed) -> None:
        self._add(_values((self.large[which],), dtype, magnitude, seed), "contiguous", which)

    @rule(kind=st.sampled_from(["sparse", "complex"]), seed=seeds)
    def add_odd(self, kind, seed) -> None:
        if len(self.params) >= _MOST_PARAMETERS:
            return
        generator = torch.Generator().manual_seed(seed)
        if kind == "complex":
            grad = torch.randn(6, dtype=torch.complex64, generator=generator)
        else:
            rows = torch.randint(0, 5, (1, 4), generator=generator)
            values = torch.randn(4, 3, generator=generator)
            grad = torch.sparse_coo_tensor(rows, values, (5, 3), check_invariants=True)
        p = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
        self.params.append(p)
        self._give(p, Held(grad, grad.clone()))

    @precondition(lambda self: self.params)
    @rule(which=seeds)
    def drop(self, which) -> None:
        p = self._one(which)
        self._release(p)
        self.params = [other for other in self.params if other is not p]
        self._detach_if_of(p)

    @precondition(lambda self: self.params)
    @rule(which=seeds, to_none=st.booleans())
    def zero_grad(self, which, to_none) -> None:
        p = self._one(which)
        if to_none:
            self._release(p)
        elif p in self.held and self.held[p].plain:
            self.held[p].grad.zero_()
            self.held[p].accept()

    @precondition(lambda self: self.held)
    @rule(which=seeds, seed=seeds, magnitude=magnitudes, bad=st.sampled_from([None, None, math.nan,
          math.inf, -math.inf]))  # fmt: skip
    def backward(self, which, seed, magnitude, bad) -> None:
        """New values where the old ones were, perhaps one that is not finite."""
        held = self._some_held(which)
        if not held.plain:
            return
        values = _values(held.grad.shape, held.grad.dtype, magnitude, seed)
        if bad is not None and values.numel():
            values.view(-1)[seed % values.numel()] = bad
        held.grad.copy_(values)
        held.accept()

    @precondition(lambda self: self.params)
    @rule(which=seeds, shape=shapes, dtype=st.sampled_from(FLOAT_DTYPES), layout=layouts,
          magnitude=magnitudes, shift=st.integers(0, 3), seed=seeds)  # fmt: skip
    def switch(self, which, shape, dtype, layout, magnitude, shift, seed) -> None:
        """The same parameter in another type; the gradient takes the memory that it left."""
        p = self._one(which)
        self._release(p)
        self._detach_if_of(p)
        p.data = torch.zeros(shape, dtype=dtype)
        self._fill(p, _values(shape, dtype, magnitude, seed), layout, shift)

    @precondition(lambda self: len(self.held) > 1)
    @rule(a=seeds, b=seeds)
    def swap(self, a, b) -> None:
        """Two gradients change places: the same Python objects with each other's memory."""
        first, second = self._some_held(a), self._some_held(b)
        if first is second or not (first.movable and second.movable):
            return
        same = [(h.grad.shape, h.grad.dtype) for h in (first, second)]
        if same[0] == same[1]:
            first.grad.data, second.grad.data = second.grad.data, first.grad.data
            first.twin, second.twin = second.twin, first.twin
            first.slot, second.slot = second.slot, first.slot

    @precondition(lambda self: len(self.held) > 0)
    @rule(which=seeds, seed=seeds)
    def move(self, which, seed) -> None:
        """The same Python object in other memory."""
        held = self._some_held(which)
        slot = self.arena.slot_for(held.grad.nbytes) if held.movable and held.grad.numel() else None
        if slot is None:
            return
        new = self.arena.hold(slot, held.twin, "contiguous", 0)
        self.arena.leave(held)
        held.grad.data = new.grad
        held.twin, held.slot = new.twin, slot

    @precondition(lambda self: len(self.params) > 1)
    @rule(a=seeds, b=seeds, view=st.booleans())
    def share(self, a, b, view) -> None:
        """One gradient for two parameters, or two views of the same memory."""
        first, second = self._one(a), self._one(b)
        if first is second or first not in self.held or not self.held[first].plain:
            return
        held = self.held[first]
        self._release(second)
        self._detach_if_of(second)
        second.data = torch.zeros(held.grad.shape, dtype=held.grad.dtype)
        second.grad = held.grad.view_as(held.grad) if view else held.grad
        held.seen_by_view |= view
        self.held[second] = held

    @rule(dtypes=st.lists(st.sampled_from(FLOAT_DTYPES), min_size=1, max_size=2), seed=seeds)
    def gather_a_crowd(self, dtypes, seed) -> None:
        """A list that no kernel's parameters hold, in the place of the last one."""
        generator = torch.Generator().manual_seed(seed)
        self._disperse()
        values = [
            torch.randn(1 + i % 3, generator=generator).to(dtypes[i % len(dtypes)])
            for i in range(_CROWD)
        ]
        for held in self.arena.crowd(values):
            p = nn.Parameter(torch.zeros(held.grad.shape, dtype=held.grad.dtype))
            self.crowd.append(p)
            self._give(p, held)

    @precondition(lambda self: self.crowd)
    @rule(which=st.lists(seeds, max_size=20), seed=seeds)
    def thin_the_crowd(self, which, seed) -> None:
        for number in which:
            p = self.crowd.pop(number % len(self.crowd))
            self._release(p)

    @precondition(lambda self: self.crowd)
    @rule(seed=seeds)
    def stir_the_crowd(self, seed) -> None:
        """The same addresses in another order."""
        order = torch.randperm(len(self.crowd), generator=torch.Generator().manual_seed(seed))
        self.crowd = [self.crowd[i] for i in order]

    # The surroundings ---------------------------------------------------------------------------

    @rule(number=st.integers(1, 4))
    def threads(self, number) -> None:
        torch.set_num_threads(number)

    @precondition(lambda self: self.grids)
    @rule(which=seeds, schedule=st.integers(1, 3))
    def grid(self, which, schedule) -> None:
        layout = self.grids[which % len(self.grids)]
        os.environ["FUSEDCLIP_CUDA_LAYOUT"] = layout
        os.environ["FUSEDCLIP_EMULATOR_SEED"] = str(schedule)

    @rule(on=st.booleans())
    def patch(self, on) -> None:
        if on:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # modules that keep torch's function
                fusedclip.patch()
        else:
            fusedclip.unpatch()
        self.patched = on

    # The calls ----------------------------------------------------------------------------------

    @rule(which=picks, crowd=st.booleans(), times=thresholds, order=orders, nonfinite=policies,
          generator=st.booleans(), on_device=st.booleans())  # fmt: skip
    def clip(self, which, crowd, times, order, nonfinite, generator, on_device) -> None:
        params = self._listed(which, crowd)
        held = self._held_of(params)
        if _undefined(held, order):
            return
        limit = self._limit(params, times, order)
        given = iter(params) if generator else params
        max_norm = torch.tensor(limit, dtype=torch.float64) if on_device else limit
        options = {"nonfinite": nonfinite, "backend": self.backend}
        self._clip(
            lambda: fusedclip.clip_(given, max_norm, order, **options),
            held, order, limit, nonfinite, params,
        )  # fmt: skip

    @rule(which=picks, crowd=st.booleans(), times=thresholds, order=orders, strict=st.booleans())
    def clip_by_torchs_name(self, which, crowd, times, order, strict) -> None:
        params = self._listed(which, crowd)
        held = self._held_of(params)
        if order == math.inf and any(h.grad.numel() == 0 for h in held):
            return  # torch refuses it
        if _undefined(held, order):
            return
        function = nn.utils.clip_grad_norm_ if self.patched else fusedclip.clip_grad_norm_
        limit = self._limit(params, times, order)
        self._clip(
            lambda: function(params, limit, order, error_if_nonfinite=strict),
            held, order, limit, "error" if strict else "propagate", params,
        )  # fmt: skip

    @rule(which=picks, crowd=st.booleans(), order=orders)
    def norms(self, which, crowd, order) -> None:
        """Of all and of each; nothing is written."""
        listed = [p for p in self._listed(which, crowd) if p.grad is not None]
        grads = [p.grad for p in listed]
        held = self._held_of(listed)
        counted = [h for p in listed for h in self._held_of([p])]  # as often as it is listed
        if order == math.inf and any(h.grad.numel() == 0 for h in held):
            return
        if _undefined(held, order):
            return
        with self._written(held, False):
            total = fusedclip.get_total_norm(grads, order)
            each = fusedclip.get_tensor_norms(grads, order)
        model.check_norm(total, counted, model.total_norm(counted, order), order)
        assert each.shape == (len(grads),)
        by_grad = {h.grad.data_ptr(): h for h in held if h.plain and h.grad.numel()}
        for grad, norm in zip(grads, each, strict=True):
            if grad.layout == torch.strided and grad.data_ptr() in by_grad:
                one = [by_grad[grad.data_ptr()]]
                expected = model.total_norm(one, order)
                if each.dtype == torch.float32:
                    expected = torch.tensor(expected, dtype=torch.float64).float().item()
                torch.testing.assert_close(
                    norm.double().item(), expected, rtol=5e-7, atol=1e-44, equal_nan=True
                )

    @rule(which=picks, norm=st.sampled_from([0.0, 0.3, 1.0, 7.0, math.nan, math.inf]),
          limit=st.sampled_from([0.1, 1.0, 5.0]))  # fmt: skip
    def scale_by_a_known_norm(self, which, norm, limit) -> None:
        params = self._listed(which, False)
        held = self._held_of(params)
        fusedclip.clip_grads_with_norm_(params, limit, torch.tensor(norm))
        norm = float(torch.tensor(norm))
        for h in held:
            model.check_scaled(h, model.outcome(norm, limit, "propagate"))
        self._heard(params)

    @rule(which=picks, crowd=st.booleans(), limit=st.sampled_from([0.0, 0.25, 1.0, 1e-30, 6e4]))
    def clip_values(self, which, crowd, limit) -> None:
        params = [p for p in self._listed(which, crowd) if p in self.held and self.held[p].plain]
        held = self._held_of(params)
        fusedclip.clip_grad_value_(params, limit)
        for h in held:
            expected = h.twin.clone().clamp_(-limit, limit)
            torch.testing.assert_close(h.grad, expected, rtol=0, atol=0, equal_nan=True)
            h.accept()
        Clipping.calls += 1

    @rule(which=picks, times=thresholds, order=kernel_orders,
          nonfinite=st.sampled_from(["propagate", "zero"]),
          scope=st.sampled_from(["parameter", "group"]))  # fmt: skip
    def scopes(self, which, times, order, nonfinite, scope) -> None:
        params = self._distinct(which)
        if not params:
            return
        half = max(1, len(params) // 2)
        groups = [{"params": params[:half]}]
        if params[half:]:
            groups.append({"params": params[half:], "max_norm": 0.25})
        target = torch.optim.SGD(groups, lr=_LR) if scope == "group" else params
        limit = self._limit(params[:half], times, order)
        clipper = fusedclip.Clipper(
            target, limit, scope=scope, norm_type=order, nonfinite=nonfinite, backend=self.backend
        )
        norms = clipper.clip_()
        parts = [[p] for p in params] if scope == "parameter" else [g["params"] for g in groups]
        limits = [limit] * len(parts)
        if scope == "group" and len(parts) > 1:
            limits[1] = 0.25
        everything = self._held_of(params)
        if not everything:
            return
        assert norms.shape == (len(parts),)
        for part, norm, own_limit in zip(parts, norms, limits, strict=True):
            held = self._held_of(part)
            expected = model.total_norm(held, order)
            if norms.dtype == torch.float32:
                expected = torch.tensor(expected, dtype=torch.float64).float().item()
            torch.testing.assert_close(
                norm.double().item(), expected, rtol=5e-7, atol=1e-44, equal_nan=True
            )
            for h in held:
                model.check_scaled(h, model.outcome(float(norm), own_limit, nonfinite))
        self._heard(params)
        Clipping.calls += 1

    @rule(which=picks, times=thresholds, nonfinite=st.sampled_from(["propagate", "zero"]),
          steps=st.integers(1, 3))  # fmt: skip
    def adagc(self, which, times, nonfinite, steps) -> None:
        """By parameter: a step of the warm-up, then in one pass where the backend has one."""
        params = self._distinct(which)
        held = self._held_of(params)
        absolute = self._limit(params, times, 2.0)
        if not held or not 0.0 < absolute < math.inf:
            return
        policy = fusedclip.AdaGC(absolute=absolute, warmup=1)
        clipper = fusedclip.Clipper(
            params, policy, scope="parameter", nonfinite=nonfinite, backend=self.backend
        )
        expected = model.AdaGCModel(absolute, len(params))
        for _ in range(steps):
            norms = clipper.clip_().double().tolist()
            Clipping.calls += 1
            for p, norm, factor in zip(params, norms, expected.factors(norms), strict=True):
                if p not in self.held:
                    continue
                own = model.total_norm([self.held[p]], 2.0)
                if abs(own) < 3e38 or not math.isfinite(own):
                    torch.testing.assert_close(norm, own, rtol=5e-7, atol=1e-44, equal_nan=True)
                bad = not math.isfinite(norm) or math.isnan(factor)
                if bad and nonfinite == "zero":
                    model.check_scaled(self.held[p], model.Outcome(0.0, zero=True))
                else:
                    self._check_close(self.held[p], factor)
        self._heard(params)

    @rule(kind=st.sampled_from(["auto", "z"]), warmup=st.integers(1, 3))
    def new_policy(self, kind, warmup) -> None:
        if kind == "auto":
            self.policy = (
                fusedclip.AutoClip(40.0, window=4, warmup=warmup),
                model.AutoClipModel(40.0, 4, warmup),
            )
        else:
            self.policy = (
                fusedclip.ZClip(alpha=0.9, z=0.5, warmup=warmup),
                model.ZClipModel(0.9, 0.5, warmup),
            )

    @precondition(lambda self: self.policy is not None)
    @rule(which=picks, order=kernel_orders, restart=st.booleans())
    def clip_by_policy(self, which, order, restart) -> None:
        params = self._listed(which, False)
        held = self._held_of(params)
        policy, expected = self.policy
        clipper = fusedclip.Clipper(params, policy, norm_type=order, backend=self.backend)
        if restart:
            clipper.load_state_dict(clipper.state_dict())
        norm = clipper.clip_()
        Clipping.calls += 1
        if not held:
            return
        number = model.check_norm(norm, held, model.total_norm(held, order), order)
        limit = expected.threshold(number)
        for h in held:
            close = model.coefficient(number, limit)
            # The policy's threshold is fp64 arithmetic in another order.
            self._check_close(h, close)
        self._heard(params)

    @rule(which=picks, times=thresholds, power=st.integers(-3, 12), order=kernel_orders)
    def unscale_and_clip(self, which, times, power, order) -> None:
        params = [p for p in self._distinct(which) if p not in self.held or self.held[p].plain]
        if not params:
            return
        held = self._held_of(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
        scaler.scale(torch.ones(()))
        optimizer = torch.optim.SGD(params, lr=_LR)
        limit = self._limit(params, times, order) * 2.0**-power
        call = lambda: amp.unscale_and_clip_(  # noqa: E731
            scaler, optimizer, limit, order, backend=self.backend
        )
        if any(h.grad.dtype == torch.float16 for h in held):
            self._refused(ValueError, "Attempting to unscale FP16 gradients", call)
            return
        norm = call()
        Clipping.calls += 1
        inverse = 2.0**-power
        number = model.check_norm(norm, held, model.total_norm(held, order, inverse), order)
        for h in held:
            model.check_scaled(h, model.outcome(number, limit, "unclipped", inverse))
        if limit != math.inf:
            self._heard(params)
        if not held:
            return  # torch: no inf checks were recorded
        weights = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        bad = not math.isfinite(number)
        assert scaler.get_scale() == 2.0**power * (0.5 if bad else 1.0)
        self._check_step(params, weights, skipped=bad)

    # Attached to an optimizer -------------------------------------------------------------------

    @rule(which=picks, limit=st.sampled_from([1e-3, 1.0, 1e9]), nonfinite=policies,
          order=kernel_orders, skip_above=st.sampled_from([None, None, 1e-2, 3.0]),
          scope=st.sampled_from(["global", "global", "parameter"]))  # fmt: skip
    def attach(self, which, limit, nonfinite, order, skip_above, scope) -> None:
        params = [p for p in self._distinct(which) if p not in self.held or self.held[p].plain]
        if self.attached is not None or not params:
            return
        optimizer = torch.optim.SGD(params, lr=_LR, foreach=False)
        clipper = fusedclip.Clipper(
            params, limit, norm_type=order, nonfinite=nonfinite, backend=self.backend,
            skip_above=skip_above, scope=scope,
        )  # fmt: skip
        self.attached = (clipper, optimizer, clipper.attach(optimizer, allow_sync=True))
        self.clip_seen = False

    @precondition(lambda self: self.attached is not None)
    @rule()
    def step(self) -> None:
        clipper, optimizer, _ = self.attached
        params = list(clipper.parameters)
        if any(p in self.held and not self.held[p].plain for p in params):
            self._detach()
            return
        held, order, limit = self._held_of(params), clipper.norm_type, clipper.max_norm
        weights = [p.detach().clone() for p in params]
        if self.clip_seen:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it was clipped before
                optimizer.step()
            skipped = False
        elif clipper.scope == "parameter":
            skipped = self._step_by_parameter(clipper, optimizer)
        else:
            whole = model.total_norm(held, order)
            raised = self._clip(
                lambda: (optimizer.step(), clipper.last_norm)[1],
                held, order, limit, clipper.nonfinite, None,
            )  # fmt: skip
            if raised:
                self._check_step(params, weights, skipped=True)
                return
            skipped = _left_out(whole, clipper.skip_above)
        self.clip_seen = False
        self._check_step(params, weights, skipped=skipped)

    def _step_by_parameter(self, clipper, optimizer) -> bool:
        """Each by its own norm; left out by the norm of all. Whether it did nothing."""
        params, limit, nonfinite = clipper.parameters, clipper.max_norm, clipper.nonfinite
        norms = [model.total_norm(self._held_of([p]), clipper.norm_type) for p in params]
        whole = model.total_norm(self._held_of(params), clipper.norm_type)
        wide = any(h.grad.dtype == torch.float64 for h in self._held_of(params))
        known = norms if wide else torch.tensor(norms, dtype=torch.float64).float().tolist()
        Clipping.calls += 1
        if nonfinite == "error" and not all(map(math.isfinite, known)):
            self._refused(fusedclip.NonfiniteGradientError, "non-finite", optimizer.step)
            return True
        optimizer.step()
        for p, norm in zip(params, clipper.last_norm.tolist(), strict=True):
            for h in self._held_of([p]):
                model.check_scaled(h, model.outcome(norm, limit, nonfinite))
        return _left_out(whole, clipper.skip_above)

    @precondition(lambda self: self.attached is not None)
    @rule()
    def detach(self) -> None:
        self._detach()

    # Errors -------------------------------------------------------------------------------------

    @rule(which=picks, kind=st.sampled_from(_REFUSED))
    def refuse(self, which, kind) -> None:
        """What cannot be done says so, and leaves everything as it was (the invariants see it)."""
        params = self._listed(which, False)
        clip = lambda *extra, **options: fusedclip.clip_(  # noqa: E731
            [*params, *extra], **{"max_norm": 1e-6, "backend": self.backend, **options}
        )
        error, pattern, call = {
            "nan": (ValueError, "max_norm", lambda: clip(max_norm=math.nan)),
            "negative": (ValueError, "max_norm", lambda: clip(max_norm=-1.0)),
            "policy": (ValueError, "nonfinite", lambda: clip(nonfinite="never")),
            "backend": (ValueError, "backend", lambda: clip(backend="none")),
            "meta": (ValueError, "grads", lambda: clip(_with(torch.zeros(2, device="meta")))),
            "entry": (TypeError, "parameters", lambda: clip(("name", torch.zeros(2)))),
            "overlap": (ValueError, "overlap", lambda: clip(*_overlapping())),
            "expanded": (ValueError, "single memory", lambda: clip(_with(torch.ones(1).expand(3)))),
            "csr": (ValueError, "sparse_csr", lambda: clip(_with(torch.eye(3).to_sparse_csr()))),
            "integer": (ValueError, "int64", lambda: clip(_with(torch.ones(3, dtype=torch.int64)))),
            "order": (ValueError, "norm_type", lambda: clip(norm_type=math.nan)),
        }[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # CSR is in beta state
            self._refused(error, pattern, call)

    # What holds after every step ----------------------------------------------------------------

    @invariant()
    def nothing_else_has_changed(self) -> None:
        Clipping.steps += 1
        self.arena.check()
        for p, held in self.held.items():
            assert p.grad is held.grad or p.grad.data_ptr() == held.grad.data_ptr()
            if held.slot is None and not held.plain:
                model.check_untouched(held)

    # Helpers ------------------------------------------------------------------------------------

    def _add(self, values: Tensor, layout: str, shift: int) -> None:
        if len(self.params) < _MOST_PARAMETERS:
            p = nn.Parameter(torch.zeros(values.shape, dtype=values.dtype))
            self.params.append(p)
            self._fill(p, values, layout, shift)

    def _fill(self, p: nn.Parameter, values: Tensor, layout: str, shift: int) -> None:
        slot = self.arena.slot_for(bytes_needed(values.shape, values.dtype, layout, shift))
        if slot is not None:
            self._give(p, self.arena.hold(slot, values, layout, shift))

    def _give(self, p: nn.Parameter, held: Held) -> None:
        p.grad = held.grad
        self.held[p] = held

    def _release(self, p: nn.Parameter) -> None:
        held = self.held.pop(p, None)
        p.grad = None
        if held is not None and held not in self.held.values():
            self.arena.leave(held)

    def _disperse(self) -> None:
        for p in self.crowd:
            del self.held[p]
        self.crowd = []

    def _one(self, which: int) -> nn.Parameter:
        return self.params[which % len(self.params)]

    def _some_held(self, which: int) -> Held:
        all_held = list(self.held.values())
        return all_held[which % len(all_held)]

    def _listed(self, which: Sequence[int], crowd: bool) -> list[nn.Parameter]:
        """Parameters in the order of ``which``, some more than once; all for an empty one."""
        some = [self._one(i) for i in which if self.params] if which else list(self.params)
        return some + self.crowd if crowd else some

    def _distinct(self, which: Sequence[int]) -> list[nn.Parameter]:
        """No parameter and no gradient twice."""
        found: dict[int, nn.Parameter] = {}
        for p in self._listed(which, False):
            found.setdefault(id(self.held.get(p, p)), p)
        return list(found.values())

    def _held_of(self, params: Sequence[nn.Parameter]) -> list[Held]:
        """Each gradient once."""
        return list(dict.fromkeys(self.held[p] for p in params if p in self.held))

    def _limit(self, params: Sequence[nn.Parameter], times: float, order: float) -> float:
        """A threshold ``times`` the norm."""
        norm = model.total_norm(self._held_of(params), order)
        return times * norm if math.isfinite(norm) and 0.0 < times < 1e9 else times

    def _clip(
        self,
        call: Callable[[], Tensor],
        held: list[Held],
        order: float,
        limit: float,
        nonfinite: str,
        params: list[nn.Parameter] | None,
    ) -> bool:
        """Make a call that clips by the global norm and check all of it; whether it raised."""
        Clipping.calls += 1
        expected = model.total_norm(held, order)
        wide = any(h.grad.dtype in (torch.float64, torch.complex128) for h in held)
        finite = math.isfinite(expected if wide else torch.tensor(expected).float().item())
        if nonfinite == "error" and not finite:
            with self._written(held, False):
                self._refused(fusedclip.NonfiniteGradientError, "non-finite", call)
            return True
        versions = [h.grad._version for h in held]
        norm = call()
        number = model.check_norm(norm, held, expected, order)
        for h, version in zip(held, versions, strict=True):
            if model.check_scaled(h, model.outcome(number, limit, nonfinite)) and h.grad.numel():
                assert h.grad._version > version, "a write that autograd cannot see"
        if params is not None and limit != math.inf:
            self._heard(params)
        return False

    def _check_close(self, held: Held, factor: float) -> None:
        if factor == 1.0:
            model.check_untouched(held)
            return
        rtol = 2.0**-7 if held.grad.element_size() == 2 else 1e-6
        torch.testing.assert_close(
            held.grad.detach(), held.twin * factor, rtol=rtol, atol=1e-7, equal_nan=True
        )
        held.accept()

    def _check_step(
        self, params: Sequence[nn.Parameter], weights: Sequence[Tensor], skipped: bool
    ) -> None:
        """SGD has gone by the gradients as they are now; then back to where it came from."""
        for p, old in zip(params, weights, strict=True):
            moves = not skipped and p in self.held
            expected = old.add(self.held[p].twin, alpha=-_LR) if moves else old
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, equal_nan=True)
            p.data.zero_()

    def _refused(self, error: type[Exception], pattern: str, call: Callable[[], object]) -> None:
        Clipping.calls += 1
        try:
            call()
        except error as caught:
            assert pattern in str(caught), str(caught)
        else:
            raise AssertionError(f"expected {error.__name__}: …{pattern}…")

    @contextmanager
    def _written(self, held: Sequence[Held], written: bool) -> Iterator[None]:
        versions = [h.grad._version for h in held]
        yield
        assert written or versions == [h.grad._version for h in held]

    def _heard(self, params: Sequence[nn.Parameter]) -> None:
        if self.attached is not None:
            own = {id(p) for p in self.attached[0].parameters}
            self.clip_seen |= any(id(p) in own for p in params)

    def _detach_if_of(self, p: nn.Parameter) -> None:
        if self.attached is not None and any(q is p for q in self.attached[0].parameters):
            self._detach()

    def _detach(self) -> None:
        assert self.attached is not None
        self.attached[2].remove()
        self.attached = None


def _left_out(whole: float, skip_above: float | None) -> bool:
    return skip_above is not None and not whole <= skip_above


def _undefined(held: Sequence[Held], order: float) -> bool:
    """Sparse gradients have the norms 1, 2 and inf."""
    return order not in (1.0, 2.0, math.inf) and any(
        h.grad.layout == torch.sparse_coo for h in held
    )


def _values(shape: Sequence[int], dtype: torch.dtype, magnitude: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    if magnitude == "zeros":
        values.zero_()
    elif magnitude == "tiny":
        values *= _TINY[dtype]
    elif magnitude == "huge":
        values = values.clamp(-2, 2) * _HUGE[dtype]
    elif magnitude == "any":
        exponents = torch.randint(-18, 12, tuple(shape), generator=generator)
        values = values.clamp(-4, 4) * torch.pow(2.0, exponents.double())
    return values.to(dtype)


def _with(grad: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(grad), requires_grad=False)
    p.grad = grad
    return p


def _overlapping() -> list[nn.Parameter]:
    memory = torch.ones(5)
    return [_with(memory[:3]), _with(memory[2:])]
