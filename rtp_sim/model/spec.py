"""The architecture of a transformer as numbers, and its parameter count in closed form.

`ModelSpec` covers decoder and encoder stacks: GPT-2/3, GPT-Neo, OPT, BERT, Llama, Mistral, Qwen2, Gemma,
Mixtral. It knows nothing about ranks, precision or time. Models that are no stack of equal transformer blocks
(the MNIST CNN) are plain lists of layers instead, see `network_file.py`.

Formulas: each linear layer has inputs x outputs weights plus one bias per output where it has one; a
LayerNorm has 2 numbers per feature (scale, shift), an RMSNorm one. They are summed per role in
`ModelSpec.parameter_breakdown`, and the tests compare the sums with the published counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rtp_sim.errors import InputError

ACTIVATIONS = ("gelu", "relu", "silu")
POSITIONS = ("learned", "rotary", "none", "sinusoidal")
NORMS = ("layernorm", "rmsnorm")
NORM_PLACEMENTS = ("pre", "post")

_CHOICES = {
    "activation": ACTIVATIONS,
    "position": POSITIONS,
    "norm": NORMS,
    "norm_placement": NORM_PLACEMENTS,
}
_AT_LEAST_ONE = (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size",
    "max_positions",
)  # fmt: skip
_AT_LEAST_ZERO = ("token_types", "position_offset", "num_experts", "experts_per_token")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A stack of `num_layers` equal transformer blocks between an embedding and, with `has_head`, an output.

    `num_kv_heads`, `head_dim` and `ffn_hidden_size` may be left 0, which means num_heads (no grouped
    queries), hidden_size / num_heads and 4 x hidden_size; the fields then hold those numbers. A gated MLP has
    three matrices (gate, up, down) instead of two. `num_experts` is 0 for a dense MLP; otherwise every block
    has that many MLPs and a router without bias, and each token visits `experts_per_token` of them.
    `position_offset` counts the rows of the position table beyond `max_positions` (OPT has 2). `token_types`
    is the size of BERT's segment table, `pooler` its dense layer on the first token, `head_transform` the
    dense layer and norm before its output layer. `dropout` is a training choice and stays 0 unless asked for.
    `notes` says what of the original the numbers leave out.

    Raises InputError for sizes and choices that make no model.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    max_positions: int
    num_kv_heads: int = 0
    head_dim: int = 0
    ffn_hidden_size: int = 0
    gated_mlp: bool = False
    activation: str = "gelu"
    position: str = "learned"
    position_offset: int = 0
    token_types: int = 0
    tied_embeddings: bool = True
    norm: str = "layernorm"
    norm_placement: str = "pre"
    embedding_norm: bool = False
    final_norm: bool = True
    causal: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    has_head: bool = True
    head_transform: bool = False
    lm_head_bias: bool = False
    pooler: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    dropout: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fills in the sizes left 0 and checks everything."""
        for field in ("num_layers", "hidden_size", "num_heads"):
            _require_integer(self, field, 1)
        for field, derive in _DERIVED.items():
            if getattr(self, field) == 0:
                object.__setattr__(self, field, derive(self))
        if self.head_dim == 0:
            divisor = f"a divisor of hidden_size = {self.hidden_size}, or head_dim given with it"
            raise _wrong(self, "num_heads", divisor)
        for field in _AT_LEAST_ONE:
            _require_integer(self, field, 1)
        for field in _AT_LEAST_ZERO:
            _require_integer(self, field, 0)
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise _wrong(self, field, f"one of {', '.join(choices)}")
        _require_consistent(self)

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are routed experts."""
        return self.num_experts > 0

    @property
    def attention_size(self) -> int:
        """Features of all query heads together: the width of the attention output before its projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads together (the values have as many)."""
        return self.num_kv_heads * self.head_dim

    def parameter_count(self) -> int:
        """Trainable parameters; a tied output layer counts once, with the embedding."""
        return sum(self.parameter_breakdown().values())

    def active_parameter_count(self) -> int:
        """Parameters one token meets: all but those of the experts it is not routed to."""
        idle_experts = self.num_experts - self.experts_per_token
        return self.parameter_count() - self.num_layers * idle_experts * mlp_parameters(self)

    def parameter_breakdown(self) -> dict[str, int]:
        """Parameters by role, summed over the layers; the values add up to `parameter_count()`."""
        hidden, norm = self.hidden_size, norm_parameters(self)
        positions = self.max_positions + self.position_offset if self.position == "learned" else 0
        return {
            "token_embedding": self.vocab_size * hidden,
            "position_embedding": positions * hidden,
            "token_type_embedding": self.token_types * hidden,
            "embedding_norm": norm * self.embedding_norm,
            "attention": self.num_layers * attention_parameters(self),
            "router": self.num_layers * self.num_experts * hidden,
            "mlp": self.num_layers * max(self.num_experts, 1) * mlp_parameters(self),
            "block_norms": self.num_layers * 2 * norm,
            "final_norm": norm * self.final_norm,
            "pooler": linear_parameters(hidden, hidden, True) * self.pooler,
            "head": head_parameters(self) if self.has_head else 0,
        }


def linear_parameters(inputs: int, outputs: int, bias: bool) -> int:
    """Parameters of a dense layer."""
    return inputs * outputs + (outputs if bias else 0)


def norm_parameters(spec: ModelSpec) -> int:
    """Parameters of one normalisation of the hidden features."""
    return spec.hidden_size * (2 if spec.norm == "layernorm" else 1)


def attention_parameters(spec: ModelSpec) -> int:
    """Parameters of one block's query, key, value and output projections."""
    qkv = linear_parameters(spec.hidden_size, spec.attention_size + 2 * spec.kv_size, spec.qkv_bias)
    return qkv + linear_parameters(spec.attention_size, spec.hidden_size, spec.out_bias)


def mlp_parameters(spec: ModelSpec) -> int:
    """Parameters of one MLP: of the block if it is dense, of one expert otherwise."""
    into = (2 if spec.gated_mlp else 1) * spec.ffn_hidden_size
    return linear_parameters(spec.hidden_size, into, spec.mlp_bias) + linear_parameters(
        spec.ffn_hidden_size, spec.hidden_size, spec.mlp_bias
    )


def head_parameters(spec: ModelSpec) -> int:
    """Parameters of the output layer beyond the embedding it may share."""
    transform = linear_parameters(spec.hidden_size, spec.hidden_size, True) + norm_parameters(spec)
    weights = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    return transform * spec.head_transform + weights + spec.vocab_size * spec.lm_head_bias


def with_overrides(spec: ModelSpec, overrides: Mapping[str, Any]) -> ModelSpec:
    """`spec` with the given fields replaced.

    A size that follows from others (num_kv_heads, head_dim, ffn_hidden_size) and is not given follows them
    again, so that hidden_size alone resizes a GPT. Raises InputError for fields there are not and for sizes
    that do not fit.
    """
    fields = [field.name for field in dataclasses.fields(spec)]
    unknown = [name for name in overrides if name not in fields]
    if unknown:
        raise InputError(f"model {spec.name!r} has no field {unknown[0]!r}; its fields are {', '.join(fields)}")
    follows: dict[str, Any] = {name: 0 for name, derive in _DERIVED.items() if getattr(spec, name) == derive(spec)}
    return dataclasses.replace(spec, **(follows | dict(overrides)))


_DERIVED: dict[str, Callable[[ModelSpec], int]] = {
    "num_kv_heads": lambda spec: spec.num_heads,
    "head_dim": lambda spec: 0 if spec.hidden_size % spec.num_heads else spec.hidden_size // spec.num_heads,
    "ffn_hidden_size": lambda spec: 4 * spec.hidden_size,
}


def _require_integer(spec: ModelSpec, field: str, least: int) -> None:
    value = getattr(spec, field)
    if type(value) is not int or value < least:
        raise _wrong(spec, field, f"a whole number of at least {least}")


def _require_consistent(spec: ModelSpec) -> None:
    """Raises InputError where fields that are fine alone contradict each other."""
    if spec.num_heads % spec.num_kv_heads:
        raise _wrong(spec, "num_kv_heads", f"a divisor of num_heads = {spec.num_heads}")
    if spec.position == "rotary" and spec.head_dim % 2:
        raise _wrong(spec, "head_dim", "an even number, since rotary positions turn pairs of features")
    if spec.num_experts == 1:
        raise _wrong(spec, "num_experts", "0 (a dense MLP) or at least 2")
    if spec.is_moe and not 1 <= spec.experts_per_token <= spec.num_experts:
        raise _wrong(spec, "experts_per_token", f"1 to num_experts = {spec.num_experts}")
    if not spec.is_moe and spec.experts_per_token:
        raise _wrong(spec, "experts_per_token", "0, since num_experts is 0 (a dense MLP)")
    if spec.is_moe and spec.mlp_bias:
        raise _wrong(spec, "mlp_bias", "False, since routed experts have no biases")
    if spec.position_offset and spec.position != "learned":
        raise _wrong(spec, "position_offset", f"0, since position is {spec.position!r} and has no table")
    for field in ("lm_head_bias", "head_transform"):
        if getattr(spec, field) and not spec.has_head:
            raise _wrong(spec, field, "False, since has_head is False")
    if isinstance(spec.dropout, bool) or not 0 <= spec.dropout < 1:
        raise _wrong(spec, "dropout", "a probability of at least 0 and below 1, for example 0.1")


def _wrong(spec: ModelSpec, field: str, expected: str) -> InputError:
    return InputError(f"model {spec.name!r}: {field} is {getattr(spec, field)!r}; expected {expected}")
