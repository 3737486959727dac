"""bench/sass.py reads loops and look-ups out of a disassembly; the page shows what it found."""

import json

import pytest

from bench import markers, sass

_LINE = "        /*{:04x}*/               {} ;"


def _text(*code: str) -> str:
    """A disassembly: instructions at their addresses, labels ``L:`` before what they stand for."""
    labels, lines = {}, []
    for text in code:
        if text.endswith(":"):
            labels[text[:-1]] = 16 * len(lines)
        else:
            lines.append(text)
    for name, at in labels.items():
        lines = [line.replace(f"<{name}>", f"{at:#x}") for line in lines]
    return "\n".join(_LINE.format(16 * k, line) for k, line in enumerate(lines))


_LOAD = "LDG.E.128.STRONG.GPU R4, desc[UR8][R2.64]"
_MEASURING = [
    "loop:", _LOAD, _LOAD, "ISETP.NE.AND P1, PT, R9, RZ, PT", "@P1 BRA <other>",
    *["FFMA R8, R4, R4, R8"] * 8, "BRA <end>",
    "other:", *["HADD2.F32 R8, -RZ, R4.H0_H0"] * 20,
    "end:", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA <loop>", "EXIT",
]  # fmt: skip


def test_a_turn_is_counted_by_its_dtype() -> None:
    """The branch that was taken, not the other, not two turns."""
    figures = sass.clip_figures(_text(*_MEASURING))
    assert figures["measuring"] == {
        "fp32": (4 + 9 + 2) / 2, "fp64": None, "fp16": (4 + 20 + 2) / 2, "bf16": None,
    }  # fmt: skip
    assert set(figures["scaling"].values()) == {None}
    assert figures["code_bytes"] == 16 * (4 + 9 + 20 + 3)


def test_a_turn_that_stores_is_no_measuring() -> None:
    store = "STG.E.128.STRONG.GPU desc[UR8][R2.64], R4"
    code = ["loop:", _LOAD, *["FMUL R4, R4, R9"] * 4, store, "@P0 BRA <loop>", "EXIT"]
    figures = sass.clip_figures(_text(*code))
    assert figures["scaling"]["fp32"] == 7 and figures["measuring"]["fp32"] is None


@pytest.mark.parametrize("look_ups", [0, 1, 3])
def test_look_ups_that_follow_one_another(look_ups: int) -> None:
    """By their addresses; arithmetic between them does not hide that, and others do not count."""
    code = ["LDC R9, c[0x0][0x218]", "LDG.E R20, desc[UR8][R22.64]", "IMAD.WIDE R2, R9, 0x8, R6"]
    for _ in range(look_ups):
        code += ["LDG.E.64 R10, desc[UR8][R2.64]", "IADD3 R2, R10, 0x10, RZ", "MOV R3, R11"]
    figures = sass.clip_figures(_text(*code, "loop:", _LOAD, "@P0 BRA <loop>", "EXIT"))
    assert figures["dependent_loads"] == look_ups


def test_a_look_up_that_a_branch_waits_for() -> None:
    code = ["LDC R9, c[0x0][R5+0x218]", "ISETP.NE.AND P2, PT, R9, RZ, PT", "@P2 BRA <loop>", "EXIT"]
    figures = sass.clip_figures(_text(*code, "loop:", _LOAD, "@P0 BRA <loop>", "EXIT"))
    assert figures["dependent_loads"] == 1


def test_the_page_shows_the_file() -> None:
    results = json.loads((sass.RESULTS / "sass.json").read_text())
    page = sass._PAGE.read_text()
    assert markers.between_markers(page, "sass", sass.table(results)) == page
    before, after = results["before"]["90"], results["after"]["90"]
    assert before["measuring"]["fp32"] > after["measuring"]["fp32"] > 9
    results["after"]["90"]["registers"] += 1  # the twin
    assert markers.between_markers(page, "sass", sass.table(results)) != page
