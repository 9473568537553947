"""A rank's training state to and from torch.distributed.checkpoint (DCP), in names that no layout shows in.

    model.<layer>.<parameter>                             weights, in the shape of the whole parameter
    optimizer.<moment>.<layer>.<parameter>                exp_avg, exp_avg_sq; momentum_buffer; master (weights in fp32)
    training.step  training.seed  training.optimizer      steps done, seed of data and dropout, the optimizer's name

Each rank writes the shards it holds and reads those it needs, so a state may be loaded by another number of ranks and
another strategy. A checkpoint without `training` is a set of initial weights, of any float dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from rtp_sim.errors import InputError
from rtp_sim.executor import checkpoint_files as files
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parameters import Parameters, owners, parameter_name, place_of
from rtp_sim.executor.pieces import stretch_pieces
from rtp_sim.executor.plans import Held, PieceLoadPlanner, PieceSavePlanner
from rtp_sim.executor.shares import Stretch, local_numel, optimizer_work
from rtp_sim.model.network import Network
from rtp_sim.schedule.ir import Compute, Holding

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd-momentum": ("momentum_buffer",)}
"""What the numbers are called that an optimizer keeps per parameter: the names of torch.optim."""

FACTS = {"step": 0, "seed": 0, "optimizer": ""}


# ---- what a rank holds


def held_by(machine: Machine) -> list[Held]:
    """All pieces of weights and optimizer state on the rank."""
    shapes = {
        parameter_name(name, p.name): p.shape for name, x in owners(machine.network).items() for p in x.op.params()
    }
    found = list(_weights(machine, shapes))
    for name, stretch in _state_stretches(machine):
        state = machine.states[name]
        found += _held(machine, shapes, stretch, state.moments, MOMENTS.get(machine.training.optimizer, ()))
        if state.master is not None:
            found += _held(machine, shapes, stretch, (state.master,), ("master",))
    return found


def _weights(machine: Machine, shapes: dict[str, tuple[int, ...]]) -> Iterator[Held]:
    for b in machine.program.buffers.values():
        if b.category == "weights" and b.live_in and b.live_out:
            stretch = Stretch((b.name,), 0, local_numel(machine.schedule, machine.rank, b))
            for piece in stretch_pieces(machine.schedule, machine.network, machine.rank, stretch):
                yield Held(("model", piece.name), shapes[piece.name], piece, machine.storage[b.name])


def _state_stretches(machine: Machine) -> Iterator[tuple[str, Stretch]]:
    """Per optimizer state the weights that it belongs to, element by element."""
    layers, place = owners(machine.network), place_of(machine.schedule, machine.rank)

    def numel(holding: Holding) -> int:
        return layers[holding.layer].op.numel(place.split(holding))

    for op in machine.program.ops:
        if isinstance(op.action, Compute) and op.action.kernel == "optimizer":
            for work in optimizer_work(machine.schedule, machine.rank, op, numel):
                yield work.state.name, work.weights


def _held(
    machine: Machine, shapes: dict[str, tuple[int, ...]], stretch: Stretch, flats: Collection[torch.Tensor],
    names: Collection[str],
) -> Iterator[Held]:  # fmt: skip
    for piece in stretch_pieces(machine.schedule, machine.network, machine.rank, stretch):
        for name, flat in zip(names, flats, strict=True):
            yield Held(("optimizer", name, piece.name), shapes[piece.name], piece, flat)


# ---- saving


def save(machine: Machine, directory: Path, seed: int, group: dist.ProcessGroup) -> Path:
    """Writes the state after the step just done to a new directory in `directory`, with all ranks of `group`; returns
    it. OSError if it cannot be written."""
    partial = files.step_path(directory, machine.step).with_suffix(".partial")
    if machine.rank == 0:
        files.begin(directory, machine.step)
    dist.barrier(group=group)
    facts = {"training": {"step": machine.step, "seed": seed, "optimizer": machine.training.optimizer}}
    planner = PieceSavePlanner(held_by(machine), facts)
    try:
        state_dict_saver.save({}, storage_writer=FileSystemWriter(partial), planner=planner, process_group=group)
    except CheckpointException as error:
        raise OSError(f"the checkpoint {partial} was not written: {_cause(error)}") from error
    # Every rank has written, and the metadata are there.
    if machine.rank == 0:
        files.complete(partial)
    dist.barrier(group=group)
    return files.step_path(directory, machine.step)


def require_training(machine: Machine) -> None:
    """InputError if the schedule changes nothing that could be saved."""
    if not any(isinstance(op.action, Compute) and op.action.kernel == "optimizer" for op in machine.program.ops):
        raise InputError("--save: the schedule has no optimizer step (--eval-passes), so there is nothing new to save")


# ---- loading


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `step` is None for initial weights."""

    path: Path
    metadata: Metadata
    step: int | None
    seed: int
    optimizer: str

    def seed_of(self, seed: int) -> int:
        """The seed to go on with, where `seed` is asked for. InputError if it is another than that of the training."""
        if self.step is not None and seed not in (0, self.seed):
            raise InputError(f"--seed {seed}: the training in {self.path} has seed {self.seed}; leave --seed out")
        return self.seed if self.step is not None else seed


def open_checkpoint(directory: Path) -> Checkpoint:
    """The newest checkpoint in the directory (or the directory itself). InputError if it cannot be read."""
    path = files.newest(directory)
    try:
        metadata = FileSystemReader(path).read_metadata()
        known = {key.partition(".")[2] for key in metadata.state_dict_metadata if key.startswith("training.")}
        facts = {"training": {key: value for key, value in FACTS.items() if key in known}}
        if known:
            _read(path, facts)
    except (Exception, CheckpointException) as error:
        raise _unreadable(path, error) from error
    found: dict[str, Any] = FACTS | facts["training"]
    return Checkpoint(path, metadata, found["step"] if known else None, found["seed"], found["optimizer"])


def load(machine: Machine, checkpoint: Checkpoint) -> None:
    """Puts the state into the machine. InputError if it is of another model, dtype or optimizer.

    Of initial weights the optimizer's state stays as new, with the master weights at their precision.
    """
    wanted = held_by(machine)
    if checkpoint.step is None:
        wanted = list(_initial(wanted))
    _require_fit(machine, checkpoint, wanted)
    try:
        _read(checkpoint.path, {}, PieceLoadPlanner(wanted))
    except (Exception, CheckpointException) as error:
        raise _unreadable(checkpoint.path, error) from error
    machine.step = checkpoint.step or 0


def _initial(held: Collection[Held]) -> Iterator[Held]:
    """Weights and master weights, both from the weights in the checkpoint."""
    for h in held:
        if h.path[0] == "model" or h.path[1] == "master":
            yield Held(("model", h.piece.name), h.shape, h.piece, h.flat)


def full_parameters(checkpoint: Checkpoint, network: Network) -> Parameters:
    """The weights of the checkpoint as full tensors, under the names of `network`; on one rank alone."""
    found: Parameters = {}
    whole: dict[str, torch.Tensor] = {}
    for name, layer in owners(network).items():
        for p in layer.op.params():
            stored = checkpoint.metadata.state_dict_metadata[f"model.{parameter_name(name, p.name)}"]
            assert isinstance(stored, TensorStorageMetadata)
            full = torch.empty(p.shape, dtype=stored.properties.dtype)
            found.setdefault(name, {})[p.name] = whole[parameter_name(name, p.name)] = full
    _read(checkpoint.path, {"model": whole})
    return found


def _read(path: Path, state: dict[str, Any], planner: PieceLoadPlanner | None = None) -> None:
    """Each rank reads for itself: what it needs follows from its own pieces and the metadata."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        state_dict_loader.load(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)


# ---- what does not fit


def _require_fit(machine: Machine, checkpoint: Checkpoint, wanted: Collection[Held]) -> None:
    stored, where = checkpoint.metadata.state_dict_metadata, f"--load {checkpoint.path}"
    _require_parameters(where, machine.network, checkpoint)
    if checkpoint.step is None:
        return
    if machine.states:
        _require_optimizer(where, machine, checkpoint)
    for h in wanted:
        there = stored.get(h.key)
        if not isinstance(there, TensorStorageMetadata):
            raise InputError(f"{where}: it has no {h.key}; expected what --save leaves")
        if there.properties.dtype != h.flat.dtype:
            raise InputError(f"{where}: {h.key} is {_word(there.properties.dtype)} there and {_word(h.flat.dtype)} in "
                             f"this run; expected the same --precision")  # fmt: skip


def _require_optimizer(where: str, machine: Machine, checkpoint: Checkpoint) -> None:
    ours = machine.training.optimizer
    if checkpoint.optimizer != ours:
        raise InputError(f"{where}: the training there has optimizer {checkpoint.optimizer}, this run {ours}; "
                         f"expected the same (--optimizer {checkpoint.optimizer})")  # fmt: skip
    stored = checkpoint.metadata.state_dict_metadata
    there = any(key.startswith("optimizer.master.") for key in stored)
    if there != (machine.training.policy.master_dtype is not None):
        raise InputError(f"{where}: master weights are kept {'there and not in' if there else 'in'} this run"
                         f"{'' if there else ' and not there'}; expected the same --precision")  # fmt: skip


def _require_parameters(where: str, network: Network, checkpoint: Checkpoint) -> None:
    """InputError unless the checkpoint has exactly the network's parameters, in their shapes."""
    stored = {
        key.removeprefix("model."): tuple(value.size)
        for key, value in checkpoint.metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    ours = {parameter_name(n, p.name): p.shape for n, x in owners(network).items() for p in x.op.params()}
    if not stored:
        raise InputError(f'{where}: no parameters in it; expected their names to begin with "model."')
    for name, shape in ours.items():
        if name not in stored:
            raise InputError(f"{where}: it has no parameter {name} of model {network.name} ({_size(shape)}); "
                             f"it is a checkpoint of another model")  # fmt: skip
        if stored[name] != shape:
            raise InputError(f"{where}: parameter {name} is {_size(stored[name])} there and {_size(shape)} in model "
                             f"{network.name}; it is a checkpoint of another model")  # fmt: skip
    for name in stored:
        if name not in ours:
            raise InputError(f"{where}: it has a parameter {name} ({_size(stored[name])}), which model {network.name} "
                             f"does not have; it is a checkpoint of another model")  # fmt: skip


def _unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(f"--load {path}: the checkpoint cannot be read, a file is missing or damaged: {_cause(error)}")


def _cause(error: BaseException) -> str:
    """The first line of what went wrong; DCP wraps it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
