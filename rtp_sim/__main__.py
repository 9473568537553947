"""`python -m rtp_sim` is the `rtp-sim` command."""

import sys

from rtp_sim.cli import main

sys.exit(main())
