"""What users rely on around the numbers: accumulation, recomputation, dropout, copies that stay equal, groups that keep
to themselves, memory that is given back, and errors that say what was expected."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from executor_reference import EXACT, HYPER, batches_of, furthest, run_both
from strategy_helpers import EVERY_STRATEGY, bert_tiny, build, gpt2_tiny, llama_tiny, moe_tiny, stack

from rtp_sim.errors import InputError, ScheduleError
from rtp_sim.executor.dense import train_dense
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parameters import gathered, initial_parameters, unfused_parameters
from rtp_sim.executor.reference import ReferenceResult, combine, run_reference, run_step
from rtp_sim.model.layers import Activation, Linear
from rtp_sim.model.network import Network, transformer_network, unfused
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.builder import Builder
from rtp_sim.schedule.ir import Group, Op, Program, Recv, Schedule, Send, Shift

SGD = TrainingSpec(2, 4, precision="fp32", optimizer="sgd")


def gpt2_small() -> Network:
    return transformer_network(find_model("gpt2-tiny", hidden_size=24, vocab_size=36), 4)


def reference(schedule: Schedule, network: Network, spec: TrainingSpec, **options: object) -> ReferenceResult:
    """One step from the usual parameters on the usual data."""
    parameters = initial_parameters(network, dtype=torch.float64)
    batches = batches_of(schedule, network, spec, 1)
    return run_reference(schedule, network, spec, parameters, batches, hyper=HYPER, **options)  # type: ignore[arg-type]


# ---- gradients


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_the_same_micro_batch_twice_gives_the_same_gradient(strategy: str) -> None:
    """Accumulated, not overwritten (half of it), and not doubled: the step's loss is the mean."""
    network, n = gpt2_small(), 1 if strategy == "single" else 2
    parameters, found = initial_parameters(network, dtype=torch.float64), []
    for micros in (1, 2):
        spec = dataclasses.replace(SGD, num_microbatches=micros)
        schedule = build(strategy, network, n, spec)
        batches = [[b * micros for b in step] for step in batches_of(build(strategy, network, n, SGD), network, SGD, 1)]
        found.append(run_reference(schedule, network, spec, parameters, batches))
    assert furthest(found[0].gradients, found[1].gradients)[0] < EXACT


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace", "fsdp", "tp-sp"])
def test_recomputation_changes_no_bit(strategy: str) -> None:
    """Where shards are visited in another order on the way back, sums may round otherwise: rotation on 2 ranks has one
    order only."""
    network, found = gpt2_small(), []
    for recompute in ("none", "full"):
        spec = dataclasses.replace(SGD, recompute=recompute)
        found.append(reference(build(strategy, network, 2, spec), network, spec))
    assert furthest(found[0].gradients, found[1].gradients)[0] == 0


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace", "tp", "tp-sp", "ddp", "fsdp"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_dropout_drops_the_same(strategy: str, recompute: str) -> None:
    network, found = bert_tiny(4), []
    for how in ("none", recompute):
        spec = dataclasses.replace(SGD, recompute=how, attention="materialised")
        found.append(reference(build(strategy, network, 2, spec), network, spec))
    assert found[0].losses == pytest.approx(found[1].losses, abs=EXACT)
    assert furthest(found[0].gradients, found[1].gradients)[0] < EXACT


def test_dropout_differs_by_seed_and_is_the_same_on_all_ranks_of_a_tensor_parallel_group() -> None:
    network, spec = bert_tiny(4), dataclasses.replace(SGD, attention="materialised")
    schedule = build("tp", network, 2, spec)
    first, again, other = (reference(schedule, network, spec, seed=s) for s in (1, 1, 2))
    assert first.losses == again.losses != other.losses
    assert first.losses_by_rank[0][0] == first.losses_by_rank[0][1]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "rtp", "rtp-inplace", "tp", "tp-sp"])
def test_copies_of_a_parameter_stay_equal_on_all_ranks(strategy: str) -> None:
    """Norms, positions, routers and shared biases after three steps, to the bit; each rank had data of its own."""
    network = moe_tiny(4) if strategy != "ddp" else gpt2_small()
    spec = dataclasses.replace(SGD, optimizer="adamw")
    pair = run_both(strategy, network, 3, spec, steps=3)
    first, *others = pair.reference.machines
    copies = [b.name for b in first.program.buffers.values() if b.category == "weights" and not b.holds[0].split]
    copies = [name for name in copies if name in first.storage and not first.program.buffers[name].slice_of]
    assert len(copies) >= 5
    for name in copies:
        assert all(torch.equal(first.storage[name], m.storage[name]) for m in others), name


def test_in_place_is_the_same_as_out_of_place_to_the_bit() -> None:
    """A shard of 8 MiB in chunks of 1 MiB and a rest."""
    network = stack([Activation("relu", 2048), Linear(2048, 2049)], input_numel=2048)
    spec = TrainingSpec(2, 1, precision="fp32", optimizer="sgd")
    found = []
    for strategy in ("rtp", "rtp-inplace"):
        schedule = build(strategy, network, 2, spec, rtp_chunk_bytes=1_000_000)
        parameters, batches = initial_parameters(network), batches_of(schedule, network, spec, 1)
        found.append(run_reference(schedule, network, spec, parameters, batches, float64=False))
    assert furthest(found[0].gradients, found[1].gradients)[0] == 0
    assert furthest(found[0].parameters, found[1].parameters)[0] == 0
    assert [t["shift"][1] for t in found[1].traffic] == [27, 27]


# ---- a wrong schedule shows


def without(schedule: Schedule, unwanted: str) -> Schedule:
    """The schedule with the first op whose name holds `unwanted` left out."""
    program = schedule.programs[0]
    gone = next(op for op in program.ops if unwanted in op.name)
    ops = tuple(dataclasses.replace(op, after=()) for op in program.ops if op is not gone)
    renumbered = tuple(dataclasses.replace(op, index=i) for i, op in enumerate(ops))
    return dataclasses.replace(schedule, programs=(Program(program.name, program.buffers, renumbered),))


@pytest.mark.parametrize(
    ("strategy", "unwanted", "n"),
    [
        ("ddp", "reduce.0", 2), ("rtp", "reduce_replicated", 2), ("rtp-inplace", "h0.mlp.up.F1.hop", 3),
        ("rtp-inplace", "h1.attn.B1.grad", 3), ("tp", "h0.attn.F.all_reduce", 2), ("tp", "B.reduce.h0.norm2.y", 2),
        ("tp", "loss.F.max", 2), ("tp-sp", "reduce_partial_gradients", 2),
    ],
)  # fmt: skip
def test_a_missing_communication_makes_the_gradients_wrong(strategy: str, unwanted: str, n: int) -> None:
    network = unfused(gpt2_small()) if strategy.startswith("rtp") else gpt2_small()
    schedule = build(strategy, network, n, SGD)
    right, wrong = reference(schedule, network, SGD), reference(without(schedule, unwanted), network, SGD)
    assert furthest(right.gradients, wrong.gradients)[0] > 1e-5


# ---- groups


class Addressed(Machine):
    """Notes whom the rank sends to."""

    to: set[int]

    def transfers(self, op: Op) -> list[Transfer]:
        """As always."""
        found = super().transfers(op)
        self.to = getattr(self, "to", set()) | {t.to for t in found}
        return found


def test_rings_keep_to_themselves() -> None:
    """Two rings of two: hops stay in the ring; only gradients cross, by collectives of the data-parallel group."""
    network = unfused(gpt2_small())
    schedule = build("rtp", network, 2, SGD, dp=2)
    machines = [Addressed(schedule, r, network, SGD, initial_parameters(network)) for r in range(4)]
    run_step(schedule, machines, batches_of(schedule, network, SGD, 1)[0])
    assert [m.to for m in machines] == [{1}, {0}, {3}, {2}]


# ---- memory


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_what_is_held_after_a_step_is_what_the_schedule_keeps(strategy: str) -> None:
    """In bytes, by category, on every rank; optimizer states (8 bytes per parameter of AdamW in fp32) included."""
    network = gpt2_small()
    spec = dataclasses.replace(SGD, optimizer="adamw")
    schedule = build(strategy, network, 1 if strategy == "single" else 3, spec)
    result = reference(schedule, network, spec, float64=False)
    for m in result.machines:
        wanted: dict[str, int] = {}
        for b in m.program.buffers.values():
            if b.live_out:
                size_bytes = b.size_bytes(schedule.shard_index(m.rank, b.part))
                wanted[b.category] = wanted.get(b.category, 0) + size_bytes
        # Weights, states and the loss; inputs are gone.
        assert {c: n for c, n in m.storage.bytes_by_category.items() if n} == {c: n for c, n in wanted.items() if n}
        assert m.storage.peak_bytes > sum(wanted.values())


def test_rotation_needs_less_memory_than_replication() -> None:
    """Weights, gradients and states a quarter each; the peak counts everything that lived at one time."""
    network, spec = gpt2_tiny(), TrainingSpec(1, 8, precision="fp32")
    peaks = {}
    for strategy in ("ddp", "rtp"):
        schedule = build(strategy, network, 4, spec)
        executed = unfused(network) if strategy == "rtp" else network
        peaks[strategy] = reference(schedule, executed, spec, float64=False).peak_bytes[0]
    assert peaks["rtp"] < 0.45 * peaks["ddp"]


# ---- precision


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "rtp", "tp-sp", "zero1"])
def test_bf16_with_master_weights_follows_fp64(strategy: str) -> None:
    """bf16 keeps 8 bits: after two steps of SGD the loss is within a few per cent, and weights move by less than a bf16
    step can show only because the fp32 masters collect them."""
    network = llama_tiny(4)
    spec = TrainingSpec(2, 4, precision="bf16", optimizer="sgd")
    schedule = build(strategy, network, 2, spec)
    executed = unfused(network) if strategy == "rtp" else network
    parameters, batches = initial_parameters(executed, dtype=torch.float64), batches_of(schedule, executed, spec, 2)
    low = run_reference(schedule, network, spec, parameters, batches, float64=False, hyper=HYPER)
    dense = train_dense(executed, parameters, batches, 2, "sgd", HYPER.lr)
    assert low.losses == pytest.approx(dense.losses, rel=0.03)
    assert {t.dtype for m in low.machines for n, t in m.storage.items() if n[0] == "w"} == {torch.bfloat16}
    assert all(
        s.master is not None and s.master.dtype is torch.float32 for m in low.machines for s in m.states.values()
    )


# ---- parameters


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp", "tp", "tp-sp", "rtp", "rtp-inplace"])
@pytest.mark.parametrize("n", [1, 3])
def test_parameters_come_back_from_the_ranks_buffers(strategy: str, n: int) -> None:
    network = gpt2_small()
    schedule = build(strategy, network, n, SGD, **({"rtp_fuse_mlp": True} if strategy.startswith("rtp") else {}))
    parameters = initial_parameters(network)
    machines = [Machine(schedule, r, network, SGD, parameters) for r in range(n)]
    assert furthest(gathered(schedule, network, [m.storage for m in machines]), parameters)[0] == 0


def test_an_unfused_network_starts_with_the_same_numbers() -> None:
    network = gpt2_small()
    fused, split = initial_parameters(network, 3), initial_parameters(unfused(network), 3)
    assert furthest(unfused_parameters(network, fused), split)[0] == 0
    assert furthest(fused, initial_parameters(network, 3))[0] == 0
    assert furthest(fused, initial_parameters(network, 4))[0] > 0


def test_machines_unfuse_parameters_where_the_schedule_rotates_them_apart() -> None:
    network = gpt2_small()
    schedule = build("rtp", network, 2, SGD)
    batches = batches_of(schedule, network, SGD, 1)
    fused = run_reference(schedule, network, SGD, initial_parameters(network), batches)
    split = run_reference(schedule, unfused(network), SGD, initial_parameters(unfused(network)), batches)
    assert fused.losses == split.losses


# ---- point to point, and the other collectives


def neighbours() -> tuple[Schedule, Network]:
    """Three ranks in a row: each sends its input to the next."""
    b = Builder("row")
    b.buffer("m0/x", "activations", "fp32", 2, live_in=True)
    b.buffer("m0/got", "activations", "fp32", 2, live_out=True)
    b.op("send", "send", Send("row", (1,), 8, "t"), ("m0/x",))
    b.op("recv", "recv", Recv("row", (-1,), 8, "t"), (), ("m0/got",))
    network = stack([Linear(2, 2)], input_numel=2)
    return Schedule("row", 3, {"row": Group("row", (3,), ((0, 1, 2),))}, (b.program(),), (0, 0, 0)), network


def test_sends_and_receives() -> None:
    schedule, network = neighbours()
    spec = TrainingSpec(1, 1, precision="fp32")
    machines = [Machine(schedule, r, network, spec, initial_parameters(network)) for r in range(3)]
    batches = [[{"x": torch.tensor([r, 10.0 + r])}] for r in range(3)]
    traffic = run_step(schedule, machines, batches)
    assert "m0/got" not in machines[0].storage
    assert [m.storage["m0/got"].tolist() for m in machines[1:]] == [[0, 10], [1, 11]]
    assert traffic == [{"send": (8, 1)}, {"send": (8, 1)}, {}]


def test_a_receive_without_a_send_says_so() -> None:
    schedule, network = neighbours()
    spec = TrainingSpec(1, 1, precision="fp32")
    alone = without(schedule, "send")
    machines = [Machine(alone, r, network, spec, initial_parameters(network)) for r in range(3)]
    with pytest.raises(ScheduleError, match="recv: nothing was sent with tag 't'"):
        run_step(alone, machines, [[{"x": torch.zeros(2)}]] * 3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("broadcast", [[5, 6], [5, 6]]),
        ("reduce", [[1, 2], [6, 8]]),
        ("all_reduce", [[6, 8], [6, 8]]),
        ("all_to_all", [[1, 5], [2, 6]]),
    ],
)
def test_collectives_by_hand(kind: str, expected: list[list[float]]) -> None:
    """Rank 0 has [1, 2], rank 1, the root, [5, 6]."""
    sent = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])]
    received = [torch.empty(2) for _ in sent] if kind == "all_to_all" else sent
    parcels = [Parcel(kind, (0, 1), s, r, 2, root=1) for s, r in zip(sent, received, strict=True)]
    combine(parcels)
    assert [p.receive.tolist() for p in parcels] == expected


def test_chunks_of_an_in_place_hop() -> None:
    """10 bytes out and 7 in, 4 at a time: 3 rounds, the last with 2 bytes out and none in."""
    flat = torch.arange(10, dtype=torch.uint8)
    t = Transfer(1, 2, flat, flat[:7], torch.empty(4, dtype=torch.uint8))
    sizes = [(r.send.numel(), r.receive.numel(), None if r.into is None else r.into.numel()) for r in t.rounds()]
    assert sizes == [(4, 4, 4), (4, 3, 3), (2, 0, 0)]
    assert (t.messages, t.sent_bytes) == (3, 10)


# ---- mistakes


def test_batches_that_do_not_fit() -> None:
    network = gpt2_small()
    machine = Machine(build("single", network, 1, SGD), 0, network, SGD, initial_parameters(network))
    ids = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(InputError, match=r"no tensor 'targets' for micro-batch 0; expected ids, targets"):
        machine.start_step([{"ids": ids}])
    with pytest.raises(InputError, match=r"'ids' of micro-batch 0 has 7 elements, expected 8"):
        machine.start_step([{"ids": ids[:7], "targets": ids}])


def test_a_network_that_the_schedule_was_not_made_for() -> None:
    schedule = build("single", gpt2_small(), 1, SGD)
    with pytest.raises(InputError, match=r"works on layer 'l7', which the network stack does not have|does not have"):
        Machine(schedule, 0, stack([Linear(2, 2)]), SGD, {})


def test_a_schedule_that_leaves_its_weights_elsewhere_runs_once() -> None:
    """As a schedule by hand may: the next step would start with other weights."""
    network, schedule = gpt2_small(), build("single", gpt2_small(), 1, SGD)
    program = schedule.programs[0]
    name = "w.h0.attn"
    gone = dict(program.buffers) | {name: dataclasses.replace(program.buffers[name], live_out=False)}
    once = dataclasses.replace(schedule, programs=(dataclasses.replace(program, buffers=gone),))
    machines = [Machine(once, 0, network, SGD, initial_parameters(network))]
    (step,) = batches_of(once, network, SGD, 1)
    run_step(once, machines, step)
    with pytest.raises(ScheduleError, match=r"weights 'w\.h0\.attn' are not where .* can run once only"):
        run_step(once, machines, step)


def test_ranks_with_different_programs_are_not_in_lockstep() -> None:
    schedule, network = neighbours()
    two = dataclasses.replace(schedule, programs=schedule.programs * 2, program_of_rank=(0, 0, 1))
    machines = [Machine(two, r, network, SGD, initial_parameters(network)) for r in range(3)]
    with pytest.raises(ScheduleError, match="expected one program"):
        run_step(two, machines, [])


def test_every_hop_is_one_message() -> None:
    network = unfused(gpt2_small())
    schedule = build("rtp", network, 3, SGD)
    hops = sum(isinstance(op.action, Shift) for op in schedule.programs[0].ops)
    result = reference(schedule, network, SGD)
    assert [t["shift"][1] for t in result.traffic] == [hops] * 3
