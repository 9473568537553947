"""What a rank knows of all gradients together: their norm, whether they are finite, and the loss scale that follows.

A rank sums the squares of the gradients that it updates with. A parameter that lies on every rank of the group along
which layers are split (a norm, a bias of a layer split by rows) counts there by its share, padding not at all; so the
sum over the ranks counts each parameter once. The same formulas as torch.nn.utils.clip_grad_norm_ and
torch.amp.GradScaler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rtp_sim.errors import InputError
from rtp_sim.executor.packing import ranges
from rtp_sim.executor.parameters import place_of, slice_place
from rtp_sim.executor.shares import OptimizerWork, Stretch, local_numel
from rtp_sim.model.layers import Layer
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Op, Program, Schedule
from rtp_sim.schedule.update import GRAD_NORM, LOSS_SCALE, STAGES

CLIP_EPS = 1e-6
LARGEST_SCALE = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Counted:
    """Elements [start, stop) of the gradients of one share; each lies on `copies` of the ranks that are summed over."""

    work: OptimizerWork
    start: int
    stop: int
    copies: int


def counted(schedule: Schedule, rank: int, work: OptimizerWork, layers: Mapping[str, Layer]) -> list[Counted]:
    """Which gradients of a share the rank counts: those of parameters, without the padding between and behind them."""
    first, size = _window(schedule, rank, work)
    found: list[Counted] = []
    for begin, end, copies in _parameters(schedule, rank, work, layers):
        start, stop = max(begin - first, 0), min(end - first, size)
        if start >= stop:
            continue
        if found and found[-1].stop == start and found[-1].copies == copies:
            start = found.pop().start
        found.append(Counted(work, start, stop, copies))
    return found


def _window(schedule: Schedule, rank: int, work: OptimizerWork) -> tuple[int, int]:
    """Where the rank's part begins in the sequence of the share's parameters, and its length."""
    size = work.weights.stop - work.weights.start
    weights = schedule.program(rank).buffers[work.weights.buffers[0]]
    if weights.slice_of:
        return slice_place(schedule, rank, weights.slice_of).index * local_numel(schedule, rank, weights), size
    return work.weights.start, size


def _parameters(
    schedule: Schedule, rank: int, work: OptimizerWork, layers: Mapping[str, Layer]
) -> list[tuple[int, int, int]]:
    """Begin, end and copies of every parameter tensor in the sequence of the share."""
    buffers, place = schedule.program(rank).buffers, place_of(schedule, rank)
    alone = [buffers[name] for name in work.weights.buffers if not buffers[name].slice_of]
    # In a sequence of buffers each takes the room of its largest shard.
    room = {b.holds[0]: local_numel(schedule, rank, b) for b in alone if len(b.holds) == 1}
    found, offset = [], 0
    for holding in work.state.holds:
        op, split = layers[holding.layer].op, place.split(holding)
        at, stages = offset, _stages_with(schedule, rank, holding.layer)
        for param in op.params(split):
            copies = stages * (place.n if ranges(op, param.name, split) is None else 1)
            found.append((at, at + param.numel, copies))
            at += param.numel
        offset += room.get(holding, at - offset)
    return found


def _stages_with(schedule: Schedule, rank: int, layer: str) -> int:
    """How many stages of the rank's pipeline keep the weights of a layer: of shared ones each has a copy."""
    if STAGES not in schedule.groups:
        return 1
    line = schedule.groups[STAGES].instances[schedule.groups[STAGES].place[rank][0]]
    kept = [{h.layer for b in schedule.program(r).buffers.values() for h in b.holds if b.live_in} for r in line]
    return sum(layer in stage for stage in kept)


@dataclass
class LossScaler:
    """The loss scale of the next step. Dynamic, it is multiplied by `backoff` after a step whose gradients are not all
    finite and by `growth` after `interval` others in a row, as long as it stays a finite fp32 number."""

    scale: float = 65536.0
    dynamic: bool = True
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """After a step."""
        if not self.dynamic:
            return
        if not finite:
            self.scale, self.good_steps = self.scale * self.backoff, 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            larger = self.scale * self.growth
            self.scale, self.good_steps = larger if larger <= LARGEST_SCALE else self.scale, 0


def loss_scaler(training: TrainingSpec) -> LossScaler:
    """The loss scale that a training starts with. InputError if it has none."""
    if training.initial_loss_scale is None:
        raise InputError("training: loss_scale is 'none', but the schedule scales the loss; expected dynamic, say")
    return LossScaler(training.initial_loss_scale, training.dynamic_loss_scale)


class GradientWatch:
    """What a rank's machine knows of all gradients of a step: `norm`, before clipping and without the loss scale, and
    `skipped`, whether the update was left out. From step to step it keeps the loss scale in `scaler` and in `left_out`
    how many updates were left out.

    InputError if the program scales the loss and `training` does not say how.
    """

    def __init__(self, program: Program, training: TrainingSpec) -> None:
        self.scaler: LossScaler | None = None
        self.size_bytes = 0
        if LOSS_SCALE in program.buffers:
            self.scaler = loss_scaler(training)
            self.size_bytes = program.buffers[LOSS_SCALE].size_bytes()
        self._clip_norm = training.clip_norm
        self.left_out = 0
        self.start_step()

    def start_step(self) -> None:
        """Nothing is known yet."""
        self.skipped = False
        self._norm: torch.Tensor | None = None
        self._factor: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        """What the loss is multiplied by in the backward pass."""
        return 1.0 if self.scaler is None else self.scaler.scale

    @property
    def norm(self) -> float | None:
        """The norm of all gradients of the step; None where the schedule does not measure it."""
        return None if self._norm is None else float(self._norm)

    def measure(
        self, op: Op, parts: Sequence[Counted], into: torch.Tensor, storage: Mapping[str, torch.Tensor]
    ) -> None:
        """The rank's part: the sum of squares of the counted gradients that `op` reads and, where `into` has a second
        element, 1 if one of them is not finite (0 for finite gradients whose squares overflow)."""
        views = []
        for c in parts:
            if not set(c.work.gradients.buffers) <= set(op.reads):
                continue
            stretch = c.work.gradients
            for _, view in Stretch(stretch.buffers, stretch.start + c.start, stretch.start + c.stop).views(storage):
                views.append(view)
                into[0] += torch.linalg.vector_norm(view, dtype=into.dtype).square() / c.copies
        # Where the sum is finite so is every gradient: no second look at them.
        if len(into) > 1 and not bool(torch.isfinite(into[0])):
            into[1] = float(not all(bool(torch.isfinite(v).all()) for v in views))

    def judge(self, op: Op, storage: Mapping[str, torch.Tensor]) -> None:
        """Before the optimizer step `op`: the norm, what gradients are multiplied by, whether to leave the step out."""
        if GRAD_NORM not in op.reads or self._norm is not None:
            return
        known = storage[GRAD_NORM]
        self._norm = known[0].sqrt() / self.scale
        self._factor = factor(self._norm, self._clip_norm, self.scale)
        self.skipped = self.scaler is not None and bool(known[1] > 0)
        self.left_out += self.skipped

    @property
    def changes_gradients(self) -> bool:
        """Whether `multiplied` makes other gradients than it is given."""
        return self._factor is not None

    def multiplied(self, gradients: torch.Tensor) -> torch.Tensor:
        """The gradients as the optimizer sees them: clipped and unscaled, in at least fp32 (fp16 would lose what is
        small again)."""
        return gradients if self._factor is None else gradients.to(self._factor.dtype) * self._factor

    def update_scale(self) -> None:
        """The loss scale of the next step."""
        assert self.scaler is not None
        self.scaler.update(finite=not self.skipped)


def factor(norm: torch.Tensor, clip_norm: float | None, scale: float) -> torch.Tensor:
    """What scaled gradients are multiplied by: unscaled, and shortened where `norm` (without the scale) is above
    `clip_norm`. A norm that is no number makes them none, as torch's does."""
    shorter = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + CLIP_EPS)).clamp(max=1.0)
    return shorter / scale
