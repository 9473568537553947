"""What each rank of a calibration does, in order, and how the ranks' results become one set of measurements."""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate import host, kernels, transfers
from rtp_sim.executor.calibrate.launch import Rank, host_cores, run_ranks
from rtp_sim.executor.calibrate.probe import Probe, ProbeTimes, gathered, issue_times, run_probe, waits
from rtp_sim.executor.calibrate.samples import Facts, HostSample, KernelSample, Measurements
from rtp_sim.executor.environment import calm_gloo_threads, keep_freed_memory, sharpen_timers
from rtp_sim.executor.groups import make_control, make_groups
from rtp_sim.executor.pace import usual_ns
from rtp_sim.executor.shm import SharedMemoryTransport
from rtp_sim.executor.transport import Transport
from rtp_sim.schedule.ir import Dims

Say = Callable[[str], None]
PASSES = 4
"""How often everything is gone through: a burst of other programs' load then touches a part of each size's times, and
the medians stand, where otherwise it would take all times of one size."""
PROBE_STEPS = 5
"""Steps of each probe that count, per pass."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `device` is cpu or cuda; `threads` are those that each CPU rank computes with; `transport` (gloo
    or shm) is what CPU ranks send with. The step `issue` shows the host's time per op, the `probes` (CPUs only) what
    kernels take in steps."""

    device: str
    ranks: int
    threads: int = 1
    pin: bool = False
    quick: bool = False
    timeout_s: float = 120.0
    transport: str = "gloo"
    issue: Probe | None = None
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True, slots=True)
class _Result:
    kernels: list[KernelSample]
    transfers: list[transfers.RankTimes]
    host: HostSample
    facts: Facts
    own_core_s: float
    steps: list[KernelSample]


def measure(plan: Plan, say: Say) -> Measurements:
    """All measurements on `plan.ranks` processes. InputError if one fails or dies."""
    own, busy, start = time.process_time(), host.busy_core_s(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        results: list[_Result] = run_ranks(
            rank_job, (plan, str(rendezvous)), plan.ranks, plan.timeout_s, say, pin=plan.pin
        )
    own_core_s = time.process_time() - own + sum(result.own_core_s for result in results)
    foreign = None
    if busy is not None:
        cores, took_s = len(host_cores()), time.monotonic() - start
        foreign = round(max(0.0, (host.busy_core_s() or busy) - busy - own_core_s) / (took_s * cores), 3)
    facts = dict(results[0].facts) | {"quick": plan.quick, "foreign_load": foreign}
    return Measurements(
        plan.device, plan.ranks, merged([result.kernels for result in results]),
        tuple(transfers.combined([result.transfers for result in results], shared_clock=plan.device == "cpu",
                                 cores=len(host_cores()))),
        _merged_hosts([result.host for result in results]), facts, merged([result.steps for result in results]),
    )  # fmt: skip


def check_device(device: str, ranks: int) -> None:
    """InputError where there is no CUDA device for every rank."""
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; expected one, or --device cpu")
    if ranks > torch.cuda.device_count():
        raise InputError(
            f"--nproc {ranks}: torch finds {torch.cuda.device_count()} CUDA devices; expected a rank for each at most"
        )


def rank_job(rank: Rank, argument: tuple[Plan, str]) -> _Result:
    """One rank: kernels while all cores are busy, then the host, then transfers."""
    plan, rendezvous = argument
    device = _prepare(plan, rank, rendezvous)
    say = rank.say if rank.rank == 0 else _nothing
    reserved = host.reserved_bytes(device)
    # More ranks than cores would time each other's turns: the simulator shares the cores by itself.
    passes = 1 if plan.quick else PASSES
    computes = device.type == "cuda" or rank.rank < rank.cores
    steps: list[KernelSample] = []
    communication: list[int] = []
    probed: list[ProbeTimes] = []
    measured: list[KernelSample] = []
    issue: list[int] = []
    if computes:
        cases = kernels.cuda_cases(plan.quick) if device.type == "cuda" else kernels.cpu_cases(plan.quick)
        cases = [kernels.tiny_case(), *cases]
        budget_s = 0.06 if plan.quick else (0.6 if device.type == "cuda" else 0.25) / passes
        measured = list(merged([kernels.measure(cases, device, budget_s, rank.wait, say) for _ in range(passes)]))
        issue = issue_times(plan.issue, device, 8 if plan.quick else 30) if plan.issue else [0]
        probed = _probed(plan, rank, say)
        steps, communication = gathered(probed)
    else:
        for _ in range(passes * (1 + len(kernels.cpu_cases(plan.quick))) + _waits(plan, rank.rank)):
            rank.wait()
    rank.wait()
    moved: list[transfers.RankTimes] = []
    if plan.ranks > 1:
        with tempfile.TemporaryDirectory() as folder:
            times_of = _transfer_times(plan, rank, device, Path(folder))
            found = [transfers.measure(times_of, plan.ranks, plan.quick, say) for _ in range(passes)]
        moved = transfers.joined(found)
    alone, beside = host.overlap_times(device, plan.ranks, 8 if plan.quick else 30)
    sample = HostSample(
        tuple(issue), host.memory_bytes(device, plan.ranks), reserved, host.compute_units(device), tuple(alone),
        tuple(beside), tuple(communication),
    )  # fmt: skip
    facts = dict(host.facts(device, plan.pin)) | {"pace_ns": usual_ns([step.pace_ns for step in probed])}
    if device.type == "cpu" and plan.ranks > 1:
        facts["backend"] = plan.transport
    rank.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    # All of the process: torch was imported before this function.
    return _Result(measured, moved, sample, facts, time.process_time(), steps)


def _transfer_times(plan: Plan, rank: Rank, device: torch.device, folder: Path) -> transfers.Measure:
    """What times transfers: on CPUs the executor's own transport and threads."""
    if device.type == "cuda":
        return transfers.DeviceTimes(device)
    schedule = transfers.transfer_schedule(plan.ranks, plan.quick)
    transport: Transport
    if plan.transport == "gloo":
        transport = make_groups(schedule, rank.rank, "gloo", plan.timeout_s)
        calm_gloo_threads()
    else:
        transport = SharedMemoryTransport(schedule, rank.rank, make_control(plan.timeout_s), plan.timeout_s)
    return transfers.LaneTimes(transport, schedule, rank.rank, folder, rank.wait)


def _probed(plan: Plan, rank: Rank, say: Say) -> list[ProbeTimes]:
    """The kernels of training steps, several times over, so that a burst of other load touches one turn."""
    found = []
    for turn in range(_turns(plan)):
        for i, probe in enumerate(plan.probes):
            say(f"training steps, pass {turn + 1}: {i + 1} of {len(plan.probes)} ({probe.schedule.name})")
            found += run_probe(probe, rank.rank, PROBE_STEPS, rank.wait)
    return found


def _turns(plan: Plan) -> int:
    return 1 if plan.quick else 4


def _waits(plan: Plan, rank: int) -> int:
    """How often a rank waits for the others in `_probed`."""
    return _turns(plan) * sum(waits(probe, rank, PROBE_STEPS) for probe in plan.probes)


def merged(ranks: Sequence[Sequence[KernelSample]]) -> tuple[KernelSample, ...]:
    """One sample per kernel and size, with the times of all ranks that measured it."""
    times: dict[tuple[str, str, Dims], list[int]] = {}
    for sample in (sample for samples in ranks for sample in samples):
        times.setdefault((sample.kernel, sample.dtype, sample.dims), []).extend(sample.times_ns)
    return tuple(KernelSample(*key, tuple(all_times)) for key, all_times in times.items())


def _merged_hosts(hosts: Sequence[HostSample]) -> HostSample:
    first = hosts[0]
    return HostSample(
        tuple(t for h in hosts for t in h.issue_ns), first.memory_bytes, max(h.reserved_bytes for h in hosts),
        first.compute_units, tuple(t for h in hosts for t in h.alone_ns), tuple(t for h in hosts for t in h.beside_ns),
        tuple(t for h in hosts for t in h.communication_ns),
    )  # fmt: skip


def _prepare(plan: Plan, rank: Rank, rendezvous: str) -> torch.device:
    """Threads, memory, device and process group, as the executor's workers have them."""
    keep_freed_memory()
    sharpen_timers()
    torch.manual_seed(rank.rank)
    torch.set_num_threads(plan.threads)
    device = torch.device("cuda", rank.rank) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    if plan.ranks > 1:
        _on_loopback()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{rendezvous}", rank=rank.rank,
            world_size=plan.ranks, timeout=datetime.timedelta(seconds=plan.timeout_s),
        )  # fmt: skip
        calm_gloo_threads()
    return device


def _on_loopback() -> None:
    """gloo otherwise looks for an interface by the host's name, which need not resolve."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _nothing(_: str) -> None:
    return None
