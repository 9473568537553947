"""Ranks that compute slower than the others: a program of their own each, whose kernels say how slow they are.

A cost model knows kernels by their sizes and not by the rank that runs them, so the factor is one more size of every
kernel of a slow rank. Folding then tells the slow ranks and whoever waits for them from the rest by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.costs import OpCost
from rtp_sim.schedule.ir import Compute, Dims, Program, Schedule
from rtp_sim.stated import slowed

SLOW = "slow_permille"
"""A size that kernels of a slow rank have besides their own."""


class SlowCost(ClusterCost):
    """The prices of a cluster some of whose devices are slow: kernels with the mark take so much longer."""

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel, on a slow rank if its sizes say so."""
        own, permille = unmarked(dims)
        price = super().compute(kernel, dtype, own)
        return price if permille == 1000 else replace(price, duration_ns=slowed(price.duration_ns, permille))


def unmarked(dims: Dims) -> tuple[Dims, int]:
    """A kernel's own sizes, and how many thousandths of its time it takes."""
    own = tuple(size for size in dims if size[0] != SLOW)
    return (dims, 1000) if len(own) == len(dims) else (own, dict(dims)[SLOW])


def slow_apart(schedule: Schedule, slow: Mapping[int, int]) -> Schedule:
    """The same schedule, where each slow rank (by number, with its thousandths) has a program of its own whose kernels
    say how slow they are."""
    programs, of_rank = list(schedule.programs), list(schedule.program_of_rank)
    for rank, permille in slow.items():
        of_rank[rank] = len(programs)
        programs.append(_slow_program(schedule.program(rank), permille))
    return replace(schedule, programs=tuple(programs), program_of_rank=tuple(of_rank))


def _slow_program(program: Program, permille: int) -> Program:
    ops = []
    for op in program.ops:
        action = op.action
        if isinstance(action, Compute):
            mark = ((SLOW, permille),)
            variants = None if action.variants is None else tuple(dims + mark for dims in action.variants)
            action = replace(action, dims=action.dims + mark, variants=variants)
        ops.append(replace(op, action=action))
    return replace(program, name=f"{program.name}, {permille / 1000:g} x slower", ops=tuple(ops))
