"""What both engines of several processes do: pick the engine of each, tell the others, compare what they ask."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np

from ... import _engines, _rows
from ..._rows import Array, Attempt, Rows
from .. import Engine, cuda
from ..cuda import Cuda, Streaming
from . import device
from .device import Form
from .exchange import Communicator, DeviceCommunicator, Nccl, Told, exchange_of, launcher_of

NEXT = "\x1f"  # between what is asked


class Shared:
    """An engine that works with those of other processes, all of which make the same calls."""

    name: str

    def __init__(self, communicator: Communicator | DeviceCommunicator, engine: str | Engine | None) -> None:
        self.exchange = exchange_of(communicator)
        if isinstance(engine, Shared):
            raise TypeError(f"engine must be one that works in a single process; got {engine.name!r}")
        if engine is not None:
            _engines.named(engine)
        self.communicator, self.engine = communicator, engine
        self.calls = 0  # exchanges so far, by which processes that have lost each other find out

    def declines(self, rows: Rows) -> str | None:
        if not self.on_device(rows):
            return None
        of = rows.xp.__name__
        if not self.exchange.carries_arrays:
            return f"takes NumPy arrays, as its communicator has no Allgather for those of CuPy; these are of {of}"
        engine = self._cuda()
        if engine is None:
            return f"takes NumPy arrays with engine={self.engine!r}, as CuPy's need 'cuda'; these are of {of}"
        reason = engine.declines(rows)
        if reason is None or isinstance(self.exchange, Nccl):
            return reason
        return reason.replace("takes CuPy arrays", "takes arrays of NumPy and CuPy")

    def reads_labels_free(self, rows: Rows) -> bool:
        return not self.on_device(rows)

    def on_device(self, rows: Rows) -> bool:
        """Whether the arrays are on a GPU, or must be as NCCL takes no others."""
        return rows.xp is not np or isinstance(self.exchange, Nccl)

    def own(self, rows: Rows) -> Engine:
        """The engine that does the work of this process."""
        return _engines.pick(rows, self.engine)

    def own_cuda(self, rows: Rows) -> Cuda:
        """The same for arrays on a device."""
        own = _engines.pick(rows, self._cuda())
        assert isinstance(own, Cuda)
        return own

    def _cuda(self) -> Cuda | None:
        """The engine for arrays on a device, unless the user wants one that cannot be."""
        found = _engines.named("cuda" if self.engine is None else self.engine)
        return found if isinstance(found, Cuda) else None

    def compares(self, rows: Rows) -> bool:
        """Whether processes tell each other in words before they exchange arrays on a device, and wait for that."""
        return self.exchange.waits or rows.validate

    def next_call(self, question: str) -> str:
        """What is asked, with the number of the call."""
        self.calls += 1
        return f"call={self.calls}{NEXT}{question}"

    def compared(self, told: Told, launcher: Streaming | None = None) -> list[Told]:
        """What every process tells, if all are well and ask the same; else the same error everywhere."""
        told = told._replace(question=self.next_call(told.question))
        found = [Told.unpacked(message) for message in self.exchange.tell(told.packed(), launcher)]
        for rank, each in enumerate(found):
            if each.error:
                raise RuntimeError(f"the process of rank {rank} failed: {each.error}")
        for rank, each in enumerate(found):
            if each.question != found[0].question:
                pairs = zip(found[0].question.split(NEXT), each.question.split(NEXT), strict=False)
                first, other = zip(*(pair for pair in pairs if pair[0] != pair[1]), strict=True)
                raise ValueError(
                    f"all processes must make the same calls; rank 0 passes {', '.join(first)},"
                    f" and rank {rank} {', '.join(other)}"
                )
        return found

    def tell(self, error: BaseException, attempt: Attempt) -> None:
        """Let the others, who wait, know that this process has failed."""
        engine = self._cuda() or cuda.engine
        if self.exchange.waits or attempt.validate:
            with suppress(RuntimeError):
                self.compared(Told(f"{type(error).__name__}: {error}", 0, 0, "", b""), launcher_of(engine))
        else:
            with suppress(Exception):  # of an array without a shape, for example: then it cannot take part
                self.calls += 1
                self.take_part(engine, attempt)

    def take_part(self, engine: Cuda, attempt: Attempt) -> None:
        """Exchange a message as long as that of the others, which says that this process has failed."""
        raise NotImplementedError

    def say_nothing(self, engine: Cuda, form: Form, attempt: Attempt) -> None:
        """Exchange a message of that form that makes NaN of what the others have."""
        is_there = type(attempt.logits) in cuda.KINDS
        with engine.launcher.on(attempt.logits) if is_there else nullcontext():
            device.say_nothing(engine, form, self.exchange)


def question(rows: Rows, /, **more: Any) -> str:
    """What must be the same in every process."""
    ignored = rows.ignore_index if rows.ignore_index is not None and rows.ignore_index >= 0 else None
    asked = {"logits": rows.grad_dtype.name, "ignore_index": ignored}
    asked |= {name: getattr(rows, name) for name in ("reduction", "label_smoothing", "z_loss", "softcap")} | more
    return NEXT.join(f"{name}={value}" for name, value in asked.items())


def digest(rows: Rows, values: Array | float | None, launcher: Streaming | None = None) -> str:
    """What stands for the numbers of an array, which are read if it is on the host, or waited for; a number itself."""
    if values is None or isinstance(values, (int, float)):
        return repr(values)
    if not isinstance(values, np.ndarray) or launcher is not None:
        if launcher is None or not rows.validate:
            return f"<{values.size} numbers>"
        values = launcher.to_host(_rows.in_order(rows, values) if values.shape == rows.shape else values)
    elif values.shape == rows.shape:
        values = _rows.in_order(rows, values)
    values = np.ascontiguousarray(values)
    return f"<{values.size} numbers, {hashlib.blake2b(values.tobytes(), digest_size=4).hexdigest()}>"


def number_of(text: str) -> int:
    """A number of 63 bits for what is asked; it is odd, so never FAILED."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little") >> 1 | 1
