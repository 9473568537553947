"""`Network`: a model as blocks of layers joined by named tensors, the form that strategies turn into schedules.

A block is what FSDP gathers as one unit and what full recompute repeats: the embedding, each transformer block, and
the head with the loss. Tensor names are unique in a network; its `inputs` come from the data loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rtp_sim.errors import InputError
from rtp_sim.model.kernels import flops
from rtp_sim.model.layers import (
    Activation,
    Add,
    Attention,
    CrossEntropy,
    Dropout,
    Embedding,
    Experts,
    Extent,
    Layer,
    LayerOp,
    Linear,
    Mlp,
    Norm,
    Positions,
    Router,
)
from rtp_sim.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that the data loader provides: elements per sequence (or image)."""

    name: str
    numel_per_sample: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Block:
    """Layers that are gathered together. `recomputable` marks the transformer blocks, which full recompute repeats."""

    name: str
    layers: tuple[Layer, ...]
    recomputable: bool = False


@dataclass(frozen=True)
class Network:
    """`seq` is the tokens per sample (1 for images); the output of the last layer is the loss."""

    name: str
    seq: int
    inputs: tuple[Input, ...]
    blocks: tuple[Block, ...]

    def layers(self) -> Iterator[Layer]:
        """All layers in forward order."""
        for block in self.blocks:
            yield from block.layers

    def parameter_count(self) -> int:
        """Parameters, shared ones once."""
        return sum(layer.owned_numel for layer in self.layers())

    def forward_flops(self, batch: int) -> int:
        """Matmul and convolution FLOPs of one forward pass over `batch` samples (kernels.flops)."""
        extent = Extent(batch, self.seq)
        return sum(flops(c.kernel, c.dims) for layer in self.layers() for c in layer.op.lower(extent).calls)


def transformer_network(model: ModelSpec, seq_len: int, attention: str = "flash") -> Network:
    """The layers of `model` for sequences of `seq_len` tokens.

    `attention` is "flash" or "materialised". The pooler of an encoder is left out: language-model training does not
    run it. InputError if learned positions end before `seq_len`.
    """
    if model.position == "learned" and seq_len > model.max_positions:
        raise InputError(
            f"--seq-len {seq_len} is longer than the {model.max_positions} learned positions of {model.name}: "
            f"give at most {model.max_positions}, or a model with rotary positions"
        )
    blocks = [_embedding_block(model)]
    for i in range(model.num_layers):
        blocks.append(_transformer_block(model, f"h{i}", blocks[-1].layers[-1].output, attention))
    blocks.append(_head_block(model, blocks[-1].layers[-1].output))
    inputs = (Input("ids", seq_len, "int64"), Input("targets", seq_len, "int64"))
    return Network(model.name, seq_len, inputs, tuple(blocks))


class _Chain:
    """Collects the layers of one block; each call adds a layer and returns the name of its output tensor."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.layers: list[Layer] = []

    def add(self, name: str, op: LayerOp, *inputs: str, shares: str | None = None) -> str:
        full = f"{self.prefix}.{name}"
        self.layers.append(Layer(full, op, inputs, f"{full}.y", shares))
        return f"{full}.y"

    def block(self) -> Block:
        return Block(self.prefix, tuple(self.layers))


def _embedding_block(model: ModelSpec) -> Block:
    chain = _Chain("embed")
    x = chain.add("tokens", Embedding(model.vocab_size, model.hidden_size), "ids")
    rows = model.token_types + (model.max_positions + model.position_offset if model.position == "learned" else 0)
    if rows:
        x = chain.add("positions", Positions(rows, model.hidden_size), x)
    if model.embedding_norm:
        x = chain.add("norm", Norm(model.norm, model.hidden_size), x)
    _dropped(chain, model, "drop", x)
    return chain.block()


def _dropped(chain: _Chain, model: ModelSpec, name: str, x: str) -> str:
    return chain.add(name, Dropout(model.hidden_size, model.dropout), x) if model.dropout > 0 else x


def _transformer_block(model: ModelSpec, name: str, x: str, attention: str) -> Block:
    chain, width = _Chain(name), model.hidden_size
    attend = Attention(
        hidden=width, heads=model.num_heads, kv_heads=model.num_kv_heads, head_dim=model.head_dim,
        qkv_bias=model.qkv_bias, out_bias=model.out_bias, rotary=model.position == "rotary", causal=model.causal,
        implementation=attention, dropout=model.dropout,
    )  # fmt: skip

    def residual(tag: str, x: str, inner: Callable[[str], str]) -> str:
        if model.norm_placement == "post":
            summed = chain.add(f"add{tag}", Add(width), x, _dropped(chain, model, f"drop{tag}", inner(x)))
            return chain.add(f"norm{tag}", Norm(model.norm, width), summed)
        normed = chain.add(f"norm{tag}", Norm(model.norm, width), x)
        return chain.add(f"add{tag}", Add(width), x, _dropped(chain, model, f"drop{tag}", inner(normed)))

    x = residual("1", x, lambda t: chain.add("attn", attend, t))
    residual("2", x, lambda t: _feed_forward(chain, model, t))
    return replace(chain.block(), recomputable=True)


def _feed_forward(chain: _Chain, model: ModelSpec, x: str) -> str:
    h, f, gated = model.hidden_size, model.ffn_hidden_size, model.gated_mlp
    if not model.is_moe:
        return chain.add("mlp", Mlp(h, f, model.activation, gated, model.mlp_bias), x)
    routing = chain.add("router", Router(h, model.num_experts, model.experts_per_token), x)
    experts = Experts(h, f, model.num_experts, model.experts_per_token, model.activation, gated)
    return chain.add("experts", experts, x, routing)


def _head_block(model: ModelSpec, x: str) -> Block:
    chain = _Chain("head")
    if model.final_norm:
        x = chain.add("norm", Norm(model.norm, model.hidden_size), x)
    if model.head_transform:
        x = chain.add("dense", Linear(model.hidden_size, model.hidden_size), x)
        x = chain.add("act", Activation(model.activation, model.hidden_size), x)
        x = chain.add("dense_norm", Norm(model.norm, model.hidden_size), x)
    tied = "embed.tokens" if model.tied_embeddings else None
    head = Linear(model.hidden_size, model.vocab_size, bias=model.lm_head_bias and tied is None, vocab=True)
    logits = chain.add("logits", head, x, shares=tied)
    chain.add("loss", CrossEntropy(model.vocab_size), logits, "targets")
    return chain.block()


def unfused(network: Network) -> Network:
    """The network with each MLP as three layers (up, activation, down): what rotates as two units, as in RTP's code."""

    def expand(layer: Layer) -> tuple[Layer, ...]:
        op = layer.op
        if not isinstance(op, Mlp):
            return (layer,)
        up, act = f"{layer.name}.up.y", f"{layer.name}.act.y"
        return (
            Layer(f"{layer.name}.up", Linear(op.hidden, op.ffn * (2 if op.gated else 1), op.bias), layer.inputs, up),
            Layer(f"{layer.name}.act", Activation("gated" if op.gated else op.activation, op.ffn), (up,), act),
            Layer(f"{layer.name}.down", Linear(op.ffn, op.hidden, op.bias), (act,), layer.output),
        )

    blocks = tuple(replace(b, layers=tuple(x for layer in b.layers for x in expand(layer))) for b in network.blocks)
    return replace(network, blocks=blocks)


def with_dropout(network: Network, probability: float) -> Network:
    """The network whose dropout layers have that probability; with 0 it has none of them.

    InputError if there is no such layer and the probability is not 0.
    """
    if probability and not any(isinstance(layer.op, Dropout) for layer in network.layers()):
        raise InputError(f"--dropout {probability:g}: {network.name} has no dropout layer; expected one in its layers")
    instead: dict[str, str] = {}  # the output of a layer that is gone -> what it was given
    blocks = []
    for block in network.blocks:
        kept = []
        for layer in block.layers:
            inputs = tuple(instead.get(x, x) for x in layer.inputs)
            if isinstance(layer.op, Dropout) and not probability:
                instead[layer.output] = inputs[0]
                continue
            op = replace(layer.op, probability=probability) if isinstance(layer.op, Dropout) else layer.op
            kept.append(replace(layer, op=op, inputs=inputs))
        if kept:
            blocks.append(replace(block, layers=tuple(kept)))
    return replace(network, blocks=tuple(blocks))
