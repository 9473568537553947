"""A pipeline step estimated, against the same step simulated op by op: python benchmarks/estimate.py [--simulate].

Llama-2 70B on 512 H100s, tp 8 x dp 8 x pp 8, 64 micro-batches: op by op that is 162,000 ops, a rank per stage. Process
start included; `--simulate` does the op-by-op job too. Exit code 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import sys

from compare_time import timed

TARGET_S = 2.0
JOB = (
    "simulate --model llama2-70b --cluster dgx-h100 --nodes 64 --strategy 1f1b --pp 8 --tp 8 --micro-batches 64 "
    "--seq-len 4096 --quiet"
)


def main() -> int:
    """Print one line per job and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulate", action="store_true", help="also op by op")
    arguments = parser.parse_args()
    print(f"{'job':<12}{'wall s':>8}{'CPU s':>8}")
    wall_s, cpu_s = timed([*JOB.split(), "--engine", "estimate"])
    print(f"{'estimated':<12}{wall_s:>8.2f}{cpu_s:>8.2f}", flush=True)
    if arguments.simulate:
        print("{:<12}{:>8.2f}{:>8.2f}".format("simulated", *timed(JOB.split())), flush=True)
    print(f"estimated in {wall_s:.2f} s wall, target {TARGET_S:g} s: {'met' if wall_s <= TARGET_S else 'missed'}")
    return 0 if wall_s <= TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
