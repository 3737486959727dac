"""The committed record says what this run says: the same tests, the versions installed here."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.integrations import record


def test_the_record_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--record"):
        pytest.skip("this run writes the record")
    now = {e.test: e for e in map(record.entry, request.session.items) if e is not None}
    committed = {e.test: e for e in record.read()}
    files = {name.partition("::")[0] for name in now}
    of_this_run = {t: e for t, e in committed.items() if t.partition("::")[0] in files}
    if request.config.option.keyword or any("::" in part for part in request.config.args):
        of_this_run = {test: e for test, e in of_this_run.items() if test in now}
    assert of_this_run == now, "run pytest tests/integrations --record"
    if set(map(Path, request.config.args)) == {Path("tests/integrations")}:
        assert files == {test.partition("::")[0] for test in committed}


def test_torch_is_the_pinned_one_and_nothing_brought_its_own() -> None:
    constraints = (record.ROOT / "constraints.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in constraints
    # Built for another torch, it breaks the import of transformers.
    assert importlib.util.find_spec("torchvision") is None
