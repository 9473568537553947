"""Models by name: the published architectures, and `find_model`, which also reads Hugging Face config files.

Each entry cites where its numbers come from; the tests compare the parameter counts with the published ones.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.model.spec import ModelSpec, with_overrides


def _gpt2(name: str, num_layers: int, hidden_size: int, num_heads: int, **other: Any) -> ModelSpec:
    sizes = {"vocab_size": 50257, "max_positions": 1024} | other
    return ModelSpec(name, num_layers, hidden_size, num_heads, **sizes)


def _gpt_neo(name: str, num_layers: int, hidden_size: int, num_heads: int) -> ModelSpec:
    note = "every second layer attends to the last 256 tokens only; all are counted as full causal attention"
    return ModelSpec(
        name, num_layers, hidden_size, num_heads, vocab_size=50257, max_positions=2048, qkv_bias=False,
        notes=(note,)
    )  # fmt: skip


def _opt(name: str, num_layers: int, hidden_size: int, num_heads: int) -> ModelSpec:
    return ModelSpec(
        name, num_layers, hidden_size, num_heads,
        vocab_size=50272, max_positions=2048, position_offset=2, activation="relu",
    )  # fmt: skip


def _llama(
    name: str, num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, **other: Any
) -> ModelSpec:
    return ModelSpec(
        name, num_layers, hidden_size, num_heads, ffn_hidden_size=ffn_hidden_size,
        gated_mlp=True, activation="silu", position="rotary", norm="rmsnorm", tied_embeddings=False,
        qkv_bias=False, out_bias=False, mlp_bias=False, **other,
    )  # fmt: skip


_LLAMA2 = {"vocab_size": 32000, "max_positions": 4096}
_LLAMA3 = {"vocab_size": 128256, "num_kv_heads": 8}

PRESETS = {
    spec.name: spec
    for spec in (
        # For tests and first runs; no published model.
        _gpt2("gpt2-tiny", 2, 64, 4, vocab_size=256, max_positions=64),
        # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2; model cards
        # gpt2*.
        _gpt2("gpt2", 12, 768, 12),
        _gpt2("gpt2-medium", 24, 1024, 16),
        _gpt2("gpt2-large", 36, 1280, 20),
        _gpt2("gpt2-xl", 48, 1600, 25),
        # Black et al. 2021, GPT-Neo (doi 10.5281/zenodo.5297715); model cards EleutherAI/gpt-neo-*.
        _gpt_neo("gpt-neo-1.3b", 24, 2048, 16),
        _gpt_neo("gpt-neo-2.7b", 32, 2560, 20),
        # Zhang et al. 2022, arXiv 2205.01068, table 1; model card facebook/opt-6.7b.
        _opt("opt-6.7b", 32, 4096, 32),
        _opt("opt-175b", 96, 12288, 96),
        # Brown et al. 2020, arXiv 2005.14165, table 2.1; vocabulary and layout as GPT-2, context 2048.
        _gpt2("gpt3-175b", 96, 12288, 96, max_positions=2048),
        # Devlin et al. 2018, arXiv 1810.04805, section 3; model card bert-large-uncased. The encoder, without
        # head.
        ModelSpec(
            "bert-large", 24, 1024, 16, vocab_size=30522, max_positions=512, token_types=2, causal=False,
            embedding_norm=True, norm_placement="post", final_norm=False, pooler=True, has_head=False,
        ),
        # Touvron et al. 2023, arXiv 2307.09288, table 1; sizes from the model cards meta-llama/Llama-2-*.
        _llama("llama2-7b", 32, 4096, 32, 11008, **_LLAMA2),
        _llama("llama2-13b", 40, 5120, 40, 13824, **_LLAMA2),
        _llama("llama2-70b", 80, 8192, 64, 28672, num_kv_heads=8, **_LLAMA2),
        # Grattafiori et al. 2024, arXiv 2407.21783, table 3; contexts of Meta-Llama-3-8B/70B and
        # Llama-3.1-405B.
        _llama("llama3-8b", 32, 4096, 32, 14336, max_positions=8192, **_LLAMA3),
        _llama("llama3-70b", 80, 8192, 64, 28672, max_positions=8192, **_LLAMA3),
        _llama("llama3-405b", 126, 16384, 128, 53248, max_positions=131072, **_LLAMA3),
        # Jiang et al. 2024, arXiv 2401.04088, table 1; model card mistralai/Mixtral-8x7B-v0.1.
        _llama(
            "mixtral-8x7b", 32, 4096, 32, 14336, vocab_size=32000, max_positions=32768, num_kv_heads=8,
            num_experts=8, experts_per_token=2,
        ),
    )
}  # fmt: skip


def list_models() -> tuple[str, ...]:
    """The names of the built-in models, in the order of the table."""
    return tuple(PRESETS)


def find_model(name_or_path: str | Path, **overrides: Any) -> ModelSpec:
    """The model of that name, or the one a `config.json` (or a directory with one) describes; fields may be
    replaced.

    For example find_model("gpt2", num_layers=24) or find_model("checkpoints/llama/config.json"). Raises
    InputError for names that are neither, for files that are no model, and for overrides that do not fit.
    """
    spec = PRESETS.get(str(name_or_path)) or _read(name_or_path)
    return with_overrides(spec, overrides) if overrides else spec


def _read(name_or_path: str | Path) -> ModelSpec:
    # Imported here: only files need pydantic, whose import is a good part of a short run.
    from rtp_sim.model.huggingface import CONFIG_FILE, read_model

    path = Path(name_or_path)
    if path.is_dir():
        path = path / CONFIG_FILE
    if path.is_file():
        return read_model(path)
    text = str(name_or_path)
    if "/" in text or text.endswith(".json"):
        raise InputError(
            f"no model file at {path}; expected a {CONFIG_FILE}, a directory with one, or a name like gpt2"
        )
    near = difflib.get_close_matches(text.lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the models are {', '.join(PRESETS)}"
    raise InputError(f"no model named {text!r}; {hint} (a path to a {CONFIG_FILE} works as well)")
