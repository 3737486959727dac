"""``python -m bench.support``: its table; packaging and its builds have tests of their own."""

from bench import support


def test_table() -> None:
    rows = [support.Row("3.11.7", "2.13.0", "built"), support.Row("3.13.0", None, "loaded")]
    lines = support.markdown(rows).splitlines()
    assert lines[2:] == ["| 3.11.7 | 2.13.0 | built |", "| 3.13.0 | none | loaded |"]
