"""How threads that make the same call share its rows: each takes some from one counter, until none are left."""

from __future__ import annotations

from . import LIMIT, NEXT
from .simd import Array, Value, Variable, constant, forever, smaller, when, where


def next_turn(turns: Array, least: Value, most: Value, team: Value) -> tuple[Value, Value]:
    """Take the next rows from the counter, see `loops`; return the first of them, or -1 if none are left, and how many.

    Turns shrink, so that threads that start at different times still finish together.
    """
    first, count = Variable(constant(-1)), Variable(constant(0))
    for stop in forever():
        limit, start = turns.load_atomic(LIMIT), turns.load_atomic(NEXT)
        left = limit - start
        with when(~(left > 0)):
            stop()
        share = smaller(left // team, most)
        share = smaller(where(share < least, least, share), left)
        with when(turns.replace_atomic(NEXT, start, start + share)):
            first.set(start)
            count.set(share)
            stop()
    return first.get(), count.get()


def end_turns(turns: Array) -> None:
    """Leave no rows to take, if there are turns."""
    with when(turns.length != 0):
        turns.store_atomic(constant(0), LIMIT)
