"""Functions of arrays, compiled as the loops are."""

import numpy as np

from xent_array._engines.cpu import machine_code
from xent_array._engines.cpu.loops import NAME
from xent_array._engines.cpu.loops.function import machine_code as made
from xent_array._engines.cpu.loops.simd import DOUBLE, FLOAT, INT16, INT32, INT64, constant

ELEMENTS = {"float32": FLOAT, "float64": DOUBLE, "uint16": INT16, "int32": INT32, "int64": INT64}


def compiled(body):
    """A function of arrays that does what `body` emits; it is compiled when it is first called for their dtypes."""
    functions = {}

    def emitted(*arrays):
        found = body(*arrays)
        return constant(0, DOUBLE) if found is None else found

    def called(*arrays):
        dtypes = tuple(array.dtype.name for array in arrays)
        if dtypes not in functions:
            code = made(NAME, [ELEMENTS[dtype] for dtype in dtypes], emitted)
            functions[dtypes] = machine_code._loaded(code)
        return functions[dtypes](tuple(map(np.ascontiguousarray, arrays)))

    return called
