"""Accelerate: the configuration file of `accelerate launch`, with its FSDP2 plugin.

Names and rules are those of Accelerate 1.15.0 (accelerate/commands/config/cluster.py and config_args.py,
utils/dataclasses.py, parallelism_config.py). Batch, sequences and accumulated micro-batches are arguments in code
there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from rtp_sim.experiment import Setting
from rtp_sim.export.settings import Axes, NotExpressible, Settings, axes, model_of, require_divides
from rtp_sim.schedule.options import Options

NAME = "Accelerate"
PRECISIONS = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}

Value = str | int | bool
Tree = Mapping[str, "Value | Mapping[str, Value]"]
Say = Callable[[str], None]


def accelerate(setting: Setting) -> Settings:
    """The YAML file. NotExpressible with what Accelerate lacks."""
    degrees, said = axes(setting), list[str]()
    training, cluster = setting.training, setting.cluster
    if degrees.schedule:
        raise NotExpressible(f"{NAME}'s FSDP knows no pipelines for training")
    if training.precision not in PRECISIONS:
        raise NotExpressible(f"{NAME}'s mixed precision is no, bf16, fp16 or fp8, not {training.precision}")
    tree: dict[str, Value | Mapping[str, Value]] = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": _distributed_type(degrees),
        "mixed_precision": PRECISIONS[training.precision], "num_machines": cluster.nodes,
        "num_processes": cluster.world_size, "machine_rank": 0, "main_training_function": "main",
        "rdzv_backend": "static" if cluster.nodes == 1 else "c10d", "same_network": True, "use_cpu": False,
    }  # fmt: skip
    if degrees.sharding in ("fsdp", "zero2"):
        tree["fsdp_config"] = _fsdp(setting, degrees, setting.request.options, said.append)
        if degrees.replicas > 1 or degrees.tp > 1:
            tree["parallelism_config"] = _parallelism(setting, degrees, said.append)
    elif degrees.tp > 1 or degrees.sharding == "zero1":
        what = "tensor parallelism without FSDP" if degrees.tp > 1 else "ZeRO-1 (DeepSpeed has)"
        raise NotExpressible(f"{NAME}'s FSDP configuration has no {what}")
    elif training.recompute != "none":
        said.append("recompute is code: gradient_checkpointing_enable() of Transformers")
    if cluster.nodes > 1:
        said.append("accelerate launch wants --main_process_ip, --main_process_port and, on each node, --machine_rank")
    if training.precision == "tf32":
        said.append("TF32 is code: torch.backends.cuda.matmul.allow_tf32 = True")
    said.append(f"in code: batches of {training.micro_batch} sequences of {training.seq_len} tokens, "
                f"Accelerator(gradient_accumulation_steps={training.num_microbatches}), optimizer {training.optimizer}"
                + (f", clip_grad_norm_({training.clip_norm:g})" if training.clip_norm else ""))  # fmt: skip
    return Settings("accelerate", "accelerate.yaml", to_yaml(tree), tuple(said))


def to_yaml(tree: Tree, indent: str = "") -> str:
    """Nested mappings of plain values as YAML; strings in quotes, so that `no` stays a word."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{to_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
    return "".join(lines)


def _distributed_type(degrees: Axes) -> str:
    return {"none": "NO", "ddp": "MULTI_GPU"}.get(degrees.sharding, "FSDP")


def _fsdp(setting: Setting, degrees: Axes, options: Options, say: Say) -> dict[str, Value]:
    if degrees.sharding == "zero2":
        say("weights are sharded between steps and gathered once a micro-batch; the plan gathers them once a step")
    if not options.fsdp_prefetch and degrees.sharding == "fsdp":
        say("FSDP2 prefetches the next unit's weights, the plan does not")
    recompute = setting.training.recompute
    if recompute == "selective":
        say("Accelerate recomputes whole blocks or nothing: none is set for selective recompute")
    whole = options.fsdp_unit == "model" and degrees.sharding == "fsdp"
    if not whole:
        say("the class of the model's blocks is found by Transformers (_no_split_modules); for other models give "
            "fsdp_transformer_layer_cls_to_wrap")  # fmt: skip
    return {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": degrees.sharding == "fsdp",
        "fsdp_auto_wrap_policy": "NO_WRAP" if whole else "TRANSFORMER_BASED_WRAP",
        "fsdp_activation_checkpointing": recompute == "full",
        "fsdp_offload_params": False,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }


def _parallelism(setting: Setting, degrees: Axes, say: Say) -> dict[str, Value]:
    if degrees.sequence_parallel:
        raise NotExpressible(f"{NAME}'s tensor parallelism is the model's own plan, without sequence parallelism")
    if degrees.tp > 1:
        require_divides("heads", model_of(setting).num_heads, "tp", degrees.tp, NAME)
        say("tensor parallelism follows the model's own plan in Transformers (tp_plan)")
    return {
        "parallelism_config_dp_replicate_size": degrees.replicas,
        "parallelism_config_dp_shard_size": degrees.shard,
        "parallelism_config_tp_size": degrees.tp,
        "parallelism_config_cp_size": 1,
    }
