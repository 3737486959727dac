"""Offline, deterministic, on one thread; and the record of what passed (see ``record``)."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Before any of them is imported: no network, no trackers, no progress bars.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_DISABLED="true",
    CUDA_VISIBLE_DEVICES="",
)

from tests.integrations import record

_passed = pytest.StashKey[list[record.Entry]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", action="store_true",
        help="write what passes to tests/integrations/verified.json and docs/frameworks.md",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise pytest.UsageError(
            "tests/integrations needs the frameworks, which have an environment of their own: "
            "make test-integrations"
        )
    config.addinivalue_line("markers", "verifies(system, packages, what): see record.verifies")
    config.stash[_passed] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    entry = record.entry(item)
    if report.when == "call" and report.passed and entry is not None:
        item.config.stash[_passed].append(entry)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record"):
        from bench.markers import put_between_markers

        collected = {record.short_id(item) for item in session.items}
        record.write(record.updated(record.read(), session.config.stash[_passed], collected))
        put_between_markers(record.PAGE, "verified", record.table(record.read()))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in the same order in both runs of a comparison."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
