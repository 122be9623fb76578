"""Engines for classes or rows that are spread over several processes.

Pass one of them to any function that takes `engine`:

    VocabParallel(communicator, start, classes)  each process has a slice of the classes of every row
    BatchParallel(communicator)                  each process has some of the rows, with all of their classes

A communicator is one of mpi4py, or any object that has what `Communicator` says. All of its processes must make the
same calls in the same order. The arrays are those of NumPy.
"""

from ._engines.parallel import Alone, BatchParallel, Communicator, VocabParallel

__all__ = ["Alone", "BatchParallel", "Communicator", "VocabParallel"]
