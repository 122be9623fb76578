"""Kernels compiled by NVRTC, as CuPy compiles them, on a machine without a GPU: what each takes of a chip.

    rows = nvrtc.resources(source, "sm_90", file="rows.cu")   one Resources for each extern "C" kernel of the text
    nvrtc.table([(label, source, chip), ...], jobs=2)         the same for many, as plain dicts in a fixed order
    nvrtc.write(file, about, rows), nvrtc.read(file)          one kernel a line of JSON, made for diffs
    nvrtc.differences(old, new)                               what changed, in words

`missing()` says what must be installed (cupy, the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime, and
nvidia-cuda-nvdisasm for the counts of wide accesses), or None. ../kernel_resources.py makes the table of this
library's own kernels.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel on one chip. Spills and stack in bytes, shared: static bytes, loads and stores of 128 bits."""

    kernel: str
    chip: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    loads128: int
    stores128: int


NUMBERS = [field.name for field in fields(Resources)][2:]


def missing() -> str | None:
    """What this machine lacks to compile and to disassemble; None if nothing."""
    try:
        import cupy  # noqa: F401
        from cupy._core import core

        version()
        core.assemble_cupy_compiler_options(())
    except Exception as error:  # what is raised where a library is not there differs from library to library
        return str(error) or type(error).__name__
    return None if _nvdisasm() else "needs nvdisasm (pip install nvidia-cuda-nvdisasm)"


def version() -> str:
    """Of NVRTC: another one allots registers otherwise."""
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def cubin(source: str, chip: str, file: str = "kernel.cu", options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """(machine code, the compiler's log) with the options that CuPy gives, and a log that tells of resources."""
    from cupy._core import core
    from cupy.cuda import compiler

    options = core.assemble_cupy_compiler_options((*options, "--ptxas-options=-v"))
    options += ("-ftz=true", f"-arch={chip}", "--device-as-default-execution-space")
    log = io.StringIO()
    code, _ = compiler._NVRTCProgram(source, file, (), (), name_expressions=None, method="cubin").compile(options, log)
    return code + b"\0", log.getvalue()  # CuPy takes the last byte for the end of a string; nvdisasm misses it


def resources(source: str, chip: str, file: str = "kernel.cu", options: tuple[str, ...] = ()) -> list[Resources]:
    """What each kernel of a text takes, in the order of their names."""
    code, log = cubin(source, chip, file, options)
    machine_code = disassembly(code)
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
                loads128=len(re.findall(r"\bLDG\.E[.\w]*\.128\b", machine_code[kernel])),
                stores128=len(re.findall(r"\bSTG\.E[.\w]*\.128\b", machine_code[kernel])),
            )
        )
    return sorted(found, key=lambda row: row.kernel)


def disassembly(code: bytes) -> dict[str, str]:
    """The machine code of each kernel, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([str(_nvdisasm()), "-c", file.name], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.(\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(work: Iterable[tuple[str, str, str]], jobs: int = 2) -> list[dict]:
    """The resources of (label, source, chip) after (label, source, chip), as dicts that start with the label."""
    with ThreadPoolExecutor(jobs) as pool:  # NVRTC runs without the interpreter's lock
        answers = pool.map(lambda item: [{"file": item[0], **asdict(r)} for r in resources(item[1], item[2])], work)
        return [row for rows in answers for row in rows]


def write(file: Path, about: dict[str, str], rows: list[dict]) -> None:
    """What is `about` the table, then a line for each kernel: its numbers, in the order of NUMBERS, chip by chip."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        of_kernel = kernels.setdefault(f"{row['file']} {row['kernel']}", {})
        of_kernel[row["chip"]] = [row[name] for name in NUMBERS]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(of_chip)}" for name, of_chip in sorted(kernels.items()))
    head = json.dumps({**about, "numbers": NUMBERS})[:-1]
    file.write_text(f'{head}, "kernels": {{\n{lines}\n}}}}\n')


def read(file: Path) -> tuple[dict[str, str], list[dict]]:
    """(what is about the table, rows)."""
    about = json.loads(file.read_text())
    numbers, kernels = about.pop("numbers"), about.pop("kernels")
    rows = []
    for key, of_chip in kernels.items():
        name = dict(zip(("file", "kernel"), key.split(" "), strict=True))
        rows += [{**name, "chip": chip, **dict(zip(numbers, row, strict=True))} for chip, row in of_chip.items()]
    return about, rows


def differences(old: list[dict], new: list[dict]) -> list[str]:
    """What another table has otherwise, a line for each kernel."""
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
    """(kernel, what ptxas says of it)."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    return zip(parts[1::2], parts[2::2], strict=True)


def _nvdisasm() -> str | None:
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = found or next((str(file) for file in sorted(Path(folder).glob("*/bin/nvdisasm"))), None)
    return found
