"""Every kernel's FLOPs, forward and backward, against torch's FlopCounterMode on plain torch models.

Convention, torch's own: 2 FLOPs per multiply-add of matrix products and convolutions, everything else 0;
attention is counted over the full score matrix, causal or not; fused attention is 2 products forward and 5
backward (the scores are recomputed), materialised attention 2 and 4. FlopCounterMode has these formulas for
the CUDA operators of `scaled_dot_product_attention` and none for the CPU's, so the CPU's get the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rtp_sim.model.kernels import BACKWARD, KERNELS, flops
from rtp_sim.model.layers import (
    WHOLE,
    Activation,
    Add,
    Attention,
    Conv2d,
    CrossEntropy,
    Dropout,
    Embedding,
    Experts,
    Extent,
    LayerOp,
    Linear,
    MaxPool2d,
    Mlp,
    Norm,
    Positions,
    Router,
    Split,
)
from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.network_file import read_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.spec import ModelSpec

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"
BATCH, SEQ = 2, 16
EXTENT = Extent(BATCH, SEQ)


def our_flops(op: LayerOp, extent: Extent, split: Split = WHOLE, first: bool = False) -> tuple[int, int]:
    """Forward and backward FLOPs of a layer; the `first` layer of a network computes no input gradients."""
    forward = backward = 0
    for call in op.lower(extent, split).calls:
        forward += flops(call.kernel, call.dims)
        for rule in BACKWARD.get(call.kernel, ()):
            if not (first and rule.makes == ("dx",)):
                backward += flops(rule.kernel, call.dims)
    return forward, backward


def network_flops(network: Network, batch: int) -> tuple[int, int]:
    """Forward and backward FLOPs of a network."""
    inputs = {tensor.name for tensor in network.inputs}
    counts = [
        our_flops(layer.op, Extent(batch, network.seq), first=layer.inputs[0] in inputs)
        for layer in network.layers()
    ]
    return sum(f for f, _ in counts), sum(b for _, b in counts)


def _fused_forward(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: object, **__: object
) -> int:
    return sdpa_flop_count(q, k, v)


def _fused_backward(
    dy: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(dy, q, k, v)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


def torch_flops(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Forward and backward FLOPs of what `run` computes, as torch counts them."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        total = run().sum()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as backward_counter:
        total.backward()
    return counter.get_total_flops(), backward_counter.get_total_flops()


class PlainAttention(nn.Module):
    """Self-attention from torch's parts: separate projections, key/value heads repeated for their queries."""

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, fused: bool, bias: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.fused = heads, kv_heads, head_dim, fused
        self.q = nn.Linear(hidden, heads * head_dim, bias)
        self.k = nn.Linear(hidden, kv_heads * head_dim, bias)
        self.v = nn.Linear(hidden, kv_heads * head_dim, bias)
        self.out = nn.Linear(heads * head_dim, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(2, 3) / self.head_dim**0.5
            hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
            y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class PlainMlp(nn.Module):
    """Two linears around a GELU, or three around a gated SiLU."""

    def __init__(self, hidden: int, ffn: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias) if gated else None
        self.up, self.down = nn.Linear(hidden, ffn, bias), nn.Linear(ffn, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PlainExperts(nn.Module):
    """A router and experts; token t goes to experts t, t+1, ... (balanced), weighted by the router."""

    def __init__(self, hidden: int, ffn: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(PlainMlp(hidden, ffn, True, False) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, y = self.router(flat).softmax(-1), torch.zeros_like(flat)
        n = len(self.experts)
        for e, expert in enumerate(self.experts):
            rows = torch.tensor([t for t in range(len(flat)) if (e - t) % n < self.top_k])
            y = y.index_add(0, rows, expert(flat[rows]) * weights[rows, e, None])
        return y.view_as(x)


class PlainTransformer(nn.Module):
    """A pre-norm decoder for a ModelSpec, written without the layers under test; returns the loss."""

    def __init__(self, spec: ModelSpec, fused: bool) -> None:
        super().__init__()
        h = spec.hidden_size
        self.tokens = nn.Embedding(spec.vocab_size, h)
        self.positions = nn.Embedding(spec.max_positions, h) if spec.position == "learned" else None
        self.blocks = nn.ModuleList()
        for _ in range(spec.num_layers):
            attention = PlainAttention(
                h, spec.num_heads, spec.num_kv_heads, spec.head_dim, fused, bias=spec.qkv_bias
            )
            mlp: nn.Module = PlainMlp(h, spec.ffn_hidden_size, spec.gated_mlp, spec.mlp_bias)
            if spec.is_moe:
                mlp = PlainExperts(h, spec.ffn_hidden_size, spec.num_experts, spec.experts_per_token)
            self.blocks.append(nn.ModuleList([nn.LayerNorm(h), attention, nn.LayerNorm(h), mlp]))
        self.norm, self.head = nn.LayerNorm(h), nn.Linear(h, spec.vocab_size, bias=False)
        if spec.tied_embeddings:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        for norm1, attention, norm2, mlp in self.blocks:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


def tokens(hidden: int) -> Tensor:
    return torch.randn(BATCH, SEQ, hidden, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias), tokens(24)
    assert our_flops(Linear(24, 40, bias), EXTENT) == torch_flops(lambda: layer(x))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"), [(3, 1, 0), (3, 2, 1), (5, 1, 2), (1, 1, 0), (4, 3, 1)]
)
def test_conv2d(kernel_size: int, stride: int, padding: int) -> None:
    layer = nn.Conv2d(3, 8, kernel_size, stride, padding)
    x = torch.randn(BATCH, 3, 14, 11, requires_grad=True)
    op = Conv2d(3, 8, kernel_size, 14, 11, stride, padding)
    assert op.out_size() == tuple(layer(x).shape[2:])
    assert our_flops(op, Extent(BATCH, 1)) == torch_flops(lambda: layer(x))


def test_first_convolution_has_no_input_gradient() -> None:
    layer, x = nn.Conv2d(3, 8, 3), torch.randn(BATCH, 3, 14, 11)
    assert our_flops(Conv2d(3, 8, 3, 14, 11), Extent(BATCH, 1), first=True) == torch_flops(lambda: layer(x))


@pytest.mark.parametrize("implementation", ["flash", "materialised"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 8), (6, 1, 4)])
def test_attention(implementation: str, heads: int, kv_heads: int, head_dim: int) -> None:
    op = Attention(24, heads, kv_heads, head_dim, implementation=implementation)
    layer, x = PlainAttention(24, heads, kv_heads, head_dim, implementation == "flash"), tokens(24)
    assert our_flops(op, EXTENT) == torch_flops(lambda: layer(x))


@pytest.mark.parametrize("gated", [True, False])
def test_mlp(gated: bool) -> None:
    layer, x = PlainMlp(24, 40, gated, True), tokens(24)
    assert our_flops(Mlp(24, 40, gated=gated), EXTENT) == torch_flops(lambda: layer(x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_and_experts(top_k: int) -> None:
    layer, x = PlainExperts(24, 40, 4, top_k), tokens(24)
    router, experts = our_flops(Router(24, 4, top_k), EXTENT), our_flops(Experts(24, 40, 4, top_k), EXTENT)
    total = (router[0] + experts[0], router[1] + experts[1])
    assert total == torch_flops(lambda: layer(x))


@pytest.mark.parametrize(
    ("op", "layer"),
    [
        (Norm("layernorm", 24), nn.LayerNorm(24)),
        (Norm("rmsnorm", 24), nn.RMSNorm(24)),
        (Add(24), lambda x: x + x),
        (Dropout(24), nn.Dropout(0.5)),
        (Activation("gelu", 24), F.gelu),
        (Activation("silu", 24), F.silu),
        (Activation("relu", 24), F.relu),
        (Positions(16, 24), lambda x: x + torch.ones(SEQ, 24)),
        (Embedding(10, 24), lambda x: nn.Embedding(10, 24)(torch.ones(BATCH, SEQ, dtype=torch.int64))),
        (
            CrossEntropy(24),
            lambda x: F.cross_entropy(x.flatten(0, 1), torch.ones(BATCH * SEQ, dtype=torch.int64)),
        ),
        (MaxPool2d(SEQ, 4, 6, 2), lambda x: F.max_pool2d(x.view(BATCH, SEQ, 4, 6), 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LayerOp) else "",
)
def test_everything_else_counts_nothing(op: LayerOp, layer: Callable[[Tensor], Tensor]) -> None:
    x = tokens(24)
    assert our_flops(op, EXTENT) == torch_flops(lambda: layer(x)) == (0, 0)


SMALL_GPT = find_model("gpt2-tiny")
SMALL_LLAMA = find_model(
    "llama3-8b", num_layers=2, hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=8, ffn_hidden_size=80,
    vocab_size=100, norm="layernorm",
)  # fmt: skip
SMALL_MOE = find_model(
    "mixtral-8x7b", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_hidden_size=40,
    vocab_size=100, num_experts=4, experts_per_token=2,
)  # fmt: skip


@pytest.mark.parametrize("attention", ["flash", "materialised"])
@pytest.mark.parametrize("spec", [SMALL_GPT, SMALL_LLAMA, SMALL_MOE], ids=lambda spec: spec.name)
def test_transformers(spec: ModelSpec, attention: str) -> None:
    model = PlainTransformer(spec, attention == "flash")
    ids = torch.randint(spec.vocab_size, (BATCH, SEQ))
    network = transformer_network(spec, SEQ, attention)
    assert network_flops(network, BATCH) == torch_flops(lambda: model(ids))
    assert network.forward_flops(BATCH) == network_flops(network, BATCH)[0]


def test_a_transformer_by_the_closed_form() -> None:
    """Forward 2 FLOPs per weight and token, plus 4 x batch x seq^2 x hidden per layer for the scores."""
    spec = SMALL_GPT
    weights = 2 * 12 * 64**2 + 64 * 256
    attention = 2 * 4 * BATCH * SEQ**2 * 64
    assert network_flops(transformer_network(spec, SEQ), BATCH) == (
        2 * BATCH * SEQ * weights + attention,
        4 * BATCH * SEQ * weights + attention * 5 // 2,
    )


def test_the_mnist_cnn() -> None:
    network = read_network(EXAMPLES / "mnist-cnn.json")
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    images, classes = torch.randn(5, 1, 28, 28), torch.randint(10, (5,))
    assert network_flops(network, 5) == torch_flops(lambda: F.cross_entropy(model(images), classes))
    assert network.parameter_count() == sum(p.numel() for p in model.parameters()) == 1_199_882


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (Linear(24, 41), "out"),
        (Linear(25, 40), "in"),
        (Linear(24, 50), "vocab"),
        (Linear(24, 40), "rows"),
        (Conv2d(3, 9, 3, 14, 11), "out"),
        (Attention(24, 6, 6, 4), "heads"),
        (Attention(24, 8, 4, 3, implementation="materialised"), "heads"),
        (Mlp(24, 41, gated=True), "ffn"),
        (Experts(24, 40, 5, 2), "experts"),
        (Experts(24, 41, 4, 2), "ffn"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LayerOp) else value,
)
def test_shards_add_up_to_the_layer(op: LayerOp, kind: str, n: int) -> None:
    shards = [our_flops(op, EXTENT, Split(kind, n, i)) for i in range(n)]
    whole = our_flops(op, EXTENT)
    assert (sum(f for f, _ in shards), sum(b for _, b in shards)) == whole


def test_every_kernel_with_flops_is_covered() -> None:
    counted = {name for name, kernel in KERNELS.items() if kernel.kind in ("matmul", "attention")}
    forward = {"linear", "conv2d", "sdpa", "attn.scores", "attn.context"}
    assert counted == forward | {rule.kernel for name in forward for rule in BACKWARD[name]}
