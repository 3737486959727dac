"""``Monitor``: takes the record of each clip and answers questions about the steps so far."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedclip.backends.device_memory import capturing
from fusedclip.checks import checked_max_norm
from fusedclip.monitor.advice import Advice, advise
from fusedclip.monitor.history import History
from fusedclip.monitor.readback import Readback, on_host
from fusedclip.monitor.sinks import Sink, format_line
from fusedclip.monitor.summary import Summary, summarize
from fusedclip.pipeline import Record

_NO_TENSORS = torch.empty(0, dtype=torch.float64, device="cpu")


class Monitor:
    """Watches gradient norms, and with a ``Clipper`` those of every parameter.

    Memory is bounded: 8 bytes for each of ``window`` steps and each parameter. ``update`` never
    waits for a device: numbers there are copied to the host after the work that makes them. The
    methods that answer wait for the copies that are still under way.

    Args:
        max_norm: the threshold, a number or a 0-dim tensor; ``inf`` where nothing is clipped.
        window: how many steps are remembered, >= 1. Of the whole run it knows the numbers of steps
            and of NaN or infinite norms.
        names: of the parameters, in the order of the tensor norms.
        segments: names of the norms where there are several: groups, parameters.
        sinks: where ``log`` goes, see ``fusedclip.monitor.sinks``.

    In sharded training either all ranks have a monitor or none: the norm of a whole parameter is
    added up over ranks, by one more all-reduce for each process group.

    >>> clipper = fusedclip.Clipper(model, max_norm=1.0, monitor=True)
    >>> clipper.attach(optimizer)
    >>> print(clipper.monitor.summary())
    >>> print(clipper.monitor.advice())
    """

    def __init__(
        self,
        max_norm: float | Tensor,
        window: int = 512,
        *,
        names: Sequence[str] | None = None,
        segments: Sequence[str] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window: expected an integer >= 1, got {window!r}")
        self.max_norm = checked_max_norm(max_norm)
        self.window = window
        self.names = None if names is None else list(names)
        self.segments = None if segments is None else list(segments)
        self.sinks = list(sinks)
        self._history = History(window)
        self._judged = False  # whether steps may be left out
        self._readback = Readback()

    def update(
        self,
        norm: Tensor | float,
        tensor_norms: Tensor | None = None,
        *,
        threshold: Tensor | float | None = None,
        skipped: Tensor | bool = False,
    ) -> None:
        """Take a step in; no host sync.

        Args:
            norm: before clipping, as ``clip_`` returns it: a number, a 0-dim tensor or, by scope,
                ``[segments]``.
            tensor_norms: ``[parameters]``, as ``get_tensor_norms`` returns it, real.
            threshold: of this step, where it is not ``max_norm``; also by segment.
            skipped: the step was left out.
        """
        _check("norm", norm, 0 if not isinstance(norm, Tensor) else min(norm.dim(), 1))
        if tensor_norms is not None:
            _check("tensor_norms", tensor_norms, 1)
        limit = self.max_norm
        if isinstance(threshold, Tensor) and threshold.dim() == 1:
            limit = threshold
        elif threshold is not None:
            limit = checked_max_norm(threshold)
        rows = _NO_TENSORS if tensor_norms is None else tensor_norms.detach()
        skip = skipped if isinstance(skipped, Tensor) else None
        if skipped is True:
            skip = torch.tensor(True, device="cpu")
        self.finish(Record(rows, norm, limit, skip))

    def start(self, count: int, device: torch.device) -> Record:
        """The record that the clip of a step fills in, for ``count`` parameters on ``device``."""
        if device.type == "cpu":
            # The clip writes its norms into the history itself.
            return Record(self._history.next_row(count))
        if capturing(device):
            raise RuntimeError(
                "monitor: a clip in a CUDA graph leaves nothing behind at its replays; make the "
                "Clipper without a monitor and call monitor.update(clipper.last_norm) after each"
            )
        return Record(torch.empty(count, dtype=torch.float64, device=device))

    def finish(self, record: Record) -> None:
        """Add the record of a clip; one that failed before it had a norm adds nothing."""
        norm, limit, rows = record.norm, record.threshold, record.tensor_norms
        skip = False if record.skip is None else record.skip
        self._judged |= record.skip is not None
        if norm is None:
            return
        if not self._readback and all(map(on_host, (norm, limit, rows, skip))):
            self._history.append(norm, limit, rows if rows.numel() else None, bool(skip))
            return
        self._readback.push(_packed(norm, limit, rows, skip))
        self._take(wait=False)

    @contextlib.contextmanager
    def recording(self, count: int, device: torch.device) -> Iterator[Record]:
        """``start`` and ``finish``, also for a clip that raises because its norm is not finite."""
        record = self.start(count, device)
        try:
            yield record
        finally:
            self.finish(record)

    def summary(self) -> Summary:
        """Statistics of the last ``window`` steps. Waits for the copies under way."""
        self._take(wait=True)
        return summarize(self._history, self.names, self.segments)

    def advice(self) -> Advice:
        """What to change, judged by ``summary()``. Waits for the copies under way."""
        return advise(self.summary())

    def metrics(self, prefix: str = "grad_clip/") -> dict[str, float]:
        """Numbers for a dashboard, as in ``wandb.log(monitor.metrics(), step=step)``.

        The last step's norm, threshold and coefficient, and of the window the median and 95th
        percentile, the fraction of clipped steps and the number of NaN or infinite norms of the
        run; where steps may be left out, their number too. Empty before the first step. Waits for
        what is under way.
        """
        summary = self.summary()
        if not summary.steps:
            return {}
        values = {
            "norm": summary.last_norm,
            "max_norm": summary.max_norm,
            "coefficient": summary.last_coefficient,
            "median": summary.median,
            "p95": summary.p95,
            "clipped_fraction": summary.clipped,
            "nonfinite_steps": float(summary.nonfinite_steps),
        }
        if self._judged or summary.skipped_steps:
            values["skipped_steps"] = float(summary.skipped_steps)
        return {prefix + name: value for name, value in values.items()}

    def log_line(self, step: int, loss: float | None = None, lr: float | None = None) -> str:
        """``[Train Step 123] loss=2.14, grad_norm=0.97, lr=2e-5``. Waits for the last norm."""
        self._take(wait=True)
        return format_line(step, loss=loss, grad_norm=self._history.last_norm, lr=lr)

    def log(self, step: int, loss: float | None = None, lr: float | None = None) -> None:
        """Hand loss, grad_norm, lr and ``metrics()`` of a step to every sink."""
        self._take(wait=True)
        known = {"loss": loss, "grad_norm": self._history.last_norm, "lr": lr}
        values = {name: float(value) for name, value in known.items() if value is not None}
        values |= self.metrics()
        for sink in self.sinks:
            sink(step, values)

    def plot(self, path: str | Path) -> None:
        """Draw norms, threshold, coefficients and a heat map of the layers; needs matplotlib.

        The format is that of the path's suffix.
        """
        from fusedclip.monitor.picture import draw  # here, since it imports matplotlib

        self._take(wait=True)
        draw(self._history.remembered(), self.names, Path(path), self.segments)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue: tensors, numbers and names."""
        self._take(wait=True)
        return {"names": self.names, "segments": self.segments, **self._history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; threshold, window and sinks are the constructor's."""
        self._take(wait=True)  # steps taken before the checkpoint was loaded are of another run
        self._history.load_state_dict(state)
        self.names = self.names if self.names is not None else state["names"]
        self.segments = self.segments if self.segments is not None else state.get("segments")

    def _take(self, *, wait: bool) -> None:
        for values in self._readback.arrived(wait=wait):
            count, skipped = int(values[0]), bool(values[1])
            norms, limits, rows = values[2 : 2 + count], values[2 + count :][:count], None
            if values.numel() > 2 + 2 * count:
                rows = values[2 + 2 * count :]
            self._history.append(norms, limits, rows, skipped)


def _packed(
    norm: Tensor | float, limit: Tensor | float, rows: Tensor, skip: Tensor | bool
) -> Tensor:
    """All of a step as one fp64 vector, on the device if anything is.

    The number of norms, whether the step is left out, norms, thresholds, tensor norms.
    """
    tensors = [value for value in (norm, limit, rows, skip) if isinstance(value, Tensor)]
    device = next((tensor.device for tensor in tensors if not on_host(tensor)), rows.device)
    count = norm.numel() if isinstance(norm, Tensor) else 1
    packed = torch.empty(2 + 2 * count + rows.numel(), dtype=torch.float64, device=device)
    places = torch.split(packed, [1, 1, count, count, rows.numel()])
    for place, value in zip(places, (float(count), skip, norm, limit, rows), strict=True):
        if isinstance(value, Tensor):
            place.copy_(value.detach(), non_blocking=True)
        else:
            place.fill_(value)
    return packed


def _check(name: str, value: Any, dimensions: int) -> None:
    if isinstance(value, Tensor):
        if value.dim() != dimensions or value.is_complex():
            raise ValueError(
                f"{name}: expected a real tensor of {dimensions} dimensions, got shape "
                f"{tuple(value.shape)}, {value.dtype}"
            )
    elif dimensions or isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: expected a {'number or' if not dimensions else 'vector, a'} tensor, got "
            f"{type(value).__name__}"
        )
