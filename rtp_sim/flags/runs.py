"""Flags of the commands that run on a machine and look at what ran: run, calibrate, diff, validate, trace."""

from __future__ import annotations

import argparse

from rtp_sim.flags.groups import difference, options, workload
from rtp_sim.flags.values import bandwidth, count, factor, fraction, slow_rank, time_ns


def run(p: argparse.ArgumentParser) -> None:
    """`rtp-sim run`."""
    p.set_defaults(run="run_schedule")
    p.epilog = "Without --global-batch every replica does one micro-batch. Exit code 1: the run failed, or the check."
    workload(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    options(p)
    group = p.add_argument_group("processes")
    group.add_argument("--nproc-per-node", "--world-size", type=count, metavar="N",
                       help="ranks (default: the product of the degrees)")  # fmt: skip
    group.add_argument("--only-rank", type=int, metavar="R", help="run rank R of them alone, without its partners")
    group.add_argument("--communication", choices=("fake", "copy"),
                       help="of a rank alone: nothing (fake, the default) or copies of the same size")  # fmt: skip
    group.add_argument("--twin", action="store_true", help="torch's own ddp, fsdp, tp or tp-sp instead of the schedule")
    group.add_argument("--as-nodes", type=count, default=1, metavar="N", help="lay out as if on N nodes")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument(
        "--transport", "--backend", choices=("auto", "gloo", "nccl", "shm", "emulated"), default="auto",
        help="how data move: gloo (CPU), nccl (GPU), shared memory, or that over an emulated link (auto: by device)",
    )  # fmt: skip
    group.add_argument("--link-latency", type=time_ns, default=0, metavar="T", help="of an emulated link, as 200us")
    group.add_argument("--link-bandwidth", type=bandwidth, default=0, metavar="B", help="of that link, as 1GB/s")
    group.add_argument("--threads", type=count, default=1, metavar="N", help="threads a rank computes with (1)")
    group.add_argument("--pin", action="store_true", help="keep each rank on one core: less noise where cores are few")
    group.add_argument("--port", type=count, metavar="N", help="where the ranks meet (default: a free one)")
    group.add_argument("--timeout", type=float, default=60.0, metavar="S", help="end a run that stands still (60)")
    group = p.add_argument_group("ranks that only sleep")
    group.add_argument(
        "--stated-times", metavar="NAME|FILE", help="nothing is computed or sent: ops take what this profile predicts"
    )
    group.add_argument("--stretch", type=factor, metavar="X", help="stated times X times as long, as 100 (1)")
    group.add_argument(
        "--slow-rank", type=slow_rank, action="append", metavar="R:X", help="rank R computes X times as long, as 1:1.5"
    )
    group = p.add_argument_group("steps and output")
    group.add_argument("--steps", type=count, default=10, metavar="N", help="measured steps (10)")
    group.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them (2)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and data")
    group.add_argument("--check", action="store_true", help="compare the first step with dense training")
    group.add_argument("--fp64", action="store_true", help="double precision throughout, to compare results")
    group.add_argument("--save-tensors", action="store_true", help="keep the ranks' weights after the last step")
    group.add_argument("--save", metavar="DIR", help="write the training state there after the last step")
    group.add_argument("--save-every", type=count, default=0, metavar="K", help="... and after every K steps")
    group.add_argument("--load", metavar="DIR", help="go on from the newest state there, of any layout")
    group.add_argument("--profile-trace", action="store_true", help="one more step under PyTorch's profiler")
    group.add_argument("-o", "--output", required=True, metavar="DIR", help="run directory")
    group.add_argument("--schedule", metavar="FILE",
                       help="run this one, of schedule --format text or json, perhaps edited by hand")
    group.add_argument("--prepare", action="store_true", help="only write the run directory, for torchrun")
    group.add_argument("--format", choices=("table", "json"), default="table")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def calibrate(p: argparse.ArgumentParser) -> None:
    """`rtp-sim calibrate`."""
    p.set_defaults(run="calibrate")
    p.epilog = "Writes FILE.toml, FILE-device.toml and FILE.calibration.json. Leave the machine alone meanwhile."
    p.add_argument("-o", "--output", required=True, metavar="FILE.toml", help="the cluster profile to write")
    p.add_argument("--nproc", type=count, default=2, metavar="N", help="ranks on this machine (2)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=count, default=1, metavar="N", help="threads each CPU rank computes with (1)")
    p.add_argument("--pin", action="store_true", help="keep each rank on one core")
    p.add_argument("--transport", choices=("gloo", "shm"), default="gloo", help="what CPU ranks send with (gloo)")
    p.add_argument("--quick", action="store_true", help="few sizes and repetitions: seconds instead of minutes")
    p.add_argument("--timeout", type=float, default=120.0, metavar="S", help="how long a rank may stand still (120)")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def diff(p: argparse.ArgumentParser) -> None:
    """`rtp-sim diff`."""
    p.set_defaults(run="diff")
    p.epilog = "Errors are predicted less measured: positive where the prediction is too slow."
    p.add_argument("predicted", metavar="PREDICTED.json", help="a timeline, as rtp-sim validate --predicted writes it")
    p.add_argument(
        "measured", metavar="MEASURED.json", help="a timeline of the same schedule, as rtp-sim run leaves it"
    )
    difference(p)


def validate(p: argparse.ArgumentParser) -> None:
    """`rtp-sim validate`."""
    p.set_defaults(run="validate")
    p.epilog = (
        "Exit code 1 if the median step time or the peak memory is off by more than the tolerance, or the bytes or "
        "messages sent are not those of the schedule."
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("directory", nargs="?", metavar="RUN", help="what rtp-sim run -o RUN left")
    what.add_argument("--measured", nargs="+", metavar="FILE.csv", help="published runs (docs/measured.md)")
    what.add_argument(
        "--all", nargs="?", const="", metavar="FOLDER",
        help="all files of published runs in a folder (RTP_SIM_MEASURED, or ../shared/measured)",
    )  # fmt: skip
    what.add_argument(
        "--decisions", nargs="+", metavar="FILE.csv",
        help="published runs: what the one predicted to be the fastest took, over the best (docs/measured.md)",
    )  # fmt: skip
    group = p.add_argument_group("published runs")
    group.add_argument("--output", metavar="DIR", help="keep estimates there as they come, and go on from them")
    group.add_argument("--workers", type=count, default=2, metavar="N", help="processes (2)")
    group = p.add_argument_group("a run of rtp-sim run")
    p.add_argument("--profile", metavar="NAME|FILE", help="cluster profile of the machine it ran on")
    p.add_argument("--nodes", type=count, metavar="N", help="number of nodes (1)")
    p.add_argument("--tolerance", type=fraction, default=0.15, metavar="X", help="largest relative error (0.15)")
    p.add_argument("--engine", choices=("simpy", "longest-path"), default="simpy")
    p.add_argument("--predicted", metavar="FILE.json", help="write the predicted timeline")
    p.add_argument("--from-trace", action="store_true", help="ops as the profiler saw them (run --profile-trace)")
    difference(p)


def trace(p: argparse.ArgumentParser) -> None:
    """`rtp-sim trace`."""
    p.set_defaults(run="trace")
    p.epilog = "window == computing + exposed communication + idle, on each rank."
    p.add_argument("files", nargs="+", metavar="FILE", help="a trace per rank, .json or .json.gz, or their directory")
    p.add_argument("--worst", type=count, default=10, metavar="N", help="list the N kernels that take most (10)")
    p.add_argument("--timeline", metavar="FILE.json", help="of a run's directory: write its ops as a measured timeline")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
