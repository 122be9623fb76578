"""Repeated calls: a call like an earlier one only looks at each array once and repeats the launches.

The first call of its kind goes through every check, and its engine records what it launches. Everything it decides
follows from the key: the function, the options with their types, and, of each array, everything the launcher looks at
beside its pointer (shape, strides, dtype, device, alignment to 16 bytes). A later call with the same key makes the same
launches, with its own pointers. What does not follow from the key is checked again: whether `out` shares memory with an
input. A call that checks the values themselves (``validate=True``) is never kept.

A call is kept only if everything about it is known: whatever was launched points either to an array of the caller or to
a buffer that the engine allocated, each array of the caller is among those (so the host read none of them instead), and
every result is `out` or such a buffer. A conversion, a copy, or an array of another kind is neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _engines
from ._engines.cuda import KINDS as KINDS
from ._engines.cuda import Run, Slots, Tape, Words, send
from ._rows import Array, Asked

MOST = 256  # calls that are kept; beyond that, the oldest is dropped
_NUMBERS = (float, int)
_SCALARS = frozenset({int, float, bool, str, type(None)})

# What is left of `Asked` are numbers, names and flags, which all belong to the key.
_NO_ARRAYS = {"weight": None, "sample_weight": None, "denominator": None, "grad_output": None, "engine": None}

_kept: dict[Any, Kept] = {}  # no lock, which might be held at a fork: every operation on it is atomic


class Kept(NamedTuple):
    """What a call did. Arrays are numbered: first those of the caller, then the buffers, which the engine allocated."""

    engine: Any
    buffers: tuple[tuple[tuple[int, ...], Any], ...]  # shapes and dtypes
    launches: tuple[tuple[Run, Words, Slots], ...]
    results: tuple[int | None, ...]
    reach: tuple[int, int] | None  # as `_reach` gives it for `out`; None: no out
    inputs: tuple[tuple[int, int, int], ...]  # that `out` must not overlap: number and reach

    def again(self, arrays: list[Any], pointers: list[int]) -> tuple[Array | None, ...] | None:
        """The results for other arrays; None, with nothing launched, if `out` shares memory with an input."""
        if self.reach is not None:
            first, last = pointers[-1] + self.reach[0], pointers[-1] + self.reach[1]
            for k, low, high in self.inputs:
                if pointers[k] + low < last and first < pointers[k] + high:
                    return None
        launcher = self.engine.launcher
        with launcher.on(arrays[0]):
            for shape, dtype in self.buffers:
                buffer = launcher.empty(shape, dtype)
                arrays.append(buffer)
                pointers.append(launcher.look(buffer)[0])
            for run, words, slots in self.launches:
                send(run, words, slots, pointers, arrays)
        return tuple([None if k is None else arrays[k] for k in self.results])


class Call:
    """A call that has not been kept yet."""

    def __init__(self, key: Any, arrays: list[Any], pointers: list[int]) -> None:
        self.key, self.arrays, self.pointers = key, arrays, pointers
        self.engine: Any = None
        self.tape: Tape | None = None

    def noted(self, engine: Any) -> Any:
        """The engine that will answer, recording what it launches if it can."""
        if not hasattr(engine, "noting"):
            return engine
        self.engine = engine
        noting, self.tape = engine.noting()
        return noting

    def keep(self, *results: Array | None) -> None:
        """Keep the call if everything about it is known."""
        made = None if self.tape is None or self.tape.copies else self._made(self.tape, results)
        if made is None:
            return
        for oldest in list(_kept)[: max(0, len(_kept) - MOST + 1)]:
            _kept.pop(oldest, None)
        _kept[self.key] = made

    def _made(self, tape: Tape, results: tuple[Array | None, ...]) -> Kept | None:
        given, out = self.arrays, self.arrays[-1]
        arrays, look = [*given, *tape.buffers], tape.look
        kind = type(given[0])
        pointers = [look(array)[0] if type(array) is kind else 0 for array in arrays]
        known = {pointer: k for k, pointer in enumerate(pointers) if pointer}
        twice = out is given[0]  # in place: one array has two numbers
        if len(known) != sum(pointer != 0 for pointer in pointers) - twice:
            return None  # two arrays start at the same address
        launches = []
        for run, words, slots, touched in tape.launches:
            found = [known[pointer] for array in touched if (pointer := look(array)[0]) in known]
            if len(found) < len(touched):
                return None
            launches.append((run, words, tuple((at, found[k]) for at, k in slots)))
        touched_by_some = {k for _, _, slots in launches for _, k in slots}
        if not touched_by_some.issuperset(known[pointer] for pointer in pointers[: len(given)] if pointer):
            return None
        buffers = [(tuple(buffer.shape), buffer.dtype) for buffer in tape.buffers]
        numbers: list[int | None] = []
        for result in results:
            if result is None:
                numbers.append(None)
                continue
            k = len(given) - 1 if result is out else known.get(look(result)[0]) if type(result) is kind else None
            if k is None or (k < len(given) and result is not out):
                return None
            numbers.append(k)
            if result is not out:
                buffer = arrays[k]
                if not result.flags.c_contiguous or (result.nbytes, result.dtype) != (buffer.nbytes, buffer.dtype):
                    return None
                buffers[k - len(given)] = tuple(result.shape), buffer.dtype
        inputs = [
            (k, *_reach(array))
            for k, array in enumerate(given[:-1])
            if type(array) is kind and not (k == 0 and twice) and 0 not in array.shape
        ]
        reach = None if out is None else _reach(out)
        return Kept(self.engine, tuple(buffers), tuple(launches), tuple(numbers), reach, tuple(inputs))


def _reach(array: Array) -> tuple[int, int]:
    """Offsets in bytes from an array's pointer to its first byte and past its last byte."""
    steps = [step * (length - 1) for step, length in zip(array.strides, array.shape, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + int(array.dtype.itemsize)


def forget() -> None:
    """Forget all kept calls."""
    _kept.clear()


def ask(question: str, asked: Asked, arrays: list[Any], out: Any = None) -> tuple[tuple[Any, ...] | None, Call | None]:
    """The answer from a kept call; otherwise None and a `Call` that records this one, or None if it cannot be kept.

    `arrays` are the logits (of a type in KINDS) and what is passed beside them that is no option.
    """
    options: tuple[Any, ...] = asked._replace(**_NO_ARRAYS)
    types, engine = tuple(map(type, options)), asked.engine
    if not _SCALARS.issuperset(types) or asked.validate:
        return None, None
    arrays = [*arrays, asked.weight, asked.sample_weight, asked.denominator, asked.grad_output, out]
    logits = arrays[0]
    kind = logits.__class__
    look = KINDS[kind]
    looks: list[Any] = []
    pointers = []
    for given in arrays:
        pointer, seen = 0, None
        if given is not None:
            if given.__class__ is kind:
                pointer, seen = look(given)
            elif given.__class__ in _NUMBERS:
                seen = given
            else:
                return None, None
        looks.append(seen)
        pointers.append(pointer)
    key = (question, engine, options, types, tuple(looks), out is logits)
    try:
        kept = _kept.get(key)
    except TypeError:  # an engine may not be hashable
        return None, None
    if kept is None:
        return None, Call(key, arrays, pointers)
    if kept.engine is not engine and _engines.ENGINES.get(kept.engine.name) is not kept.engine:
        return None, None  # the name now belongs to another engine
    return kept.again(arrays, pointers), None
