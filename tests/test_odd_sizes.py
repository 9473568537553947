"""Half-precision products of odd sizes, and a softmax that is not fused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rtp_sim.cost.compute import ComputeCost
from rtp_sim.hardware.profiles import load_device
from rtp_sim.hardware.spec import Number
from rtp_sim.model.layers import Attention, Extent


@pytest.mark.parametrize(("width", "share"), [(4096, 1.0), (4097, 0.5), (4100, 0.5)])
def test_products_of_odd_sizes_run_at_the_ragged_rate(width: int, share: float) -> None:
    device = replace(load_device("a100-sxm-80gb"), matmul_efficiency=Number(0.8, "assumed", "here"))
    slow = replace(device, matmul_efficiency_ragged=Number(0.4, "assumed", "here"))
    dims = (("k", 65536), ("m", 4096), ("n", width))
    usual, ragged = (ComputeCost(d).cost("linear", "fp16", dims).duration_ns for d in (device, slow))
    assert usual / ragged == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(("batch", "copies"), [(1, 4), (2, 0), (3, 4), (4, 0)])
def test_softmax_is_fused_for_whole_multiples_of_four_matrices(batch: int, copies: int) -> None:
    # 2 heads: 2, 4, 6 and 8 matrices.
    op = Attention(64, 2, 2, 32, implementation="materialised", fused_matrices=4)
    calls = op.lower(Extent(batch, 16)).calls
    assert [call.kernel for call in calls].count("copy") == copies
