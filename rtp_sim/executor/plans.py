"""Planners of torch.distributed.checkpoint for tensors that lie in pieces: what to write, and what to read into where.

DCP knows a tensor as chunks: boxes of the full tensor, each stored once. A rank offers its pieces (pieces.py) as
chunks; DCP stores one of those that several ranks have, and on loading finds out which stored chunks a rank's pieces
overlap. So nothing here knows of strategies or numbers of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rtp_sim.executor.pieces import Piece

Path = tuple[str, ...]
"""Where a tensor lies in nested dictionaries: ("model", "h0.attn.qkv"). DCP joins it with dots."""


@dataclass(frozen=True, slots=True)
class Held:
    """A piece of the tensor at `path`, whose full shape is `shape`, and the flat tensor in which the rank holds it."""

    path: Path
    shape: tuple[int, ...]
    piece: Piece
    flat: torch.Tensor

    @property
    def key(self) -> str:
        """The tensor's name in the checkpoint."""
        return ".".join(self.path)

    def chunk(self) -> ChunkStorageMetadata:
        """The piece as DCP says it."""
        return ChunkStorageMetadata(torch.Size(self.piece.offsets), torch.Size(self.piece.sizes))

    def view(self) -> torch.Tensor:
        """The piece itself."""
        return self.piece.view(self.flat)


class PieceSavePlanner(DefaultSavePlanner):
    """Writes the rank's pieces, but for copies of what another rank has, and `facts` (nested plain values)."""

    def __init__(self, held: Sequence[Held], facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._facts = facts
        self._held = {MetadataIndex(h.key, h.piece.offsets): h for h in held if not h.piece.copy}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Takes the facts for the state; the pieces come beside it."""
        super().set_up_planner(dict(self._facts), storage_meta, is_coordinator)
        self.mappings |= {h.key: h.path for h in self._held.values()}

    def create_local_plan(self) -> SavePlan:
        """One item per fact and piece."""
        plan = super().create_local_plan()
        items = [_write_item(index, held) for index, held in self._held.items()]
        self.plan = replace(plan, items=[*plan.items, *items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The data of an item."""
        return self._held[index].view() if index in self._held else super().lookup_object(index)


def _write_item(index: MetadataIndex, held: Held) -> WriteItem:
    data = TensorWriteData(held.chunk(), TensorProperties(held.flat.dtype), torch.Size(held.shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class PieceLoadPlanner(LoadPlanner):
    """Reads all pieces, copies too, into their places. The checkpoint must have the tensors, in their shapes."""

    def __init__(self, held: Sequence[Held]) -> None:
        self._held: dict[str, list[Held]] = {}
        for h in held:
            self._held.setdefault(h.key, []).append(h)
        self._metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keeps what the checkpoint holds."""
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """One item per overlap of a stored chunk with a piece."""
        assert self._metadata is not None
        items: list[ReadItem] = []
        for key, held in self._held.items():
            stored = self._metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [h.chunk() for h in held])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads what it needs."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: only tensors are asked for."""
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where the item's data go."""
        target = read_item.dest_index
        assert target.index is not None
        view = self._held[target.fqn][target.index].view()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """They are there already: views."""
