"""What every kernel takes of every chip: registers, spills, shared memory, 128-bit accesses, by NVRTC's own account.

    python tests/kernel_resources.py            compare with kernel_resources.json; exits 1 where they differ
    python tests/kernel_resources.py --write    make kernel_resources.json again

Needs what simt.nvrtc needs, and no GPU. The figures depend on the version of NVRTC, which the table names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from simt import nvrtc

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, whatever is installed

TABLE = Path(__file__).with_suffix(".json")
PLAIN_CHIPS = (75, 80, 86, 89, 90, 100, 120)
OTHER_CHIPS = (80, 90)  # for kernels with options
WHOLE = "PLAIN", 90  # where every job is compiled; elsewhere the loss with its gradient, which needs most of a chip


def work() -> Iterator[tuple[str, str, str]]:
    """(label, source, chip) of what the library compiles."""
    from xent_array._engines import cuda

    for variant in cuda.VARIANTS:
        for chip in PLAIN_CHIPS if variant == "PLAIN" else OTHER_CHIPS:
            for kernel in cuda.catalogue(chip, variant, cuda.JOBS if (variant, chip) == WHOLE else cuda.JOBS[:1]):
                yield kernel.file, kernel.text, f"sm_{chip}"


def main(arguments: list[str]) -> int:
    rows = nvrtc.table(work())
    if arguments == ["--write"]:
        nvrtc.write(TABLE, nvrtc.version(), rows)
        print(f"{TABLE.name}: {len(rows)} kernels by NVRTC {nvrtc.version()}")
        return 0
    version, committed = nvrtc.read(TABLE)
    said = nvrtc.differences(committed, rows)
    print("\n".join(said) or f"{len(rows)} kernels as in {TABLE.name}")
    if said and version != nvrtc.version():
        print(f"(the table is by NVRTC {version}, this is {nvrtc.version()})")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
