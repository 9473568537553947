"""`python -m rtp_sim.executor RUN_DIRECTORY`: the worker of one rank, started by `rtp-sim run` or by torchrun."""

from __future__ import annotations

import sys

from rtp_sim.executor.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
