"""Flags that several commands share: the workload, the machine, a strategy's options, the engine, a difference."""

from __future__ import annotations

import argparse

from rtp_sim.flags.values import count, counts, degraded_link, probability, slow_gpu
from rtp_sim.model.training import ATTENTIONS, OPTIMIZER_STATES, PRECISIONS, RECOMPUTE

FORMATS = ("table", "json", "csv")
DEFAULT_CLUSTER = "dgx-a100-80g"


def workload(p: argparse.ArgumentParser, per_replica: bool = True) -> None:
    """What is trained. `per_replica`: the command also counts micro-batches per replica."""
    group = p.add_argument_group("model and training")
    group.add_argument("--model", required=True, metavar="NAME|FILE", help="preset, config.json or layer-list file")
    group.add_argument(
        "--micro-batch", type=count, default=1, metavar="N", help="sequences per replica and micro-step"
    )
    group.add_argument("--global-batch", type=count, metavar="N", help="sequences per step (default: see below)")
    if per_replica:
        group.add_argument("--micro-batches", type=count, metavar="N", help="the same in micro-batches per replica")
    group.add_argument("--seq-len", type=count, metavar="N", help="tokens per sequence (1024, or what the model has)")
    group.add_argument("--recompute", choices=RECOMPUTE, default="none")
    numbers(group)


def numbers(group: argparse._ArgumentGroup) -> None:
    """Flags of a training step that are not its size."""
    group.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
    group.add_argument("--optimizer", choices=sorted(OPTIMIZER_STATES), default="adamw")
    group.add_argument("--attention", choices=ATTENTIONS, default="flash")
    group.add_argument("--clip-norm", type=float, metavar="X", help="largest norm of all gradients together")
    group.add_argument("--loss-scale", default="none", metavar="dynamic[:X]|static:X|none")
    group.add_argument("--dropout", type=probability, metavar="P", help="of the model's dropout layers (its own)")


def machine(p: argparse.ArgumentParser) -> None:
    """The cluster, how much of it, and what is wrong with it."""
    p.set_defaults(default_cluster=DEFAULT_CLUSTER)
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group = p.add_argument_group("machine")
    group.add_argument("--cluster", metavar="NAME|FILE", help=f"cluster profile ({DEFAULT_CLUSTER})")
    group.add_argument("--gpus", type=count, metavar="N", help="number of GPUs (default: all of the nodes)")
    group.add_argument("--nodes", type=count, metavar="N", help="number of nodes (1)")
    faults(group)


def faults(group: argparse._ArgumentGroup) -> None:
    """What is slower than the profile says."""
    group.add_argument("--slow-gpu", type=slow_gpu, action="append", metavar="R=X",
                       help="rank R computes X times as long")  # fmt: skip
    group.add_argument("--degrade-link", type=degraded_link, action="append", metavar="NAME=X",
                       help="a link at X of its bandwidth, as 'node0/gpu3->nvswitch=0.5'; * for any text")  # fmt: skip


def options(p: argparse.ArgumentParser) -> None:
    """Degrees, and whatever a strategy can be told."""
    group = p.add_argument_group("strategy options")
    group.add_argument("--rtp", type=count, metavar="N", help="ranks of a rotation ring")
    group.add_argument("--tp", type=count, metavar="N", help="ranks of a tensor-parallel group")
    group.add_argument("--fsdp", type=count, metavar="N", help="ranks that share the shards of hsdp")
    group.add_argument("--dp", type=count, metavar="N", help="data-parallel replicas")
    group.add_argument("--dp-sync", choices=("ddp", "zero1", "zero2"), default="ddp", help="of rotation and tp over dp")
    group.add_argument("--zero1-size", type=count, metavar="N", help="ranks that share the optimizer under zero1")
    group.add_argument("--no-dp-overlap", action="store_true", help="reduce gradients after the backward, all at once")
    group.add_argument("--sequence-parallel", action="store_true", help="in pipelines, tp with sequence parallelism")
    group.add_argument("--pp", type=count, metavar="N", help="stages of a pipeline")
    group.add_argument("--vpp", type=count, default=1, metavar="N", help="chunks per stage (interleaved)")
    group.add_argument("--pp-layers", type=counts, default=(), metavar="A,B,...", help="blocks of each stage or chunk")
    group.add_argument("--pp-balance", choices=("layers", "cost"), default="layers", help="cost counts the head, too")
    group.add_argument("--no-pp-overlap", action="store_true", help="a stage waits for its sends")
    group.add_argument("--pp-scatter-gather", action="store_true", help="tp ranks each send a share to the next stage")
    group.add_argument("--rank-order", choices=("tp-dp-pp", "tp-pp-dp"), default="tp-dp-pp",
                       help="which degrees take neighbouring ranks, nearest first")  # fmt: skip
    group.add_argument("--ddp-bucket-mib", type=count, default=25, metavar="N")
    group.add_argument("--fsdp-unit", choices=("block", "model"), default="block")
    group.add_argument("--no-fsdp-prefetch", action="store_true")
    group.add_argument("--rtp-ring", choices=("auto", "flat", "two-level"), default="auto")
    group.add_argument("--rtp-fuse-mlp", action="store_true", help="rotate an MLP as one unit")
    group.add_argument("--rtp-hide-gradient-hop", action="store_true")
    group.add_argument("--rtp-prefetch", action="store_true", help="start a unit's first hop during the unit before")
    group.add_argument("--rtp-chunk-mib", type=count, default=4, metavar="N", help="bounce buffer of rtp-inplace")
    group.add_argument("--eval-passes", type=count, default=None, metavar="N", help="forward-only passes (rotation)")


def engine(p: argparse.ArgumentParser) -> None:
    """How it is simulated, and where results go."""
    group = p.add_argument_group("engine and output")
    group.add_argument("--engine", choices=("simpy", "longest-path", "estimate"), default="simpy",
                       help="estimate: compose or extrapolate what repeats, for large steps")  # fmt: skip
    group.add_argument("--no-fold", action="store_true", help="simulate every rank, also symmetric ones")
    group.add_argument("--format", choices=FORMATS, default="table")
    group.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    group.add_argument("--plot", metavar="FILE.png", help="write a comparison plot (extra: plots)")


def difference(p: argparse.ArgumentParser) -> None:
    """Of commands that compare two timelines."""
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--worst", type=count, default=10, metavar="N", help="list the N worst ops (10)")
    p.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
