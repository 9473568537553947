"""Random schedules for round trips: all that the IR can say, sensible or not, with names that need quotes."""

from __future__ import annotations

from hypothesis import strategies as st

from rtp_sim.schedule.ir import (
    COLLECTIVES,
    Action,
    Buffer,
    Collective,
    Compute,
    Group,
    Holding,
    Hop,
    Op,
    Part,
    Program,
    Recv,
    Schedule,
    Send,
    Shift,
    Site,
)

NAMES = st.sampled_from(
    [
        "w.l0.ff1.a",
        "m0/d.T",
        "x",
        "after",
        "shift",
        "send",
        "-",
        "a b",
        'quo"te',
        "back\\slash",
        "#1",
        "é",
        "",
        "%3",
    ]
) | st.text(max_size=6)
SIZES = st.integers(0, 2**45)


def offsets(dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Offsets along a group of so many dimensions."""
    return st.tuples(*[st.integers(-3, 3)] * dims)


def parts() -> st.SearchStrategy[Part | None]:
    """Shards by offset, in one or two dimensions."""
    return st.none() | st.integers(1, 2).flatmap(lambda n: st.builds(Part, NAMES, offsets(n)))


def sizes() -> st.SearchStrategy[int | tuple[int, ...]]:
    """One size, or one for each shard."""
    return SIZES | st.lists(SIZES, max_size=4).map(tuple)


def dims() -> st.SearchStrategy[tuple[tuple[str, int], ...]]:
    """Named sizes of a kernel."""
    return st.lists(st.tuples(NAMES, SIZES), max_size=3).map(tuple)


def sites() -> st.SearchStrategy[Site | None]:
    """Which kernel of a model, whole or split."""
    return st.none() | st.builds(Site, NAMES, SIZES, NAMES)


def holdings() -> st.SearchStrategy[tuple[Holding, ...]]:
    """What lies in a flat buffer."""
    return st.lists(st.builds(Holding, NAMES, NAMES), max_size=2).map(tuple)


def actions() -> st.SearchStrategy[Action]:
    """Any action."""
    hops = st.builds(Hop, st.integers(1, 2).flatmap(offsets), sizes(), parts())
    transfer = (NAMES, st.integers(1, 2).flatmap(offsets), SIZES, NAMES)
    return st.one_of(
        st.builds(
            Compute, NAMES, NAMES, dims(), parts(), st.none() | st.lists(dims(), max_size=3).map(tuple), sites()
        ),
        st.builds(Shift, NAMES, st.lists(hops, max_size=3).map(tuple), st.none() | SIZES),
        st.builds(Collective, st.sampled_from(COLLECTIVES), NAMES, SIZES, NAMES, st.integers(0, 9)),
        st.builds(Send, *transfer),
        st.builds(Recv, *transfer),
    )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A whole schedule. Only what both forms rely on holds: mappings keyed by name, every rank in one
    program.
    """
    world_size = draw(st.integers(1, 12))
    names = st.lists(NAMES, max_size=3, unique=True)
    ranks = st.lists(st.integers(0, world_size - 1), max_size=world_size).map(tuple)
    groups = {}
    for name in draw(names):
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        groups[name] = Group(name, shape, tuple(draw(st.lists(ranks, max_size=3))))
    programs = tuple(draw(_program()) for _ in range(draw(st.integers(1, 3))))
    of = st.lists(st.integers(0, len(programs) - 1), min_size=world_size, max_size=world_size).map(tuple)
    values = (
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES
    )
    meta = draw(st.dictionaries(NAMES, values, max_size=3))
    return Schedule(draw(NAMES), world_size, groups, programs, draw(of), meta)


@st.composite
def _program(draw: st.DrawFn) -> Program:
    buffers = {}
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        flags = draw(st.booleans()), draw(st.booleans())
        flat = draw(holdings()), draw(NAMES)
        buffers[name] = Buffer(name, draw(NAMES), draw(NAMES), draw(sizes()), draw(parts()), *flags, *flat)
    operands = st.lists(NAMES, max_size=3).map(tuple)
    ops = []
    for i in range(draw(st.integers(0, 5))):
        after = draw(st.lists(st.integers(0, 20), max_size=3).map(tuple))
        used = draw(operands), draw(operands)
        ops.append(Op(i, draw(NAMES), draw(NAMES), draw(actions()), *used, after, draw(st.booleans())))
    return Program(draw(NAMES), buffers, tuple(ops))
