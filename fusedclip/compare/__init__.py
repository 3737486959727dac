"""The control experiment: the same training with and without clipping, from the same seed.

``compare`` runs a training function once an arm. The function is given a ``Run``, builds everything
anew, and leaves the clipping to it:

>>> def train(run: Run) -> None:
...     model, batches = make_model().to(run.device), make_batches(run.seed)
...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
...     for step in run:  # ends after run.steps, or after the first NaN or infinite loss
...         loss = model.loss(next(batches))
...         loss.backward()
...         run.clip_(model)
...         optimizer.step()
...         optimizer.zero_grad()
...         run.report(loss, lr=0.1)
>>> comparison = compare(train, Settings(max_norm=1.0))
>>> print(comparison.verdict())

A loop that clips by itself, such as a framework's, takes ``run.max_norm`` (``inf`` in the control
arm) and reports the norm: ``run.report(loss, grad_norm=norm)``.

``experiment`` runs the arms, ``history`` holds their results, ``report`` shows them.
"""

from fusedclip.compare.experiment import ARMS, Clip, Finished, Run, Train, compare, load_function
from fusedclip.compare.history import Comparison, History, Settings

__all__ = [
    "ARMS",
    "Clip",
    "Comparison",
    "Finished",
    "History",
    "Run",
    "Settings",
    "Train",
    "compare",
    "load_function",
]
