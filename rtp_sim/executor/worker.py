"""The worker of one rank: joins the others, makes the rank's machine, runs the steps, leaves times and results.

A worker that fails says why in its directory and ends at once, without waiting for anybody: exit code 2 for a set-up
that cannot work, 1 for everything else.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rtp_sim.errors import InputError
from rtp_sim.executor import sleepers
from rtp_sim.executor.environment import (
    Environment,
    calm_gloo_threads,
    die_with_parent,
    keep_freed_memory,
    pin_to_core,
    read_environment,
    require_device,
    sharpen_timers,
)
from rtp_sim.executor.launcher import START_UP_S
from rtp_sim.executor.pace import PaceWatch
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import TRACE, Record, RunDirectory
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.ir import Compute, Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rtp_sim.executor.clocks import Clock
    from rtp_sim.executor.distributed import Interpreter, StepTimes
    from rtp_sim.executor.machine import Batch, Machine
    from rtp_sim.executor.parameters import Parameters
    from rtp_sim.executor.resume import Resume
    from rtp_sim.executor.transport import Transport

LAUNCHER_GRACE_S = 10.0
"""How much longer than our launcher torch waits: the launcher knows better who is to blame."""


def main(arguments: Sequence[str]) -> int:
    """Entry point of a worker; returns the exit code, or ends the process where it fails after the start."""
    if len(arguments) != 1:
        print("usage: python -m rtp_sim.executor RUN_DIRECTORY (under rtp-sim run or torchrun)", file=sys.stderr)
        return 2
    run = RunDirectory(Path(arguments[0]))
    try:
        environment = read_environment()
        if environment.watched:
            die_with_parent()
        schedule, request = run.load()
        _require_world(schedule, request, environment)
        if not environment.watched:
            # Our launcher has checked it; under torchrun the file may have been edited since.
            check(schedule)
        if request.only_rank is not None:
            environment = replace(environment, rank=request.only_rank)
    except InputError as error:
        # Every rank finds the same; once is enough.
        if os.environ.get("RANK", "0") == "0":
            print(f"rtp-sim: {error}", file=sys.stderr)
        return 2
    run.clear_rank(environment.rank)
    progress = Progress(run.of_rank(environment.rank, "progress"))
    try:
        if request.stated:
            sleepers.work(run, schedule, request, environment, progress)
        else:
            worker_of(request)(run, schedule, request, environment, progress).work()
    except BaseException as error:
        _fail(run, environment, error)
    # Not even torch's own threads may keep a finished worker.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def worker_of(request: RunRequest) -> type[Worker]:
    """The worker that does what is asked for: the schedule, or its twin."""
    if request.twin:
        from rtp_sim.executor.twins.worker import TwinWorker

        return TwinWorker
    return Worker


def _require_world(schedule: Schedule, request: RunRequest, environment: Environment) -> None:
    expected = len(request.ranks(schedule.world_size))
    if environment.world_size != expected:
        if request.only_rank is not None:
            raise InputError(
                f"this run is of rank {request.only_rank} alone, but {environment.world_size} processes were started "
                "(WORLD_SIZE); expected one"
            )
        raise InputError(
            f"the schedule is for {schedule.world_size} ranks, but {environment.world_size} processes were started "
            f"(WORLD_SIZE); expected --nproc-per-node {schedule.world_size}"
        )


def _fail(run: RunDirectory, environment: Environment, error: BaseException) -> None:
    """Says why and ends the process at once: torch would wait for its partners."""
    from rtp_sim.executor.lanes import CommunicationError

    kind = "error"
    if isinstance(error, InputError):
        kind = "set-up"
    elif isinstance(error, CommunicationError):
        kind = "communication"
    message = str(error) if isinstance(error, InputError | CommunicationError) else f"{type(error).__name__}: {error}"
    record = {"rank": environment.rank, "kind": kind, "message": message, "time_ns": time.monotonic_ns()}
    with contextlib.suppress(OSError):
        run.write_rank(environment.rank, "error.json", record)
    if kind != "set-up":
        traceback.print_exception(error)
    elif environment.rank == 0 or not environment.watched:
        print(f"rtp-sim: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2 if kind == "set-up" else 1)


class Worker:
    """One rank's run from joining the others to its results."""

    def __init__(
        self, run: RunDirectory, schedule: Schedule, request: RunRequest, environment: Environment, progress: Progress
    ) -> None:
        self.run, self.schedule, self.request, self.progress = run, schedule, request, progress
        self.environment, self.rank = environment, environment.rank
        self.record: Record = {}

    def work(self) -> None:
        """All of it. Raises what goes wrong."""
        keep_freed_memory()
        if self.request.pin:
            pin_to_core(self.environment.local_rank)
        sharpen_timers()
        require_device(self.request, self.environment)
        self.progress.enter("joining the group")
        control, transport = self._join()
        clock = self._align(control)
        self.progress.enter("preparing")
        machine = self._machine()
        interpreter = self._interpreter(machine, transport)
        self.record = self._description(clock)
        self.record |= {"first_step": machine.step, "saved_steps": self.resume.saved_steps}
        self.run.write_rank(self.rank, "rank.json", self.record)
        self._steps(machine, interpreter, control, clock)
        self.progress.enter("writing results")
        if self.request.save_tensors:
            _save_tensors(machine, self.run.of_rank(self.rank, "tensors.pt"))
        self.run.write_rank(self.rank, "rank.json", self.record)
        self._finish(control)

    # ---- joining

    def _join(self) -> tuple[ProcessGroup, Transport]:
        """The group of all ranks for what they agree on between steps, and what moves the step's data. InputError where
        another program has our port."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(self.request.threads)
        if self.request.device == "cuda":
            torch.cuda.set_device(self.environment.local_rank)
        patience = timedelta(seconds=max(self.request.timeout_s, START_UP_S))
        try:
            dist.init_process_group(self.request.backend, timeout=patience)
        except (RuntimeError, ValueError) as error:
            if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise InputError(f"port in use: the ranks cannot meet at {where}; expected a free port") from None
            raise
        timeout_s = self.request.timeout_s + (LAUNCHER_GRACE_S if self.environment.watched else 0)
        joined = self._transport(timeout_s)
        if self.request.pin:
            calm_gloo_threads()
        return joined

    def _transport(self, timeout_s: float) -> tuple[ProcessGroup, Transport]:
        from rtp_sim.executor.groups import Groups, make_control, make_groups, require_same_streams
        from rtp_sim.executor.shm import SharedMemoryTransport

        request = self.request
        if request.only_rank is not None or request.twin:
            # One rank alone has a stand-in for its partners (alone.py), a twin torch's own communication.
            control = make_control(timeout_s)
            return control, Groups(control, {})
        if request.real_transport == request.backend:
            groups = make_groups(self.schedule, self.rank, request.backend, timeout_s)
            return groups.control, groups
        require_same_streams(self.schedule)
        control, itemsize = make_control(timeout_s), 8 if request.float_dtype == "fp64" else None
        transport = SharedMemoryTransport(self.schedule, self.rank, control, timeout_s, request.link(), itemsize)
        return control, transport

    def _align(self, control: ProcessGroup) -> Clock:
        from rtp_sim.executor.clocks import align

        return align(control)

    # ---- preparing

    def _machine(self) -> Machine:
        """The rank's machine, with the state to start from."""
        import torch

        from rtp_sim.executor.machine import Machine

        request = self.request
        device = "cpu" if request.device == "cpu" else f"cuda:{self.environment.local_rank}"
        machine = Machine(
            self.schedule, self.rank, request.network, request.training, self.resume.parameters(), device,
            torch.float64 if request.float_dtype == "fp64" else None, seed=self.resume.seed,
            keep_gradients=request.save_tensors,
        )  # fmt: skip
        if request.load:
            self.progress.enter("loading")
        self.resume.begin(machine)
        return machine

    @cached_property
    def resume(self) -> Resume:
        """Where the training begins and when it is saved."""
        from rtp_sim.executor.resume import Resume

        return Resume(self.request)

    def _interpreter(self, machine: Machine, transport: Transport) -> Interpreter:
        if self.request.only_rank is not None:
            from rtp_sim.executor.alone import alone

            return alone(self.schedule, self.rank, machine, self.progress, self.request.communication)
        if self.request.device == "cuda":
            from rtp_sim.executor.streams import StreamInterpreter

            return StreamInterpreter(self.schedule, self.rank, machine, transport, self.progress)
        from rtp_sim.executor.distributed import HostInterpreter

        return HostInterpreter(self.schedule, self.rank, machine, transport, self.progress)

    def _batch(self, replica: int, step: int) -> Batch:
        """The data of a step, counted from the training's first."""
        from rtp_sim.executor.batches import random_batch

        request = self.request
        micros = int(self.schedule.meta.get("num_microbatches") or request.training.num_microbatches)
        return random_batch(request.network, request.training.micro_batch, micros, replica, step, self.resume.seed)

    def _description(self, clock: Clock) -> Record:
        import torch

        gpu = torch.cuda.get_device_name() if self.request.device == "cuda" else None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return {
            "rank": self.rank, "host": platform.node(), "pid": os.getpid(), "clock_offset_ns": clock.offset_ns,
            "clock_error_ns": clock.error_ns, "torch": torch.__version__, "gpu": gpu, "usable_cores": cores,
            "threads": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        }  # fmt: skip

    # ---- steps

    def _steps(self, machine: Machine, interpreter: Interpreter, control: ProcessGroup, clock: Clock) -> None:
        """All steps, saved where that is asked for; notes what the check found (rank 0 of a run with a check)."""
        from rtp_sim.executor.clocks import start_together
        from rtp_sim.executor.machine import replica_of

        replica, rows = replica_of(self.schedule, self.rank), _loss_parts(self.schedule)
        unchecked, watch = self.request.check, PaceWatch()
        if self.request.device == "cpu":
            interpreter.around = watch
        profiled_step = self.request.warmup + self.request.steps
        for step in range(profiled_step + self.request.profile_trace):
            self.progress.enter("between steps", step)
            # A step whose update was left out, on all ranks, leaves the check to the next.
            checked = unchecked
            machine.keep_gradients = checked or self.request.save_tensors
            machine.start_step(self._batch(replica, machine.step))
            scale = machine.watch.scale
            start_peak(machine)
            if step == profiled_step:
                self._profile(step, machine, interpreter, lambda: start_together(control, clock))
                continue
            watch.begin()
            start_together(control, clock)
            self.progress.enter("step", step)
            times = interpreter.run_step()
            pace = {"pace_ns": watch.end() if self.request.device == "cpu" else 0}
            # What a rank computes from made-up data is no loss.
            losses = machine.losses() if self.request.only_rank is None else []
            loss = sum(losses) * rows / len(losses) if losses else None
            self.run.append_step(self.rank, self._step_record(step, times, loss, scale, machine) | pace, times.ops)
            if checked:
                self.progress.enter("checking")
                self.record["check"] = self._check(machine, loss, control)
                machine.gradients = []
                unchecked = machine.watch.skipped
            if self.resume.due(machine, last=step == profiled_step - 1):
                self.progress.enter("saving", step)
                self.resume.save(machine, control)
                self.run.write_rank(self.rank, "rank.json", self.record)

    def _profile(self, step: int, machine: Machine, interpreter: Interpreter, gather: Callable[[], None]) -> None:
        """One more step, under the profiler; its trace and its times are left beside those of the others."""
        from rtp_sim.executor.profiling import StepProfile, op_range

        profile = StepProfile(self.request.device)
        profile.begin()
        scale = machine.watch.scale
        gather()
        self.progress.enter("step", step)
        interpreter.around = op_range
        with profile.step(step):
            times = interpreter.run_step()
        self.run.append_step(self.rank, self._step_record(step, times, None, scale, machine), times.ops)
        self.progress.enter("writing results")
        profile.finish(self.run.of_rank(self.rank, TRACE))

    def _step_record(self, step: int, times: StepTimes, loss: float | None, scale: float, machine: Machine) -> Record:
        # A rank of a pipeline stage without the head has no loss, which is not the same as a loss that is no number.
        own = {} if loss is None else {"loss": loss if math.isfinite(loss) else None}
        norm, scaler = machine.watch.norm, machine.watch.scaler
        return {
            "step": step,
            "warmup": step < self.request.warmup,
            "start_ns": times.start_ns,
            "end_ns": times.end_ns,
            **own,
            "grad_norm": norm if norm is None or math.isfinite(norm) else None,
            "loss_scale": None if scaler is None else scale,
            "skipped": machine.watch.skipped,
            "bytes_sent": times.sent.size_bytes,
            "messages": times.sent.messages,
            "peak_memory_bytes": machine.storage.peak_bytes,
            "memory_by_category": machine.storage.peak_by_category,
            "allocator_peak_bytes": allocator_peak_bytes(machine),
        }

    def _check(self, machine: Machine, loss: float | None, control: ProcessGroup) -> Record | None:
        """Compares loss and gradients of the step just done, the first update, with dense training, on rank 0."""
        from rtp_sim.executor.compare import compare_with_dense
        from rtp_sim.executor.machine import replicas

        # The step has been counted already; none before it has changed the weights.
        batches = [self._batch(replica, machine.step - 1) for replica in range(replicas(self.schedule))]

        def start() -> Parameters:
            return self.resume.full_parameters(machine.network)

        return compare_with_dense(machine, self.request, start, loss, batches, control)

    def _finish(self, control: ProcessGroup) -> None:
        """Waits for the others, then under torchrun rank 0 makes the results that our launcher would make."""
        import torch.distributed as dist

        dist.barrier(group=control)
        if self.rank == self.request.ranks(self.schedule.world_size)[0] and not self.environment.watched:
            from rtp_sim.executor.collect import collect

            collect(self.run, self.schedule, self.request)
            print(f"rtp-sim: wrote {self.run.result} and {self.run.measured}", file=sys.stderr)
        dist.barrier(group=control)
        self.progress.enter("done")


def start_peak(machine: Machine) -> None:
    """On a GPU the allocator starts counting its peak again."""
    if machine.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(machine.device)


def allocator_peak_bytes(machine: Machine) -> int | None:
    """The most that torch's allocator held on the GPU since then, kernels' workspaces and all; None on a CPU."""
    if machine.device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(machine.device))


def _loss_parts(schedule: Schedule) -> int:
    """By what a rank's loss must be multiplied so that the mean over the ranks is the training loss: where tokens are
    split over a tensor-parallel group each rank has its part of a mean, and the parts add up."""
    for op in (op for program in schedule.programs for op in program.ops):
        action = op.action
        if isinstance(action, Compute) and action.kernel == "cross_entropy" and action.site is not None:
            return schedule.groups["tp"].size if action.site.split == "rows" else 1
    return 1


def _save_tensors(machine: Machine, path: Path) -> None:
    """The rank's weights, and the gradients of its last step, as shares that `parameters.assembled` puts together."""
    import torch

    torch.save({"weights": machine.weights(), "gradients": machine.gradients}, path)
