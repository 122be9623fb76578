"""A module `cupy` for machines without a GPU: CuPy's names and signatures, NumPy's numbers, the emulation's launches.

    python tests/support/standin.py -m xent_array        runs a module, or a file, as if there were a GPU
    python tests/support/standin.py bench/train_digits.py --backend cupy

A function takes the arguments that the installed CuPy takes, and no others; arrays are of a class that NumPy cannot
convert (``.get()`` copies them), and whose results are never NumPy scalars; what CuPy lacks is missing. It replaces
CuPy in `sys.modules`, and so needs a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

OPERATORS = [
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or")
      for side in ("", "r", "i")),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "getitem")),
]  # fmt: skip
METHODS = (
    "all", "any", "argmax", "argmin", "astype", "clip", "copy", "cumsum", "dot", "fill", "item", "max", "mean", "min",
    "prod", "ravel", "repeat", "reshape", "round", "squeeze", "std", "sum", "swapaxes", "take", "tolist", "transpose",
    "var", "view",
)  # fmt: skip


class Device:
    """The only device."""

    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)

    compute_capability = "90"
    attributes = types.MappingProxyType({"MultiProcessorCount": 132})

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def synchronize(self):
        pass


class ndarray:
    """An array on the device."""

    __module__ = "cupy"
    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        assert memptr is None
        assert strides is None
        self.host = np.empty(shape, dtype, order)

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    strides = property(lambda self: self.host.strides)
    itemsize = property(lambda self: self.host.itemsize)
    nbytes = property(lambda self: self.host.nbytes)
    T = property(lambda self: given(self.host.T))
    device = property(lambda self: Device())

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.host.ctypes.data if self.host.size else 0, device_id=0)

    @property
    def flags(self):
        flags = self.host.flags
        return types.SimpleNamespace(
            c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata
        )

    @property
    def __cuda_array_interface__(self):
        return self.host.__array_interface__

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __dlpack_device__(self):
        return 2, 0

    def get(self):
        return self.host.copy()

    def __setitem__(self, key, value):
        self.host[taken(key)] = taken(value)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return map(given, self.host)

    def __bool__(self):
        return bool(self.host)

    def __int__(self):
        return int(self.host)

    def __float__(self):
        return float(self.host)

    def __index__(self):
        return self.host.__index__()

    def __repr__(self):
        return repr(self.host)


def given(result):
    """A result of NumPy, as CuPy would return it."""
    if isinstance(result, (np.ndarray, np.generic)):
        made = object.__new__(ndarray)
        made.host = np.asarray(result)
        return made
    return type(result)(map(given, result)) if type(result) in (tuple, list) else result


def taken(value, from_host=False):
    """An argument for NumPy; CuPy takes its own arrays only where it is to copy them."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray) and not from_host:
        raise TypeError(f"Unsupported type {type(value)}")
    if type(value) in (tuple, list):
        return type(value)(taken(part, from_host) for part in value)
    return value


def _method(name):
    def method(self, *args, **kwargs):
        found = getattr(self.host, name)(*map(taken, args), **{key: taken(value) for key, value in kwargs.items()})
        if found is self.host:
            return self
        return found if name in ("tolist", "item") or found is NotImplemented else given(found)

    method.__name__ = name
    return method


for _name in (*OPERATORS, *METHODS):
    setattr(ndarray, _name, _method(_name))


class Generator:
    """Random numbers, as far as the examples need them."""

    def __init__(self, seed=None):
        self.numpys = np.random.default_rng(seed)

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        return given(self.numpys.standard_normal(size, dtype, taken(out)))

    def integers(self, low, high=None, size=None, dtype=np.int64, endpoint=False):
        return given(self.numpys.integers(low, high, size, dtype, endpoint))


class RawKernel:
    """A kernel that the emulation runs."""

    def __init__(self, code, name, options=(), backend="nvrtc"):
        self.code, self.name = code, name

    def compile(self, log_stream=None):
        pass

    def __call__(self, grid, block, args):
        from support import emulated, simt

        (argument,) = args
        assert isinstance(argument, np.ndarray)
        assert argument.size == 1  # CuPy passes no other by value
        data = ctypes.string_at(argument.__array_interface__["data"][0], argument.itemsize)
        library = simt.compile(self.code, [self.name])
        found = re.search(r"^xent_(?:warp|block|stream)_\w+_(\d)_(?:true|false)_(?:true|false)_\d+_\d+$", self.name)
        cluster = int(found[1]) if found else 1  # on a GPU the compiled kernel knows it
        with emulated.LOCK:
            library.launch(self.name, *grid, *block, [simt.Struct(data, {})], cluster=cluster)


def _signature(function):
    """Of a function, or of a ufunc, which has it in the first line of its docstring."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        said = re.match(r"\w+\(([^[\n]*)\)\n", function.__doc__ or "")  # without optional arguments, such as divmod's
        return said and inspect.signature(eval(f"lambda {said[1]}: None".replace("\\", "")))


def _function(name, real, of_numpy):
    signature = _signature(real)
    from_host = name in ("array", "asarray", "ascontiguousarray", "asanyarray", "asfortranarray")

    @functools.wraps(real, assigned=("__name__", "__doc__"))
    def function(*args, **kwargs):
        if signature is not None:
            signature.bind(*args, **kwargs)
        args = [taken(value, from_host) for value in args]
        return given(of_numpy(*args, **{key: taken(value, from_host) for key, value in kwargs.items()}))

    if hasattr(real, "at"):
        function.at = lambda *args: of_numpy.at(*map(taken, args))
    return function


def _module(real, of_numpy):
    """A module with what both have: functions replaced, types and constants unchanged."""
    made = types.ModuleType(real.__name__, real.__doc__)
    made.__spec__, made.__path__ = real.__spec__, []
    for name in dir(real):
        found, numpys = getattr(real, name), getattr(of_numpy, name, None)
        if name.startswith("__") or numpys is None or isinstance(found, types.ModuleType):
            continue
        is_function = callable(found) and not isinstance(found, type)
        setattr(made, name, _function(name, found, numpys) if is_function else found)
    return made


def gemm(transa, transb, a, b, out=None, alpha=1.0, beta=0.0):
    """The product of cuBLAS: ``alpha * op(a) @ op(b) + beta * out``."""
    assert out is not None
    assert a.dtype == b.dtype == out.dtype
    assert a.dtype in (np.float32, np.float64)
    assert out.flags.c_contiguous  # or else CuPy makes a copy
    for array in (a, b):
        assert array.flags.c_contiguous or array.flags.f_contiguous
    product = alpha * (a if transa == "N" else a.T) @ (b if transb == "N" else b.T)
    out[...] = product if beta == 0 else product + beta * out
    return out


def install():
    """Takes the place of CuPy, whose signatures it reads first."""
    import cupy as real

    made = _module(real, np)
    made.ndarray, made.RawKernel, made.is_available = ndarray, RawKernel, lambda: True
    made.__version__ = real.__version__
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0, getDeviceCount=lambda: 1, runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000
    )
    stream = types.SimpleNamespace(synchronize=lambda: None, ptr=7)
    made.cuda, made.cuda.device = types.ModuleType("cupy.cuda"), types.ModuleType("cupy.cuda.device")
    made.cuda.device.Device = made.cuda.Device = Device
    made.cuda.runtime, made.cuda.get_current_stream = runtime, lambda: stream
    made.cuda.Stream = type("Stream", (), {"null": stream})
    made.cublas = types.ModuleType("cupy.cublas")
    source = Path(real.__file__).with_name("cublas.py").read_text()  # which cannot be imported without cuBLAS
    assert f"\ndef gemm{inspect.signature(gemm)}:\n" in source
    made.cublas.gemm = lambda *args, **kwargs: given(
        gemm(*map(taken, args), **{name: taken(value) for name, value in kwargs.items()})
    )
    for name in ("linalg", "fft", "random"):
        setattr(made, name, _module(getattr(real, name), getattr(np, name)))

    def standard_normal(size=None, dtype=float):  # with a dtype, which NumPy's lacks
        return given(np.random.default_rng(0).standard_normal(size).astype(dtype))

    made.random.standard_normal, made.random.default_rng = standard_normal, Generator
    for name in [name for name in sys.modules if re.match(r"(cupy|array_api_compat\.cupy)(\.|$)", name)]:
        del sys.modules[name]
    sys.modules |= {f"cupy.{name}": getattr(made, name) for name in ("cuda", "cublas", "linalg", "fft", "random")}
    sys.modules |= {"cupy": made, "cupy.cuda.device": made.cuda.device}
    return made


def main(arguments):
    install()
    os.chdir(ROOT)
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[:2] == ["-m", "xent_array"]:
        from xent_array import __main__ as program

        program.SIZE = (8, 100)  # the emulation is slow
        sys.exit(program.main(arguments[2:]))
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
