"""The command line: arguments in, a call into the commands, an exit code out. `flags/` holds the flags.

Exit codes: 0 answered; 1 worked, and the answer is no (nothing fits into memory, a prediction is out of tolerance);
2 bad input, told in one message.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

from rtp_sim import __version__
from rtp_sim.errors import InputError
from rtp_sim.flags import catalogue, plan, runs, simulation


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


COMMANDS = {
    "compare": (simulation.compare, "several strategies for one model on one cluster"),
    "sweep": (simulation.sweep, "a grid of experiments: GPUs, bandwidths, micro-batches, anything"),
    "simulate": (simulation.simulate, "one strategy, with trace and report"),
    "plan": (plan.plan, "the best strategy, degrees and micro-batch, and on which machine"),
    "schedule": (simulation.schedule, "print or save the program of a rank"),
    "diff": (runs.diff, "a predicted against a measured timeline"),
    "validate": (runs.validate, "a measured run against its prediction"),
    "trace": (runs.trace, "where the time went in traces of PyTorch's profiler"),
    "export": (plan.export, "a plan as settings of training frameworks, or as a command to run"),
    "run": (runs.run, "one strategy on real processes of this machine (extra: torch)"),
    "calibrate": (runs.calibrate, "measure this machine and write its cluster profile"),
    "hardware": (catalogue.hardware, "device and cluster profiles"),
    "models": (catalogue.models, "model presets"),
}


def parser() -> argparse.ArgumentParser:
    """The argument parser with all commands."""
    top = _Parser(prog="rtp-sim", description="Simulate distributed training schedules and compare them.")
    top.add_argument("--version", action="version", version=f"rtp-sim {__version__}")
    # Parsers of commands are of the class of the one they belong to.
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (flags, summary) in COMMANDS.items():
        flags(commands.add_parser(name, help=summary))
    return top


if __name__ == "__main__":
    sys.exit(main())
