"""The command line of a request: the flags that give it back when parsed, for `simulate` and for `run`.

Only what differs from the command line's defaults is said, so that a command shows what is special about a plan.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields

from rtp_sim.experiment import Request, Setting
from rtp_sim.export.settings import HEAD_NODE_NOTE, NotExpressible, Settings, torchrun
from rtp_sim.schedule.layout import INNER_AXIS, ORDERS
from rtp_sim.schedule.options import MIB, Options

RUN_DIRECTORY = "run1"

_REQUEST_FLAGS = {
    "micro_batch": "--micro-batch", "global_batch": "--global-batch", "micro_batches": "--micro-batches",
    "seq_len": "--seq-len", "precision": "--precision", "recompute": "--recompute", "optimizer": "--optimizer",
    "attention": "--attention", "clip_norm": "--clip-norm", "loss_scale": "--loss-scale", "dropout": "--dropout",
    "dp": "--dp", "pp": "--pp",
}  # fmt: skip
_SAID = ("model", "cluster", "strategy", "gpus", "nodes", "inner", "order", "options")
"""Fields of a request that are said by other means."""
_VALUES = {
    "fsdp_unit": "--fsdp-unit", "rtp_ring": "--rtp-ring", "dp_sync": "--dp-sync", "zero1_size": "--zero1-size",
    "vpp": "--vpp", "pp_balance": "--pp-balance", "eval_passes": "--eval-passes",
}  # fmt: skip
_MIB = {"ddp_bucket_bytes": "--ddp-bucket-mib", "rtp_chunk_bytes": "--rtp-chunk-mib"}
_ON = {
    "rtp_fuse_mlp": "--rtp-fuse-mlp", "rtp_hide_gradient_hop": "--rtp-hide-gradient-hop",
    "rtp_prefetch": "--rtp-prefetch", "sequence_parallel": "--sequence-parallel",
    "pp_scatter_gather": "--pp-scatter-gather",
}  # fmt: skip
_OFF = {
    "fsdp_prefetch": "--no-fsdp-prefetch", "dp_overlap": "--no-dp-overlap", "pp_overlap": "--no-pp-overlap",
}  # fmt: skip


def run_command(setting: Setting) -> Settings:
    """`rtp-sim run` of the plan, one process per device. NotExpressible for an option that has no flag.

    A cluster of several nodes is prepared once, in a directory that all of them see, and started by torchrun on each.
    """
    nodes = setting.cluster.nodes
    words = ["rtp-sim", "run", *workload_flags(setting.request)]
    words += ["--nproc-per-node", str(setting.cluster.world_size)]
    if nodes > 1:
        words += ["--as-nodes", str(nodes), "--prepare"]
    # As cost/cores.py tells: only ranks on CPUs talk over loopback links.
    on_cpu = any(link.kind == "loopback" for link in setting.cluster.topology.template.links)
    words += ["--device", "cpu" if on_cpu else "cuda", "-o", RUN_DIRECTORY]
    lines = [shlex.join(words)]
    if nodes > 1:
        lines.append(" ".join([*torchrun(setting.cluster), "-m", "rtp_sim.executor", RUN_DIRECTORY]))
    notes = (HEAD_NODE_NOTE,) if nodes > 1 else ()
    return Settings("run", "run.sh", "\n".join(lines) + "\n", notes)


def simulate_command(request: Request) -> str:
    """`rtp-sim simulate` of a request. NotExpressible for an option that has no flag."""
    words = ["rtp-sim", "simulate", *workload_flags(request), "--cluster", request.cluster]
    for flag, value in (("--gpus", request.gpus), ("--nodes", request.nodes)):
        words += [flag, str(value)] if value is not None else []
    return shlex.join(words)


def workload_flags(request: Request) -> list[str]:
    """Model, strategy, degrees, batch and options as flags. NotExpressible for an option that has no flag."""
    words = ["--model", request.model, "--strategy", request.strategy]
    if request.inner is not None:
        words += [f"--{INNER_AXIS[request.strategy]}", str(request.inner)]
    if request.order != ORDERS[0]:
        words += ["--rank-order", request.order]
    for field in fields(Request):
        name, value = field.name, getattr(request, field.name)
        if name in _SAID or value == field.default:
            continue
        if name not in _REQUEST_FLAGS:
            raise NotExpressible(f"the command line of a plan has no flag for {name}={value}")
        words += [_REQUEST_FLAGS[name], str(value)]
    return [*words, *_option_flags(request.options)]


def _option_flags(options: Options) -> Iterator[str]:
    plain = Options()
    for field in fields(Options):
        name, value = field.name, getattr(options, field.name)
        if value == getattr(plain, name):
            continue
        if name in _VALUES:
            yield from (_VALUES[name], str(value))
        elif name in _MIB and value % MIB == 0:
            yield from (_MIB[name], str(value // MIB))
        elif name == "pp_layers":
            yield from ("--pp-layers", ",".join(map(str, value)))
        elif name in _ON or name in _OFF:
            yield (_ON | _OFF)[name]
        else:
            raise NotExpressible(f"the command line has no flag for the option {name}={value}")
