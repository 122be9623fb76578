"""Processes that work together, as threads of one."""

import ctypes
import threading
from typing import ClassVar

from . import simt


class Threads:
    """The communicators of several ranks."""

    def __init__(self, size):
        self.size, self.barrier, self.messages = size, threading.Barrier(size), [b""] * size
        self.bytes = [0] * size  # that each rank has sent
        self.gathers = [0] * size

    def of(self, rank):
        return _OfRank(self, rank)

    def run(self, work):
        """What `work(communicator)` returns for each rank, or the exception that it raises."""
        found = [None] * self.size

        def of_rank(rank):
            try:
                found[rank] = work(self.of(rank))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in threads), "some rank waits for another"
        return found


class _OfRank:
    def __init__(self, threads, rank):
        self.threads, self.rank, self.size = threads, rank, threads.size

    def allgather(self, message):
        together = self.threads
        together.bytes[self.rank] += len(message)
        together.gathers[self.rank] += 1
        together.messages[self.rank] = message
        together.barrier.wait(60)
        found = [*together.messages]
        together.barrier.wait(60)
        return found


class DeviceThreads(Threads):
    """The same for arrays of any library, as over an MPI that can read the memory of a GPU."""

    def of(self, rank):
        return _DeviceOfRank(self, rank)


class _DeviceOfRank(_OfRank):
    def Allgather(self, sent, received):
        together = self.threads
        together.messages[self.rank] = sent
        together.barrier.wait(60)
        for k, each in enumerate(together.messages):
            received[k] = each
        together.barrier.wait(60)


class Nccl(Threads):
    """The communicators of CuPy for NCCL of several ranks: pointers to memory, which here is that of the host.

    It checks what NCCL does not: the types of the arguments, in their order, the codes of dtypes, the stream, and that
    counts are the same everywhere; NCCL would then wait for ever, or write beyond a buffer.
    """

    SIZES: ClassVar = {0: 1, 1: 1, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # bytes, by ncclDataType_t

    def __init__(self, size, stream=7):
        super().__init__(size)
        self.stream = stream
        self.asked = [[] for _ in range(size)]  # (count, dtype) of each exchange

    def of(self, rank):
        return _NcclOfRank(self, rank)


class _NcclOfRank:
    def __init__(self, together, rank):
        self._together, self._rank = together, rank

    def size(self):
        return self._together.size

    def rank_id(self):
        return self._rank

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        together, rank = self._together, self._rank
        for value in (sendbuf, recvbuf, count, datatype, stream):
            assert type(value) is int, value
        assert stream == together.stream
        size = together.SIZES[datatype]
        together.asked[rank].append((count, datatype))
        together.messages[rank] = ctypes.string_at(sendbuf, count * size)
        together.barrier.wait(60)
        try:
            assert len({asked[-1] for asked in together.asked}) == 1, (
                "counts or dtypes differ: NCCL would wait for ever"
            )
            for k, message in enumerate(together.messages):
                ctypes.memmove(recvbuf + k * count * size, message, count * size)
            simt.written(recvbuf, len(together.messages) * count * size)
        finally:
            together.barrier.wait(60)
