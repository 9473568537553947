"""Flags of the commands that simulate what they are told: compare, sweep, simulate, schedule."""

from __future__ import annotations

import argparse

from rtp_sim.flags.groups import DEFAULT_CLUSTER, FORMATS, engine, faults, machine, options, workload
from rtp_sim.flags.values import count, counts, whole

DEFAULT_STRATEGIES = "ddp,zero1,zero2,fsdp,tp,tp-sp,rtp,rtp-inplace"


def compare(p: argparse.ArgumentParser) -> None:
    """`rtp-sim compare`."""
    p.set_defaults(run="compare")
    p.epilog = "Without --global-batch every strategy does micro-batch x GPUs sequences per step, so steps compare."
    workload(p, per_replica=False)
    machine(p)
    p.add_argument("--strategies", default=DEFAULT_STRATEGIES, metavar="A,B,...", help=DEFAULT_STRATEGIES)
    options(p)
    engine(p)
    p.add_argument("--jobs", type=count, metavar="N", help="worker processes (default: one per core)")


def sweep(p: argparse.ArgumentParser) -> None:
    """`rtp-sim sweep`."""
    p.set_defaults(run="sweep", default_cluster=DEFAULT_CLUSTER)
    p.epilog = (
        "NAME is a flag of this command without its dashes, or a number of the profile: link.NAME.FIELD (by name or "
        "kind), device.FIELD, communication.FIELD. The same command goes on where a sweep into -o DIR was broken off."
    )
    workload(p, per_replica=False)
    group = p.add_argument_group("machine")
    group.add_argument("--cluster", metavar="NAME|FILE", help=f"cluster profile ({DEFAULT_CLUSTER})")
    group.add_argument("--gpus", type=counts, metavar="A,B,...", help="numbers of GPUs (default: all of one node)")
    group.add_argument("--nodes", type=counts, metavar="A,B,...", help="numbers of nodes instead")
    faults(group)
    p.add_argument("--strategies", default=DEFAULT_STRATEGIES, metavar="A,B,...", help=DEFAULT_STRATEGIES)
    p.add_argument("--vary", action="append", default=[], metavar="NAME=A,B,...",
                   help="as link.ib.bandwidth=100,200,400Gb/s or micro-batch=1,2,4; may be repeated")  # fmt: skip
    options(p)
    group = p.add_argument_group("engine and output")
    group.add_argument("--engine", choices=("estimate", "simpy", "longest-path"), default="estimate",
                       help="estimate: simulate small steps, compose or extrapolate large ones")  # fmt: skip
    group.add_argument("-o", "--output", metavar="DIR", help="keep results there as they come, and go on from them")
    group.add_argument("--workers", type=count, metavar="N", help="processes of this machine (default: one per core)")
    group.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a Dask scheduler instead (extra: dask)")
    group.add_argument("--format", choices=FORMATS, default="table")
    group.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def simulate(p: argparse.ArgumentParser) -> None:
    """`rtp-sim simulate`."""
    p.set_defaults(run="simulate")
    p.epilog = "Without --global-batch every replica does one micro-batch."
    workload(p)
    machine(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    options(p)
    engine(p)
    p.add_argument("--trace", metavar="FILE.json[.gz]", help="write a Chrome trace (opens in Perfetto)")
    group = p.add_argument_group("jitter")
    group.add_argument(
        "--jitter", nargs="?", const="", metavar="NAME=S,...",
        help="p50 and p95 of the step with noise: compute=0.03,link=0.1,rank=0.01 (the default), straggler=0.001x1.5",
    )  # fmt: skip
    group.add_argument("--samples", type=count, default=200, metavar="N", help="steps that are played (200)")
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="of the noise (0)")


def schedule(p: argparse.ArgumentParser) -> None:
    """`rtp-sim schedule`."""
    p.set_defaults(run="schedule")
    workload(p)
    machine(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    options(p)
    p.add_argument("--rank", type=int, default=0, metavar="R", help="whose program to print (0)")
    p.add_argument("--limit", type=count, metavar="N", help="print only the first N ops")
    p.add_argument("--format", choices=("listing", "text", "json"), default="listing",
                   help="listing for people; text and json hold the whole schedule")  # fmt: skip
