"""rtp-sim: simulate distributed training schedules, and compare rotation with all-gather and all-reduce schemes."""

__version__ = "0.1.0"
