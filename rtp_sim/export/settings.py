"""`Settings` of a framework, and what frameworks ask about a plan: its degrees (`Axes`) and its model.

Each exporter is a function of a `Setting` that returns `Settings`, or raises `NotExpressible` with one sentence that
says what the framework lacks. Data, tokenizer and learning rate are no part of a plan and are left out everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rtp_sim.errors import InputError
from rtp_sim.experiment import Setting
from rtp_sim.hardware.spec import Cluster
from rtp_sim.model.presets import find_model
from rtp_sim.model.spec import ModelSpec
from rtp_sim.schedule.pipeline_order import PIPELINES


class NotExpressible(Exception):
    """The framework has no settings for this plan; the message says which part of it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a framework is given: `text` is the file (for Megatron and this program, the command); `notes` say where
    the framework does other than the plan, and what is set in code."""

    target: str
    file_name: str
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Axes:
    """Degrees as frameworks name them. `sharding` is what the `dp` data-parallel ranks do: "none" (one rank), "ddp",
    "zero1", "zero2" or "fsdp"; the shards are shared by `shard` neighbouring ranks of them. `schedule` is the name of
    the pipeline's order, "" without one."""

    sharding: str
    dp: int
    shard: int
    tp: int
    sequence_parallel: bool
    pp: int
    schedule: str

    @property
    def replicas(self) -> int:
        """How many copies of all shards there are."""
        return self.dp // self.shard


def axes(setting: Setting) -> Axes:
    """The degrees of a setting. NotExpressible for rotation, which no framework has."""
    layout, options, strategy = setting.layout, setting.request.options, setting.request.strategy
    if layout.axis == "rtp":
        raise NotExpressible("no training framework has rotated tensor parallelism (RTP): run it with rtp-sim run")
    if options.eval_passes:
        raise NotExpressible("the plan is a forward pass alone, not a training step")
    if layout.axis == "tp":
        sharding = options.dp_sync if layout.dp > 1 else "none"
        shard = options.zero1_size if sharding == "zero1" and options.zero1_size else layout.dp
        sequence_parallel = strategy == "tp-sp" or (strategy in PIPELINES and options.sequence_parallel)
        schedule = strategy if strategy in PIPELINES else ""
        return Axes(
            sharding, layout.dp, shard, layout.inner, sequence_parallel and layout.inner > 1, layout.pp, schedule
        )
    dp = layout.world_size
    shard = layout.inner if layout.axis == "fsdp" else options.zero1_size or dp
    sharding = {"single": "none", "hsdp": "fsdp"}.get(strategy, strategy)
    return Axes("none" if dp == 1 else sharding, dp, shard if strategy in ("hsdp", "zero1") else dp, 1, False, 1, "")


def model_of(setting: Setting) -> ModelSpec:
    """The architecture as numbers, with the dropout asked for. NotExpressible for a list of layers."""
    try:
        model = find_model(setting.request.model)
    except InputError:
        raise NotExpressible(
            f"{setting.network.name} is a list of layers, and frameworks are given transformers"
        ) from None
    dropout = setting.request.dropout
    return model if dropout is None else replace(model, dropout=dropout)


def global_batch(setting: Setting, degrees: Axes) -> int:
    """Sequences per step of all replicas."""
    return setting.training.micro_batch * setting.training.num_microbatches * degrees.dp


def torchrun(cluster: Cluster) -> list[str]:
    """The start of a command that runs a process per device; HEAD_NODE is host:port of the first of several nodes."""
    words = ["torchrun", "--nproc-per-node", str(cluster.gpus_per_node)]
    if cluster.nodes > 1:
        words += ["--nnodes", str(cluster.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "$HEAD_NODE"]
    return words


HEAD_NODE_NOTE = "on each node, with HEAD_NODE set to host:port of the first"


def require_divides(what: str, size: int, axis: str, degree: int, framework: str) -> None:
    """NotExpressible if `degree` ranks cannot have equal shares: only this program splits unevenly."""
    if size % degree:
        raise NotExpressible(f"{framework} splits {what} evenly only, and {size} do not divide by {axis}={degree}")


def is_llama(model: ModelSpec) -> bool:
    """Whether the blocks are Llama's: RMS norms in front, gated SiLU MLPs, rotary positions, no biases."""
    return (
        (model.norm, model.norm_placement, model.position) == ("rmsnorm", "pre", "rotary")
        and (model.gated_mlp, model.activation) == (True, "silu")
        and not (model.qkv_bias or model.out_bias or model.mlp_bias or model.lm_head_bias or model.is_moe)
        and model.causal and model.has_head and model.final_norm
    )  # fmt: skip
