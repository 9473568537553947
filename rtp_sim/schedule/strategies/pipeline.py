"""Pipeline parallelism: `gpipe`, `1f1b`, `interleaved`, `zb-h1`, `zb-h2` (also `zb-1p`, `zb-2p`) and `zb-v`.

Each rank works on one stage of the network; `pipeline_order.py` says in what order, `stages.py` on which blocks. A
stage is itself split over a tensor-parallel group, and replicated over dp, which gradients are reduced over once per
step. Where embedding and head share weights and lie on different stages, both keep a copy and add up their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rtp_sim.errors import InputError
from rtp_sim.model.layers import Layer, Linear
from rtp_sim.model.network import Block, Network
from rtp_sim.schedule.builder import Tape
from rtp_sim.schedule.data_parallel import DataParallel
from rtp_sim.schedule.ir import Compute, Group, Recv, Send
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES, Action
from rtp_sim.schedule.sharding import lower
from rtp_sim.schedule.stages import Stages, cut
from rtp_sim.schedule.step import PutOff, Step
from rtp_sim.schedule.strategies.tensor_parallel import Tensor

GROUP = "pp"
FIRST, SECOND = 1, 2
TIED = "embedding"
"""The group of the stages that share weights, the first and usually the last."""


def gpipe(step: Step) -> None:
    """All forwards, then all backwards: every micro-batch's activations are kept."""
    _run(step, "gpipe")


def one_f_one_b(step: Step) -> None:
    """A forward and a backward in turn: stage s keeps the activations of at most p - s micro-batches."""
    _run(step, "1f1b")


def interleaved(step: Step) -> None:
    """1F1B with `vpp` chunks per stage: less bubble, more messages."""
    _run(step, "interleaved")


def zb_h1(step: Step) -> None:
    """Weight gradients fill a part of the bubble, in the memory of 1F1B's first stage."""
    _run(step, "zb-h1")


def zb_h2(step: Step) -> None:
    """Weight gradients and earlier forwards fill all of the bubble, in about twice the memory."""
    _run(step, "zb-h2")


def zb_v(step: Step) -> None:
    """Two chunks per stage in a V: nearly no bubble in the memory of 1F1B's first stage."""
    _run(step, "zb-v")


def _run(step: Step, name: str) -> None:
    stages = stages_of(step.whole, step.options, step.group_size(GROUP), name)
    order = PIPELINES[name].order
    actions = order(stages.count, step.stage, step.training.num_microbatches, stages.chunks)
    write_stage(step, stages, actions)


def stages_of(network: Network, options: Options, count: int, name: str) -> Stages:
    """The network in pieces for the pipeline schedule `name` on `count` stages. InputError if it cannot be cut so."""
    pipeline = PIPELINES[name]
    if pipeline.chunks is not None and options.vpp not in (1, pipeline.chunks):
        raise InputError(f"--vpp {options.vpp}: {name} has {pipeline.chunks} chunk(s) per stage; only interleaved "
                         f"takes another number")  # fmt: skip
    chunks = pipeline.chunks or options.vpp
    return cut(network, count, chunks, pipeline.v_shape, options.pp_layers, options.pp_balance)


def with_sharing_stages(groups: Mapping[str, Group], stages: Stages) -> dict[str, Group]:
    """The groups, and "embedding" of the stages that share weights, where these are several."""
    shared = {x.shares for block in _all_blocks(stages) for x in block.layers if x.shares}
    sharing = [
        s for s in range(stages.count)
        if any(x.weight_name in shared for block in stages.blocks(s) for x in block.layers)
    ]  # fmt: skip
    if len(sharing) < 2:
        return dict(groups)
    lines = tuple(tuple(line[s] for s in sharing) for line in groups[GROUP].instances)
    return {**groups, TIED: Group(TIED, (len(sharing),), lines)}


def _all_blocks(stages: Stages) -> Iterator[Block]:
    return (block for piece in stages.pieces for block in piece)


def write_stage(step: Step, stages: Stages, actions: Sequence[Action]) -> None:
    """The program of `step.stage`: its actions in order, then the reduction of gradients and the optimizer."""
    if step.options.dp_sync == "zero2":
        raise InputError("--dp-sync zero2: a pipeline adds up gradients over its micro-batches; expected ddp or zero1")
    step.take_part(stages.blocks(step.stage))
    stage = _Stage(step, stages, plain=stages.chunks == 1 and all(a.kind in "FB" for a in actions))
    last = max(a.micro for a in actions)
    repeats = Repeats(step, stages)
    for action in actions:
        step.actions.append((action, step.b.count))
        if repeats.played(action, last):
            continue
        with repeats.noting(action, last):
            stage.act(action, last)
    step.actions.append((Action("end", 0, last), step.b.count))
    stage.finish()


class Repeats:
    """Actions that do the same as an earlier one for another micro-batch, played from a tape instead of worked out
    again: forwards from the first micro-batch on, backwards from the second (the first makes the gradients that later
    ones add to) up to the last."""

    def __init__(self, step: Step, stages: Stages) -> None:
        self.step = step
        # Weight gradients put off, gradients handed on within a stage and pacing have a memory of their own; where the
        # host waits is not on the tape.
        options = step.options
        simple = not (stages.v_shape or stages.count == 1 or options.gradient_local or options.pp_synchronised)
        self.possible = simple and options.pp_overlap
        self.done: dict[tuple[str, int], int] = {}
        self.tapes: dict[tuple[str, int], tuple[str, Tape]] = {}

    def played(self, action: Action, last: int) -> bool:
        """Whether the action could be played."""
        known = self.tapes.get((action.kind, action.chunk))
        if known is None or (action.kind == "B" and action.micro == last):
            return False
        self.step.micro = action.micro
        self.step.b.play(known[1], known[0], f"m{action.micro}")
        return True

    @contextmanager
    def noting(self, action: Action, last: int) -> Iterator[None]:
        """Keeps what an action does, where later ones will do the same."""
        key = action.kind, action.chunk
        self.done[key] = self.done.get(key, 0) + 1
        turn = FIRST if action.kind == "F" else SECOND
        if not self.possible or action.kind not in "FB" or self.done[key] != turn or action.micro == last:
            yield
            return
        with self.step.b.recording() as tape:
            yield
        self.tapes[key] = f"m{action.micro}", tape


class _Stage:
    """One stage: what it computes, and what it exchanges with its neighbours."""

    def __init__(self, step: Step, stages: Stages, plain: bool) -> None:
        self.step, self.stages = step, stages
        self._waits = plain and not step.options.pp_overlap
        # The interleaved schedule asks for its messages in advance: a host that waits would not come to it.
        self._timed = step.options.pp_synchronised and plain
        self.tensor = Tensor(step, step.options.sequence_parallel)
        self.sync = DataParallel(step, step.options.dp_sync)
        self._put_off: dict[tuple[int, int], list[PutOff]] = {}
        # Gradients that one chunk hands to another on the same stage: (micro-batch, tensor) -> buffer.
        self._handed: dict[tuple[int, str], str] = {}
        self._producer = {x.output: x for x in step.whole.layers()}
        elsewhere = {
            x.weight_name
            for stage in range(stages.count) if stage != step.stage
            for block in stages.blocks(stage) for x in block.layers if x.op.numel()
        }  # fmt: skip
        self._tied = [x for x in step.network.layers() if step.keeps(x) and x.weight_name in elsewhere]

    # ---- actions

    def act(self, action: Action, last: int) -> None:
        """One action of the order."""
        match action.kind:
            case "F":
                self.forward(action)
            case "W":
                self.weight_gradients(action, action.micro == last)
            case kind:
                self.backward(action, split=kind == "I", last=action.micro == last)

    def forward(self, action: Action) -> None:
        """Receives what the piece reads, computes it, sends what it makes."""
        self.step.start_pass(action.micro)
        k = self.stages.piece(self.step.stage, action.chunk)
        if k:
            self._exchange(k, k - 1, self.stages.crossing[k - 1])
        for layer in self._layers(k):
            self.tensor.forward(layer)
        self._synchronise()
        if k + 1 < len(self.stages.pieces):
            self._exchange(k, k + 1, self.stages.crossing[k], sends=True)

    def backward(self, action: Action, split: bool, last: bool) -> None:
        """Receives the gradient of what the piece made, computes the others, sends that of what it read. With `split`
        the weight gradients are put off; with `last` gradients are complete and go to be reduced."""
        step, k = self.step, self.stages.piece(self.step.stage, action.chunk)
        step.start_pass(action.micro)
        if k + 1 < len(self.stages.pieces):
            made = self.stages.crossing[k]
            step.set_tensor_grad(made, self._exchange(k, k + 1, made, grad=True))
        if split:
            with step.putting_off() as later:
                self._backward_layers(k, last=False)
            self._put_off[action.chunk, action.micro] = list(later)
        else:
            self._backward_layers(k, last)
            self._synchronise()
        if k:
            self._hand_on(k, self.stages.crossing[k - 1])

    def _synchronise(self) -> None:
        if self._timed:
            self.step.b.host_waits()

    def _backward_layers(self, k: int, last: bool) -> None:
        for block in reversed(self.stages.pieces[k]):
            if self.step.recomputes(block):
                for layer in block.layers:
                    self.tensor.forward(layer, "R")
            for layer in reversed(block.layers):
                self.tensor.backward(layer)
                if last:
                    self._ready(layer)

    def weight_gradients(self, action: Action, last: bool) -> None:
        """What the backward of this chunk and micro-batch put off."""
        for _, emit in self._put_off.pop((action.chunk, action.micro)):
            emit()
        if last:
            for layer in reversed(list(self._layers(self.stages.piece(self.step.stage, action.chunk)))):
                self._ready(layer)

    def finish(self) -> None:
        """The rest of the reductions, the gradients of shared weights, the optimizer."""
        step, sync = self.step, self.sync
        self.tensor.reduce_partial_gradients(sync)
        sync.flush()
        for layer in self._tied:
            numel, _ = self.tensor.shard(layer)
            grad = (f"g.{layer.weight_name}",)
            most = numel if isinstance(numel, int) else max(numel)
            step.collective("all_reduce", TIED, TIED, f"reduce_shared.{layer.weight_name}", most, grad, grad,
                            step.policy.gradient_dtype)  # fmt: skip
        sync.finish()

    def _ready(self, layer: Layer) -> None:
        if self.tensor.partial_gradient(layer):
            return
        # Under zero1 shared weights have a bucket to themselves, so that both stages keep the same slices of them.
        alone = layer in self._tied and self.sync.mode == "zero1"
        if alone:
            self.sync.flush()
        self.sync.ready(layer, *self.tensor.shard(layer), self.tensor.split(layer))
        if alone:
            self.sync.flush()

    def _layers(self, k: int) -> Iterator[Layer]:
        blocks: Sequence[Block] = self.stages.pieces[k]
        return (layer for block in blocks for layer in block.layers)

    # ---- exchange with other stages

    def _hand_on(self, k: int, tensor: str) -> None:
        """The gradient of what piece k read goes to the stage that made it."""
        step = self.step
        buffer = step.take_tensor_grad(tensor)
        if self.stages.stage_of(k - 1) == step.stage:
            self._handed[step.micro, tensor] = buffer
        else:
            self._exchange(k, k - 1, tensor, sends=True, grad=True, buffer=buffer)

    def _exchange(
        self, k: int, other: int, tensor: str, *, sends: bool = False, grad: bool = False, buffer: str = ""
    ) -> str:
        """Sends or receives a tensor between pieces, or its gradient; returns the buffer it is in. Between chunks of
        one stage nothing moves."""
        step = self.step
        there = self.stages.stage_of(other)
        if there == step.stage:
            return self._handed.pop((step.micro, tensor)) if grad else step.tensor(tensor)
        d, what = ("d.", "grad") if grad else ("", "act")
        name, offset = f"m{step.micro}.{d}{tensor}", there - step.stage
        buffer = buffer or self._declared(tensor, grad)
        size_bytes = self._numel(tensor) * step.b.itemsize(step.b.declared(buffer).dtype)
        shared = step.options.pp_scatter_gather and self.tensor.n > 1 and self._parts(tensor) is None
        if sends:
            source = self._share(buffer, name) if shared else buffer
            size_bytes = step.b.bytes_of(source) if shared else size_bytes
            # A framework sends once the whole forward or backward of the chunk is done, weight gradients included.
            op = step.b.op(f"{name}.send", f"send.{what}{offset:+d}", Send(GROUP, (offset,), size_bytes, name),
                           (source,), after=step.b.last("compute"))  # fmt: skip
            if not step.options.pp_overlap:
                step.b.next_waits("compute", op)
            return buffer
        target = self._share_buffer(buffer) if shared else buffer
        size_bytes = step.b.bytes_of(target) if shared else size_bytes
        # Megatron's plain schedule synchronises the device behind each exchange: the host issues nothing meanwhile.
        step.b.op(f"{name}.recv", f"recv.{what}{offset:+d}", Recv(GROUP, (offset,), size_bytes, name), (), (target,),
                  blocks_host=self._waits)  # fmt: skip
        if shared:
            step.collective("all_gather", "tp", "tp", f"{name}.gather", self._padded(buffer), (target,), (buffer,),
                            step.b.declared(buffer).dtype)  # fmt: skip
        return buffer

    def _declared(self, tensor: str, grad: bool) -> str:
        """The buffer that a tensor from another stage (or its gradient) arrives in."""
        step = self.step
        name = f"m{step.micro}/d.{tensor}@recv" if grad else step.tensor(tensor)
        dtype = lower(self._producer[tensor].op, step.extent).dtype["y"] or step.policy.weight_dtype
        return step.b.buffer(name, "activations", dtype, self._numel(tensor))

    def _numel(self, tensor: str) -> int:
        """Elements of a tensor between pieces on one rank. InputError where ranks have different numbers of them."""
        numel, n = lower(self._producer[tensor].op, self.step.extent).numel["y"], self.tensor.n
        assert isinstance(numel, int)
        parts = self._parts(tensor)
        if parts is None:
            return numel
        if parts[0] % n:
            raise InputError(f"what stages exchange must divide: {parts[0]} {parts[1]} over {n} ranks do not")
        return numel // n

    def _parts(self, tensor: str) -> tuple[int, str] | None:
        """Along what a tensor between pieces is split over the tensor-parallel ranks; None if each has all of it."""
        op = self._producer[tensor].op
        if self.tensor.n == 1:
            return None
        if isinstance(op, Linear) and op.vocab:
            return op.out_features, "vocabulary rows"
        return (self.step.extent.tokens, "tokens") if self.tensor.sequence else None

    # ---- the scatter/gather optimisation

    def _padded(self, buffer: str) -> int:
        numel = self.step.b.declared(buffer).numel
        assert isinstance(numel, int)
        return -(-numel // self.tensor.n) * self.tensor.n

    def _share_buffer(self, buffer: str) -> str:
        like, n = self.step.b.declared(buffer), self.tensor.n
        return self.step.b.buffer(f"{buffer}.share", "communication", like.dtype, self._padded(buffer) // n,
                                  slice_of="tp")  # fmt: skip

    def _share(self, buffer: str, name: str) -> str:
        """This rank's share of a whole tensor, copied out of it."""
        share = self._share_buffer(buffer)
        dims = (("numel", self._padded(buffer) // self.tensor.n),)
        self.step.b.op(f"{name}.share", "compute", Compute("copy", self.step.policy.weight_dtype, dims), (buffer,),
                       (share,))  # fmt: skip
        return share
