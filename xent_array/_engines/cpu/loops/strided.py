"""Strided rows: adjacent in memory, with their classes apart, so that each row occupies one vector lane as it is.

A tile holds neighboring rows with all their classes. Rows of few classes are processed tile by tile, all others in a
pipeline of tiles.
"""

from __future__ import annotations

from functools import partial

from . import FEW, GRAD, LANES, STREAM
from .call import Call
from .pipeline import Stage, Tiles, read_lines, write_lines
from .pipeline import rows as in_pipeline
from .process import Ahead, Room, exceptions_of, process, uniform_in
from .simd import Array, Value, constant, either, loop, make_compact, when, where
from .tiles import ALL, TWO, Gradient, Maximum, find_max


def rows(call: Call) -> None:
    """See `loops`."""
    make_compact()
    with either(call.told.classes > FEW) as (many, few):
        with many:
            in_pipeline(call)
        with few:
            _in_tiles(call)


def _in_tiles(call: Call) -> None:
    told, tiles, zero, one = call.told, Tiles(call), constant(0), constant(1)
    stage = tiles.stage(zero, tiles.logits(zero))
    slopes = tiles.buffer(one).part(0, where(told.softcap > 0, tiles.size, 0))
    room = Room(stage.tile, stage.state, slopes, uniform_in(call.q))
    exceptions, soon = exceptions_of(call, room), call.out.part(0, where(call.asks(STREAM), 0, call.out.length))
    for t in loop(tiles.number):
        written, following = tiles.gradient(t), tiles.logits(where(t + 1 < tiles.number, t + 1, t))
        here = stage._replace(lines=tiles.logits(t), rows=tiles.rows(t))
        read, strip = partial(_read, here, tiles.strip, told.is_half != 0), tiles.strip.part(0, here.rows)
        ahead = Ahead(following, one, written._replace(numbers=soon), one)
        process(call, room, tiles.first(t), here.rows, read, ahead)
        for kind in (TWO, ALL):
            with when(call.asks(GRAD) & (exceptions == kind)):
                gradient_of = partial(Gradient, room.tile, room.slopes, room.state, exceptions=kind)
                is_streamed = tiles.is_streamed(t)
                write_lines(zero, told.classes, gradient_of, written, strip, told.is_half != 0, is_streamed)


def _read(stage: Stage, strip: Array, is_half: Value) -> None:
    """Read a tile, and find what `Maximum` says of its rows."""
    tile, lines, zero, whole = stage.tile, stage.lines, constant(0), stage.rows & -LANES
    if lines.numbers.has_16_bits:
        read_lines(zero, tile.classes, stage, strip, is_half)
        whole = zero
    else:
        for row in loop(0, whole, LANES):
            maximum = Maximum(tile, stage.state, row)
            for c in loop(tile.classes):
                logits = lines.numbers.load(lines.place(c) + row, LANES)
                tile.numbers.store(logits, tile.place(row, c))
                maximum.add(c, [logits], tile.has_few)
            maximum.store()
        for row in loop(whole, stage.rows):
            for c in loop(tile.classes):
                tile.numbers.store(lines.numbers.load(lines.place(c) + row), tile.place(row, c))
    for row in loop(whole, stage.rows, LANES):
        find_max(tile, zero, tile.classes, stage.state, row)
