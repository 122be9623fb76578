"""Loss and gradient of PyTorch tensors and JAX arrays on the CPU: this library against PyTorch and JAX themselves.

    python -m bench tensors

All of them work on the same memory. This library also gets it as a NumPy array; the difference in time is the cost of
the bridge. Libraries that are not installed are listed as absent.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from . import report, run, suite


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tensors", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small cases and few rounds: seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line per row here")
    given = parser.parse_args(arguments)
    settings = run.Settings(
        backend=suite.TENSORS,
        threads=len(os.sched_getaffinity(0)),
        seconds=3.0,
        out=given.out,
        seed=0,
        commit=None,
        command=f"python -m bench tensors {shlex.join(arguments)}".strip(),
        **run.PACE[given.quick],
    )
    cases = suite.cases(suite.TENSORS, given.quick)
    return run.run(cases, settings, lambda rows: ["\n\n".join(report.tensors(report.by_key(rows)))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
