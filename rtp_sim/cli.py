"""The command line: arguments in, a call into `commands`, an exit code out.

Exit codes: 0 answered; 1 worked, and the answer is no (nothing fits into memory, a prediction is out of tolerance);
2 bad input, told in one message.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rtp_sim import __version__
from rtp_sim.errors import InputError
from rtp_sim.model.training import ATTENTIONS, OPTIMIZER_STATES, PRECISIONS, RECOMPUTE
from rtp_sim.units import parse_bandwidth, parse_time_ns

FORMATS = ("table", "json", "csv")
DEFAULT_CLUSTER = "dgx-a100-80g"
EXPORTS = ("run", "megatron", "torchtitan", "deepspeed", "accelerate")
DEFAULT_STRATEGIES = "ddp,zero1,zero2,fsdp,tp,tp-sp,rtp,rtp-inplace"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rtp-sim`; returns the exit code."""
    # A schedule is a million small objects that live to the end: collecting garbage as often as Python's default does
    # takes half of the run. Forked workers inherit this.
    gc.set_threshold(200_000, 50, 100)
    try:
        arguments = parser().parse_args(argv)
        # Imported here, so that --help and a mistyped flag answer at once.
        if arguments.run == "validate" and arguments.decisions:
            from rtp_sim import commands_decisions

            return commands_decisions.validate_decisions(arguments)
        if arguments.run == "validate" and not arguments.directory:
            from rtp_sim import commands_measured

            return commands_measured.validate_measured(arguments)
        if arguments.run in ("diff", "validate"):
            from rtp_sim import commands_validate

            return int(getattr(commands_validate, arguments.run)(arguments))
        if arguments.run == "calibrate":
            from rtp_sim import commands_calibrate

            return commands_calibrate.calibrate(arguments)
        if arguments.run == "trace":
            from rtp_sim import commands_trace

            return commands_trace.trace(arguments)
        if arguments.run == "sweep":
            from rtp_sim import commands_sweep

            given = list(sys.argv[1:] if argv is None else argv)
            return commands_sweep.sweep(arguments, lambda more: parser().parse_args([*given, *more]))
        if arguments.run == "hardware_import":
            from rtp_sim import commands_import

            return commands_import.hardware_import(arguments)
        if arguments.run == "plan":
            from rtp_sim import commands_plan

            return commands_plan.plan(arguments)
        from rtp_sim import commands

        run = getattr(commands, arguments.run)
        return int(run(arguments))
    except InputError as error:
        print(f"rtp-sim: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, say) has seen enough.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("rtp-sim: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The argument parser with all commands."""
    top = _Parser(prog="rtp-sim", description="Simulate distributed training schedules and compare them.")
    top.add_argument("--version", action="version", version=f"rtp-sim {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    _compare(commands.add_parser("compare", help="several strategies for one model on one cluster"))
    _sweep(commands.add_parser("sweep", help="a grid of experiments: GPUs, bandwidths, micro-batches, anything"))
    _simulate(commands.add_parser("simulate", help="one strategy, with trace and report"))
    _plan(commands.add_parser("plan", help="the best strategy, degrees and micro-batch, and on which machine"))
    _schedule(commands.add_parser("schedule", help="print or save the program of a rank"))
    _diff(commands.add_parser("diff", help="a predicted against a measured timeline"))
    _validate(commands.add_parser("validate", help="a measured run against its prediction"))
    _trace(commands.add_parser("trace", help="where the time went in traces of PyTorch's profiler"))
    _export(commands.add_parser("export", help="a plan as settings of training frameworks, or as a command to run"))
    _run(commands.add_parser("run", help="one strategy on real processes of this machine (extra: torch)"))
    _calibrate(commands.add_parser("calibrate", help="measure this machine and write its cluster profile"))
    _catalogue(commands.add_parser("hardware", help="device and cluster profiles"), "hardware")
    _catalogue(commands.add_parser("models", help="model presets"), "models")
    return top


def _workload(p: argparse.ArgumentParser, per_replica: bool = True) -> None:
    group = p.add_argument_group("model and training")
    group.add_argument("--model", required=True, metavar="NAME|FILE", help="preset, config.json or layer-list file")
    group.add_argument(
        "--micro-batch", type=_count, default=1, metavar="N", help="sequences per replica and micro-step"
    )
    group.add_argument("--global-batch", type=_count, metavar="N", help="sequences per step (default: see below)")
    if per_replica:
        group.add_argument("--micro-batches", type=_count, metavar="N", help="the same in micro-batches per replica")
    group.add_argument("--seq-len", type=_count, metavar="N", help="tokens per sequence (1024, or what the model has)")
    group.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
    group.add_argument("--recompute", choices=RECOMPUTE, default="none")
    group.add_argument("--optimizer", choices=sorted(OPTIMIZER_STATES), default="adamw")
    group.add_argument("--attention", choices=ATTENTIONS, default="flash")
    group.add_argument("--clip-norm", type=float, metavar="X", help="largest norm of all gradients together")
    group.add_argument("--loss-scale", default="none", metavar="dynamic[:X]|static:X|none")
    group.add_argument("--dropout", type=_probability, metavar="P", help="of the model's dropout layers (its own)")


def _machine(p: argparse.ArgumentParser) -> None:
    p.set_defaults(default_cluster=DEFAULT_CLUSTER)
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group = p.add_argument_group("machine")
    group.add_argument("--cluster", metavar="NAME|FILE", help=f"cluster profile ({DEFAULT_CLUSTER})")
    group.add_argument("--gpus", type=_count, metavar="N", help="number of GPUs (default: all of the nodes)")
    group.add_argument("--nodes", type=_count, metavar="N", help="number of nodes (1)")
    _faults(group)


def _faults(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slow-gpu", type=_slow_gpu, action="append", metavar="R=X",
                       help="rank R computes X times as long")  # fmt: skip
    group.add_argument("--degrade-link", type=_degraded_link, action="append", metavar="NAME=X",
                       help="a link at X of its bandwidth, as 'node0/gpu3->nvswitch=0.5'; * for any text")  # fmt: skip


def _options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("strategy options")
    group.add_argument("--rtp", type=_count, metavar="N", help="ranks of a rotation ring")
    group.add_argument("--tp", type=_count, metavar="N", help="ranks of a tensor-parallel group")
    group.add_argument("--fsdp", type=_count, metavar="N", help="ranks that share the shards of hsdp")
    group.add_argument("--dp", type=_count, metavar="N", help="data-parallel replicas")
    group.add_argument("--dp-sync", choices=("ddp", "zero1", "zero2"), default="ddp", help="of rotation and tp over dp")
    group.add_argument("--zero1-size", type=_count, metavar="N", help="ranks that share the optimizer under zero1")
    group.add_argument("--no-dp-overlap", action="store_true", help="reduce gradients after the backward, all at once")
    group.add_argument("--sequence-parallel", action="store_true", help="in pipelines, tp with sequence parallelism")
    group.add_argument("--pp", type=_count, metavar="N", help="stages of a pipeline")
    group.add_argument("--vpp", type=_count, default=1, metavar="N", help="chunks per stage (interleaved)")
    group.add_argument("--pp-layers", type=_counts, default=(), metavar="A,B,...", help="blocks of each stage or chunk")
    group.add_argument("--pp-balance", choices=("layers", "cost"), default="layers", help="cost counts the head, too")
    group.add_argument("--no-pp-overlap", action="store_true", help="a stage waits for its sends")
    group.add_argument("--pp-scatter-gather", action="store_true", help="tp ranks each send a share to the next stage")
    group.add_argument("--rank-order", choices=("tp-dp-pp", "tp-pp-dp"), default="tp-dp-pp",
                       help="which degrees take neighbouring ranks, nearest first")  # fmt: skip
    group.add_argument("--ddp-bucket-mib", type=_count, default=25, metavar="N")
    group.add_argument("--fsdp-unit", choices=("block", "model"), default="block")
    group.add_argument("--no-fsdp-prefetch", action="store_true")
    group.add_argument("--rtp-ring", choices=("auto", "flat", "two-level"), default="auto")
    group.add_argument("--rtp-fuse-mlp", action="store_true", help="rotate an MLP as one unit")
    group.add_argument("--rtp-hide-gradient-hop", action="store_true")
    group.add_argument("--rtp-prefetch", action="store_true", help="start a unit's first hop during the unit before")
    group.add_argument("--rtp-chunk-mib", type=_count, default=4, metavar="N", help="bounce buffer of rtp-inplace")
    group.add_argument("--eval-passes", type=_count, default=None, metavar="N", help="forward-only passes (rotation)")


def _engine(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("engine and output")
    group.add_argument("--engine", choices=("simpy", "longest-path", "estimate"), default="simpy",
                       help="estimate: compose or extrapolate what repeats, for large steps")  # fmt: skip
    group.add_argument("--no-fold", action="store_true", help="simulate every rank, also symmetric ones")
    group.add_argument("--format", choices=FORMATS, default="table")
    group.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    group.add_argument("--plot", metavar="FILE.png", help="write a comparison plot (extra: plots)")


def _compare(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="compare")
    p.epilog = "Without --global-batch every strategy does micro-batch x GPUs sequences per step, so steps compare."
    _workload(p, per_replica=False)
    _machine(p)
    p.add_argument("--strategies", default=DEFAULT_STRATEGIES, metavar="A,B,...", help=DEFAULT_STRATEGIES)
    _options(p)
    _engine(p)
    p.add_argument("--jobs", type=_count, metavar="N", help="worker processes (default: one per core)")


def _sweep(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="sweep", default_cluster=DEFAULT_CLUSTER)
    p.epilog = (
        "NAME is a flag of this command without its dashes, or a number of the profile: link.NAME.FIELD (by name or "
        "kind), device.FIELD, communication.FIELD. The same command goes on where a sweep into -o DIR was broken off."
    )
    _workload(p, per_replica=False)
    group = p.add_argument_group("machine")
    group.add_argument("--cluster", metavar="NAME|FILE", help=f"cluster profile ({DEFAULT_CLUSTER})")
    group.add_argument("--gpus", type=_counts, metavar="A,B,...", help="numbers of GPUs (default: all of one node)")
    group.add_argument("--nodes", type=_counts, metavar="A,B,...", help="numbers of nodes instead")
    _faults(group)
    p.add_argument("--strategies", default=DEFAULT_STRATEGIES, metavar="A,B,...", help=DEFAULT_STRATEGIES)
    p.add_argument("--vary", action="append", default=[], metavar="NAME=A,B,...",
                   help="as link.ib.bandwidth=100,200,400Gb/s or micro-batch=1,2,4; may be repeated")  # fmt: skip
    _options(p)
    group = p.add_argument_group("engine and output")
    group.add_argument("--engine", choices=("estimate", "simpy", "longest-path"), default="estimate",
                       help="estimate: simulate small steps, compose or extrapolate large ones")  # fmt: skip
    group.add_argument("-o", "--output", metavar="DIR", help="keep results there as they come, and go on from them")
    group.add_argument("--workers", type=_count, metavar="N", help="processes of this machine (default: one per core)")
    group.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a Dask scheduler instead (extra: dask)")
    group.add_argument("--format", choices=FORMATS, default="table")
    group.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _simulate(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="simulate")
    p.epilog = "Without --global-batch every replica does one micro-batch."
    _workload(p)
    _machine(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    _options(p)
    _engine(p)
    p.add_argument("--trace", metavar="FILE.json[.gz]", help="write a Chrome trace (opens in Perfetto)")
    group = p.add_argument_group("jitter")
    group.add_argument(
        "--jitter", nargs="?", const="", metavar="NAME=S,...",
        help="p50 and p95 of the step with noise: compute=0.03,link=0.1,rank=0.01 (the default), straggler=0.001x1.5",
    )  # fmt: skip
    group.add_argument("--samples", type=_count, default=200, metavar="N", help="steps that are played (200)")
    group.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the noise (0)")


def _plan(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="plan", default_cluster=DEFAULT_CLUSTER)
    p.epilog = "Axes of --where: tp rtp fsdp dp pp vpp micro-batch micro-batches gpus strategy recompute order dp-sync."
    group = p.add_argument_group("model and training")
    group.add_argument("--model", required=True, metavar="NAME|FILE", help="preset, config.json or layer-list file")
    group.add_argument("--global-batch", type=_count, metavar="N", help="sequences per step (of --tokens: 4 Mi tokens)")
    group.add_argument("--seq-len", type=_count, metavar="N", help="tokens per sequence (1024, or what the model has)")
    _numbers(group)
    group = p.add_argument_group("machines")
    group.add_argument("--cluster", metavar="NAME|FILE", help=f"cluster profile ({DEFAULT_CLUSTER})")
    group.add_argument("--clusters", metavar="A,B,...", help="several, to compare")
    group.add_argument("--nodes", type=_counts, metavar="N,...", help="numbers of nodes (1)")
    group.add_argument("--gpus", type=_counts, metavar="N,...", help="numbers of GPUs, instead of nodes")
    group.add_argument("--price-per-gpu-hour", action="append", default=[], metavar="[CLUSTER=]USD",
                       help="in place of the profile's list price")  # fmt: skip
    group = p.add_argument_group("what is wanted")
    group.add_argument("--objective", choices=("time", "memory", "gpus", "cost", "energy"), default="time")
    group.add_argument("--top", type=_count, default=10, metavar="N", help="plans to show (10)")
    group.add_argument("--variants", action="store_true", help="a line for every order, dp-sync, vpp, not the best")
    group.add_argument("--strategies", metavar="A,B,...", help="consider only these")
    for axis in ("tp", "rtp", "fsdp", "dp", "pp", "vpp", "micro-batch"):
        group.add_argument(f"--{axis}", type=_counts, metavar="N,...", help=f"consider only these degrees of {axis}"
                           if axis != "micro-batch" else "consider only these micro-batches")  # fmt: skip
        group.add_argument(f"--max-{axis}", type=_count, metavar="N", help=argparse.SUPPRESS)
    group.add_argument("--recompute", metavar="A,B", help=f"some of {', '.join(RECOMPUTE)}")
    group.add_argument("--rank-order", metavar="A,B", help="some of tp-dp-pp, tp-pp-dp")
    group.add_argument("--dp-sync", metavar="A,B", help="some of ddp, zero1, zero2")
    group.add_argument("--where", action="append", default=[], metavar="LIMIT",
                       help="a limit on an axis or a product of axes, as tp*pp<=16; --max-tp N is tp<=N")  # fmt: skip
    group.add_argument("--memory-headroom", type=_percent, default=0.0, metavar="10%%", help="memory to keep free (0)")
    group.add_argument("--min-tokens-per-s", type=_factor, metavar="X", help="leave out what is slower")
    group = p.add_argument_group("the whole run, and what if")
    group.add_argument("--tokens", type=_amount, metavar="T", help="tokens to train, as 1e12: which machine, how many")
    group.add_argument("--deadline", type=_duration_s, metavar="30d", help="time for these tokens, as 30d or 12h")
    group.add_argument("--budget", type=_amount, metavar="USD", help="money for these tokens")
    group.add_argument("--max-nodes", type=_count, default=128, metavar="N", help="most nodes of a cluster (128)")
    group.add_argument("--break-even", metavar="NUMBER:A,B", help="where A and B are equal, link.ib.bandwidth:rtp,fsdp")
    group.add_argument("--largest", choices=("seq-len", "micro-batch", "model", "layers"),
                       help="the largest that fits; a model grows in proportion, or in layers alone")  # fmt: skip
    p.add_argument("--jobs", type=_count, default=2, metavar="N", help="processes (2)")
    p.add_argument("--sensitivity", action="store_true",
                   help="search again with every number of the machine 20%% smaller and larger: who wins then?")
    p.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    p.add_argument("--export", metavar="DIR", help="write every plan shown as a command and as frameworks' settings")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _numbers(group: argparse._ArgumentGroup) -> None:
    """Flags of a training step that are not its size."""
    group.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16")
    group.add_argument("--optimizer", choices=sorted(OPTIMIZER_STATES), default="adamw")
    group.add_argument("--attention", choices=ATTENTIONS, default="flash")
    group.add_argument("--clip-norm", type=float, metavar="X", help="largest norm of all gradients together")
    group.add_argument("--loss-scale", default="none", metavar="dynamic[:X]|static:X|none")
    group.add_argument("--dropout", type=_probability, metavar="P", help="of the model's dropout layers (its own)")


def _schedule(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="schedule")
    _workload(p)
    _machine(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    _options(p)
    p.add_argument("--rank", type=int, default=0, metavar="R", help="whose program to print (0)")
    p.add_argument("--limit", type=_count, metavar="N", help="print only the first N ops")
    p.add_argument("--format", choices=("listing", "text", "json"), default="listing",
                   help="listing for people; text and json hold the whole schedule")  # fmt: skip


def _diff(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="diff")
    p.epilog = "Errors are predicted less measured: positive where the prediction is too slow."
    p.add_argument("predicted", metavar="PREDICTED.json", help="a timeline, as rtp-sim validate --predicted writes it")
    p.add_argument(
        "measured", metavar="MEASURED.json", help="a timeline of the same schedule, as rtp-sim run leaves it"
    )
    _difference(p)


def _validate(p: argparse.ArgumentParser) -> None:
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
    group.add_argument("--workers", type=_count, default=2, metavar="N", help="processes (2)")
    group = p.add_argument_group("a run of rtp-sim run")
    p.add_argument("--profile", metavar="NAME|FILE", help="cluster profile of the machine it ran on")
    p.add_argument("--nodes", type=_count, metavar="N", help="number of nodes (1)")
    p.add_argument("--tolerance", type=_fraction, default=0.15, metavar="X", help="largest relative error (0.15)")
    p.add_argument("--engine", choices=("simpy", "longest-path"), default="simpy")
    p.add_argument("--predicted", metavar="FILE.json", help="write the predicted timeline")
    p.add_argument("--from-trace", action="store_true", help="ops as the profiler saw them (run --profile-trace)")
    _difference(p)


def _trace(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="trace")
    p.epilog = "window == computing + exposed communication + idle, on each rank."
    p.add_argument("files", nargs="+", metavar="FILE", help="a trace per rank, .json or .json.gz, or their directory")
    p.add_argument("--worst", type=_count, default=10, metavar="N", help="list the N kernels that take most (10)")
    p.add_argument("--timeline", metavar="FILE.json", help="of a run's directory: write its ops as a measured timeline")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _difference(p: argparse.ArgumentParser) -> None:
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--worst", type=_count, default=10, metavar="N", help="list the N worst ops (10)")
    p.add_argument("--report", metavar="FILE.html", help="write a self-contained report")


def _run(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="run_schedule")
    p.epilog = "Without --global-batch every replica does one micro-batch. Exit code 1: the run failed, or the check."
    _workload(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    _options(p)
    group = p.add_argument_group("processes")
    group.add_argument("--nproc-per-node", "--world-size", type=_count, metavar="N",
                       help="ranks (default: the product of the degrees)")  # fmt: skip
    group.add_argument("--only-rank", type=int, metavar="R", help="run rank R of them alone, without its partners")
    group.add_argument("--communication", choices=("fake", "copy"),
                       help="of a rank alone: nothing (fake, the default) or copies of the same size")  # fmt: skip
    group.add_argument("--twin", action="store_true", help="torch's own ddp, fsdp, tp or tp-sp instead of the schedule")
    group.add_argument("--as-nodes", type=_count, default=1, metavar="N", help="lay out as if on N nodes")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument(
        "--transport", "--backend", choices=("auto", "gloo", "nccl", "shm", "emulated"), default="auto",
        help="how data move: gloo (CPU), nccl (GPU), shared memory, or that over an emulated link (auto: by device)",
    )  # fmt: skip
    group.add_argument("--link-latency", type=_time_ns, default=0, metavar="T", help="of an emulated link, as 200us")
    group.add_argument("--link-bandwidth", type=_bandwidth, default=0, metavar="B", help="of that link, as 1GB/s")
    group.add_argument("--threads", type=_count, default=1, metavar="N", help="threads a rank computes with (1)")
    group.add_argument("--pin", action="store_true", help="keep each rank on one core: less noise where cores are few")
    group.add_argument("--port", type=_count, metavar="N", help="where the ranks meet (default: a free one)")
    group.add_argument("--timeout", type=float, default=60.0, metavar="S", help="end a run that stands still (60)")
    group = p.add_argument_group("ranks that only sleep")
    group.add_argument(
        "--stated-times", metavar="NAME|FILE", help="nothing is computed or sent: ops take what this profile predicts"
    )
    group.add_argument("--stretch", type=_factor, metavar="X", help="stated times X times as long, as 100 (1)")
    group.add_argument(
        "--slow-rank", type=_slow_rank, action="append", metavar="R:X", help="rank R computes X times as long, as 1:1.5"
    )
    group = p.add_argument_group("steps and output")
    group.add_argument("--steps", type=_count, default=10, metavar="N", help="measured steps (10)")
    group.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them (2)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and data")
    group.add_argument("--check", action="store_true", help="compare the first step with dense training")
    group.add_argument("--fp64", action="store_true", help="double precision throughout, to compare results")
    group.add_argument("--save-tensors", action="store_true", help="keep the ranks' weights after the last step")
    group.add_argument("--save", metavar="DIR", help="write the training state there after the last step")
    group.add_argument("--save-every", type=_count, default=0, metavar="K", help="... and after every K steps")
    group.add_argument("--load", metavar="DIR", help="go on from the newest state there, of any layout")
    group.add_argument("--profile-trace", action="store_true", help="one more step under PyTorch's profiler")
    group.add_argument("-o", "--output", required=True, metavar="DIR", help="run directory")
    group.add_argument("--schedule", metavar="FILE",
                       help="run this one, of schedule --format text or json, perhaps edited by hand")
    group.add_argument("--prepare", action="store_true", help="only write the run directory, for torchrun")
    group.add_argument("--format", choices=("table", "json"), default="table")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _export(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="export")
    p.epilog = (
        "A file goes to stdout, notes to stderr. Exit code 1: none of the frameworks asked for can do this (stderr "
        "says why). docs/exports.md says what is mapped to what."
    )
    p.add_argument("--to", required=True, metavar="A,B,...", help=f"{', '.join(EXPORTS)}, or all")
    _workload(p)
    _machine(p)
    p.add_argument("--strategy", required=True, metavar="NAME")
    _options(p)
    p.add_argument("-o", "--output", metavar="DIR", help="write the files there (default: print them)")
    p.add_argument("--format", choices=("table", "json"), default="table")


def _calibrate(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="calibrate")
    p.epilog = "Writes FILE.toml, FILE-device.toml and FILE.calibration.json. Leave the machine alone meanwhile."
    p.add_argument("-o", "--output", required=True, metavar="FILE.toml", help="the cluster profile to write")
    p.add_argument("--nproc", type=_count, default=2, metavar="N", help="ranks on this machine (2)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=_count, default=1, metavar="N", help="threads each CPU rank computes with (1)")
    p.add_argument("--pin", action="store_true", help="keep each rank on one core")
    p.add_argument("--transport", choices=("gloo", "shm"), default="gloo", help="what CPU ranks send with (gloo)")
    p.add_argument("--quick", action="store_true", help="few sizes and repetitions: seconds instead of minutes")
    p.add_argument("--timeout", type=float, default=120.0, metavar="S", help="how long a rank may stand still (120)")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _catalogue(p: argparse.ArgumentParser, what: str) -> None:
    actions = p.add_subparsers(title="actions", required=True, metavar="ACTION", parser_class=_Parser)
    lister = actions.add_parser("list", help=f"all {what}")
    lister.set_defaults(run=f"{what}_list")
    shower = actions.add_parser("show", help="everything about one")
    shower.set_defaults(run=f"{what}_show")
    shower.add_argument("name")
    for sub in (lister, shower):
        sub.add_argument("--format", choices=("table", "json"), default="table")
    if what == "hardware":
        _import(actions.add_parser("import", help="a cluster profile from nvidia-smi topo -m and nccl-tests"))


def _import(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run="hardware_import")
    p.epilog = "Writes FILE.toml and, with --nccl-tests, FILE.import.json. docs/calibration.md says what is fitted."
    p.add_argument("--topo", required=True, metavar="FILE", help="what nvidia-smi topo -m prints on one node")
    p.add_argument("--nccl-tests", nargs="+", action="extend", default=[], metavar="FILE",
                   help="what nccl-tests print, or write with -J: sweeps of one or several nodes")  # fmt: skip
    p.add_argument("--device", required=True, metavar="NAME|FILE", help="device profile of the GPUs")
    p.add_argument("--nic", metavar="RATE", help='speed of a NIC, for example "200Gb/s" (the topology does not say)')
    p.add_argument("--like", metavar="NAME", help="cluster profile that lends what was not measured")
    p.add_argument("-o", "--output", required=True, metavar="FILE.toml", help="the cluster profile to write")
    p.add_argument("--format", choices=("table", "json"), default="table")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction of 1 such as 0.15")
    return value


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount above 0 such as 2e6")
    return value


def _duration_s(text: str) -> float:
    """ "30d", "12h": seconds."""
    unit = {"d": 86400.0, "h": 3600.0}.get(text[-1:], 0.0)
    try:
        value = float(text[:-1]) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in days or hours such as 30d")
    return value


def _percent(text: str) -> float:
    """ "10%" or 0.1."""
    value = _fraction(text[:-1]) / 100 if text.endswith("%") else _fraction(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} leaves nothing: expected less than 100 %, such as 10%")
    return value


def _probability(text: str) -> float:
    value = _fraction(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability of at least 0 and below 1 such as 0.1")
    return value


def _time_ns(text: str) -> int:
    return _quantity(parse_time_ns, text)


def _bandwidth(text: str) -> int:
    return _quantity(parse_bandwidth, text)


def _quantity(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.001 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor such as 1.5")
    return value


def _slow_rank(text: str) -> tuple[int, int]:
    rank, colon, factor = text.partition(":")
    if not (rank.isdigit() and colon):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank and a factor such as 1:1.5")
    return int(rank), round(_factor(factor) * 1000)


def _slow_gpu(text: str) -> tuple[int, float]:
    rank, equals, factor = text.partition("=")
    if not (rank.isdigit() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank and a factor such as 3=1.3")
    return int(rank), _factor(factor)


def _degraded_link(text: str) -> tuple[str, float]:
    name, equals, fraction = text.rpartition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not a link and a fraction such as node0/gpu3->nvswitch=0.5")
    return name, _fraction(fraction)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
