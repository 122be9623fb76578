"""Processes that work together, as threads of one."""

import threading


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
            thread.join(20)
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
        together.barrier.wait(10)
        found = [*together.messages]
        together.barrier.wait(10)
        return found
