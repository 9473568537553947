"""`RunRequest`: what a worker needs beside the schedule, and its JSON form (`request.json`).

The network is written out layer by layer, because a worker has neither pydantic nor the readers of model files. A
layer op is its class name in layers.py and its fields. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.link import Link
from rtp_sim.model import layers
from rtp_sim.model.layers import Layer, LayerOp
from rtp_sim.model.network import Block, Input, Network
from rtp_sim.model.training import TrainingSpec

SCHEMA = "rtp-sim/request/1"
DEVICES = ("cpu", "cuda")
TRANSPORTS = ("auto", "gloo", "nccl", "shm", "emulated")
FLOATS = ("", "fp64")
COMMUNICATIONS = ("real", "fake", "copy")

Json = Any  # what json.loads returns


@dataclass(frozen=True)
class RunRequest:
    """How to run a schedule.

    The timeline comes from `steps` measured steps after `warmup` others. `timeout_s` is how long a rank may stand
    still. `threads` are the threads that each rank computes with. With `float_dtype` "fp64" every float buffer is
    double precision (to compare results, not times). `check` compares the first step with dense training;
    `save_tensors` keeps the weights and gradients of the last step beside the results. With `pin` a rank stays on one
    core. `transport` moves data by gloo, NCCL, shared memory of this host, or that with an emulated link of
    `link_latency_ns` and `link_bandwidth_bytes_per_s`. With `stated` ranks neither compute nor send, but sleep for the
    times in the run's directory. `profile_trace` adds a step after the measured ones, which every rank does under
    PyTorch's profiler. `load` is the directory of checkpoints to go on from, `save` the one to write to: after the last
    measured step, and after every `save_every` of the training's steps where that is not 0.

    `load` is the directory of checkpoints to go on from, `save` the one to write to: after the last step, and after
    every `save_every` of the training's steps where that is not 0.

    With `only_rank` that rank runs alone in one process, and `communication` says what takes the place of its partners:
    "fake" nothing, "copy" a copy of the same size (alone.py). With `twin` torch's own implementation of the strategy
    runs instead of the schedule (twins/).
    """

    network: Network
    training: TrainingSpec
    steps: int = 10
    warmup: int = 2
    seed: int = 0
    device: str = "cpu"
    transport: str = "auto"
    timeout_s: float = 60.0
    threads: int = 1
    float_dtype: str = ""
    check: bool = False
    save_tensors: bool = False
    pin: bool = False
    profile_trace: bool = False
    only_rank: int | None = None
    communication: str = "real"
    twin: bool = False
    link_latency_ns: int = 0
    link_bandwidth_bytes_per_s: int = 0
    stated: bool = False
    load: str = ""
    save: str = ""
    save_every: int = 0

    def __post_init__(self) -> None:
        """InputError naming the field that makes no sense."""
        for field, least in (("steps", 1), ("warmup", 0), ("threads", 1), ("save_every", 0)):
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise InputError(f"run: {field} is {value!r}; expected a whole number of at least {least}")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int | float) or not self.timeout_s > 0:
            raise InputError(f"run: timeout is {self.timeout_s!r}; expected seconds, for example 60")
        for field, choices in (("device", DEVICES), ("transport", TRANSPORTS), ("float_dtype", FLOATS),
                               ("communication", COMMUNICATIONS)):  # fmt: skip
            if getattr(self, field) not in choices:
                known = ", ".join(repr(c) for c in choices)
                raise InputError(f"run: {field} is {getattr(self, field)!r}; expected one of {known}")
        if self.save_every and not self.save:
            raise InputError("run: save_every says how often to save; expected --save DIR with it")
        if self.check and self.warmup < 1:
            raise InputError("run: the check takes place in the first warm-up step; expected warmup of at least 1")
        self._check_alone()
        if self.training.policy.compute_dtype == "fp8" and not self.stated and not self.float_dtype:
            raise InputError("run: precision fp8 can be simulated; products are executed in fp32, bf16 or fp16: "
                             "expected one of these")  # fmt: skip
        if self.device == "cpu" and self.transport == "nccl":
            raise InputError("run: transport nccl moves data between GPUs; with device cpu expected gloo or shm")
        if self.device == "cuda" and self.transport not in ("auto", "nccl"):
            raise InputError(f"run: transport {self.transport} cannot send from GPU memory; expected nccl with cuda")
        if self.stated and (self.check or self.save_tensors or self.float_dtype or self.transport != "auto"):
            raise InputError("run: with stated times nothing is computed or sent: no check, tensors, fp64 or transport")
        if self.stated and self.device != "cpu":
            raise InputError(f"run: with stated times no device computes; expected device cpu, given {self.device}")
        if (self.stated or self.twin or self.only_rank is not None) and (self.load or self.save):
            raise InputError("run: --load and --save are for the schedule on all its ranks; leave out --stated-times, "
                             "--twin and --only-rank")  # fmt: skip
        if self.transport == "emulated":
            self.link()
        elif self.link_latency_ns or self.link_bandwidth_bytes_per_s:
            raise InputError(f"run: a link is given, but transport is {self.transport}; expected emulated")

    def _check_alone(self) -> None:
        if self.only_rank is None:
            if self.communication != "real":
                raise InputError(f"run: communication {self.communication!r} is for a rank alone; give --only-rank R")
            return
        if type(self.only_rank) is not int or self.only_rank < 0:
            raise InputError(f"run: only_rank is {self.only_rank!r}; expected a rank, for example 0")
        if self.communication == "real":
            raise InputError("run: one rank alone has nobody to talk to; expected communication 'fake' or 'copy'")
        if self.transport != "auto" or self.stated:
            raise InputError("run: one rank alone sends nothing; leave out --transport and --stated-times")
        if self.check:
            raise InputError("run: what one rank alone computes means nothing; leave out --check, or run all ranks")

    def ranks(self, world_size: int) -> Sequence[int]:
        """The ranks that run as processes, of a schedule for `world_size`."""
        return range(world_size) if self.only_rank is None else (self.only_rank,)

    @property
    def real_transport(self) -> str:
        """The transport that "auto" stands for: nccl on GPUs, else gloo; "none" if nothing is sent; of a rank alone,
        what replaces it."""
        if self.stated:
            return "none"
        if self.only_rank is not None:
            return self.communication
        return self.transport if self.transport != "auto" else "nccl" if self.device == "cuda" else "gloo"

    @property
    def backend(self) -> str:
        """What torch.distributed is started with: other transports use gloo to agree on things between steps."""
        return "nccl" if self.real_transport == "nccl" else "gloo"

    def link(self) -> Link | None:
        """The link of an emulated transport; None for a real one."""
        return Link(self.link_latency_ns, self.link_bandwidth_bytes_per_s) if self.transport == "emulated" else None


def to_json(request: RunRequest) -> str:
    """The request as indented JSON, the same bytes for the same request."""
    plain = {key: value for key, value in vars(request).items() if key not in ("network", "training")}
    document = {"schema": SCHEMA} | plain
    document |= {"training": asdict(request.training), "network": _network_dict(request.network)}
    return json.dumps(document, indent=1) + "\n"


def from_json(text: str) -> RunRequest:
    """The request stored in `text`. InputError if it holds none."""
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise InputError(f"request JSON: schema is {data['schema']!r}; expected {SCHEMA!r}")
        network, training = _network(data["network"]), TrainingSpec(**data["training"])
        plain = {key: value for key, value in data.items() if key not in ("schema", "network", "training")}
        return RunRequest(network, training, **plain)
    except json.JSONDecodeError as error:
        raise InputError(f"request JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"request JSON: {error}; expected what `rtp-sim run` writes") from None


def _network_dict(network: Network) -> Json:
    blocks = [
        {"name": b.name, "recomputable": b.recomputable, "layers": [_layer_dict(x) for x in b.layers]}
        for b in network.blocks
    ]
    inputs = [asdict(i) for i in network.inputs]
    return {"name": network.name, "seq": network.seq, "inputs": inputs, "blocks": blocks}


def _layer_dict(layer: Layer) -> Json:
    record = {"name": layer.name, "op": type(layer.op).__name__, **asdict(layer.op)}  # type: ignore[call-overload]
    return {"layer": record, "inputs": list(layer.inputs), "output": layer.output, "shares": layer.shares}


def _network(data: Json) -> Network:
    blocks = tuple(Block(b["name"], tuple(_layer(x) for x in b["layers"]), b["recomputable"]) for b in data["blocks"])
    return Network(data["name"], data["seq"], tuple(Input(**i) for i in data["inputs"]), blocks)


def _layer(data: Json) -> Layer:
    record = dict(data["layer"])
    name, kind = record.pop("name"), record.pop("op")
    made = getattr(layers, kind, None)
    if not (isinstance(made, type) and issubclass(made, LayerOp)):
        raise InputError(f"request JSON: layer {name!r} is a {kind!r}; expected a layer op of this version")
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return Layer(name, made(**sizes), tuple(data["inputs"]), data["output"], data["shares"])
