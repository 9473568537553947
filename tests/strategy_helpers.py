"""Schedules of small networks for the tests of the strategies, and counts taken from a schedule without its meta.

Networks are put together by hand, so that each test states the sizes its numbers are worked out from. Groups are built
here as plain rank tuples: no topology, so a strategy's program is tested apart from the mapping on hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.model.kernels import flops
from rtp_sim.model.layers import Layer, LayerOp, Norm
from rtp_sim.model.network import Block, Input, Network, transformer_network
from rtp_sim.model.network_file import read_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.spec import ModelSpec
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.build import build_schedule
from rtp_sim.schedule.ir import Collective, Compute, Dims, Group, Hop, Op, Schedule, Shift
from rtp_sim.schedule.layout import INNER_AXIS, ParallelLayout
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES

INNER = {name: axis for name, axis in INNER_AXIS.items() if axis and name not in PIPELINES}
DATA_PARALLEL = ("ddp", "zero1", "zero2", "fsdp")
EVERY_STRATEGY = ("single", *DATA_PARALLEL, *INNER)


# ---- networks


def image_network() -> Network:
    """The MNIST CNN of the examples."""
    return read_network(Path(__file__).parent.parent / "examples" / "models" / "mnist-cnn.json")


def stack(
    ops: Sequence[LayerOp],
    seq: int = 1,
    input_numel: int = 8,
    input_dtype: str = "fp32",
    recomputable: bool = False,
) -> Network:
    """The layers one after another, each a block of its own; the last layer's output stands for the loss."""
    layers, tensor = [], "x"
    for i, op in enumerate(ops):
        layers.append(Layer(f"l{i}", op, (tensor,), f"l{i}.y"))
        tensor = f"l{i}.y"
    blocks = tuple(Block(layer.name, (layer,), recomputable) for layer in layers)
    return Network("stack", seq, (Input("x", input_numel, input_dtype),), blocks)


def between_linears(ops: Sequence[LayerOp], width: int, seq: int = 1) -> Network:
    """As `stack`, with a replicated norm in front, so that every op's input gradient is wanted."""
    return stack([Norm("rmsnorm", width), *ops], seq, seq * width)


def gpt2_tiny(seq: int = 8) -> Network:
    """Two blocks of width 64 with 4 heads, vocabulary 256, tied embeddings."""
    return transformer_network(find_model("gpt2-tiny"), seq)


def llama_tiny(seq: int = 8) -> Network:
    """Grouped queries (4 heads on 2 key/value heads), gated MLP, rotary positions, no biases, untied head."""
    return transformer_network(
        ModelSpec(
            "llama-tiny", 2, 32, 8, vocab_size=48, max_positions=64, num_kv_heads=4, ffn_hidden_size=48,
            gated_mlp=True, activation="silu", position="rotary", norm="rmsnorm", tied_embeddings=False,
            qkv_bias=False, out_bias=False, mlp_bias=False,
        ),
        seq,
    )  # fmt: skip


def moe_tiny(seq: int = 8, experts: int = 8) -> Network:
    """As `llama_tiny`, with routed experts (2 per token) in the place of the MLP."""
    return transformer_network(
        ModelSpec(
            "moe-tiny", 2, 32, 8, vocab_size=48, max_positions=64, num_kv_heads=4, ffn_hidden_size=16,
            gated_mlp=True, activation="silu", position="rotary", norm="rmsnorm", tied_embeddings=False,
            qkv_bias=False, out_bias=False, mlp_bias=False, num_experts=experts, experts_per_token=2,
        ),
        seq,
    )  # fmt: skip


def bert_tiny(seq: int = 8) -> Network:
    """An encoder with norms after the residuals, segments, dropout, materialised attention and a transformed head."""
    return transformer_network(
        ModelSpec(
            "bert-tiny", 2, 32, 4, vocab_size=48, max_positions=64, token_types=2, causal=False, embedding_norm=True,
            norm_placement="post", final_norm=False, head_transform=True, dropout=0.1,
        ),
        seq, "materialised",
    )  # fmt: skip


# ---- schedules


def groups_of(
    strategy: str, inner: int, dp: int = 1, dims: tuple[int, ...] = ()
) -> tuple[ParallelLayout, dict[str, Group]]:
    """`inner` neighbouring ranks per ring (or tp group) and `dp` of these; data-parallel strategies have inner 1."""
    axis = INNER.get(strategy, "")
    groups: dict[str, Group] = {}
    if inner > 1:
        rows = tuple(tuple(range(k * inner, (k + 1) * inner)) for k in range(dp))
        groups[axis] = Group(axis, dims or (inner,), rows)
    if dp > 1:
        groups["dp"] = Group("dp", (dp,), tuple(tuple(k * inner + p for k in range(dp)) for p in range(inner)))
    return ParallelLayout(axis, inner, dp), groups


def build(
    strategy: str, network: Network, n: int, training: TrainingSpec | None = None, *, dp: int = 1,
    dims: tuple[int, ...] = (), **options: object,
) -> Schedule:  # fmt: skip
    """The schedule of `strategy` over n ranks: n is the inner degree where there is one (times `dp`), else dp."""
    training = training or TrainingSpec(2, network.seq, precision="fp32", optimizer="sgd")
    inner, across = (n, dp) if strategy in INNER else (1, n)
    layout, groups = groups_of(strategy, inner, across, dims)
    return build_schedule(strategy, network, training, layout, groups, Options(**options))  # type: ignore[arg-type]


def build_pipeline(
    strategy: str, network: Network, pp: int, training: TrainingSpec, *, tp: int = 1, dp: int = 1, **options: object
) -> Schedule:
    """The schedule of a pipeline strategy, tp fastest, then dp, stages slowest."""
    grid = [[[(s * dp + d) * tp + t for t in range(tp)] for d in range(dp)] for s in range(pp)]
    lines = tuple(tuple(grid[s][d][t] for s in range(pp)) for d in range(dp) for t in range(tp))
    groups = {}
    if tp > 1:
        groups["tp"] = Group("tp", (tp,), tuple(tuple(row) for stage in grid for row in stage))
    if dp > 1:
        groups["dp"] = Group("dp", (dp,), tuple(tuple(r[t] for r in stage) for stage in grid for t in range(tp)))
    if pp > 1:
        groups["pp"] = Group("pp", (pp,), lines)
    layout = ParallelLayout("tp", tp, dp, pp)
    return build_schedule(strategy, network, training, layout, groups, Options(**options))  # type: ignore[arg-type]


# ---- counts


def phase_of(op: Op) -> str:
    """ "F", "R" (recompute), "B" or "" from the op's name: the part `<phase><sub-step>.` after the layer's name."""
    for part in op.name.split("."):
        if part[:1] in "FRB" and (part[1:].isdigit() or not part[1:]):
            return part[0]
    return ""


def shifts(schedule: Schedule, group: str = "rtp") -> list[tuple[Op, Hop]]:
    """The hops of a group in program order (each shift of these strategies has one)."""
    found = []
    for op in schedule.programs[0].ops:
        if isinstance(op.action, Shift) and op.action.group == group:
            (hop,) = op.action.hops
            found.append((op, hop))
    return found


@dataclass(frozen=True)
class Traffic:
    """What one rank sends by hops: (messages, bytes) of the forward and the backward pass, by op name."""

    forward: tuple[int, int]
    backward: tuple[int, int]
    recompute: tuple[int, int]


def hop_traffic(schedule: Schedule, rank: int, group: str = "rtp") -> Traffic:
    """Counted afresh (not by metrics.py): one message per hop, in place one per chunk."""
    total = {phase: [0, 0] for phase in "FBR"}
    for op, hop in shifts(schedule, group):
        assert isinstance(op.action, Shift)
        size = hop.bytes_at(schedule.shard_index(rank, hop.part))
        chunk = op.action.chunk_bytes
        total[phase_of(op)][0] += -(-size // chunk) if chunk else 1
        total[phase_of(op)][1] += size
    return Traffic(*((m, b) for m, b in (total["F"], total["B"], total["R"])))


def collectives(schedule: Schedule, group: str) -> list[tuple[str, str, int]]:
    """(kind, name, size_bytes) of a group's collectives in program order."""
    return [
        (op.action.kind, op.name, op.action.size_bytes)
        for op in schedule.programs[0].ops
        if isinstance(op.action, Collective) and op.action.group == group
    ]


def kinds(found: list[tuple[str, str, int]]) -> Counter[tuple[str, int]]:
    """(kind, size_bytes) -> how many."""
    return Counter((kind, size) for kind, _, size in found)


def ring_bytes(found: list[tuple[str, str, int]], n: int) -> int:
    """What one rank sends for these collectives under ring algorithms; each must be a whole number of bytes."""
    total = 0
    for kind, name, size in found:
        rounds = 2 * (n - 1) if kind == "all_reduce" else n - 1
        assert rounds * size % n == 0, name
        total += rounds * size // n
    return total


def total_flops(schedule: Schedule) -> int:
    """FLOPs of all ranks, each kernel with the sizes of the shard its rank works on."""
    return sum(
        flops(op.action.kernel, op.action.dims_at(schedule.shard_index(rank, op.action.part)))
        for rank in range(schedule.world_size)
        for op in schedule.program(rank).ops
        if isinstance(op.action, Compute)
    )


def updated_parameters(schedule: Schedule) -> int:
    """Parameters in the optimizer step, summed over all ranks."""
    total = 0
    for rank in range(schedule.world_size):
        for op in schedule.program(rank).ops:
            if isinstance(op.action, Compute) and op.action.kernel == "optimizer":
                total += dict(op.action.dims_at(schedule.shard_index(rank, op.action.part)))["numel"]
    return total


# ---- a cost model with one price per kind of op


@dataclass
class FlatCost:
    """Kernels cost what `kernels` says, others `other_ns`, every message and collective `message_ns`; no contention."""

    kernels: Mapping[str, int]
    message_ns: int = 0
    other_ns: int = 0
    world_size: int = 64

    @property
    def overlap_slowdown_permille(self) -> int:
        return 1000

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        return OpCost(self.kernels.get(kernel, self.other_ns), "assumed")

    def host_issue_ns(self, op: Op) -> int:
        return 0

    def link_capacity(self, link: int) -> int:
        return 1_000_000_000

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        return Phase(self.message_ns, 0, {src_rank * self.world_size + dst_rank: 1})

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        return (Phase(self.message_ns, 0, {}),)

    def compute_pool(self, rank: int) -> int | None:
        return None


# ---- operands against dims


def operand_sizes(kernel: str, d: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Elements that a kernel's first reads and writes must have, from its dims; empty lists where nothing is known."""
    match kernel.partition(".")[0]:
        case "linear":
            x, y = d["m"] * d["k"], d["m"] * d["n"]
        case "conv2d":
            x, y = d["batch"] * d["in_pixels"] * d["cin"], d["batch"] * d["out_pixels"] * d["cout"]
        case "layernorm" | "rmsnorm" | "positions" | "embedding":
            x = y = d["rows"] * d["width"]
        case "gelu" | "relu" | "silu":
            x = y = d["numel"]
        case "gated":
            x, y = 2 * d["numel"], d["numel"]
        case "cross_entropy":
            x = d["rows"] * d["width"]
            return ([x], []) if kernel == "cross_entropy" else ([x], [x])
        case _:
            return [], []
    known = {
        "": ([x] if kernel != "embedding" else [], [y]),
        "dgrad": ([y], [x]),
        "wgrad": ([x, y] if kernel in ("linear.wgrad", "conv2d.wgrad") else [y], []),
        "bwd": ([y, x], [x]),
    }
    return known[kernel.partition(".")[2]]


def misfits(schedule: Schedule, at_least: bool = False) -> list[str]:
    """Operands whose buffers differ in size from what the kernel's dims say, on any rank."""
    buffers, found = schedule.programs[0].buffers, []
    for op in schedule.programs[0].ops:
        if not isinstance(op.action, Compute):
            continue
        for rank in range(schedule.world_size):
            dims = dict(op.action.dims_at(schedule.shard_index(rank, op.action.part)))
            reads, writes = operand_sizes(op.action.kernel, dims)
            for name, needed in (*zip(op.reads, reads, strict=False), *zip(op.writes, writes, strict=False)):
                shape = buffers[name].numel
                numel = shape if isinstance(shape, int) else shape[schedule.shard_index(rank, buffers[name].part)]
                if buffers[name].category != "gradients" and not (numel == needed or (at_least and numel > needed)):
                    found.append(f"rank {rank} {op.name}: {name} has {numel} elements, the kernel needs {needed}")
    return found
