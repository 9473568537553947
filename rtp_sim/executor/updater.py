"""`Updater`: the optimizer steps of one rank's program, on the weights, gradients and states that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rtp_sim.executor.gradients import GradientWatch
from rtp_sim.executor.optimizer import Hyper, State, Update, update_all
from rtp_sim.executor.parameters import Share
from rtp_sim.executor.shares import OptimizerWork, local_numel, optimizer_work
from rtp_sim.executor.storage import Storage
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Compute, Holding, Op, Schedule


class Updater:
    """`states` is what the optimizer keeps, by buffer. `parameter_count` says how many parameters of a holding the rank
    has at rest; `watch` by what gradients are multiplied."""

    def __init__(
        self, schedule: Schedule, rank: int, training: TrainingSpec, hyper: Hyper, storage: Storage,
        watch: GradientWatch, parameter_count: Callable[[Holding], int],
    ) -> None:  # fmt: skip
        self.states: dict[str, State] = {}
        self._schedule, self._rank, self._program = schedule, rank, schedule.program(rank)
        self._training, self._hyper = training, hyper
        self._storage, self._watch, self._parameter_count = storage, watch, parameter_count
        self._works: dict[int, list[OptimizerWork]] = {}
        self._state_parts: dict[tuple[str, int, int], tuple[State, State]] = {}

    def works(self) -> list[OptimizerWork]:
        """What all optimizer steps of the program update."""
        steps = [op for op in self._program.ops if isinstance(op.action, Compute) and op.action.kernel == "optimizer"]
        return [work for op in steps for work in self._works_of(op)]

    def _works_of(self, op: Op) -> list[OptimizerWork]:
        """What one optimizer step updates."""
        if op.index not in self._works:
            self._works[op.index] = optimizer_work(self._schedule, self._rank, op, self._parameter_count)
        return self._works[op.index]

    def step(self, op: Op, number: int) -> None:
        """Updates what `op` updates, in the optimizer's step `number`, from 1."""
        works = self._works_of(op)
        if self._watch.changes_gradients:
            # Clipped gradients are copies: one work's at a time.
            for work in works:
                update_all(self._training.optimizer, self._hyper, number, self._parts_of(work))
        else:
            parts = (part for work in works for part in self._parts_of(work))
            update_all(self._training.optimizer, self._hyper, number, parts)

    def _parts_of(self, work: OptimizerWork) -> Iterator[Update]:
        """Weights, gradients and state of a share, buffer by buffer."""
        for start, weights in work.weights.views(self._storage):
            stop = start + weights.numel()
            gradients = work.gradients.part(self._storage, start, stop)
            yield weights, self._watch.multiplied(gradients), self._state_part(work.state.name, start, stop)

    def _state_part(self, name: str, start: int, stop: int) -> State:
        """A part of a state, the same views in every step."""
        state, known = self.states[name], self._state_parts.get((name, start, stop))
        if known is None or known[0] is not state:
            known = self._state_parts[name, start, stop] = state, state.part(start, stop)
        return known[1]

    def gradient_shares(self, op: Op) -> list[Share]:
        """Copies of the gradients that `op` updates with, with the places of their parameters in the sequence."""
        return [self._gradient_share(work) for work in self._works_of(op)]

    def _gradient_share(self, work: OptimizerWork) -> Share:
        stretch, state = work.gradients, work.state
        size = stretch.stop - stretch.start
        content = stretch.part(self._storage, 0, size).clone() if size else torch.zeros(0)
        content = self._watch.multiplied(content)
        buffers = [self._program.buffers[name] for name in work.weights.buffers]
        if state.slice_of and not buffers[0].slice_of:
            # In a sequence of buffers each takes the room of its largest shard.
            widths = tuple(local_numel(self._schedule, self._rank, buffer) for buffer in buffers)
        else:
            widths = tuple(self._parameter_count(h) for h in state.holds)
        return Share(state.holds, widths, state.slice_of, content)
