"""The planner's speed: python benchmarks/plan_speed.py [--quick] [--plot FILE.png].

Llama-2 70B on 8 to 8,192 A100s (--quick: up to 1,024), 2,048 sequences of 4,096 tokens a step, the whole space: how
many candidates there are, candidates per second of each stage in one process, estimates and simulations of the ten
plans shown on two processes, memory. Exit code 1 if the search on 1,024 GPUs takes more than 10 s or 2 GiB, or its
bounds are evaluated at less than 20,000 a second.

A stage's rate counts the candidates that come to it. Each size runs in a process of its own, from nothing known.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.planner.bounds import time_bounds
from rtp_sim.planner.memory_bounds import memory_bounds
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question
from rtp_sim.planner.workload import Workload

SIZES = (8, 64, 512, 1024, 2048, 8192)
JUDGED, TARGET_S, TARGET_BYTES, TARGET_PER_S = 1024, 10.0, 2 << 30, 20_000


@dataclass(frozen=True)
class Speed:
    """One search: seconds in all, CPU seconds of all processes with their start, candidates, those that keep the rules,
    those within memory, estimates, simulations, seconds by stage, seconds of all bounds once the tables are there, most
    memory of a process."""

    gpus: int
    wall_s: float
    cpu_s: float
    candidates: int
    sound: int
    fitting: int
    estimates: int
    simulations: int
    stages_s: dict[str, float]
    bounds_s: float
    peak_bytes: int
    best: str


def measure(gpus: int) -> Speed:
    """The whole search for one number of GPUs."""
    # As the command line does (cli.py).
    gc.set_threshold(200_000, 50, 100)
    began = perf_counter()
    cluster = load_cluster("dgx-a100-80g", gpus // 8)
    searched = search(Question(Workload("llama2-70b", 2048, 4096), (cluster,), front=False))
    wall_s = perf_counter() - began
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(t.ru_utime + t.ru_stime for t in times)
    site = searched.sites[0]
    began = perf_counter()
    time_bounds(site.space.take(site.fits), site.model)
    memory_bounds(site.space, site.model)
    bounds_s = perf_counter() - began
    usage = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    best = str(site.space.candidate(searched.lines[0].place)) if searched.lines else "none fits"
    return Speed(gpus, wall_s, cpu_s, len(site.allowed), len(site.space), int(site.fits.sum()), len(searched.found),
                 searched.simulated, searched.seconds, bounds_s, max(usage), best)  # fmt: skip


def measured_apart(gpus: int) -> Speed:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, gpus).result()


def line(s: Speed) -> str:
    """One row of the table."""
    rules = s.candidates / s.stages_s["rules"]
    memory, bounds = s.sound / s.stages_s["memory"], s.fitting / s.stages_s["bounds"]
    warm = (s.sound + s.fitting) / s.bounds_s if s.bounds_s else 0.0
    estimates, simulations = s.stages_s["estimate"], s.stages_s["simulate"]
    return (f"{s.gpus:>6}{s.candidates:>11,}{s.fitting:>9,}{s.estimates:>10}{s.simulations:>10}"
            f"{s.wall_s:>8.1f}{s.cpu_s:>8.1f}"
            f"{rules:>11,.0f}{memory:>11,.0f}{bounds:>11,.0f}{warm:>11,.0f}{estimates:>7.1f}{simulations:>7.1f}"
            f"{s.peak_bytes / (1 << 20):>7.0f}  {s.best}")  # fmt: skip


def plot(speeds: list[Speed], path: str) -> None:
    """Wall time and candidates over the number of GPUs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    gpus = [s.gpus for s in speeds]
    axes.plot(gpus, [s.wall_s for s in speeds], marker="o", label="search (s)")
    axes.plot(gpus, [s.candidates / 1e4 for s in speeds], marker="s", label="candidates (10,000)")
    axes.plot(gpus, [s.estimates / 10 for s in speeds], marker="^", label="estimates (10)")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(path))


def main() -> int:
    """Print one line per size and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8, 64 and 1,024 GPUs only")
    parser.add_argument("--plot", metavar="FILE.png", help="growth with the number of GPUs")
    arguments = parser.parse_args()
    print(f"{'GPUs':>6}{'candidates':>11}{'fit':>9}{'estimated':>10}{'simulated':>10}{'wall s':>8}{'CPU s':>8}"
          f"{'rules/s':>11}{'memory/s':>11}{'bounds/s':>11}{'warm/s':>11}{'est. s':>7}{'sim. s':>7}{'MiB':>7}"
          f"  best")  # fmt: skip
    speeds = []
    for gpus in (8, 64, 1024) if arguments.quick else SIZES:
        speeds.append(measured_apart(gpus))
        print(line(speeds[-1]), flush=True)
    if arguments.plot:
        plot(speeds, arguments.plot)
    judged = next(s for s in speeds if s.gpus == JUDGED)
    per_s = (judged.sound + judged.fitting) / judged.bounds_s
    met = judged.wall_s <= TARGET_S and judged.peak_bytes <= TARGET_BYTES and per_s >= TARGET_PER_S
    print(f"{JUDGED} GPUs: {judged.candidates:,} candidates in {judged.wall_s:.1f} s, target {TARGET_S:g} s; bounds at "
          f"{per_s:,.0f} a second, target {TARGET_PER_S:,}: {'met' if met else 'missed'}")  # fmt: skip
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
