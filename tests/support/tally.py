"""What the tests of the CUDA kernels did, counted as they did it; conftest.py prints it at the end of a run."""

from collections import Counter

COUNTS: Counter[str] = Counter()
KERNELS: set[str] = set()  # that the emulation ran


def told() -> tuple[dict[str, int], list[str]]:
    """All of it, in plain types, for the process that `add`s it to its own."""
    return dict(COUNTS), sorted(KERNELS)


def add(counts: dict[str, int], kernels: list[str]) -> None:
    COUNTS.update(counts)
    KERNELS.update(kernels)


def lines() -> list[str]:
    said = [f"{COUNTS['compiled']} compiled by NVRTC and held against a table of {COUNTS['table']}"] * (
        "table" in COUNTS
    )
    if KERNELS:
        cases = f"{COUNTS['cases']} cases of every job, {COUNTS['sanitized']} under ASan"
        said.append(f"{len(KERNELS)} run under emulation, in {COUNTS['launches']} launches: {cases}")
    if COUNTS["planted"]:
        said.append(f"{COUNTS['caught']} of {COUNTS['planted']} planted bugs caught")
    if COUNTS["mistakes"]:
        said.append(
            f"{COUNTS['mistakes caught']} of {COUNTS['mistakes']} mistakes caught that the emulation must catch"
        )
    return said
