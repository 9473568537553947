"""What a source's number for peak memory counts: which ranks, which unit, tensors alone or all that a process holds.

An estimate says what tensors occupy on each stage of a pipeline. A source prints something else: the peak of rank 0 or
the largest of some ranks, in 10^9 or 2^30 bytes, what torch's allocator has handed out, what it has reserved, or what
nvidia-smi shows. The column `memory_metric` says which, as far as it does; habits of the framework say the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.compose.memory import StageMemory
from rtp_sim.validation.frameworks import Habits
from rtp_sim.validation.measured import RowFile

GIB, GB = 1 << 30, 10**9
ALL, FIRST, ENDS = "all", "first", "ends"

FRAGMENTED = 0.06
"""Of what is allocated and freed within a step, so much more is reserved (cells of 2 MiB, blocks that fit nothing).
Fitted to nanotron's calibration rows without tensor parallelism, whose sizes nothing else blurs."""

IN_FLIGHT = 5
"""Gathered copies of a layer's input that exist at once where none is kept: inputs, partial outputs and their gradients
of neighbouring layers. Fitted to nanotron's calibration rows with tensor parallelism over nodes."""

PERMANENT = ("weights", "gradients", "optimizer")
"""Categories that are there from step to step; all others come and go."""


@dataclass(frozen=True, slots=True)
class Reading:
    """`stages`: "all" takes the stage that holds most, "first" the one of rank 0, "ends" the larger of first and last.
    `unit_bytes` is what the number counts in. `reserved`: with what the allocator holds beside tensors; `outside_bytes`
    is held by others (context, NCCL, a framework's own buckets). `kept_share` of gathered copies is held,
    `least_gathered_bytes` at least; `spare_share` instead where the first would not fit.
    """

    stages: str = ALL
    unit_bytes: int = GIB
    reserved: bool = False
    outside_bytes: int = 0
    kept_share: float = 1.0
    spare_share: float = 1.0
    least_gathered_bytes: int = 0

    def peak_bytes(self, stages: Sequence[StageMemory], capacity_bytes: int) -> int:
        """The source's number for these stages, in bytes."""
        picked = {ALL: stages, FIRST: stages[:1], ENDS: (stages[0], stages[-1])}[self.stages]
        return max(self._bytes(stage.held, capacity_bytes) for stage in picked) + self.outside_bytes

    def needed_bytes(self, stages: Sequence[StageMemory], capacity_bytes: int) -> int:
        """What the stage that holds most needs of the device, beside what is outside of the allocator."""
        return max(self._bytes(stage.held, capacity_bytes) for stage in stages)

    def _bytes(self, held: Mapping[str, int], capacity_bytes: int) -> int:
        found = self._with_share(held, self.kept_share)
        return found if found <= capacity_bytes else self._with_share(held, self.spare_share)

    def _with_share(self, held: Mapping[str, int], share: float) -> int:
        permanent = sum(held.get(c, 0) for c in PERMANENT)
        gathered = held.get("communication", 0)
        passing = sum(held.values()) - permanent - gathered
        slack = 1 + FRAGMENTED if self.reserved else 1.0
        kept = gathered if share == 1 else max(share * gathered, min(gathered, self.least_gathered_bytes))
        return permanent + round(slack * passing + kept)


AS_TENSORS = Reading()
"""The most that tensors of any rank hold, in units of 2^30 bytes."""


def reading_of(cells: RowFile, habits: Habits) -> Reading:
    """How the row's source counts."""
    text = cells.memory_metric.lower()
    stages = habits.memory_stages
    if "rank 0" in text:
        stages = FIRST
    elif "first/last" in text:
        stages = ENDS
    elif "over stages" in text:
        stages = ALL
    device = "nvidia-smi" in text
    says_one = ("allocated" in text) != ("reserved" in text)
    reserved = device or ("reserved" in text if says_one else habits.memory_reserved)
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    share, spare, least = _gathered(cells, habits)
    return Reading(
        stages, GB if "gb" in words else GIB, reserved, habits.outside_bytes if device else 0, share, spare, least,
    )  # fmt: skip


def _gathered(cells: RowFile, habits: Habits) -> tuple[float, float, int]:
    """(share of gathered copies held, share where that would not fit, least bytes)."""
    if not habits.gathers_again or cells.tp == 1:
        return 1.0, 1.0, 0
    copy = cells.micro_batch * cells.seq_len * cells.hidden_size * 2
    least = IN_FLIGHT * copy
    if cells.pp == 1:
        return 1.0, 0.0, least
    within = cells.tp <= (cells.gpus_per_node or 8)
    return (1 - 1 / cells.pp if within else 0.0), 0.0, least
