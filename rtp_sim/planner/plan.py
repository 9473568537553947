"""`Candidate` and `Plan`: one way to train a workload on a machine, and all that a search found out about such ways.

A plan is deterministic: it holds no times of the search itself. `plan_json` gives it as plain JSON types, and
`candidate_from_json` reads a candidate back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rtp_sim.experiment import Request
from rtp_sim.metrics import StepMetrics, metrics_row
from rtp_sim.planner.workload import Workload
from rtp_sim.schedule.layout import INNER_AXIS, ORDERS
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES

PLAN_SCHEMA = "rtp-sim/plan/1"
STAGES = ("constraints", "rules", "memory", "bounds", "estimate", "simulate")
"""Where the search can leave a candidate, in its order: what the user wants, the strategy's own rules, memory in
closed form, bounds of the step time, the estimate (`compose.estimate`), the simulation of the finalists, which decides
and is what is shown."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout on one machine. Fields are named as in `experiment.Request` and `schedule.Options`; `inner` is the
    degree of the strategy's own axis (rtp, tp or fsdp), 1 where it has none."""

    cluster: str
    nodes: int
    gpus: int
    strategy: str
    inner: int
    dp: int
    pp: int
    vpp: int
    order: str
    dp_sync: str
    sequence_parallel: bool
    ring: str
    recompute: str
    micro_batch: int
    micro_batches: int

    @property
    def axis(self) -> str:
        """Name of the inner axis; "" for none."""
        return INNER_AXIS.get(self.strategy, "")

    def request(self, workload: Workload) -> Request:
        """What `experiment.run` and `compose.estimate` take."""
        options = Options(
            dp_sync=self.dp_sync, sequence_parallel=self.sequence_parallel, rtp_ring=self.ring, vpp=self.vpp
        )
        return replace(
            workload.request(self.cluster, self.strategy), gpus=self.gpus if self.nodes == 1 else None,
            nodes=self.nodes, inner=self.inner if self.axis else None, dp=self.dp,
            pp=self.pp if self.strategy in PIPELINES else None, order=self.order, micro_batch=self.micro_batch,
            micro_batches=self.micro_batches, recompute=self.recompute, options=options,
        )  # fmt: skip

    def __str__(self) -> str:
        degrees = [f"{self.axis}={self.inner}"] if self.axis and self.inner > 1 else []
        degrees += [f"dp={self.dp}"] if self.dp > 1 else []
        if self.pp > 1:
            degrees += [f"pp={self.pp}"] + ([f"vpp={self.vpp}"] if self.vpp > 1 else [])
            degrees += [self.order] if self.order != ORDERS[0] else []
        degrees += ["sp"] if self.sequence_parallel else []
        degrees += [f"dp-sync={self.dp_sync}"] if self.dp_sync != "ddp" else []
        degrees += [f"ring={self.ring}"] if self.ring != "auto" else []
        batches = [f"mb={self.micro_batch}x{self.micro_batches}", f"recompute={self.recompute}"]
        return " ".join([self.strategy, *degrees, *batches])


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the closed forms say: no step is shorter than `lower_s`, which takes the longer of compute and
    communication; `upper_s` adds them up. `memory_bytes` is the least a rank needs, by category."""

    lower_s: float
    upper_s: float
    memory_bytes: int
    memory_by_category: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Price:
    """What a step means in money and energy. None where the profile states no price or no power. Energy is the
    devices' rated power times the time, whatever they do meanwhile."""

    usd_per_step: float | None
    usd_per_million_tokens: float | None
    kwh_per_step: float | None
    kwh_per_million_tokens: float | None


@dataclass(frozen=True, slots=True)
class Variants:
    """Candidates with the partition counts of a plan that differ from it in lesser things (searched.KIND says which it
    shares): those that were evaluated, with their step times, best first; by how much the farthest of them is slower,
    estimates compared with estimates; how many others have bounds above the plan."""

    seen: tuple[tuple[str, float], ...] = ()
    within: float = 0.0
    beaten_by_bounds: int = 0


TIGHT = 0.9
"""From this part of the usable memory on, published runs took longer than predicted: eight of eight in the two sources
that count tensors (docs/accuracy.md)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate and what the search found out about it.

    `stage` is the last stage that looked at it (STAGES); `feasible` is None if nothing said it does not fit. `reason`
    says why it is not shown, or is "" for a plan. `rank` counts the plans shown from 1; `tie` marks plans whose
    interval meets that of the first. `metrics` and `how` (see compose.estimate.Estimate) are those of the last
    evaluation, None and "" without one; `estimated_s` is the step time before it was simulated, None where it was
    simulated at once or not at all. `variants` are shown with it. `interval_s` is the step time's interval from the
    calibration's residuals, None where the profile has none. `tight` marks plans whose peak is above `TIGHT` of the
    usable memory.
    """

    candidate: Candidate
    stage: str
    feasible: bool | None
    reason: str
    bounds: Bounds | None
    metrics: StepMetrics | None
    how: str
    price: Price | None
    interval_s: tuple[float, float] | None = None
    rank: int | None = None
    tie: bool = False
    estimated_s: float | None = None
    variants: Variants = Variants()
    tight: bool = False


@dataclass(frozen=True, slots=True)
class StageCount:
    """How many candidates came to a stage of the search, and how many it dropped."""

    stage: str
    entered: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of the search: its usable memory per rank with and without the head-room kept free, and prices."""

    cluster: str
    nodes: int
    gpus: int
    memory_bytes: int
    allowed_bytes: int
    price_usd_per_gpu_hour: float | None
    price_source: str
    tdp_w: float | None
    tdp_source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of a search. `shown` is ranked, best first; `front` are the plans of the Pareto front of time, memory
    and cost, by time; `others` the best of every strategy that is not shown, with the reason. `notes` are for readers.
    """

    workload: Workload
    machines: tuple[Machine, ...]
    objective: str
    constraints: Mapping[str, Any]
    candidates: int
    stages: tuple[StageCount, ...]
    shown: tuple[Row, ...]
    front: tuple[Row, ...]
    others: tuple[Row, ...]
    notes: tuple[str, ...]


def candidate_from_json(row: Mapping[str, Any]) -> Candidate:
    """A candidate as `plan_json` wrote it."""
    return Candidate(**{f.name: row[f.name] for f in fields(Candidate)})


def row_json(row: Row) -> dict[str, Any]:
    """A row as plain JSON types."""
    return {
        "rank": row.rank,
        "tie": row.tie,
        "label": str(row.candidate),
        "candidate": asdict(row.candidate),
        "stage": row.stage,
        "feasible": row.feasible,
        "reason": row.reason,
        "bounds": None if row.bounds is None else asdict(row.bounds),
        "metrics": None if row.metrics is None else metrics_row(row.metrics),
        "how": row.how,
        "estimated_step_time_s": row.estimated_s,
        "variants": {
            "seen": [{"label": label, "step_time_s": step_s} for label, step_s in row.variants.seen],
            "within": row.variants.within,
            "beaten_by_bounds": row.variants.beaten_by_bounds,
        },
        "price": None if row.price is None else asdict(row.price),
        "interval_s": None if row.interval_s is None else list(row.interval_s),
        "tight": row.tight,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON types, in a fixed order."""
    return {
        "schema": PLAN_SCHEMA,
        "workload": asdict(plan.workload),
        "machines": [asdict(machine) for machine in plan.machines],
        "objective": plan.objective,
        "constraints": dict(plan.constraints),
        "candidates": plan.candidates,
        "stages": [asdict(stage) for stage in plan.stages],
        "shown": [row_json(row) for row in plan.shown],
        "front": [row_json(row) for row in plan.front],
        "others": [row_json(row) for row in plan.others],
        "notes": list(plan.notes),
    }
