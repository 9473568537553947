"""Megatron-LM: the flags of `pretrain_gpt.py` that carry out a plan.

Names and rules are those of megatron/training/arguments.py (github.com/NVIDIA/Megatron-LM at 000c4ac24f61, the time of
Megatron-Core 0.16) and of the user guide's page on Megatron-FSDP, which brings ZeRO-2, ZeRO-3 and hybrid sharding.
docs/exports.md lists what is mapped to what.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from rtp_sim.experiment import Setting
from rtp_sim.export.settings import (
    HEAD_NODE_NOTE,
    Axes,
    NotExpressible,
    Settings,
    axes,
    global_batch,
    model_of,
    require_divides,
    torchrun,
)
from rtp_sim.model.spec import ModelSpec
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.strategies.pipeline import stages_of

NAME = "Megatron-LM"
PRECISIONS = {
    "fp32": (),
    "bf16": ("--bf16", "--grad-reduce-in-bf16"),
    "bf16-grad32": ("--bf16", "--accumulate-allreduce-grads-in-fp32"),
    "fp16": ("--fp16",),
    "fp8": ("--bf16", "--grad-reduce-in-bf16", "--fp8-format", "hybrid"),
}
SHARDING = {"zero2": "optim_grads", "fsdp": "optim_grads_params"}
"""Strategies of Megatron-FSDP; plain data parallelism and ZeRO-1 need it not."""

Say = Callable[[str], None]


def megatron(setting: Setting) -> Settings:
    """The command. NotExpressible with what Megatron-LM lacks."""
    degrees, model, said = axes(setting), model_of(setting), list[str]()
    options, training = setting.request.options, setting.training
    words = [
        *_model_words(model, training, degrees, said.append),
        *_batch_words(setting, degrees),
        *_parallel_words(degrees, options, setting.layout.order),
        *_pipeline_words(setting, degrees, said.append),
        *_data_words(degrees, training, options, said.append),
        *_precision_words(training),
        *_training_words(training, model, said.append),
    ]
    if model.vocab_size % degrees.tp:
        said.append(f"Megatron pads the vocabulary from {model.vocab_size} to a multiple of {degrees.tp}")
    if setting.cluster.nodes > 1:
        said.append(HEAD_NODE_NOTE)
    # Tensor parallelism wants its kernels launched in order; FSDP must not have that (validate_args).
    one_queue = degrees.tp > 1 and degrees.sharding not in SHARDING
    text = "export CUDA_DEVICE_MAX_CONNECTIONS=1\n" if one_queue else ""
    text += _lines([*torchrun(setting.cluster), "pretrain_gpt.py"], words)
    return Settings("megatron", "megatron.sh", text, tuple(said))


def _lines(command: list[str], words: list[str]) -> str:
    """The command with one flag and its values on a line."""
    lines = [" ".join(command)]
    for word in words:
        lines.append(shlex.quote(word)) if word.startswith("--") else lines.append(f"{lines.pop()} {shlex.quote(word)}")
    return " \\\n    ".join(lines) + "\n"


def _model_words(model: ModelSpec, training: TrainingSpec, degrees: Axes, say: Say) -> list[str]:
    _require_model(model)
    require_divides("heads", model.num_heads, "tp", degrees.tp, NAME)
    require_divides("the MLP's features", model.ffn_hidden_size, "tp", degrees.tp, NAME)
    groups = model.num_kv_heads
    if groups % degrees.tp and degrees.tp % groups:
        raise NotExpressible(
            f"{NAME} wants tp={degrees.tp} to be a multiple or a divisor of the {groups} key and value heads"
        )
    words = [
        "--num-layers", str(model.num_layers), "--hidden-size", str(model.hidden_size),
        "--ffn-hidden-size", str(model.ffn_hidden_size), "--num-attention-heads", str(model.num_heads),
        "--seq-length", str(training.seq_len),
        "--max-position-embeddings", str(max(model.max_positions, training.seq_len)),
        "--vocab-size", str(model.vocab_size), "--make-vocab-size-divisible-by", "1",
        "--normalization", {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        "--position-embedding-type", {"learned": "learned_absolute", "rotary": "rope", "none": "none"}[model.position],
    ]  # fmt: skip
    if model.head_dim * model.num_heads != model.hidden_size:
        words += ["--kv-channels", str(model.head_dim)]
    if groups != model.num_heads:
        words += ["--group-query-attention", "--num-query-groups", str(groups)]
    words += ["--swiglu"] if model.gated_mlp else []
    words += [] if model.mlp_bias else ["--disable-bias-linear"]
    words += ["--add-qkv-bias"] if model.qkv_bias and not model.mlp_bias else []
    words += [] if model.tied_embeddings else ["--untie-embeddings-and-output-weights"]
    if model.is_moe:
        words += ["--num-experts", str(model.num_experts), "--moe-router-topk", str(model.experts_per_token)]
        say("every rank holds all experts, as in the plan: expert parallelism is not part of it")
        if degrees.tp > 1 and not degrees.sequence_parallel:
            raise NotExpressible(f"{NAME} wants sequence parallelism where experts meet tensor parallelism")
    return words


def _require_model(model: ModelSpec) -> None:
    """NotExpressible for architectures that no flags describe."""
    lacking = {
        "an encoder": not model.causal,
        "a model without an output layer": not model.has_head,
        "norms behind the blocks": model.norm_placement != "pre",
        "a norm of the embedding": model.embedding_norm,
        "a stack without a last norm": not model.final_norm,
        f"{model.position} positions": model.position not in ("learned", "rotary", "none"),
        "ReLU": model.activation == "relu",
        f"a gated MLP with {model.activation}": model.gated_mlp and model.activation != "silu",
        f"a plain MLP with {model.activation}": not model.gated_mlp and model.activation == "silu",
        "a bias of the output layer": model.lm_head_bias,
        "biases in some of the attention's layers alone": model.out_bias != model.mlp_bias
        or (model.mlp_bias and not model.qkv_bias),
    }
    for what, lacks in lacking.items():
        if lacks:
            raise NotExpressible(f"pretrain_gpt.py has no flags for {what} ({model.name})")


def _batch_words(setting: Setting, degrees: Axes) -> list[str]:
    return ["--micro-batch-size", str(setting.training.micro_batch),
            "--global-batch-size", str(global_batch(setting, degrees))]  # fmt: skip


def _parallel_words(degrees: Axes, options: Options, order: str) -> list[str]:
    words = ["--tensor-model-parallel-size", str(degrees.tp), "--pipeline-model-parallel-size", str(degrees.pp)]
    words += ["--sequence-parallel"] if degrees.sequence_parallel else []
    words += ["--use-tp-pp-dp-mapping"] if order == "tp-pp-dp" else []
    if degrees.sequence_parallel and options.tp_keep_gathered:
        raise NotExpressible(f"{NAME} gathers the inputs of sequence parallelism again instead of keeping them")
    return words


def _pipeline_words(setting: Setting, degrees: Axes, say: Say) -> list[str]:
    if not degrees.schedule:
        return []
    options, chunks = setting.request.options, setting.request.options.vpp
    if degrees.schedule not in ("1f1b", "interleaved"):
        raise NotExpressible(f"{NAME} has the pipeline schedules 1F1B and interleaved 1F1B, not {degrees.schedule}")
    words: list[str] = []
    if chunks > 1:
        if not options.pp_overlap and degrees.pp < 3:
            raise NotExpressible(f"{NAME} interleaves on 2 stages only with overlapped sends")
        words += [] if options.pp_overlap else ["--no-overlap-p2p-communication"]
    elif options.pp_overlap:
        say("Megatron's 1F1B waits for its sends: simulate --no-pp-overlap for what it does")
    if degrees.tp > 1 and not degrees.sequence_parallel and not options.pp_scatter_gather:
        words.append("--no-scatter-gather-tensors-in-pipeline")
    return [*words, *_split_words(setting, degrees, chunks)]


def _split_words(setting: Setting, degrees: Axes, chunks: int) -> list[str]:
    """Which layers the stages have: even shares, or the layout in letters (E embedding, t layer, L loss)."""
    stages = stages_of(setting.network, setting.request.options, degrees.pp, degrees.schedule)
    counts = [sum(block.recomputable for block in piece) for piece in stages.pieces]
    heads = [any(not block.recomputable for block in piece) for piece in stages.pieces[1:]]
    if sum(heads) > 1:
        raise NotExpressible(f"{NAME} keeps the output layer and the loss on one stage")
    if len(set(counts)) == 1:
        return ["--num-virtual-stages-per-pipeline-rank", str(chunks)] if chunks > 1 else []
    letters = ["t" * count for count in counts]
    letters[0], letters[-1] = f"E{letters[0]}", f"{letters[-1]}L"
    return ["--pipeline-model-parallel-layout", "|".join(letters)]


def _data_words(degrees: Axes, training: TrainingSpec, options: Options, say: Say) -> list[str]:
    if degrees.sharding == "none":
        return []
    words = ["--overlap-grad-reduce"] if options.dp_overlap or degrees.sharding == "fsdp" else []
    if degrees.sharding in SHARDING:
        if degrees.sharding == "fsdp" and options.fsdp_unit == "model":
            raise NotExpressible("Megatron-FSDP gathers layer by layer, not the model as one unit")
        words += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", SHARDING[degrees.sharding],
                  "--use-distributed-optimizer", "--no-gradient-accumulation-fusion",
                  "--ckpt-format", "fsdp_dtensor"]  # fmt: skip
    elif degrees.sharding == "zero1":
        words.append("--use-distributed-optimizer")
    if degrees.replicas > 1 and degrees.sharding != "ddp":
        words += ["--num-distributed-optimizer-instances", str(degrees.replicas)]
    if options.dp_overlap and degrees.sharding in ("ddp", "zero1"):
        elements = options.ddp_bucket_bytes // training.policy.gradient_bytes
        words += ["--ddp-bucket-size", str(elements)]
    if degrees.sharding == "fsdp" and options.fsdp_prefetch:
        words.append("--overlap-param-gather")
    return words


def _precision_words(training: TrainingSpec) -> list[str]:
    if training.precision in ("fp16-pure", "bf16-pure"):
        raise NotExpressible(f"{NAME} keeps fp32 master weights, which {training.precision} is without")
    if training.precision == "tf32":
        raise NotExpressible(f"{NAME} has no flag for TF32: torch's own switch in the script turns it on")
    words = list(PRECISIONS[training.precision])
    if training.precision == "fp16":
        scale = f"{training.initial_loss_scale:g}" if training.scales_loss else "1"
        words += ["--initial-loss-scale" if training.dynamic_loss_scale else "--loss-scale", scale]
    elif training.scales_loss:
        raise NotExpressible(f"{NAME} scales the loss for fp16 only, not for {training.precision}")
    return words


def _training_words(training: TrainingSpec, model: ModelSpec, say: Say) -> list[str]:
    words = {
        "none": [],
        "selective": ["--recompute-granularity", "selective"],
        "full": [
            "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1",
        ],
    }[training.recompute]  # fmt: skip
    words += ["--attention-backend", {"flash": "flash", "materialised": "unfused"}[training.attention]]
    words += {
        "adam": ["--optimizer", "adam"],
        "adamw": ["--optimizer", "adam"],
        "sgd": ["--optimizer", "sgd", "--sgd-momentum", "0"],
        "sgd-momentum": ["--optimizer", "sgd", "--sgd-momentum", "0.9"],
    }[training.optimizer]
    words += ["--clip-grad", f"{training.clip_norm or 0:g}"]
    words += ["--hidden-dropout", f"{model.dropout:g}", "--attention-dropout", f"{model.dropout:g}"]
    if training.optimizer == "adam":
        say("Megatron's adam decays weights as AdamW does; --weight-decay 0 makes the two equal")
    return words
