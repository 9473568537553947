"""The strategies by name. A strategy is one function that writes the program of a rank into a `Step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rtp_sim.schedule.step import Step
from rtp_sim.schedule.strategies.fsdp import fsdp, hsdp
from rtp_sim.schedule.strategies.pipeline import gpipe, interleaved, one_f_one_b, zb_h1, zb_h2, zb_v
from rtp_sim.schedule.strategies.replicated import ddp, single, zero1, zero2
from rtp_sim.schedule.strategies.rotation import rtp, rtp_inplace
from rtp_sim.schedule.strategies.tensor_parallel import tp, tp_sp

STRATEGIES: Mapping[str, Callable[[Step], None]] = {
    "single": single,
    "ddp": ddp,
    "zero1": zero1,
    "zero2": zero2,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp": tp,
    "tp-sp": tp_sp,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-1p": zb_h1,
    "zb-2p": zb_h2,
    "zb-v": zb_v,
    "rtp": rtp,
    "rtp-inplace": rtp_inplace,
}
