"""Reads the `config.json` of a Hugging Face checkpoint into a `ModelSpec`.

One pydantic shape per key family (GPT-2, GPT-Neo, OPT, BERT, Llama and its relatives) holds the keys that
matter and the default that the family's own config class gives where a file leaves a key out; all other keys
are ignored. A `model_type` nobody listed is read by its keys if they fit exactly one family. Dropout
probabilities are not read: dropout is a training choice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rtp_sim.errors import InputError
from rtp_sim.model.json_file import read_json_object, validated
from rtp_sim.model.spec import ModelSpec

CONFIG_FILE = "config.json"

Positive = Annotated[int, Field(strict=True, ge=1)]

ACTIVATION_NAMES = {
    "gelu": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


class _Config(BaseModel):
    """What all families share. Sizes are strict: "768" or 768.0 in a file is an error, not a number."""

    model_config = ConfigDict(extra="ignore")
    vocab_size: Positive = Field(description="the number of tokens, for example 50257")
    tie_word_embeddings: bool = True


class _Gpt2(_Config):
    n_embd: Positive = Field(description="the hidden size, for example 768")
    n_layer: Positive = Field(description="the number of blocks, for example 12")
    n_head: Positive = Field(description="the number of attention heads, for example 12")
    n_positions: Positive = Field(description="the number of positions, for example 1024")
    n_inner: Positive | None = None
    activation_function: str = "gelu_new"


class _GptNeo(_Config):
    hidden_size: Positive = Field(description="the hidden size, for example 2048")
    num_layers: Positive = Field(description="the number of blocks, for example 24")
    num_heads: Positive = Field(description="the number of attention heads, for example 16")
    max_position_embeddings: Positive = Field(description="the number of positions, for example 2048")
    intermediate_size: Positive | None = None
    activation_function: str = "gelu_new"
    window_size: Positive = 256
    attention_layers: list[str] | None = None
    attention_types: list[Any] | None = None


class _Stack(_Config):
    hidden_size: Positive = Field(description="the hidden size, for example 4096")
    num_hidden_layers: Positive = Field(description="the number of blocks, for example 32")
    num_attention_heads: Positive = Field(description="the number of attention heads, for example 32")
    max_position_embeddings: Positive = Field(description="the number of positions, for example 4096")


class _Opt(_Stack):
    ffn_dim: Positive = Field(description="the width of the MLP, for example 16384")
    word_embed_proj_dim: Positive | None = None
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = Field(default=False, alias="_remove_final_layer_norm")
    activation_function: str = "relu"


class _Bert(_Stack):
    intermediate_size: Positive = Field(description="the width of the MLP, for example 4096")
    type_vocab_size: Positive = 2
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    architectures: list[str] | None = None


class _Llama(_Stack):
    intermediate_size: Positive = Field(description="the width of the MLP, for example 11008")
    tie_word_embeddings: bool = False
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    hidden_act: str = "silu"
    hidden_activation: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    num_local_experts: Positive | None = None
    num_experts_per_tok: Positive = 2
    sliding_window: Positive | None = None
    use_sliding_window: bool = True


def _gpt2(data: dict[str, Any], path: Path) -> ModelSpec:
    config = validated(_Gpt2, data, path)
    return ModelSpec(
        name=_name(data, path),
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_heads=config.n_head,
        vocab_size=config.vocab_size,
        max_positions=config.n_positions,
        ffn_hidden_size=config.n_inner or 0,
        activation=_activation(config.activation_function, path),
        tied_embeddings=config.tie_word_embeddings,
    )


def _gpt_neo(data: dict[str, Any], path: Path) -> ModelSpec:
    config = validated(_GptNeo, data, path)
    local = "local" in str(config.attention_layers or config.attention_types)
    window = f"some layers attend to the last {config.window_size} tokens only; all are counted as full attention"
    return ModelSpec(
        name=_name(data, path),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        ffn_hidden_size=config.intermediate_size or 0,
        activation=_activation(config.activation_function, path),
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=False,
        notes=(window,) if local else (),
    )


def _opt(data: dict[str, Any], path: Path) -> ModelSpec:
    config = validated(_Opt, data, path)
    if config.word_embed_proj_dim not in (None, config.hidden_size):
        raise InputError(
            f"{path}: key 'word_embed_proj_dim' is {config.word_embed_proj_dim}; expected hidden_size ="
            f" {config.hidden_size}: projected embeddings (as in opt-350m) are not supported"
        )
    if not config.layer_norm_elementwise_affine:
        raise InputError(f"{path}: key 'layer_norm_elementwise_affine' is false; expected true")
    pre_norm = config.do_layer_norm_before
    return ModelSpec(
        name=_name(data, path),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        position_offset=2,
        ffn_hidden_size=config.ffn_dim,
        activation=_activation(config.activation_function, path),
        tied_embeddings=config.tie_word_embeddings,
        norm_placement="pre" if pre_norm else "post",
        final_norm=pre_norm and not config.remove_final_layer_norm,
        qkv_bias=config.enable_bias,
        out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
    )


def _bert(data: dict[str, Any], path: Path) -> ModelSpec:
    config = validated(_Bert, data, path)
    if config.position_embedding_type != "absolute" or config.is_decoder:
        raise InputError(
            f"{path}: expected 'position_embedding_type' \"absolute\" and 'is_decoder' false; got"
            f" {config.position_embedding_type!r} and {config.is_decoder}"
        )
    # RoBERTa's table counts the two rows its positions start after. The masked-LM models have no pooler, the
    # bare encoders have one.
    offset = 2 if data.get("model_type") == "roberta" else 0
    masked_lm = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    return ModelSpec(
        name=_name(data, path),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings - offset,
        position_offset=offset,
        token_types=config.type_vocab_size,
        ffn_hidden_size=config.intermediate_size,
        activation=_activation(config.hidden_act, path),
        tied_embeddings=config.tie_word_embeddings,
        norm_placement="post",
        embedding_norm=True,
        final_norm=False,
        causal=False,
        has_head=masked_lm,
        head_transform=masked_lm,
        lm_head_bias=masked_lm,
        pooler=not masked_lm,
    )


def _llama(data: dict[str, Any], path: Path) -> ModelSpec:
    gemma = data.get("model_type") == "gemma"
    config = validated(_Llama, {"tie_word_embeddings": gemma} | data, path)
    experts = config.num_local_experts or 0
    windowed = config.use_sliding_window and (config.sliding_window or 0) < config.max_position_embeddings
    notes = (f"attention is counted over the whole sequence, not the last {config.sliding_window} tokens",)
    return ModelSpec(
        name=_name(data, path),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or 0,
        head_dim=config.head_dim or 0,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        ffn_hidden_size=config.intermediate_size,
        gated_mlp=True,
        # Gemma's older files say "gelu" under hidden_act and mean the tanh form; both cost the same here.
        activation=_activation(config.hidden_activation or config.hidden_act, path),
        position="rotary",
        norm="rmsnorm",
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=config.attention_bias or data.get("model_type") == "qwen2",
        out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        num_experts=experts,
        experts_per_token=config.num_experts_per_tok if experts else 0,
        notes=notes if config.sliding_window and windowed else (),
    )


Reader = Callable[[dict[str, Any], Path], ModelSpec]

READERS: dict[str, Reader] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "opt": _opt,
    "bert": _bert,
    "roberta": _bert,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "qwen2": _llama,
    "gemma": _llama,
}

SIGNATURES: tuple[tuple[Reader, frozenset[str]], ...] = (
    (_gpt2, frozenset({"n_embd", "n_layer", "n_head", "n_positions"})),
    (_gpt_neo, frozenset({"hidden_size", "num_layers", "num_heads", "attention_types"})),
    (_opt, frozenset({"hidden_size", "num_hidden_layers", "ffn_dim", "do_layer_norm_before"})),
    (_bert, frozenset({"hidden_size", "num_hidden_layers", "intermediate_size", "type_vocab_size"})),
    (_llama, frozenset({"hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps"})),
)  # fmt: skip

LOOKALIKES = {
    "rotary_dim": "rotary positions and parallel blocks (GPT-J)",
    "kv_lora_rank": "compressed keys and values (DeepSeek)",
    "n_routed_experts": "shared and routed experts of their own sizes",
    "moe_intermediate_size": "experts of their own size",
    "shared_expert_intermediate_size": "a shared expert",
    "attn_logit_softcapping": "four norms per block (Gemma 2)",
    "query_pre_attn_scalar": "four norms per block (Gemma 2 and 3)",
    "text_config": "several models in one",
    "is_encoder_decoder": "an encoder and a decoder",
    "layer_types": "layers of several kinds",
    "relative_attention": "relative positions (DeBERTa)",
    "embedding_size": "embeddings of a width of their own (ALBERT, ELECTRA)",
}
"""Keys that show an architecture of its own, with what it is; a false or null value does not count."""

LOOKALIKE_TYPES = {
    "qwen3": "norms of queries and keys",
    "olmo2": "norms of queries, keys and block outputs",
}
"""Model types with the very keys of a family and an architecture of their own."""


def read_model(path: Path) -> ModelSpec:
    """The model a `config.json` describes, named after its `_name_or_path` or its folder.

    Raises InputError with the file and the key for text that is no JSON, keys that are missing or wrong, and
    models of another architecture.
    """
    data = read_json_object(path)
    model_type = data.get("model_type")
    reader = READERS.get(str(model_type)) or _reader_by_keys(data, path)
    try:
        return reader(data, path)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None


def _reader_by_keys(data: dict[str, Any], path: Path) -> Reader:
    """The one family whose keys the file has. InputError for none, several, or signs of something else."""
    given = f"{path}: key 'model_type' is {data.get('model_type')!r}" if "model_type" in data else f"{path}"
    listed = f"the supported types are {', '.join(READERS)}, and others with exactly their keys"
    lookalike = LOOKALIKE_TYPES.get(str(data.get("model_type")))
    if lookalike:
        raise InputError(f"{given}: {lookalike} are not supported; {listed}")
    for key, meaning in LOOKALIKES.items():
        if data.get(key):
            raise InputError(f"{given}, and {key!r} means {meaning}, which is not supported; {listed}")
    readers = [reader for reader, keys in SIGNATURES if keys <= data.keys()]
    if len(readers) != 1:
        found = "several families" if readers else "no family"
        raise InputError(f"{given}, and the keys fit {found} of models; {listed}")
    return readers[0]


def _name(data: dict[str, Any], path: Path) -> str:
    given = data.get("_name_or_path")
    if isinstance(given, str) and given.strip("./"):
        return given.rstrip("/").rsplit("/", 1)[-1]
    return path.resolve().parent.name if path.name == CONFIG_FILE else path.stem


def _activation(name: str, path: Path) -> str:
    if name not in ACTIVATION_NAMES:
        raise InputError(f"{path}: activation {name!r} is not known; expected one of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]
