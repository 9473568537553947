"""Hugging Face config files: published counts from published configs, key families, every way to be wrong.

The key sets below are the ones the released config.json files have, cut down to the keys that matter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_sim.errors import InputError
from rtp_sim.model.huggingface import read_model
from rtp_sim.model.presets import find_model

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
}
GPT_NEO = {
    "model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
    "intermediate_size": None, "max_position_embeddings": 2048, "window_size": 256,
    "attention_types": [[["global", "local"], 12]], "activation_function": "gelu_new",
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "ffn_dim": 16384, "max_position_embeddings": 2048,
    "do_layer_norm_before": True, "word_embed_proj_dim": 4096, "activation_function": "relu",
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24,
    "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 512,
    "type_vocab_size": 2, "hidden_act": "gelu",
}  # fmt: skip
ROBERTA = {
    **BERT, "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514,
    "type_vocab_size": 1, "architectures": ["RobertaForMaskedLM"],
}  # fmt: skip
LLAMA2 = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA32_1B = {
    **LLAMA2, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "head_dim": 64, "intermediate_size": 8192, "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL = {
    **LLAMA2, "model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "sliding_window": 4096,
}  # fmt: skip
QWEN2_7B = {
    **LLAMA2, "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "sliding_window": 131072, "use_sliding_window": False,
}  # fmt: skip
GEMMA_7B = {
    "model_type": "gemma", "vocab_size": 256000, "hidden_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "intermediate_size": 24576,
    "max_position_embeddings": 8192, "hidden_act": "gelu", "rms_norm_eps": 1e-6,
}  # fmt: skip
MIXTRAL = {
    **LLAMA2, "model_type": "mixtral", "num_key_value_heads": 8, "intermediate_size": 14336,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    "sliding_window": None,
}  # fmt: skip


def write(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_model(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (GPT2, 124_439_808),
        (GPT_NEO, 1_315_575_808),
        (OPT, 6_658_473_984),
        (BERT, 335_141_888),
        (ROBERTA, 124_697_433),  # roberta-base with its language-model head
        (LLAMA2, 6_738_415_616),
        (LLAMA32_1B, 1_235_814_400),
        (MISTRAL, 7_241_732_096),
        (QWEN2_7B, 7_615_616_512),
        (GEMMA_7B, 8_537_680_896),
        (MIXTRAL, 46_702_792_704),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_counts(tmp_path: Path, config: dict[str, Any], parameters: int) -> None:
    assert read_model(write(tmp_path, config)).parameter_count() == parameters


@pytest.mark.parametrize(
    ("config", "name"),
    [(GPT_NEO, "gpt-neo-1.3b"), (OPT, "opt-6.7b"), (BERT, "bert-large"), (LLAMA2, "llama2-7b")],
)
def test_same_as_the_preset(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    spec = find_model(write(tmp_path, {**config, "_name_or_path": f"hub/{name}"}))
    preset = find_model(name)
    if name == "gpt-neo-1.3b":  # both note the local layers, in their own words
        assert "256 tokens" in spec.notes[0]
        spec, preset = find_model(tmp_path, name=name, notes=()), find_model(name, notes=())
    assert spec == preset


def test_name_is_the_files_or_the_folders(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    assert read_model(write(folder, GPT2)).name == "checkpoint-7"
    assert read_model(write(folder, {**GPT2, "_name_or_path": "org/my-gpt"})).name == "my-gpt"


def test_gpt2_inner_size_and_untied_output(tmp_path: Path) -> None:
    spec = read_model(write(tmp_path, {**GPT2, "n_inner": 1000, "tie_word_embeddings": False}))
    assert (spec.ffn_hidden_size, spec.parameter_breakdown()["head"]) == (1000, 50257 * 768)


def test_biases_of_llama_relatives(tmp_path: Path) -> None:
    llama = read_model(write(tmp_path, {**LLAMA2, "attention_bias": True, "mlp_bias": True}))
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias) == (True, True, True)
    qwen = read_model(write(tmp_path, QWEN2_7B))
    assert (qwen.qkv_bias, qwen.out_bias, qwen.mlp_bias) == (True, False, False)


def test_sliding_windows_are_noted_where_they_bite(tmp_path: Path) -> None:
    assert "4096 tokens" in read_model(write(tmp_path, MISTRAL)).notes[0]
    assert read_model(write(tmp_path, QWEN2_7B)).notes == ()


def test_bert_for_masked_lm_has_a_head_and_no_pooler(tmp_path: Path) -> None:
    spec = read_model(write(tmp_path, {**BERT, "architectures": ["BertForMaskedLM"]}))
    assert (spec.has_head, spec.head_transform, spec.lm_head_bias, spec.pooler) == (True, True, True, False)


@pytest.mark.parametrize("config", [GPT2, OPT, BERT, LLAMA2, MIXTRAL], ids=lambda c: c["model_type"])
def test_unknown_types_are_read_by_their_keys(tmp_path: Path, config: dict[str, Any]) -> None:
    known = read_model(write(tmp_path, config))
    assert read_model(write(tmp_path, {**config, "model_type": "mine"})) == known
    assert read_model(write(tmp_path, {k: v for k, v in config.items() if k != "model_type"})) == known


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "t5", "d_model": 512}, ["'t5'", "no family", "gpt2, gpt_neo, opt, bert"]),
        ({"hidden_size": 3}, ["no family"]),
        ({"model_type": ["gpt2"]}, ["['gpt2']", "no family"]),
        ({**BERT, "model_type": "deberta-v2", "relative_attention": True}, ["relative positions"]),
        ({**GPT2, **LLAMA2, "model_type": "both"}, ["several families"]),
        ({**GPT2, "model_type": "gptj", "rotary_dim": 64}, ["'gptj'", "'rotary_dim'", "GPT-J"]),
        ({**LLAMA2, "model_type": "deepseek_v2", "kv_lora_rank": 512}, ["'kv_lora_rank'"]),
        ({**LLAMA2, "model_type": "qwen3"}, ["'qwen3'", "norms of queries and keys"]),
        ({**LLAMA2, "hidden_act": "quick_gelu"}, ["'quick_gelu'", "gelu_new"]),
        ({**LLAMA2, "num_key_value_heads": 5}, ["num_kv_heads is 5", "num_heads = 32"]),
        ({**LLAMA2, "hidden_size": "4096"}, ["'hidden_size' is \"4096\"", "for example 4096"]),
        ({**LLAMA2, "num_hidden_layers": 0}, ["'num_hidden_layers' is 0", "greater than or equal to 1"]),
        ({**OPT, "word_embed_proj_dim": 512}, ["'word_embed_proj_dim' is 512", "hidden_size = 4096"]),
        ({**OPT, "layer_norm_elementwise_affine": False}, ["'layer_norm_elementwise_affine'"]),
        ({**BERT, "position_embedding_type": "relative_key"}, ["'relative_key'", "absolute"]),
    ],
)
def test_wrong_configs(tmp_path: Path, config: dict[str, Any], parts: list[str]) -> None:
    said = message(write(tmp_path, config))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("key", ["n_embd", "vocab_size", "n_positions"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    said = message(write(tmp_path, {k: v for k, v in GPT2.items() if k != key}))
    assert f"key '{key}' is missing; expected the " in said
    assert "for example" in said


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "gpt2",\n  "n_embd": 76')
    assert "line 3, column 15: not valid JSON" in message(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1, column 1"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe{", "byte 0: not UTF-8"),
        (b"[" * 100_000, "deep"),
    ],
)
def test_files_that_are_no_objects(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert said in message(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read" in message(tmp_path / "config.json")
