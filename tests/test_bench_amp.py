"""``python -m bench.amp``: the sequences that it compares do the same, and its table."""

import dataclasses
import json

import pytest
import torch

from bench import amp
from bench.workloads import equal
from tests.bench_results import ENVIRONMENT


def test_table() -> None:
    row = amp.Row("unscale and clip, x", (6e-3, 2e-3), (9e-4, 3e-4), 1.5e-3, "3N bytes")
    result = {"environment": ENVIRONMENT, "rows": [dataclasses.asdict(row)]}
    table = amp.tables(result)["amp"]
    line = "| unscale and clip, x | 6.00 ms → 2.00 ms | **3.0×** | 900 µs → 300 µs | **3.0×** |"
    assert f"{line} 1.50 ms: 3N bytes |" in table
    assert "load average beforehand 0.5." in table


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loose", [True, False])
def test_both_do_the_same_and_what_they_did_is_undone(fused: bool, loose: bool) -> None:
    """Every call of a comparison finds the gradients as the first one did."""
    params = equal(3, 100).parameters(torch.device("cpu"))
    optimizer = torch.optim.AdamW(params, lr=0.0, fused=True)
    before = [p.grad.clone() for p in params]
    theirs, ours, limit = amp._scalers(params, loose)
    found: dict[str, torch.Tensor] = {}

    def torch_call() -> None:
        theirs.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, limit)
        if fused:
            theirs.step(optimizer)
        found["torch"] = params[0].grad.clone()

    def our_call() -> None:
        (ours.step if fused else ours.unscale_)(optimizer)
        found["fusedclip"] = params[0].grad.clone()

    amp._compare(params, theirs, ours, torch_call, our_call, loose, seconds=0.0)
    factor = (1.0 if loose else 0.5) / amp._SCALE
    torch.testing.assert_close(found["torch"], before[0] * factor)
    torch.testing.assert_close(found["fusedclip"], before[0] * factor)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, old, rtol=1e-4, atol=0)


def test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amp, "_WORKLOADS", (equal(3, 100), equal(3, 100, torch.bfloat16)))
    monkeypatch.setattr(amp, "_STEPS", (equal(3, 100),))
    result = json.loads(json.dumps(amp.measure(0.0)))
    assert len(amp.tables(result)["amp"].splitlines()) == 2 + 3 + 2
    rows = result["rows"]
    assert [row["floor_of"].split()[0] for row in rows] == ["3N", "3N", "N"]
    assert all(0 < seconds < 1 for row in rows for seconds in row["clipped"] + row["unclipped"])
