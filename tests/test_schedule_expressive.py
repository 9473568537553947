"""Every scheme on the checklist can be said in the IR, passes the checks and survives both stored forms.

The schedules are the schemes' skeletons (one layer or a few micro-batches), written by hand; dependencies
come from the plain rule of `schedule_helpers`, except where an order is the point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from schedule_helpers import NUMEL, SIZE, Row, grid, kernel, program, ring, rotation, schedule, shift

from rtp_sim.schedule.checks import check, findings
from rtp_sim.schedule.hazards import direct_predecessors
from rtp_sim.schedule.ir import (
    Buffer,
    Collective,
    Compute,
    Group,
    Hop,
    Part,
    Program,
    Recv,
    Schedule,
    Send,
    Shift,
)
from rtp_sim.schedule.serialize import from_json, to_json
from rtp_sim.schedule.text import from_text, to_text


def collective(kind: str, group: str, scale: int = 1, dtype: str = "fp16", root: int = 0) -> Collective:
    return Collective(kind, group, scale * SIZE, dtype, root)


def sized(**numel: int) -> dict[str, Buffer]:
    """Buffers that start empty and are not kept, a multiple of 256 elements each."""
    return {n: Buffer(n, "activations", "fp16", k * NUMEL, live_out=True) for n, k in numel.items()}


def two_stage_pipeline() -> Schedule:
    """ZB-H1's idea on two stages: W (weight gradient) is an op of its own, put off until I has been sent."""
    out, back = (1,), (-1,)
    first, last = [], []
    for mb in ("0", "1"):
        first += [
            Row(f"F{mb}", "compute", kernel(), "w x" + mb, "y" + mb),
            Row(f"sendF{mb}", "pp", Send("pp", out, SIZE, "F" + mb), "y" + mb),
        ]
        last += [
            Row(f"recvF{mb}", "pp", Recv("pp", back, SIZE, "F" + mb), "", "x" + mb),
            Row(f"F{mb}", "compute", kernel(), "w x" + mb, "y" + mb),
            Row(f"I{mb}", "compute", kernel("linear_dgrad"), "w y" + mb, "dx" + mb),
            Row(f"sendB{mb}", "back", Send("pp", back, SIZE, "B" + mb), "dx" + mb),
        ]
    for mb in ("0", "1"):
        first += [
            Row(f"recvB{mb}", "back", Recv("pp", out, SIZE, "B" + mb), "", "dy" + mb),
            Row(f"I{mb}", "compute", kernel("linear_dgrad"), "w dy" + mb, "dx" + mb),
        ]
    # First in, first out: the weight gradients fill what would have been the bubble at the end.
    first += [Row(f"W{mb}", "compute", kernel("linear_wgrad"), f"x{mb} dy{mb} g", "g") for mb in "01"]
    last += [Row(f"W{mb}", "compute", kernel("linear_wgrad"), f"x{mb} y{mb} g", "g") for mb in "01"]
    return schedule([ring(2, "pp")], program("first", first), program("last", last), of_rank=(0, 1))


def primepar() -> Schedule:
    """P_{2x2}, forward: both operands move at once, to two different neighbours, while the step before
    computes.
    """
    both = Shift("grid", (Hop((0, -1), SIZE, Part("grid", (0, 0))), Hop((-1, 0), SIZE, Part("grid", (0, 0)))))
    rows = [
        Row("t0.move", "ring", both, "i.a w.a", "i.b w.b"),
        Row("t0.mm", "compute", kernel(part=Part("grid", (0, 0))), "i.a w.a", "o"),
        Row("t1.mm", "compute", kernel(part=Part("grid", (1, 1))), "i.b w.b o", "o"),
    ]
    return schedule([grid(2, 2)], program("all", rows))


def zeropp() -> Schedule:
    """ZeRO-3 inside a node: gather a chunk once for all micro-batches of a unit, LIFO queue of W,
    reduce-scatter.
    """
    rows = [Row("gather", "nccl", collective("all_gather", "zero", 4), "w", "full")]
    rows += [Row(f"F{mb}", "compute", kernel(), f"full x{mb}", f"y{mb}") for mb in range(3)]
    rows += [Row(f"I{mb}", "compute", kernel(), f"full y{mb}", f"dx{mb}") for mb in range(3)]
    rows += [
        Row(f"W{mb}", "compute", kernel(), f"x{mb} y{mb}" + (" g" if mb < 2 else ""), "g") for mb in (2, 1, 0)
    ]
    rows += [Row("scatter", "nccl", collective("reduce_scatter", "zero", 4), "g", "gs")]
    return schedule([ring(4, "zero")], program("all", rows, sized(full=4, g=4)))


def summa() -> Schedule:
    """Optimus on 2 x 2: step k broadcasts from column k of each row and row k of each column, double
    buffered.
    """
    row, column = Group("row", (2,), ((0, 1), (2, 3))), Group("column", (2,), ((0, 2), (1, 3)))
    rows = []
    for k in (0, 1):
        rows += [
            Row(f"bx{k}", "rows", collective("broadcast", "row", root=k), "x", f"x{k}"),
            Row(f"ba{k}", "columns", collective("broadcast", "column", root=k), "a", f"a{k}"),
        ]
    rows += [
        Row("mm0", "compute", kernel(), "x0 a0", "y"),
        Row("mm1", "compute", kernel(), "x1 a1 y", "y"),
        Row("rx", "rows", collective("reduce", "row", root=1), "y", "dx"),
    ]
    return schedule([row, column], program("all", rows))


def tesseract() -> Schedule:
    """2.5-D: SUMMA in each of two layers, then the weight gradient is summed over the depth."""
    depth = Group("depth", (2,), ((0, 4), (1, 5), (2, 6), (3, 7)))
    row = Group("row", (2,), ((0, 1), (2, 3), (4, 5), (6, 7)))
    rows = [
        Row("bx", "rows", collective("broadcast", "row"), "x", "x0"),
        Row("w", "compute", kernel("linear_wgrad"), "x0 dy", "da"),
        Row("sum", "depth", collective("all_reduce", "depth"), "da", "da"),
    ]
    return schedule([depth, row], program("all", rows))


def three_dimensional() -> Schedule:
    """3-D tensor parallelism on 2 x 2 x 2: gather X along j, A along i, reduce-scatter Y along l."""
    i = Group("i", (2,), tuple((r, r + 4) for r in range(4)))
    j = Group("j", (2,), tuple((r, r + 2) for r in (0, 1, 4, 5)))
    k = Group("l", (2,), tuple((r, r + 1) for r in (0, 2, 4, 6)))
    rows = [
        Row("gx", "nccl", collective("all_gather", "j", 2), "x", "xx"),
        Row("ga", "nccl", collective("all_gather", "i", 2), "a", "aa"),
        Row("mm", "compute", kernel(), "xx aa", "yy"),
        Row("sy", "nccl", collective("reduce_scatter", "l", 2), "yy", "y"),
    ]
    return schedule([i, j, k], program("all", rows, sized(xx=2, aa=2, yy=2)))


def tsp() -> Schedule:
    """Attention weights are broadcast one shard after another (the next one early), K and V gathered per
    shard.
    """
    rows = [Row("b0", "bcast", collective("broadcast", "d", root=0), "w", "w0")]
    for r in range(2):
        if r == 0:
            rows.append(Row("b1", "bcast", collective("broadcast", "d", root=1), "w", "w1"))
        rows += [
            Row(f"qkv{r}", "compute", kernel(), f"x w{r}", f"q{r} kv{r}"),
            Row(f"gkv{r}", "gather", collective("all_gather", "d", 2), f"kv{r}", f"full{r}"),
            Row(f"att{r}", "compute", kernel("attention"), f"q{r} full{r} w{r}" + " y" * r, "y"),
        ]
    mlp = rotation(2).programs[0].ops
    rows += [
        Row("mlp.hop", "ring", shift(group="d"), "m.a", "m.b"),
        *(
            Row(f"mlp.{o.name}", "compute", kernel(), f"y m.{b}", f"z{b}")
            for o, b in zip(mlp[:2], "ab", strict=True)
        ),
    ]
    return schedule([ring(2, "d")], program("all", rows, sized(full0=2, full1=2)))


def caat() -> Schedule:
    """Partly synchronised activations: all-reduce of a copied channel slice, fp16 forward, fp32 backward."""
    rows = [
        Row("o", "compute", kernel(), "x w", "o"),
        Row("slice", "compute", kernel("copy"), "o", "part"),
        Row("sum", "nccl", collective("all_reduce", "tp"), "part", "part"),
        Row("paste", "compute", kernel("copy"), "part o", "o"),
        Row("cast", "compute", kernel("copy"), "o", "part32"),
        Row("dsum", "nccl", collective("all_reduce", "tp", 2, "fp32"), "part32", "part32"),
    ]
    buffers = {"part32": Buffer("part32", "activations", "fp32", NUMEL, live_out=True)}
    return schedule([ring(4, "tp")], program("all", rows, buffers))


def zero_plus_plus() -> Schedule:
    """Quantised: int8 weight gather over all, a second copy gathered in the node, gradients by all-to-all
    twice.
    """
    node, across = Group("node", (2,), ((0, 1), (2, 3))), Group("across", (2,), ((0, 2), (1, 3)))
    rows = [
        Row("quant", "compute", kernel("copy"), "w", "w8"),
        Row("gather", "nccl", collective("all_gather", "all", 2, "int8"), "w8", "full8"),
        Row("F", "compute", kernel(), "x full8", "y"),
        Row("hpz", "nccl", collective("all_gather", "node", 2), "second", "full"),
        Row("B", "compute", kernel(), "y full", "g"),
        Row("g1", "nccl", collective("all_to_all", "node", 1, "int8"), "g", "g.node"),
        Row("g2", "nccl", collective("all_to_all", "across", 1, "int8"), "g.node", "gs"),
    ]
    return schedule([ring(4, "all"), node, across], program("all", rows, sized(full=2, full8=2)))


def collective_matmul() -> Schedule:
    """All-gather and matmul in chunks: chunk t+1 arrives by shift while chunk t is multiplied."""
    rows = []
    for t in range(4):
        if t < 3:
            rows.append(Row(f"hop{t}", "ring", shift(-1), f"x{t}", f"x{t + 1}"))
        rows.append(Row(f"mm{t}", "compute", kernel(part=Part("rtp", (t,))), f"x{t} w", f"y{t}"))
    return schedule([ring(4)], program("all", rows))


def ring_attention() -> Schedule:
    """K and V travel together in one message, uneven: ring attention with a sequence that does not divide."""
    sizes = (12, 12, 12, 10)
    kv = {n: Buffer(n, "activations", "fp16", 6, live_in=n == "kv0", live_out=True) for n in ("kv0", "kv1")}
    hop = Shift("cp", (Hop((1,), sizes, Part("cp", (0,))),))
    dims = tuple((("q", 6), ("kv", size // 2)) for size in sizes)
    rows = [
        Row("hop", "ring", hop, "kv0", "kv1"),
        Row("a0", "compute", Compute("attention", "fp16", dims[0], Part("cp", (0,)), dims), "q kv0", "o"),
        Row("a1", "compute", Compute("attention", "fp16", dims[0], Part("cp", (-1,)), dims), "q kv1 o", "o"),
    ]
    return schedule([ring(4, "cp")], program("all", rows, kv))


def rtp_in_place() -> Schedule:
    """Rotation in place: a blocking shift in chunks through a bounce buffer between the computations."""
    bounce = {"bounce": Buffer("bounce", "communication", "fp16", 32)}
    in_place = Shift("rtp", (Hop((1,), SIZE),), 64)
    rows = [
        Row("f0", "compute", kernel(), "x w", "y0"),
        Row("hop", "ring", in_place, "w", "w bounce", blocks_host=True),
        Row("f1", "compute", kernel(part=Part("rtp", (-1,))), "x w", "y1"),
    ]
    return schedule([ring(4)], program("all", rows, bounce))


def bpipe() -> Schedule:
    """Stage 0 parks an activation on the last stage and loads it back; paired stages, both directions of a
    group.
    """
    out, home = (1,), (-1,)
    first = [
        Row("F", "compute", kernel(), "x", "a"),
        Row("evict", "evict", Send("pair", out, SIZE, "evict"), "a"),
        Row("load", "evict", Recv("pair", out, SIZE, "load"), "", "b"),
        Row("B", "compute", kernel(), "b", "g"),
    ]
    last = [
        Row("keep", "evict", Recv("pair", home, SIZE, "evict"), "", "parked"),
        Row("F", "compute", kernel(), "x", "a"),
        Row("give", "evict", Send("pair", home, SIZE, "load"), "parked"),
    ]
    return schedule([ring(2, "pair")], program("first", first), program("last", last), of_rank=(0, 1))


def hybrid_shards() -> Schedule:
    """HSDP and ATP need groups along two axes of one mesh: scatter along one, all-reduce along the other."""
    shard, copies = Group("shard", (2,), ((0, 1), (2, 3))), Group("copies", (2,), ((0, 2), (1, 3)))
    rows = [
        Row("W", "compute", kernel(), "x y", "g"),
        Row("rs", "shard", collective("reduce_scatter", "shard"), "g", "gs"),
        Row("ar", "copies", collective("all_reduce", "copies"), "gs", "gs"),
        Row("step", "compute", kernel("adamw"), "w gs opt", "w opt"),
    ]
    return schedule([shard, copies], program("all", rows))


def two_level_ring() -> Schedule:
    """A ring of rings: the shard moves inside the node, and to the next node when it has been everywhere
    there.
    """
    rows = []
    for t, step in enumerate(((0, 1), (0, 1), (1, 1))):
        hop = Hop(step, SIZE, Part("grid", (0, -t)))
        rows += [
            Row(f"hop{t}", "ring", Shift("grid", (hop,)), f"w{t}", f"w{t + 1}"),
            Row(f"f{t}", "compute", kernel(part=Part("grid", (0, -t))), f"x w{t}", f"y{t}"),
        ]
    return schedule([grid(2, 3)], program("all", rows))


def interleaved_stages() -> Schedule:
    """Two chunks per rank in a loop (ZeroPP, interleaved 1F1B): chunk 1 of rank 0 follows chunk 0 of the last
    rank.
    """
    first = [
        Row("F.c0", "compute", kernel(), "x", "y0"),
        Row("out0", "pp", Send("pp", (1,), SIZE, "c0"), "y0"),
        Row("in1", "wrap", Recv("pp", (1,), SIZE, "wrap"), "", "x1"),
        Row("F.c1", "compute", kernel(), "x1", "y1"),
        Row("out1", "pp", Send("pp", (1,), SIZE, "c1"), "y1"),
    ]
    last = [
        Row("in0", "pp", Recv("pp", (-1,), SIZE, "c0"), "", "x0"),
        Row("F.c0", "compute", kernel(), "x0", "y0"),
        Row("wrap", "wrap", Send("pp", (-1,), SIZE, "wrap"), "y0"),
        Row("in1", "pp", Recv("pp", (-1,), SIZE, "c1"), "", "x1"),
        Row("F.c1", "compute", kernel(), "x1", "y1"),
    ]
    return schedule([ring(2, "pp")], program("first", first), program("last", last), of_rank=(0, 1))


SCHEMES = [
    rotation, rtp_in_place, two_level_ring, primepar, zeropp, summa, tesseract, three_dimensional, tsp, caat,
    zero_plus_plus, collective_matmul, ring_attention, two_stage_pipeline, interleaved_stages, bpipe,
    hybrid_shards,
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_passes_and_is_stored_without_loss(scheme: Callable[[], Schedule]) -> None:
    s = scheme()
    assert [f.message for f in findings(s) if f.level == "error"] == []
    assert from_text(to_text(s)) == s
    assert from_json(to_json(s)) == s


def test_both_neighbours_of_a_primepar_step() -> None:
    """Receiver (r, c) gets I from (r, c+1) and W from (r+1, c), as the paper's table of senders says."""
    s = primepar()
    action, square = s.programs[0].ops[0].action, s.groups["grid"]
    assert isinstance(action, Shift)
    for rank in range(4):
        r, c = divmod(rank, 2)
        sources = [square.peer(rank, hop.offset, -1) for hop in action.hops]
        assert sources == [2 * r + (c + 1) % 2, 2 * ((r + 1) % 2) + c]


def test_deferred_weight_gradients_do_not_delay_the_other_stage() -> None:
    """Nothing that the first stage sends or receives waits for a W, and each W only for its own inputs."""
    s = two_stage_pipeline()
    check(s)
    for p in s.programs:
        weight_grads = {o.index for o in p.ops if o.name.startswith("W")}
        for op, before in zip(p.ops, direct_predecessors(p), strict=True):
            if op.index not in weight_grads:
                assert not weight_grads & set(before)


def test_primepar_with_a_lost_dependency_fails() -> None:
    """The second product must wait for both blocks to have arrived."""
    one = primepar().programs[0]
    ops = (*one.ops[:2], replace(one.ops[2], after=()))
    (found,) = findings(replace(primepar(), programs=(Program(one.name, one.buffers, ops),)))
    assert "read-after-write hazard on 'i.b', 'w.b'" in found.message
    assert "missing dependency: %2 after %0" in found.message
