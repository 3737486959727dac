"""``fusedclip doctor``: what can run here, and whether it computes what it should."""

import platform
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedclip._version import __version__
from fusedclip.backends import native
from fusedclip.backends.reference import DTYPES
from fusedclip.backends.select import BACKENDS, available_backends, resolve
from fusedclip.functional import clip_

# Worse than any rounding, better than any mistake; the test suite is the exact check.
_RTOL = {dtype: max(2e-6, 2.5 * torch.finfo(dtype).eps) for dtype in DTYPES}


@dataclass(frozen=True)
class Report:
    """The findings; ``problems`` is empty when all that should work does."""

    fusedclip: str
    python: str
    platform: str
    torch: str
    backends: dict[str, str]  # "ok" or the reason why not
    auto: str  # what backend="auto" means here
    bad_setting: str  # what is wrong with FUSEDCLIP_BACKEND; empty when nothing is
    self_tests: dict[str, str]  # "ok" or what was wrong, for each backend that can run
    instruction_set: str
    threads: int
    cuda_architectures: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        found = [f"self-test of {b}: {r}" for b, r in self.self_tests.items() if r != "ok"]
        if self.backends["cpu"] != "ok":
            found.append(f"backend cpu: {self.backends['cpu']}")
        if self.bad_setting:
            found.append(f"FUSEDCLIP_BACKEND: {self.bad_setting}")
        return found


def examine() -> Report:
    """Look at this machine and test every backend that can run, in about a second."""
    backends = available_backends()
    module = native.module
    auto, bad_setting = "-", ""
    try:
        auto = ", ".join(resolve("auto").names)
    except (ValueError, RuntimeError) as error:
        bad_setting = str(error)
    try:
        isa = "none" if module is None else module.cpu_isa()
    except ValueError as error:  # FUSEDCLIP_CPU_ISA
        isa = str(error)
    return Report(
        fusedclip=__version__,
        python=sys.version.split()[0],
        platform=platform.platform(),
        torch=torch.__version__,
        backends=backends,
        auto=auto,
        bad_setting=bad_setting,
        self_tests={name: self_test(name) for name, state in backends.items() if state == "ok"},
        instruction_set=isa,
        threads=torch.get_num_threads(),
        cuda_architectures=() if module is None else tuple(module.cuda_architectures()),
    )


def self_test(backend: str) -> str:
    """Clip mixed lists with ``backend`` and with fp64 arithmetic: ``"ok"`` or what differs."""
    device = BACKENDS[backend].device_type()
    generator = torch.Generator().manual_seed(0)
    for magnitude in (1.0, 1e-4, 1e4):
        for bites in (False, True):
            grads = [
                (magnitude * torch.randn(numel, generator=generator)).to(device, dtype)
                for dtype in _RTOL
                for numel in (1, 1000, 100_003)
            ]
            try:
                difference = _difference(grads, 0.5 if bites else 2.0, backend)
            except Exception as error:  # whatever it is, the report says so
                difference = f"{type(error).__name__}: {error}"
            if difference:
                return difference
    return "ok"


def _difference(grads: list[Tensor], threshold: float, backend: str) -> str:
    exact = float(torch.stack([g.double().norm() for g in grads]).norm())
    parameters = []
    for grad in grads:
        parameters.append(nn.Parameter(torch.empty_like(grad)))
        parameters[-1].grad = grad.clone()
    norm = clip_(parameters, threshold * exact, backend=backend).item()
    if not abs(norm - exact) <= _RTOL[torch.float32] * exact:
        return f"expected a norm of {exact:.7g}, got {norm:.7g}"
    factor = min(1.0, threshold * exact / (exact + 1e-6))
    for i, (parameter, before) in enumerate(zip(parameters, grads, strict=True)):
        assert parameter.grad is not None
        after, wanted = parameter.grad.double(), before.double() * factor
        if not torch.allclose(after, wanted, rtol=_RTOL[before.dtype], atol=1e-7):
            return f"grads[{i}] ({before.dtype}, {before.numel()} elements): scaled wrongly"
    return ""


def render(report: Report) -> str:
    """The report as text."""
    lines = [
        f"fusedclip   {report.fusedclip}",
        f"torch       {report.torch}",
        f"python      {report.python} on {report.platform}",
        "",
        f"auto        {report.auto}",
    ]
    for name, state in report.backends.items():
        tested = report.self_tests.get(name)
        suffix = "" if tested is None else f", self-test {tested}"
        lines.append(f"{name:<12}{state}{suffix}")
    architectures = ", ".join(report.cuda_architectures) or "none"
    lines += [
        "",
        f"instruction set      {report.instruction_set}",
        f"threads              {report.threads}",
        f"CUDA architectures   {architectures}",
    ]
    if report.problems:
        lines += ["", "What should work and does not:"]
        lines += [f"  {problem}" for problem in report.problems]
    return "\n".join(lines)
