"""`Stages`: which blocks of a network each stage of a pipeline works on, and which tensor passes from chunk to chunk.

A network is cut into stages x chunks consecutive pieces. Chunk c of stage s is piece c x stages + s, or in a V (two
chunks) pieces s and 2 stages - 1 - s. Embedding and head go with the first and last transformer block.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.model.layers import Layer, split_sizes
from rtp_sim.model.network import Block, Network

Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Stages:
    """`pieces[k]` are the blocks of piece k; `crossing[k]` the tensor that piece k hands to piece k + 1."""

    count: int
    chunks: int
    v_shape: bool
    pieces: tuple[Blocks, ...]
    crossing: tuple[str, ...]

    def piece(self, stage: int, chunk: int) -> int:
        """Number of the piece that is chunk `chunk` of a stage."""
        if self.v_shape and chunk == 1:
            return 2 * self.count - 1 - stage
        return chunk * self.count + stage

    def stage_of(self, piece: int) -> int:
        """The stage that works on a piece."""
        turn, place = divmod(piece, self.count)
        return self.count - 1 - place if self.v_shape and turn == 1 else place

    def blocks(self, stage: int) -> Blocks:
        """All blocks of a stage, in forward order."""
        return tuple(block for c in range(self.chunks) for block in self.pieces[self.piece(stage, c)])


def cut(network: Network, stages: int, chunks: int, v_shape: bool, layers: tuple[int, ...], balance: str) -> Stages:
    """The network in stages x chunks pieces.

    `layers` says how many transformer blocks each piece has; without it `balance` does: "layers" gives equal numbers,
    one less to the first and the last piece where that comes out even (embedding and head count as a block, and may be
    all that their piece has), else the larger ones first; "cost" closes a piece once the weights of its
    matrices exceed its share, counting the head, whose layers may then lie on two pieces.

    InputError if the numbers do not fit, a piece would be empty, or more than one tensor crosses a cut.
    """
    first, middle, last = _ends(network)
    parts = stages * chunks
    if balance == "cost" and not layers:
        pieces = _by_cost(first, middle, last, parts)
    else:
        ends_alone = bool(first) and bool(last) and len(middle) + 2 == parts
        if len(middle) < parts and not ends_alone:
            raise InputError(f"{len(middle)} blocks are too few for {stages} stages with {chunks} chunks each: give "
                             f"every chunk at least one block")  # fmt: skip
        counts = _given(layers, parts, len(middle)) if layers else _by_number(len(middle), parts)
        ends = [sum(counts[: k + 1]) for k in range(parts)]
        pieces = [middle[end - count : end] for count, end in zip(counts, ends, strict=True)]
        pieces[0] = (*first, *pieces[0])
        pieces[-1] = (*pieces[-1], *last)
    crossing = tuple(_crossing(pieces, k) for k in range(parts - 1))
    return Stages(stages, chunks, v_shape, tuple(pieces), crossing)


def _ends(network: Network) -> tuple[Blocks, Blocks, Blocks]:
    """What comes before the transformer blocks, these, and what comes after; all are in the middle where none is."""
    blocks = network.blocks
    places = [i for i, block in enumerate(blocks) if block.recomputable]
    if not places:
        return (), blocks, ()
    return blocks[: places[0]], blocks[places[0] : places[-1] + 1], blocks[places[-1] + 1 :]


def _given(layers: tuple[int, ...], parts: int, total: int) -> tuple[int, ...]:
    if len(layers) != parts or sum(layers) != total or min(layers) < 1:
        raise InputError(f"--pp-layers {','.join(map(str, layers))}: expected {parts} numbers of at least 1 that sum "
                         f"to the model's {total} blocks")  # fmt: skip
    return layers


def _by_number(total: int, parts: int) -> tuple[int, ...]:
    if total % parts and (total + 2) % parts == 0 and parts > 1:
        each = (total + 2) // parts
        return (each - 1, *(each,) * (parts - 2), each - 1)
    return tuple(split_sizes(total, parts))


def _by_cost(first: Blocks, middle: Blocks, last: Blocks, parts: int) -> list[Blocks]:
    """Nanotron's rule: walk blocks, and the layers of the head one by one, and go on to the next piece once the cost so
    far exceeds the pieces' share. A piece may have a part of the head alone.

    The head counts half its weights. Counted in full, as in the released code, 16 blocks of a model whose head weighs
    four of them would leave the loss alone on the last of eight stages; published step times of 4, 8 and 16 stages are
    met only with a share between 0.34 and 0.57.
    """
    head = [Block(block.name, (layer,)) for block in last for layer in block.layers]
    units = [*middle, *head]
    costs = [2 * _matrix_weights(block) for block in middle] + [_matrix_weights(block) for block in head]
    pieces: list[list[Block]] = [[*first]]
    so_far = 0
    for unit, cost in zip(units, costs, strict=True):
        pieces[-1].append(unit)
        so_far += cost
        # Integers, so that the comparison is exact; what comes after the last costly unit stays with it.
        if so_far * parts > sum(costs) * len(pieces) and len(pieces) < parts:
            pieces.append([])
    if len(pieces) != parts or not all(pieces):
        full = sum(map(bool, pieces))
        raise InputError(f"balanced by cost, {len(middle)} blocks and the head fill {full} of {parts} pieces: give "
                         f"--pp-layers, or fewer stages")  # fmt: skip
    return [_joined(piece) for piece in pieces]


def _joined(blocks: list[Block]) -> Blocks:
    """Neighbours of one name, which are layers of one block, as one block again."""
    found: list[Block] = []
    for block in blocks:
        if found and found[-1].name == block.name:
            found[-1] = Block(block.name, (*found[-1].layers, *block.layers))
        else:
            found.append(block)
    return tuple(found)


def _matrix_weights(block: Block) -> int:
    """Weights of the matrices that a block multiplies with; an embedding is looked up."""
    return sum(p.numel for layer in block.layers if _multiplies(layer) for p in layer.op.params() if len(p.shape) > 1)


def _multiplies(layer: Layer) -> bool:
    return type(layer.op).__name__ in ("Linear", "Attention", "Mlp", "Experts", "Conv2d")


def _crossing(pieces: list[Blocks], k: int) -> str:
    """The tensor that piece k + 1 and later ones read of piece k and earlier ones."""
    made = {x.output for piece in pieces[: k + 1] for block in piece for x in block.layers}
    read = {t for piece in pieces[k + 1 :] for block in piece for x in block.layers for t in x.inputs}
    crossing = sorted(made & read)
    if len(crossing) != 1:
        raise InputError(f"{len(crossing)} tensors cross from pipeline piece {k} to {k + 1} ({', '.join(crossing)}); "
                         f"expected one")  # fmt: skip
    return crossing[0]
