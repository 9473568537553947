"""`Machine`: one rank that carries out the ops of its program on torch tensors.

An interpreter walks the program and calls, per op, `run` for a kernel; for communication `transfers` (shifts, sends,
receives) or `parcel` (collectives) when the op starts, moves the data, and calls `finish` when they are there. How data
move, and what runs at the same time, is the interpreter's business; what is computed is the machine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from rtp_sim.errors import InputError, ScheduleError
from rtp_sim.executor import loss
from rtp_sim.executor.dropout import mask_seed
from rtp_sim.executor.dtypes import torch_dtype
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.gradients import Counted, GradientWatch, counted
from rtp_sim.executor.kernels import KERNELS
from rtp_sim.executor.launch import Columns, Launch, Made, Result, Route
from rtp_sim.executor.optimizer import DEFAULTS, Hyper, State, new_state
from rtp_sim.executor.packing import placed
from rtp_sim.executor.parameters import (
    Parameters,
    Share,
    buffer_content,
    executed_network,
    owners,
    place_of,
    slice_place,
    unfused_parameters,
    weight_shares,
)
from rtp_sim.executor.parcels import STATISTICS, Wire, deliver, laid_out, make_parcel, sources, spread
from rtp_sim.executor.plan import Plan, make_plan
from rtp_sim.executor.shares import local_numel
from rtp_sim.executor.storage import Storage, last_uses
from rtp_sim.executor.updater import Updater
from rtp_sim.model.layers import Extent, Layer
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import DTYPE_BYTES, Collective, Compute, Holding, Op, Recv, Schedule, Send, Shift

Batch = Sequence[Mapping[str, torch.Tensor]]
"""Per micro-batch (or evaluation pass) the network's input tensors by name."""

NOTHING: Mapping[Any, torch.Tensor] = MappingProxyType({})


class Machine:
    """Rank `rank` of `schedule`, on `device`.

    `parameters` are full tensors (of `network`; its MLPs are unfused here if the schedule's are). `float_dtype`
    replaces every floating-point dtype, for exactness tests. The masks of dropout layers derive from `seed`. With
    `keep_gradients` the gradients that the optimizer sees (clipped, unscaled) are kept in `gradients`. `watch` knows
    the norm of all gradients and the loss scale. InputError if network and schedule do not fit.
    """

    def __init__(
        self, schedule: Schedule, rank: int, network: Network, training: TrainingSpec, parameters: Parameters,
        device: torch.device | str = "cpu", float_dtype: torch.dtype | None = None, *, hyper: Hyper = DEFAULTS,
        seed: int = 0, keep_gradients: bool = False,
    ) -> None:  # fmt: skip
        self.schedule, self.rank, self.training = schedule, rank, training
        self.network = executed_network(schedule, network)
        if parameters.keys() != owners(self.network).keys():
            parameters = unfused_parameters(network, parameters)
        self.device, self.float_dtype = torch.device(device), float_dtype
        self.seed, self.keep_gradients = seed, keep_gradients
        self.program = schedule.program(rank)
        self.storage = Storage(self.program)
        self.gradients: list[Share] = []
        self.step = 0
        self.watch = GradientWatch(self.program, training)
        self._layers: dict[str, Layer] = {layer.name: layer for layer in self.network.layers()}
        self._place = place_of(schedule, rank)
        self._wire = Wire(schedule, rank, self.storage)
        self._last_uses = last_uses(self.program)
        self._shape = {
            b.name: (local_numel(schedule, rank, b), torch_dtype(b.dtype, float_dtype))
            for b in self.program.buffers.values()
        }
        self._extent = Extent(training.micro_batch, self.network.seq)
        self._loaded = {i.name for i in self.network.inputs}
        self._plans: dict[int, Plan] = {}
        self._parts: list[Counted] | None = None
        self._offsets: dict[tuple[str, str], int] = {}
        self._routes: dict[tuple[str, str, int], dict[str, Route]] = {}
        # Gradients that backward passes start from instead of 1, by micro-batch.
        self._starts: dict[int, torch.Tensor] = {}
        self.updater = Updater(schedule, rank, training, hyper, self.storage, self.watch, self._parameter_count)
        self._fill(parameters)

    @property
    def states(self) -> dict[str, State]:
        """What the optimizer keeps, by buffer."""
        return self.updater.states

    # ---- content

    def _fill(self, parameters: Parameters) -> None:
        """Weights, optimizer states and whatever else the step finds at its start."""
        full: dict[str, torch.Tensor] = {}
        for b in self.program.buffers.values():
            if b.category == "weights" and b.live_in:
                full[b.name] = buffer_content(self.schedule, self.network, self.rank, b, parameters).to(self.device)
        for work in self.updater.works():
            size = work.weights.stop - work.weights.start
            weights = work.weights.part(full, 0, size) if size else torch.zeros(0, device=self.device)
            self.states[work.state.name] = new_state(self.training, weights, self.float_dtype)
        for name, content in full.items():
            self.storage.put(name, content.to(self.dtype(name)))
        self.storage.add_bytes("optimizer", sum(s.size_bytes for s in self.states.values()) + self.watch.size_bytes)

    def start_step(self, batch: Batch) -> None:
        """Loads the step's inputs and zeroes what is collected anew in each step; `batch[i]` is micro-batch i.

        InputError if a tensor is missing or has another size than the schedule's buffer.
        """
        self.step += 1
        self.watch.start_step()
        self._routes.clear()
        self._starts.clear()
        if self.keep_gradients:
            self.gradients = []
        for b in self.program.buffers.values():
            if not b.live_in or b.category in ("weights", "optimizer"):
                continue
            micro, _, name = b.name.partition("/")
            if name in self._loaded:
                self._load(b.name, name, batch, int(micro[1:]))
            else:
                self.storage.put(b.name, self._zeros(b.name))
        for name, b in self.program.buffers.items():
            if b.live_in and b.category == "weights" and name not in self.storage:
                raise ScheduleError(f"weights {name!r} are not where the step expects them: the schedule leaves them "
                                    f"elsewhere, so it can run once only")  # fmt: skip
        self.storage.reset_peak()

    def _load(self, buffer: str, name: str, batch: Batch, micro: int) -> None:
        if micro >= len(batch) or name not in batch[micro]:
            expected = ", ".join(i.name for i in self.network.inputs)
            raise InputError(f"batch: no tensor {name!r} for micro-batch {micro}; expected {expected} for each of them")
        given, numel = batch[micro][name].reshape(-1), self._numel(buffer)
        if given.numel() != numel:
            raise InputError(f"batch: {name!r} of micro-batch {micro} has {given.numel()} elements, expected {numel}")
        self.storage.put(buffer, given.to(self.device, self.dtype(buffer), copy=True))
        start = f"d.{self.network.blocks[-1].layers[-1].output}"
        if start in batch[micro]:
            self._starts[micro] = batch[micro][start].reshape(-1).to(self.device)

    def dtype(self, buffer: str) -> torch.dtype:
        """The torch dtype of a buffer."""
        return self._shape[buffer][1]

    def _numel(self, buffer: str) -> int:
        return self._shape[buffer][0]

    def _zeros(self, buffer: str) -> torch.Tensor:
        numel, dtype = self._shape[buffer]
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def _room(self, buffer: str, filled: int) -> torch.Tensor:
        """A tensor for a buffer of which `filled` elements are written before it is read; the rest are zeros."""
        numel, dtype = self._shape[buffer]
        return torch.empty(numel, dtype=dtype, device=self.device) if filled >= numel else self._zeros(buffer)

    def losses(self) -> list[float]:
        """The rank's loss of each micro-batch (or pass) of the step; of split tokens its part of it."""
        name = self.network.blocks[-1].layers[-1].output
        found = [b for b in self.program.buffers if b.partition("/")[2] == name and b in self.storage]
        return [float(self.storage[b].double().sum()) for b in found]

    @property
    def updates(self) -> int:
        """How many steps have updated the weights: Adam's step number, which a step left out does not count for."""
        return self.step - self.watch.left_out

    def weights(self) -> list[Share]:
        """The weights the rank keeps, with their meaning; `assembled` makes full tensors of all ranks'."""
        return weight_shares(self.schedule, self.network, self.rank, self.storage)

    # ---- kernels

    def run(self, op: Op) -> None:
        """Carries out a compute op."""
        action = op.action
        assert isinstance(action, Compute)
        if action.site is not None:
            self._launch(op, action)
        elif action.kernel == "optimizer":
            self._optimize(op)
        elif action.kernel == "grad_norm":
            (norm,) = op.writes
            self.watch.measure(op, self._counted(), self.storage.put(norm, self._zeros(norm)), self.storage)
        elif action.kernel == "loss_scale":
            self.watch.update_scale()
        elif action.kernel == "copy":
            self._copy(op)
        elif action.kernel == "add":
            self._add(op)
        elif action.kernel == "zero":
            for name in op.writes:
                self.storage.put(name, self._zeros(name))
        else:
            raise ScheduleError(f"{op.name}: kernel {action.kernel} has no site, so its operands have no meaning")
        self._release(op)

    def _launch(self, op: Op, action: Compute) -> None:
        plan = self._plans.get(op.index)
        if plan is None:
            plan = self._plans[op.index] = make_plan(op, self.schedule, self.rank, self.network, self._layers)
        launch = self._prepare(plan)
        self._store(plan, KERNELS[action.kernel](launch), launch.dw)

    def _prepare(self, plan: Plan) -> Launch:
        roles, storage = plan.roles, self.storage
        dy = None if roles.dy is None else storage[roles.dy]
        if roles.backward and dy is None and roles.call.kernel != "cross_entropy":
            dy = self._start_gradient(roles.layer, plan.micro)
        x = {i: self._input(b) if plan.loaded else storage[b] for i, b in roles.x.items()}
        y = {i: storage[b] for i, b in roles.y.items()} if roles.backward else NOTHING
        w = NOTHING if roles.w is None else self._parameters(roles.w, plan)
        seed = self._dropout_seed(plan) if plan.dropout else 0
        # What passes between kernels of one layer is noted for experts alone.
        route = self._routes.setdefault((plan.micro, roles.layer.name, plan.shard), {}) if plan.routed else {}
        return Launch(
            roles.layer.op, roles.call, plan.split, plan.dims, self._extent, x, y, w, dy, tuple(roles.dx), seed,
            plan.dropout, self.gradient_scale, route, self._weight_gradients(plan), plan.fills,
        )  # fmt: skip

    def _input(self, buffer: str) -> torch.Tensor:
        """An input of a kernel. Numbers from the data loader come in fp32 and are computed with as weights are."""
        flat = self.storage[buffer]
        if not flat.is_floating_point() or buffer.partition("/")[2] not in self._loaded:
            return flat
        return flat.to(torch_dtype(self.training.policy.weight_dtype, self.float_dtype))

    def _weight_gradients(self, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Where the launch adds the gradients of its parameters; zeros if it is the first to."""
        buffer = plan.roles.dw
        if buffer is None:
            return NOTHING
        if buffer not in plan.roles.updated:
            self.storage.put(buffer, self._room(buffer, self._numel(buffer) if plan.fills else 0))
        return self._parameters(buffer, plan)

    @property
    def gradient_scale(self) -> float:
        """What the backward pass of a micro-batch starts from: its part of the step's loss, times the loss scale."""
        return self._loss_share * self.watch.scale

    @cached_property
    def _loss_share(self) -> float:
        """What one micro-batch's loss counts in the step's: the schedule's reductions are sums, the loss is a mean over
        micro-batches and replicas."""
        micros = int(self.schedule.meta.get("num_microbatches") or self.training.num_microbatches)
        return 1.0 / (micros * replicas(self.schedule))

    def _start_gradient(self, layer: Layer, micro: str) -> torch.Tensor:
        """Where a network ends without a loss: ones, or what the batch gives as "d.<last tensor>"."""
        given = self._starts.get(int(micro[1:]))
        like = self.storage[f"{micro}/{layer.output}"]
        if given is None:
            return torch.full_like(like, self.gradient_scale)
        # Scaled first: what is small would be lost in fp16.
        return (given * self.gradient_scale).to(like.dtype)

    def _dropout_seed(self, plan: Plan) -> int:
        """The same for a forward and its recomputation, another for every replica, shard, layer and step."""
        replica = replica_of(self.schedule, self.rank)
        return mask_seed(self.seed, self.step, replica, plan.micro, plan.site, plan.shard)

    def _parameters(self, buffer: str, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Views of the layer's parameters (of the shard that lies there now) in a flat buffer."""
        known = self.storage.views(buffer)
        found = known.get(plan.op)
        if found is None:
            found = known[plan.op] = self._placed(buffer, plan)
        return found

    def _placed(self, buffer: str, plan: Plan) -> Mapping[str, torch.Tensor]:
        layer, flat = plan.roles.layer, self.storage[buffer]
        offset = self._offsets.get((buffer, layer.weight_name))
        if offset is None:
            offset = self._offsets[buffer, layer.weight_name] = self._offset(buffer, layer.weight_name)
        return placed(plan.parameters, flat, offset)

    def _offset(self, buffer: str, weight_name: str) -> int:
        """Where a layer's parameters begin in a flat buffer."""
        offset = 0
        for h in self.program.buffers[buffer].holds:
            if h.layer == weight_name:
                return offset
            offset += self._parameter_count(h)
        raise ScheduleError(f"buffer {buffer!r} does not hold the parameters of {weight_name}")

    def _parameter_count(self, holding: Holding) -> int:
        """Parameters of a holding that the rank has at rest."""
        return self._layers[holding.layer].op.numel(self._place.split(holding))

    def _store(self, plan: Plan, made: Made, dw: Mapping[str, torch.Tensor]) -> None:
        roles = plan.roles
        updated, dynamic = roles.updated, plan.routed
        for i, result in enumerate(made.outputs):
            self._write(roles.y[i], result, roles.y[i] in updated, dynamic)
        for i, buffer in roles.dx.items():
            self._write(buffer, made.dx[i], buffer in updated, dynamic)
        for name, gradient in made.dw.items():
            if plan.fills:
                dw[name].copy_(gradient)
            else:
                dw[name].add_(gradient)

    def _write(self, buffer: str, result: Result, add: bool, dynamic: bool) -> None:
        """Stores a kernel's result, or adds it to what is there; columns go to their place in the whole tensor."""
        values, start = result if isinstance(result, Columns) else (result, 0)
        numel, dtype = self._shape[buffer]
        if not add and (values.numel() == numel or dynamic):
            flat = values.reshape(-1)
            self.storage.put(buffer, flat if flat.dtype is dtype else flat.to(dtype))
            return
        flat = self.storage[buffer] if add else self.storage.put(buffer, self._zeros(buffer))
        if values.numel() == numel:
            flat.add_(values.reshape(-1))
            return
        if not isinstance(result, Columns):
            raise ScheduleError(f"buffer {buffer!r} has {numel} elements, but its kernel makes {values.numel()}")
        flat.view(values.shape[0], -1)[:, start : start + values.shape[1]].add_(values)

    # ---- kernels without a layer

    def _add(self, op: Op) -> None:
        """Adds what the op reads."""
        first, *others = (self.storage[name] for name in op.reads)
        (target,) = op.writes
        if target in op.reads:
            first, others = self.storage[target], [self.storage[n] for n in op.reads if n != target]
        else:
            first = self.storage.put(target, torch.add(first, others.pop(0)) if others else first.clone())
        for other in others:
            first.add_(other)

    def _copy(self, op: Op) -> None:
        """What the op reads, end to end, to what it writes, end to end; to a buffer for a slice only this rank's."""
        taken, storage, target = sources(op), self.storage, self.program.buffers[op.writes[0]]
        fresh = [name for name in op.writes if name not in op.reads]
        if target.slice_of and not any(self.program.buffers[name].slice_of for name in op.reads):
            numel = self._numel(target.name)
            index = slice_place(self.schedule, self.rank, target.slice_of).index
            parts = [laid_out(storage, taken)[index * numel :][:numel]]
        else:
            parts = [storage[name] for name in taken]
        taken_numel = sum(part.numel() for part in parts)
        if fresh == [target.name] == list(op.writes) and taken_numel == self._numel(target.name) and len(parts) > 1:
            storage.put(target.name, torch.cat(parts).to(self.dtype(target.name)))
            return
        covered = taken_numel >= sum(map(self._numel, op.writes))
        for name in fresh:
            storage.put(name, self._room(name, self._numel(name) if covered else 0))
        begin = 0
        for part in parts:
            spread(storage, op.writes, part, begin)
            begin += part.numel()

    def _counted(self) -> list[Counted]:
        """The gradients that the rank counts in the norm: those that its optimizer steps update with."""
        if self._parts is None:
            works = self.updater.works()
            self._parts = [c for w in works for c in counted(self.schedule, self.rank, w, self._layers)]
        return self._parts

    def _optimize(self, op: Op) -> None:
        self.watch.judge(op, self.storage)
        if self.keep_gradients:
            self.gradients += self.updater.gradient_shares(op)
        if not self.watch.skipped:
            self.updater.step(op, self.updates)

    # ---- communication

    def parcel(self, op: Op) -> Parcel:
        """The rank's part of a collective, when the op starts."""
        action = op.action
        assert isinstance(action, Collective)
        what = op.name.rpartition(".")[2]
        if not (op.reads[0].endswith(".statistics") and what in STATISTICS):
            return make_parcel(self._wire, op)
        rows = self.storage[op.reads[0]].view(3, -1)
        if what == "sum":
            loss.rebased(rows, self.storage[op.reads[0].replace(".statistics", ".log_probs")])
        row = rows[STATISTICS[what]]
        members = self._wire.members(action.group)
        return Parcel(action.kind, members, row, row, row.numel(), "max" if what == "max" else "sum")

    def transfers(self, op: Op) -> list[Transfer]:
        """What a shift, send or receive moves, when the op starts; empty where there is no partner."""
        action = op.action
        if isinstance(action, Shift):
            return [self._hop(op, action, j) for j in range(len(action.hops))]
        assert isinstance(action, Send | Recv)
        peer = self.schedule.groups[action.group].neighbour(self.rank, action.offset)
        if peer is None:
            return []
        nothing = torch.zeros(0, device=self.device)
        if isinstance(action, Send):
            return [Transfer(peer, peer, laid_out(self.storage, op.reads), nothing)]
        into = op.writes[0]
        return [Transfer(peer, peer, nothing, self.storage.put(into, self._room(into, self._numel(into))))]

    def _hop(self, op: Op, shift: Shift, j: int) -> Transfer:
        group, hop = self.schedule.groups[shift.group], shift.hops[j]
        to, source = group.peer(self.rank, hop.offset), group.peer(self.rank, hop.offset, -1)
        out, into = op.reads[j], op.writes[j]
        itemsize = DTYPE_BYTES[self.program.buffers[out].dtype]
        sent = hop.bytes_at(self.schedule.shard_index(self.rank, hop.part)) // itemsize
        received = hop.bytes_at(self.schedule.shard_index(source, hop.part)) // itemsize
        send = self.storage[out][:sent]
        if out != into:
            return Transfer(to, source, send, self.storage.put(into, self._room(into, received))[:received])
        assert shift.chunk_bytes is not None
        chunk = shift.chunk_bytes * send.element_size() // itemsize
        bounce = torch.empty(chunk, dtype=torch.uint8, device=self.device)
        self.storage.put(op.writes[len(shift.hops)], bounce)
        return Transfer(to, source, send, self.storage[into][:received], bounce)

    def finish(self, op: Op, parcel: Parcel | None = None) -> None:
        """Ends a communication op whose data are there; of a collective, `parcel` with what was received."""
        if parcel is not None and not op.reads[0].endswith(".statistics"):
            deliver(self._wire, op, parcel)
        elif parcel is not None and op.name.endswith(".target"):
            statistics = op.reads[0]
            y = f"{statistics.partition('/')[0]}/{self.network.blocks[-1].layers[-1].output}"
            self.storage[y].copy_(loss.mean_loss(self.storage[statistics].view(3, -1)))
        self._release(op)

    def _release(self, op: Op) -> None:
        for name in self._last_uses.get(op.index, ()):
            self.storage.drop(name)


def replicas(schedule: Schedule) -> int:
    """Parts of the ranks that work on micro-batches of their own: the ranks of a tensor-parallel group and the stages
    of a pipeline share theirs."""
    shared = 1
    for name in ("tp", "pp"):
        shared *= schedule.groups[name].size if name in schedule.groups else 1
    return schedule.world_size // shared


def replica_of(schedule: Schedule, rank: int) -> int:
    """Which replica's micro-batches the rank works on."""
    if "tp" not in schedule.groups and "pp" not in schedule.groups:
        return rank
    return schedule.groups["dp"].position(rank) if "dp" in schedule.groups else 0
