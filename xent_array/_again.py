"""Calls that were made before: the same question about other arrays costs one look at each, and the launches.

The first call of a kind goes through every check, and its engine notes what it launches. All that it has decided
follows from the key: the question, the options with their types, and of each array all that the launcher looks at
beside its pointer (shape, strides, dtype, device, where it starts in 16 bytes). A later call with that key makes the
same launches, each pointer in its place. What does not follow from the key is looked at anew: whether `out` shares
memory with an input. What is asked of the numbers themselves (``validate=True``) is never kept.

Kept is only a call of which everything is known: whatever was launched points to an array of the caller or to room that
the engine asked for, each array of the caller is among those (so that none was read by the host instead), and every
result is `out` or such room. A conversion, a copy, an array of another kind is neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _engines
from ._engines import Engine
from ._engines.cuda import KINDS as KINDS
from ._engines.cuda import Run, Slots, Tape, Words, send
from ._rows import Array

MOST = 256  # calls that are kept; then the oldest goes
_NUMBERS = (float, int)
_SCALARS = frozenset({int, float, bool, str, type(None)})

_kept: dict[Any, Kept] = {}  # without a lock, which a fork might find taken: each step on it is whole


class Kept(NamedTuple):
    """What a call did. Arrays are numbered: those of the caller, then the rooms."""

    engine: Any
    rooms: tuple[tuple[tuple[int, ...], Any], ...]  # shapes and dtypes
    launches: tuple[tuple[Run, Words, Slots], ...]
    results: tuple[int | None, ...]
    reach: tuple[int, int] | None  # bytes from the pointer of `out` to its first byte and past its last; None: no out
    inputs: tuple[tuple[int, int, int], ...]  # that may not share memory with it: which array, and its reach

    def again(self, arrays: list[Any], pointers: list[int]) -> tuple[Array | None, ...] | None:
        """The results for other arrays; None, and nothing launched, where `out` shares memory with an input."""
        if self.reach is not None:
            first, last = pointers[-1] + self.reach[0], pointers[-1] + self.reach[1]
            for k, low, high in self.inputs:
                if pointers[k] + low < last and first < pointers[k] + high:
                    return None
        launcher = self.engine.launcher
        with launcher.on(arrays[0]):
            for shape, dtype in self.rooms:
                room = launcher.empty(shape, dtype)
                arrays.append(room)
                pointers.append(launcher.look(room)[0])
            for run, words, slots in self.launches:
                send(run, words, slots, pointers, arrays)
        return tuple([None if k is None else arrays[k] for k in self.results])


class Call:
    """A call that is not kept yet."""

    def __init__(self, key: Any, arrays: list[Any], pointers: list[int]) -> None:
        self.key, self.arrays, self.pointers = key, arrays, pointers
        self.engine: Any = None
        self.tape: Tape | None = None

    def noted(self, engine: Any) -> Any:
        """The engine that is to answer; what it does is noted, if it can do that."""
        if not hasattr(engine, "noting"):
            return engine
        self.engine = engine
        noting, self.tape = engine.noting()
        return noting

    def keep(self, *results: Array | None) -> None:
        """Keep the call, if all of it is known."""
        made = None if self.tape is None or self.tape.copies else self._made(self.tape, results)
        if made is None:
            return
        for oldest in list(_kept)[: max(0, len(_kept) - MOST + 1)]:
            _kept.pop(oldest, None)
        _kept[self.key] = made

    def _made(self, tape: Tape, results: tuple[Array | None, ...]) -> Kept | None:
        given, out = self.arrays, self.arrays[-1]
        arrays, look = [*given, *tape.rooms], tape.look
        kind = type(given[0])
        pointers = [look(array)[0] if type(array) is kind else 0 for array in arrays]
        known = {pointer: k for k, pointer in enumerate(pointers) if pointer}
        twice = out is given[0]  # in place: one array under two numbers
        if len(known) != sum(pointer != 0 for pointer in pointers) - twice:
            return None  # two arrays start in one place
        launches = []
        for run, words, slots, touched in tape.launches:
            found = [known[pointer] for array in touched if (pointer := look(array)[0]) in known]
            if len(found) < len(touched):
                return None
            launches.append((run, words, tuple((at, found[k]) for at, k in slots)))
        touched_by_some = {k for _, _, slots in launches for _, k in slots}
        if not touched_by_some.issuperset(known[pointer] for pointer in pointers[: len(given)] if pointer):
            return None
        rooms = [(tuple(room.shape), room.dtype) for room in tape.rooms]
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
                room = arrays[k]
                if not result.flags.c_contiguous or (result.nbytes, result.dtype) != (room.nbytes, room.dtype):
                    return None
                rooms[k - len(given)] = tuple(result.shape), room.dtype
        inputs = [
            (k, *_reach(array))
            for k, array in enumerate(given[:-1])
            if type(array) is kind and not (k == 0 and twice) and 0 not in array.shape
        ]
        reach = None if out is None else _reach(out)
        return Kept(self.engine, tuple(rooms), tuple(launches), tuple(numbers), reach, tuple(inputs))


def _reach(array: Array) -> tuple[int, int]:
    """Bytes from the pointer of an array to its first byte, and past its last."""
    steps = [step * (length - 1) for step, length in zip(array.strides, array.shape, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + int(array.dtype.itemsize)


def forget() -> None:
    """All calls that are kept."""
    _kept.clear()


def ask(
    question: str, engine: str | Engine | None, options: tuple[Any, ...], arrays: list[Any]
) -> tuple[tuple[Any, ...] | None, Call | None]:
    """The answer, from a call that is kept; or this call, to be noted on the whole way; None where it cannot be kept.

    `arrays` are the logits, of a kind in KINDS, everything else that may be an array, and last `out`; the last option
    is `validate`.
    """
    types = tuple(map(type, options))
    if not _SCALARS.issuperset(types) or options[-1]:
        return None, None
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
    key = (question, engine, options, types, tuple(looks), arrays[-1] is logits)
    try:
        kept = _kept.get(key)
    except TypeError:  # an engine that cannot be hashed
        return None, None
    if kept is None:
        return None, Call(key, arrays, pointers)
    if kept.engine is not engine and _engines.ENGINES.get(kept.engine.name) is not kept.engine:
        return None, None  # another one has taken its name
    return kept.again(arrays, pointers), None
