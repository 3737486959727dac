"""The command line: ``fusedclip``, which is also ``python -m fusedclip``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedclip.recommendation import TASKS, recommend

if TYPE_CHECKING:
    from fusedclip.compare import Train

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
BAD_USAGE = 2  # what argparse ends with


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("rich", "matplotlib"):
            raise
        extra = arguments.command
        print(f"fusedclip {extra} needs {error.name}: pip install 'fusedclip[{extra}]'")
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedclip", description="Gradient clipping for PyTorch as one fused pass."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what can run here, and whether it works")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="train a small language model with and without it")
    demo.add_argument("--lr", type=float, default=4.0, help="after warm-up (default: %(default)s)")
    _add_arm_options(demo, max_norm=0.5)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure it side by side with torch")
    bench.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    bench.add_argument("--only", default="", help="workloads whose name contains this")
    bench.add_argument("--seconds", type=float, default=4.0, help="per workload (default: 4)")
    bench.add_argument("--json", type=Path, help="write everything measured to this file")
    bench.add_argument("--plot", type=Path, help="draw the ratios to this picture (CPU)")
    bench.add_argument("--markdown", type=Path, help="write the table into this file (CPU)")
    bench.add_argument(
        "--compiled", action="store_true",
        help="torch.compile's clip in place of the others; adds its column to --json (GPU)",
    )  # fmt: skip
    bench.add_argument(
        "--yardstick-bytes", type=int, default=2 << 30, help="default: %(default)s (GPU)"
    )
    bench.set_defaults(run=_bench)

    recommend = commands.add_parser("recommend", help="where to start with the threshold")
    recommend.add_argument("--task", required=True, choices=TASKS)
    recommend.add_argument("--lora", action="store_true", help="only adapters are trained")
    recommend.add_argument("--qlora", action="store_true", help="the same on a 4-bit base model")
    recommend.set_defaults(run=_recommend)

    compare = commands.add_parser("compare", help="your training with and without clipping")
    compare.add_argument("function", metavar="module:function", help="see fusedclip.compare.Run")
    _add_arm_options(compare, max_norm=1.0)
    compare.set_defaults(run=_compare)

    run = commands.add_parser(
        "run",
        help="run a training command with torch's clip replaced",
        usage="fusedclip run [--max-norm X] [--skip-above X] [--monitor] -- COMMAND ...",
        description="Run a Python script, '-m module' or any command as it is, with fusedclip "
        "behind torch.nn.utils.clip_grad_norm_ and its relatives, in child processes too.",
    )
    run.add_argument(
        "--max-norm", metavar="X", help="a threshold in place of the one that the training passes"
    )
    run.add_argument(
        "--skip-above", metavar="X", help="leave out the optimizer's step if the norm is larger"
    )
    run.add_argument(
        "--monitor", action="store_true", help="say at the end what was clipped, and what to do"
    )
    run.add_argument(
        "--env", action="store_true", help="print the shell's exports that do the same, and end"
    )
    run.add_argument("training", nargs=argparse.REMAINDER, metavar="COMMAND")
    run.set_defaults(run=_run)
    return parser


def _add_arm_options(parser: argparse.ArgumentParser, max_norm: float) -> None:
    name = parser.prog.split()[-1]
    parser.add_argument("--steps", type=int, default=300, help="per arm (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    parser.add_argument("--max-norm", type=float, default=max_norm, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(name), help="folder for what it writes")


def _doctor(arguments: argparse.Namespace) -> int:
    from fusedclip.doctor import examine, render

    report = examine()
    print(render(report))
    return 1 if report.problems else 0


def _demo(arguments: argparse.Namespace) -> int:
    import functools

    from fusedclip.demo import training
    from fusedclip.demo.language_model import standard_library_text

    train = functools.partial(training.train, text=standard_library_text(), lr=arguments.lr)
    title = f"A small transformer learns Python's own sources: SGD, lr {arguments.lr:g}"
    return _run_arms(train, arguments, name="demo", title=title, arms=training.ARMS)


def _compare(arguments: argparse.Namespace) -> int:
    from fusedclip.compare import ARMS, load_function

    try:
        train = load_function(arguments.function)
    except ValueError as error:
        return _refuse(arguments, error)
    return _run_arms(train, arguments, name="compare", title=arguments.function, arms=ARMS)


def _run_arms(train: "Train", arguments: argparse.Namespace, **options: Any) -> int:
    from rich.console import Console

    from fusedclip.compare import Settings
    from fusedclip.compare.report import run

    try:
        settings = Settings(arguments.max_norm, arguments.steps, arguments.seed, arguments.device)
    except ValueError as error:
        return _refuse(arguments, error)
    comparison = run(train, settings, arguments.out, Console(), **options)
    return INTERRUPTED if comparison.interrupted else 0


def _refuse(arguments: argparse.Namespace, error: ValueError) -> int:
    print(f"fusedclip {arguments.command}: {error}", file=sys.stderr)
    return BAD_USAGE


def _recommend(arguments: argparse.Namespace) -> int:
    try:
        print(recommend(arguments.task, lora=arguments.lora, qlora=arguments.qlora))
    except ValueError as error:
        return _refuse(arguments, error)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.device.startswith("cuda"):
        from fusedclip.bench.gpu_run import run
    else:
        from fusedclip.bench.run import run
    status: int = run(arguments)
    return status


def _run(arguments: argparse.Namespace) -> int:
    from fusedclip.launcher.command import Options, checked_threshold, exports, run

    command = arguments.training[arguments.training[:1] == ["--"] :]
    if not command and not arguments.env:
        print("fusedclip run: no COMMAND given; as in: fusedclip run -- train.py", file=sys.stderr)
        return BAD_USAGE
    try:
        max_norm, skip_above = (
            None if text is None else checked_threshold(name, text)
            for name, text in (
                ("max_norm", arguments.max_norm),
                ("skip_above", arguments.skip_above),
            )
        )
    except ValueError as error:
        print(f"fusedclip run: {error}", file=sys.stderr)
        return BAD_USAGE
    options = Options(max_norm, arguments.monitor, skip_above)
    if arguments.env:
        print(exports(options))
        return 0
    return run(command, options)
