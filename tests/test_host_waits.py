"""Hosts that wait for messages, products of odd sizes, and a softmax that is not fused: exact times by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rtp_sim.compose.stretch import HOST, RECEIVED, stretch
from rtp_sim.cost.compute import ComputeCost
from rtp_sim.hardware.profiles import load_device
from rtp_sim.hardware.spec import Number
from rtp_sim.model.layers import Attention, Extent
from rtp_sim.schedule.ir import Compute, Op, Recv


def ops(*, blocks_host: bool) -> tuple[Op, ...]:
    """A receive and two kernels behind it, the first of which reads what arrives."""
    kernel = Compute("copy", "fp32", (("numel", 1),))
    return (
        Op(0, "recv", "recv", Recv("pp", (-1,), 8, "x"), (), ("x",), (), blocks_host),
        Op(1, "a", "compute", kernel, ("x",), ("y",), (0,)),
        Op(2, "b", "compute", kernel, ("y",), ("z",), ()),
    )


@pytest.mark.parametrize(
    ("blocks", "arrives", "end"),
    [
        # Issued at 10, 20, 30, ahead of a message at 100: the kernels follow it back to back.
        (False, 100, 100 + 3 + 3),
        # The host goes on at 100 and issues at 110 and 120.
        (True, 100, 120 + 3),
        (False, 12, 30 + 3),
        (True, 12, 32 + 3),
    ],
)
def test_a_host_that_waits_for_a_message_issues_behind_it(blocks: bool, arrives: int, end: int) -> None:
    found = stretch(ops(blocks_host=blocks), 0, 3, (0, 3, 3), (10, 10, 10))
    state = {HOST: 0, RECEIVED: arrives, "compute": 0}
    assert found.after(found.ends["compute"], state) == end
    assert found.after(found.issued, state) == (arrives + 20 if blocks else 30)


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
