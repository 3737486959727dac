"""Fixtures: every backend under test, and a clean patch state.

FUSEDCLIP_TEST_BACKENDS names the backends, separated by commas; by default those that run on any
CPU. With "cuda" on a machine that has a GPU the whole suite makes its tensors there.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from fusedclip.triton_kernels import interpreted
from hypothesis import HealthCheck, settings

import fusedclip

if interpreted():
    from tests.interpreter import correct_bfloat16

    correct_bfloat16()

# Deadlines measure the machine, not the code; the seed is printed on failure.
settings.register_profile(
    "fusedclip", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("fusedclip")


BACKENDS = os.environ.get("FUSEDCLIP_TEST_BACKENDS", "reference,cpu").split(",")

ON_GPU = torch.cuda.is_available() and not {"cuda", "triton"}.isdisjoint(BACKENDS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = fusedclip.available_backends()[request.param]
    if reason != "ok":
        pytest.fail(f"backend {request.param} must run where the tests run: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if ON_GPU:
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    fusedclip.unpatch()
    torch.set_num_threads(threads)
