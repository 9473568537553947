"""`Piece`: which box of a full parameter lies where in a rank's flat tensor, however ranks share parameters.

Shards are stretches of rows or columns, or of heads; a slice of a flat sequence cuts through parameters at any element.
All of these are unions of boxes (first index and length per dimension of the full tensor): a range of a row-major
matrix, for example, is the end of a row, whole rows, and the beginning of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rtp_sim.executor.packing import layout, ranges
from rtp_sim.executor.parameters import owners, parameter_name, place_of, slice_place
from rtp_sim.executor.shares import Stretch, local_numel
from rtp_sim.model.layers import LayerOp, Split
from rtp_sim.model.network import Network
from rtp_sim.schedule.ir import Buffer, Schedule

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and length per dimension."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Box (`offsets`, `sizes`) of the full parameter `name` (parameters.py) in a flat tensor: its first element is
    number `start` there, and neighbours along each dimension are `strides` apart. `copy`: the parameter is whole on
    every shard, and this is not the first of them."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    strides: tuple[int, ...]
    copy: bool

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The piece in the flat tensor, of shape `sizes`."""
        return flat.as_strided(self.sizes, self.strides, flat.storage_offset() + self.start)


def stretch_pieces(schedule: Schedule, network: Network, rank: int, stretch: Stretch) -> Iterator[Piece]:
    """What lies in a flat tensor whose elements belong to those of a stretch of weight buffers, one to one."""
    program, begin = schedule.program(rank), 0
    for name in stretch.buffers:
        buffer = program.buffers[name]
        size = local_numel(schedule, rank, buffer)
        first, last = max(stretch.start, begin) - begin, min(stretch.stop, begin + size) - begin
        yield from buffer_pieces(schedule, network, rank, buffer, first, last, begin - stretch.start)
        begin += size


def buffer_pieces(
    schedule: Schedule, network: Network, rank: int, buffer: Buffer, first: int, last: int, shift: int = 0
) -> Iterator[Piece]:
    """What lies in elements [first, last) of a weight buffer; element i of the buffer is number i + shift of the flat
    tensor that the pieces are for. Padding is no piece."""
    layers, place = owners(network), place_of(schedule, rank)
    skipped = 0
    if buffer.slice_of:
        skipped = slice_place(schedule, rank, buffer.slice_of).index * local_numel(schedule, rank, buffer)
    begin = -skipped
    for holding in buffer.holds:
        op, split = layers[holding.layer].op, place.split(holding)
        for param, a, b, shape in layout(op, split):
            p, q = max(first, begin + a), min(last, begin + b)
            copy = place.index > 0 and ranges(op, param, split) is None
            name = parameter_name(holding.layer, param)
            for local, full in _boxes_in_full(op, param, split, shape, p - begin - a, q - begin - a):
                strides = _strides(shape)
                start = begin + a + shift + sum(i * s for i, s in zip(local, strides, strict=True))
                yield Piece(name, *full, start, strides, copy)
        begin += op.numel(split)


def _boxes_in_full(
    op: LayerOp, param: str, split: Split, shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Elements [first, last) of a shard's parameter of that shape, as boxes: where each begins in the shard, and which
    box of the full parameter it is."""
    found = ranges(op, param, split)
    for offsets, sizes in boxes(shape, first, last):
        if found is None:
            yield offsets, (offsets, sizes)
            continue
        dim, stretches = found
        at = 0
        for a, b in stretches:
            begin, end = max(offsets[dim], at), min(offsets[dim] + sizes[dim], at + b - a)
            if begin < end:
                local = (*offsets[:dim], begin, *offsets[dim + 1 :])
                there = (*offsets[:dim], a + begin - at, *offsets[dim + 1 :])
                yield local, (there, (*sizes[:dim], end - begin, *sizes[dim + 1 :]))
            at += b - a


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Elements [first, last) of a row-major tensor of that shape as boxes: a few per dimension at most."""
    if first >= last:
        return
    if len(shape) == 1:
        yield (first,), (last - first,)
        return
    inner = math.prod(shape[1:])
    row, end = -(-first // inner), last // inner
    if row > end:
        # Within one row.
        yield from _in_row(end, shape, first, last)
        return
    if first < row * inner:
        yield from _in_row(row - 1, shape, first, row * inner)
    if row < end:
        yield (row, *(0 for _ in shape[1:])), (end - row, *shape[1:])
    if end * inner < last:
        yield from _in_row(end, shape, end * inner, last)


def _in_row(row: int, shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    begin = row * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], first - begin, last - begin):
        yield (row, *offsets), (1, *sizes)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
