"""From a measured row to an experiment: which model, cluster, strategy and options it describes, and what was assumed.

Blank cells are filled by stated rules, and each such decision is one line of `assumptions`. A row that cannot be
predicted raises `Unsupported` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from rtp_sim.cost.host import HostCosts
from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import list_clusters
from rtp_sim.model.layers import Attention, CrossEntropy, LayerOp, Mlp, Norm
from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.spec import ModelSpec
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.text import nearest
from rtp_sim.validation.frameworks import Habits, habits_of
from rtp_sim.validation.measured import Row, RowFile
from rtp_sim.validation.reading import Reading, reading_of
from rtp_sim.validation.refusals import refusal

BIGSCIENCE_HEADS = 96
"""NHEADS of the 200B model that the prequel to BLOOM's chronicles starts from; its tables name heads only later."""

HALF_KERNEL_HEADS = 8
"""torch's fused attention kernels want head sizes that are multiples of 8; others take the materialised path."""


REPLICATED = ("single", "ddp", "zero1", "zero2")
"""Strategies of the data-parallel axis that keep whole weights, and so go with tensor and pipeline parallelism."""

SCHEDULES = {
    "gpipe": "gpipe", "afab": "gpipe", "1f1b": "1f1b", "pipedream-flush": "1f1b",
    "1f1b-i": "interleaved", "interleaved": "interleaved", "interleaved 1f1b": "interleaved",
    "interleaved-1f1b": "interleaved", "1f1b-interleaved": "interleaved", "interleaved_1f1b": "interleaved",
    "zb-h1": "zb-h1", "zb-h2": "zb-h2", "zb-1p": "zb-1p", "zb-2p": "zb-2p", "zb-2p sync": "zb-2p", "zb-v": "zb-v",
    "zbv": "zb-v",
}  # fmt: skip
"""Published names of pipeline schedules, in lower case. "sync" says how the optimizer's end is synchronised."""


class Unsupported(Exception):
    """The row is in order, but nothing here can predict it; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What a row is taken to have run. Equal experiments have equal predictions, so they are hashable.

    `inner` is the degree of the strategy's own axis (tensor parallelism, rotation, the sharding of hsdp), 0 where it
    has none, `pp` that of the pipeline. `recomputed_every` is 2 where full recompute is for every second block.
    `torch_attention`, `torch_loss`: see `Habits`.
    """

    cluster: str
    gpus: int
    model: ModelSpec
    seq_len: int
    attention: str
    recomputed_every: int
    torch_attention: bool
    torch_loss: bool
    upcast_loss: bool
    separate_gate: bool
    stacked_kv: bool
    dropout_kept: bool
    loss_passes: tuple[int, int]
    norm_passes: tuple[int, int]
    rotary_passes: tuple[int, int]
    fused_matrices: int
    strategy: str
    inner: int
    pp: int
    training: TrainingSpec
    options: Options
    host: HostCosts
    rings: int = 0

    def network(self) -> Network:
        """The model's layers, with the blocks that are recomputed marked."""
        network = transformer_network(self.model, self.seq_len, self.attention)
        blocks = tuple(
            replace(
                b,
                recomputable=b.recomputable and i % self.recomputed_every == 0,
                layers=tuple(replace(layer, op=self._kept(layer.op)) for layer in b.layers),
            )
            for i, b in enumerate(network.blocks)
        )
        return replace(network, blocks=blocks)

    def _kept(self, op: LayerOp) -> LayerOp:
        """The layer with what the framework keeps for the backward pass."""
        if isinstance(op, Attention) and self.torch_attention:
            return replace(op, context_copy=True, scaled_copies=op.implementation == "materialised")
        if isinstance(op, Attention):
            flash = op.implementation == "flash"
            return replace(op, stacked_kv=self.stacked_kv and flash, dropout_kept=self.dropout_kept and not flash,
                           fused_matrices=self.fused_matrices, rotary_passes=self.rotary_passes)  # fmt: skip
        if isinstance(op, Norm):
            return replace(op, passes=self.norm_passes)
        if isinstance(op, CrossEntropy) and self.torch_loss:
            return replace(op, unfused=True)
        if isinstance(op, CrossEntropy) and self.upcast_loss:
            return replace(op, upcast=True, passes=self.loss_passes)
        if isinstance(op, Mlp) and self.separate_gate:
            return replace(op, separate_gate=True)
        return op


@dataclass(frozen=True, slots=True)
class Interpretation:
    """An experiment, the decisions behind it in words, and how the source counts memory. `refused` is why the framework
    would not start the run, empty if it would."""

    experiment: Experiment
    assumptions: tuple[str, ...]
    reading: Reading
    refused: str = ""


def interpret(row: Row) -> Interpretation:
    """The experiment of a row. Unsupported with the reason, or InputError, if there is none."""
    cells = row.cells
    if cells.cluster not in list_clusters():
        raise InputError(
            _at(row, "cluster", f"unknown cluster {cells.cluster!r}: {nearest(cells.cluster, list_clusters())}")
        )
    habits = habits_of(cells.framework, cells.source, cells.tp * cells.pp > 1)
    said: list[str] = []
    if habits is None:
        said.append(f"framework {cells.framework!r} is not known: taken as plain torch")
        habits = Habits("torch", "llama" if cells.gated_mlp else "gpt")
    if _compiled(cells):
        said.append("compiled: chains of elementwise kernels are fused")
        habits = replace(habits, separate_gate=False, norm_passes=(0, 0), rotary_passes=(0, 0))
    _require_supported(cells)
    model = _model(cells, habits, said.append)
    attention = _attention(cells, habits, model, said.append)
    strategy, inner = _strategy(cells, habits, said.append)
    recompute, every = _recompute(cells, habits, attention, said.append)
    training = TrainingSpec(
        micro_batch=cells.micro_batch, seq_len=cells.seq_len, num_microbatches=cells.num_microbatches,
        precision=_precision(cells, habits, said.append), recompute=recompute, optimizer="adamw", attention=attention,
    )  # fmt: skip
    options = Options(
        ddp_bucket_bytes=habits.dp_bucket_bytes, fsdp_unit=habits.fsdp_unit, fsdp_prefetch=habits.fsdp_prefetch,
        dp_sync=_dp_sync(cells, said.append), dp_overlap=_dp_overlap(cells, habits), dp_copy=habits.dp_copy,
        zero1_all_reduce=habits.zero1_after,
        gradient_buffer=habits.gradient_buffer or (strategy.startswith("rtp") and habits.rotation_keeps_gradients),
        fsdp_split_gradients=habits.fsdp_split_gradients,
        gradient_local=habits.gradient_local and training.policy.gradient_dtype != training.policy.weight_dtype,
        fsdp_gather_again=habits.fsdp_gather_again, tp_overlap=habits.tp_overlap,
        tp_keep_gathered=habits.tp_keep_gathered, optimizer_scratch=habits.optimizer_scratch, rtp_ring="flat",
        sequence_parallel=bool(cells.sequence_parallel) and cells.tp > 1, vpp=_chunks(cells, strategy, said.append),
        pp_balance=habits.pp_balance, pp_overlap=habits.pp_overlap, pp_scatter_gather=habits.pp_scatter_gather,
        pp_synchronised=habits.pp_synchronised,
    )  # fmt: skip
    experiment = Experiment(
        cells.cluster, 1 if strategy == "single" else cells.gpus, model, cells.seq_len, attention, every,
        habits.torch_attention, habits.torch_loss, habits.upcast_loss, habits.separate_gate, habits.stacked_kv,
        habits.dropout_kept, habits.loss_passes, habits.norm_passes, habits.rotary_passes, habits.fused_matrices,
        strategy, inner, cells.pp, training, options,
        HostCosts(habits.op_ns, habits.hop_ns, habits.collective_ns), habits.rings,
    )  # fmt: skip
    refused = ""
    if habits.checks_stages and strategy in PIPELINES:
        sharing = cells.strategy == "zero1"
        refused = refusal(experiment.network(), strategy, cells.pp, cells.num_microbatches, options, zero1=sharing)
    return Interpretation(experiment, tuple(said), reading_of(cells, habits), refused)


def _compiled(cells: RowFile) -> bool:
    """Whether the row says that torch.compile was used."""
    return "torch.compile" in cells.note or "torch.compile" in cells.framework


def _at(row: Row, column: str, message: str) -> str:
    return f"{row.file}, line {row.line}, column {column}: {message}"


def _require_supported(cells: RowFile) -> None:
    if cells.cp > 1 or cells.ep > 1:
        raise Unsupported(f"context and expert parallelism (cp={cells.cp}, ep={cells.ep}) are not supported")
    if cells.tp * cells.pp > 1 and cells.strategy not in REPLICATED:
        raise Unsupported(
            f"tensor and pipeline parallelism with {cells.strategy} on the data-parallel axis are not supported"
        )


Say = Callable[[str], None]


def _model(cells: RowFile, habits: Habits, say: Say) -> ModelSpec:
    hidden = cells.hidden_size
    gated = cells.gated_mlp if cells.gated_mlp is not None else habits.architecture == "llama"
    ffn = cells.ffn_hidden_size
    if ffn is None:
        ffn = (habits.ffn_hidden_size or {}).get(hidden) or (256 * -(-8 * hidden // 768) if gated else 4 * hidden)
        say(f"ffn_hidden_size is blank: {ffn} assumed")
    vocab = cells.vocab_size
    if vocab is None:
        vocab = (habits.vocab_unsplit if cells.tp == 1 else None) or habits.vocab_size or 51200
        say(f"vocab_size is blank: {vocab} assumed")
    layers = cells.num_layers or _layers(cells, ffn, vocab, gated, say)
    heads = cells.num_heads or _heads(cells, say)
    if cells.num_kv_heads is None:
        say("num_kv_heads is blank: as many as heads assumed")
    style = {
        "gpt": {"norm": "layernorm", "activation": "gelu"},
        "mpt": {"norm": "layernorm", "activation": "gelu", "qkv_bias": False, "out_bias": False, "mlp_bias": False},
        "fairscale": {
            "norm": "layernorm", "norm_placement": "post", "activation": "relu", "position": "sinusoidal",
            "final_norm": False, "lm_head_bias": True, "causal": False,
        },
        "llama": {
            "norm": "rmsnorm", "activation": "silu", "position": "rotary",
            "qkv_bias": False, "out_bias": False, "mlp_bias": False,
        },
    }[habits.architecture]  # fmt: skip
    tied = cells.tied_embeddings if cells.tied_embeddings is not None else habits.architecture != "llama"
    return ModelSpec(
        name=cells.model or f"h{hidden}-l{layers}", num_layers=layers, hidden_size=hidden, num_heads=heads,
        num_kv_heads=cells.num_kv_heads or 0, ffn_hidden_size=ffn, vocab_size=vocab, max_positions=cells.seq_len,
        gated_mlp=gated, tied_embeddings=tied, dropout=habits.dropout, **style,  # type: ignore[arg-type]
    )  # fmt: skip


def _heads(cells: RowFile, say: Say) -> int:
    """The heads of a source that names them for the model it starts from, else heads of about 128."""
    hidden = cells.hidden_size
    if "BLOOM prequel" in cells.source and hidden % BIGSCIENCE_HEADS == 0:
        say(f"num_heads is blank: {BIGSCIENCE_HEADS} assumed, as the source says of its first 200B model")
        return BIGSCIENCE_HEADS
    heads = min((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(hidden / n - 128))
    say(f"num_heads is blank: {heads} assumed (heads of about 128)")
    return heads


def _layers(cells: RowFile, ffn: int, vocab: int, gated: bool, say: Say) -> int:
    """The number of layers from the parameter count in the model's name (GPT-191B), a multiple of the stages."""
    found = re.search(r"([\d.]+)\s*B\b", cells.model)
    if found is None:
        raise Unsupported("num_layers is blank and the model's name tells no parameter count")
    per_layer = 4 * cells.hidden_size**2 + (3 if gated else 2) * cells.hidden_size * ffn
    exact = (float(found[1]) * 1e9 - vocab * cells.hidden_size) / per_layer
    layers = max(cells.pp, round(exact / cells.pp) * cells.pp)
    say(f"num_layers is blank: {layers} assumed from the {found[1]} billion parameters in the model's name")
    return layers


def _attention(cells: RowFile, habits: Habits, model: ModelSpec, say: Say) -> str:
    text = cells.attention.lower()
    if habits.torch_attention:
        # torch.nn.functional.scaled_dot_product_attention with a mask.
        volta = "v100" in cells.cluster
        if model.head_dim % HALF_KERNEL_HEADS or (volta and cells.precision == "fp32"):
            return "materialised"
        say(
            "attention: the row says materialised; fused, as the source's memory grows with sequences "
            "(docs/measured.md)"
        )
        return "flash"
    if text.startswith("flash"):
        return "flash"
    if not text.startswith("materialised"):
        say(f"attention is {cells.attention or 'blank'!r}: materialised assumed")
    return "materialised"


def _strategy(cells: RowFile, habits: Habits, say: Say) -> tuple[str, int]:
    """(name of the schedule's strategy, degree of its own axis).

    Tensor and data parallelism are taken as a pipeline of one stage where gradients are reduced in place: the same
    step, composed.
    """
    if cells.strategy.startswith("rtp"):
        return cells.strategy, cells.dp
    if cells.pp > 1:
        return _pipeline(cells, say), cells.tp
    if cells.tp > 1 and cells.strategy == "zero2":
        return ("tp-sp" if cells.sequence_parallel else "tp"), cells.tp
    if cells.tp > 1:
        return "1f1b", cells.tp
    if cells.strategy == "ddp" and "ZeRO-3" in cells.source:
        say("strategy: the row says ddp; its source calls the runs without model parallelism ZeRO-3: taken as fsdp")
        return "fsdp", 0
    if cells.strategy == "hsdp":
        return _hybrid(cells, say)
    if cells.strategy == "single" or (cells.gpus == 1 and cells.strategy == "ddp"):
        return "single", 0
    if cells.strategy in ("ddp", "zero1") and not habits.dp_copy:
        return "1f1b", 1
    return cells.strategy, 0


def _pipeline(cells: RowFile, say: Say) -> str:
    """The pipeline schedule by its published name. Unsupported if it is not known."""
    name = " ".join(cells.pipeline_schedule.lower().split())
    if not name:
        found = "interleaved" if cells.vpp > 1 else "1f1b"
        say(f"pipeline_schedule is blank: {found} assumed")
        return found
    if name in SCHEDULES:
        return SCHEDULES[name]
    raise Unsupported(f"pipeline schedule {cells.pipeline_schedule!r} is not known: {nearest(name, list(SCHEDULES))}")


def _chunks(cells: RowFile, strategy: str, say: Say) -> int:
    """Chunks per stage of an interleaved pipeline; with none given, one block per chunk."""
    if strategy != "interleaved":
        return 1
    if cells.vpp > 1 or cells.num_layers is None:
        return cells.vpp
    # Embedding and head count as a block where that comes out even, as in `stages.cut`.
    whole = cells.num_layers if cells.num_layers % cells.pp == 0 else cells.num_layers + 2
    say(f"vpp is not given: {whole // cells.pp} chunks per stage assumed, one block in each")
    return whole // cells.pp


def _dp_sync(cells: RowFile, say: Say) -> str:
    if cells.strategy == "zero2" and cells.pp > 1:
        say("strategy zero2: a pipeline adds up gradients over its micro-batches; taken as zero1")
        return "zero1"
    return cells.strategy if cells.strategy in ("zero1", "zero2") else "ddp"


def _dp_overlap(cells: RowFile, habits: Habits) -> bool:
    """Whether gradients are reduced beside the backward: by the row itself (Megatron's DDP-impl), or the habits."""
    if cells.strategy == "zero1" and habits.zero1_after:
        return False
    return "DDP-impl torch" in cells.note or habits.dp_overlap


def _hybrid(cells: RowFile, say: Say) -> tuple[str, int]:
    """Sharded within a node, replicated over nodes."""
    per_node = cells.gpus_per_node or 8
    if cells.gpus <= per_node:
        say("strategy hsdp on one node: taken as fsdp")
        return "fsdp", 0
    say(f"hsdp: sharded over the {per_node} GPUs of a node, replicated over nodes")
    return "hsdp", per_node


def _recompute(cells: RowFile, habits: Habits, attention: str, say: Say) -> tuple[str, int]:
    """(what is recomputed, every how many-th block)."""
    word = cells.recompute.split()[0].strip("(,").lower() if cells.recompute else "none"
    if not cells.recompute:
        say("recompute is blank: none assumed")
    if word not in ("none", "full", "selective"):
        raise Unsupported(f"recompute {cells.recompute!r} is not known: expected none, selective or full")
    if word == "full" and not habits.recompute_works:
        say(
            "recompute: the row says full; none, as the source's memory is the same with and without (docs/measured.md)"
        )
        return "none", 1
    if word == "selective" and habits.selective_blocks:
        say(f"recompute selective: every {habits.selective_blocks}nd block assumed")
        return "full", habits.selective_blocks
    return word, 1


def _precision(cells: RowFile, habits: Habits, say: Say) -> str:
    text = cells.precision.lower()
    if "fp8" in text:
        return "fp8"
    if text == "fp32":
        return "fp32"
    if text == "fp16" and habits.pure_half:
        return "fp16-pure"
    if not text:
        say(f"precision is blank: {habits.mixed} assumed")
    if "bf16" in text:
        return "bf16-grad32" if "grad32" in habits.mixed or "fp32" in text or cells.grad_precision == "fp32" else "bf16"
    return habits.mixed if not text else "fp16"
