"""The benchmark measures what it says: shapes, ratios, floors, and its reports."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusedclip
from bench import measure, report
from bench.workloads import WORKLOADS, equal, gpt2_small, llama_7b, lora_7b, resnet50
from fusedclip import cli
from tests import forked
from tests.helpers import least_seconds

_CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        (resnet50(), 161, 25_557_032),
        (gpt2_small(), 148, 124_439_808),
        (llama_7b(scale=1), 291, 6_738_415_616),
        (lora_7b(), 448, 39_976_960),
    ],
    ids=["resnet50", "gpt2", "llama", "lora"],
)
def test_real_models_have_their_published_size(
    shapes: list[tuple[int, ...]], tensors: int, elements: int
) -> None:
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == elements


def test_gradients_are_no_zeros_and_differ() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        grads = [p.grad for p in equal(3, 1000, dtype).parameters(_CPU)]
        assert all(g.dtype == dtype and 0.9 < g.float().std() < 1.1 for g in grads)
        assert not torch.equal(grads[0], grads[1])


def test_side_by_side_takes_turns_and_restores_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own, which stands still but for what each call says it takes."""
    log = []
    now = 0.0

    def call(name: str, seconds: float) -> Callable[[], None]:
        def made() -> None:
            nonlocal now
            log.append(name)
            now += seconds

        return made

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    calls, restore = (call("a", 2.0), call("b", 1.0)), call("-", 50.0)
    medians, rounds = measure.side_by_side(calls, restore, _CPU, seconds=0.0)
    assert rounds == 11
    assert "".join(log[:8]) == "b-a-a-b-"
    assert log.count("a") == log.count("b") == 11 and log.count("-") == 22
    assert medians == (2.0, 1.0)  # what restores is not counted


def test_figures_of_a_case() -> None:
    case = measure.Case(torch=6.0, fusedclip=2.0, floor=1.6, moved=10, rounds=11)
    assert (case.ratio, case.over_floor, case.bandwidth) == (3.0, 1.25, 5.0)


def test_every_case_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not clipped writes nothing, clipped writes, and the gradients are the same afterwards."""
    workload = equal(20, 5000)
    parameters = workload.parameters(_CPU)
    monkeypatch.setattr(type(workload), "parameters", lambda self, device: parameters)
    before = torch.cat([p.grad for p in parameters])
    seen: dict[bool, set[bool]] = {True: set(), False: set()}
    original = measure.fusedclip.clip_

    def watched(params, max_norm):
        old = params[0].grad.clone()
        norm = original(params, max_norm)
        seen[bool(norm > max_norm)].add(torch.equal(old, params[0].grad))
        return norm

    monkeypatch.setattr(measure.fusedclip, "clip_", watched)
    result = measure.measure(workload, _CPU, seconds=0.1)
    assert seen == {True: {False}, False: {True}}
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), before, rtol=1e-3, atol=0)
    assert (result.tensors, result.elements, result.bytes) == (20, 100_000, 400_000)
    for case in (result.norm_only, result.unclipped, result.clipped):
        assert case.rounds >= 11 and case.torch > 0 and case.fusedclip > 0 and case.floor > 0
    assert result.clipped.floor > result.unclipped.floor


@pytest.mark.parametrize(
    ("max_norm", "growth"), [(1e9, 1.0), (1.0, 2.0)], ids=["unclipped", "clipped"]
)
def test_fusedclip_is_faster_on_many_small_tensors(max_norm: float, growth: float) -> None:
    """The report has the figures, for which nothing else may run."""
    parameters = equal(300, 16).parameters(_CPU)
    grads = [p.grad for p in parameters]

    def clips(clip: Callable[[list[nn.Parameter], float], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            assert clip(parameters, max_norm) > 1.5  # above the threshold of 1

        return call

    theirs, ours = least_seconds(
        clips(nn.utils.clip_grad_norm_),
        clips(fusedclip.clip_),
        restore=lambda: torch._foreach_mul_(grads, growth),
    )
    assert theirs > 4 * ours


def test_a_call_allocates_nothing_that_grows_with_the_gradients() -> None:
    peak = measure.peak_extra_bytes(lambda: torch.ones(10_000_000).sum())
    if peak is None:
        pytest.skip("reads Linux's memory accounting")
    assert peak > 30_000_000  # the measurement sees a copy; test_resources holds fusedclip to less


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("bench")
    (out / "page.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    done = forked.python(
        "-m", "fusedclip", "bench", "--only", "300 × 16", "--seconds", "0.4",
        "--json", out / "r.json", "--plot", out / "r.png", "--markdown", out / "page.md",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_reports(command_line: tuple[Path, str]) -> None:
    out, screen = command_line
    data = json.loads((out / "r.json").read_text())
    (result,) = data["results"]
    assert result["workload"] == "300 × 16" and result["elements"] == 4800
    assert data["environment"]["torch"] == torch.__version__
    assert data["host_cost"]["fusedclip"]["per_tensor"] < data["host_cost"]["torch"]["per_tensor"]
    ratio = result["unclipped"]["torch"] / result["unclipped"]["fusedclip"]
    assert f"{ratio:.1f}×" in screen
    page = (out / "page.md").read_text()
    assert page.startswith("above\n") and page.endswith("below\n") and "old" not in page
    assert f"**{ratio:.1f}×**" in page
    assert (out / "r.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_without_markers_is_the_whole_file(tmp_path: Path) -> None:
    case = measure.Case(2e-3, 1e-3, 1e-3, 10, 11)
    result = measure.Result("w", "bfloat16", 1, 5, 10, case, case, case)
    page = report.Report(measure.environment(_CPU), [result], {}, None)
    report.write_markdown(page, tmp_path / "new.md")
    text = (tmp_path / "new.md").read_text()
    assert "| w | 10 B bf16, 1 tensors | **2.0×** |" in text
    assert "2.0 ms → 1.0 ms | 1.00" in text


def test_an_unknown_workload_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--only", "nope"]) == 2
    shown = capsys.readouterr().out.replace("\n", " ")
    assert all(w.name in shown for w in WORKLOADS)


def test_python_m_bench_is_the_same_program() -> None:
    help_text = forked.python("-m", "bench", "--help").stdout
    for field in ("--only", "--seconds", "--json", "--plot", "--markdown", "--device"):
        assert field in help_text


def test_results_can_be_compared() -> None:
    """Frozen, plain values: what JSON holds is what was measured."""
    case = measure.Case(2e-3, 1e-3, 1e-3, 10, 11)
    assert dataclasses.replace(case) == case
    assert measure.Case(**json.loads(json.dumps(dataclasses.asdict(case)))) == case
