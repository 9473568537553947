"""`Resume`: where a worker's training begins, and when its state is saved, as the request says.

Most runs load and save nothing: torch.distributed.checkpoint, seconds of importing, is for the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from rtp_sim.executor import checkpoint_files as files
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parameters import Parameters, blank_parameters, initial_parameters
from rtp_sim.executor.request import RunRequest
from rtp_sim.model.network import Network

if TYPE_CHECKING:
    from rtp_sim.executor.checkpoint import Checkpoint


class Resume:
    """`seed` is that of data and dropout: the training's own where one is loaded. `saved_steps` are those after which
    the state was saved. InputError if what the request loads cannot be read."""

    def __init__(self, request: RunRequest) -> None:
        self._request = request
        self._from: Checkpoint | None = None
        if request.load:
            from rtp_sim.executor.checkpoint import open_checkpoint

            self._from = open_checkpoint(Path(request.load))
        self.seed = request.seed if self._from is None else self._from.seed_of(request.seed)
        self.saved_steps: list[int] = []

    def parameters(self) -> Parameters:
        """What a machine is made with: initial weights, or blanks that `begin` fills."""
        network = self._request.network
        return initial_parameters(network, self.seed) if self._from is None else blank_parameters(network)

    def begin(self, machine: Machine) -> None:
        """The state to start from. InputError if it is another training's, or saving could not work."""
        if self._from is not None:
            from rtp_sim.executor.checkpoint import load

            load(machine, self._from)
        if self._request.save:
            from rtp_sim.executor.checkpoint import require_training

            require_training(machine)
            files.require_room(Path(self._request.save), machine.step)

    def full_parameters(self, network: Network) -> Parameters:
        """All weights that the training began with, on this rank alone: for a check."""
        if self._from is None:
            return initial_parameters(self._request.network, self.seed)
        from rtp_sim.executor.checkpoint import full_parameters

        return full_parameters(self._from, network)

    def due(self, machine: Machine, last: bool) -> bool:
        """Whether the state is to be saved after the step just done."""
        every = self._request.save_every
        return bool(self._request.save) and (last or (every > 0 and machine.step % every == 0))

    def save(self, machine: Machine, group: dist.ProcessGroup) -> None:
        """Saves the state, with all ranks of `group`. OSError if it cannot be written."""
        from rtp_sim.executor.checkpoint import save

        save(machine, Path(self._request.save), self.seed, group)
        self.saved_steps.append(machine.step)
