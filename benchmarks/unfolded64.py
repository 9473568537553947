"""Every rank simulated, none folded: python benchmarks/unfolded64.py [--ring 64] [--replicas 1].

Llama-2 7B on 8 nodes of dgx-a100-80g in one rotation ring of 64. This bounds what runs that break the symmetry (one
slow GPU, unequal nodes) cost. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

from rtp_sim.engine.simulate import simulate
from rtp_sim.experiment import Request, prepare

TARGET_S = 60.0
TARGET_MIB = 2048


def main() -> int:
    """Print the run and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ring", type=int, default=64, help="ranks of a ring (64)")
    parser.add_argument("--replicas", type=int, default=1, help="data-parallel replicas of the ring (1)")
    arguments = parser.parse_args()
    ring, ranks = arguments.ring, arguments.ring * arguments.replicas
    begun = time.perf_counter()
    prepared = prepare(Request("llama2-7b", "dgx-a100-80g", "rtp", gpus=ranks, inner=ring, seq_len=4096))
    built_s, cpu_begun = time.perf_counter() - begun, time.process_time()
    timeline = simulate(prepared.schedule, prepared.cost, fold=False)
    cpu_s, wall_s = time.process_time() - cpu_begun, time.perf_counter() - begun
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ops = sum(len(times.end_ns) for times in timeline.ranks.values())
    layout = f"RTP {ring} x DP {arguments.replicas}"
    print(f"llama2-7b, {layout} on {ranks} GPUs of dgx-a100-80g, every rank simulated")
    print(f"{'ops':>11}{'build s':>9}{'CPU s':>8}{'ops per CPU s':>15}{'wall s':>8}{'peak MiB':>10}")
    print(f"{ops:>11,}{built_s:>9.2f}{cpu_s:>8.1f}{ops / cpu_s:>15,.0f}{wall_s:>8.1f}{peak_mib:>10,.0f}")
    met = wall_s <= TARGET_S and peak_mib <= TARGET_MIB
    print(f"target {TARGET_S:g} s wall and {TARGET_MIB:,} MiB: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
