"""Reads a network that is a plain list of layers (an image classifier, an MLP) from JSON into a `Network`.

    {"name": "mlp", "input": {"features": 784},
     "layers": [{"kind": "linear", "out_features": 128}, {"kind": "relu"},
                {"kind": "linear", "out_features": 10}, {"kind": "cross_entropy"}]}

The input is `features` numbers per sample, an image of `channels` x `height` x `width`, or `tokens` ids per
sequence, which an embedding must turn into features; every layer takes the output of the one before (and
with `"residual": true` adds its input to its output), so the file states no input sizes. Each layer with
weights begins a block (what FSDP gathers as one unit); the layers without weights belong to the block before
them. The last layer is the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from rtp_sim.errors import InputError
from rtp_sim.model.json_file import read_json_object, validated
from rtp_sim.model.layers import (
    Activation,
    Add,
    Attention,
    Conv2d,
    CrossEntropy,
    Dropout,
    Embedding,
    Experts,
    Layer,
    LayerOp,
    Linear,
    MaxPool2d,
    Mlp,
    Norm,
    Router,
)
from rtp_sim.model.network import Block, Input, Network

Shape = tuple[int, ...]
"""(channels, height, width) of an image, or (features,)."""

Positive = Annotated[int, Field(strict=True, ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Image(_Part):
    channels: Positive = Field(description="the colour channels of an image, for example 1")
    height: Positive = Field(description="the height of an image in pixels, for example 28")
    width: Positive = Field(description="the width of an image in pixels, for example 28")


class _Features(_Part):
    features: Positive = Field(description="the numbers per sample, for example 784")


class _Tokens(_Part):
    tokens: Positive = Field(description="the token ids per sequence, for example 128")


class _LayerLine(_Part):
    name: str = ""


class _Conv2d(_LayerLine):
    kind: Literal["conv2d"]
    out_channels: Positive = Field(description="the output channels, for example 32")
    kernel_size: Positive = Field(description="the side of the square window, for example 3")
    stride: Positive = 1
    padding: Annotated[int, Field(strict=True, ge=0)] = 0
    bias: bool = True


class _MaxPool2d(_LayerLine):
    kind: Literal["maxpool2d"]
    window: Positive = Field(description="the side of the square window, for example 2")


class _Linear(_LayerLine):
    kind: Literal["linear"]
    out_features: Positive = Field(description="the output features, for example 128")
    bias: bool = True


class _Activation(_LayerLine):
    kind: Literal["relu", "gelu", "silu"]


class _Norm(_LayerLine):
    kind: Literal["layernorm", "rmsnorm"]


class _Dropout(_LayerLine):
    kind: Literal["dropout"]
    p: float = Field(0.5, ge=0, lt=1, description="the probability to drop, for example 0.1")


class _Flatten(_LayerLine):
    kind: Literal["flatten"]


class _CrossEntropy(_LayerLine):
    kind: Literal["cross_entropy"]


class _Embedding(_LayerLine):
    kind: Literal["embedding"]
    vocab_size: Positive = Field(description="the rows of the table, for example 50257")
    features: Positive = Field(description="the features per token, for example 768")


class _Residual(_LayerLine):
    residual: bool = False


class _Attention(_Residual):
    kind: Literal["attention"]
    heads: Positive = Field(description="the query heads, for example 12")
    kv_heads: Positive | None = None
    bias: bool = True
    rotary: bool = False
    causal: bool = True


class _Mlp(_Residual):
    kind: Literal["mlp"]
    ffn_features: Positive = Field(description="the inner features, for example 3072")
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    gated: bool = False
    bias: bool = True


class _Moe(_Residual):
    kind: Literal["moe"]
    experts: Positive = Field(description="the number of experts, for example 8")
    top_k: Positive = Field(description="the experts that each token visits, for example 2")
    ffn_features: Positive = Field(description="the inner features of one expert, for example 3072")
    activation: Literal["relu", "gelu", "silu"] = "silu"
    gated: bool = True


_AnyLayer = (
    _Conv2d | _MaxPool2d | _Linear | _Activation | _Norm | _Dropout | _Flatten | _CrossEntropy
    | _Embedding | _Attention | _Mlp | _Moe
)  # fmt: skip


def _kind_of_input(given: object) -> str | None:
    """Which input the object is meant to be, so that messages speak of that one; None if it is none."""
    if not isinstance(given, dict):
        return None
    return next((kind for kind in ("features", "tokens") if kind in given), "image")


_AnyInput = Annotated[
    Annotated[_Image, Tag("image")] | Annotated[_Features, Tag("features")] | Annotated[_Tokens, Tag("tokens")],
    Discriminator(_kind_of_input),
]


class _File(_Part):
    name: str = Field(min_length=1, description='the name of the network, for example "mnist-cnn"')
    input: _AnyInput = Field(
        description='{"channels": 1, "height": 28, "width": 28}, {"features": 784} or {"tokens": 128}',
    )
    layers: list[Annotated[_AnyLayer, Field(discriminator="kind")]] = Field(
        min_length=1,
        description='a list such as [{"kind": "linear", "out_features": 10}, {"kind": "cross_entropy"}]',
    )


_PARTS = (_Image, _Features, _Tokens, _Conv2d, _MaxPool2d, _Linear, _Dropout, _Embedding, _Attention, _Mlp, _Moe)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the file a layer stands, for messages."""

    path: Path
    index: int
    kind: str

    def wrong(self, message: str) -> InputError:
        return InputError(f"{self.path}: layer {self.index} ({self.kind}): {message}")


def read_network(path: Path) -> Network:
    """The network that the file lists.

    Raises InputError with the file and the key or layer for text that is no JSON, keys that are missing,
    wrong or unknown, and layers that do not fit the output of the layer before.
    """
    file = validated(_File, read_json_object(path), path, _PARTS)
    shape, seq, samples = _input(file.input)
    inputs = (samples, Input("targets", seq, "int64"))
    layers: list[Layer] = []
    tensor = samples.name
    for index, line in enumerate(file.layers):
        place = _Place(path, index, line.kind)
        if isinstance(line, _CrossEntropy) != (index == len(file.layers) - 1):
            raise place.wrong("expected cross_entropy as the last layer, and only there")
        ops, shape = _ops(line, shape, place)
        name = line.name or f"{line.kind}_{index}"
        if name in {layer.name for layer in layers}:
            raise place.wrong(f"the name {name!r} is taken; expected names that differ")
        added = _layers(name, ops, tensor)
        layers += added
        tensor = added[-1].output if added else tensor
    return Network(file.name, seq, inputs, _blocks(layers))


def _input(given: _Image | _Features | _Tokens) -> tuple[Shape, int, Input]:
    """Shape per token (none for ids), tokens per sample (1 unless it is a sequence), and the input tensor."""
    match given:
        case _Image():
            shape: Shape = (given.channels, given.height, given.width)
            return shape, 1, Input("samples", prod(shape), "fp32")
        case _Features():
            return (given.features,), 1, Input("samples", given.features, "fp32")
        case _Tokens():
            return (), given.tokens, Input("ids", given.tokens, "int64")


def _layers(name: str, ops: tuple[LayerOp, ...], tensor: str) -> list[Layer]:
    """The ops of one line as layers: a router gives the experts their routing, an Add the line's input back."""
    layers: list[Layer] = []
    last = tensor
    for op in ops:
        full = name if len(ops) == 1 else f"{name}.{type(op).__name__.lower()}"
        match op:
            case CrossEntropy():
                reads: tuple[str, ...] = (tensor, "targets")
            case Experts() | Add():
                reads = (tensor, last)
            case _:
                reads = (tensor,)
        last = f"{full}.y"
        layers.append(Layer(full, op, reads, last))
    return layers


def _blocks(layers: list[Layer]) -> tuple[Block, ...]:
    """One block per layer with weights, and the layers without up to the next."""
    groups: list[list[Layer]] = []
    for layer in layers:
        started = groups and any(member.owned_numel for member in groups[-1])
        if not groups or (started and layer.owned_numel):
            groups.append([])
        groups[-1].append(layer)
    return tuple(Block(group[0].name, tuple(group)) for group in groups)


def _ops(line: _AnyLayer, shape: Shape, place: _Place) -> tuple[tuple[LayerOp, ...], Shape]:
    """What the line computes on an input of that shape (nothing: it only reshapes), and its output's shape."""
    match line:
        case _Conv2d():
            op, shape = _conv2d(line, _image(shape, place), place)
            return (op,), shape
        case _MaxPool2d(window=window):
            channels, height, width = _image(shape, place)
            if window > min(height, width):
                raise place.wrong(f"window {window} is larger than the {height} x {width} image it is given")
            return (MaxPool2d(channels, height, width, window),), (channels, height // window, width // window)
        case _Linear():
            return (Linear(_features(shape, place), line.out_features, line.bias),), (line.out_features,)
        case _Norm():
            return (Norm(line.kind, _features(shape, place)),), shape
        case _Activation():
            return (Activation(line.kind, prod(_numbers(shape, place))),), shape
        case _Dropout():
            width = prod(_numbers(shape, place))
            return ((Dropout(width, line.p),) if line.p else ()), shape
        case _Flatten():
            return (), (prod(_numbers(shape, place)),)
        case _CrossEntropy():
            return (CrossEntropy(_features(shape, place)),), ()
        case _Embedding():
            if shape:
                raise place.wrong('needs token ids; give the file "input": {"tokens": 128} and put this layer first')
            return (Embedding(line.vocab_size, line.features),), (line.features,)
        case _Attention() | _Mlp() | _Moe():
            width = _features(shape, place)
            ops = _transformer_ops(line, width, place)
            return (*ops, *((Add(width),) if line.residual else ())), shape


def _transformer_ops(line: _Attention | _Mlp | _Moe, width: int, place: _Place) -> tuple[LayerOp, ...]:
    match line:
        case _Attention(heads=heads):
            kv_heads = line.kv_heads or heads
            if width % heads or heads % kv_heads:
                raise place.wrong(
                    f"{width} features, {heads} heads and {kv_heads} kv_heads; expected heads to divide the features "
                    f"and kv_heads to divide the heads"
                )
            return (Attention(width, heads, kv_heads, width // heads, line.bias, line.bias, line.rotary, line.causal),)
        case _Mlp():
            return (Mlp(width, line.ffn_features, line.activation, line.gated, line.bias),)
        case _Moe(experts=experts, top_k=top_k):
            if top_k > experts:
                raise place.wrong(f"top_k {top_k} is more than the {experts} experts")
            return (
                Router(width, experts, top_k),
                Experts(width, line.ffn_features, experts, top_k, line.activation, line.gated),
            )


def _conv2d(line: _Conv2d, image: tuple[int, int, int], place: _Place) -> tuple[LayerOp, Shape]:
    channels, height, width = image
    if line.kernel_size > min(height, width) + 2 * line.padding:
        raise place.wrong(f"kernel_size {line.kernel_size} is larger than its padded {height} x {width} input")
    op = Conv2d(channels, line.out_channels, line.kernel_size, height, width, line.stride, line.padding, line.bias)
    return op, (line.out_channels, *op.out_size())


def _numbers(shape: Shape, place: _Place) -> Shape:
    if not shape:
        raise place.wrong('needs numbers, but its input is token ids; put {"kind": "embedding", ...} first')
    return shape


def _image(shape: Shape, place: _Place) -> tuple[int, int, int]:
    if len(_numbers(shape, place)) != 3:
        raise place.wrong(f"needs an image, but its input is {shape[0]} features")
    return shape[0], shape[1], shape[2]


def _features(shape: Shape, place: _Place) -> int:
    if len(_numbers(shape, place)) != 1:
        size = " x ".join(str(side) for side in shape)
        raise place.wrong(f'needs features, but its input is a {size} image; put {{"kind": "flatten"}} first')
    return shape[0]


def is_network_file(path: Path) -> bool:
    """Whether a JSON file is a list of layers (and not a Hugging Face config.json, say). InputError if no JSON."""
    return path.is_file() and isinstance(read_json_object(path).get("layers"), list)
