"""One training in many layouts: 12 sequences per step, whoever works on them, so that all are one dense training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from strategy_helpers import INNER, build, gpt2_tiny

from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.dense import DenseResult, train_dense
from rtp_sim.executor.parameters import initial_parameters, parameter_name
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule

SEQUENCES = 12
EXACT = 1e-10


@dataclass(frozen=True)
class Layout:
    """A strategy over `n` ranks of its axis, times `dp`."""

    strategy: str
    n: int = 1
    dp: int = 1
    dims: tuple[int, ...] = ()
    micros: int = 1
    options: tuple[tuple[str, object], ...] = ()
    precision: str = "fp32"
    optimizer: str = "adamw"
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        """For directories and messages."""
        words = [self.strategy, *(str(v) for _, v in self.options), *(str(d) for d in self.dims), self.precision]
        return "-".join([*words, self.optimizer, str(self.n), str(self.dp), str(self.micros)])

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.n * self.dp

    @property
    def replicas(self) -> int:
        """Ranks, or groups of them, with data of their own."""
        return self.dp if self.strategy.startswith("tp") else self.ranks

    @property
    def training(self) -> TrainingSpec:
        """As many sequences per micro-batch as make 12 in all."""
        each = SEQUENCES // (self.replicas * self.micros)
        assert each * self.replicas * self.micros == SEQUENCES
        words = {"num_microbatches": self.micros, "precision": self.precision, "optimizer": self.optimizer}
        return TrainingSpec(each, 8, **(words | dict(self.changes)))  # type: ignore[arg-type]

    def schedule(self, network: Network | None = None) -> Schedule:
        """Its schedule, of gpt2_tiny unless given another network."""
        inner = self.strategy in INNER
        return build(self.strategy, network or gpt2_tiny(), self.n if inner else self.ranks, self.training,
                     dp=self.dp if inner else 1, dims=self.dims, **dict(self.options))  # fmt: skip

    def run(self, path: Path, network: Network | None = None, **request: object) -> RunDirectory:
        """A run directory of two steps in double precision, unless `request` says otherwise."""
        run = RunDirectory(path)
        words: dict[str, object] = {"steps": 2, "warmup": 0, "float_dtype": "fp64"} | request
        words = {key: str(value) if isinstance(value, Path) else value for key, value in words.items()}
        run.prepare(self.schedule(network), RunRequest(network or gpt2_tiny(), self.training, **words))  # type: ignore[arg-type]
        return run

    def batches(self, network: Network, step: int) -> list[list[dict[str, torch.Tensor]]]:
        """Per replica its micro-batches of a step."""
        spec = self.training
        return [random_batch(network, spec.micro_batch, self.micros, r, step) for r in range(self.replicas)]


ONE_UNIT = (("fsdp_unit", "model"),)
SMALL_CHUNKS = (("rtp_chunk_bytes", 12_000),)
SMALL_BUCKETS = (("ddp_first_bucket_bytes", 5000), ("ddp_bucket_bytes", 40_000))
ZERO1, ZERO2 = (("dp_sync", "zero1"),), (("dp_sync", "zero2"),)


def layouts(ranks: int) -> list[Layout]:
    """The layouts over that many ranks."""
    if ranks == 1:
        return [Layout("single", micros=3)]
    found = [Layout(s, ranks) for s in ("ddp", "zero1", "fsdp", "tp", "tp-sp", "rtp")]
    found += [
        Layout("zero2", ranks, micros=12 // ranks // 2 if ranks != 4 else 1, options=SMALL_BUCKETS),
        Layout("fsdp", ranks, options=ONE_UNIT),
        Layout("rtp-inplace", ranks, options=SMALL_CHUNKS),
    ]
    if ranks == 4:
        found += [
            Layout("rtp", 4, dims=(2, 2)), Layout("rtp", 2, dp=2), Layout("rtp", 2, dp=2, options=ZERO1),
            Layout("tp", 2, dp=2, options=ZERO2), Layout("tp-sp", 2, dp=2, micros=3, options=ZERO1),
        ]  # fmt: skip
    return found


@cache
def dense(steps: int) -> DenseResult:
    """The training without any of it."""
    network, layout = gpt2_tiny(), Layout("single")
    return train_dense(
        network, initial_parameters(network), [layout.batches(network, s) for s in range(steps)], SEQUENCES, "adamw",
        eps=1e-8,
    )  # fmt: skip


def named(parameters: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Under the names of checkpoints."""
    return {parameter_name(layer, p): t for layer, tensors in parameters.items() for p, t in tensors.items()}


def dense_state(steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and Adam's moments after that many steps, the moments by their definition from the gradients."""
    first = {name: torch.zeros_like(t) for name, t in named(dense(steps).parameters).items()}
    second = {name: torch.zeros_like(t) for name, t in first.items()}
    for step in range(1, steps + 1):
        for name, g in named(dense(step).gradients).items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
    return {"model": named(dense(steps).parameters), "exp_avg": first, "exp_avg_sq": second}


# From 2^21 on, fp16 gradients overflow until the scale has come down; clipping is always at work.
SCALED = (("loss_scale", f"dynamic:{2**21}"), ("clip_norm", 0.05))


def as_bf16(layout: Layout) -> Layout:
    """The same with bf16 weights and fp32 master weights."""
    return replace(layout, precision="bf16")
