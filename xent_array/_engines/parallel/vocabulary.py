"""`VocabParallel`: each process has a slice of the classes."""

from __future__ import annotations

import operator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ... import _engines, _rows
from ..._problem import is_integer
from ..._rows import Array, Attempt, Rows, RowStats
from .. import Engine
from ..cuda import Cuda, Mean
from . import device
from .device import Form
from .exchange import Communicator, DeviceCommunicator, Told, launcher_of
from .shared import Shared, digest, number_of, question


class Whole(NamedTuple):
    """What is known of whole rows after an exchange; on a device also the divisor that the loss was made with."""

    stats: RowStats
    loss: Array | None = None
    mean: Mean | None = None


class Sent(NamedTuple):
    """A message in the memory of a device, and the arrays for what follows from those of all processes."""

    question: str
    form: Form
    message: Array  # without its head
    correct: Array | None
    gathered: Array
    losses: Array | None
    partials: Array | None
    mean: Mean | None


class VocabParallel(Shared):
    r"""An engine for rows whose classes are spread over several processes: each has a slice of the class axis.

    Every process passes its slice of the logits, and all labels, class weights and sample weights. All get the same
    loss, with the same bits if their processors are of one kind, and each the gradient of its slice. They exchange four
    numbers per row, once per call, however many classes there are (see `merge_stats`), and a fifth for ``correct``:

    .. math:: m = \max_r m_r \qquad 1 + \mathrm{rest} = \sum_r (1 + \mathrm{rest}_r) \, e^{m_r - m}
              \qquad \mathrm{gap} = \sum_r \mathrm{gap}_r + \mathrm{mass}_r (m - m_r)
              \qquad \mathrm{mass} = \sum_r \mathrm{mass}_r

    Parameters
    ----------
    communicator : Communicator or DeviceCommunicator
        Through which the processes exchange them: for arrays of NumPy or, if MPI can read the memory of the GPU
        ("CUDA-aware"), of CuPy, for example one of mpi4py; for arrays of CuPy, ``cupy.cuda.nccl.NcclCommunicator``.
    start : int
        The first class of this process's slice. The slices of all processes must cover every class once; a slice may
        be empty.
    classes : int
        How many classes there are in all.
    engine : str, Engine or None, default None
        The engine that each process uses for its slice; by default the first that accepts it. For arrays of CuPy it
        must be "cuda".

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range. In calls that use the engine: if slices overlap or leave out
        classes, or if the processes do not make the same call, the same `ValueError` in every process. If a process
        fails before they exchange, it raises its own error, and all others a `RuntimeError` that names it. With NCCL,
        see below.

    See Also
    --------
    BatchParallel : For rows that are spread over several processes.

    Notes
    -----
    A distribution is passed slice by slice, like the logits. Label smoothing and class weights are those of the whole
    vocabulary. A gradient reads the logits a second time, after the exchange. `cross_entropy_grad` with saved ``stats``
    exchanges nothing.

    **NCCL.** A call is one exchange on the current stream, in the dtype of the loss; the host never waits for the GPU,
    and so cannot learn what another process has said. Where processes ask for different things, where slices overlap or
    leave out classes, or where a process fails, which takes part in the exchange nevertheless and raises its own error,
    the loss is NaN on all others, and so is the gradient of every row that counts. Labels, and the numbers in weights,
    are not compared. Messages must be of one length: if the number of rows or the dtype of the loss differs, or if only
    some processes ask for `row_stats`, or if one fails whose logits have no shape to tell its length by, NCCL may wait
    for ever, as in any collective of its own. With ``validate=True``, in all processes, the call waits: everything,
    including labels and weights, is first compared in words, with the errors above.

    **CUDA-aware MPI.** Options, shapes and failures are told first, with the errors above; labels, and the numbers in
    weights, are compared with ``validate=True``. The host waits for the GPU before each exchange.

    So far both have run under emulation only, with a stand-in for NCCL, and not on a GPU.

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
        self,
        communicator: Communicator | DeviceCommunicator,
        start: int,
        classes: int,
        *,
        engine: str | Engine | None = None,
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

    def declines(self, rows: Rows) -> str | None:
        reason, size = super().declines(rows), self.exchange.size
        if reason is None and size > device.MOST and self.on_device(rows):
            return f"takes CuPy arrays from at most {device.MOST} processes, and there are {size}"
        return reason

    def failed(self, error: BaseException, attempt: Attempt) -> None:
        if attempt.wants != "grad":
            self.tell(error, attempt)

    def stats(self, rows: Rows) -> RowStats:
        return self._whole(rows, "stats").stats

    def row_stats(self, rows: Rows) -> RowStats:
        return self._whole(rows, "row_stats").stats

    def grad(self, rows: Rows, stats: RowStats, out: Array | None = None) -> Array:
        return self._grad(rows, Whole(stats), out)

    def loss(self, rows: Rows) -> Array:
        return self._whole(rows, "stats", with_loss=True).loss

    def loss_and_grad(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array]:
        whole = self._whole(rows, "stats", with_loss=True, with_grad=True)
        return whole.loss, self._grad(rows, whole, out)

    def grad_alone(self, rows: Rows, out: Array | None = None) -> Array:
        return self._grad(rows, self._whole(rows, "stats"), out)

    def stats_and_loss(self, rows: Rows) -> tuple[RowStats, Array]:
        whole = self._whole(rows, "stats", with_loss=True)
        return whole.stats, whole.loss

    def loss_grad_and_stats(self, rows: Rows, out: Array | None = None) -> tuple[Array, Array, RowStats]:
        whole = self._whole(rows, "row_stats", with_loss=True, with_grad=True)
        return whole.loss, self._grad(rows, whole, out), whole.stats

    def _grad(self, rows: Rows, whole: Whole, out: Array | None) -> Array:
        if self.on_device(rows):
            return self.own_cuda(rows).grad(rows, whole.stats, out, whole.mean)
        if rows.classes == 0:
            return np.empty(rows.logits.shape, rows.grad_dtype) if out is None else out
        return self.own(rows).grad(rows, whole.stats, out)

    def _whole(self, rows: Rows, name: str, with_loss: bool = False, with_grad: bool = False) -> Whole:
        """What follows of all slices: stats as from the function of that name, and perhaps the loss."""
        if self.on_device(rows):
            return self._on_device(rows, name, with_loss, with_grad)
        stats = self._on_host(rows, name)
        return Whole(stats, _rows.finish(rows, stats) if with_loss else None)

    # -- arrays of NumPy

    def _on_host(self, rows: Rows, name: str) -> RowStats:
        try:
            if rows.classes == 0:
                own = _rows.no_classes(rows, is_marked=name == "row_stats")
            else:
                engine = self.own(rows)
                own = _engines.row_stats(engine, rows) if name == "row_stats" else engine.stats(rows)
            count = rows.shape[0] * rows.shape[1]
            numbers = [np.asarray(_rows.in_order(rows, part), rows.acc) for part in own if part is not None]
            told = Told("", rows.start, rows.classes, self._question(rows, name), np.stack(numbers).tobytes())
        except BaseException as error:
            self.tell(error, _attempt(rows, name))
            raise
        parts = []
        for each in _fitting(self.compared(told), rows):
            values = np.frombuffer(each.numbers, rows.acc).reshape(len(numbers), count)
            part = RowStats(*(_rows.from_order(rows, value) for value in values))
            parts.append(part if part.correct is None else part._replace(correct=part.correct != 0))
        with np.errstate(all="ignore"):
            return _rows.merged(parts)

    def _question(self, rows: Rows, name: str, own: Cuda | None = None) -> str:
        launcher = None if own is None else launcher_of(own)
        return question(
            rows, weight=digest(rows, rows.weight, launcher), rows=rows.shape[0] * rows.shape[1],
            classes=rows.vocabulary, asked=name,
            target=digest(rows, rows.target, launcher) if rows.has_labels else "distributions",
            sample_weight=digest(rows, rows.sample_weight, launcher),
            grad_output=digest(rows, rows.upstream, launcher), denominator=digest(rows, rows.denominator, launcher),
        )  # fmt: skip

    # -- arrays on a device

    def _on_device(self, rows: Rows, name: str, with_loss: bool, with_grad: bool) -> Whole:
        try:
            own = self.own_cuda(rows)
            with own.launcher.on(rows.logits):
                sent = self._sent(own, rows, name, with_loss, with_grad)
        except BaseException as error:
            self.tell(error, _attempt(rows, name))
            raise
        launcher = launcher_of(own)
        with launcher.on(rows.logits):
            if self.compares(rows):
                _fitting(self.compared(Told("", rows.start, rows.classes, sent.question, b""), launcher), rows)
                number = number_of(sent.question)
            else:
                number = number_of(self.next_call(sent.question))
            of_slice = {"start": rows.start, "classes": rows.classes, "fills": int(rows.classes == 0)}
            try:
                device.say(own, sent.form, number, sent.message, correct=sent.correct, **of_slice)
            finally:  # without its head, the message makes NaN of what the others have
                self.exchange.gather(sent.message, sent.gathered, launcher)
            stats = device.merged(own, rows, sent.form, number, sent.gathered, sent.losses, sent.partials)
            loss = None if sent.losses is None else own.reduced(rows, sent.losses, sent.mean, sent.partials)
            return Whole(stats, loss, sent.mean)

    def _sent(self, own: Cuda, rows: Rows, name: str, with_loss: bool, with_grad: bool) -> Sent:
        """What this process sends, and all that it can do before the exchange."""
        form = device.form_of(rows, name == "row_stats" and rows.has_labels)
        message, correct = device.stats_of_slice(own, rows, form)
        return Sent(
            self._question(rows, name, own),
            form,
            message,
            correct,
            gathered=own.launcher.empty((self.exchange.size, form.length), form.dtype),
            losses=own.launcher.empty(rows.shape, form.dtype) if with_loss else None,
            partials=own.partials(rows) if with_loss else None,
            mean=own.mean(rows) if with_loss and with_grad else None,
        )

    def take_part(self, engine: Cuda, attempt: Attempt) -> None:
        shape = list(np.shape(attempt.logits))
        shape.pop(attempt.axis)
        has_correct = attempt.wants == "row_stats" and np.ndim(attempt.target) == len(shape)
        wide = "float64" if "float64" in str(getattr(attempt.logits, "dtype", "float64")) else "float32"
        self.say_nothing(engine, Form(4 + has_correct, prod(shape), wide), attempt)


def _attempt(rows: Rows, name: str) -> Attempt:
    return Attempt(name, rows.logits, rows.target, 1, rows.validate)


def _fitting(told: list[Told], rows: Rows) -> list[Told]:
    """What processes tell, in the order of their slices; an error if these do not cover every class once."""
    told = sorted(told, key=lambda each: (each.start, each.classes))
    stop = 0
    for each in told:
        if each.classes and each.start != stop:
            what = "overlap at" if each.start < stop else "leave out"
            raise ValueError(f"the slices of the classes {what} class {min(each.start, stop)}")
        stop += each.classes
    if stop != rows.vocabulary:
        raise ValueError(f"the slices of the classes leave out class {stop}, of {rows.vocabulary}")
    return told


def _integer(value: Any, role: str) -> int:
    if not is_integer(value):
        raise TypeError(f"{role} must be an integer, got {value!r}")
    return operator.index(value)
