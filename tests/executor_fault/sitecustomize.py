"""Put on PYTHONPATH by the tests of faults: makes the worker of one rank raise, or stand still, in a chosen op, or
killed while it writes its part of a checkpoint.

FAULT is "raise:rank:step:op", "hang:rank:step:op" or "kill-in-save:rank:step:" with the steps done before.
"""

from __future__ import annotations

import os
import signal
import sys
import time

fault, rank, step, op_index = os.environ.get("FAULT", "none:-1:0:0").split(":")

mine = os.environ.get("RANK") == rank
if mine and fault == "kill-in-save" and "rtp_sim.executor" in " ".join(sys.orig_argv):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write_data = FileSystemWriter.write_data

    def killed(self, plan, planner):
        result = write_data(self, plan, planner)
        if f"step-{int(step):08d}" in str(self.path):
            # Its file is there; the metadata are not.
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    FileSystemWriter.write_data = killed

elif mine and "rtp_sim.executor" in " ".join(sys.orig_argv):
    from rtp_sim.executor.machine import Machine

    run = Machine.run

    def faulty(self, op):
        if self.step == int(step) + 1 and op.index == int(op_index):
            if fault == "raise":
                raise ArithmeticError("a fault for the test")
            time.sleep(1000)
        run(self, op)

    Machine.run = faulty
