"""How long the parts take that every run needs, in seconds of CPU time: python benchmarks/parts.py.

Profile and topology of 1,024 ranks with 2,048 routes, folding, prices, checks and memory of one RTP step of Llama-2 7B.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.fold import fold
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import memory_profiles
from rtp_sim.experiment import Request, prepare
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.hazards import unordered_pairs

CLUSTER, NODES = "dgx-a100-80g", 128


def timed(what: str, work: Callable[[], object]) -> None:
    """Runs the work once and prints its CPU time."""
    begun = time.process_time()
    work()
    print(f"{what:58} {time.process_time() - begun:8.3f} s")


def main() -> None:
    """All parts, one line each."""
    load_cluster(CLUSTER)
    timed(f"load {CLUSTER} with {NODES} nodes", lambda: load_cluster(CLUSTER, NODES))
    cluster = load_cluster(CLUSTER, NODES)
    routes = [(r, (r + step) % 1024) for r in range(1024) for step in (1, 8)]
    timed("2,048 routes", lambda: [cluster.topology.route(a, b) for a, b in routes])
    request = Request("llama2-7b", CLUSTER, "rtp", nodes=NODES, inner=8, dp=128)
    timed("build the schedule of RTP 8 x DP 128", lambda: prepare(request, cluster))
    schedule = prepare(request, cluster).schedule
    ops = len(schedule.programs[0].ops)
    timed("fold 1,024 ranks", lambda: fold(schedule, ClusterCost(cluster)))
    timed(f"longest path, folded, {ops:,} ops", lambda: longest_path(schedule, ClusterCost(cluster)))
    timed(f"check {ops:,} ops on 1,024 ranks", lambda: check(schedule))
    timed(f"hazards of {ops:,} ops", lambda: unordered_pairs(schedule.programs[0]))
    timeline = longest_path(schedule, ClusterCost(cluster))
    timed(f"memory of {ops:,} ops", lambda: memory_profiles(schedule, timeline.ranks))


if __name__ == "__main__":
    main()
