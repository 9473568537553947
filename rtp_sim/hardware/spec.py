"""Hardware as data: devices, links, clusters. Every number carries where it came from.

`Number.kind` is "measured" (on such hardware, by the cited source), "vendor" (datasheet) or "assumed" (our guess, said
so). Links are directed: a full-duplex cable is two links. Bandwidths are bytes/s in one direction, decimal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rtp_sim.hardware.topology import Topology


@dataclass(frozen=True, slots=True)
class Number:
    """A value in base units (bytes, bytes/s, FLOP/s, ns, or a plain ratio) with its provenance."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class MeasuredKernel:
    """One kernel in one dtype as a straight line through its measured times: floor + FLOPs / rate + bytes / bandwidth.

    `ns_per_flop` and `ns_per_byte` are the slopes, 0 where that part was not found. `provenance` is a `Number` whose
    value is the floor in ns.
    """

    floor_ns: float
    ns_per_flop: float
    ns_per_byte: float
    provenance: Number


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or one CPU core pool), as the cost model sees it.

    `peak_flops` is dense FLOP/s by dtype. The efficiencies are the best fraction of the peak that large kernels of
    that class reach; those for fp32, which has no matrix units of its own, where they differ, and that of
    half-precision products with a size that is no multiple of 8 (`matmul_efficiency_ragged`). `kernel_floor_ns` is
    the shortest time any kernel takes on the device, `host_issue_ns` what the host thread spends to issue one op
    (kernels of the backward, communication and pipeline messages have figures of their own where these differ),
    `overlap_slowdown` (>= 1) how much longer compute takes while a communication kernel runs beside it on the same
    device. `blocking_issue_ns` is what every kernel costs on top where launches block the host until the kernel is done
    (CUDA_LAUNCH_BLOCKING=1): nothing hides the launch of the next. `host_pace_ns` is what a fixed piece of work took on
    the host's cores (executor/pace.py): the figures hold at that pace. `kernels`, by name and dtype, are those measured
    one by one: their times stand above the efficiencies of their class.
    """

    name: str
    description: str
    compute_units: Number
    memory_bytes: Number
    memory_bandwidth_bytes_per_s: Number
    peak_flops: Mapping[str, Number]
    matmul_efficiency: Number
    attention_efficiency: Number
    memory_efficiency: Number
    kernel_floor_ns: Number
    host_issue_ns: Number
    overlap_slowdown: Number
    runtime_reserved_bytes: Number
    matmul_efficiency_fp32: Number | None = None
    attention_efficiency_fp32: Number | None = None
    matmul_efficiency_ragged: Number | None = None
    tdp_w: Number | None = None
    price_usd_per_hour: Number | None = None
    communication_issue_ns: Number | None = None
    host_issue_backward_ns: Number | None = None
    message_issue_ns: Number | None = None
    blocking_issue_ns: Number | None = None
    host_pace_ns: Number | None = None
    kernels: Mapping[tuple[str, str], MeasuredKernel] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a physical channel. `bandwidth_bytes_per_s` is what transfers reach (raw times a measured or
    assumed efficiency), `raw_bandwidth_bytes_per_s` what the port can do at most. `kind` says what it is: nvlink,
    xgmi, pcie, host (memory or socket interconnect), nic, fabric, loopback."""

    index: int
    name: str
    kind: str
    bandwidth_bytes_per_s: int
    raw_bandwidth_bytes_per_s: int
    latency_ns: int
    provenance: str


@dataclass(frozen=True, slots=True)
class Route:
    """The directed links a message takes, by index, and the sum of their latencies."""

    links: tuple[int, ...]
    latency_ns: int


@dataclass(frozen=True, slots=True)
class KindParams:
    """One kind of collective measured by itself: `step_ns` per ring step, with all that the library and the links add,
    and the fraction of the links' bandwidth that it reaches."""

    step_ns: Number
    efficiency: Number


@dataclass(frozen=True, slots=True)
class HostParams:
    """The cores that ranks on CPUs share: how many, and what core time a message takes per million bytes, sender and
    receiver together."""

    cores: Number
    core_ns_per_megabyte: Number


@dataclass(frozen=True, slots=True)
class CommunicationParams:
    """What the communication library adds to the wires. Latencies are software costs on top of link latencies.

    `collective_base_ns` once per collective, `collective_step_*_ns` per ring or tree step inside and between nodes,
    `p2p_base_ns` once per point-to-point message, whose large sizes reach `p2p_efficiency` of the bandwidth that
    collectives reach. `size_curve` lists (bytes, fraction of bandwidth reached), ascending in bytes, joined by powers
    of the size; empty means 1 everywhere. `in_switch_reduction_min_ranks` is None where the switch cannot reduce
    (NVLink SHARP); `in_switch_base_ns` is what that takes before data flows, `in_switch_efficiency` the fraction of the
    port rate it then reaches. `collective_chunk_inter_ns` is how long a port between nodes is busy with one chunk of a
    ring whatever its size (None: not at all): it paces rings that span nodes. `collective_turn_piped_ns` is how much
    longer the host takes to issue a collective, per member of its group, where the same ranks exchange pipeline
    messages with other nodes (None: not at all). `message_stall_ns` is how much longer any message between nodes takes
    on `message_stall_nodes` nodes and more, where it was measured (None: not at all). `all_reduce_nodes` lists (nodes,
    fraction of the wires' raw bandwidth that all-reduces over so many nodes reach at most), ascending, joined by
    powers; empty: all of it. `algorithms` lists which of ring, tree, hierarchical, in-switch the library may pick.
    `kinds` are collectives (by the IR's names) that were measured by themselves. `most_rings`: over how many of the
    rings that the wiring has a collective is spread (None: all).
    """

    p2p_base_ns: Number
    p2p_efficiency: Number
    collective_base_ns: Number
    collective_step_intra_ns: Number
    collective_step_inter_ns: Number
    algorithms: tuple[str, ...]
    size_curve: tuple[tuple[int, float], ...]
    size_curve_provenance: Number | None
    in_switch_reduction_min_ranks: Number | None
    in_switch_base_ns: Number | None
    in_switch_efficiency: Number | None
    collective_chunk_inter_ns: Number | None = None
    collective_turn_piped_ns: Number | None = None
    message_stall_ns: Number | None = None
    message_stall_nodes: Number | None = None
    all_reduce_nodes: tuple[tuple[int, float], ...] = ()
    kinds: Mapping[str, KindParams] = field(default_factory=dict)
    most_rings: int | None = None


@dataclass(frozen=True, slots=True)
class Residuals:
    """What is left of a machine's fit: the 10th and 90th percentile of measured / predicted step time."""

    low: Number
    high: Number


@dataclass(frozen=True)
class Cluster:
    """`nodes` nodes of `gpus_per_node` devices each, and how they are wired. Rank r sits on node r // gpus_per_node.
    `residuals` are there where the profile was fitted to measured steps."""

    name: str
    description: str
    device: Device
    gpus_per_node: int
    nodes: int
    communication: CommunicationParams
    topology: Topology
    notes: tuple[str, ...] = ()
    host: HostParams | None = None
    residuals: Residuals | None = None

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.nodes * self.gpus_per_node


UNFITTED = (0.75, 1.4)
"""The interval for machines without measured steps: about what the fitted machines missed before they were fitted."""


def step_time_interval(cluster: Cluster) -> tuple[float, float]:
    """(low, high): eight of ten measured step times lay between low x and high x the predicted one."""
    if cluster.residuals is None:
        return UNFITTED
    return cluster.residuals.low.value, cluster.residuals.high.value
