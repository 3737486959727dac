"""The program on a CPU: measure what is asked for, show it, write it."""

import argparse

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import fusedclip

from .measure import HostCost, environment, host_cost, measure, peak_extra_bytes
from .report import Report, plot, screen_table, write_markdown
from .workloads import WORKLOADS, equal


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    device = torch.device(arguments.device)
    chosen = [w for w in WORKLOADS if arguments.only.lower() in w.name.lower()]
    if not chosen:
        names = ", ".join(dict.fromkeys(w.name for w in WORKLOADS))
        console.print(f"no workload is named like {arguments.only!r}; there are: {names}")
        return 2
    where = environment(device)
    results = [
        measure(workload, device, arguments.seconds)
        for workload in track(chosen, "measuring", console=console, transient=True)
    ]
    report = Report(where, results, _host_costs(arguments.seconds), _peak())
    console.print(screen_table(results))
    for note in report.notes():
        console.print(note, highlight=False)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    if arguments.plot is not None:
        plot(report, arguments.plot)
    if arguments.markdown is not None:
        write_markdown(report, arguments.markdown)
    return 0


def _host_costs(seconds: float) -> dict[str, HostCost]:
    rounds = max(5, round(50 * seconds))
    return {
        "torch": host_cost(nn.utils.clip_grad_norm_, max(5, rounds // 10)),
        "fusedclip": host_cost(fusedclip.clip_, rounds),
    }


def _peak() -> int | None:
    parameters = equal(120, 333_333).parameters(torch.device("cpu"))
    fusedclip.clip_(parameters[:2], 1.0)  # threads and code are there before the measurement
    return peak_extra_bytes(lambda: fusedclip.clip_(parameters, 1.0))
