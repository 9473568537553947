"""The matrix products inside a kernel: how many, of which sizes. What the tiles of the compute model are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rtp_sim.model.kernels import KERNELS

ROW_BLOCK = 128
"""Query rows that one block of fused attention works on."""


class Product(NamedTuple):
    """`copies` independent products of (m x k) with (k x n), launched as one kernel."""

    m: int
    k: int
    n: int
    copies: int = 1


def products(kernel: str, sizes: Mapping[str, int]) -> tuple[Product, ...]:
    """The launches of a matmul kernel. Convolutions count as the products that an implicit GEMM computes."""
    base, _, part = kernel.partition(".")
    if base == "linear":
        return (_linear(part, sizes),)
    if base == "conv2d":
        return (_convolution(kernel, part, sizes),)
    q, kv, width, count = sizes["q"], sizes["kv"], sizes["head_dim"], sizes["batch"] * sizes["heads"]
    return {
        "attn.scores": (Product(q, width, kv, count),),
        "attn.scores.bwd": (Product(q, kv, width, count), Product(kv, q, width, count)),
        "attn.context": (Product(q, kv, width, count),),
        "attn.context.bwd": (Product(q, width, kv, count), Product(kv, q, width, count)),
    }[kernel]


def fused_rows(sizes: Mapping[str, int]) -> int:
    """Blocks of query rows of a fused attention over all heads and sequences."""
    return sizes["batch"] * sizes["heads"] * -(-sizes["q"] // ROW_BLOCK)


def _linear(part: str, sizes: Mapping[str, int]) -> Product:
    """Of grouped experts each has its share of the m tokens."""
    k, n, groups = sizes["k"], sizes["n"], sizes.get("groups", 1)
    tokens = -(-sizes["m"] // groups)
    if part == "dgrad":
        return Product(tokens, n, k, groups)
    if part == "wgrad":
        return Product(k, tokens, n, groups)
    return Product(tokens, k, n, groups)


def _convolution(kernel: str, part: str, sizes: Mapping[str, int]) -> Product:
    """Rows are pixels, and k is what makes the FLOPs right: with a stride, not every window meets every pixel."""
    cin, cout = sizes["cin"], sizes["cout"]
    m, n = {
        "": (sizes["batch"] * sizes["out_pixels"], cout),
        "dgrad": (sizes["batch"] * sizes["in_pixels"], cin),
        "wgrad": (cin * sizes["window"], cout),
    }[part]
    return Product(m, max(1, KERNELS[kernel].flops(sizes) // (2 * m * n)), n)
