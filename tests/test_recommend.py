"""Recommendations: the figures, that each says why and whence, and that the page shows the same."""

import re
from pathlib import Path

import pytest

import fusedclip
from fusedclip import Recommendation, cli, recommend
from fusedclip.recommendation import TASKS

PAGE = Path(__file__).parent.parent / "docs" / "choosing-a-threshold.md"

# task, lora, qlora -> start, lowest, highest, required
EXPECTED = {
    ("sft", False, False): (1.0, 1.0, 1.0, False),
    ("sft", True, False): (1.0, 1.0, 1.0, False),
    ("sft", False, True): (0.5, 0.5, 1.0, False),
    ("dpo", False, False): (1.0, 0.5, 1.0, False),
    ("dpo", True, False): (1.0, 0.5, 1.0, False),
    ("dpo", False, True): (0.5, 0.5, 1.0, False),
    ("kto", False, False): (1.0, 0.5, 1.0, False),
    ("kto", False, True): (0.5, 0.5, 1.0, False),
    ("ppo", False, False): (0.5, 0.5, 1.0, False),
    ("ppo", True, True): (0.5, 0.5, 1.0, False),
    ("pretrain", False, False): (1.0, 1.0, 1.0, True),
    ("explore", False, False): (1.0, 1.0, 2.0, False),
    ("explore", True, False): (1.0, 1.0, 2.0, False),
}


def rows() -> list[str]:
    """The table of the page, as it must be."""
    cases = [(task, {}) for task in TASKS]
    cases[1:1] = [("sft", {"lora": True}), ("sft", {"qlora": True})]
    table = []
    for task, options in cases:
        found = recommend(task, **options)
        name = " ".join([f"`{task}`", *(f"`--{option}`" for option in options)])
        usual = f"{found.low}" if found.low == found.high else f"{found.low} to {found.high}"
        need = ", required" if found.required else ""
        table.append(f"| {name} | **{found.max_norm}** | {usual}{need} | {found.reason} |")
    return table


@pytest.mark.parametrize(("case", "expected"), EXPECTED.items(), ids=str)
def test_figures(case: tuple[str, bool, bool], expected: tuple[float, float, float, bool]) -> None:
    task, lora, qlora = case
    found = recommend(task, lora=lora, qlora=qlora)
    assert (found.max_norm, found.low, found.high, found.required) == expected


def test_all_tasks_are_covered() -> None:
    assert {task for task, *_ in EXPECTED} == set(TASKS)


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_each_has_a_reason_and_a_source(case: tuple[str, bool, bool]) -> None:
    task, lora, qlora = case
    found = recommend(task, lora=lora, qlora=qlora)
    assert 0 < found.low <= found.max_norm <= found.high
    assert "\n" not in found.reason and len(found.reason) < 200  # one line each
    assert re.search(r"arXiv \d{4}\.\d{4,5}|TrainingArguments|Transformers", found.source)
    assert found.reason in str(found) and found.source in str(found)


def test_adapters_change_the_reason() -> None:
    reasons = {recommend("sft", **o).reason for o in ({}, {"lora": True}, {"qlora": True})}
    assert len(reasons) == 3
    assert "0.3 (arXiv 2305.14314" in recommend("sft", qlora=True).source


def test_what_it_reads_like() -> None:
    lines = str(recommend("dpo")).splitlines()
    assert lines[0] == "max_norm=1.0 (0.5 to 1.0)"
    assert lines[1].startswith("Why: ") and "beta near 0.1" in lines[1]
    assert lines[2].startswith("Source: ")
    assert str(recommend("pretrain")).splitlines()[0] == "max_norm=1.0, required"


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"^task: expected one of \('sft', .*\), got 'rlhf'$"):
        recommend("rlhf")
    for options in ({"lora": True}, {"qlora": True}):
        with pytest.raises(ValueError, match="trains every weight, so there are no adapters"):
            recommend("pretrain", **options)
    with pytest.raises(TypeError):
        recommend("sft", True)  # type: ignore[misc]


def test_the_name_is_the_function_whatever_was_imported() -> None:
    """Its module must not take its place in the package."""
    assert fusedclip.recommend is recommend
    assert isinstance(fusedclip.recommend("sft"), Recommendation)


class TestCommand:
    def test_it_prints_the_recommendation(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["recommend", "--task", "sft", "--qlora"]) == 0
        assert capsys.readouterr().out == f"{recommend('sft', qlora=True)}\n"
        assert cli.main(["recommend", "--task", "sft", "--lora"]) == 0
        assert capsys.readouterr().out == f"{recommend('sft', lora=True)}\n"

    def test_mistakes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["recommend", "--task", "pretrain", "--lora"]) == cli.BAD_USAGE
        assert capsys.readouterr().err.startswith('fusedclip recommend: task="pretrain"')
        with pytest.raises(SystemExit, match="2"):
            cli.main(["recommend", "--task", "rlhf"])
        assert "sft" in capsys.readouterr().err  # the choices


def test_the_page_has_this_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("<!-- recommend:begin -->")[1].split("<!-- recommend:end -->")[0]
    found = table.strip().splitlines()[2:]
    expected = rows()
    assert found == expected, "\n".join(["the page should say:", *expected])


def test_the_page_cites_every_paper() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for task in TASKS:
        for paper in re.findall(r"\d{4}\.\d{5}", recommend(task).source):
            assert paper in text, f"{paper}, a source for {task}"


@pytest.mark.parametrize("task", TASKS)
def test_policies_are_named_where_they_help(task: str) -> None:
    found = recommend(task)
    names = re.findall(r"(\w+)\(\)", found.beside)
    assert all(hasattr(fusedclip, name) for name in names)
    assert bool(names) == (task in ("pretrain", "explore"))
    assert ("Beside it:" in str(found)) == bool(names)
