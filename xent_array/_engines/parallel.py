"""Engines that work with those of other processes: see `xent_array.parallel`.

Each call makes every process gather one message of all others: what it has computed, or why it has failed. So no
process waits for one that has failed before, and all of them raise an error before any has a result.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _engines, _rows
from .._engines import Engine
from .._problem import described, is_integer
from .._rows import Array, Rows, RowStats


class Communicator(Protocol):
    """The interface through which processes exchange messages: that of ``mpi4py.MPI.Comm``, for example."""

    rank: int  # the number of this process, from 0 on
    size: int  # how many processes there are

    def allgather(self, message: bytes, /) -> list[bytes]:
        """Send a message to all processes; return the message of each, in the order of ranks. Lengths may differ."""
        ...


class _Told(NamedTuple):
    """What a process tells the others."""

    error: str  # what went wrong there, or nothing
    start: int
    classes: int
    question: str  # what must be the same everywhere
    numbers: bytes

    def packed(self) -> bytes:
        fields = [self.error.replace("\0", ""), str(self.start), str(self.classes), self.question]
        head = "\0".join(fields).encode(errors="replace")
        return len(head).to_bytes(8, "little") + head + self.numbers

    @classmethod
    def unpacked(cls, message: bytes) -> _Told:
        stop = 8 + int.from_bytes(message[:8], "little")
        error, start, classes, question = message[8:stop].decode().split("\0")
        return cls(error, int(start), int(classes), question, message[stop:])


class _Shared:
    """An engine that works with those of other processes, all of which make the same calls."""

    name: str

    def __init__(self, communicator: Communicator, engine: str | Engine | None) -> None:
        has_all = all(hasattr(communicator, name) for name in ("rank", "size", "allgather"))
        if not has_all or isinstance(communicator, type):
            raise TypeError(
                "communicator must be one of mpi4py, or an object with rank, size and allgather(message);"
                f" got {described(communicator)}"
            )
        if isinstance(engine, _Shared):
            raise TypeError(f"engine must be one that works in a single process; got {engine.name!r}")
        if engine is not None:
            _engines.named(engine)
        self.communicator, self.engine = communicator, engine
        self.calls = 0  # exchanges so far, by which processes that have lost each other find out

    def declines(self, rows: Rows) -> str | None:
        return None if rows.xp is np else f"takes NumPy arrays, and these are of {rows.xp.__name__}"

    def reads_labels_free(self, rows: Rows) -> bool:
        return True

    def own(self, rows: Rows) -> Engine:
        """The engine that does the work of this process."""
        return _engines.pick(rows, self.engine)

    def exchange(self, told: _Told) -> list[_Told]:
        """What every process tells, if all are well and ask the same; else the same error everywhere."""
        self.calls += 1
        told = told._replace(question=f"call={self.calls}{_NEXT}{told.question}")
        messages = self.communicator.allgather(told.packed())
        if len(messages) != self.communicator.size:
            raise RuntimeError(f"allgather must return {self.communicator.size} messages; got {len(messages)}")
        found = [_Told.unpacked(message) for message in messages]
        for rank, each in enumerate(found):
            if each.error:
                raise RuntimeError(f"the process of rank {rank} failed: {each.error}")
        for rank, each in enumerate(found):
            if each.question != found[0].question:
                pairs = zip(found[0].question.split(_NEXT), each.question.split(_NEXT), strict=False)
                first, other = zip(*(pair for pair in pairs if pair[0] != pair[1]), strict=True)
                raise ValueError(
                    f"all processes must make the same calls; rank 0 passes {', '.join(first)},"
                    f" and rank {rank} {', '.join(other)}"
                )
        return found

    def tell(self, error: BaseException) -> None:
        """Let the others, who wait, know that this process has failed."""
        with suppress(RuntimeError):
            self.exchange(_Told(f"{type(error).__name__}: {error}", 0, 0, "", b""))


_NEXT = "\x1f"  # between what is asked


def _question(rows: Rows, /, **more: Any) -> str:
    """What must be the same in every process."""
    ignored = rows.ignore_index if rows.ignore_index is not None and rows.ignore_index >= 0 else None
    asked = {"logits": rows.grad_dtype.name, "weight": _digest(rows, rows.weight), "ignore_index": ignored}
    asked |= {name: getattr(rows, name) for name in ("reduction", "label_smoothing", "z_loss", "softcap")} | more
    return _NEXT.join(f"{name}={value}" for name, value in asked.items())


def _digest(rows: Rows, values: Array | float | None) -> str:
    """What stands for the numbers of an array; a number itself."""
    if not isinstance(values, np.ndarray):
        return repr(values)
    values = np.ascontiguousarray(_rows.in_order(rows, values) if values.shape == rows.shape else values)
    return f"<{values.size} numbers, {hashlib.blake2b(values.tobytes(), digest_size=4).hexdigest()}>"


class VocabParallel(_Shared):
    r"""An engine for rows whose classes are spread over several processes: each has a slice of the class axis.

    Every process passes its slice of the logits, and all labels, class weights and sample weights. All get the same
    loss, with the same bits if their processors are of one kind, and each the gradient of its slice. They exchange four
    numbers per row, once per call, however many classes there are (see `merge_stats`), and a fifth for ``correct``.

    Parameters
    ----------
    communicator : Communicator
        Through which the processes exchange them, for example one of mpi4py.
    start : int
        The first class of this process's slice. The slices of all processes must cover every class once; a slice may
        be empty.
    classes : int
        How many classes there are in all.
    engine : str, Engine or None, default None
        The engine that each process uses for its slice; by default the first that accepts it.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range. In calls that use the engine: if slices overlap or leave out
        classes, or if the processes do not make the same call, the same `ValueError` in every process. If a process
        fails before they exchange, it raises its own error, and all others a `RuntimeError` that names it.

    See Also
    --------
    BatchParallel : For rows that are spread over several processes.

    Notes
    -----
    A distribution is passed slice by slice, like the logits. Label smoothing and class weights are those of the whole
    vocabulary. A gradient reads the logits a second time, after the exchange. `cross_entropy_grad` with saved ``stats``
    exchanges nothing.

    Examples
    --------
    One process alone:

    >>> import numpy as np
    >>> from xent_array import cross_entropy
    >>> from xent_array.parallel import Alone, VocabParallel
    >>> logits, labels = np.array([[2, 1, 0.1], [0.1, 2, 1.9]]), np.array([1, 0])
    >>> print(f"{cross_entropy(logits, labels, engine=VocabParallel(Alone(), start=0, classes=3)):.3f}")
    2.019
    """

    name = "vocab_parallel"

    def __init__(
        self, communicator: Communicator, start: int, classes: int, *, engine: str | Engine | None = None
    ) -> None:
        super().__init__(communicator, engine)
        start, classes = (_integer(value, role) for value, role in ((start, "start"), (classes, "classes")))
        if not 0 <= start <= classes or classes == 0:
            raise ValueError(
                f"start must be from 0 to classes, which is at least 1; got start={start}, classes={classes}"
            )
        self.slice = start, classes

    def __repr__(self) -> str:
        start, classes = self.slice
        return f"VocabParallel({self.communicator!r}, start={start}, classes={classes}, engine={self.engine!r})"

    def failed(self, error: BaseException, has_stats: bool) -> None:
        if not has_stats:
            self.tell(error)

    def stats(self, rows: Rows) -> RowStats:
        return self._merged(rows, "stats", lambda: self.own(rows).stats(rows))

    def row_stats(self, rows: Rows) -> RowStats:
        return self._merged(rows, "row_stats", lambda: _engines.row_stats(self.own(rows), rows))

    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        if rows.classes == 0:
            return np.empty(rows.logits.shape, rows.grad_dtype) if out is None else out
        return self.own(rows).grad(rows, stats, out)

    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        stats = self.row_stats(rows)
        return _rows.finish(rows, stats), self.grad(rows, stats, out), stats

    def _merged(self, rows: Rows, name: str, compute: Callable[[], RowStats]) -> RowStats:
        """The stats of whole rows. `compute` returns those of this slice."""
        try:
            own = _rows.nothing(rows, name == "row_stats") if rows.classes == 0 else compute()
            count = rows.shape[0] * rows.shape[1]
            numbers = [np.asarray(_rows.in_order(rows, part), rows.acc) for part in own if part is not None]
            asked = _question(
                rows, rows=count, classes=rows.vocabulary, asked=name,
                target=_digest(rows, _rows.signed(np, rows.target)) if rows.has_labels else "distributions",
                sample_weight=_digest(rows, rows.sample_weight), grad_output=_digest(rows, rows.upstream),
                denominator=rows.denominator,
            )  # fmt: skip
            told = _Told("", rows.start, rows.classes, asked, np.stack(numbers).tobytes())
        except BaseException as error:
            self.tell(error)
            raise
        found = sorted(self.exchange(told), key=lambda each: (each.start, each.classes))
        stop = 0
        for each in found:
            if each.classes and each.start != stop:
                what = "overlap at" if each.start < stop else "leave out"
                raise ValueError(f"the slices of the classes {what} class {min(each.start, stop)}")
            stop += each.classes
        if stop != rows.vocabulary:
            raise ValueError(f"the slices of the classes leave out class {stop}, of {rows.vocabulary}")
        parts = []
        for each in found:
            values = np.frombuffer(each.numbers, rows.acc).reshape(len(numbers), count)
            part = RowStats(*(_rows.from_order(rows, value) for value in values))
            parts.append(part if part.correct is None else part._replace(correct=part.correct != 0))
        with np.errstate(all="ignore"):
            return _rows.merged(parts)


class BatchParallel(_Shared):
    r"""An engine for rows that are spread over several processes, each of which has all classes of its rows.

    With ``reduction="mean"`` every process divides by what counts in all of them together, however many rows each has
    and however many of these are ignored. The sum of the losses over the processes is then the mean over all rows, and
    the sum of the gradients of their parameters that of the whole batch: add them up, and do not average. Other
    reductions are those of the process's own rows. They exchange one number per call.

    Parameters
    ----------
    communicator : Communicator
        Through which the processes exchange it, for example one of mpi4py.
    engine : str, Engine or None, default None
        The engine that each process uses for its rows; by default the first that accepts them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type. In calls that use the engine: as with `VocabParallel`.

    See Also
    --------
    VocabParallel : For classes that are spread over several processes.

    Examples
    --------
    One process alone:

    >>> import numpy as np
    >>> from xent_array import cross_entropy
    >>> from xent_array.parallel import Alone, BatchParallel
    >>> logits, labels = np.array([[2, 1, 0.1], [0.1, 2, 1.9]]), np.array([1, 0])
    >>> print(f"{cross_entropy(logits, labels, engine=BatchParallel(Alone())):.3f}")
    2.019
    """

    name = "batch_parallel"

    def __init__(self, communicator: Communicator, *, engine: str | Engine | None = None) -> None:
        super().__init__(communicator, engine)

    def __repr__(self) -> str:
        return f"BatchParallel({self.communicator!r}, engine={self.engine!r})"

    def failed(self, error: BaseException, has_stats: bool) -> None:
        self.tell(error)

    def _shared(self, rows: Rows) -> tuple[Engine, Rows]:
        """The engine of this process, and its rows with the denominator of all processes."""
        try:
            engine, counted = self.own(rows), 0.0
            if rows.reduction == "mean" and rows.denominator is None:
                with np.errstate(all="ignore"):
                    counted = float(_rows.terms(rows)[1] or 0.0)
            target = "labels" if rows.has_labels else "distributions"
            asked = _question(rows, classes=rows.classes, target=target, denominator=rows.denominator)
            told = _Told("", 0, 0, asked, np.float64(counted).tobytes())
        except BaseException as error:
            self.tell(error)
            raise
        found = self.exchange(told)
        if rows.reduction != "mean" or rows.denominator is not None:
            return engine, rows
        with np.errstate(all="ignore"):
            total = float(np.sum([np.frombuffer(each.numbers)[0] for each in found]))
        return engine, rows._replace(denominator=total)

    def stats(self, rows: Rows) -> RowStats:
        engine, rows = self._shared(rows)
        return engine.stats(rows)

    def row_stats(self, rows: Rows) -> RowStats:
        return _engines.row_stats(*self._shared(rows))

    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        engine, rows = self._shared(rows)
        return engine.grad(rows, stats, out)

    def loss(self, rows: Rows) -> Array:
        return _engines.loss(*self._shared(rows))

    def loss_and_grad(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
        return _engines.loss_and_grad(*self._shared(rows), out)

    def stats_and_loss(self, rows: Rows) -> tuple[RowStats, Array]:
        return _engines.stats_and_loss(*self._shared(rows))

    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        return _engines.loss_grad_and_stats(*self._shared(rows), out)


class Alone:
    """The communicator of a single process."""

    rank, size = 0, 1

    def allgather(self, message: bytes, /) -> list[bytes]:
        return [message]

    def __repr__(self) -> str:
        return "Alone()"


def _integer(value: Any, role: str) -> int:
    if not is_integer(value):
        raise TypeError(f"{role} must be an integer, got {value!r}")
    return operator.index(value)
