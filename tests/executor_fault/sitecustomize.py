"""Put on PYTHONPATH by the tests of faults: makes the worker of one rank raise, or stand still, in a chosen op.

FAULT is "raise:rank:step:op" or "hang:rank:step:op".
"""

from __future__ import annotations

import os
import sys
import time

fault, rank, step, op_index = os.environ.get("FAULT", "none:-1:0:0").split(":")

if os.environ.get("RANK") == rank and "rtp_sim.executor" in " ".join(sys.orig_argv):
    from rtp_sim.executor.machine import Machine

    run = Machine.run

    def faulty(self, op):
        if self.step == int(step) + 1 and op.index == int(op_index):
            if fault == "raise":
                raise ArithmeticError("a fault for the test")
            time.sleep(1000)
        run(self, op)

    Machine.run = faulty
