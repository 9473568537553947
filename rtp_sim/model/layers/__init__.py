"""Layers: the units that models are made of and that strategies gather, rotate or split.

How a layer may be split is a word: "out" (output features), "in" (input features, result summed), "heads", "ffn",
"experts", "vocab", "width", or "rows" (tokens; for ops without a split of their own). The same words serve Megatron
tensor parallelism and rotation; uneven shards differ by at most one element of the split dimension, larger ones first.
"""

from rtp_sim.model.layers.attention import Attention
from rtp_sim.model.layers.base import (
    WHOLE,
    Call,
    Extent,
    Layer,
    LayerOp,
    Lowered,
    Param,
    Split,
    Tensor,
    split_sizes,
)
from rtp_sim.model.layers.feed_forward import Experts, Mlp, Router
from rtp_sim.model.layers.loss import CrossEntropy
from rtp_sim.model.layers.single import (
    Activation,
    Add,
    Conv2d,
    Dropout,
    Embedding,
    Linear,
    MaxPool2d,
    Norm,
    Positions,
)

__all__ = [
    "WHOLE", "Activation", "Add", "Attention", "Call", "Conv2d", "CrossEntropy", "Dropout", "Embedding", "Experts",
    "Extent", "Layer", "LayerOp", "Linear", "Lowered", "MaxPool2d", "Mlp", "Norm", "Param", "Positions", "Router",
    "Split", "Tensor", "split_sizes",
]  # fmt: skip
