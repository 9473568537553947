"""Twins: the same training step by torch's own means, to set the executor beside. Imports no torch."""

from __future__ import annotations

from rtp_sim.errors import InputError
from rtp_sim.executor.request import RunRequest
from rtp_sim.model.layers import Experts, Router
from rtp_sim.schedule.ir import Schedule

TWINS = {
    "ddp": "DistributedDataParallel",
    "fsdp": "fully_shard per block",
    "tp": "DTensor tensor parallelism",
    "tp-sp": "DTensor tensor and sequence parallelism",
}
"""Strategy -> what of torch does the same."""


def require_twin(schedule: Schedule, request: RunRequest) -> None:
    """InputError if torch has nothing that does what the run asks for."""
    if schedule.name not in TWINS:
        raise InputError(f"--twin: torch has no {schedule.name}; expected one of {', '.join(TWINS)}")
    training = request.training
    replicated = schedule.groups.get("dp")
    if schedule.name in ("tp", "tp-sp") and replicated is not None and replicated.size > 1:
        raise InputError(f"--twin: {schedule.name} with {replicated.size} replicas; expected --dp 1")
    if training.precision in ("fp16", "fp16-pure", "bf16-pure"):
        raise InputError(f"--twin: precision {training.precision}; expected fp32, tf32, bf16 or bf16-grad32")
    if training.recompute == "selective":
        raise InputError("--twin: recompute selective; expected none or full")
    for layer in request.network.layers():
        if isinstance(layer.op, Experts | Router):
            raise InputError(f"--twin: {request.network.name} has experts ({layer.name}); expected a dense model")
    if request.stated or request.transport in ("shm", "emulated"):
        raise InputError("--twin communicates by torch's own backends; leave out --stated-times and --transport")
    if request.check or request.save_tensors or request.only_rank is not None:
        raise InputError(
            "--twin runs all ranks and keeps no tensors; leave out --check, --save-tensors and --only-rank"
        )
