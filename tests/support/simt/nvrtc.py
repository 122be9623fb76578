"""Kernels compiled by NVRTC, as CuPy compiles them, on a machine without a GPU, and the resources each needs.

    rows = nvrtc.resources(source, "sm_90", file="rows.cu")   one Resources for each extern "C" kernel of the text
    nvrtc.table([(label, source, chip), ...], jobs=2)         the same for many, as plain dicts in a fixed order
    nvrtc.write(file, about, rows), nvrtc.read(file)          one kernel per line of JSON, made for diffs
    nvrtc.differences(old, new)                               what changed, in words

`missing()` says what must be installed (cupy, the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime, and
nvidia-cuda-nvdisasm for the counts of wide accesses), or None. cuda/kernel_resources.py makes the table of this
library's own kernels.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel on one chip. Spills, stack and static shared memory in bytes; loads and stores of 128 bits.

    once: 128-bit loads marked evict-first. instructions, mufu, loops, executed: see `counted`. Everything from loads128
    on is None if the kernel was not disassembled.
    """

    kernel: str
    chip: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    loads128: int | None = None
    stores128: int | None = None
    once: int | None = None
    instructions: int | None = None
    mufu: int | None = None
    loops: list[list[int]] | None = None
    executed: list[Any] | None = None


NUMBERS = [field.name for field in fields(Resources)][2:]


def missing() -> str | None:
    """What this machine lacks to compile and disassemble; None if nothing."""
    try:
        import cupy  # noqa: F401
        from cupy._core import core

        version()
        core.assemble_cupy_compiler_options(())
    except Exception as error:  # libraries that cannot be loaded raise all sorts of exceptions
        return str(error) or type(error).__name__
    return None if _nvdisasm() else "needs nvdisasm (pip install nvidia-cuda-nvdisasm)"


def version() -> str:
    """Of NVRTC, since versions differ in how they allocate registers."""
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def cubin(source: str, chip: str, file: str = "kernel.cu", options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """(machine code, the compiler's log), with CuPy's options, and a log that reports resources."""
    from cupy._core import core
    from cupy.cuda import compiler

    options = core.assemble_cupy_compiler_options((*options, "--ptxas-options=-v"))
    options += ("-ftz=true", f"-arch={chip}", "--device-as-default-execution-space")
    log = io.StringIO()
    code, _ = compiler._NVRTCProgram(source, file, (), (), name_expressions=None, method="cubin").compile(options, log)
    return code + b"\0", log.getvalue()  # CuPy cuts the last byte, as the end of a string; nvdisasm misses it


def resources(
    source: str, chip: str, file: str = "kernel.cu", options: tuple[str, ...] = (), *, disassembled: bool = True
) -> list[Resources]:
    """The resources of each kernel of a text, by name; in half the time if it is not disassembled."""
    code, log = cubin(source, chip, file, options)
    machine_code = disassembly(code) if disassembled else {}
    found = []
    for kernel, text in _sections(log):

        def number(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found.append(
            Resources(
                kernel=kernel,
                chip=chip,
                registers=number(r"Used (\d+) registers"),
                spill_stores=number(r"(\d+) bytes spill stores"),
                spill_loads=number(r"(\d+) bytes spill loads"),
                stack=number(r"(\d+) bytes stack frame"),
                shared=number(r"(\d+) bytes smem"),
                **(counted(machine_code[kernel]) if disassembled else {}),
            )
        )
    return sorted(found, key=lambda row: row.kernel)


def disassembly(code: bytes) -> dict[str, str]:
    """The SASS of each kernel, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(_nvdisasm()), "-c", "-ndf", file.name]  # -ndf: no dataflow analysis, to save time
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.(\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


_LINE = re.compile(r"(?m)^(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([\w.]+)\s*([^;]*);")
_RARE = "PMTRIG"  # the instruction of `rare_path` in device.cuh
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # by a part of the opcode; else 4


class _Instruction(NamedTuple):
    opcode: str
    always: bool  # or only under a predicate
    names: str | None  # the label it refers to

    @property
    def operation(self) -> str:
        return self.opcode.partition(".")[0]


def counted(machine_code: str) -> dict[str, Any]:
    """The instructions of a kernel, how many of them are MUFU (special functions), its loops, and its wide accesses.

    NOP does not count. Every other instruction counts once, including those that run only in rare cases (behind a
    branch, in the functions called for a division) and those that a predicate turns off.

    A loop is what a backward branch repeats, to an instruction that every path into the loop passes; this excludes the
    rare code at the end of a kernel that branches back to where it came from. For each loop there are, without the
    loops inside it, [instructions, mufu, bytes, widest]: the bytes a thread loads per iteration (from global or from
    shared memory, whichever is more), or stores if it loads nothing; and its widest access to global memory. A loop
    that waits for a barrier moves none.

    executed: [instructions, mufu, loops] likewise, on the common path. Instructions under a predicate count, as they
    are issued anyway, and so do both sides of a branch if both are common. Not executed are basic blocks with a
    `rare_path` of device.cuh, blocks reached only from these or leading only to these, and called functions.
    """
    code, labels = _parsed(machine_code)
    ways = _ways(code, labels)
    bodies = _loops(code, ways)

    def work(of: set[int]) -> list[Any]:
        loops = []
        for body in bodies:
            within = body.difference(*(other for other in bodies if other < body)) & of
            if within:
                own = [code[at] for at in sorted(within)]
                loops.append([*_size(own), *_moved(own)])
        return [*_size(code[at] for at in of), loops]

    def accesses(pattern: str) -> int:
        return sum(re.fullmatch(pattern, instruction.opcode) is not None for instruction in code)

    instructions, mufu, loops = work(set(range(len(code))))
    return {
        "loads128": accesses(r"LDG\.E[.\w]*\.128"),
        "stores128": accesses(r"STG\.E[.\w]*\.128"),
        "once": accesses(r"LDG\.E\.EF[.\w]*\.128"),
        "instructions": instructions,
        "mufu": mufu,
        "loops": loops,
        "executed": work(_executed(code, ways)),
    }


def _moved(code: list[_Instruction]) -> tuple[int, int]:
    """(bytes that a thread moves, its widest access to global memory)."""
    moved, widest = dict.fromkeys(("LDG", "LDS", "STG", "STS"), 0), 0
    for instruction in code:
        if instruction.operation in moved:
            width = next((_BYTES[part] for part in instruction.opcode.split(".") if part in _BYTES), 4)
            moved[instruction.operation] += width
            widest = max(widest, width if instruction.operation.endswith("G") else 0)
    return max(moved["LDG"], moved["LDS"]) or max(moved["STG"], moved["STS"]), widest


def _parsed(machine_code: str) -> tuple[list[_Instruction], dict[str, int]]:
    """(instructions, for each label the index of the instruction that follows it)."""
    code: list[_Instruction] = []
    labels = {}
    for found in _LINE.finditer(machine_code):
        if found[1] is not None:
            labels[found[1]] = len(code)
            continue
        named = re.search(r"`\((\.L\w+)\)", found[4])
        always = found[2] is None and re.match(r"!?U?P\d", found[4]) is None
        code.append(_Instruction(found[3], always, named and named[1]))
    return code, labels


def _ways(code: list[_Instruction], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction, its successors, a branch target first; the end is one after the last."""
    ways: list[list[int]] = []
    for at, instruction in enumerate(code):
        leaves = instruction.operation in ("EXIT", "RET")
        goes = [len(code)] if leaves else []
        if instruction.operation == "BRA" and instruction.names in labels:
            goes = [labels[instruction.names]]
        away = instruction.always and (leaves or instruction.opcode in ("BRA", "BRA.U"))
        ways.append(goes if away else [*goes, at + 1])
    return ways


def _executed(code: list[_Instruction], ways: list[list[int]]) -> set[int]:
    """The instructions reachable from the first without a basic block that is marked as a rare path."""
    starts = {0, len(code)}
    for at, onward in enumerate(ways):
        if onward != [at + 1]:
            starts |= {at + 1, *onward}
    blocks = {first: range(first, end) for first, end in itertools.pairwise(sorted(starts))}
    onward_of = {first: ways[block[-1]] for first, block in blocks.items()}
    marked = (at for at, instruction in enumerate(code) if instruction.opcode == _RARE and instruction.always)
    rare = {max(first for first in blocks if first <= at) for at in marked}
    while more := {first for first, onward in onward_of.items() if rare.issuperset(onward)} - rare:
        rare |= more
    executed: set[int] = set()
    reached = [0]
    while reached:
        first = reached.pop()
        if first in blocks and first not in executed and first not in rare:
            executed.update(blocks[first])
            reached += onward_of[first]
    return executed


def _loops(code: list[_Instruction], ways: list[list[int]]) -> list[set[int]]:
    """The instructions of every loop, ordered by their first."""
    before: list[list[int]] = [[] for _ in range(len(code) + 1)]  # predecessors
    for at, onward in enumerate(ways):
        for to in onward:
            before[to].append(at)
    bodies: dict[int, set[int]] = {}
    for latch, head in ((at, onward[0]) for at, onward in enumerate(ways) if onward[0] < at):
        body, back = {head}, [latch]
        while back:
            at = back.pop()
            if at not in body:
                body.add(at)
                back += before[at]
        if 0 not in body:  # else it is no loop: some path into it bypasses `head`
            bodies[head] = bodies.get(head, set()) | body
    return [body for _, body in sorted(bodies.items())]


def _size(code: Iterable[_Instruction]) -> tuple[int, int]:
    """(instructions, how many are MUFU)."""
    operations = [instruction.operation for instruction in code]
    return len(operations) - operations.count("NOP"), operations.count("MUFU")


def table(
    work: Iterable[tuple[str, str, str]], jobs: int = 2, disassembled: Callable[[str], bool] = lambda chip: True
) -> list[dict]:
    """The resources of each (label, source, chip), as dicts that start with the label."""

    def rows(item: tuple[str, str, str]) -> list[dict]:
        file, source, chip = item
        return [{"file": file, **asdict(r)} for r in resources(source, chip, disassembled=disassembled(chip))]

    with ThreadPoolExecutor(jobs) as pool:  # NVRTC releases the GIL
        return [row for of_text in pool.map(rows, work) for row in of_text]


def write(file: Path, about: dict[str, str], rows: list[dict]) -> None:
    """Writes `about` (the table's own properties), then a line per kernel: its NUMBERS, chip by chip."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        of_kernel = kernels.setdefault(f"{row['file']} {row['kernel']}", {})
        of_kernel[row["chip"]] = [row[name] for name in NUMBERS]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(of_chip)}" for name, of_chip in sorted(kernels.items()))
    head = json.dumps({**about, "numbers": NUMBERS})[:-1]
    file.write_text(f'{head}, "kernels": {{\n{lines}\n}}}}\n')


def read(file: Path) -> tuple[dict[str, str], list[dict]]:
    """(the table's own properties, rows)."""
    about = json.loads(file.read_text())
    numbers, kernels = about.pop("numbers"), about.pop("kernels")
    rows = []
    for key, of_chip in kernels.items():
        name = dict(zip(("file", "kernel"), key.split(" "), strict=True))
        rows += [{**name, "chip": chip, **dict(zip(numbers, row, strict=True))} for chip, row in of_chip.items()]
    return about, rows


def differences(old: list[dict], new: list[dict]) -> list[str]:
    """What differs between two tables, a line for each kernel."""
    before, after = ({(row["file"], row["kernel"], row["chip"]): row for row in rows} for rows in (old, new))
    said = [f"{' '.join(key)}: only in the old table" for key in before if key not in after]
    for key, row in after.items():
        was = before.get(key)
        if was is None:
            said.append(f"{' '.join(key)}: only in the new table")
        elif was != row:
            changes = ", ".join(f"{name} {was.get(name)} → {row[name]}" for name in row if was.get(name) != row[name])
            said.append(f"{' '.join(key)}: {changes}")
    return said


def _sections(log: str) -> Iterator[tuple[str, str]]:
    """(kernel, what ptxas reports about it)."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    return zip(parts[1::2], parts[2::2], strict=True)


def _nvdisasm() -> str | None:
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = found or next((str(file) for file in sorted(Path(folder).glob("*/bin/nvdisasm"))), None)
    return found
