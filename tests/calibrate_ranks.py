"""What the ranks of the process tests do; apart from the tests, so that they start without their libraries."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from rtp_sim.executor.calibrate.launch import Rank


def job(rank: Rank, what: str) -> int:
    """The last one misbehaves, the others wait for it."""
    if rank.rank == rank.ranks - 1:
        if what == "die":
            os._exit(7)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fail":
            raise RuntimeError("no luck")
        if what == "hang":
            time.sleep(60)
        if what.startswith("/"):
            Path(what).write_text(str(os.getpid()))
            time.sleep(60)
    rank.say(f"rank {rank.rank} waits")
    rank.wait()
    return 10 * rank.rank
