"""DeepSpeed: the JSON configuration of a plan.

Names and rules are those of DeepSpeed 0.19.8 (deepspeed/runtime/config.py, constants.py, precision_config.py,
zero/config.py, tensor_parallel/config.py). The configuration knows batch, precision, optimizer, ZeRO and AutoTP; the
model, its sequences, recomputation and the stages of a pipeline are code there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rtp_sim.experiment import Setting
from rtp_sim.export.settings import Axes, NotExpressible, Settings, axes, global_batch, model_of, require_divides
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.options import Options

NAME = "DeepSpeed"
STAGES = {"none": 0, "ddp": 0, "zero1": 1, "zero2": 2, "fsdp": 3}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"type": "Adam", "params": {"adam_w_mode": False}},
    "adamw": {"type": "AdamW", "params": {}},
    "sgd": {"type": "SGD", "params": {"momentum": 0.0}},
    "sgd-momentum": {"type": "SGD", "params": {"momentum": 0.9}},
}
Say = Callable[[str], None]


def deepspeed(setting: Setting) -> Settings:
    """The JSON file. NotExpressible with what DeepSpeed's configuration lacks."""
    degrees, said = axes(setting), list[str]()
    training, options = setting.training, setting.request.options
    if degrees.schedule:
        raise NotExpressible(f"the stages of {NAME}'s pipelines are arguments of PipelineModule in code, not settings")
    if degrees.replicas > 1:
        raise NotExpressible(f"{NAME} shares shards over all data-parallel ranks ({degrees.dp}), not over groups of "
                             f"{degrees.shard}: MiCS, which did, has been removed")  # fmt: skip
    # Asked first: what it lacks altogether comes before what does not go together.
    split = {"tensor_parallel": _tensor_parallel(setting, degrees, said.append)} if degrees.tp > 1 else {}
    document: dict[str, Any] = {
        "train_batch_size": global_batch(setting, degrees),
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.num_microbatches,
        "gradient_clipping": training.clip_norm or 0.0,
        "optimizer": OPTIMIZERS[training.optimizer],
        **_precision(training, degrees),
        "zero_optimization": _zero(degrees, options, training), **split,
    }  # fmt: skip
    if training.recompute != "none":
        said.append(f"recompute {training.recompute} is code: the model calls deepspeed.checkpointing.checkpoint, or "
                    "gradient_checkpointing_enable() of Transformers")  # fmt: skip
    said.append(f"sequences of {training.seq_len} tokens and the attention ({training.attention}) are code")
    return Settings("deepspeed", "deepspeed.json", json.dumps(document, indent=2) + "\n", tuple(said))


def _zero(degrees: Axes, options: Options, training: TrainingSpec) -> dict[str, Any]:
    stage = STAGES[degrees.sharding]
    found: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        elements = options.ddp_bucket_bytes // training.policy.gradient_bytes
        found |= {"overlap_comm": options.dp_overlap, "reduce_bucket_size": elements, "allgather_bucket_size": elements}
    if stage == 3:
        if options.fsdp_unit == "model":
            raise NotExpressible(f"{NAME}'s ZeRO-3 gathers layer by layer, not the model as one unit")
        found["overlap_comm"] = True
        if not options.fsdp_prefetch:
            found["stage3_prefetch_bucket_size"] = 0
    return found


def _precision(training: TrainingSpec, degrees: Axes) -> dict[str, Any]:
    name = training.precision
    if name == "tf32":
        raise NotExpressible(f"{NAME} has no setting for TF32: torch's own switch in the script turns it on")
    if name == "fp8":
        raise NotExpressible(f"{NAME}'s configuration has no fp8 training")
    plain = STAGES[degrees.sharding] == 0
    if plain and name in ("bf16", "bf16-grad32"):
        raise NotExpressible(f"{NAME} without ZeRO keeps no fp32 master weights under bf16")
    if name == "fp16-pure":
        raise NotExpressible(f"{NAME} keeps Adam's moments in fp32 under fp16")
    if plain and name == "bf16-pure":
        return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    if name == "bf16-pure":
        return {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    if training.scales_loss and name != "fp16":
        raise NotExpressible(f"{NAME} scales the loss for fp16 only, not for {name}")
    if name == "fp16":
        return {"fp16": {"enabled": True, **_loss_scale(training)}, "data_types": {"grad_accum_dtype": "fp16"}}
    if name == "fp32":
        return {}
    dtype = {"bf16": "bf16", "bf16-grad32": "fp32"}[name]
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": dtype}, "communication_data_type": dtype}


def _loss_scale(training: TrainingSpec) -> dict[str, Any]:
    """0 is DeepSpeed's word for a dynamic scale, which starts at a power of two."""
    scale = training.initial_loss_scale if training.scales_loss else 1.0
    assert scale is not None
    if not training.dynamic_loss_scale:
        return {"loss_scale": scale}
    power = round(scale).bit_length() - 1
    if 2**power != scale:
        raise NotExpressible(f"{NAME}'s dynamic loss scale starts at a power of two, not at {scale:g}")
    return {"loss_scale": 0, "initial_scale_power": power}


def _tensor_parallel(setting: Setting, degrees: Axes, say: Say) -> dict[str, Any]:
    if degrees.sequence_parallel:
        raise NotExpressible(f"{NAME}'s AutoTP keeps activations whole: it has no sequence parallelism (tp-sp)")
    if degrees.sharding == "fsdp":
        raise NotExpressible(f"{NAME}'s AutoTP works with ZeRO stages 0 to 2")
    model = model_of(setting)
    require_divides("heads", model.num_heads, "tp", degrees.tp, NAME)
    say("AutoTP splits the layers of Hugging Face models; it does not split embeddings")
    return {"autotp_size": degrees.tp}
