"""Engines that work with those of other processes: see `xent_array.parallel`.

Each call makes every process gather one message of all others: what it has computed, or that it has failed. So no
process waits for one that has failed before.

    exchange.py     communicators, and the messages that they carry
    shared.py       what both engines do: tell and compare what is asked
    vocabulary.py   VocabParallel
    batch.py        BatchParallel
    device.py       messages in the memory of a GPU: what the kernels of slices.cu do before and after the exchange
"""

from .batch import BatchParallel
from .exchange import Alone, Communicator, DeviceCommunicator
from .vocabulary import VocabParallel

__all__ = ["Alone", "BatchParallel", "Communicator", "DeviceCommunicator", "VocabParallel"]
