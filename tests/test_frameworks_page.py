"""docs/frameworks.md shows what the integration tests recorded, where none of them can run."""

from tests.integrations import record


def test_the_table_is_the_record() -> None:
    entries = record.read()
    assert entries
    assert record.shown(record.PAGE.read_text()) == record.table(entries)


def test_the_recorded_versions_are_the_ones_installed_together() -> None:
    """The extra ``integrations`` pins what was verified."""
    pinned = (record.ROOT / "pyproject.toml").read_text()
    for entry in record.read():
        for package, version in entry.versions.items():
            if f'"{package}==' in pinned:
                assert f'"{package}=={version}"' in pinned, entry
