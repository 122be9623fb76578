"""The resources of every kernel on every chip: registers, spills, memory, instructions, from NVRTC and the SASS.

    python tests/cuda/kernel_resources.py            compare with kernel_resources.json; exits 1 if they differ
    python tests/cuda/kernel_resources.py --write    regenerate kernel_resources.json; if the code is the same, add what
                                                     is missing

--chip 90 and --only REGEX (on kernel names) select a part. Results are written every hundred kernels, so the script can
be interrupted and continued. --write also generates kernels/counts.json, with the counts of the sm_90 kernels that
`python -m xent_array --explain` needs; it ships with the package.

Needs what support/simt/nvrtc.py needs, a quarter of an hour on two cores, and no GPU. The figures depend on the version
of NVRTC, which the table names, and on the code of kernels/, whose digest it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the checkout, whatever is installed

from support.simt import nvrtc  # noqa: E402

TABLE = Path(__file__).with_suffix(".json")
PLAIN_CHIPS = (75, 80, 90, 100, 120)  # 86 and 89 get the plans of 80, or of 90 without clusters
OTHER_CHIPS = (90,)  # for kernels with options
MOST = ("PLAIN", 90)
TELLING = ("LOSS_AND_GRAD", "LOSS", "STATS_AND_GRAD")  # the jobs that need most; the others do less
SHIPPED = "sm_90"
BATCH = 100


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
    """All that the library compiles for one chip; for the others the jobs that need most, without options.

    Kernels for rows that are not even, which take fewer registers and more instructions, only for that one chip and
    without options. Kernels for slices of the classes do two jobs only, of which the gradient needs most.
    """
    from xent_array._engines import cuda

    seen: set[tuple[str, int]] = set()
    for variant in cuda.VARIANTS:
        for chip in PLAIN_CHIPS if variant == "PLAIN" else OTHER_CHIPS:
            most = (variant, chip) == MOST
            jobs = cuda.JOBS if most else TELLING if chip == MOST[1] else TELLING[:2]
            even = (True, False) if most else (True,)
            of_slices = cuda.OF_SLICES if chip == MOST[1] else cuda.OF_SLICES[-1:]
            whole = cuda.catalogue(chip, variant, jobs, even)
            for kernel in itertools.chain(whole, cuda.catalogue(chip, variant + cuda.SLICE, of_slices, (True,))):
                name, *given = re.findall(r"\w+", kernel.line)[1:]
                job = [*given[1:3], given[3] if kernel.file == "rows.cu" else ""] if len(given) > 1 else []
                if (name, chip) not in seen:  # MERGE serves every variant
                    yield Item(kernel.file, kernel.text, f"sm_{chip}", name, name.split("_")[1].upper(), given[0], *job)
                seen.add((name, chip))


# The kernels that the tests recompile show, together, every combination of each of these.
MET = ("family dtype job", "family job variant", "family vectors", "family chip", "dtype chip", "variant chip")


def some(items: Iterable[Item]) -> list[Item]:
    """A small sample that shows every combination in MET; always the same one."""
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
    """A file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)


def digest() -> str:
    """Of the code in kernels/, whatever its comments and line breaks."""
    code = hashlib.sha256()
    for file in files():
        code.update(f"{file.name} {' '.join(code_of(file).split())}\n".encode())
    return code.hexdigest()[:16]


def compiled(items: Iterable[Item]) -> list[dict]:
    """Their resources. Those that do not ship are not disassembled, which takes as long as compiling."""
    return nvrtc.table(((i.file, i.text, i.chip) for i in items), disassembled=lambda chip: chip == SHIPPED)


def counts_file() -> Path:
    from xent_array import _kernels

    return _kernels.folder() / "counts.json"


def counts(about: dict[str, str], rows: list[dict]) -> str:
    """The contents of counts.json for these rows of the table: a line for each kernel."""
    from xent_array._engines._model import Code

    here = {row["kernel"]: list(Code.of(row)) for row in rows if row["chip"] == SHIPPED and is_explained(row["kernel"])}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(here.items()))
    head = json.dumps({**about, "chip": SHIPPED, "numbers": Code._fields})[:-1]
    return f'{head}, "kernels": {{\n{lines}\n}}}}\n'


def is_explained(kernel: str) -> bool:
    """Whether `--explain` may ask for a kernel: not for one that slices of the classes need."""
    return not re.search("_slice_|^xent_(say|slices|total)_", kernel)


def _key(row: dict) -> tuple[str, str, str]:
    return row["file"], row["kernel"], row["chip"]


def write(items: Iterable[Item], about: dict[str, str], known: list[dict]) -> int:
    """Adds to the table those of these kernels that it lacks; returns how many it then has."""
    every = {(item.file, item.kernel, item.chip) for item in work()}
    rows = [row for row in known if _key(row) in every and set(nvrtc.NUMBERS) <= set(row)]
    there = {_key(row) for row in rows}
    lacking = [item for item in items if (item.file, item.kernel, item.chip) not in there]
    for start in range(0, len(lacking) or 1, BATCH):
        rows += compiled(lacking[start : start + BATCH])
        nvrtc.write(TABLE, about, rows)
        counts_file().write_text(counts(about, rows))
    return len(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="make the table again")
    parser.add_argument("--chip", type=int, metavar="NN", help="only kernels for this one")
    parser.add_argument("--only", metavar="REGEX", default="", help="only kernels whose name this finds")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    items = [
        item
        for item in work()
        if re.search(given.only, item.kernel) and given.chip in (None, int(item.chip.removeprefix("sm_")))
    ]
    about = {"nvrtc": nvrtc.version(), "digest": digest()}
    known, committed = nvrtc.read(TABLE) if TABLE.exists() else ({}, [])
    if given.write:  # keeps what the same compiler said about the same code
        count = write(items, about, committed if known == about else [])
        print(f"{TABLE.name}: {count} kernels by NVRTC {nvrtc.version()}, in {time.monotonic() - start:.0f} s")
        return 0
    rows = compiled(items)
    asked = {(item.file, item.kernel, item.chip) for item in items}
    said = nvrtc.differences([row for row in committed if _key(row) in asked], rows)
    took = f"{len(rows)} kernels by NVRTC {nvrtc.version()} in {time.monotonic() - start:.0f} s"
    print("\n".join(said) or f"as in {TABLE.name}: {took}")
    if said and committed and known["nvrtc"] != nvrtc.version():
        print(f"(the table is by NVRTC {known['nvrtc']}, this is {nvrtc.version()})")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
