"""Plans as settings of frameworks: commands parse back to their request, files hold the plan's numbers as worked out by
hand, and what a framework lacks is said.

The frameworks' own readers are not installed here; docs/exports.md says with which versions the files were read.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import Answer, documented_keys

from rtp_sim import commands
from rtp_sim.cli import main, parser
from rtp_sim.experiment import Request, settle
from rtp_sim.export.command import simulate_command, workload_flags
from rtp_sim.export.settings import NotExpressible, Settings
from rtp_sim.export.targets import TARGETS, export
from rtp_sim.export.torchtitan import torchtitan
from rtp_sim.flags.plan import EXPORTS
from rtp_sim.model.presets import PRESETS
from rtp_sim.model.spec import ModelSpec, with_overrides
from rtp_sim.schedule.options import MIB, Options

NODE = {"cluster": "dgx-a100-80g", "gpus": 8}
LLAMA = {"model": "llama2-7b", "seq_len": 4096}
REQUESTS = [
    Request("gpt2-xl", strategy="rtp", inner=8, micro_batch=4, options=Options(rtp_prefetch=True, rtp_ring="flat"),
            **NODE),
    Request("gpt2-xl", strategy="rtp-inplace", options=Options(rtp_chunk_bytes=8 * MIB), **NODE),
    Request("gpt2-xl", strategy="rtp", inner=4, dp=2, options=Options(dp_sync="zero2", rtp_fuse_mlp=True), **NODE),
    Request("gpt2-xl", strategy="ddp", dropout=0.1, clip_norm=1.5, precision="fp16", loss_scale="dynamic:1024", **NODE),
    Request("gpt2-xl", strategy="fsdp", recompute="full", global_batch=64, micro_batch=2, optimizer="sgd",
            options=Options(fsdp_unit="model", fsdp_prefetch=False), **NODE),
    Request(strategy="hsdp", inner=4, cluster="dgx-h100", nodes=2, **LLAMA),
    Request(strategy="zero1", options=Options(zero1_size=4, ddp_bucket_bytes=50 * MIB, dp_overlap=False), **LLAMA,
            **NODE),
    Request(strategy="interleaved", pp=4, inner=2, micro_batches=8, order="tp-pp-dp", attention="materialised",
            options=Options(vpp=2, dp_sync="zero1", sequence_parallel=True), cluster="dgx-h100", nodes=2, **LLAMA),
    Request(strategy="1f1b", pp=4, micro_batches=3, cluster="dgx-h100", nodes=1, options=Options(
        pp_layers=(7, 8, 9, 8), pp_overlap=False, pp_scatter_gather=True), **LLAMA),
]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process."""

    def call(line: str) -> Answer:
        code = main(shlex.split(line))
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


def made(request: Request, target: str) -> Settings:
    found = export(settle(request), [target])[target]
    assert isinstance(found, Settings), found
    return found


def words(text: str) -> dict[str, list[str]]:
    """Flag -> its values, of the last command of a shell script."""
    found: dict[str, list[str]] = {}
    last = ""
    for word in shlex.split(text.replace("\\\n", " ")):
        if word.startswith("-"):
            assert word not in found, f"{word} is given twice"
            found[last := word] = []
        else:
            found.setdefault(last, []).append(word)
    return found


# ---- this program's own commands


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.strategy)
def test_commands_parse_back_to_the_request(request_: Request):
    a = parser().parse_args(shlex.split(simulate_command(request_))[1:])
    assert commands.request_of(a, a.strategy) == request_
    setting = settle(request_)
    line = made(request_, "run").text.splitlines()[0]
    a = parser().parse_args(shlex.split(line)[1:])
    a.cluster, a.gpus, a.nodes = "", None, None
    assert commands.request_of(a, a.strategy) == replace(request_, cluster="", gpus=None, nodes=None)
    assert (a.nproc_per_node, a.as_nodes) == (setting.cluster.world_size, setting.cluster.nodes)
    assert a.prepare == (setting.cluster.nodes > 1)


def test_every_option_has_a_flag_or_is_named():
    """An option that is added without a flag must not vanish from commands."""
    plain, silent = Options(), {"ddp_first_bucket_bytes", "fsdp_split_gradients", "dp_copy", "gradient_buffer",
                                "gradient_local", "tp_keep_gathered", "tp_overlap", "optimizer_scratch",
                                "fsdp_gather_again", "pp_synchronised",
                                "zero1_all_reduce"}  # fmt: skip
    chosen: dict[str, Any] = {
        "fsdp_unit": "model", "rtp_ring": "flat", "dp_sync": "zero2", "pp_balance": "cost", "pp_layers": (1, 2),
    }  # fmt: skip
    for field in fields(Options):
        value = getattr(plain, field.name)
        other = chosen.get(field.name) or (not value if isinstance(value, bool) else value + MIB)
        request = Request("gpt2", "dgx-a100-80g", "ddp", options=replace(plain, **{field.name: other}))
        if field.name in silent:
            with pytest.raises(NotExpressible, match=field.name):
                workload_flags(request)
        else:
            a = parser().parse_args(shlex.split(simulate_command(request))[1:])
            assert commands.request_of(a, "ddp").options == request.options


def test_an_exported_command_is_accepted_by_the_executor(run: Any, tmp_path: Path):
    plan = "--model gpt2-tiny --strategy 1f1b --pp 2 --gpus 4 --micro-batches 2 --cluster cpu-local"
    answer = run(f"export --to run {plan}")
    assert answer.out.endswith("--nproc-per-node 4 --device cpu -o run1\n")
    line = answer.out.replace("rtp-sim ", "").replace("-o run1", f"-o {tmp_path / 'run1'} --prepare")
    prepared = run(line)
    assert (prepared.code, prepared.out.split()[:3]) == (0, ["torchrun", "--nproc-per-node", "4"])
    assert (tmp_path / "run1" / "schedule.json").exists()


# ---- Megatron-LM


def test_megatron_has_the_plan_in_its_flags():
    request = Request(
        strategy="interleaved", pp=4, inner=2, global_batch=64, clip_norm=1.0, recompute="full", cluster="dgx-h100",
        nodes=2, options=Options(vpp=2, dp_sync="zero1", sequence_parallel=True), **LLAMA,
    )  # fmt: skip
    settings = made(request, "megatron")
    assert settings.text.startswith("export CUDA_DEVICE_MAX_CONNECTIONS=1\ntorchrun --nproc-per-node 8 --nnodes 2 ")
    found = words(settings.text.split("pretrain_gpt.py")[1])
    # 16 GPUs are tp 2 x pp 4 x dp 2. 25 MiB of bf16 gradients are 13,107,200 of them. Llama-2 7B as published.
    assert found == {flag: value.split() for flag, value in {
        "--num-layers": "32", "--hidden-size": "4096", "--ffn-hidden-size": "11008", "--num-attention-heads": "32",
        "--seq-length": "4096", "--max-position-embeddings": "4096", "--vocab-size": "32000",
        "--make-vocab-size-divisible-by": "1", "--normalization": "RMSNorm", "--position-embedding-type": "rope",
        "--swiglu": "", "--disable-bias-linear": "", "--untie-embeddings-and-output-weights": "",
        "--micro-batch-size": "1", "--global-batch-size": "64", "--tensor-model-parallel-size": "2",
        "--pipeline-model-parallel-size": "4", "--sequence-parallel": "",
        "--num-virtual-stages-per-pipeline-rank": "2", "--overlap-grad-reduce": "", "--use-distributed-optimizer": "",
        "--ddp-bucket-size": "13107200", "--bf16": "", "--grad-reduce-in-bf16": "", "--recompute-granularity": "full",
        "--recompute-method": "uniform", "--recompute-num-layers": "1", "--attention-backend": "flash",
        "--optimizer": "adam", "--clip-grad": "1", "--hidden-dropout": "0", "--attention-dropout": "0",
    }.items()}  # fmt: skip


def megatron_flags(**changes: Any) -> dict[str, list[str]]:
    return words(made(Request(**({**NODE, **LLAMA} | changes)), "megatron").text.split("pretrain_gpt.py")[1])


def test_megatron_uneven_stages_are_a_layout():
    # 7 + 8 + 9 + 8 layers; the embedding before the first, the loss behind the last.
    found = megatron_flags(strategy="1f1b", pp=4, micro_batches=2, options=Options(pp_layers=(7, 8, 9, 8)))
    assert found["--pipeline-model-parallel-layout"] == [f"E{'t' * 7}|{'t' * 8}|{'t' * 9}|{'t' * 8}L"]
    assert "--pipeline-model-parallel-layout" not in megatron_flags(strategy="1f1b", pp=4)


def test_megatron_sharding():
    assert megatron_flags(strategy="zero2")["--data-parallel-sharding-strategy"] == ["optim_grads"]
    assert "--overlap-param-gather" in megatron_flags(strategy="fsdp")
    hybrid = megatron_flags(strategy="hsdp", inner=2)
    assert hybrid["--data-parallel-sharding-strategy"] == ["optim_grads_params"]
    # 8 ranks in groups of 2: four copies.
    assert hybrid["--num-distributed-optimizer-instances"] == ["4"]
    grouped = megatron_flags(strategy="zero1", options=Options(zero1_size=4))
    assert grouped["--num-distributed-optimizer-instances"] == ["2"]
    assert "--num-distributed-optimizer-instances" not in megatron_flags(strategy="ddp")
    # A bucket of 25 MiB holds 6,553,600 fp32 gradients; without overlap everything is reduced at once.
    assert megatron_flags(strategy="ddp", precision="bf16-grad32")["--ddp-bucket-size"] == ["6553600"]
    assert "--ddp-bucket-size" not in megatron_flags(strategy="ddp", options=Options(dp_overlap=False))


def test_megatron_pads_the_vocabulary_and_says_so():
    notes = made(Request("gpt2-xl", strategy="tp", inner=5, cluster="dgx-a100-80g", gpus=5), "megatron").notes
    assert "Megatron pads the vocabulary from 50257 to a multiple of 5" in notes


def test_megatron_loss_scales():
    assert megatron_flags(strategy="ddp", precision="fp16")["--loss-scale"] == ["1"]
    found = megatron_flags(strategy="ddp", precision="fp16", loss_scale="dynamic:1024")
    assert (found["--initial-loss-scale"], "--loss-scale" in found) == (["1024"], False)


# ---- torchtitan


def toml_of(**changes: Any) -> dict[str, Any]:
    return tomllib.loads(made(Request(**({**NODE, **LLAMA} | changes)), "torchtitan").text)


def test_torchtitan_has_the_plan_in_its_toml():
    found = toml_of(
        model="llama3-8b", cluster="dgx-h100", nodes=2, gpus=None, strategy="hsdp", inner=8, micro_batch=2,
        global_batch=64, clip_norm=1.0, recompute="full",
    )  # fmt: skip
    assert found == {
        "model": {"name": "llama3", "flavor": "8B"},
        "optimizer": {"name": "AdamW"},
        "training": {
            "local_batch_size": 2, "global_batch_size": 64, "seq_len": 4096, "dtype": "float32",
            "mixed_precision_param": "bfloat16", "mixed_precision_reduce": "float32", "max_norm": 1.0,
        },
        "parallelism": {
            "data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 8, "tensor_parallel_degree": 1,
            "pipeline_parallel_degree": 1, "fsdp_reshard_after_forward": "always",
        },
        "activation_checkpoint": {"mode": "full"},
    }  # fmt: skip


def test_torchtitan_pipelines_name_the_modules_of_every_stage():
    found = toml_of(
        strategy="zb-v", pp=8, micro_batches=16, precision="fp32", options=Options(pp_layers=(1, *(2,) * 14, 3))
    )["parallelism"]
    assert found["pipeline_parallel_schedule"] == "ZBVZeroBubble"
    parts = found["module_fqns_per_model_part"]
    assert (len(parts), parts[0], parts[1]) == (16, ["tok_embeddings", "layers.0"], ["layers.1", "layers.2"])
    assert parts[-1] == ["layers.29", "layers.30", "layers.31", "norm", "output"]


def width(hidden: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """The MLP's width as torchtitan 0.2.2 rounds it."""
    features = int(2 * (4 * hidden) / 3)
    features = features if ffn_dim_multiplier is None else int(ffn_dim_multiplier * features)
    return multiple_of * ((features + multiple_of - 1) // multiple_of)


def registered(model: ModelSpec) -> int:
    from rtp_sim.export.torchtitan import _ffn_arguments

    return int(eval(f"width({model.hidden_size}, {_ffn_arguments(model)})", {"width": width}))


@given(st.integers(1, 64).map(lambda n: 64 * n), st.integers(1, 30_000))
def test_torchtitan_flavors_get_the_width_of_the_model(hidden: int, ffn: int):
    model = with_overrides(PRESETS["llama2-7b"], {"hidden_size": hidden, "num_heads": hidden // 64,
                                                  "num_kv_heads": hidden // 64, "ffn_hidden_size": ffn})  # fmt: skip
    assert registered(model) == ffn


def test_torchtitan_flavors_of_the_presets():
    for name in ("llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "llama3-70b", "llama3-405b"):
        assert registered(PRESETS[name]) == PRESETS[name].ffn_hidden_size
    notes = torchtitan(settle(Request(strategy="fsdp", **LLAMA, **NODE))).notes
    (note,) = [n for n in notes if n.startswith("register")]
    assert 'llama3_args["llama2-7b"] = TransformerModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ' in note


# ---- DeepSpeed and Accelerate


def test_deepspeed_has_the_plan_in_its_json():
    request = Request(
        strategy="zero1", micro_batch=2, global_batch=64, clip_norm=0.5, precision="bf16-grad32", **LLAMA, **NODE
    )
    assert json.loads(made(request, "deepspeed").text) == {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {}}, "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 1, "overlap_comm": True, "reduce_bucket_size": 6553600, "allgather_bucket_size": 6553600,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", {"loss_scale": 1.0}),
        ("static:256", {"loss_scale": 256.0}),
        ("dynamic", {"loss_scale": 0, "initial_scale_power": 16}),
        ("dynamic:1024", {"loss_scale": 0, "initial_scale_power": 10}),
    ],
)
def test_deepspeed_loss_scales(scale: str, expected: dict[str, float]):
    request = Request("gpt2", strategy="zero2", precision="fp16", loss_scale=scale, **NODE)
    assert json.loads(made(request, "deepspeed").text)["fp16"] == {"enabled": True, **expected}


def test_accelerate_has_the_plan_in_its_yaml():
    request = Request("gpt2-xl", strategy="hsdp", inner=4, recompute="full", micro_batch=3, global_batch=48, **NODE)
    settings = made(request, "accelerate")
    assert settings.text == (
        'compute_environment: "LOCAL_MACHINE"\ndistributed_type: "FSDP"\nmixed_precision: "bf16"\nnum_machines: 1\n'
        'num_processes: 8\nmachine_rank: 0\nmain_training_function: "main"\nrdzv_backend: "static"\n'
        "same_network: true\nuse_cpu: false\nfsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n"
        '  fsdp_auto_wrap_policy: "TRANSFORMER_BASED_WRAP"\n  fsdp_activation_checkpointing: true\n'
        "  fsdp_offload_params: false\n  fsdp_cpu_ram_efficient_loading: true\n"
        '  fsdp_state_dict_type: "SHARDED_STATE_DICT"\nparallelism_config:\n'
        "  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 4\n"
        "  parallelism_config_tp_size: 1\n  parallelism_config_cp_size: 1\n"
    )
    # 48 sequences over 8 ranks of 3 each are 2 micro-batches.
    assert any("batches of 3 sequences" in n and "gradient_accumulation_steps=2" in n for n in settings.notes)


# ---- what cannot be said


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        ("megatron", {"strategy": "rtp"}, "no training framework has rotated tensor parallelism"),
        ("deepspeed", {"strategy": "rtp-inplace"}, "no training framework has rotated tensor parallelism"),
        ("megatron", {"strategy": "zb-h1", "pp": 8}, "1F1B and interleaved 1F1B, not zb-h1"),
        ("megatron", {"strategy": "tp", "model": "gpt2-xl", "seq_len": None}, "25 do not divide by tp=8"),
        ("megatron", {"strategy": "ddp", "model": "opt-6.7b", "seq_len": None}, "no flags for ReLU"),
        ("megatron", {"strategy": "ddp", "precision": "bf16-pure"}, "keeps fp32 master weights"),
        ("torchtitan", {"strategy": "zero1"}, "(FSDP): no zero1"),
        ("torchtitan", {"strategy": "fsdp", "model": "gpt2-xl", "seq_len": None}, "dense models are Llamas"),
        ("torchtitan", {"strategy": "tp-sp"}, "only with FSDP on the data-parallel axis"),
        ("torchtitan", {"strategy": "tp", "precision": "fp32"}, "comes with sequence parallelism"),
        ("torchtitan", {"strategy": "zb-h2", "pp": 8, "precision": "fp32"}, "not zb-h2"),
        ("deepspeed", {"strategy": "1f1b", "pp": 8}, "arguments of PipelineModule in code"),
        ("deepspeed", {"strategy": "hsdp", "inner": 4}, "not over groups of 4"),
        ("deepspeed", {"strategy": "ddp"}, "without ZeRO keeps no fp32 master weights"),
        ("deepspeed", {"strategy": "tp-sp"}, "has no sequence parallelism"),
        ("accelerate", {"strategy": "1f1b", "pp": 8}, "knows no pipelines"),
        ("accelerate", {"strategy": "zero1"}, "has no ZeRO-1"),
        ("accelerate", {"strategy": "tp"}, "no tensor parallelism without FSDP"),
    ],
)
def test_what_a_framework_lacks_is_one_sentence(target: str, changes: dict[str, Any], reason: str):
    found = export(settle(Request(**({**NODE, **LLAMA} | changes))), [target])[target]
    assert isinstance(found, str)
    assert reason in found


# ---- the command


def test_export_writes_files_and_says_what_it_left_out(run: Any, tmp_path: Path):
    answer = run(f"export --to all --model llama2-7b --strategy fsdp --gpus 8 -o {tmp_path}")
    assert answer.code == 0
    names = ["run.sh", "megatron.sh", "torchtitan.toml", "deepspeed.json", "accelerate.yaml"]
    assert answer.out.splitlines() == [str(tmp_path / name) for name in names]
    assert json.loads((tmp_path / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    answer = run("export --to megatron,deepspeed --model llama2-7b --strategy rtp --gpus 8")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.count("no training framework has rotated tensor parallelism") == 2


def test_export_as_json(run: Any):
    answer = run("export --to run,accelerate --model llama2-7b --strategy rtp --gpus 8 --format json")
    document = json.loads(answer.out)
    assert list(document) == documented_keys("export")
    assert [list(target) for target in document["targets"]] == [documented_keys("An export")] * 2
    assert (document["targets"][0]["reason"], document["targets"][1]["text"]) == (None, None)


def test_export_names_an_unknown_target(run: Any):
    assert tuple(TARGETS) == EXPORTS
    answer = run("export --to megatorn --model gpt2 --strategy ddp")
    assert (answer.code, answer.out) == (2, "")
    assert "--to megatorn: unknown target 'megatorn'" in answer.err
