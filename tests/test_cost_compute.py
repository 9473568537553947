"""Kernel times against tiles, waves and bytes counted by hand on a device of round numbers."""

from __future__ import annotations

import pytest
from cost_helpers import device, number
from hypothesis import given
from hypothesis import strategies as st

from rtp_sim.cost.compute import ComputeCost
from rtp_sim.cost.products import Product, products
from rtp_sim.errors import InputError
from rtp_sim.model.kernels import KERNELS


def ns(kernel: str, dtype: str = "fp16", **sizes: int) -> int:
    """The toy device's time."""
    return ComputeCost(device()).cost(kernel, dtype, tuple(sizes.items())).duration_ns


def test_a_product_of_one_wave() -> None:
    # 10 tiles of 256 x 128 on 10 units; each runs 10,000 + 96 steps of 2 x 256 x 128 FLOP at 100 FLOP/ns.
    assert ns("linear", m=2560, k=10_000, n=128) == round(2 * 256 * 128 * 10_096 / 100)


def test_one_row_more_starts_another_wave() -> None:
    # Two waves of the tiles above would double the time. Best by hand: 128 x 128 tiles (21 of them, rate 0.95) with k
    # cut into 8 runs of 1250 + 96: 168 on 10 units are 17 waves, and 7 partial outputs are added up in fp32.
    by_hand_ns = 17 * 2 * 128 * 128 * 1346 / 95 + 7 * 2561 * 128 * 4 / 100
    assert ns("linear", m=2561, k=10_000, n=128) == round(by_hand_ns)


def test_a_small_product_takes_small_tiles() -> None:
    # 8 tiles of 64 x 64 at 0.7 of the rate, one wave: 2 x 64 x 64 x (160 + 96) / 70. Larger tiles leave units idle.
    assert ns("linear", m=256, k=160, n=128) == round(2 * 64 * 64 * 256 / 70)


def test_a_thin_product_is_bound_by_memory() -> None:
    # (16 x 4096) with (4096 x 4096) at 2 bytes/ns: the weights' bytes take longer than the tiles.
    slow = ComputeCost(device(memory_bandwidth_bytes_per_s=number(4e9)))
    elements = 16 * 4096 + 4096 * 4096 + 16 * 4096
    assert slow.cost("linear", "fp16", (("m", 16), ("k", 4096), ("n", 4096))).duration_ns == elements * 2 // 2


def test_gradients_are_the_products_they_should_be() -> None:
    sizes = {"m": 700, "k": 30, "n": 5}
    assert products("linear", sizes) == (Product(700, 30, 5),)
    assert products("linear.dgrad", sizes) == (Product(700, 5, 30),)
    assert products("linear.wgrad", sizes) == (Product(30, 700, 5),)
    experts = sizes | {"groups": 8}
    # 700 tokens over 8 experts: 88 for the fullest.
    assert products("linear", experts) == (Product(88, 30, 5, 8),)
    assert products("linear.wgrad", experts) == (Product(30, 88, 5, 8),)
    scores = {"batch": 2, "heads": 3, "kv_heads": 3, "q": 50, "kv": 70, "head_dim": 8}
    assert products("attn.scores", scores) == (Product(50, 8, 70, 6),)
    assert products("attn.context", scores) == (Product(50, 70, 8, 6),)
    assert products("attn.scores.bwd", scores) == (Product(50, 70, 8, 6), Product(70, 50, 8, 6))
    assert products("attn.context.bwd", scores) == (Product(50, 8, 70, 6), Product(70, 50, 8, 6))


@pytest.mark.parametrize("kernel", ["conv2d", "conv2d.dgrad", "conv2d.wgrad"])
def test_convolutions_count_as_products_with_their_flops(kernel: str) -> None:
    # 3 x 3 window over 8 images of 28 x 28, stride 2: 14 x 14 pixels out.
    sizes = {"batch": 8, "in_pixels": 784, "out_pixels": 196, "cin": 64, "cout": 128, "window": 9}
    ((m, k, n, copies),) = products(kernel, sizes)
    assert 2 * m * k * n * copies == 2 * 8 * 196 * 128 * 64 * 9 == KERNELS[kernel].flops(sizes)
    assert {"conv2d": 8 * 196, "conv2d.dgrad": 8 * 784, "conv2d.wgrad": 64 * 9}[kernel] == m


def test_memory_bound_kernels_take_the_floor_and_their_bytes() -> None:
    assert ns("gelu", numel=50_000) == 1000 + 2 * 50_000 * 2 // 100
    assert ns("add", numel=50_000) == 1000 + 3 * 50_000 * 2 // 100
    assert ns("optimizer", "fp32", numel=1000, state_bytes=28) == 1000 + 280
    # A layer norm reads its input twice: 3 halves of (2 x 100 x 50 x 2 bytes and 8 of statistics per row).
    assert ns("layernorm", rows=100, width=50) == 1000 + (20_000 + 800) * 3 // 2 // 100


def test_nothing_is_faster_than_the_floor() -> None:
    cost = ComputeCost(device(kernel_floor_ns=number(10_000)))
    assert cost.cost("linear", "fp16", (("m", 1), ("k", 1), ("n", 1))).duration_ns == 10_000
    tiny = (("batch", 1), ("heads", 1), ("kv_heads", 1), ("q", 1), ("kv", 1), ("head_dim", 8))
    assert cost.cost("attn.scores.bwd", "fp16", tiny).duration_ns == 20_000  # two launches


def test_a_single_unit_has_no_waves() -> None:
    # A core of 1000 FLOP/ns: its floor and the FLOPs, whatever the shape.
    core = ComputeCost(device(compute_units=number(1)))
    assert core.cost("linear", "fp16", (("m", 65), ("k", 70), ("n", 300))).duration_ns == 1000 + 65 * 70 * 600 // 1000
    sizes = (("batch", 2), ("heads", 3), ("kv_heads", 3), ("q", 40), ("kv", 50), ("head_dim", 5))
    assert core.cost("sdpa", "fp16", sizes).duration_ns == 1000 + 4 * 6 * 40 * 50 * 5 // 1000
    assert core.cost("sdpa", "fp16", (*sizes, ("causal", 1))).duration_ns == 1000 + 2 * 6 * 40 * 50 * 5 // 1000


def attention_ns(**changes: int) -> int:
    sizes = {"batch": 1, "heads": 10, "kv_heads": 10, "q": 1024, "kv": 8192, "head_dim": 128} | changes
    return ns("sdpa", **sizes)


def test_attention_by_hand() -> None:
    # 10 heads x 8 blocks of 128 rows on 10 units are 8 full waves; a block runs 8192 + 128 keys of 4 x 128 x 128 FLOP
    # at 118 FLOP/ns (a forward pass runs at 1.18 of the rate of both passes together).
    assert attention_ns() == round(8 * (8192 + 128) * 4 * 128 * 128 / 118)
    # One more head leaves 8 blocks for the ninth wave.
    assert attention_ns(heads=11, kv_heads=11) == round(9 * (8192 + 128) * 4 * 128 * 128 / 118)
    # A causal mask halves the keys, not the time before and after them.
    assert attention_ns(causal=1) == round(8 * (4096 + 128) * 4 * 128 * 128 / 118)
    # Heads of 64 run at 64 / 96 over 128 / 160 of the rate, half the FLOPs; one of 48 is padded to 64 at 0.83.
    small = 8 * (8192 + 128) * 4 * 128 * 64 / 118 / (64 / 96) * (128 / 160)
    assert attention_ns(head_dim=64) == round(small)
    assert attention_ns(head_dim=48) == round(small / 0.83)


def test_attention_forward_and_backward_reach_the_stated_efficiency_together() -> None:
    sizes = (("batch", 1), ("heads", 10), ("kv_heads", 10), ("q", 1024), ("kv", 2**20), ("head_dim", 128))
    cost = ComputeCost(device())
    both_ns = sum(cost.cost(k, "fp16", sizes).duration_ns for k in ("sdpa", "sdpa.bwd"))
    flops = 14 * 10 * 1024 * 2**20 * 128
    assert flops / both_ns == pytest.approx(0.5 * 2000, rel=1e-3)


def test_a_dtype_without_a_rate_runs_at_the_next_wider_one() -> None:
    cost = ComputeCost(device())
    assert cost.peak_flops_per_s("fp8") == 2e12
    assert cost.peak_flops_per_s("bf16") == cost.peak_flops_per_s("tf32") == 1e12
    with pytest.raises(InputError, match="device toy states no peak FLOP/s for fp64: expected one of fp16, fp32"):
        cost.cost("linear", "fp64", (("m", 8), ("k", 8), ("n", 8)))


def test_the_basis_says_whether_the_efficiency_was_measured() -> None:
    cost = ComputeCost(device())
    product = (("m", 8), ("k", 8), ("n", 8))
    assert cost.cost("linear", "fp16", product).basis == "interpolated"
    sizes = (("batch", 1), ("heads", 1), ("kv_heads", 1), ("q", 8), ("kv", 8), ("head_dim", 8))
    assert cost.cost("sdpa", "fp16", sizes).basis == "assumed"
    assumed = ComputeCost(device(memory_efficiency=number(0.5, "assumed")))
    assert assumed.cost("gelu", "fp16", (("numel", 8),)).basis == "assumed"


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 2))
def test_products_never_beat_the_roofline_nor_shrink_as_they_grow(m: int, k: int, n: int, grown: int) -> None:
    time_ns = ns("linear", m=m, k=k, n=n)
    assert time_ns >= 2 * m * k * n / 1000 - 1
    assert time_ns >= (m * k + k * n + m * n) * 2 / 100 - 1
    larger = [m, k, n]
    larger[grown] *= 2
    assert ns("linear", m=larger[0], k=larger[1], n=larger[2]) >= time_ns
