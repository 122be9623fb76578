"""Engines for classes or rows that are spread over several processes.

Pass one of them to any function that takes `engine`:

    VocabParallel(communicator, start, classes)  each process has a slice of the classes of every row
    BatchParallel(communicator)                  each process has some of the rows, with all of their classes

A communicator is one of mpi4py, for arrays of NumPy and, if MPI can read the memory of the GPU, of CuPy; or CuPy's for
NCCL, for arrays of CuPy, where nothing waits for the GPU; or any object that has what `Communicator` or
`DeviceCommunicator` says. All of its processes must make the same calls in the same order.
"""

from ._engines.parallel import Alone, BatchParallel, Communicator, DeviceCommunicator, VocabParallel

__all__ = ["Alone", "BatchParallel", "Communicator", "DeviceCommunicator", "VocabParallel"]
