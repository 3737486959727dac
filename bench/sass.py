"""What the compiler made of csrc/cuda: ``python -m bench.sass --json PATH`` and ``--page``.

Needs nvcc and no GPU. Each figure is read from the disassembly of the clip with the L2 norm and a
table in its parameters, for each architecture:

- instructions of one turn of the measuring and of the scaling loop, for 16 bytes of a thread: the
  fewest of a turn that loads, computes and (for scaling) stores;
- dependent loads before the first data load: the longest chain of look-ups by a computed address
  that the first 16 bytes wait for, through registers and branches, where no look-up has to be
  repeated; and whether the search for an entry is a loop beside that;
- registers, static shared memory, spills, bytes of code.
"""

import argparse
import heapq
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .json_file import write_whole
from .markers import put_between_markers

_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = ("80", "90", "100")
DTYPES = ("fp32", "fp64", "fp16", "bf16")
_VECTOR_LOAD, _VECTOR_STORE = re.compile(r"LDG\.E\.128"), re.compile(r"STG\.E\.128")

# What only the arithmetic of a dtype has: unpacking and products when measuring, packing when
# scaling.
_SIGNATURES = {
    False: {
        "fp32": re.compile(r"^FFMA"),
        "fp64": re.compile(r"^(DFMA|DMUL)"),
        "fp16": re.compile(r"^HADD2\.F32"),
        "bf16": re.compile(r"^(PRMT|IMAD\.U32|IMAD\.SHL|SHL)|^LOP3\.LUT .*(-0x10000|0xffff0000)"),
    },
    True: {
        "fp32": re.compile(r"^FMUL"),
        "fp64": re.compile(r"^DMUL"),
        "fp16": re.compile(r"^F2FP\.(F16|PACK_AB)"),
        "bf16": re.compile(r"^F2FP\.BF16"),
    },
}
# Where products leave fp32's range they are taken again in fp64: a block with many conversions.
_TO_FP64, _MOST_TO_FP64 = re.compile(r"^F2F\.F64"), 8


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # a predicate, as "!P0", or empty
    text: str  # opcode and operands

    @property
    def opcode(self) -> str:
        return self.text.split(" ", 1)[0]


@dataclass
class Block:
    """Instructions that run one after the other, and where they can go on."""

    code: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def count(self, pattern: "re.Pattern[str]") -> int:
        return sum(pattern.search(i.text) is not None for i in self.code)


def parse(sass: str) -> list[Instruction]:
    found = []
    for line in sass.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", line)
        if match:
            found.append(Instruction(int(match[1], 16), match[2] or "", match[3]))
    return found


def blocks_of(code: Sequence[Instruction]) -> dict[int, Block]:
    """The control flow graph, by the address of each block."""
    starts = {code[0].address}
    targets: dict[int, int] = {}
    for this, following in zip(code, [*code[1:], None], strict=True):
        if re.match(r"(BRA|BRX|EXIT|RET|BREAK|WARPSYNC|BSYNC)", this.opcode):
            if this.opcode.startswith("BRA") and (to := re.search(r"(0x[0-9a-f]+)$", this.text)):
                targets[this.address] = int(to[1], 16)
                starts.add(targets[this.address])
            if following is not None:
                starts.add(following.address)
    blocks: dict[int, Block] = {}
    for at, this in enumerate(code):
        if this.address in starts:
            block = blocks[this.address] = Block()
        block.code.append(this)
        following_address = code[at + 1].address if at + 1 < len(code) else None
        if following_address is None or following_address in starts:
            if this.address in targets:
                block.next.append(targets[this.address])
            # A branch on a condition may have it in its operands.
            conditional = this.guard or re.match(r"BRA\S* (\.|!?U?P\d|!?UR)", this.text)
            leaves = re.match(r"(BRA|BRX|EXIT|RET)", this.opcode) and not conditional
            if not leaves and following_address is not None:
                block.next.append(following_address)
    # A jump through a table leads to what nothing else leads to.
    reached = {to for block in blocks.values() for to in block.next}
    for block in blocks.values():
        if block.code[-1].opcode.startswith("BRX"):
            block.next += [at for at in blocks if at not in reached and at != code[0].address]
    return blocks


def shortest(blocks: Mapping[int, Block], start: int, goal: int, within: set[int]) -> list[int]:
    """The path of fewest instructions, both ends included; empty when there is none."""
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, start, (start,))]
    seen: set[int] = set()
    while queue:
        length, at, path = heapq.heappop(queue)
        if at == goal:
            return list(path)
        if at in seen:
            continue
        seen.add(at)
        for to in blocks[at].next:
            if to in within and to not in seen and to > min(within):  # not a second turn
                heapq.heappush(queue, (length + len(blocks[at].code), to, (*path, to)))
    return []


def loops(blocks: Mapping[int, Block]) -> list[tuple[int, int, set[int]]]:
    """(head, block that jumps back, all blocks) of each loop."""
    found = []
    for latch, block in blocks.items():
        for head in block.next:
            if head <= latch and head in blocks:
                found.append((head, latch, {at for at in blocks if head <= at <= latch}))
    return found


def turns(blocks: Mapping[int, Block], dtype: str, stores: bool) -> list[tuple[int, int]]:
    """(instructions, vectors) of a turn of each innermost loop that moves data of that type."""
    found = []
    every = loops(blocks)
    for head, latch, inside in every:
        moving = [b for b in sorted(inside) if blocks[b].count(_VECTOR_LOAD)]
        storing = [b for b in sorted(inside) if blocks[b].count(_VECTOR_STORE)]
        inner = any(head <= h and t <= latch and (h, t) != (head, latch) and i & {*moving}
                    for h, t, i in every)  # fmt: skip
        computing = _computing(blocks, inside, dtype, stores)
        if not moving or inner or computing is None or bool(storing) != stores:
            continue
        # Either one block of loads and one of stores, or all of them, where each has its own.
        ways = [[head, b, computing, *([s] if stores else []), latch]
                for b in moving for s in (storing or [0])]  # fmt: skip
        ways.append([head, *sorted({*moving, computing, *storing}), latch])
        for way in ways:
            path = _through(blocks, inside, way)
            moved = sum(blocks[b].count(_VECTOR_LOAD) for b in path)
            stored = sum(blocks[b].count(_VECTOR_STORE) for b in path)
            if path and (stored == moved or not stores):
                found.append((sum(len(blocks[b].code) for b in path), moved))
    return found


def _computing(
    blocks: Mapping[int, Block], inside: Iterable[int], dtype: str, stores: bool
) -> int | None:
    """The block with most of a dtype's own instructions, if there is one; not the rare fp64 one."""
    counts = {}
    for b in inside:
        here = {name: blocks[b].count(p) for name, p in _SIGNATURES[stores].items()}
        wide = blocks[b].count(_TO_FP64) > _MOST_TO_FP64
        other = dtype == "fp32" and max(here["fp16"], here["bf16"]) >= 8
        counts[b] = 0 if wide or other else here[dtype]
    best = max(counts, key=lambda b: counts[b], default=None)
    return best if best is not None and counts[best] >= 2 else None


def _through(blocks: Mapping[int, Block], inside: set[int], stops: Sequence[int]) -> list[int]:
    path = [stops[0]]
    for begin, end in pairwise(stops):
        part = shortest(blocks, begin, end, inside)
        if not part:
            return []
        path += part[1:]
    return path


_WIDTH = {"64": 2, "128": 4, "WIDE": 2}
_NAME = re.compile(r"\b(U?R\d+|U?P\d)\b")
_LOOK_UP = re.compile(r"^(LDG|LD|LDC|LDCU|ULDC|LDL)\b.*(\[U?R\d+|desc\[)")


def dependent_loads(code: Sequence[Instruction]) -> int:
    """How many look-ups, one after the other, the first 16 bytes of data wait for."""
    depth: dict[str, int] = {}
    branch = 0
    for this in code:
        _, _, operands = this.text.partition(" ")
        names = _NAME.findall(operands) + ([this.guard.lstrip("!")] if this.guard else [])
        if _VECTOR_LOAD.match(this.text):
            return max([branch, *(depth.get(name, 0) for name in _wide(names))])
        found = max([0, *(depth.get(name, 0) for name in names)])
        if this.opcode.startswith("BRA"):
            branch = max(branch, found)
        if _LOOK_UP.match(this.text):
            found = 1 + max(found, branch)
        first = operands.split(",", 1)[0]
        written = _NAME.findall(first) if not this.opcode.startswith(("ST", "BRA")) else []
        if re.match(r"(U?ISETP|FSETP|DSETP|LOP3|PLOP3)", this.opcode):
            written += _NAME.findall(",".join(operands.split(",")[:2]))[:2]
        for name in written:
            kind, number = re.match(r"(\D+)(\d+)", name).groups()  # type: ignore[union-attr]
            width = max(w if f".{t}" in this.opcode else 1 for t, w in _WIDTH.items())
            for k in range(width if kind.endswith("R") else 1):
                depth[f"{kind}{int(number) + k}"] = found
    return 0


def _wide(names: Iterable[str]) -> list[str]:
    """The registers of 64-bit addresses: the one that is named and the next."""
    return [
        f"{match[1]}{int(match[2]) + k}"
        for name in names
        if (match := re.match(r"(\D+)(\d+)", name))
        for k in (0, 1)
    ]


def clip_figures(sass: str) -> dict[str, Any]:
    """The figures of one kernel that measures and scales."""
    code = parse(sass)
    blocks = blocks_of(code)
    measuring: dict[str, float | None] = {}
    scaling: dict[str, float | None] = {}
    for dtype in DTYPES:
        for stores, figures in ((False, measuring), (True, scaling)):
            each = [length / moved for length, moved in turns(blocks, dtype, stores) if moved]
            figures[dtype] = min(each) if each else None
    first = min(b for b in blocks if blocks[b].count(_VECTOR_LOAD))
    way = shortest(blocks, code[0].address, first, set(blocks))
    linear = [i for b in way for i in blocks[b].code]
    return {
        "measuring": measuring,
        "scaling": scaling,
        "dependent_loads": dependent_loads(linear),
        "code_bytes": 16 * len(code),
    }


def figures_of(csrc: Path, architecture: str) -> dict[str, Any]:
    """Of the clip with the largest table in its parameters, and of all kernels."""
    texts: dict[str, str] = {}
    usage: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        for source in sorted((csrc / "cuda").glob("*.cu")):
            output(
                tool("nvcc"), "-O3", "-std=c++17", "-cubin", f"-arch=sm_{architecture}",
                f"-I{csrc}", str(source), "-o", cubin,
            )  # fmt: skip
            _, *kernels = output(tool("cuobjdump"), "-sass", cubin).split("Function : ")
            texts |= {text.split("\n", 1)[0].strip(): text for text in kernels}
            report = output(tool("cuobjdump"), "-res-usage", cubin)
            pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+)"
            usage |= {name: (int(r), int(s)) for name, r, s in re.findall(pattern, report)}
    clips = [n for n in texts if "ClipKernel" in n and "NormKindE0" in n and "ParameterTable" in n]
    whole = [n for n in clips if "PhaseE" not in n or "PhaseE3" in n]
    kernel = max(whole, key=lambda n: [int(e) for e in re.findall(r"TableILi(\d+)E", n)])
    return {
        **clip_figures(texts[kernel]),
        "registers": usage[kernel][0],
        "stack": max(stack for _, stack in usage.values()),
        "kernels": len(texts),
        "all_code_bytes": 16 * sum(len(parse(text)) for text in texts.values()),
    }


def tool(name: str) -> str:
    """nvcc's own, or the one in Triton's package."""
    found = shutil.which(name)
    if found is None:
        triton = importlib.util.find_spec("triton")
        if triton is None or triton.origin is None:
            raise FileNotFoundError(f"{name}: it comes with the CUDA toolkit and with triton")
        found = str(Path(triton.origin).parent / "backends/nvidia/bin" / name)
    return found


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_ROWS = (
    *((f"measuring, {d}: instructions for 16 bytes", ("measuring", d)) for d in DTYPES),
    *((f"scaling, {d}: instructions for 16 bytes", ("scaling", d)) for d in DTYPES),
    ("dependent look-ups before the data, at best", ("dependent_loads",)),
    ("registers of a thread", ("registers",)),
    ("spilled, of any kernel (bytes)", ("stack",)),
    ("code of the clip (KB)", ("code_bytes",)),
    ("code of all kernels (KB), their number", ("all_code_bytes",)),
)


def table(results: Mapping[str, Any]) -> str:
    """Before → after, a column for each architecture."""
    before, after = results["before"], results["after"]
    lines = [
        "| | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|" + "---|" * len(ARCHITECTURES),
    ]
    for name, path in _ROWS:
        cells = []
        for architecture in ARCHITECTURES:
            values = [_cell(side[architecture], path) for side in (before, after)]
            cells.append(" → ".join(values) if values[0] != values[1] else values[0])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(figures: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = figures
    for key in path:
        value = value[key]
    if path[0].endswith("code_bytes"):
        rest = f", {figures['kernels']}" if path[0] == "all_code_bytes" else ""
        return f"{value / 1000:.0f}{rest}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.sass", description=__doc__.split("\n")[0])
    parser.add_argument("--csrc", type=Path, default=_ROOT / "csrc")
    parser.add_argument("--as", dest="version", choices=("before", "after"), default="after")
    parser.add_argument("--json", type=Path, default=RESULTS / "sass.json")
    parser.add_argument("--page", action="store_true", help="write the table of the page anew")
    arguments = parser.parse_args(argv)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if not arguments.page:
        results["nvcc"] = output(tool("nvcc"), "--version").strip().splitlines()[-1]
        results[arguments.version] = {
            architecture: figures_of(arguments.csrc, architecture) for architecture in ARCHITECTURES
        }
        write_whole(results, arguments.json)
    if "before" in results and "after" in results:
        put_between_markers(_PAGE, "sass", table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
