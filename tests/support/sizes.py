"""The sizes that the CPU engine decides by, changed for a test: what takes large arrays happens to small ones."""

import sys
from contextlib import contextmanager
from functools import lru_cache

import pytest

from xent_array._engines import cpu
from xent_array._engines.cpu import path

PACKAGE = cpu.__name__


def resize(monkeypatch, **sizes):
    """`BLOCK`, `TILE`, `SERIAL`, `LARGE`, … in every module of the engine that has one of that name."""
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{PACKAGE}.")]
    for name, size in sizes.items():
        having = [module for module in modules if name in vars(module)]
        assert having, name
        for module in having:
            monkeypatch.setattr(module, name, size)
    fields = path.Path._field_defaults | {"block": path.BLOCK, "serial": path.SERIAL}
    monkeypatch.setattr(path.Path.__new__, "__defaults__", tuple(fields.values()))
    forget(monkeypatch)


def forget(monkeypatch):
    """What was decided before is decided anew, and what is decided now is not remembered after the test."""
    for name, module in [*sys.modules.items()]:
        if f"{name}.".startswith(f"{PACKAGE}."):
            for called, function in [*vars(module).items()]:
                if hasattr(function, "cache_parameters") and getattr(function, "__module__", "") == name:
                    monkeypatch.setattr(module, called, lru_cache(**function.cache_parameters())(function.__wrapped__))


@contextmanager
def resized(**sizes):
    with pytest.MonkeyPatch.context() as patched:
        resize(patched, **sizes)
        yield


def only_contiguous(monkeypatch):
    """Every row that is for compiled loops is taken by the one of contiguous rows."""
    resize(monkeypatch, TRANSPOSED=0, TRANSPOSED_ALONE=0, SIDE_BY_SIDE=1 << 60)
