"""Ops per CPU second of both engines on RTP-like steps: python benchmarks/engine_ops.py [--ranks 8 64]
[--units 20].

One unit is a forward and a backward sweep over all shards: weight hops beside kernels, gradient hops behind
them. Unfolded, every rank is simulated; folded, one stands for all. Ops count what is simulated.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from engine_helpers import ToyCost, one_ring, rtp_program, switch_path

from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate


def main() -> None:
    """Print one line per engine, ring size and folding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--units", type=int, default=20, help="rotated units (each 2 sweeps)")
    parser.add_argument(
        "--slowdown-permille", type=int, default=1000, help="1126: compute slows while sending"
    )
    args = parser.parse_args()
    print(f"{'engine':<14}{'ranks':>6}{'folded':>8}{'ops':>11}{'CPU s':>9}{'ops/s':>11}{'peak MiB':>10}")
    for ranks in args.ranks:
        schedule = one_ring(ranks, rtp_program(args.units, ranks, 1000, 900))
        cost = ToyCost(
            ranks,
            path=switch_path(ranks),
            latency_ns=10,
            issue_ns=5,
            slowdown_permille=args.slowdown_permille,
        )
        for fold in (True, False):
            for engine in (longest_path, simulate):
                begun = time.process_time()
                timeline = engine(schedule, cost, fold=fold)
                seconds = time.process_time() - begun
                ops = sum(len(times.end_ns) for times in timeline.ranks.values())
                peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(
                    f"{engine.__name__:<14}{ranks:>6}{fold!s:>8}{ops:>11,}{seconds:>9.3f}"
                    f"{ops / seconds:>11,.0f}{peak_mib:>10,.0f}"
                )


if __name__ == "__main__":
    main()
