"""python -m bench report: the tables of README.md and the plots, from the rows in bench/results and nothing else."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import peers, suite
from .run import ROOT
from .suite import (
    ACROSS,
    AUTOGRAD,
    COLD,
    COPY,
    DETACHED,
    EACH,
    EACH_OUT,
    EAGER,
    GRAD,
    IN_PLACE,
    LOSS,
    OURS,
    OUT,
    READ,
    SCALE,
    TENSORS,
    THREADS,
    WARM,
    Case,
)  # fmt: skip

Row = dict[str, Any]
Rows = dict[tuple[str, str, str, str], Row]  # by backend, case, library, operation

BEGIN, END = "<!-- python -m bench report -->", "<!-- end of report -->"
PEERS = {backend: tuple(makers) for backend, makers in peers.PEERS.items()}
COLOURS = {
    OURS: "#d55e00",
    COPY: "#777777",
    "torch": "#0072b2",
    **dict.fromkeys(("JAX", "torch.compile"), "#009e73"),
    **dict.fromkeys(("scikit-learn", "Liger"), "#cc79a7"),
    **dict.fromkeys(("SciPy", "cupyx"), "#56b4e9"),
    **dict.fromkeys(("NumPy", "QuACK"), "#7a6a00"),
    "CPU": "#0072b2",
    "GPU": "#d55e00",
    "GPU and transfer": "#777777",
}
NUMPY = f"{OURS} (engine='numpy')"


def main(arguments: list[str] | None = None) -> int:
    """Writes the files, or with --check compares them; returns 1 if there is a difference."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something would change")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    given = parser.parse_args(arguments)
    rows = read(given.results)
    plots = {name: data for name, data in drawn(rows).items() if data}
    old = given.readme.read_text()
    new = old.partition(BEGIN)[0] + f"{BEGIN}\n\n{text(rows, plots, given)}\n\n{END}" + old.partition(END)[2]
    if BEGIN not in old or END not in old:
        parser.error(f"{given.readme} has no place for the report, between {BEGIN} and {END}")
    files = {given.results / f"{name}.svg": (name, data) for name, data in plots.items()}
    if given.check:
        stale = [] if new == old else [given.readme]
        stale += [
            path for path, (_, data) in files.items() if not path.exists() or digest(data) not in path.read_text()
        ]
        stale += sorted(set(given.results.glob("*.svg")) - set(files))
        for path in stale:
            print(f"{path} is not what `python -m bench report` writes")
        return int(bool(stale))
    given.readme.write_text(new)
    for path in set(given.results.glob("*.svg")) - set(files):
        path.unlink()
    for path, (name, data) in files.items():
        draw(name, data).savefig(path, metadata={"Date": None, "Description": digest(data)})
        path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))
    print(f"{len(rows)} rows, {', '.join([given.readme.name, *(path.name for path in files)])} written")
    return 0


def read(folder: Path) -> Rows:
    """Every row; if one was measured several times, the latest."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return by_key(sorted(map(json.loads, lines), key=lambda row: row["date"]))


def by_key(rows: Iterable[Row]) -> Rows:
    return {(row["backend"], row["case"], row["library"], row["operation"]): row for row in rows}


# The tables


def text(rows: Rows, plots: dict[str, Any], given: argparse.Namespace) -> str:
    """The text between the markers."""
    parts = []
    for backend, title, tables in (
        ("numpy", "CPU", _tables),
        (TENSORS, "PyTorch tensors and JAX arrays on the CPU", tensors),
        (THREADS, "Threads of a CPU", threads),
        (SCALE, "Larger than one array", scale),
        ("cupy", "GPU", _tables),
    ):
        here = {key: row for key, row in rows.items() if key[0] == backend and row["group"] != suite.ENGINES[0].group}
        if not here:
            parts.append(f"**{title}**: no results yet.")
            continue
        parts += [f"**{title}**, {_origin(here.values())}", *tables(here, backend)]
    parts.append(_engines(rows))
    folder = given.results.relative_to(given.readme.parent) if given.results.is_absolute() else given.results
    for name in plots:
        parts.append(f"![{PLOTS[name].title}]({folder.as_posix()}/{name}.svg)")
    return "\n\n".join(parts)


def _origin(rows: Iterable[Row]) -> str:
    """The machines, versions, commits and commands, each named once."""

    def each(of: Callable[[Row], str]) -> str:
        return "; ".join(dict.fromkeys(map(of, rows)))

    rows = [row for row in rows if row["library"] != COPY]
    machine = each(lambda r: r["machine"]["gpu"] or f"{r['machine']['cpu']}, {_threads_of(r)}")
    versions = each(lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items()))
    commits = each(lambda r: (r["commit"] or "unknown")[:10] + (" with changes" if r["dirty"] else ""))
    commands = each(lambda r: f"`{r['command']}`" if r["command"].startswith("python ") else f"by {r['command']}")
    return f"{machine}; {versions}; commit {commits}; {each(lambda r: r['date'][:10])}; {commands}:"


def _threads_of(row: Row) -> str:
    return f"{row['machine']['cores']} cores" if row["backend"] == THREADS else f"{row['threads']} threads"


def _tables(rows: Rows, backend: str) -> list[str]:
    names = {OURS: (OURS, GRAD), "with `out=`": (OURS, OUT), "in place": (OURS, IN_PLACE)}
    names |= {peer: (peer, GRAD) for peer in PEERS[backend]}
    memory = _memory(rows, backend, (*suite.SIZES, *suite.GPU_OTHER), names)
    return [part for part in (_speed(rows, backend), _first(rows), memory, _accuracy(rows, backend)) if part]


def tensors(rows: Rows, backend: str = TENSORS) -> list[str]:
    """This library on PyTorch tensors and JAX arrays, compared with PyTorch and JAX themselves."""

    def ratio(peer: Row | None, ours: Row | None) -> str:
        return "" if peer is None or ours is None or ours["seconds"] is None else _times(peer, ours, 2)

    lines = []
    for case in dict.fromkeys((*suite.TENSOR_CASES, *suite.TENSORS_QUICK)):
        of = {key[2]: row for key, row in rows.items() if key == (backend, case.name, key[2], GRAD)}
        line = [
            *(_ms(of.get(library)) for library in ("torch", AUTOGRAD, DETACHED)),
            *(ratio(of.get("torch"), of.get(ours)) for ours in (AUTOGRAD, DETACHED)),
            *(_ms(of.get(library)) for library in ("JAX", EAGER)),
            ratio(of.get("JAX"), of.get(EAGER)),
            _ms(of.get(OURS)),
        ]
        if any(line):
            lines.append([_size(case), *line])
    head = ["rows × classes", "PyTorch, ms", "ours, autograd", "ours, detached", "PyTorch / autograd",
            "PyTorch / detached", "JAX jit, ms", "ours, eager", "JAX / eager", "ours, NumPy"]  # fmt: skip
    what = (
        "Times of loss and gradient in milliseconds. PyTorch tensors: PyTorch's `cross_entropy` and `backward()`, this"
        " library's `cross_entropy` and `backward()` (autograd), and its `cross_entropy_value_and_grad` (detached). JAX"
        " arrays: `jit(value_and_grad)` of optax's formula, and this library's `cross_entropy_value_and_grad` outside"
        " `jit` (eager). The last column is this library on a NumPy array of the same memory"
    )
    names = {"PyTorch": "torch", "ours by autograd": AUTOGRAD, "ours detached": DETACHED, "JAX": "JAX"}
    names |= {"ours eager": EAGER, "ours on NumPy": OURS}
    memory = _memory(rows, backend, suite.TENSOR_CASES, {said: (library, GRAD) for said, library in names.items()})
    return [part for part in (f"{what}:\n\n{_table(head, lines)}" if lines else "", memory) if part]


def threads(rows: Rows, backend: str = THREADS) -> list[str]:
    """How close this library comes to the speed of memory with each number of threads; and peers with as many."""
    lines = []
    for case in _thread_cases(rows):
        copy, read = (rows.get((backend, case.name, COPY, operation)) for operation in (COPY, READ))
        for operation in (LOSS, GRAD, OUT):
            ours = rows.get((backend, case.name, OURS, operation))
            if ours is None or ours["seconds"] is None:
                continue
            shares = (f"{ours[name]:.0%}" if ours[name] else "" for name in ("of_copy", "of_read"))
            found = _idle(ours["traced"])
            peers = (rows.get((backend, case.name, peer, operation)) for peer in PEERS[backend])
            lines.append([
                _size(case), operation, str(case.threads), _ms(ours), _milliseconds(ours["min"]), _ms(copy), _ms(read),
                *shares, f"{found.last:.0f}", f"{found.share:.0%}",
                *("" if peer is None else _times(peer, ours, 1) for peer in peers),
            ])  # fmt: skip
    head = ["rows × classes", "", "threads", "ours, ms", "best", "copy, ms", "read, ms", "of a copy", "of a read",
            "last thread began, µs", "idle", *PEERS[backend]]  # fmt: skip
    what = (
        "Ours by the number of threads, in milliseconds, the median and the least; its bandwidth as a share of that of"
        " a copy of the logits into an array that is there, and of a read of them, by as many threads; when the last"
        " thread began, and the share of their time in which the threads were idle; for each peer, its time divided by"
        " ours"
    )
    return [f"{what}:\n\n{_table(head, lines)}"] if lines else []


def idle(rows: Rows) -> list[str]:
    """Why threads were idle, in this library and in the yardsticks."""
    lines = []
    alone: dict[tuple[Any, ...], float] = {}
    for case in _thread_cases(rows):
        for library, operation in ((COPY, COPY), (COPY, READ), (OURS, LOSS), (OURS, GRAD), (OURS, OUT)):
            row = rows.get((THREADS, case.name, library, operation))
            if row is None or not row["traced"]:
                continue
            found = _idle(row["traced"])
            if case.threads == 1:
                alone[case.shape, operation] = found.work
            one = alone.get((case.shape, operation))
            reasons = (found.share, found.not_begun, found.between, found.waiting, found.ended)
            lines.append([
                _size(case), operation, f"{found.came:g} of {case.threads}", _milliseconds(found.wall * 1e-6),
                f"{found.parts:g}",
                *(f"{moment:.0f}" for moment in (found.asked, found.last, found.after)),
                *(f"{share:.1%}" for share in reasons), f"{found.work / one:.2f}×" if one else "",
            ])  # fmt: skip
    head = ["rows × classes", "", "threads", "ms", "parts", "asked, µs", "last began, µs", "after, µs", "idle",
            "not begun", "between parts", "waiting in parts", "ended", "work, of one thread's"]  # fmt: skip
    what = (
        "What the threads did in calls that were traced, medians: how many took part; the time of the call, which is to"
        " be about that of one not traced; how many parts they took, when they were asked for, when the last one began,"
        " and how long the caller went on after they had ended; the share of their time in which they were idle,"
        " because they had not begun, because they were between two parts, because they were on no core while they had"
        " a part, or because they had ended; and the time that they were at work, all together, divided by that of"
        " one thread alone, which is 1 as long as none slows another down"
    )
    return [f"{what}:\n\n{_table(head, lines)}"] if lines else []


def scale(rows: Rows, backend: str = SCALE) -> list[str]:
    """Dask, files and processes."""
    lines, of_traffic = [], []
    for row in rows.values():
        if "bytes per row" in row:
            of_traffic.append([row["case"], f"{row['bytes per row']:.1f}", str(row["exchanges"])])
            continue
        direct = rows.get((SCALE, row["case"], OURS, row["operation"]))
        ratio = f"{row['seconds'] / direct['seconds']:.2f}×" if direct not in (None, row) else ""
        peaks = " and ".join(_gib(peak) for peak in row.get("peaks", ()))
        limit = f"{_gib(row['limit'])}{' by ' + row['limited by'] if 'limited by' in row else ''}" if peaks else ""
        lines.append([
            row["case"], row["operation"], row["library"], f"{row['gib']:.2f}", f"{row['seconds'] * 1e3:,.1f}", ratio,
            limit, peaks, _gib(row["own"]) if "own" in row else "",
        ])  # fmt: skip
    head = ["", "", "by", "logits, GiB", "ms", "of the same on NumPy arrays", "memory allowed, GiB", "peak, GiB",
            "of it not of a file"]  # fmt: skip
    what = (
        "Time and memory of what is larger than one array. The peak is that of each process; where a cgroup is the"
        " limit, it includes the files that are in memory"
    )
    tables = [f"{what}:\n\n{_table(head, lines)}"] if lines else []
    if of_traffic:
        head = ["", "bytes per row that a process sends", "exchanges per call"]
        tables.append(f"What processes exchange that share the classes:\n\n{_table(head, of_traffic)}")
    return tables


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _thread_cases(rows: Rows) -> Iterable[Case]:
    """The cases that this library was run on, by shape and then by the number of threads."""
    ours = [row for row in rows.values() if row["group"] == THREADS and row["library"] == OURS]
    shapes = dict.fromkeys(tuple(row["shape"]) for row in ours)
    return suite.thread_cases(shapes, sorted({row["threads"] for row in ours}))


class _Idle(NamedTuple):
    """Medians over traced calls, in µs or as shares of the total time available to all threads of the team."""

    share: float
    not_begun: float
    between: float
    waiting: float
    ended: float
    wall: float  # of the whole call, in µs
    asked: float  # when the team was requested
    last: float  # when the last thread began
    after: float  # from the end of the team's work to the end of the call
    work: float  # µs, all threads together
    came: float  # threads that took part
    parts: float


def _idle(calls: list[dict[str, Any]]) -> _Idle:
    each = []
    for call in calls:
        wall, team, threads = call["released"], call["team"], call["threads"]
        whole = wall * team
        not_begun = sum(thread["began"] for thread in threads) + wall * (team - len(threads))
        between, waiting = (sum(thread[name] for thread in threads) for name in ("between", "waited"))
        ended = sum(wall - thread["ended"] for thread in threads)
        work = sum(thread["took"] - thread["waited"] for thread in threads)
        shares = (part / whole for part in (not_begun + between + waiting + ended, not_begun, between, waiting, ended))
        moments = wall, call["asked"], max(thread["began"] for thread in threads), wall - call["joined"]
        each.append((*shares, *moments, work, len(threads), sum(thread["parts"] for thread in threads)))
    return _Idle(*map(statistics.median, zip(*each, strict=True)))


def _speed(rows: Rows, backend: str) -> str:
    """Our times, and their ratios to those of a copy and of each peer."""

    def timed(case: Case, library: str, operation: str) -> Row | None:
        row = rows.get((backend, case.name, library, operation))
        return row if row is not None and row["seconds"] is not None else None

    on_gpu = backend == "cupy"

    def ratio(case: Case, peer: str, operation: str, each: str) -> str:
        """The peer's time divided by ours, for what the peer computes: the mean loss, or the loss of each row."""
        for what in (operation, each):
            row, ours = rows.get((backend, case.name, peer, what)), timed(case, OURS, what)
            if row is not None:
                return "" if ours is None else _times(row, ours, 2 if on_gpu else 1)
        return ""

    peers = [name for name in (NUMPY, *PEERS[backend]) if any(key[2] == name for key in rows)]
    lines = []
    for operation, each, cases in (
        (GRAD, EACH_OUT, suite.SHOWN[backend]),
        (LOSS, EACH, suite.SHOWN_LOSS[backend]),
    ):
        for case in cases:
            ours, into, by_row, copy = (
                timed(case, *of) for of in ((OURS, operation), (OURS, OUT), (OURS, each), (COPY, COPY))
            )
            if ours is None and by_row is None:
                continue
            into = into if operation == GRAD else None
            if on_gpu:
                share = by_row and by_row["of_copy"] and f"{by_row['of_copy']:.0%}"
                more = [_ms(by_row), share or ""]
            else:
                outside_caches = into is not None and copy is not None and case.nbytes > 32 << 20
                more = [f"{into['seconds'] / copy['seconds']:.1f}×" if outside_caches else ""]
            ratios = [ratio(case, peer, operation, each) for peer in peers]
            size = _size(case) + (", loss only" if operation == LOSS else "")
            lines.append([size, _ms(ours), _ms(into), *more, *ratios])
    if not lines:
        return ""
    names = ['ours, `engine="numpy"`' if peer == NUMPY else peer for peer in peers]
    middle = ['`"none"`, ms', "of a copy"] if on_gpu else ["`out=` / copy"]
    head = ["rows × classes", "ours, ms", "into `out=`, ms", *middle, *names]
    what = "Times of loss and gradient in milliseconds; for each peer, its time divided by ours"
    if on_gpu:
        what += (
            '. `"none"` is `reduction="none"` with the gradient written to `out=`: one launch instead of three. "Of a'
            ' copy" is its throughput as a share of that of a copy. QuACK also returns the loss of each row, so its'
            ' time is divided by that of `"none"`'
        )
    return f"{what}:\n\n{_table(head, lines)}"


class Pair(NamedTuple):
    """The same problem on this library's two engines on one machine, and the cost of transferring the arrays."""

    case: Case
    host: Row
    gpu: Row
    across: Row | None


def _pairs(rows: Rows, cases: Iterable[Case] = suite.ENGINES) -> list[Pair]:
    found = []
    for case in cases:
        host, gpu, across = (
            row if row is not None and row["seconds"] is not None else None
            for row in (
                rows.get(("numpy", case.name, OURS, GRAD)),
                rows.get(("cupy", case.name, OURS, GRAD)),
                rows.get(("cupy", case.name, COPY, ACROSS)),
            )
        )
        if host and gpu and all(host["machine"][what] == gpu["machine"][what] for what in ("cpu", "cores")):
            found.append(Pair(case, host, gpu, across))
    return found


def _engines(rows: Rows) -> str:
    """GPU against CPU."""
    pairs = _pairs(rows)
    if not pairs:
        return "**GPU against CPU**, the same problem on this library's two engines: not measured yet on one machine."
    lines = []
    for case, host, gpu, across in pairs:
        here, there = host["seconds"], gpu["seconds"]
        with_the_way = f"{here / (there + across['seconds']):.1f}×" if across else ""
        lines.append([_size(case), _ms(host), _ms(gpu), f"{here / there:.1f}×", _ms(across), with_the_way])
    head = [
        "rows × classes",
        "CPU, ms",
        "GPU, ms",
        "CPU / GPU",
        "transfer to the GPU and back, ms",
        "CPU / (GPU and transfer)",
    ]
    origin = _origin(row for pair in pairs for row in (pair.host, pair.gpu))
    what = "Loss and gradient with this library's two engines, and the cost of moving the data there and back"
    return f"**GPU against CPU**, {origin}\n\n{what}:\n\n{_table(head, lines)}"


def _first(rows: Rows) -> str:
    """One sentence on the cost of the first call of a process."""
    cold, warm = (rows.get(("numpy", suite.FIRST.name, OURS, operation), {}).get("first") for operation in (COLD, WARM))
    if cold is None or warm is None:
        return ""
    return (
        f"The first call of a process, which loads the machine code, takes {warm:.2f} s for loss and gradient of"
        f" {_size(suite.FIRST)}, and {cold:.1f} s if nothing has been compiled on the machine before."
    )


def _memory(rows: Rows, backend: str, cases: Iterable[Case], names: Mapping[str, tuple[str, str]]) -> str:
    """One sentence on the first case with measurements; `names` gives the library and operation of each name in it."""
    for case in cases:
        found = {said: rows.get((backend, case.name, *name), {}).get("memory") for said, name in names.items()}
        said = [f"{name} {memory / case.nbytes:.1f}" for name, memory in found.items() if memory is not None]
        if said:
            return (
                f"Peak memory of loss and gradient at {_size(case)}, in addition to the inputs and `out`,"
                f" in multiples of the size of the logits: {', '.join(said)}."
            )
    return ""


def _accuracy(rows: Rows, backend: str) -> str:
    """The largest errors found in any case."""
    lines = []
    for library in (OURS, *PEERS[backend]):
        cells = []
        for dtype in suite.ITEMSIZE:
            found = [row for row in rows.values() if row["library"] == library and row["dtype"] == dtype]
            units = [
                max((row[name] for row in found if row[name] is not None), default=None)
                for name in ("loss_units", "grad_units")
            ]
            wrong = ", wrong in at least one case" if any(_wrong(row) for row in found) else ""
            judged = found and (wrong or units != [None, None])
            cells.append(" / ".join("–" if of is None else _two_digits(of) for of in units) + wrong if judged else "")
        if any(cells):
            lines.append([library, *cells])
    if not lines:
        return ""
    what = "Largest error of loss / gradient found in any case, in units of rounding (this library's limit is 4):"
    return f"{what}\n\n{_table(['', *suite.ITEMSIZE], lines)}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def _size(case: Case) -> str:
    dtype = "" if case.dtype == "float32" else f", {case.dtype}"
    axis = "" if case.axis == -1 else f", axis={case.axis}"
    more = ", soft targets" if case.target == "soft" else f", `{case.option}`" if case.option else ""
    more += ", peaked" * case.peaked + ", as seen by the caller" * case.host
    return " × ".join(map(str, case.shape)) + dtype + more + axis


def _ms(row: Row | None) -> str:
    if row is None or row["seconds"] is None:
        return ""
    return _milliseconds(row["seconds"])


def _milliseconds(seconds: float) -> str:
    three_digits = float(f"{seconds * 1e3:.3g}")
    return f"{three_digits:g}"


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _times(peer: Row, ours: Row, digits: int) -> str:
    if peer["seconds"] is None:
        return "wrong" if _wrong(peer) else "failed"
    return f"{peer['seconds'] / ours['seconds']:.{digits}f}×"


def _wrong(row: Row) -> bool:
    return (row["failed"] or "").startswith("AssertionError")


# The plots: first what is drawn, as plain data, then how it is drawn


class Plot(NamedTuple):
    """The texts in a plot."""

    title: str
    x: str
    y: str


PLOTS = {
    "classes": Plot(
        "Loss and gradient on the CPU: time per logit against the number of classes",
        "classes, at a constant number of logits",
        "ns per logit",
    ),
    **{
        f"gpu-{dtype}": Plot(
            f"Loss and gradient on a GPU, {dtype}: bytes per second against the number of classes",
            "classes, in 32768 rows (the last two points: 16384 and 8192)",
            "GB/s, counting only the bytes that must be moved",
        )
        for dtype in ("float32", "bfloat16")
    },
    "engines-rows": Plot("Loss and gradient with this library: rows of 1000 classes", "rows", "ms"),
    "engines-classes": Plot("Loss and gradient with this library: 16,777,216 logits", "classes", "ms"),
}
Series = list[tuple[str, Any, Any]]


def drawn(rows: Rows) -> dict[str, Series]:
    """For each plot its series (label, x, y); empty if there are no results."""
    on_cpu = dict.fromkeys((OURS, *PEERS["numpy"]), GRAD) | {COPY: COPY}
    on_gpu = {OURS: EACH_OUT} | dict.fromkeys(PEERS["cupy"], GRAD) | {"QuACK": EACH_OUT, COPY: COPY}
    found = {
        "classes": _lines(rows, "numpy", suite.CLASSES, on_cpu, lambda row, case: row["seconds"] * 1e9 / case.size)
    }
    for dtype in ("float32", "bfloat16"):
        cells = [case for case in suite.GPU_CELLS if case.dtype == dtype]
        found[f"gpu-{dtype}"] = _lines(rows, "cupy", cells, on_gpu, lambda row, _: row["gb_per_s"])
    for name, cases, axis in (("rows", suite.ENGINES_ROWS, 0), ("classes", suite.ENGINES_CLASSES, 1)):
        pairs = _pairs(rows, cases)
        sizes = [pair.case.shape[axis] for pair in pairs]
        lines: Series = [
            ("CPU", sizes, [pair.host["seconds"] * 1e3 for pair in pairs]),
            ("GPU", sizes, [pair.gpu["seconds"] * 1e3 for pair in pairs]),
        ]
        if all(pair.across for pair in pairs):
            lines.append(
                ("GPU and transfer", sizes, [(p.gpu["seconds"] + (p.across or {})["seconds"]) * 1e3 for p in pairs])
            )
        found[f"engines-{name}"] = lines if pairs else []
    return found


def _lines(
    rows: Rows, backend: str, cases: Iterable[Case], of: Mapping[str, str], y: Callable[[Row, Case], float]
) -> Series:
    """Series over the number of classes; `of` maps each library to its operation."""
    series: Series = []
    for library, operation in of.items():
        found = [(case, rows.get((backend, case.name, library, operation))) for case in cases]
        points = [(case.classes, y(row, case)) for case, row in found if row is not None and row["seconds"] is not None]
        if points:
            series.append((library, [x for x, _ in points], [value for _, value in points]))
    return series


def digest(series: Series) -> str:
    """Identifies a plot by its data and this file, and is stored in it; the version of matplotlib does not matter."""
    return hashlib.sha256(json.dumps(series).encode() + Path(__file__).read_bytes()).hexdigest()


def draw(name: str, series: Series) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "bench", "font.size": 10, "axes.axisbelow": True})
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_title(PLOTS[name].title, loc="left", fontsize=11)
    _draw_lines(axes, name, series)
    return figure


def _draw_lines(axes: Any, name: str, series: Series) -> None:
    from matplotlib.ticker import LogLocator

    axes.set(xscale="log", yscale="log", xlabel=PLOTS[name].x, ylabel=PLOTS[name].y)
    ends = []
    for label, x, y in series:
        ours, is_copy = label == OURS, label == COPY
        style = {"color": COLOURS[label], "linewidth": 3 if ours else 1.5, "zorder": 3 if ours else 2}
        axes.plot(x, y, "--" if is_copy else "-", marker=None if is_copy else "o", markersize=6 if ours else 4, **style)
        ends.append((y[-1], "copy of the logits" if is_copy else label, style["color"], "bold" if ours else "normal"))
    least, most = min(min(x) for _, x, _ in series), max(max(x) for _, x, _ in series)
    ticks = [2**k for k in (1, 4, 7, 10, 13, 16, 18)]
    axes.set_xticks([tick for tick in ticks if least <= tick <= most] if name != "engines-rows" else series[0][1])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    # Labels at the ends of the lines, pushed apart where they would overlap.
    step, last = (high / low) ** 0.055, 0.0
    for value, said, colour, weight in sorted(ends):
        last = max(value, last * step)
        axes.annotate(
            said,
            (most, last),
            (10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight=weight,
            annotation_clip=False,
        )


if __name__ == "__main__":
    sys.exit(main())
