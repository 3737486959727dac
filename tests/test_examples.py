"""The examples run as they are, and do what they say."""

import re
from pathlib import Path

from tests import forked

_ROOT = Path(__file__).parent.parent
_LOG = re.compile(r"\[Train Step (\d+)\] loss=([\d.]+), grad_norm=([\d.]+)")


def _run(*command: str) -> tuple[list[float], list[float], str]:
    """(losses, gradient norms, output)."""
    run = forked.python("-W", "ignore", *command)
    assert run.returncode == 0, run.stderr
    steps = _LOG.findall(run.stdout)
    return [float(loss) for _, loss, _ in steps], [float(norm) for *_, norm in steps], run.stdout


def test_amp() -> None:
    losses, norms, output = _run("examples/amp.py", "--steps", "30")
    assert len(losses) == 30 and losses[-1] < losses[0] / 2
    assert max(norms) > 1.0  # something was clipped, and the norm is the unscaled one
    assert max(norms) < 1e3 and "scale=65536" in output


def test_accumulation() -> None:
    losses, norms, output = _run("examples/accumulation.py", "--steps", "10")
    assert len(losses) == 20 and losses[9] < losses[0]
    assert max(norms) > 1.0
    assert float(output.split("within ")[1]) < 1e-4


def test_muon() -> None:
    losses, norms, output = _run("examples/muon.py", "--steps", "30")
    assert len(losses) == 30 and losses[-1] < losses[0] / 2
    counted, whole = map(float, re.findall(r"norms? .*?: ([\d.]+)", output))
    assert 0.0 < counted < whole and max(norms) < whole


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """The twin: a copy that adds up the micro-batches and does not take their mean."""
    text = (_ROOT / "examples" / "accumulation.py").read_text()
    mean = "(loss / micro_batches).backward()"
    assert mean in text
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace(mean, "loss.backward()"))
    *_, output = _run(str(wrong), "--steps", "2")
    assert float(output.split("within ")[1]) > 0.1


def test_lora() -> None:
    """The Clipper is attached: the loop has no line for clipping, and the first steps need it."""
    losses, norms, _ = _run("examples/lora.py")
    assert len(losses) == 7 and losses[-1] < 0.8 * losses[0]
    assert max(norms) > 1.0


def test_dpo() -> None:
    """It learns, and the batch whose labels are swapped is the one that is clipped."""
    losses, norms, output = _run("examples/dpo.py")
    assert len(losses) == 7 and losses[-1] < 0.2 * losses[0]
    clipped = [line for line in output.splitlines() if line.endswith(", clipped")]
    assert len(clipped) == 1 and clipped[0].startswith("[Train Step 30]")
    assert norms[3] == max(norms) > 0.5


def test_monitor(tmp_path: Path) -> None:
    """The parameter whose gradients explode is named first, and only then."""
    for culprit in ("", "blocks.1.qkv.weight"):
        command = ["examples/monitor.py", "--steps", "30", "--out", str(tmp_path / "m.png")]
        *_, output = _run(*command, *(["--culprit", culprit] if culprit else []))
        _, parts = output.split("its largest parts:\n")
        first, share = parts.splitlines()[0].split()[0], parts.splitlines()[0].split()[2]
        assert (first == culprit and float(share.rstrip("%")) > 80) == bool(culprit)
        assert (tmp_path / "m.png").stat().st_size > 50_000
