"""`Storage`: the flat buffers of one rank by name, and how many bytes they hold, now and at most.

A buffer exists from a fresh write to the last op that uses what was written (ir.Buffer); `last_uses` finds that op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import Program


def last_uses(program: Program) -> dict[int, tuple[str, ...]]:
    """Op index -> the buffers whose content nobody uses after that op: the next use is a fresh write, or there is none
    and the step does not keep it."""
    uses: dict[str, list[tuple[int, bool]]] = {}
    for op in program.ops:
        for name in dict.fromkeys(op.reads + op.writes):
            uses.setdefault(name, []).append((op.index, name not in op.reads))
    found: dict[int, list[str]] = {}
    for name, ops in uses.items():
        for i, (index, _) in enumerate(ops):
            over = ops[i + 1][1] if i + 1 < len(ops) else not program.buffers[name].live_out
            if over:
                found.setdefault(index, []).append(name)
    return {index: tuple(names) for index, names in found.items()}


Views = Mapping[str, torch.Tensor]
"""Parts of a flat tensor by name."""


class Storage(Mapping[str, torch.Tensor]):
    """Flat tensors by buffer name. `bytes_by_category` is what they hold now, `peak_bytes` the most since `reset_peak`,
    `peak_by_category` what they held then."""

    def __init__(self, program: Program) -> None:
        self._category = {name: b.category for name, b in program.buffers.items()}
        self._tensors: dict[str, torch.Tensor] = {}
        self._views: dict[str, dict[int, Views]] = {}
        self._total_bytes = 0
        self.bytes_by_category: dict[str, int] = {}
        self.peak_bytes = 0
        self.peak_by_category: dict[str, int] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ScheduleError(f"buffer {name!r} holds nothing here: no op before has written it") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def put(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        """Makes `flat` the content of the buffer."""
        if name in self._tensors:
            self.drop(name)
        self._tensors[name] = flat
        self.add_bytes(self._category[name], flat.nbytes)
        return flat

    def drop(self, name: str) -> None:
        """Frees the buffer, if there is one."""
        flat = self._tensors.pop(name, None)
        if flat is not None:
            self._views.pop(name, None)
            self.add_bytes(self._category[name], -flat.nbytes)

    def views(self, name: str) -> dict[int, Views]:
        """Views of the buffer that are wanted again in every step, by a number of the caller's; they go with it."""
        return self._views.setdefault(name, {})

    def reset_peak(self) -> None:
        """Starts counting the peak again, from what is held now."""
        self.peak_bytes = 0
        self._note_peak()

    def add_bytes(self, category: str, size_bytes: int) -> None:
        """Counts storage; also such that lies outside the buffers (optimizer states)."""
        self.bytes_by_category[category] = self.bytes_by_category.get(category, 0) + size_bytes
        self._total_bytes += size_bytes
        if self._total_bytes > self.peak_bytes:
            self._note_peak()

    def _note_peak(self) -> None:
        self.peak_bytes, self.peak_by_category = self._total_bytes, dict(self.bytes_by_category)
