"""`BatchParallel`: each process has some of the rows."""

from __future__ import annotations

import numpy as np

from ... import _engines, _rows
from ..._rows import Array, Attempt, Rows, RowStats
from .. import Engine
from ..cuda import Cuda
from . import device
from .device import Form
from .exchange import Communicator, DeviceCommunicator, Told, launcher_of
from .shared import Shared, digest, number_of, question

FORM = Form(1, 1, "float64")


class BatchParallel(Shared):
    r"""An engine for rows that are spread over several processes, each of which has all classes of its rows.

    With ``reduction="mean"`` every process divides by what counts in all of them together, however many rows each has
    and however many of these are ignored. The sum of the losses over the processes is then the mean over all rows, and
    the sum of the gradients of their parameters that of the whole batch: add them up, and do not average. Other
    reductions are those of the process's own rows. They exchange one number per call.

    Parameters
    ----------
    communicator : Communicator or DeviceCommunicator
        Through which the processes exchange it: for arrays of NumPy or, if MPI can read the memory of the GPU
        ("CUDA-aware"), of CuPy, for example one of mpi4py; for arrays of CuPy, ``cupy.cuda.nccl.NcclCommunicator``.
    engine : str, Engine or None, default None
        The engine that each process uses for its rows; by default the first that accepts them. For arrays of CuPy it
        must be "cuda".

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type. In calls that use the engine: as with `VocabParallel`.

    See Also
    --------
    VocabParallel : For classes that are spread over several processes.

    Notes
    -----
    The divisor of process r is the sum over its rows of what each counts, and the loss of process r is

    .. math:: \mathrm{loss}_r = \sum_{i \in r} \mathrm{loss}_i \, / \, \sum_s \mathrm{divisor}_s

    With NCCL nothing waits for the GPU, and where processes ask for different things, or one of them fails, the means
    of the others are NaN; with other reductions no process learns of it. What `VocabParallel` says about NCCL,
    ``validate=True`` and MPI is true here as well, except that the number of rows may differ.

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

    def __init__(self, communicator: Communicator | DeviceCommunicator, *, engine: str | Engine | None = None) -> None:
        super().__init__(communicator, engine)

    def __repr__(self) -> str:
        return f"BatchParallel({self.communicator!r}, engine={self.engine!r})"

    def failed(self, error: BaseException, attempt: Attempt) -> None:
        self.tell(error, attempt)

    def _shared(self, rows: Rows) -> tuple[Engine, Rows]:
        """The engine of this process, and its rows with the denominator of all processes."""
        return self._on_device(rows) if self.on_device(rows) else self._on_host(rows)

    def _on_host(self, rows: Rows) -> tuple[Engine, Rows]:
        try:
            engine, counted = self.own(rows), 0.0
            if _counts(rows):
                with np.errstate(all="ignore"):
                    counted = float(_rows.terms(rows)[1] or 0.0)
            told = Told("", 0, 0, _question(rows), np.float64(counted).tobytes())
        except BaseException as error:
            self.tell(error, Attempt("stats", rows.logits, rows.target, 1, rows.validate))
            raise
        found = self.compared(told)
        if not _counts(rows):
            return engine, rows
        with np.errstate(all="ignore"):
            total = float(np.sum([np.frombuffer(each.numbers)[0] for each in found]))
        return engine, rows._replace(denominator=total)

    def _on_device(self, rows: Rows) -> tuple[Engine, Rows]:
        try:
            own = self.own_cuda(rows)
            launcher, asked = launcher_of(own), _question(rows, own)
            with launcher.on(rows.logits):
                message, known = device.divisor_of(own, rows, FORM)
                gathered = launcher.empty((self.exchange.size, FORM.length), FORM.dtype)
        except BaseException as error:
            self.tell(error, Attempt("stats", rows.logits, rows.target, 1, rows.validate))
            raise
        with launcher.on(rows.logits):
            if self.compares(rows):
                self.compared(Told("", 0, 0, asked, b""), launcher)
            else:
                asked = self.next_call(asked)
            number = number_of(asked)
            try:
                device.say(own, FORM, number, message, **known)
            finally:  # without its head, the message makes NaN of what the others have
                self.exchange.gather(message, gathered, launcher)
            if not _counts(rows):
                return own, rows
            return own, rows._replace(denominator=device.total(own, FORM, number, gathered))

    def take_part(self, engine: Cuda, attempt: Attempt) -> None:
        self.say_nothing(engine, FORM, attempt)

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


def _counts(rows: Rows) -> bool:
    """Whether what the mean divides by must be counted."""
    return rows.reduction == "mean" and rows.denominator is None


def _question(rows: Rows, own: Cuda | None = None) -> str:
    launcher = None if own is None else launcher_of(own)
    return question(
        rows, weight=digest(rows, rows.weight, launcher), classes=rows.classes,
        target="labels" if rows.has_labels else "distributions",
        denominator=digest(rows, rows.denominator, launcher),
    )  # fmt: skip
