"""What a worker process finds and sets up around it: torchrun's variables, its device, memory, cores and parent.

Nothing here imports torch at the top: some of it must happen before torch starts its threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.executor.launcher import LAUNCHER_PID
from rtp_sim.executor.request import RunRequest

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 << 20
"""The most that glibc takes."""


@dataclass(frozen=True, slots=True)
class Environment:
    """This worker among the others, as torchrun says it. `watched` if our own launcher watches it."""

    rank: int
    world_size: int
    local_rank: int
    watched: bool


def read_environment() -> Environment:
    """The worker's place. InputError naming the variable that is missing or no number."""
    values = {}
    for name in _VARIABLES:
        if name not in os.environ:
            raise InputError(
                f"the variable {name} is not set; start workers with rtp-sim run, or with "
                "torchrun --nproc-per-node N -m rtp_sim.executor RUN_DIRECTORY"
            )
        if name != "MASTER_ADDR" and not os.environ[name].isdigit():
            raise InputError(f"the variable {name} is {os.environ[name]!r}; expected a whole number")
        values[name] = os.environ[name]
    watched = LAUNCHER_PID in os.environ
    return Environment(int(values["RANK"]), int(values["WORLD_SIZE"]), int(values["LOCAL_RANK"]), watched)


def die_with_parent() -> None:
    """Makes the system end this process when its parent ends; where it cannot, a thread looks every second."""
    expected = os.environ.get(LAUNCHER_PID)
    parent = int(expected) if expected else os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        # It ended before we had asked.
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next buffer: pages handed back come again as page faults in the step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def pin_to_core(local_rank: int) -> None:
    """Keeps this process, and the threads it starts from now on, on one of the cores it may use."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[local_rank % len(cores)]})


def calm_gloo_threads() -> None:
    """Puts gloo's event loops into the batch class: they spin, and as equals they keep the computing thread waiting for
    whole time slices where ranks outnumber cores."""
    if not hasattr(os, "SCHED_BATCH") or not os.path.isdir("/proc/self/task"):
        return
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm", encoding="ascii", errors="replace") as file:
                if file.read().startswith("gloo"):
                    os.sched_setscheduler(int(task), os.SCHED_BATCH, os.sched_param(0))
        except OSError:
            # The thread has ended, or the system does not allow it: it is only slower then.
            continue


def sharpen_timers() -> None:
    """Has the system end sleeps of this thread, and of those it starts, when they are due: it otherwise takes up to
    50 us more, so as to wake up less often."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def require_device(request: RunRequest, environment: Environment) -> None:
    """InputError if torch does not have the device or the backend, or fewer GPUs than ranks here."""
    import torch
    import torch.distributed as dist

    if request.device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds no usable GPU on this machine; expected one per rank, or cpu")
        if environment.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--device cuda: local rank {environment.local_rank} needs a GPU of its own, but torch finds "
                f"{torch.cuda.device_count()}; expected at most as many ranks"
            )
    if not dist.is_available() or not dist.is_backend_available(request.backend):
        raise InputError(f"this torch {torch.__version__} has no backend {request.backend}; expected one that has")
