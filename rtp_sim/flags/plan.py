"""Flags of plan and of export, which hands a plan on."""

from __future__ import annotations

import argparse

from rtp_sim.flags.groups import DEFAULT_CLUSTER, machine, numbers, options, workload
from rtp_sim.flags.values import amount, count, counts, duration_s, factor, percent
from rtp_sim.model.training import RECOMPUTE

EXPORTS = ("run", "megatron", "torchtitan", "deepspeed", "accelerate")


def plan(p: argparse.ArgumentParser) -> None:
    """`rtp-sim plan`."""
    p.set_defaults(run="plan", default_cluster=DEFAULT_CLUSTER)
    p.epilog = "Axes of --where: tp rtp fsdp dp pp vpp micro-batch micro-batches gpus strategy recompute order dp-sync."
    group = p.add_argument_group("model and training")
    group.add_argument("--model", required=True, metavar="NAME|FILE", help="preset, config.json or layer-list file")
    group.add_argument("--global-batch", type=count, metavar="N", help="sequences per step (of --tokens: 4 Mi tokens)")
    group.add_argument("--seq-len", type=count, metavar="N", help="tokens per sequence (1024, or what the model has)")
    numbers(group)
    group = p.add_argument_group("machines")
    group.add_argument("--cluster", metavar="NAME|FILE", help=f"cluster profile ({DEFAULT_CLUSTER})")
    group.add_argument("--clusters", metavar="A,B,...", help="several, to compare")
    group.add_argument("--nodes", type=counts, metavar="N,...", help="numbers of nodes (1)")
    group.add_argument("--gpus", type=counts, metavar="N,...", help="numbers of GPUs, instead of nodes")
    group.add_argument("--price-per-gpu-hour", action="append", default=[], metavar="[CLUSTER=]USD",
                       help="in place of the profile's list price")  # fmt: skip
    group = p.add_argument_group("what is wanted")
    group.add_argument("--objective", choices=("time", "memory", "gpus", "cost", "energy"), default="time")
    group.add_argument("--top", type=count, default=10, metavar="N", help="plans to show (10)")
    group.add_argument("--variants", action="store_true", help="a line for every order, dp-sync, vpp, not the best")
    group.add_argument("--strategies", metavar="A,B,...", help="consider only these")
    for axis in ("tp", "rtp", "fsdp", "dp", "pp", "vpp", "micro-batch"):
        group.add_argument(f"--{axis}", type=counts, metavar="N,...", help=f"consider only these degrees of {axis}"
                           if axis != "micro-batch" else "consider only these micro-batches")  # fmt: skip
        group.add_argument(f"--max-{axis}", type=count, metavar="N", help=argparse.SUPPRESS)
    group.add_argument("--recompute", metavar="A,B", help=f"some of {', '.join(RECOMPUTE)}")
    group.add_argument("--rank-order", metavar="A,B", help="some of tp-dp-pp, tp-pp-dp")
    group.add_argument("--dp-sync", metavar="A,B", help="some of ddp, zero1, zero2")
    group.add_argument("--where", action="append", default=[], metavar="LIMIT",
                       help="a limit on an axis or a product of axes, as tp*pp<=16; --max-tp N is tp<=N")  # fmt: skip
    group.add_argument("--memory-headroom", type=percent, default=0.0, metavar="10%%", help="memory to keep free (0)")
    group.add_argument("--min-tokens-per-s", type=factor, metavar="X", help="leave out what is slower")
    group = p.add_argument_group("the whole run, and what if")
    group.add_argument("--tokens", type=amount, metavar="T", help="tokens to train, as 1e12: which machine, how many")
    group.add_argument("--deadline", type=duration_s, metavar="30d", help="time for these tokens, as 30d or 12h")
    group.add_argument("--budget", type=amount, metavar="USD", help="money for these tokens")
    group.add_argument("--max-nodes", type=count, default=128, metavar="N", help="most nodes of a cluster (128)")
    group.add_argument("--break-even", metavar="NUMBER:A,B", help="where A and B are equal, link.ib.bandwidth:rtp,fsdp")
    group.add_argument("--largest", choices=("seq-len", "micro-batch", "model", "layers"),
                       help="the largest that fits; a model grows in proportion, or in layers alone")  # fmt: skip
    p.add_argument("--jobs", type=count, default=2, metavar="N", help="processes (2)")
    p.add_argument("--sensitivity", action="store_true",
                   help="search again with every number of the machine 20%% smaller and larger: who wins then?")
    p.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    p.add_argument("--export", metavar="DIR", help="write every plan shown as a command and as frameworks' settings")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def export(p: argparse.ArgumentParser) -> None:
    """`rtp-sim export`."""
    p.set_defaults(run="export")
    p.epilog = (
        "A file goes to stdout, notes to stderr. Exit code 1: none of the frameworks asked for can do this (stderr "
        "says why). docs/exports.md says what is mapped to what."
    )
    p.add_argument("--to", required=True, metavar="A,B,...", help=f"{', '.join(EXPORTS)}, or all")
    workload(p)
    machine(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    options(p)
    p.add_argument("-o", "--output", metavar="DIR", help="write the files there (default: print them)")
    p.add_argument("--format", choices=("table", "json"), default="table")
