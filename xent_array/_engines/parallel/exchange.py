"""Communicators, and the messages that processes exchange through them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from ..._problem import described
from ..._rows import Array
from ..cuda import Cuda, Streaming


class Communicator(Protocol):
    """The interface through which processes exchange messages: that of ``mpi4py.MPI.Comm``, for example.

    For arrays of CuPy it must also have ``Allgather(sent, received)``, which gathers an array of each process in
    ``received``, one after the other; like ``allgather``, it may wait.
    """

    rank: int  # the number of this process, from 0 on
    size: int  # how many processes there are

    def allgather(self, message: bytes, /) -> list[bytes]:
        """Send a message to all processes; return the message of each, in the order of ranks. Lengths may differ."""
        ...


class DeviceCommunicator(Protocol):
    """The interface for arrays on a GPU, without waiting: that of ``cupy.cuda.nccl.NcclCommunicator``, for example."""

    def rank_id(self) -> int:
        """The number of this process, from 0 on."""
        ...

    def size(self) -> int:
        """How many processes there are."""
        ...

    def allGather(self, sent: int, received: int, count: int, dtype: int, stream: int, /) -> None:
        """Gather ``count`` numbers of each process, on a stream; all are pointers and codes of NCCL."""
        ...


class Told(NamedTuple):
    """What a process tells the others in a message of bytes."""

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
    def unpacked(cls, message: bytes) -> Told:
        stop = 8 + int.from_bytes(message[:8], "little")
        error, start, classes, question = message[8:stop].decode().split("\0")
        return cls(error, int(start), int(classes), question, message[stop:])


def launcher_of(engine: Cuda) -> Streaming:
    return cast(Streaming, engine.launcher)


class Messages:
    """A communicator that carries bytes, and perhaps arrays; it waits for both."""

    waits = True

    def __init__(self, communicator: Any) -> None:
        self.communicator = communicator
        self.carries_arrays = hasattr(communicator, "Allgather")

    @property
    def size(self) -> int:
        return int(self.communicator.size)

    def tell(self, message: bytes, launcher: Streaming | None) -> list[bytes]:
        """The message of every process."""
        found: list[bytes] = self.communicator.allgather(message)
        if len(found) != self.size:
            raise RuntimeError(f"allgather must return {self.size} messages; got {len(found)}")
        return found

    def gather(self, sent: Array, received: Array, launcher: Streaming) -> None:
        """Gather arrays on a device."""
        launcher.wait()  # MPI knows no streams
        self.communicator.Allgather(sent, received)


CODES = {"uint8": 1, "int64": 4, "float32": 7, "float64": 8}  # ncclDataType_t, which never changes


class Nccl:
    """NCCL's communicator: arrays are gathered on the current stream, and nothing waits except for bytes."""

    waits, carries_arrays = False, True

    def __init__(self, communicator: DeviceCommunicator) -> None:
        self.communicator, self.size = communicator, int(communicator.size())

    def gather(self, sent: Array, received: Array, launcher: Streaming) -> None:
        """Gather arrays on a device."""
        (start, _), (to, _) = launcher.look(sent), launcher.look(received)
        self.communicator.allGather(start, to, sent.size, CODES[sent.dtype.name], launcher.stream())

    def tell(self, message: bytes, launcher: Streaming | None) -> list[bytes]:
        """The message of every process, after that of its length: both must be as long everywhere."""
        assert launcher is not None
        lengths = self._gathered(np.array([len(message)]), launcher)[:, 0]
        longest = np.zeros(int(lengths.max()), np.uint8)
        longest[: len(message)] = np.frombuffer(message, np.uint8)
        found = self._gathered(longest, launcher)
        return [each[:length].tobytes() for each, length in zip(found, lengths, strict=True)]

    def _gathered(self, values: np.ndarray, launcher: Streaming) -> np.ndarray:
        received = launcher.empty((self.size, len(values)), values.dtype.name)
        self.gather(launcher.to_device(values), received, launcher)
        return launcher.to_host(received)


Exchange = Messages | Nccl


def exchange_of(communicator: Any) -> Exchange:
    """What carries messages through a communicator."""
    if not isinstance(communicator, type):
        if all(hasattr(communicator, name) for name in ("rank_id", "size", "allGather")):
            return Nccl(communicator)
        if all(hasattr(communicator, name) for name in ("rank", "size", "allgather")):
            return Messages(communicator)
    raise TypeError(
        "communicator must be one of mpi4py, or an object with rank, size and allgather(message), or CuPy's for NCCL;"
        f" got {described(communicator)}"
    )


class Alone:
    """The communicator of a single process."""

    rank, size = 0, 1

    def allgather(self, message: bytes, /) -> list[bytes]:
        return [message]

    def Allgather(self, sent: Array, received: Array, /) -> None:
        received[...] = sent.reshape(received.shape)

    def __repr__(self) -> str:
        return "Alone()"
