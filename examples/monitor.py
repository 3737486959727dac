"""What a Monitor shows: the demonstration's model, watched while it trains.

    python examples/monitor.py --out monitor.png
    python examples/monitor.py --culprit blocks.2.qkv.weight --out monitor-culprit.png

With --culprit the gradients of one parameter are 300 times as large for five steps, as a layer that
explodes; the summary has its name in the first line of parts, and it stands out in the picture.
"""

import argparse
from pathlib import Path

import torch

import fusedclip
from fusedclip.demo.language_model import LanguageModel, batches, standard_library_text
from fusedclip.demo.training import LR, MAX_NORM, learning_rate

FACTOR, LENGTH = 300.0, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--culprit", help="a parameter whose gradients explode for a while")
    parser.add_argument("--out", type=Path, default=Path("monitor.png"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    # The first norms are the largest of most runs: a window that leaves them behind.
    monitor = fusedclip.Monitor(MAX_NORM, window=2 * arguments.steps // 3)
    clipper = fusedclip.Clipper(model, MAX_NORM, monitor=monitor)
    clipper.attach(optimizer)  # optimizer.step() clips
    stream = batches(standard_library_text(), seed=0, device=torch.device("cpu"))
    explodes = range(2 * arguments.steps // 3, 2 * arguments.steps // 3 + LENGTH)
    for step in range(arguments.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(LR, step)
        loss = model.loss(*next(stream))
        loss.backward()
        if arguments.culprit and step in explodes:
            model.get_parameter(arguments.culprit).grad *= FACTOR
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(monitor.log_line(step, loss.item(), optimizer.param_groups[0]["lr"]))
    print(monitor.summary(), monitor.advice(), sep="\n")
    monitor.plot(arguments.out)


if __name__ == "__main__":
    main()
