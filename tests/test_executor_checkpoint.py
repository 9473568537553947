"""Training states on disk: saved by real ranks, loaded by others, read by torch alone, and what cannot be loaded.

One training goes from layout to layout: two ranks start it, one goes on, then four, then three, each from what another
left. At every stage it is the dense training, in double precision.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from executor_helpers import ROOT, answered, gone, started, work_off
from executor_layouts import EXACT, ONE_UNIT, SCALED, ZERO1, Layout, as_bf16, dense, dense_state, layouts, named
from strategy_helpers import gpt2_tiny, image_network, llama_tiny, moe_tiny
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from rtp_sim.errors import InputError
from rtp_sim.executor import checkpoint, checkpoint_files
from rtp_sim.executor.collect import collect
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parameters import blank_parameters, gathered, initial_parameters
from rtp_sim.executor.pieces import boxes
from rtp_sim.executor.reference import run_step
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.model.network import Network, unfused

SAME = (
    Layout("rtp-inplace", 3, options=(("rtp_chunk_bytes", 12_000),)), Layout("fsdp", 3), Layout("tp-sp", 3),
    as_bf16(Layout("zero1", 3, optimizer="sgd-momentum")), as_bf16(Layout("rtp", 3, micros=2)),
    Layout("zero2", 3, precision="fp16", changes=SCALED),
)  # fmt: skip
"""Layouts that go on from where they themselves were, in their own precision."""


def chain() -> list[tuple[Layout, Layout | None]]:
    """Layouts in the order they run in, each with the one whose state it goes on from."""
    two = [Layout("ddp", 2), Layout("rtp", 2), Layout("fsdp", 2), Layout("tp-sp", 2)]
    four = layouts(4)
    three = [x for x in layouts(3) if x.strategy not in ("ddp", "tp-sp", "zero1")]
    (one,) = layouts(1)
    found: list[tuple[Layout, Layout | None]] = [(layout, None) for layout in two]
    found += [(one, two[0])]
    # Every second of the four-rank layouts grows from one rank, the others from a pair.
    found += [(layout, one if i % 2 else two[i % len(two)]) for i, layout in enumerate(four)]
    found += [(layout, four[(2 * i + 5) % len(four)]) for i, layout in enumerate(three)]
    return found


CHAIN = chain()
ORDER = (2, 1, 4, 3)


def half_of(layout: Layout) -> int:
    """Steps before and after the state in the middle."""
    return 8 if layout.changes else 2


def steps_before(layout: Layout) -> int:
    source = dict(CHAIN)[layout]
    return 0 if source is None else steps_before(source) + 2


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`states/<layout>` is what each layout saved, `runs/<layout>` its run."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("checkpoints")
    for ranks in ORDER:
        jobs: list[dict[str, object]] = []
        for layout, source in ((x, s) for x, s in CHAIN if x.ranks == ranks):
            load = {} if source is None else {"load": path / "states" / source.name}
            run = layout.run(path / "runs" / layout.name, save=path / "states" / layout.name, **load)
            jobs.append({"run": str(run.path)})
        for layout in (x for x in SAME if x.ranks == ranks):
            name, states = f"same-{layout.name}", path / "states"
            half = half_of(layout)
            whole = layout.run(path / "runs" / name, steps=2 * half, float_dtype="", save=states / name,
                               save_every=half)  # fmt: skip
            again = layout.run(path / "runs" / f"{name}-again", steps=half, float_dtype="",
                               load=states / name / f"step-{half:08d}", save=states / f"{name}-again")  # fmt: skip
            jobs += [{"run": str(whole.path)}, {"run": str(again.path)}]
        work_off(jobs, ranks, path)
    return path


def full_state(path: Path, tmp_path: Path) -> dict[str, object]:
    """A checkpoint read by torch alone."""
    dcp_to_torch_save(path, tmp_path / "full.pt")
    found = torch.load(tmp_path / "full.pt", weights_only=True)
    assert isinstance(found, dict)
    return found


def assert_close(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}")


def losses(path: Path) -> list[float]:
    run = RunDirectory(path)
    return list(collect(run, *run.load())["loss"])


# ---- on real ranks


@pytest.mark.parametrize("layout", [x for x, _ in CHAIN], ids=lambda x: x.name)
def test_training_goes_on_as_if_nothing_had_happened(states: Path, tmp_path: Path, layout: Layout):
    """Whatever layout the state came from: losses, weights and Adam's moments are those of dense training."""
    before = steps_before(layout)
    assert losses(states / "runs" / layout.name) == pytest.approx(dense(before + 2).losses[before:], abs=EXACT)
    found = full_state(states / "states" / layout.name / f"step-{before + 2:08d}", tmp_path)
    assert found["training"] == {"step": before + 2, "seed": 0, "optimizer": "adamw", "left_out": 0}
    expected = dense_state(before + 2)
    assert found.keys() == {"training", "model", "optimizer"}
    assert_close(found["model"], expected["model"])
    assert found["optimizer"].keys() == {"exp_avg", "exp_avg_sq"}
    assert_close(found["optimizer"]["exp_avg"], expected["exp_avg"])
    assert_close(found["optimizer"]["exp_avg_sq"], expected["exp_avg_sq"])


@pytest.mark.parametrize("layout", SAME, ids=lambda x: x.name)
def test_the_same_layout_goes_on_to_the_bit(states: Path, tmp_path: Path, layout: Layout):
    """All steps at once, or half of them, and the others from the state after these."""
    name, half = f"same-{layout.name}", half_of(layout)
    whole = full_state(states / "states" / name / f"step-{2 * half:08d}", tmp_path)
    again = full_state(states / "states" / f"{name}-again" / f"step-{2 * half:08d}", tmp_path)
    assert losses(states / "runs" / name)[half:] == losses(states / "runs" / f"{name}-again")
    if layout.changes:
        facts = full_state(states / "states" / name / f"step-{half:08d}", tmp_path)["training"]
        # Each update that was left out has halved the scale.
        assert 0 < facts["left_out"] < half
        assert facts["loss_scale"] == 2.0 ** (21 - facts["left_out"])
        assert facts["good_steps"] == half - facts["left_out"]
    flat = [{(k, *path): v for k, part in s.items() for path, v in leaves(part)} for s in (whole, again)]
    assert flat[0].keys() == flat[1].keys()
    for key, value in flat[0].items():
        other = flat[1][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    if layout.precision == "bf16":
        assert whole["model"]["h0.attn.qkv"].dtype == torch.bfloat16
        assert whole["optimizer"]["master"]["h0.attn.qkv"].dtype == torch.float32


def leaves(value: object, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    if not isinstance(value, dict):
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]


@pytest.mark.parametrize("layout", [Layout("fsdp", 4), Layout("rtp", 4), Layout("tp", 4)], ids=lambda x: x.name)
def test_ranks_write_only_their_shards(states: Path, layout: Layout):
    """A third of it all is weights; no rank's file has much more than a quarter of everything."""
    path = states / "states" / layout.name / f"step-{steps_before(layout) + 2:08d}"
    sizes = [file.stat().st_size for file in sorted(path.glob("*.distcp"))]
    numel = sum(t.numel() for t in dense_state(2)["model"].values())
    assert len(sizes) == 4
    # 3 numbers of 8 bytes per parameter, and about 0.5 KiB around each chunk.
    assert numel * 24 < sum(sizes) < numel * 24 * 2
    assert max(sizes) < 0.45 * sum(sizes)


def test_the_result_says_where_it_went_on(states: Path):
    layout, source = next((x, s) for x, s in CHAIN if x.ranks == 3)
    assert source is not None
    run = RunDirectory(states / "runs" / layout.name)
    result = collect(run, *run.load())
    assert (result["first_step"], result["saved_steps"]) == (steps_before(layout), [steps_before(layout) + 2])


# ---- every layout's shards, without processes


def machines_of(layout: Layout, network: Network, path: Path) -> list[Machine]:
    """All ranks' machines with the state in `path`."""
    schedule, state = layout.schedule(network), checkpoint.open_checkpoint(path)
    found = [
        Machine(schedule, r, network, layout.training, blank_parameters(network), float_dtype=torch.float64)
        for r in range(layout.ranks)
    ]
    for m in found:
        checkpoint.load(m, state)
    return found


@pytest.mark.parametrize("layout", [x for n in ORDER for x in layouts(n)], ids=lambda x: x.name)
def test_every_layout_goes_on_from_three_ranks(states: Path, layout: Layout):
    """One step of the reference interpreter from a state that was split in three, unevenly."""
    source = Layout("rtp", 3)
    before = steps_before(source) + 2
    machines = machines_of(layout, gpt2_tiny(), states / "states" / source.name)
    assert {m.step for m in machines} == {before}
    run_step(machines[0].schedule, machines, layout.batches(gpt2_tiny(), before))
    ours = gathered(machines[0].schedule, machines[0].network, [m.storage for m in machines])
    assert_close(named(ours), named(dense(before + 1).parameters))


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (make, layout)
        for make in (llama_tiny, moe_tiny, image_network)
        for layout in (Layout("rtp", 3), Layout("tp", 2, dp=2, options=ZERO1), Layout("fsdp", 3, options=ONE_UNIT))
        if not (make is image_network and layout.strategy == "tp")
    ],
    ids=lambda x: x.name if isinstance(x, Layout) else x.__name__,
)
def test_a_dense_state_dict_gives_the_initial_weights(tmp_path: Path, make, layout: Layout):
    """Groups of heads, gated halves, experts and windows come to the right ranks; training starts at step 0."""
    network = make()
    full = initial_parameters(network, seed=3)
    torch.save({"model": named(full)}, tmp_path / "dense.pt")
    torch_save_to_dcp(tmp_path / "dense.pt", tmp_path / "state")
    machines = machines_of(layout, network, tmp_path / "state")
    assert [m.step for m in machines] == [0] * layout.ranks
    ours = gathered(machines[0].schedule, machines[0].network, [m.storage for m in machines])
    assert_close(named(ours), {name: t.double() for name, t in named(full).items()})


def test_initial_weights_keep_their_precision_in_the_master_weights(tmp_path: Path):
    network, layout = llama_tiny(), as_bf16(Layout("zero1", 2))
    full = named(initial_parameters(network, seed=3))
    torch.save({"model": full}, tmp_path / "dense.pt")
    torch_save_to_dcp(tmp_path / "dense.pt", tmp_path / "state")
    state = checkpoint.open_checkpoint(tmp_path / "state")
    for rank in range(2):
        m = Machine(layout.schedule(network), rank, network, layout.training, blank_parameters(network))
        checkpoint.load(m, state)
        for held in checkpoint.held_by(m):
            box = full[held.piece.name]
            for dim, (first, size) in enumerate(zip(held.piece.offsets, held.piece.sizes, strict=True)):
                box = box.narrow(dim, first, size)
            if held.path[:2] == ("optimizer", "master"):
                assert torch.equal(held.view(), box)
            elif held.path[0] == "model":
                assert torch.equal(held.view(), box.bfloat16())
            else:
                assert not held.view().any()


@pytest.mark.parametrize(
    ("shape", "first", "last", "expected"),
    [
        ((5,), 1, 4, [((1,), (3,))]),
        ((3, 4), 0, 12, [((0, 0), (3, 4))]),
        ((3, 4), 5, 7, [((1, 1), (1, 2))]),
        ((3, 4), 2, 8, [((0, 2), (1, 2)), ((1, 0), (1, 4))]),
        ((3, 4), 3, 9, [((0, 3), (1, 1)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]),
        ((2, 2, 2), 1, 6, [((0, 0, 1), (1, 1, 1)), ((0, 1, 0), (1, 1, 2)), ((1, 0, 0), (1, 1, 2))]),
        ((3, 4), 7, 7, []),
    ],
)  # fmt: skip
def test_a_range_of_a_matrix_as_boxes(shape, first, last, expected):
    assert list(boxes(shape, first, last)) == expected


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4), (3, 1, 2, 2), (1, 1)])
def test_boxes_cover_a_range_once(shape):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for first in range(numbers.numel()):
        for last in range(first, numbers.numel() + 1):
            found = []
            for offsets, sizes in boxes(shape, first, last):
                box = numbers
                for dim, (a, n) in enumerate(zip(offsets, sizes, strict=True)):
                    box = box.narrow(dim, a, n)
                found += box.reshape(-1).tolist()
            assert found == list(range(first, last))


# ---- what cannot be loaded: one message


def machine(network: Network | None = None, layout: Layout | None = None, **changes: object) -> Machine:
    network, layout = network or gpt2_tiny(), layout or Layout("single")
    return Machine(layout.schedule(network), 0, network, layout.training, blank_parameters(network),
                   **({"float_dtype": torch.float64} | changes))  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture
def saved(states: Path, tmp_path: Path) -> Path:
    """A copy of the state of two ranks after step 2, to be damaged."""
    return Path(shutil.copytree(states / "states" / layouts(2)[0].name, tmp_path / "saved"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: machine(gpt2_tiny(16)), None),
        (lambda: machine(llama_tiny()), "parameter embed.tokens.weight is 256 x 64 there and 48 x 32 in model "
                                        "llama-tiny; it is a checkpoint of another model"),
        (lambda: machine(float_dtype=None), "is float64 there and float32 in this run; expected the same --precision"),
        (lambda: machine(layout=Layout("single", optimizer="sgd-momentum")),
         "the training there has optimizer adamw, this run sgd-momentum; expected the same (--optimizer adamw)"),
        (lambda: machine(layout=Layout("single", optimizer="adam")), "optimizer adamw, this run adam"),
        (lambda: machine(layout=as_bf16(Layout("single"))), "master weights are kept in this run and not there"),
        (lambda: machine(unfused(gpt2_tiny())), None),
    ],
)  # fmt: skip
def test_states_of_other_trainings(saved: Path, make, message: str | None):
    state = checkpoint.open_checkpoint(saved)
    if message is None:
        checkpoint.load(make(), state)
        return
    with pytest.raises(InputError) as raised:
        checkpoint.load(make(), state)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"--load {saved / 'step-00000002'}: ")


def test_models_with_more_and_fewer_parameters(saved: Path, tmp_path: Path):
    more = initial_parameters(gpt2_tiny())
    names = named(more)
    for change, message in (
        ({"h9.attn.qkv": torch.zeros(2, 3)}, r"a parameter h9\.attn\.qkv \(2 x 3\), which model gpt2-tiny does not"),
        ({"h0.mlp.up": None}, r"no parameter h0\.mlp\.up of model gpt2-tiny \(256 x 64\)"),
    ):
        left = {k: v for k, v in (names | change).items() if v is not None}
        torch.save({"model": left}, tmp_path / "x.pt")
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        torch_save_to_dcp(tmp_path / "x.pt", tmp_path / "x")
        with pytest.raises(InputError, match=message):
            checkpoint.load(machine(), checkpoint.open_checkpoint(tmp_path / "x"))
    torch.save(names, tmp_path / "flat.pt")
    torch_save_to_dcp(tmp_path / "flat.pt", tmp_path / "flat")
    with pytest.raises(InputError, match=r'no parameters in it; expected their names to begin with "model\.'):
        checkpoint.load(machine(), checkpoint.open_checkpoint(tmp_path / "flat"))


def test_damaged_files(saved: Path):
    step = saved / "step-00000002"
    data = step / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read, a file is missing or damaged: "):
        checkpoint.load(machine(), checkpoint.open_checkpoint(saved))
    data.unlink()
    with pytest.raises(InputError, match="cannot be read, a file is missing or damaged: "):
        checkpoint.load(machine(), checkpoint.open_checkpoint(saved))
    (step / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read, a file is missing or damaged: "):
        checkpoint.open_checkpoint(saved)


def test_the_newest_complete_one_is_taken(saved: Path, tmp_path: Path):
    second = saved / "step-00000002"
    shutil.copytree(second, saved / "step-00000010")
    shutil.copytree(second, saved / "step-00000012")
    (saved / "step-00000012" / ".metadata").unlink()
    shutil.copytree(second, saved / "step-00000014.partial")
    (saved / "step-9").mkdir()
    assert checkpoint_files.complete_steps(saved) == [2, 10]
    assert checkpoint_files.newest(saved) == saved / "step-00000010"
    assert checkpoint_files.newest(second) == second
    with pytest.raises(InputError, match="holds a checkpoint after step 10 already, and this run starts after step 2"):
        checkpoint_files.require_room(saved, 2)
    checkpoint_files.require_room(saved, 10)
    (tmp_path / "empty" / "step-00000003.partial").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no complete checkpoint in it \(only step-00000003\.partial, which was cut"):
        checkpoint_files.newest(tmp_path / "empty")


def test_another_seed(saved: Path):
    state = checkpoint.open_checkpoint(saved)
    assert state.seed_of(0) == 0
    with pytest.raises(InputError, match=r"--seed 5: the training in .* has seed 0; leave --seed out"):
        state.seed_of(5)


# ---- on the command line

WORDS = ("--warmup", 0, "--fp64", "--micro-batch", 6)


def test_save_load_check_and_a_message(tmp_path: Path):
    """From one strategy to another: the check compares with dense training from the loaded weights."""
    first = answered("--strategy", "ddp", "--nproc-per-node", 2, *WORDS, "--steps", 3, "--save", tmp_path / "s",
                     "--save-every", 2, "-o", tmp_path / "a")  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["step-00000002", "step-00000003"]
    assert "saved after step" in first.stdout
    second = answered("--strategy", "rtp", "--rtp", 2, "--micro-batch", 6, "--fp64", "--warmup", 1, "--steps", 1,
                      "--load", tmp_path / "s", "--check", "--format", "json", "-o", tmp_path / "b")  # fmt: skip
    assert second.returncode == 0, second.stderr
    result = json.loads(second.stdout)
    assert result["check"]["passed"]
    assert result["first_step"] == 3
    assert result["loss"] == pytest.approx(dense(5).losses[3:], abs=EXACT)
    # The same run once more, and one that cannot go on.
    again = answered("--strategy", "ddp", "--nproc-per-node", 2, "--save", tmp_path / "s", "-o", tmp_path / "c")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert again.stderr.startswith(f"rtp-sim: --save {tmp_path / 's'}: it holds a checkpoint after step 3 already")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--load", "nowhere"), "there is no such directory"),
        (("--save-every", 2), "save_every says how often to save; expected --save DIR with it"),
    ],
)
def test_words_that_do_not_fit(tmp_path: Path, arguments: tuple[object, ...], message: str):
    done = answered("--strategy", "ddp", "--nproc-per-node", 2, *arguments, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_rank_killed_while_saving_leaves_the_earlier_states(tmp_path: Path):
    """The metadata are written last, and the name comes after them."""
    save = tmp_path / "s"
    process = started(
        "--strategy", "fsdp", "--nproc-per-node", 2, *WORDS, "--steps", 9, "--save", save, "--save-every", 1,
        "-o", tmp_path / "run", PYTHONPATH=str(ROOT / "tests" / "executor_fault"), FAULT="kill-in-save:1:3:",
    )  # fmt: skip
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rank 1 was saving (after step 2): the process was ended by SIGKILL" in err
    assert gone(tmp_path / "run")
    assert checkpoint_files.complete_steps(save) == [1, 2]
    assert [p.name for p in save.glob("*.partial")] == ["step-00000003.partial"]
    assert list((save / "step-00000003.partial").glob("__1_*.distcp"))
    done = answered("--strategy", "tp", "--tp", 2, "--fp64", "--warmup", 0, "--steps", 1, "--load", save, "--save",
                    save, "-o", tmp_path / "on")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert checkpoint_files.complete_steps(save) == [1, 2, 3]
    assert not list(save.glob("*.partial"))
