"""Fixtures: every backend that can run here, and a clean patch state."""

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


# Which backends the common suite is run over; see tests/test_triton_interpreter.py.
BACKENDS = os.environ.get("FUSEDCLIP_TEST_BACKENDS", "reference,cpu").split(",")


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
    yield
    fusedclip.unpatch()
    torch.set_num_threads(threads)
