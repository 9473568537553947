"""One experiment: a model on a cluster under a strategy, from what a user names to a simulated step and its metrics.

This is the Python interface of the simulator and what the command line calls:

    result = run(prepare(Request(model="gpt2-xl", cluster="dgx-a100-80g", gpus=8, strategy="rtp", micro_batch=4)))
    print(result.metrics.step_time_s, result.metrics.peak_memory_bytes)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rtp_sim.cost.model import ClusterCost
from rtp_sim.cost.piped import piped_groups
from rtp_sim.cost.slow import SlowCost, slow_apart
from rtp_sim.engine.fold import Folds
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import MemoryProfile, memory_profiles
from rtp_sim.errors import InputError
from rtp_sim.hardware.degraded import degraded
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import StepMetrics, critical_rank, step_metrics
from rtp_sim.model.network import Network, transformer_network, with_dropout
from rtp_sim.model.presets import find_model
from rtp_sim.model.spec import ModelSpec
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.build import build_schedule, replicas
from rtp_sim.schedule.ir import Compute, Group, Schedule
from rtp_sim.schedule.layout import ORDERS, ParallelLayout, make_groups, make_layout
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.strategies import STRATEGIES
from rtp_sim.text import nearest
from rtp_sim.timeline import Timeline

DEFAULT_SEQ_LEN = 1024
ENGINES = ("simpy", "longest-path")
MIN_SLOW = 0.001


@dataclass(frozen=True, slots=True)
class Request:
    """What to simulate. `model` and `cluster` are preset names or paths; `gpus` or `nodes` sizes the cluster.

    `inner` is the degree of the strategy's own axis (rtp or tp), `dp` that of data parallelism, `pp` the stages of a
    pipeline; what is left out follows (layout.make_layout, which also says what `order` is). `micro_batch` counts
    sequences per replica and micro-batch. The step is `global_batch` sequences, or `micro_batches` micro-batches per
    replica, by default one. `seq_len` is 1024 by default, or what the model's learned positions allow if that is less.
    `dropout`, where given, replaces the model's own probability (0 for presets). `slow_gpus` are (rank, factor): its
    kernels take so many times as long. `degraded_links` are (name, fraction of the bandwidth left), as
    hardware/degraded.py has them.
    """

    model: str
    cluster: str
    strategy: str
    gpus: int | None = None
    nodes: int | None = None
    inner: int | None = None
    dp: int | None = None
    pp: int | None = None
    order: str = ORDERS[0]
    micro_batch: int = 1
    seq_len: int | None = None
    global_batch: int | None = None
    micro_batches: int | None = None
    precision: str = "bf16"
    recompute: str = "none"
    optimizer: str = "adamw"
    attention: str = "flash"
    clip_norm: float | None = None
    loss_scale: str = "none"
    dropout: float | None = None
    slow_gpus: tuple[tuple[int, float], ...] = ()
    degraded_links: tuple[tuple[str, float], ...] = ()
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Setting:
    """A request with everything looked up and checked, before any schedule is built."""

    request: Request
    network: Network
    cluster: Cluster
    layout: ParallelLayout
    training: TrainingSpec
    groups: Mapping[str, Group]
    cost: ClusterCost


@dataclass(frozen=True)
class Prepared:
    """A request with everything looked up and checked, ready to simulate."""

    request: Request
    network: Network
    cluster: Cluster
    layout: ParallelLayout
    training: TrainingSpec
    schedule: Schedule
    cost: ClusterCost


@dataclass(frozen=True)
class Result:
    """A simulated step. `memory` holds a profile per represented rank."""

    prepared: Prepared
    timeline: Timeline
    memory: Mapping[int, MemoryProfile]
    metrics: StepMetrics

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know: uneven splits, a rate taken from another dtype."""
        said = str(self.prepared.schedule.meta["notes"] or "")
        rate = self.prepared.cost.rate_note(self.prepared.training.policy.compute_dtype)
        return tuple(note for note in (*said.split("; "), rate) if note)


def usable_memory_bytes(cluster: Cluster) -> int:
    """Device memory less what driver, runtime and communication library keep for themselves."""
    return int(cluster.device.memory_bytes.value - cluster.device.runtime_reserved_bytes.value)


def find_network(
    model: str | ModelSpec, seq_len: int | None = None, attention: str = "flash", dropout: float | None = None
) -> Network:
    """A preset, a Hugging Face config.json, a layer-list file or a spec as a network, with `dropout` in the place of
    its own probability. InputError if it is none of these."""
    if isinstance(model, str) and model.endswith(".json"):
        # Imported here: only files need pydantic, and importing it is a good part of a short run.
        from rtp_sim.model.network_file import is_network_file, read_network

        if is_network_file(Path(model)):
            network = read_network(Path(model))
            return network if dropout is None else with_dropout(network, dropout)
    spec = model if isinstance(model, ModelSpec) else find_model(model)
    spec = spec if dropout is None else replace(spec, dropout=dropout)
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, spec.max_positions) if spec.position == "learned" else DEFAULT_SEQ_LEN
    return transformer_network(spec, seq_len, attention)


def prepare(request: Request, cluster: Cluster | None = None, network: Network | None = None) -> Prepared:
    """Looks up model and cluster (unless given), makes the layout and builds the schedule. Raises InputError."""
    return built(settle(request, cluster, network))


def settle(request: Request, cluster: Cluster | None = None, network: Network | None = None) -> Setting:
    """Looks up model and cluster (unless given) and makes the layout. Raises InputError."""
    if request.strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {request.strategy!r}: {nearest(request.strategy, STRATEGIES)}")
    if cluster is None:
        cluster = load_cluster(request.cluster, request.nodes or 1, request.gpus)
    cluster = degraded(cluster, request.degraded_links)
    if network is None:
        # Evaluation drops nothing.
        dropout = 0.0 if request.options.eval_passes else request.dropout
        network = find_network(request.model, request.seq_len, request.attention, dropout)
    layout = make_layout(
        request.strategy, cluster.world_size, request.inner, request.dp, request.pp, request.order
    )
    training = TrainingSpec(
        micro_batch=request.micro_batch, seq_len=network.seq, precision=request.precision, recompute=request.recompute,
        optimizer=request.optimizer, attention=request.attention, clip_norm=request.clip_norm,
        loss_scale=request.loss_scale, num_microbatches=_microbatches(request, layout),
    )  # fmt: skip
    groups = make_groups(layout, cluster.topology, request.options.rtp_ring, request.options.zero1_size)
    for rank, factor in request.slow_gpus:
        if not (0 <= rank < cluster.world_size and MIN_SLOW <= factor < 1e6):
            raise InputError(
                f"slow GPU {rank} by a factor of {factor:g}: expected a rank from 0 to {cluster.world_size - 1} and a "
                f"factor of at least {MIN_SLOW}, for example 3=1.3"
            )
    made = SlowCost if request.slow_gpus else ClusterCost
    cost = made(cluster, piped=piped_groups(groups, cluster.topology))
    return Setting(request, network, cluster, layout, training, groups, cost)


def built(s: Setting) -> Prepared:
    """The setting with its schedule. InputError if the network cannot be split that way."""
    schedule = build_schedule(s.request.strategy, s.network, s.training, s.layout, s.groups, s.request.options)
    slow = {rank: round(factor * 1000) for rank, factor in s.request.slow_gpus}
    schedule = slow_apart(schedule, slow) if slow else schedule
    return Prepared(s.request, s.network, s.cluster, s.layout, s.training, schedule, s.cost)


def _microbatches(request: Request, layout: ParallelLayout) -> int:
    if request.micro_batches is not None:
        if request.global_batch is not None:
            raise InputError(f"{request.strategy}: --micro-batches {request.micro_batches} and --global-batch "
                             f"{request.global_batch} are both given; expected one of them")  # fmt: skip
        return request.micro_batches
    if request.global_batch is None:
        return 1
    per_pass = request.micro_batch * replicas(layout)
    if request.global_batch < 1 or request.global_batch % per_pass:
        raise InputError(
            f"{request.strategy}: --global-batch {request.global_batch} is no multiple of micro-batch x replicas = "
            f"{request.micro_batch} x {replicas(layout)} = {per_pass}; for example --global-batch "
            f"{per_pass * max(1, round(request.global_batch / per_pass))}"
        )
    return request.global_batch // per_pass


def run(
    prepared: Prepared, engine: str = "simpy", fold: bool = True, folds: Folds | None = None, alike: bool = False
) -> Result:
    """Simulates the step: "simpy" with contention, "longest-path" without. `fold=False` simulates every rank; `folds`
    remembers which ranks behave alike, for steps like this one under the same cost model. With `alike`, "simpy" takes
    ranks of one program to behave alike (engine/fold.py)."""
    schedule, cost = prepared.schedule, prepared.cost
    if engine == "simpy":
        from rtp_sim.engine.simulate import simulate

        timeline = simulate(schedule, cost, fold=fold, folds=folds, alike=alike)
    else:
        timeline = longest_path(schedule, cost, fold=fold, folds=folds)
    meta = dict(timeline.meta) | {"cluster": prepared.cluster.name, "model": prepared.network.name}
    timeline = replace(timeline, meta=meta)
    memory = memory_profiles(schedule, timeline.ranks)
    metrics = step_metrics(
        timeline, memory, usable_memory_bytes(prepared.cluster),
        cost.peak_flops_per_s(prepared.training.policy.compute_dtype), cost_provenance(prepared, timeline),
    )  # fmt: skip
    return Result(prepared, timeline, memory, metrics)


def cost_provenance(prepared: Prepared, timeline: Timeline) -> dict[str, float]:
    """Share of the critical rank's busy time by what its prices rest on: measured, interpolated, assumed."""
    rank = critical_rank(timeline)
    times = timeline.ranks[rank]
    busy: dict[str, int] = {}
    for op in prepared.schedule.program(rank).ops:
        dims = None
        if isinstance(op.action, Compute):
            dims = op.action.dims_at(prepared.schedule.shard_index(rank, op.action.part))
        basis = prepared.cost.basis(op, dims)
        busy[basis] = busy.get(basis, 0) + int(times.end_ns[op.index] - times.start_ns[op.index])
    total = sum(busy.values())
    return {basis: busy[basis] / total for basis in sorted(busy)} if total else {}
