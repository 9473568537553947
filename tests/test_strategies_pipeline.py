"""Pipelines: step times, bubbles and activations in flight in closed form, bytes and messages, cuts and groups.

Stages of equal work: one linear layer each, whose forward takes f, input gradient i and weight gradient w; everything
else and all links are free. The norm in front makes the first stage want an input gradient as the others do.
"""

from __future__ import annotations

from itertools import product

import pytest
from strategy_helpers import FlatCost, between_linears, build_pipeline, gpt2_tiny, llama_tiny

from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import Linear
from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.checks import findings
from rtp_sim.schedule.ir import Collective, Recv, Schedule, Send
from rtp_sim.schedule.layout import make_groups, make_layout, stage_of_rank
from rtp_sim.schedule.pipeline_order import PIPELINES, held
from rtp_sim.schedule.stages import cut

WIDTH = 6
TIMES = [(100, 100, 100), (100, 120, 90), (50, 70, 60)]
"""f, i, w in ns."""


def equal_stages(strategy: str, p: int, m: int, chunks: int = 1) -> Schedule:
    """A linear layer per chunk of each stage."""
    network = between_linears([Linear(WIDTH, WIDTH, bias=False)] * (p * chunks), WIDTH)
    spec = TrainingSpec(2, 1, num_microbatches=m, precision="fp32", optimizer="sgd")
    options = {"vpp": chunks} if strategy == "interleaved" else {}
    return build_pipeline(strategy, network, p, spec, pp_layers=(2, *(1,) * (p * chunks - 1)), **options)


def step_ns(strategy: str, p: int, m: int, times: tuple[int, int, int], chunks: int = 1) -> int:
    """Of both engines, which must agree. Times are those of a whole stage, shared by its chunks."""
    f, i, w = (t // chunks for t in times)
    cost = FlatCost({"linear": f, "linear.dgrad": i, "linear.wgrad": w})
    schedule = equal_stages(strategy, p, m, chunks)
    found = longest_path(schedule, cost).step_time_ns
    assert simulate(schedule, cost).step_time_ns == found
    return found


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 4, 9])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("strategy", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_take_m_plus_p_minus_1_rounds(
    strategy: str, p: int, m: int, times: tuple[int, int, int]
) -> None:
    assert step_ns(strategy, p, m, times) == (m + p - 1) * sum(times)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 6), (3, 6), (4, 8)])
@pytest.mark.parametrize("chunks", [2, 5])
def test_interleaving_divides_the_bubble_by_the_chunks(p: int, m: int, chunks: int) -> None:
    for times in TIMES:
        assert step_ns("interleaved", p, m, times, chunks) == m * sum(times) + (p - 1) * sum(times) // chunks


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 8), (4, 13)])
@pytest.mark.parametrize("times", TIMES)
def test_zero_bubble_h1(p: int, m: int, times: tuple[int, int, int]) -> None:
    """arXiv 2401.10241: the bubble (p - 1)(f + b - 2 w) of 1F1B's b = i + w, as long as w <= f. Longer weight gradients
    cannot fill the wait of the first stage for its first gradient, p f + (p - 1) i after p forwards."""
    f, i, w = times
    assert step_ns("zb-h1", p, m, times) == m * (f + i + w) + (p - 1) * max(f + i - w, i)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 8), (4, 13)])
def test_zero_bubble_h2_and_v_idle_only_for_the_first_forward(p: int, m: int) -> None:
    """f = i = w = 100: stage s starts after s forwards (half ones in a V) and never waits again."""
    assert step_ns("zb-h2", p, m, TIMES[0]) == m * 300 + (p - 1) * 100
    assert step_ns("zb-v", p, m, TIMES[0], 2) == m * 300 + (p - 1) * 50


def test_published_makespans() -> None:
    """Unit costs of 100 ns; the ideal is 3 m."""
    for p, m, expected in ((4, 8, (3300, 2850, 2625, 2700, 2550)), (8, 32, (11700, 10650, 10125, 10300, 9950))):
        found = [step_ns("1f1b", p, m, TIMES[0]), step_ns("interleaved", p, m, TIMES[0], 2)]
        found += [step_ns("interleaved", p, m, TIMES[0], 4), step_ns("zb-h1", p, m, TIMES[0])]
        assert (*found, step_ns("zb-v", p, m, TIMES[0], 2)) == expected


# ---- activations in flight


def most_held(strategy: str, p: int, m: int, chunks: int = 1) -> list[int]:
    """Per stage the most chunk activations held."""
    return [max(held(PIPELINES[strategy].order(p, s, m, chunks))) for s in range(p)]


def test_activations_in_flight() -> None:
    p, m = 4, 12
    assert most_held("gpipe", p, m) == [m] * p
    assert most_held("1f1b", p, m) == [min(m, p - s) for s in range(p)]
    assert most_held("1f1b", p, 2) == [2, 2, 2, 1]
    assert most_held("interleaved", p, m, 3) == [2 * p + 2 * (p - s - 1) + 1 for s in range(p)]
    assert most_held("zb-h1", p, m) == [p] * p
    assert most_held("zb-h2", p, m) == [2 * p - 1] * p
    assert most_held("zb-v", p, m, 2) == [2 * p] * p


def test_an_input_is_kept_until_its_weight_gradient() -> None:
    """What the simulated stages hold: per stage the most linear inputs alive between forward and weight gradient."""
    for strategy, expected in (("gpipe", [8] * 4), ("1f1b", [4, 3, 2, 1]), ("zb-h1", [4] * 4), ("zb-h2", [7] * 4)):
        schedule = equal_stages(strategy, 4, 8)
        timeline = longest_path(schedule, FlatCost({"linear": 10, "linear.dgrad": 10, "linear.wgrad": 10}))
        found = []
        for rank in range(4):
            layer = f".l{rank + 1}."
            ends = []
            for span in timeline.spans(rank):
                if layer in span.op.name and span.op.name.endswith(".linear"):
                    ends.append((span.start_ns, 1))
                elif layer in span.op.name and span.op.name.endswith(".wgrad"):
                    ends.append((span.end_ns, -1))
            level = most = 0
            for _, change in sorted(ends):
                level += change
                most = max(most, level)
            found.append(most)
        assert found == expected, strategy


# ---- traffic


def sends(schedule: Schedule, rank: int) -> tuple[int, int]:
    """Bytes and messages."""
    return communication_totals(schedule, rank)[2].get("send", (0, 0))


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe", "zb-h1", "zb-h2"])
def test_every_cut_is_crossed_once_per_pass_and_micro_batch(strategy: str) -> None:
    """Forward and backward 2 x 8 x 64 fp32 numbers each."""
    spec = TrainingSpec(2, 8, num_microbatches=5, precision="fp32")
    schedule = build_pipeline(strategy, four_layers(), 4, spec)
    one = 2 * 8 * 64 * 4
    assert [sends(schedule, r) for r in range(4)] == [(5 * n * one, 5 * n) for n in (1, 2, 2, 1)]


def test_more_chunks_more_messages() -> None:
    """v chunks: 2 (p v - 1) messages per micro-batch in all; the turn of the V crosses no link."""
    spec = TrainingSpec(2, 8, num_microbatches=4, precision="fp32")
    total = sum(sends(build_pipeline("interleaved", four_layers(), 2, spec, vpp=2), r)[1] for r in range(2))
    assert total == 4 * 2 * (2 * 2 - 1)
    total = sum(sends(build_pipeline("zb-v", four_layers(), 2, spec), r)[1] for r in range(2))
    assert total == 4 * 2 * (2 * 2 - 1 - 1)


def test_tensor_parallel_ranks_send_all_or_their_share() -> None:
    spec = TrainingSpec(2, 8, num_microbatches=3, precision="fp32")
    one = 2 * 8 * 64 * 4
    whole = build_pipeline("1f1b", four_layers(), 2, spec, tp=2)
    rows = build_pipeline("1f1b", four_layers(), 2, spec, tp=2, sequence_parallel=True)
    scattered = build_pipeline("1f1b", four_layers(), 2, spec, tp=2, pp_scatter_gather=True)
    assert [sends(s, 0) for s in (whole, rows, scattered)] == [(3 * one, 3), (3 * one // 2, 3), (3 * one // 2, 3)]
    gathers = [op for op in scattered.programs[1].ops if op.name.endswith(".gather")]
    assert [op.action.size_bytes for op in gathers if isinstance(op.action, Collective)] == [one] * 3


@pytest.mark.parametrize("sync", ["ddp", "zero1"])
def test_gradients_are_reduced_once_and_shared_ones_added_up(sync: str) -> None:
    """Tied: each stage reduces its parameters over dp, the copy in the head too; both copies meet once."""
    network, spec = four_layers(), TrainingSpec(2, 8, num_microbatches=3, precision="fp32")
    schedule = build_pipeline("1f1b", network, 2, spec, dp=2, dp_sync=sync)
    table, positions, layer = 256 * 64, 64 * 64, 12 * 64 * 64 + 13 * 64
    expected = [table + positions + 2 * layer, 2 * layer + 2 * 64 + table]
    for stage, parameters in enumerate(expected):
        reduced = [
            op.action.size_bytes // 4
            for op in schedule.programs[stage].ops
            if isinstance(op.action, Collective) and op.action.group == "dp" and op.action.kind != "all_gather"
        ]
        assert sum(reduced) == parameters
        shared = [op for op in schedule.programs[stage].ops if op.name.startswith("reduce_shared")]
        assert [op.action.size_bytes for op in shared if isinstance(op.action, Collective)] == [table * 4]


def test_without_overlap_one_reduction_follows_the_last_backward() -> None:
    spec = TrainingSpec(2, 8, num_microbatches=3, precision="fp32")
    schedule = build_pipeline("1f1b", four_layers(), 2, spec, dp=2, dp_overlap=False)
    for program in schedule.programs:
        places = [op.index for op in program.ops if isinstance(op.action, Collective) and op.action.group == "dp"]
        backwards = [op.index for op in program.ops if ".B." in op.name]
        assert len(places) == 1
        assert places[0] > max(backwards)


# ---- every combination is sound

VARIANTS: list[dict[str, object]] = [
    {}, {"tp": 2}, {"dp": 2, "dp_sync": "zero1"}, {"tp": 2, "dp": 2, "sequence_parallel": True},
    {"tp": 2, "pp_scatter_gather": True, "pp_overlap": False}, {"dp": 2, "dp_overlap": False},
]  # fmt: skip


def four_layers() -> Network:
    """gpt2-tiny with four blocks, tied embeddings, 8 tokens."""
    return transformer_network(find_model("gpt2-tiny", num_layers=4), 8)


@pytest.mark.parametrize("strategy", PIPELINES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_checks_find_nothing_and_the_engines_agree(strategy: str, recompute: str) -> None:
    spec = TrainingSpec(2, 8, num_microbatches=4, precision="fp32", recompute=recompute)
    for network, pp, variant in product((four_layers(), llama_tiny()), (1, 2), VARIANTS):
        if len(network.blocks) == 4 and strategy in ("interleaved", "zb-v") and pp == 2:
            continue
        options = {"vpp": 2, **variant} if strategy == "interleaved" else variant
        schedule = build_pipeline(strategy, network, pp, spec, **options)  # type: ignore[arg-type]
        assert [f.message for f in findings(schedule) if f.level == "error"] == []
        cost = FlatCost({"linear": 11, "linear.dgrad": 13, "linear.wgrad": 17}, 5, other_ns=7)
        assert simulate(schedule, cost).step_time_ns == longest_path(schedule, cost).step_time_ns


def test_sends_and_receives_meet() -> None:
    spec = TrainingSpec(2, 8, num_microbatches=4, precision="fp32")
    schedule = build_pipeline("zb-v", four_layers(), 2, spec)
    ops = [op.action for program in schedule.programs for op in program.ops]
    sent, received = ({a.tag for a in ops if isinstance(a, kind)} for kind in (Send, Recv))
    assert sent == received


# ---- cuts


@pytest.mark.parametrize(
    ("layers", "parts", "expected"),
    [
        (8, 4, (2, 2, 2, 2)),
        (30, 8, (3, *(4,) * 6, 3)),
        (22, 8, (2, *(3,) * 6, 2)),
        (10, 3, (3, 4, 3)),
        (5, 3, (2, 2, 1)),
    ],
)
def test_blocks_per_stage(layers: int, parts: int, expected: tuple[int, ...]) -> None:
    """Where embedding and head make the numbers even they count as a block, as in the zero-bubble runs."""
    network = transformer_network(find_model("gpt2-tiny", num_layers=layers), 8)
    stages = cut(network, parts, 1, False, (), "layers")
    counts = tuple(sum(b.recomputable for b in piece) for piece in stages.pieces)
    assert counts == expected
    assert stages.pieces[0][0].name == "embed"
    assert stages.pieces[-1][-1].name == "head"


def test_balance_by_cost_counts_the_head() -> None:
    """16 layers of 4 h h + 3 h f = 67.1 M weights and a head of 131,072 x 2,048 = 268.4 M, of which half counts: two
    layers more. Half of 18 is passed by the 10th layer (9 reach it exactly); quarters, 4.5, by the 5th, 10th and 14th;
    eighths, 2.25, by the 3rd, 5th, 7th, 10th, 12th, 14th and 16th. Sixteenths, 1.125, are passed by each from the 2nd
    on but the 9th (9 reach 8 of them exactly); norm and logits fill the 15th piece, and the loss is left alone."""
    network = transformer_network(
        find_model("llama2-7b", num_layers=16, hidden_size=2048, ffn_hidden_size=8192, vocab_size=131072,
                   num_heads=32, num_kv_heads=32), 4096,
    )  # fmt: skip
    for parts, expected in ((2, (10, 6)), (4, (5, 5, 4, 2)), (8, (3, 2, 2, 3, 2, 2, 2, 0)),
                            (16, (2, *(1,) * 6, 2, *(1,) * 6, 0, 0))):  # fmt: skip
        stages = cut(network, parts, 1, False, (), "cost")
        assert tuple(sum(b.recomputable for b in piece) for piece in stages.pieces) == expected
    assert [[x.name for x in b.layers] for b in stages.pieces[-2]] == [["head.norm", "head.logits"]]
    assert stages.crossing[-1] == "head.logits.y"


def test_a_v_turns_at_the_last_stage() -> None:
    stages = cut(transformer_network(find_model("gpt2-tiny", num_layers=8), 8), 4, 2, True, (), "layers")
    names = [[b.name for b in stages.blocks(s)] for s in range(4)]
    assert names == [["embed", "h0", "h7", "head"], ["h1", "h6"], ["h2", "h5"], ["h3", "h4"]]
    assert [stages.stage_of(k) for k in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("strategy", "pp", "options", "said"),
    [
        ("1f1b", 5, {}, "4 blocks are too few for 5 stages"),
        ("1f1b", 2, {"pp_layers": (1, 2)}, "--pp-layers 1,2: expected 2 numbers of at least 1 that sum to"),
        ("1f1b", 2, {"vpp": 2}, "--vpp 2: 1f1b has 1 chunk(s) per stage"),
        ("1f1b", 2, {"dp_sync": "zero2"}, "expected ddp or zero1"),
        ("interleaved", 2, {"vpp": 2}, "3 micro-batches are no multiple of 2 stages"),
        ("1f1b", 2, {"tp": 3, "sequence_parallel": True}, "what stages exchange must divide: 16 tokens over 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_said(strategy: str, pp: int, options: dict[str, object], said: str) -> None:
    spec = TrainingSpec(2, 8, num_microbatches=3, precision="fp32")
    with pytest.raises(InputError) as error:
        build_pipeline(strategy, four_layers(), pp, spec, **options)  # type: ignore[arg-type]
    assert said in str(error.value)


# ---- ranks


def test_megatron_places_tp_then_dp_then_pp() -> None:
    """On two nodes of 8 with tp=2, dp=4, pp=2: stages on nodes of their own, replicas inside."""
    topology = load_cluster("dgx-a100-80g", 2, None).topology
    layout = make_layout("1f1b", 16, 2, None, 2)
    groups = make_groups(layout, topology)
    assert str(layout) == "tp=2 dp=4 pp=2"
    assert {frozenset(g) for g in groups["tp"].instances} == {frozenset((r, r + 1)) for r in range(0, 16, 2)}
    assert {frozenset(g) for g in groups["dp"].instances} == {frozenset(range(r, r + 8, 2)) for r in (0, 1, 8, 9)}
    assert set(groups["pp"].instances) == {(r, r + 8) for r in range(8)}
    assert [stage_of_rank(layout, r) for r in range(16)] == [0] * 8 + [1] * 8
    for line in groups["pp"].instances:
        assert groups["tp"].position(line[0]) == groups["tp"].position(line[1])
        assert groups["dp"].position(line[0]) == groups["dp"].position(line[1])


def test_stages_can_lie_inside_replicas() -> None:
    layout = make_layout("1f1b", 16, 2, 4, None, "tp-pp-dp")
    groups = make_groups(layout, load_cluster("dgx-a100-80g", 2, None).topology)
    assert set(groups["pp"].instances) == {(r, r + 2) for r in range(16) if r % 4 < 2}
    assert [stage_of_rank(layout, r) for r in range(8)] == [0, 0, 1, 1] * 2


def test_degrees_that_are_left_out() -> None:
    assert make_layout("1f1b", 16, None, None, 4) == make_layout("1f1b", 16, 1, 4, 4)
    assert make_layout("1f1b", 16, 2, None, None) == make_layout("1f1b", 16, 2, 1, 8)
    with pytest.raises(InputError, match="tp x dp x pp = 3 x 2 x 2 = 12, but there are 16 GPUs"):
        make_layout("1f1b", 16, 3, 2, 2)
    with pytest.raises(InputError, match="has no pipeline: leave --pp 2 out"):
        make_layout("ddp", 16, None, None, 2)


def test_the_tiny_model_has_its_published_shape() -> None:
    """What the counts above rest on: width 64, vocabulary 256, 64 learned positions."""
    spec = find_model("gpt2-tiny")
    assert (spec.hidden_size, spec.vocab_size, spec.max_positions) == (64, 256, 64)
    assert gpt2_tiny().parameter_count() == 256 * 64 + 64 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
