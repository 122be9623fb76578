"""What every kernel takes of every chip: registers, spills, shared memory, 128-bit accesses, by NVRTC's own account.

    python tests/kernel_resources.py            compare with kernel_resources.json; exits 1 where they differ
    python tests/kernel_resources.py --write    make kernel_resources.json again; of the same code, what it lacks

Needs what simt.nvrtc needs, a quarter of an hour of two cores, and no GPU. The figures depend on the version of NVRTC,
which the table names, and on the code of kernels/, whose digest it holds.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from simt import nvrtc

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, whatever is installed

TABLE = Path(__file__).with_suffix(".json")
PLAIN_CHIPS = (75, 80, 86, 89, 90, 100, 120)
OTHER_CHIPS = (80, 90)  # for kernels with options


class Item(NamedTuple):
    """A kernel on a chip."""

    file: str
    text: str
    chip: str
    kernel: str
    family: str
    dtype: str
    job: str = ""
    variant: str = ""
    vectors: str = ""


def work() -> Iterator[Item]:
    """Everything that the library compiles: without options on every chip, with options on two."""
    from xent_array._engines import cuda

    for variant in cuda.VARIANTS:
        for chip in PLAIN_CHIPS if variant == "PLAIN" else OTHER_CHIPS:
            for kernel in cuda.catalogue(chip, variant):
                name, *given = re.findall(r"\w+", kernel.line)[1:]
                job = [*given[1:3], given[3] if kernel.file == "rows.cu" else ""] if kernel.file != "sums.cu" else []
                yield Item(kernel.file, kernel.text, f"sm_{chip}", name, name.split("_")[1].upper(), given[0], *job)


# What the kernels that the tests compile anew show of every kind of, together.
MET = ("family dtype job", "family job variant", "family vectors", "family chip", "dtype chip", "variant chip")


def some(items: Iterable[Item]) -> list[Item]:
    """Few that show every combination of what is in MET, the same whenever they are asked for."""
    seen: set[tuple] = set()
    chosen = []
    for item in sorted(items, key=lambda item: zlib.crc32(f"{item.kernel} {item.chip}".encode())):
        shows = {(parts, *(getattr(item, part) for part in parts.split())) for parts in MET}
        if not shows <= seen:
            seen |= shows
            chosen.append(item)
    return chosen


def files() -> list[Path]:
    from xent_array import _kernels

    return sorted(_kernels.folder().glob("*.cu*"))


def code_of(file: Path) -> str:
    """What a file says beside its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)


def digest() -> str:
    """Of the code in kernels/, whatever its comments and line breaks."""
    code = hashlib.sha256()
    for file in files():
        code.update(f"{file.name} {' '.join(code_of(file).split())}\n".encode())
    return code.hexdigest()[:16]


def compiled(items: Iterable[Item]) -> list[dict]:
    return nvrtc.table((item.file, item.text, item.chip) for item in items)


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    items, about, committed = list(work()), {"nvrtc": nvrtc.version(), "digest": digest()}, []
    if TABLE.exists():
        known, committed = nvrtc.read(TABLE)
    if arguments == ["--write"]:  # what is known of the same code by the same compiler is kept
        wanted = {(item.file, item.kernel, item.chip): item for item in items}
        kept = [row for row in committed if known == about and (row["file"], row["kernel"], row["chip"]) in wanted]
        for row in kept:
            del wanted[row["file"], row["kernel"], row["chip"]]
        rows = kept + compiled(wanted.values())
        nvrtc.write(TABLE, about, rows)
    else:
        rows = compiled(items)
    took = f"{len(rows)} kernels by NVRTC {nvrtc.version()} in {time.monotonic() - start:.0f} s"
    if arguments == ["--write"]:
        print(f"{TABLE.name}: {took}")
        return 0
    said = nvrtc.differences(committed, rows)
    print("\n".join(said) or f"as in {TABLE.name}: {took}")
    if said and committed and known["nvrtc"] != nvrtc.version():
        print(f"(the table is by NVRTC {known['nvrtc']}, this is {nvrtc.version()})")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
