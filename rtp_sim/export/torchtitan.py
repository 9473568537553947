"""torchtitan: the TOML file of a plan.

Names and rules are those of torchtitan 0.2.2 (torchtitan/config/job_config.py, models/llama3/infra/parallelize.py,
distributed/pipeline_parallel.py), the last release that reads TOML; 0.3 keeps the names of the fields and takes them
from Python. Its data parallelism under tensor or pipeline parallelism is FSDP alone, and mixed precision goes with
FSDP, so most of this program's pipelines have no counterpart there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from rtp_sim.experiment import Setting
from rtp_sim.export.settings import (
    Axes,
    NotExpressible,
    Settings,
    axes,
    global_batch,
    is_llama,
    model_of,
    require_divides,
)
from rtp_sim.model.spec import ModelSpec
from rtp_sim.schedule.strategies.pipeline import stages_of

NAME = "torchtitan"
FLAVORS = {"llama3-8b": "8B", "llama3-70b": "70B", "llama3-405b": "405B"}
"""What models/llama3/__init__.py registers, by the names of this program."""
SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zb-v": "ZBVZeroBubble"}
MULTIPLES = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)

Value = str | int | float | bool | list[list[str]]
Say = Callable[[str], None]


def torchtitan(setting: Setting) -> Settings:
    """The TOML file. NotExpressible with what torchtitan lacks."""
    degrees, model, said = axes(setting), model_of(setting), list[str]()
    training = setting.training
    if not is_llama(model) or model.tied_embeddings:
        raise NotExpressible(f"{NAME}'s dense models are Llamas with an output layer of their own, {model.name} is not")
    if degrees.sharding not in ("none", "ddp", "fsdp"):
        raise NotExpressible(f"{NAME} shards weights, gradients and optimizer together (FSDP): no {degrees.sharding}")
    tables: dict[str, dict[str, Value]] = {
        "model": {"name": "llama3", "flavor": _flavor(setting.request.model, model, said.append)},
        "optimizer": {"name": _optimizer(training.optimizer)},
        "training": {
            "local_batch_size": training.micro_batch * (training.num_microbatches if degrees.pp > 1 else 1),
            "global_batch_size": global_batch(setting, degrees), "seq_len": training.seq_len,
            **_precision(training.precision, degrees, said.append),
        },
        "parallelism": _parallelism(setting, degrees, model),
        "activation_checkpoint": _recompute(training.recompute, training.attention, said.append),
    }  # fmt: skip
    tables["training"]["max_norm"] = training.clip_norm if training.clip_norm is not None else 1e9
    if training.clip_norm is None:
        said.append("torchtitan always measures the gradient norm: a limit of 1e9 clips nothing, but takes its time")
    if training.scales_loss:
        raise NotExpressible(f"{NAME} does not scale the loss")
    if model.dropout:
        raise NotExpressible(f"{NAME}'s Llamas have no dropout")
    return Settings(NAME, "torchtitan.toml", to_toml(tables), tuple(said))


def to_toml(tables: Mapping[str, Mapping[str, Value]]) -> str:
    """Tables of plain values as TOML; strings and lists are written alike in JSON and TOML."""
    parts = []
    for name, table in tables.items():
        lines = [f"{key} = {value if _is_number(value) else json.dumps(value)}" for key, value in table.items()]
        parts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flavor(name: str, model: ModelSpec, say: Say) -> str:
    if name in FLAVORS:
        return FLAVORS[name]
    ffn = _ffn_arguments(model)
    heads = f"n_heads={model.num_heads}, n_kv_heads={model.num_kv_heads}"
    flavor = model.name
    say(
        f"register the flavor in torchtitan/models/llama3/__init__.py: llama3_args[{json.dumps(flavor)}] = "
        f"TransformerModelArgs(dim={model.hidden_size}, n_layers={model.num_layers}, {heads}, "
        f"vocab_size={model.vocab_size}, {ffn})"
    )
    return flavor


def _ffn_arguments(model: ModelSpec) -> str:
    """The arguments that give the MLP its width: `multiple_of`, and a multiplier where the usual width is another.

    torchtitan rounds int(multiplier x int(8 hidden / 3)) up to a multiple (models/llama3/model/model.py, FeedForward).
    """
    if model.head_dim * model.num_heads != model.hidden_size:
        raise NotExpressible(f"{NAME}'s heads share the hidden size; {model.name} has heads of {model.head_dim}")
    usual, wanted = int(8 * model.hidden_size / 3), model.ffn_hidden_size
    for multiple in MULTIPLES:
        if -(-usual // multiple) * multiple == wanted:
            return f"multiple_of={multiple}"
    # Half a feature more, so that int() ends at the width whatever the product rounds to.
    multiplier = round((wanted + 0.5) / usual, 9)
    multiple = next(m for m in MULTIPLES if wanted % m == 0)
    return f"multiple_of={multiple}, ffn_dim_multiplier={multiplier}"


def _optimizer(name: str) -> str:
    names = {"adam": "Adam", "adamw": "AdamW"}
    if name not in names:
        raise NotExpressible(f"{NAME} has the optimizers Adam and AdamW, not {name}")
    return names[name]


def _precision(name: str, degrees: Axes, say: Say) -> dict[str, Value]:
    if name == "fp32":
        return {"dtype": "float32", "mixed_precision_param": "float32"}
    if name == "bf16-pure":
        return {"dtype": "bfloat16", "mixed_precision_param": "bfloat16"}
    if name not in ("bf16", "bf16-grad32"):
        raise NotExpressible(f"{NAME} trains in bfloat16 or float32, not in {name}")
    if degrees.sharding != "fsdp" and degrees.tp * degrees.pp > 1:
        raise NotExpressible(f"{NAME} mixes precisions under tensor or pipeline parallelism only with FSDP on the "
                             "data-parallel axis")  # fmt: skip
    if degrees.sharding != "fsdp":
        say("without FSDP torchtitan keeps fp32 weights and gradients and casts to bf16 (autocast)")
    elif name == "bf16":
        say("torchtitan reduces gradients in fp32, twice the bytes of the plan: bf16-grad32 is closer to it")
    return {"dtype": "float32", "mixed_precision_param": "bfloat16", "mixed_precision_reduce": "float32"}


def _parallelism(setting: Setting, degrees: Axes, model: ModelSpec) -> dict[str, Value]:
    if degrees.tp > 1 and not degrees.sequence_parallel:
        raise NotExpressible(f"{NAME}'s tensor parallelism comes with sequence parallelism (tp-sp)")
    if degrees.sharding == "ddp" and degrees.tp * degrees.pp > 1:
        raise NotExpressible(f"{NAME} has plain data parallelism alone, not beside tensor or pipeline parallelism")
    if degrees.sharding == "fsdp" and setting.request.options.fsdp_unit == "model":
        raise NotExpressible(f"{NAME} shards block by block, not the model as one unit")
    for what, size in (("heads", model.num_heads), ("key and value heads", model.num_kv_heads),
                       ("the sequence", setting.training.seq_len)):  # fmt: skip
        require_divides(what, size, "tp", degrees.tp, NAME)
    if setting.layout.order != "tp-dp-pp":
        raise NotExpressible(f"{NAME} puts pipeline stages farthest apart, not as in {setting.layout.order}")
    replicate = degrees.dp if degrees.sharding == "ddp" else degrees.replicas
    found: dict[str, Value] = {
        "data_parallel_replicate_degree": replicate, "data_parallel_shard_degree": degrees.dp // replicate,
        "tensor_parallel_degree": degrees.tp, "pipeline_parallel_degree": degrees.pp,
    }  # fmt: skip
    if degrees.sharding == "fsdp":
        found["fsdp_reshard_after_forward"] = "always"
    return found | (_pipeline(setting, degrees) if degrees.schedule else {})


def _pipeline(setting: Setting, degrees: Axes) -> dict[str, Value]:
    if degrees.schedule not in SCHEDULES:
        raise NotExpressible(f"{NAME} has the pipeline schedules {', '.join(SCHEDULES)}, not {degrees.schedule}")
    stages = stages_of(setting.network, setting.request.options, degrees.pp, degrees.schedule)
    counts = [sum(block.recomputable for block in piece) for piece in stages.pieces]
    if any(not block.recomputable for piece in stages.pieces[1:-1] for block in piece):
        raise NotExpressible(f"{NAME} keeps norm and output layer on the last stage")
    starts = [sum(counts[:k]) for k in range(len(counts))]
    pieces = [[f"layers.{i}" for i in range(start, start + n)] for start, n in zip(starts, counts, strict=True)]
    pieces[0], pieces[-1] = ["tok_embeddings", *pieces[0]], [*pieces[-1], "norm", "output"]
    return {
        "pipeline_parallel_schedule": SCHEDULES[degrees.schedule],
        "pipeline_parallel_microbatch_size": setting.training.micro_batch,
        "module_fqns_per_model_part": pieces,
    }


def _recompute(recompute: str, attention: str, say: Say) -> dict[str, Value]:
    if attention == "materialised":
        raise NotExpressible(f"{NAME} computes attention fused, it does not write the scores out")
    if recompute == "selective":
        # With fused attention there are no scores to recompute: the plan keeps everything.
        say("selective recompute of fused attention recomputes nothing in the plan: none is set")
    return {"mode": "full" if recompute == "full" else "none"}
