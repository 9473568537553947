"""`Memory`: a stretch of memory that all ranks of one host have mapped, and words in it on which they wait.

On Linux it is an anonymous file (memfd) that the other ranks open through /proc: it has no name, is not bound by the
size of /dev/shm, and is gone with the last process, however that ends. Elsewhere it is a temporary file, unlinked as
soon as everybody has opened it. A rank waits for a word in the kernel (futex): it uses no core meanwhile and is awake
some 10 us after the word has changed. Where there is no futex it looks every 50 us.

A word is written by one rank only, after what it announces: processors that keep the order of stores (x86) need no
more than that, elsewhere the system call that wakes the others comes in between.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.executor.clocks import machine_id, now_ns

LINE_BYTES = 64
"""What different ranks write lies on cache lines of their own."""
_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1
_LOOK_S = 0.5
"""How often a waiting rank looks whether its partner is still alive."""
_POLL_S = 5e-5


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Memory:
    """`size_bytes` of memory shared by `ranks` ranks, all of which must make it together, zero at first.

    `share` brings a text from rank 0 to everybody: rank 0 gives it, the others give "". `map` is all of the memory;
    `words` and `stamps` the same as 32-bit and 64-bit numbers. The first lines belong to this class. RuntimeError from
    `wait` and `barrier` if a partner is gone or too late.
    """

    def __init__(
        self, size_bytes: int, rank: int, ranks: int, timeout_s: float, share: Callable[[str], str]
    ) -> None:  # fmt: skip
        self.rank, self.ranks, self.timeout_s, self._barriers = rank, ranks, timeout_s, 0
        file = _create(first_free(ranks) + size_bytes) if rank == 0 else None
        path, _, machine = share(f"{file[1]}\n{machine_id()}" if file is not None else "").partition("\n")
        if machine != machine_id():
            raise InputError(f"rank {rank} shares no memory with rank 0: it runs on another host; expected gloo there")
        handle = file[0] if file is not None else os.open(path, os.O_RDWR)
        self.map = mmap.mmap(handle, first_free(ranks) + size_bytes)
        self.words = memoryview(self.map).cast("i")
        self.stamps = memoryview(self.map).cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.words[_line(rank)] = os.getpid()
        self.barrier()
        os.close(handle)
        if file is not None and not path.startswith("/proc/"):
            os.unlink(path)

    def barrier(self) -> None:
        """Until all ranks are here."""
        self._barriers += 1
        self.announce(_line(self.rank) + 1, self._barriers)
        for other in range(self.ranks):
            self.wait(_line(other) + 1, self._barriers, other)

    def note(self, number: int) -> None:
        """Leaves a number that the others read after the next barrier."""
        self.stamps[_line(self.rank) // 2 + 1] = number

    def noted(self, rank: int) -> int:
        """The number that the rank has left."""
        return self.stamps[_line(rank) // 2 + 1]

    def announce(self, word: int, value: int) -> None:
        """Sets a word of this rank's and wakes whoever waits for it."""
        self.words[word] = value
        _futex(self._address + 4 * word, _WAKE, _EVERYBODY, None)

    def wait(self, word: int, least: int, rank: int) -> None:
        """Until the word, which `rank` writes, is at least `least`."""
        words = self.words
        if words[word] >= least:
            return
        start_ns = now_ns()
        while (value := words[word]) < least:
            _futex(self._address + 4 * word, _WAIT, value, _LOOK_S)
            if words[word] >= least:
                return
            waited_s = (now_ns() - start_ns) / 1e9
            # A process that has not yet been here has left no id.
            if waited_s >= _LOOK_S and self.words[_line(rank)] and not self._lives(rank):
                raise RuntimeError(f"rank {rank} is gone: its process has ended")
            if waited_s > self.timeout_s:
                raise RuntimeError(f"rank {rank} did not come within {self.timeout_s:g} s")

    def _lives(self, rank: int) -> bool:
        """Whether the rank's process is there; a zombie is not."""
        try:
            stat = Path(f"/proc/{self.words[_line(rank)]}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return not Path("/proc/self/stat").exists()
        return stat.rpartition(")")[2].split()[0] not in "ZX"


def first_free(ranks: int) -> int:
    """Where the memory of others than this class begins: after a line for each rank."""
    return LINE_BYTES * ranks


def _line(rank: int) -> int:
    """The first word of a rank: its process id, then its barriers, then (64 bits) its note."""
    return rank * LINE_BYTES // 4


def aligned(size_bytes: int) -> int:
    """The size up to whole cache lines."""
    return -(-size_bytes // LINE_BYTES) * LINE_BYTES


def _create(size_bytes: int) -> tuple[int, str]:
    """A file of zeros, open, and the path by which the other processes of this user open it."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").exists():
        handle = os.memfd_create("rtp-sim", os.MFD_CLOEXEC)
        path = f"/proc/{os.getpid()}/fd/{handle}"
    else:
        handle, path = tempfile.mkstemp(prefix="rtp-sim-")
    os.ftruncate(handle, size_bytes)
    return handle, path


def _kernel() -> ctypes.CDLL | None:
    if sys.platform == "linux" and platform.machine() in _FUTEX_CALL and sys.maxsize > 2**32:
        return ctypes.CDLL(None)
    return None


_LIBC, _NUMBER = _kernel(), _FUTEX_CALL.get(platform.machine(), 0)


def _futex(address: int, operation: int, value: int, timeout_s: float | None) -> None:
    """Wakes those who wait on the word at `address`, or waits while it has this value; Python's lock is free
    meanwhile."""
    if _LIBC is None:
        if operation == _WAIT:
            time.sleep(_POLL_S)
        return
    limit = None if timeout_s is None else ctypes.byref(_Timespec(int(timeout_s), int(timeout_s % 1 * 1e9)))
    _LIBC.syscall(_NUMBER, ctypes.c_void_p(address), operation, value, limit, None, 0)
