"""The public names are exactly the promised ones, documented, and need no optional package."""

import inspect
import subprocess
import sys

import pytest

import fusedclip
from fusedclip.backends import select
from tests import forked


def test_all_is_sorted_and_exact() -> None:
    assert fusedclip.__all__ == sorted(fusedclip.__all__)
    promised = {
        "AutoClip", "ClipConfig", "Clipper", "ZClip", "agc_", "recommend",
        "available_backends", "clip_", "clip_grad_norm_", "clip_grad_value_",
        "clip_grads_with_norm_", "get_tensor_norms", "get_total_norm", "patch", "unpatch",
    }  # fmt: skip
    assert promised <= set(fusedclip.__all__)
    for name in fusedclip.__all__:  # some are imported at first use
        getattr(fusedclip, name)
    public = {
        name
        for name, value in vars(fusedclip).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == {name for name in fusedclip.__all__ if not name.startswith("_")}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(
        AttributeError, match="module 'fusedclip' has no attribute 'clip_everything'"
    ):
        _ = fusedclip.clip_everything


def test_everything_public_is_documented() -> None:
    for name in fusedclip.__all__:
        if name != "__version__":
            assert (inspect.getdoc(getattr(fusedclip, name)) or "").strip(), name


def test_available_backends() -> None:
    backends = fusedclip.available_backends()
    assert list(backends) == list(select.NAMES)
    assert {"reference", "cpu", "cuda", "triton"} <= backends.keys()
    assert backends["reference"] == "ok"
    assert all(backends.values())


def test_import_needs_only_torch() -> None:
    optional = ("numpy", "matplotlib", "rich", "triton", "pytest", "yaml")
    script = (
        "import sys\n"
        f"for name in {optional}: sys.modules[name] = None\n"
        "import torch, fusedclip\n"
        "p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4)\n"
        "assert fusedclip.clip_([p], 1.0) == 2.0\n"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_amp_is_an_attribute_that_costs_nothing_before_it_is_used() -> None:
    script = (
        "import sys, torch, fusedclip\n"
        "assert 'fusedclip.amp' not in sys.modules\n"
        "print(fusedclip.amp.GradScaler.__name__, hasattr(fusedclip, 'nothing'))"
    )
    run = forked.python("-W", "ignore", "-c", script)
    assert run.stdout.split() == ["GradScaler", "False"], run.stderr
